"""What `auto` stands for in a run's config: settings that suit the images, the mode and the length of the run.

All is stated in images, so that the same command means the same on every machine. The figures were tried on digits,
MNIST, Fashion-MNIST and sets of a few thousand colour pictures; published settings live under experiment=.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core import registry
from ..core.settings import MAX_EXACT, OF_RECIPE
from ..data.datasets.base import Facts
from ..evaluation.comparison import usual_features
from .sizes import AUTO, BATCH, NETWORK, Values, network, usual_batch_size, usual_images

_WARMUP_SHARE, _MOST_WARMUP = 0.05, 25_600  # of the run, in images
_MOST_HALF_LIFE = 4e6  # in images
_HALF_LIFE = {"cd": 0.06, "scd": 0.06, "sct": 0.06, "ct": 0.08, "ect": 0.15}  # as shares of the run; 0.12 elsewhere
_RATE = {"edm": 1e-3, "ict": 4e-4, "ect": 3e-4}  # at 32 channels; 4e-4 elsewhere
_TINY_RATE = {"edm": 1e-3, "cd": 1e-3, "ct": 1e-3, "ict": 3e-4, "ect": 3e-4}  # of the smallest network; 5e-4 elsewhere
_RATE_OFNETWORK = {"edm2": 10.0}  # times those: its weights keep their length, of which the rate is then a share
_CALLS = {"edm": 79}  # of the network for a preview's image; 1 elsewhere
_STEP_CALLS = {"edm": 3}  # forward passes that a step costs an image, or as dear; 6 elsewhere
_FOLLOWERS = ("cd", "scd")  # see noise that a teacher takes away anew each time, so that nothing is learnt by heart
_LONG = 100_000  # steps, from which on the published target decay of CT does not trail too far behind


@dataclass(frozen=True)
class Known:
    """What the settings of a run hang on.

    Attributes:
        network: its name, as "unet".
        channels: base width of the network.
        steps: of the run, as its schedules count.
    """

    mode: str
    data: Facts
    network: str
    channels: int
    batch_size: int
    steps: int

    @property
    def images(self) -> int:
        """In the run."""
        return self.steps * self.batch_size

    @property
    def epochs(self) -> float:
        """Of the run."""
        return self.images / self.data.count


def settle(
    values: Mapping[str, Any], data: Facts, images: int | None = None, like: Mapping[str, Any] | None = None
) -> Values:
    """A run's config with a number for each `auto` that the data, the mode and the run's length decide.

    Args:
        images: how many the run shall train on; None: as many as suit the mode and the data.
        like: a config whose network and batch size count: it was measured what a step of those takes.
    """
    settled = copy.deepcopy(dict(values))
    if like is not None:
        for key in ("batch_size", *(f"backbone.{name}" for name in NETWORK)):
            _fill(settled, key, lambda key=key: _at(like, key, AUTO))  # type: ignore[misc]
    _fill(settled, "dataset.image_size", lambda: data.image_size)
    _fill(settled, "dataset.holdout", lambda: data.held_out)
    _fill(settled, "features.name", lambda: usual_features(data.channels, data.has_classes))
    mode, backbone = str(settled.get("mode")), network(data)
    for key, value in backbone.items():
        _fill(settled, f"backbone.{key}", lambda value=value: value)  # type: ignore[misc]
    if images is None:
        images = usual_images(mode, data)
    _fill(settled, "batch_size", lambda: usual_batch_size(data.count, images, _at(settled, "steps")))
    batch_size = _count(settled, "batch_size", BATCH)
    _fill(settled, "steps", lambda: max(1, round(images / batch_size)))
    steps = _count(settled, "schedule_steps", _count(settled, "steps", 1))
    channels = _count(settled, "backbone.channels", backbone["channels"])
    known = Known(mode, data, str(_at(settled, "backbone.name")), channels, batch_size, steps)
    for key, rule in _RULES.items():
        _fill(settled, key, lambda rule=rule: rule(known))  # type: ignore[misc]
    return settled


def settle_plainly(values: Mapping[str, Any], data: Facts) -> Values:
    """As `settle`, but with each component's own defaults for all that is no matter of size: recipe=none."""
    bare = copy.deepcopy(dict(values))
    for key in ("steps", "batch_size", *_RULES):
        inner, last = _around(bare, key)
        if key not in _OF_WATCHING and inner.get(last) == AUTO:
            del inner[last]
    if (ema := bare.get("ema")) and "half_life_images" not in ema and ema.get("decay") is None:
        del ema["decay"]
    return settle(bare, data)


