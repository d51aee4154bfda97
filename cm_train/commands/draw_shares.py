"""cm-sample by several processes of one machine, each with its share of the batches; both sides of it.

The command holds the folder and says what each draws; a process writes its images, and how many, and nothing else.
Batches are the same ones as with one process, so that the images are too.
"""

import contextlib
import json
import os
import shutil
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from ..core import plugins
from ..core.errors import ExitCode, InputError, TrainingFailed
from ..core.files import not_through_a_link, write_whole
from ..core.launched import place
from ..core.progress import Progress, progress
from ..core.settings import Settings, typed
from ..core.signals import StopFlag, Stopped
from ..core.terminal import say, silence
from ..core.world import World
from ..models.checkpoints.load import load_checkpoint
from ..runs import launch as launching
from ..runs.rank import stop_of_parent, tell
from ..sampling.choosing import find_sampler
from ..sampling.guidance import guided
from .draw_batches import Job, draw
from .sample_files import open_files
from .sample_folder import SHARES, Request, writing

_ORDER, _DRAWN = "order.json", "drawn"
_COUNT = struct.Struct("<q")  # of images, one a process
_LOOK_EVERY_S = 0.25


class Order(Settings):
    """What the processes are to draw together."""

    request: Request
    checkpoint: str
    on_gpus: bool
    batches: list[Annotated[list[int], Field(min_length=2, max_length=2)]]  # the first place of each, and past its last
    compile: bool


def num_processes(devices: int | str, device: str) -> int:
    """How many processes of this machine `devices` and `device` mean together.

    Raises:
        InputError: more than there are, or several on one device.
    """
    if not device.startswith("cuda:"):
        return launching.num_ranks(devices, on_cpu=device == "cpu")
    if devices not in ("auto", 1):
        got = f"device={device} devices={devices}"
        raise InputError("several processes need a device each", got, fix="drop device=, or devices=")
    return 1


def draw_in_shares(num: int, order: Order, out: Path, stop: StopFlag) -> None:
    """Have `num` processes draw what `order` says into `out`, which this one holds.

    Raises:
        InputError, TrainingFailed: one of them can't go on; what was drawn is written.
        Stopped: by a signal; likewise.
    """
    say(f"on {num} processes")
    home = out / SHARES
    try:
        with writing(out):
            home.mkdir(exist_ok=True)
            write_whole(home / _ORDER, order.model_dump_json().encode())
            write_whole(home / _DRAWN, bytes(num * _COUNT.size))
        total = sum(end - start for start, end in order.batches)
        with progress(total, "sampling") as bar, _followed(bar, home / _DRAWN):
            ended = launching.launch(num, __name__, str(out), stop)
        if ended.code == ExitCode.WRONG_INPUT:
            raise InputError(ended.words)
        if ended.code != ExitCode.DONE:
            kept = f"{ended.words or 'a process failed'}; what was drawn is kept in {out}, and the same command goes on"
            raise TrainingFailed(ended.words if ended.says_all else kept)
        if _num_drawn(home / _DRAWN) < total:
            raise Stopped
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _followed(bar: Progress, counts: Path) -> Iterator[None]:
    """Move the one bar by what all processes say of themselves."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(_LOOK_EVERY_S):
            bar.update(_num_drawn(counts))

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        bar.update(_num_drawn(counts))


def _num_drawn(counts: Path) -> int:
    try:
        return sum(count for (count,) in _COUNT.iter_unpack(counts.read_bytes()))
    except (OSError, struct.error):
        return 0


def main() -> None:
    """One of the processes: the folder of the request is its one argument."""
    code = ExitCode.FAILED
    with stop_of_parent():
        try:
            _draw_share(Path(sys.argv[1]))
            code = ExitCode.DONE
        except Stopped:
            code = ExitCode.DONE  # the command knows why
        except InputError as error:
            tell(str(error), says_all=True)
            code = ExitCode.WRONG_INPUT
        except TrainingFailed as error:
            tell(str(error), says_all=True)
        except KeyboardInterrupt:
            pass
        except Exception as error:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            tell(f"{type(error).__name__}: {error}", says_all=False)
    sys.exit(code)


def _draw_share(out: Path) -> None:
    here = place()
    assert here is not None, "the command starts these"
    if here.rank:
        silence()  # what all would say, one says
    plugins.load_in_rank()
    order = typed(Order, json.loads((out / SHARES / _ORDER).read_bytes()))
    request, world = order.request, World(rank=here.rank)
    device = torch.device("cpu")
    if order.on_gpus:
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    folder, _, denoiser = load_checkpoint(order.checkpoint, request.weights, device)
    _, sampler = find_sampler(request.sampler, denoiser.config.kind)
    job = Job(request, folder, guided(denoiser, request.guidance), sampler, out)
    files = open_files(request, out, denoiser.config, here.rank)
    mine = [range(*batch) for batch in order.batches[here.rank :: here.size]]
    drawn = 0
    with open(out / SHARES / _DRAWN, "r+b", opener=not_through_a_link) as counts:

        def advance(more: int) -> None:
            nonlocal drawn
            drawn += more
            os.pwrite(counts.fileno(), _COUNT.pack(drawn), here.rank * _COUNT.size)

        draw(job, files, mine, order.compile, advance, world)


if __name__ == "__main__":
    main()
