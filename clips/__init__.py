"""Videos from files: pictures, animations, films and arrays as frames, and a folder of clips with captions as a data set.

Files are written by `sampling.video_io`. Imports `machine`, `network` and `method`; may be imported from `training` up.
"""
