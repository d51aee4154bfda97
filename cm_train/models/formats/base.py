"""What every foreign format is read into, and what a person may have to say of a file that can't say it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field
from torch import Tensor

from ...core.errors import InputError
from ...core.settings import Settings
from ..backbones.base import BackboneConfig
from ..denoiser import DenoiserConfig

Preconditioning = Literal["edm", "consistency"]


class CantImport(InputError):
    """A foreign file says too little, or no network has its tensors; the message names the file."""


class Told(Settings):
    """What a person says of a file. None: the file, or its name, says it."""

    # Its coefficients: a diffusion model's (Karras et al. 2022), or a consistency model's.
    preconditioning: Preconditioning | None = None
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_heads: Annotated[int, Field(ge=-1)] | None = None  # of each attention; -1: not set, as OpenAI's tools have it
    num_head_channels: Annotated[int, Field(ge=-1)] | None = None  # wins over num_heads

    def words(self) -> str:
        """What was said, as a command has it; "" for nothing."""
        said = {name: getattr(self, name) for name in Told.model_fields}
        return " ".join(f"{name}={value}" for name, value in said.items() if value is not None)


@dataclass(frozen=True)
class Source:
    """A file's tensors, and what else it says.

    Attributes:
        name: of the file, for messages.
        class_name: of the network, where the file has one.
        attributes: plain values of that network.
    """

    name: str
    tensors: Mapping[str, Tensor]
    class_name: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """A foreign network under our names.

    Attributes:
        weights: float32, by the names of our state dict.
        licence: what binds the weights wherever they were published; "" where that is not known.
    """

    denoiser: DenoiserConfig
    backbone: BackboneConfig
    weights: Mapping[str, Tensor]
    licence: str = ""


class Taken:
    """A file's tensors, each of which has to be taken once."""

    def __init__(self, source: Source):
        self.source = source
        self._left = dict(source.tensors)
        self._ours: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.source.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there. Raises CantImport where it is missing."""
        if name not in self.source.tensors:
            self._missing(name)
        return tuple(self.source.tensors[name].shape)

    def take(self, theirs: str, ours: str) -> None:
        """Give one of theirs our name. Raises CantImport where it is missing."""
        self.put(ours, self.pop(theirs))

    def pop(self, theirs: str) -> Tensor:
        """One of theirs, to be given as something else. Raises CantImport where it is missing."""
        if theirs not in self._left:
            self._missing(theirs)
        return self._left.pop(theirs)

    def put(self, ours: str, value: Tensor) -> None:
        """A tensor under our name."""
        self._ours[f"backbone.{ours}"] = value.float().contiguous()

    def drop(self, *endings: str) -> None:
        """Leave out what is not needed."""
        self._left = {name: value for name, value in self._left.items() if not name.endswith(endings)}

    def all(self) -> dict[str, Tensor]:
        """Everything under our names. Raises CantImport where something of theirs has found no place."""
        if self._left:
            extra = sorted(self._left)
            raise CantImport(
                f"{self.source.name} has tensors that its network has no place for",
                f"{len(extra)} of them, as {extra[0]}",
                fix="the file may be of another network than its other tensors say",
            )
        return self._ours

    def _missing(self, name: str) -> NoReturn:
        raise CantImport(f"{self.source.name} lacks the tensor {name}", fix="was it downloaded whole?")


def by_parts(value: Tensor, order: str, heads: int) -> Tensor:
    """Rows of queries, keys and values in our order of (q|k|v, head, channel).

    Args:
        order: theirs: "qkv head channel", "head qkv channel" or "head channel qkv".
    """
    sizes = {"qkv": 3, "head": heads, "channel": len(value) // 3 // heads}
    axes = order.split()
    parts = value.reshape(*(sizes[axis] for axis in axes), *value.shape[1:])
    places = [axes.index(axis) for axis in ("qkv", "head", "channel")]
    return parts.permute(*places, *range(3, parts.ndim)).reshape(value.shape)
