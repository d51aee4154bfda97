"""Other people's checkpoints, read as data: one file a format."""
