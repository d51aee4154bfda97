"""Numbers of generated images, and how much they would be others with other seeds."""

import statistics
from collections.abc import Sequence

import torch

from ..core import rng
from ..core.errors import InputError
from ..core.progress import progress
from ..core.signals import heed
from .metrics.base import Metric, Real
from .result import Number
from .seen import Seen

NUM_HALVES = 10  # of a set of images, by which its spread is estimated


def usable(metrics: Sequence[Metric], samples: Seen, real: Real) -> tuple[list[Metric], list[str]]:
    """The metrics that can be measured on these, and why others can't, a sentence each.

    Raises:
        InputError: none can, or features are not finite.
    """
    for seen in (samples, real.seen, real.held_out):
        if seen is not None and not seen.features.isfinite().all():
            raise InputError(f"features={real.features} gives numbers that are not finite", fix="other features=")
    reasons = {metric: metric.lacks(samples, real) for metric in metrics}
    left_out = [f"{metric.config.name} is left out: {why}" for metric, why in reasons.items() if why is not None]
    good = [metric for metric, why in reasons.items() if why is None]
    if not good:
        raise InputError("none of these metrics can be measured", "; ".join(left_out), fix="metrics=[...]")
    return good, left_out


def numbers(metrics: Sequence[Metric], samples: Seen, real: Real) -> dict[str, float]:
    """What the metrics say of these images, by name. Raises Stopped, see `signals.heed`."""
    found: dict[str, float] = {}
    for metric in metrics:
        heed()
        found |= metric.measure(samples, real)
    return found


def over_blocks(metrics: Sequence[Metric], blocks: Sequence[Seen], real: Real) -> dict[str, Number]:
    """Mean and deviation over blocks of images that were drawn from other seeds each."""
    with progress(len(blocks), "measuring, blocks") as bar:
        rows = []
        for block in blocks:
            rows.append(numbers(metrics, block, real))
            bar.advance()
    return {name: _number([row[name] for row in rows]) for name in rows[0]}


def over_halves(metrics: Sequence[Metric], samples: Seen, real: Real) -> dict[str, Number]:
    """The numbers of all images, and their deviation as halves of them show it.

    A half is drawn without repeats: a resample with repeats looks like a model that repeats itself, which these metrics
    are made to notice. The deviation over halves is the delete-half jackknife's for the whole (Shao & Wu 1989).
    """
    whole = numbers(metrics, samples, real)
    rows: list[dict[str, float]] = []
    with progress(NUM_HALVES, "measuring, halves") as bar:
        for i in range(NUM_HALVES):
            half = rng.permutation(0, "half", i, len(samples))[: len(samples) // 2].sort().values
            good = [metric for metric in metrics if metric.lacks(samples.rows(half), real) is None]
            rows.append(numbers(good, samples.rows(half), real))
            bar.advance()
    found = {}
    for name, value in whole.items():
        values = [row[name] for row in rows if name in row]
        found[name] = Number(mean=value, std=statistics.stdev(values) if len(values) > 1 else None, values=[value])
    return found


def _number(values: list[float]) -> Number:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Number(mean=statistics.fmean(values), std=std, values=values)


def first_rows(seen: Seen, num: int) -> Seen:
    """Of the first `num` images, or all where there are fewer."""
    return seen.rows(torch.arange(min(num, len(seen))))
