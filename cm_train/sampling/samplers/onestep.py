"""Consistency sampling in one step."""

from collections.abc import Sequence
from typing import Literal

from ...core.errors import InputError
from ...core.registry import register
from .base import SamplerConfig
from .multistep import Multistep


@register
class OneStep(Multistep):
    """Multistep sampling that is held to one level: what asks for more is a mistake."""

    class Config(SamplerConfig):
        name: Literal["onestep"] = "onestep"

    usual_for = None
    known_as = "multistep"

    def check(self, sigmas: Sequence[float]) -> None:
        if len(sigmas) != 1:
            raise InputError("sampler=onestep makes one step", f"steps={len(sigmas)}", fix="sampler=multistep")
