"""Losses: each owns the networks that it trains or compares with."""
