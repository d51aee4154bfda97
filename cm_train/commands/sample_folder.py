"""The folder that cm-sample writes into: its usual name, and the request whose images it holds."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..core.errors import InputError
from ..core.files import may_pass, patiently, read_small, unreadable, write_whole
from ..core.run_layout import run_of
from ..core.settings import Settings, excerpt, typed
from ..core.terminal import say
from ..runs.lock import FolderInUse, refuse_links
from .boundaries import BatchSize, unfinished

REQUEST, IMAGES, PACKED, UNPACKED = "request.json", "images", "samples.npz", ".samples.writing"
PARTS = ".samples.parts"  # images that processes have drawn for an npz, and which are not in their turn yet
SHARES = ".shares"  # what the processes of a command are told to draw, and how far they are

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_MOST_LEVELS = 4  # in a name
_MAX_REQUEST_BYTES = 1 << 22
_NOTHING = frozenset([f".{REQUEST}.writing", ".DS_Store", "lost+found"])  # what a folder may hold that is nobody's
_OTHERS = "an empty folder, or the same request's"


class Request(Settings):
    """What determines images: `request.json`."""

    cm_train: str  # the version
    ckpt: str  # as it was given
    step: int
    weights: str
    sha256: str  # of those weights' file; of the averaged ones' where they are made of snapshots
    num: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    sampler: str
    sigmas: list[float]  # the noise levels, one a step
    labels: int | Annotated[list[int], Field(min_length=1)] | None  # of several each has its turn
    guidance: float
    precision: Precision
    format: Literal["png", "npz"]
    # Which images are drawn together, which moves a pixel by a grey level at most. Older versions have neither.
    batch_size: BatchSize | None = None
    ends: list[Annotated[int, Field(ge=1)]] = []  # how many images it had before it was enlarged, each time

    def classes(self, num: int) -> int | list[int] | None:
        """The class of each of the first `num` images, or of all; None leaves them to the seeds."""
        return self.classes_at(range(num)) if isinstance(self.labels, list) else self.labels

    def classes_at(self, places: Sequence[int]) -> list[int] | None:
        """The class of the image at each of `places`; None leaves them to the seeds."""
        if self.labels is None:
            return None
        several = self.labels if isinstance(self.labels, list) else [self.labels]
        return [several[place % len(several)] for place in places]

    def unfinished(self, missing: Iterable[int]) -> list[range]:
        """The places of each batch of which an image is missing; see `boundaries`."""
        assert self.batch_size is not None, "a folder that is claimed has one"
        return unfinished(missing, self.num, self.batch_size, self.ends)

    def differences(self, other: "Request") -> list[str]:
        """The keys in which `other` means other images than this one, beside their number, and both values."""
        mine, theirs = self.model_dump(), other.model_dump()
        for request, values in ((self, mine), (other, theirs)):
            del values["num"], values["batch_size"], values["ends"]
            # The last digits are another processor's to choose.
            values["sigmas"] = [float(f"{sigma:.9g}") for sigma in values["sigmas"]]
            values["labels"] = request.classes(min(self.num, other.num))
        if self.sha256 == other.sha256:
            del mine["ckpt"]  # a run may be called and lie as it likes
        return [
            f"{key} ({_brief(value)} -> {_brief(theirs[key])})" for key, value in mine.items() if value != theirs[key]
        ]

    def gone_on_with(self, asked: "Request") -> "Request":
        """This request once `asked`, which means the same images, is made of it.

        It keeps the larger number, the checkpoint's first name, and its batches, since these make for equal bytes; but
        for smaller ones that were asked for by name: memory may be short.
        """
        size = min(filter(None, (self.batch_size, asked.batch_size)), default=None)
        if asked.num <= self.num:
            return self.model_copy(update={"batch_size": size, "ends": sorted(self.ends)})
        more = {"num": asked.num, "labels": asked.labels, "ends": sorted({*self.ends, self.num})}
        return self.model_copy(update={"batch_size": size, **more})


def _brief(value: object) -> str:
    text = excerpt(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def default_name(folder: Path, request: Request, sampler: str, has_levels: bool, classes: list[str]) -> str:
    """A folder's name that differs where what is compared does, as digits-cd-step-1200-2-steps-raw.

    Args:
        folder: of the checkpoint.
        sampler: where it is not the usual one.
        has_levels: whether the noise levels were named.
        classes: all names that the checkpoint knows.
    """
    folder = Path(os.path.abspath(folder))
    run = run_of(folder)
    steps = len(request.sigmas)
    parts = [
        f"{run.name}-step-{request.step}",
        f"{steps}-step{'s' * (steps > 1)}",
        "-".join(["at", *(f"{s:g}" for s in request.sigmas)]) if has_levels and steps <= _MOST_LEVELS else "",
        sampler,
        request.weights if request.weights != "ema" else "",
        f"guidance-{request.guidance:g}" if request.guidance != 1 else "",
        _class_part(request.labels, classes),
        f"seed-{request.seed}" if request.seed else "",
        request.precision if request.precision != "fp32" else "",
        request.format if request.format != "png" else "",
    ]
    return "-".join(filter(None, parts))


def _class_part(labels: int | list[int] | None, names: list[str]) -> str:
    """As part of a folder's name: class-cat, class-3, or classes where there are several."""
    if not isinstance(labels, int):
        return "classes" if labels else ""
    is_plain = bool(names) and re.fullmatch(r"[\w.-]{1,40}", names[labels])
    return f"class-{names[labels] if is_plain else labels}"


