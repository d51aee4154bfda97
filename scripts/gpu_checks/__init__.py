"""The rows of scripts/gpu_check.py, one file a part."""
