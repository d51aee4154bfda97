"""What knows no image: errors, settings, randomness, ranks, files, the terminal."""
