"""What a run takes on this machine: a few of its steps, made and forgotten."""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.files import write_whole
from ..core.free_memory import free_bytes, give_back, resident_bytes
from ..core.memory import shortage_explained
from ..core.precision import arithmetic
from ..core.registry import component
from ..core.signals import StopFlag, Stopped
from ..core.world import ALONE, World
from ..training.config import RunConfig
from ..training.previews import NUM_PREVIEWS
from ..training.trainer import Trainer
from .build import build_trainer
from .rank import in_rank

_RESULT = "measured.json"
_AT_LEAST, _AT_MOST, _ENOUGH_S = 3, 50, 5.0  # steps, and seconds of them
_HEUN_CALLS = 79  # of the network for a diffusion model's preview
_SLOW_DISK = 200e6  # bytes a second


@dataclass(frozen=True)
class Measured:
    """What a run takes, by which its length is reckoned; all times in seconds.

    Attributes:
        start_s: from the command's word to the first step.
        step_s: a step.
        call_s: one call of the network on the images of a preview.
        save_s: a checkpoint.
        micro_batch: images at once on a rank.
        ranks: processes that train together.
        sigma_data: of the images.
        peak_bytes: that a rank held at most, on its GPU where it has one; the process and the images included.
        free_bytes: that were free before.
    """

    start_s: float
    step_s: float
    call_s: float
    save_s: float
    micro_batch: int
    ranks: int
    sigma_data: float
    peak_bytes: int
    free_bytes: int

    def seconds(self, config: RunConfig) -> float:
        """How long the run of `config` takes, from its start to its end."""
        each = preview_calls(config) * self.call_s
        first = _HEUN_CALLS * self.call_s if config.needs_teacher() else 0.0  # the teacher's, to compare with
        previews = config.num_previews()
        return self.start_s + config.steps * self.step_s + previews * each + bool(previews) * first + self.save_s

    def images_within(self, seconds: float, settled: Callable[..., RunConfig], tried: RunConfig) -> int:
        """How many images a run can train on in that time, at least one.

        Args:
            settled: called with a number of images and `tried`, its config, on which its previews hang.
            tried: the config of what was measured.
        """
        an_image, config, in_time = self.step_s / tried.batch_size, tried, [1]
        for _ in range(8):  # its previews hang on its length, and one more or less may come and go
            others = self.seconds(config) - config.steps * self.step_s
            images = max(1, math.floor((seconds - others) / an_image))
            config = settled(images, tried)
            if self.seconds(config) < seconds + self.step_s:
                in_time.append(images)
        return max(in_time)


def preview_calls(config: RunConfig) -> int:
    """Of the network for a preview: a diffusion model's own grid, or one."""
    return _HEUN_CALLS if component(config.objective).kind == "diffusion" else 1


def measure(config: RunConfig, should_stop: Callable[[float], bool], world: World = ALONE) -> Measured | None:
    """Make some steps of the run of `config` and forget them; None where `should_stop` ended it early.

    A teacher that is not there is stood for. Raises what a run's start raises.
    """
    try:
        with arithmetic(config.precision, config.deterministic):
            return _measure(config, should_stop, world)
    except Stopped:
        return None
    finally:
        give_back()


def _measure(config: RunConfig, should_stop: Callable[[float], bool], world: World) -> Measured | None:
    began, free = time.monotonic(), free_bytes(world.device, world.num_here)
    _forget_peak(world.device)
    with shortage_explained("before the first step", "a smaller backbone= or batch_size="):
        trainer = build_trainer(config, should_stop, world, stand_in=True)
    if not trainer.prepare(lambda: should_stop(0.0)):
        return None
    start_s = time.monotonic() - began
    with shortage_explained("in the first steps", "a smaller backbone= or batch_size="):
        step_s = _time_steps(trainer, should_stop, world)
        if step_s is None:
            return None
        call_s = _time_call(trainer, world)
    state = trainer.state
    return Measured(
        start_s=start_s,
        step_s=step_s,
        call_s=call_s,
        save_s=state.weights.nbytes * (4 + len(state.averages)) / _SLOW_DISK,
        micro_batch=trainer.micro_batch,
        ranks=world.size,
        sigma_data=trainer.objective.denoiser.config.sigma_data,
        peak_bytes=_peak(world.device),
        free_bytes=free,
    )


def _time_steps(trainer: Trainer, should_stop: Callable[[float], bool], world: World) -> float | None:
    """Seconds a step; the first one is for what is done once."""
    times: list[float] = []
    for made in range(_AT_MOST + 1):
        if any(world.any_rank(should_stop(0.0))):
            return None
        began = time.monotonic()
        trainer.train_step(trainer.fetch())
        _wait(world.device)
        if made >= 1:
            times.append(time.monotonic() - began)
        enough = len(times) >= _AT_LEAST and sum(times) > _ENOUGH_S
        if any(world.any_rank(enough)):
            break
    return sum(times) / len(times)


def _time_call(trainer: Trainer, world: World) -> float:
    """Seconds that the images of one preview take in the network."""
    config = trainer.objective.denoiser.config
    num = math.ceil(NUM_PREVIEWS / world.size)
    at_once = min(num, trainer.previews.batch_size)
    x = torch.zeros(at_once, *config.image_shape, device=world.device)
    labels = torch.zeros(at_once, dtype=torch.int64, device=world.device) if config.num_classes else None
    sigma = torch.ones(at_once, device=world.device)
    with torch.no_grad():
        for _ in range(2):  # the first is for what is done once
            began = time.monotonic()
            trainer.objective.denoiser(x, sigma, labels)
            _wait(world.device)
    return (time.monotonic() - began) * num / at_once


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # what this process held at most, from here on
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes(peak=True)


@contextlib.contextmanager
def on_trial(config: RunConfig) -> Iterator[RunConfig]:
    """The config of a run that is measured and forgotten, in a folder that is too."""
    with tempfile.TemporaryDirectory(prefix="cm-train-trial-") as folder:
        yield config.model_copy(update={"run_dir": folder})


def read_result(folder: Path) -> Measured | None:
    """What ranks have measured in `folder`; None where they were stopped."""
    path = folder / _RESULT
    return Measured(**json.loads(path.read_text())) if path.exists() else None


def main() -> None:
    """A rank that measures: the folder of its config is its one argument."""

    def work(config: RunConfig, folder: Path, stop: StopFlag, world: World) -> None:
        measured = measure(config, stop, world)
        if measured is not None and world.is_main:
            write_whole(folder / _RESULT, json.dumps(dataclasses.asdict(measured)).encode())

    in_rank(work)


if __name__ == "__main__":
    main()
