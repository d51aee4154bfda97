"""Where a command's networks run."""

import torch

from ..core.errors import InputError


def chosen_device(asked: str) -> str:
    """`device=` as torch has it. Raises InputError where there is no such device here."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    known = ["cpu"]
    if gpus:
        known += ["cuda", *(f"cuda:{i}" for i in range(gpus))]
    if asked not in known:
        raise InputError("no such device here", asked, ", ".join(["auto", *known]))
    return asked
