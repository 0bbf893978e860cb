"""What keeps a run alive: configuration, stages, few-step starts, checkpoints, resume, logs, several processes, the watchdog.

No judge and no drawing of videos. Imports the wings below and the three heart files; `sampling`, `judging` and the scripts import it.
"""
