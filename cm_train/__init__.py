"""cm_train: consistency models, distilled or trained from scratch.

>>> from cm_train import generate, load_denoiser, show, train
>>> run = train(mode="ct", dataset="digits")   # as the command cm-train; the same call goes on with the run
>>> denoiser = load_denoiser(run)              # or a path: load_denoiser("runs/digits-ct")
>>> images = generate(denoiser, 64)            # uint8 [64, 1, 8, 8], one a seed
>>> show(images)                               # a picture, which a notebook displays
>>> denoiser(images / 127.5 - 1, 0.5)          # the network itself: noisy images and their noise level

docs/python.md has more. What is wrong with an argument is an InputError (a ValueError) of one line.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# OpenMP threads that wait spin by default. Where other processes share the cores (two runs, a sweep, a test beside
# a run), the spinning takes the very core that the awaited thread needs: runs were seen 20 times slower. Read once,
# when torch is first imported, so it is set here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from .commands.from_python import train
    from .core.errors import InputError, TrainingFailed
    from .data.show import show
    from .models.checkpoints.load import load_denoiser
    from .sampling.by_hand import captions, class_names, initial_noise
    from .sampling.generate import generate

__all__ = [
    "InputError",
    "TrainingFailed",
    "__version__",
    "captions",
    "class_names",
    "generate",
    "initial_noise",
    "load_denoiser",
    "show",
    "train",
]

# Imported when asked for: torch takes two seconds, and --help should not.
_HOMES = {
    "InputError": "core.errors",
    "TrainingFailed": "core.errors",
    "captions": "sampling.by_hand",
    "class_names": "sampling.by_hand",
    "generate": "sampling.generate",
    "initial_noise": "sampling.by_hand",
    "load_denoiser": "models.checkpoints.load",
    "show": "data.show",
    "train": "commands.from_python",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
