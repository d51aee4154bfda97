"""Where a command's networks run."""

from ..core.errors import InputError


def device_for(asked: str) -> str:
    """What `device` means on this machine. Raises InputError where it has no such device."""
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    known = ["cpu"]
    if gpus:
        known += ["cuda", *(f"cuda:{i}" for i in range(gpus))]
    if asked not in known:
        raise InputError("no such device here", asked, ", ".join(["auto", *known]))
    return asked
