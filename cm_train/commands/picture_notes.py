"""What made a picture, as its PNG tells: written by cm-sample, and read by cm-sample from=..."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from ..core.errors import InputError
from ..core.settings import Settings, typed
from ..data.png_notes import MOST_CHARACTERS
from ..models.denoiser import DenoiserConfig
from ..sampling.labels import drawn_labels
from .sample_folder import Precision, Request

MakeNotes = Callable[[Sequence[int]], list[str]]  # of the images at these places; "" where one would be too long


class Note(Settings):
    """All that determines one image, and where its checkpoint was found."""

    cm_train: str  # the version
    ckpt: str  # as it was given
    step: Annotated[int, Field(ge=0)]
    weights: str
    sha256: str  # of those weights, as in `Request`
    seed: Annotated[int, Field(ge=0)]
    sampler: str
    steps: int
    sigmas: list[float]
    label: int | None
    class_name: str | None
    guidance: Annotated[float, Field(ge=0)]
    precision: Precision

    def text(self) -> str:
        """As it stands in a picture; "" where it is too long for one."""
        text = json.dumps(self.model_dump())
        return text if len(text) <= MOST_CHARACTERS else ""

    @classmethod
    def parsed(cls, text: str, picture: Path) -> Self:
        """Raises InputError where `text`, a stranger's, is no note."""
        try:
            values = json.loads(text)
            if isinstance(values, dict):
                return typed(cls, values)
        except (ValueError, RecursionError) as error:  # InputError is a ValueError
            if isinstance(error, InputError):
                raise InputError(f"the note in {picture} is none of this cm-sample: {error}") from None
        raise InputError(f"the note in {picture} is none of this cm-sample")


def notes_of(request: Request, config: DenoiserConfig) -> MakeNotes:
    """What to write into the pictures of a request, by their places.

    Args:
        config: of the denoiser that draws them.
    """

    def make(places: Sequence[int]) -> list[str]:
        seeds = [request.seed + place for place in places]
        labels: Sequence[int | None] | None = request.classes_at(places)
        if labels is None:
            labels = drawn_labels(seeds, config.num_classes) if config.num_classes else [None] * len(seeds)
        return [note(seed, label).text() for seed, label in zip(seeds, labels, strict=True)]

    def note(seed: int, label: int | None) -> Note:
        named = label is not None and label < len(config.class_names)
        return Note(
            cm_train=request.cm_train,
            ckpt=request.ckpt,
            step=request.step,
            weights=request.weights,
            sha256=request.sha256,
            seed=seed,
            sampler=request.sampler,
            steps=len(request.sigmas),
            sigmas=request.sigmas,
            label=label,
            class_name=config.class_names[label] if named and label is not None else None,
            guidance=request.guidance,
            precision=request.precision,
        )

    return make
