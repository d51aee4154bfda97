"""Checkpoints: folders that appear whole or not at all, are verified before use, and can't run code."""
