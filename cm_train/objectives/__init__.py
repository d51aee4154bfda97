"""Losses: each owns the networks it trains or compares with, and the data-parallel wrapper goes around it."""
