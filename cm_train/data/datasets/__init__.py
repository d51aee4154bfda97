"""Data sets: uint8 images by index, with or without class labels."""
