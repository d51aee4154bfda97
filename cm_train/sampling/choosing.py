"""What a request means: by which sampler, and at which noise levels."""

import itertools
from collections.abc import Sequence

from ..core import registry
from ..core.errors import InputError
from ..core.settings import excerpt
from ..models.denoiser import DenoiserConfig, Kind
from .samplers.base import Sampler


def check_sampler(asked: str) -> None:
    """Raise InputError where no sampler is called so, and "auto" is not meant either."""
    known = ["auto", *registry.names("sampler")]
    if asked not in known:
        raise InputError("unknown sampler", excerpt(asked), ", ".join(known))


def find_sampler(asked: str, kind: Kind) -> tuple[str, Sampler]:
    """The sampler that is meant, under the name by which its images are known.

    Args:
        asked: a sampler's name; "auto" takes the usual one for the `kind` of model.

    Raises:
        InputError: there is none of this name.
    """
    check_sampler(asked)
    if asked == "auto":
        names = registry.names("sampler")
        asked = next(name for name in names if registry.find("sampler", name).usual_for == kind)
    sampler: Sampler = registry.make("sampler", {"name": asked})
    return sampler.known_as or asked, sampler


def choose_levels(
    sampler: Sampler, config: DenoiserConfig, steps: int | None = None, sigmas: Sequence[float] | None = None
) -> list[float]:
    """The noise levels that are meant, descending.

    Args:
        config: of the denoiser that samples.
        steps: how many; None leaves that to the sampler: one for a consistency model, the checkpoint's whole grid for
            an ODE.
        sigmas: the levels themselves, descending; they win over what the checkpoint stores for `steps`.

    Raises:
        InputError: these can't be had, or both are given and disagree.
    """
    if steps is not None and steps < 1:
        raise InputError("steps must be positive", steps, "1, 2, 3, ...")
    levels = sampler.levels(config, steps) if sigmas is None else [float(sigma) for sigma in sigmas]
    if sigmas is not None:
        _check_given(levels, config.sigma_min, steps)
    sampler.check(levels)
    return levels


def _check_given(levels: list[float], sigma_min: float, steps: int | None) -> None:
    ordered = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not ordered or levels[-1] < sigma_min or not levels[0] < float("inf"):
        raise InputError("sigmas must descend", str(levels), f"noise levels of at least {sigma_min}")
    if steps is not None and steps != len(levels):
        raise InputError("steps and sigmas disagree", f"steps={steps} and {len(levels)} sigmas", fix="drop steps=")
