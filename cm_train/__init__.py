"""cm_train: consistency models, distilled or trained from scratch.

>>> from cm_train import generate, load_denoiser
>>> denoiser = load_denoiser("runs/digits-cd")
>>> images = generate(denoiser, seeds=range(64))  # uint8 [64, 1, 8, 8]
"""

import os
from typing import TYPE_CHECKING, Any

# OpenMP threads that wait spin by default. Where other processes share the cores (two runs, a sweep, a test beside
# a run), the spinning takes the very core that the awaited thread needs: runs were seen 20 times slower. Read once,
# when torch is first imported, so it is set here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from .models.checkpoints.load import load_denoiser
    from .sampling.generate import generate

__all__ = ["__version__", "generate", "load_denoiser"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes two seconds, and --help should not.
    if name == "load_denoiser":
        from .models.checkpoints.load import load_denoiser

        return load_denoiser
    if name == "generate":
        from .sampling.generate import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]  # what is not imported yet too
