"""Extractors of features, by which images are compared: a file each."""
