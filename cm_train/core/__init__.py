"""What knows no image: errors, settings, randomness, ranks, signals, files, the terminal, the command line."""
