"""Hydra's launchers as they suit runs, and how Hydra hears of them."""