def settle_as(values: Mapping[str, Any], stored: Mapping[str, Any]) -> Values:
    """A config with the numbers of the run that it goes on with, which were settled once, for each `auto`."""
    settled = copy.deepcopy(dict(values))
    if _at(settled, "ema.half_life_images") == AUTO:  # a run stores the decay that its half-life came to
        settled["ema"] |= {"half_life_images": None, "decay": _at(stored, "ema.decay")}
    own, begun = settled.get("backbone") or {}, stored["backbone"]
    if own.get("name") != begun["name"] and AUTO in (own.get(name) for name in NETWORK):
        # It has taken over a network of another kind than `auto` is: that, trained as this config says.
        recipe = registry.settings("backbone", begun).marked(OF_RECIPE) & own.keys()
        settled["backbone"] = begun | {key: own[key] for key in recipe}
    of_data = ("dataset.image_size", "dataset.holdout")
    for key in ("steps", "batch_size", *of_data, *_RULES, *(f"backbone.{name}" for name in NETWORK)):
        _fill(settled, key, lambda key=key: _at(stored, key, AUTO))  # type: ignore[misc]
    return settled


def without_length(values: Mapping[str, Any]) -> Values:
    """A config without the numbers that hang on its run's length: of two equal ones a step takes the same."""
    bare = copy.deepcopy(dict(values))
    for key in (*_RULES, "ema.decay"):
        inner, last = _around(bare, key)
        inner.pop(last, None)
    return bare


def _learning_rate(known: Known) -> float:
    usual = _RATE.get(known.mode, 4e-4) * math.sqrt(32 / known.channels)
    rate = _TINY_RATE.get(known.mode, 5e-4) if known.channels < 32 else usual
    return float(f"{rate * _RATE_OFNETWORK.get(known.network, 1.0):.2g}")


def _half_life(known: Known) -> float:
    return float(f"{min(_HALF_LIFE.get(known.mode, 0.12) * known.images, _MOST_HALF_LIFE):.3g}")


def _dropout(known: Known) -> float:
    """Against learning a small set by heart."""
    if known.mode in _FOLLOWERS or known.channels < 32 or known.epochs < 60:
        return 0.0
    return 0.1 if known.epochs < 600 else 0.2


def _preview_every(known: Known) -> int:
    """Two to twenty evenly, a twentieth of the run's time at most: 64 images by so many calls of the network."""
    affordable = 0.05 * known.images * _STEP_CALLS.get(known.mode, 6) / (64 * _CALLS.get(known.mode, 1))
    return max(1, round(known.steps / min(max(2, affordable), 20)))


def _last_intervals(known: Known) -> int:
    """s1 of the curriculum: CT's grows with the root of the run's length, iCT's doubles each eighth of it or so."""
    if known.mode == "ct":
        return min(max(round(0.33 * math.sqrt(known.steps)), 5), 150)
    return int(10 * 2 ** min(max(math.floor(math.log2(known.steps / 31.25)), 1), 7))


_RULES: Mapping[str, Callable[[Known], Any]] = {
    "optimizer.lr": _learning_rate,
    "optimizer.warmup_steps": lambda known: math.ceil(
        min(_WARMUP_SHARE * known.images, _MOST_WARMUP) / known.batch_size
    ),
    "optimizer.schedule": lambda known: "constant" if known.mode in ("ct", "ict", "ect") else "cosine",
    "ema.half_life_images": _half_life,
    "backbone.dropout": _dropout,
    "noise.curriculum.s1": _last_intervals,
    "objective.target_decay": lambda known: 0.95 if known.mode == "cd" else 0.9 if known.steps >= _LONG else 0.0,
    "objective.tangent_warmup_steps": lambda known: min(10_000, known.steps // 8),
    "preview_every": _preview_every,
    "log_every": lambda known: min(max(known.steps // 50, 1), 100),
}
_OF_WATCHING = ("preview_every", "log_every")


def _around(values: Values, key: str) -> tuple[Values, str]:
    """The mapping that holds `key`, and its name there; an empty one where there is none."""
    *path, last = key.split(".")
    inner: Any = values
    for part in path:
        inner = inner.get(part) if isinstance(inner, dict) else None
    return (inner if isinstance(inner, dict) else {}), last


def _at(values: Mapping[str, Any], key: str, default: object = None) -> Any:  # noqa: ANN401 - of any key
    inner, last = _around(dict(values), key)
    return inner.get(last, default)


def _fill(values: Values, key: str, rule: Callable[[], Any]) -> None:
    inner, last = _around(values, key)
    if inner.get(last) == AUTO:
        inner[last] = rule()


def _count(values: Values, key: str, default: int) -> int:
    """A number at `key`; the default where there is none yet: what is wrong there is found where it is typed."""
    value = _at(values, key)
    return value if isinstance(value, int) and 0 < value <= MAX_EXACT else default
