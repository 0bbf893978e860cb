"""Where a run computes: threads, devices and number formats, random streams, files, signals.

Knows nothing of videos. Imports no other wing; every wing may import it.
"""