@contextlib.contextmanager
def claimed(home: Path, request: Request, usual_batch: int) -> Iterator[Request]:
    """Hold `home` for this process, with `request` written in it; yields what it is for altogether.

    More or fewer images of the same request are that request, see `Request.gone_on_with`.

    Args:
        usual_batch: how many images at once where neither `request` nor the folder says.

    Raises:
        InputError: it holds somebody's files or another request's images, is in use, or can't be written.
    """
    _check_ours(home)
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        before = _check_ours(home)
        if before is not None and _has_images(home):
            differences = before.differences(request)
            if differences:
                raise InputError(
                    f"{home} holds the images of another request: {', '.join(differences)}",
                    allowed="another num",
                    fix="out=... in a folder of its own",
                )
            _say_of_batches(before.batch_size, request.batch_size)
            request = before.gone_on_with(request)
        if request.batch_size is None:
            request = request.model_copy(update={"batch_size": usual_batch})
        if request != before:
            with writing(home):
                write_whole(home / REQUEST, json.dumps(request.model_dump(), indent=1).encode())
        yield request


def _say_of_batches(before: int | None, asked: int | None) -> None:
    if before is None or asked is None or asked == before:
        return
    if asked > before:
        say(f"note: in batches of {before}, as it was begun, so that all images are as if never interrupted")
    else:
        say(f"note: in batches of {asked} from now on, not {before}: a pixel may differ by a grey level")


@contextlib.contextmanager
def writing(home: Path) -> Iterator[None]:
    """Around writing into `home`: errors become one line."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"can't write to {home}: {reason}", fix="free space, or set out=...") from None


def _has_images(home: Path) -> bool:
    """Whether anything was drawn: before that, a mistaken request may be corrected."""
    is_there = any((home / name).exists() for name in (PACKED, UNPACKED))
    return is_there or any(any((home / name).glob("*.png")) for name in (IMAGES, PARTS))


def _check_ours(home: Path) -> Request | None:
    """The request that a folder is for; None for an empty one, or none. Raises InputError where it is somebody's."""
    try:
        names = patiently(lambda: set(os.listdir(home)))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # making it says what is wrong with it
    except OSError as error:
        raise unreadable(home, error) from None
    others = sorted(names - _NOTHING)
    if others and REQUEST not in names:
        found = ", ".join(excerpt(name) for name in others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(f"{home} holds other files and no {REQUEST}", found, _OTHERS, "set out=...")
    refuse_links(home, (IMAGES, PARTS, SHARES), "out")
    return _stored(home / REQUEST) if others else None


def _stored(path: Path) -> Request:
    try:
        values: Any = json.loads(read_small(path, _MAX_REQUEST_BYTES).decode("utf-8"))
        if isinstance(values, dict):
            return typed(Request, values)
    except (OSError, ValueError, RecursionError) as error:  # InputError is a ValueError
        if may_pass(error):
            raise unreadable(path, error) from None
    raise InputError(f"{path} is none of this cm-sample", allowed=_OTHERS, fix="set out=...")


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold a folder by a lock on itself, which leaves nothing in it."""
    handle = os.open(home, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks must not keep anyone from sampling
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderInUse(home, "", "folder", "out") from None
        yield
    finally:
        os.close(handle)
