"""Averages chosen after training: any width of power-function EMA out of snapshots of one or two others."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import checkpoint
from .ema import MAX_WIDTH, power_exponent
from .errors import InputError
from .manifest import read_manifest
from .tracking import say

PREFIX = "power_"
_LARGE_ERROR = 0.05  # of a profile, from which on the user hears of it


def profile_product(time_a: Tensor, gamma_a: Tensor, time_b: Tensor, gamma_b: Tensor) -> Tensor:
    """The integral of the product of two averages' profiles (gamma + 1) / T (t / T)^gamma on [0, T]; float64.

    Karras et al. 2024 (EDM2), appendix C. Arguments broadcast; times are positive, in any one unit.
    """
    ratio = time_a / time_b
    power = torch.where(time_a < time_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * torch.maximum(time_a, time_b))


def mixture(times: Sequence[float], widths: Sequence[float], time: float, width: float) -> tuple[Tensor, float]:
    """How much of each snapshot makes the average of `width` at `time`: the least squares fit of the profiles.

    Karras et al. 2024 (EDM2), algorithm 3.

    Args:
        times, widths: of each snapshot, 0 < times <= time; widths relative to its time, as `power_exponent` takes them.

    Returns:
        The parts, float64 [len(times)], of sum 1; they may be negative or exceed 1. And how far the profile that they
        make is from the wanted one, relative to that one's size.
    """
    t = torch.tensor(times, dtype=torch.float64)
    gamma = torch.tensor([power_exponent(w) for w in widths], dtype=torch.float64)
    wanted_t, wanted_gamma = (torch.tensor(v, dtype=torch.float64) for v in (time, power_exponent(width)))
    products = profile_product(t[:, None], gamma[:, None], t, gamma)
    overlap = profile_product(t, gamma, wanted_t, wanted_gamma)
    parts = torch.linalg.lstsq(products, overlap[:, None]).solution[:, 0]
    parts = parts / parts.sum()
    size = profile_product(wanted_t, wanted_gamma, wanted_t, wanted_gamma)
    missed = (parts @ products @ parts - 2 * parts @ overlap + size) / size
    return parts, missed.clamp(min=0).sqrt().item()


def reconstruct(run: Path, until: int, weights: str, module: nn.Module) -> None:
    """Load "power_<width>" into `module`, made of a run's snapshots up to the newest one not after step `until`.

    Raises:
        InputError: not a width, or no snapshots.
        DamagedCheckpoint: a snapshot is not what its manifest says.
    """
    width = _width(weights)
    files: list[Path] = []
    for folder in sorted((run / "snapshots").glob("step_[0-9]*")):
        if read_manifest(folder).step <= until:
            files += [folder / name for name in checkpoint.verify(folder).files]
    if not files:
        raise InputError(f"{run} has no snapshots to make an average of", weights, "ema, raw", "train with ema=power")
    steps = [int(file.parent.name.removeprefix("step_")) for file in files]
    widths = [_width(file.stem) for file in files]
    parts, error = mixture(steps, widths, max(steps), width)
    if error > _LARGE_ERROR:
        kept = ", ".join(str(w) for w in sorted(set(widths)))
        say(f"note: {weights} can't be made well of widths {kept}: its profile is off by {error:.0%}")
    # On the CPU, where files are read to, whatever device the network is on.
    total = {name: torch.zeros_like(value, device="cpu") for name, value in module.state_dict().items()}
    for file, part in zip(files, parts.tolist(), strict=True):
        checkpoint.check_fits(file, module)
        for name, value in load_file(file).items():
            total[name] += part * value if value.is_floating_point() else 0
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(total[name])


def _width(weights: str) -> float:
    try:
        width = float(weights.removeprefix(PREFIX))
    except ValueError:
        width = -1.0
    if not 0 < width < MAX_WIDTH:
        raise InputError("not a width of a power-function average", weights, f"{PREFIX}0.05, up to {MAX_WIDTH}")
    return width
