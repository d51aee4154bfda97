"""The settings of a folder or zip of images, and what a look at the files settles of them."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator

from ..core.errors import InputError
from ..core.run_layout import called_after
from ..core.settings import MAY_CHANGE, NOT_IDENTITY, Count, Text
from .datasets.base import DatasetConfig, Facts
from .decoding import MAX_MEGAPIXELS
from .held_out import usual_in_words, usual_share
from .open_files import open_files, sorted_names
from .survey import survey

_MUCH = 0.1  # of the pictures


class ImageFolderConfig(DatasetConfig):
    """The `dataset` group for own pictures."""

    name: Literal["image_folder"] = "image_folder"
    root: Annotated[Text, MAY_CHANGE, NOT_IDENTITY]  # a folder, a .zip, which is read in place, or a folder in one
    # auto: the largest of 16, 32 and 64 not above the pictures' median short side
    image_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = 64
    channels: Literal[1, 3] = 3
    conditional: bool = False  # labels, of dataset.json where there is one, else of folders
    # Which folder of a path is its class; None: the first that divides the images
    class_level: Annotated[Count | None, MAY_CHANGE] = None
    hflip: Annotated[bool, NOT_IDENTITY] = True
    background: Annotated[int, Field(ge=0, le=255)] = 255  # grey level behind transparency; white, as on a page
    skip_broken: Annotated[bool, MAY_CHANGE, NOT_IDENTITY] = False  # what can't be decoded is left out
    max_megapixels: Annotated[float, Field(gt=0, le=100_000), MAY_CHANGE, NOT_IDENTITY] = MAX_MEGAPIXELS
    # Sets that are larger than this, decoded, in 1e9 bytes, are decoded on the fly.
    memory_gb: Annotated[float, Field(ge=0), MAY_CHANGE, NOT_IDENTITY] = 4.0
    # The share that nobody trains on; auto: a twentieth where that is enough. Runs that don't know it have none.
    holdout: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = 0.0
    group: Text | None = None  # a regular expression: see `held_out`
    part: Literal["train", "held_out"] = "train"  # which pictures these are; runs have `train`

    @field_validator("group")
    @classmethod
    def _check_group(cls, group: str | None) -> str | None:
        try:
            re.compile(group or "")
        except (re.error, RecursionError, OverflowError) as error:
            what, fix = f"dataset.group is no regular expression: {error}", "mend it, or drop dataset.group="
            raise InputError(what, group, fix=fix) from None
        return group

    @property
    def run_name(self) -> str:
        return called_after(self.root)

    def facts(self, largest: int) -> Facts:
        files = open_files(self.root)
        names = sorted_names(files, self.root)
        seen = survey(files, names)
        files.close()
        size = seen.image_size(largest) if self.image_size == "auto" else self.image_size
        remarks = [seen.choice_of(size, largest)] if self.image_size == "auto" else []
        if (share := seen.enlarged(size)) > _MUCH:
            remarks.append(f"note: {share:.0%} of the pictures are smaller than {size} pixels, and are enlarged")
        held_out = usual_share(len(names)) if self.holdout == "auto" else self.holdout
        if self.holdout == "auto":
            remarks.append(usual_in_words(len(names), held_out))
        count = max(1, round((1 - held_out) * len(names)))
        return Facts(size, self.channels, count, tuple(remarks), held_out, self.conditional)

    def held_out(self) -> Self | None:
        return self.model_copy(update={"part": "held_out"}) if self.share > 0 else None

    def whole(self) -> Self:
        return self.model_copy(update={"holdout": 0.0, "group": None, "part": "train"})

    def check_for_training(self) -> None:
        if self.part != "train":
            fix = "drop dataset.part=; dataset.holdout=0 holds nothing out"
            raise InputError("a run trains on what is not held out", f"dataset.part={self.part}", "train", fix)

    @property
    def is_part(self) -> bool:
        """Whether these are some of the pictures and not all."""
        return self.part == "held_out" or (self.part == "train" and self.share > 0)

    @property
    def share(self) -> float:
        """`holdout`, once it is settled."""
        assert self.holdout != "auto", "settled by `facts`"
        return self.holdout
