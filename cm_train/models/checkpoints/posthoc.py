"""Averages chosen after training: any width of power-function EMA out of snapshots of one or two others."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.run_layout import SNAPSHOTS, step_of
from ...core.terminal import say
from ..averages import MAX_WIDTH, power_exponent
from . import read as checkpoint
from .manifest import DamagedCheckpoint, Manifest
from .vanishing import present
from .weights import POWER, WeightsFile, stored_weights

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


def reconstruct(run: Path, of: Manifest, weights: str, module: nn.Module) -> None:
    """Load "power_<width>" into `module`, made of a run's snapshots up to the newest one not after a checkpoint.

    Args:
        of: the checkpoint's manifest.

    Raises:
        InputError: not a width, no snapshots, or others than the checkpoint's manifest lists.
        DamagedCheckpoint: a snapshot is not what its own manifest says.
    """
    width = _width(weights)
    kept = {file for file in of.files if file.startswith(POWER)}
    parts = _snapshots(run, of)
    if not parts or not kept:
        known = ", ".join(stored_weights(of))
        raise InputError(f"{run} has no snapshots to make an average of", weights, known, "train with ema=power")
    files, steps, widths = [], [], []
    for folder in parts:
        manifest = checkpoint.verify(folder)
        if manifest.step != step_of(folder.name) or set(manifest.files) != kept:
            raise DamagedCheckpoint(f"snapshot {folder} is of step {manifest.step}, or has other widths than the run")
        for name in sorted(kept):
            files.append(folder / name)
            steps.append(manifest.step)
            widths.append(_width(Path(name).stem))
    shares, error = mixture(steps, widths, max(steps), width)
    if error > _LARGE_ERROR:
        known = ", ".join(str(w) for w in sorted(set(widths)))
        say(f"note: {weights} can't be made well of widths {known}: its profile is off by {error:.0%}")
    # On the CPU, where files are read to, whatever device the network is on.
    total = {name: torch.zeros_like(value, device="cpu") for name, value in module.state_dict().items()}
    trained = {name for name, _ in module.named_parameters()}  # buffers are constants, which a sum would round
    for file, part in zip(files, shares.tolist(), strict=True):
        with present(file.parent):
            stored = WeightsFile(file)
        stored.check_fits(module)
        for name in total:
            value = stored.tensor(name)
            total[name] = total[name] + part * value if name in trained else value
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(total[name])


def snapshots(run: Path) -> dict[int, Path]:
    """The snapshots that lie in a run's folder, by their steps."""
    found = {step_of(folder.name): folder for folder in (run / SNAPSHOTS).glob("*")}
    return {step: folder for step, folder in found.items() if step is not None}


def _snapshots(run: Path, of: Manifest) -> list[Path]:
    """The folders of those that belong to a checkpoint. Raises InputError where one is gone."""
    there = snapshots(run)
    wanted = sorted(step for step in there if step <= of.step) if of.snapshots is None else of.snapshots
    missing = [str(step) for step in wanted if step not in there]
    if missing:
        raise InputError(
            f"snapshots of {run} that an average is made of are gone",
            f"{len(missing)} of {len(wanted)}, of step {', '.join(missing[:3])}",
            fix="bring them back, or use weights=ema",
        )
    return [there[step] for step in wanted]


def _width(weights: str) -> float:
    try:
        width = float(weights.removeprefix(POWER))
    except ValueError:
        width = -1.0
    if not 0 < width < MAX_WIDTH:
        raise InputError("not a width of a power-function average", weights, f"{POWER}0.05, up to {MAX_WIDTH}")
    return width
