"""From a checkpoint and wishes to videos: samplers, streams, reading and writing video files.

The rollout itself is in `dynamic_video_sf`. Imports `training` and below; the scripts and `experiments` import it.
"""
