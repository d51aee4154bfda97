"""The one loop: batch, loss, backward, step, averages, log, preview, save."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .compile_policy import compile_alike
from .compiling import CompiledBlocks
from .config import RunConfig, save_interval
from .datasets.loader import Loader
from .denoiser import Denoiser
from .distributed import ALONE, World
from .errors import InputError, OutOfMemory, TrainingFailed
from .guidance import Guided
from .images import to_unit_range
from .manifest import Manifest
from .memory import needed_memory, shortage_explained
from .objectives.base import Batch, Objective
from .previews import Previews
from .run_saver import RunSaver
from .tracking import SilentTracker
from .train_state import TrainState


class Trainer:
    """Trains `objective` on what `loader` gives, in the run folder of `config`.

    Args:
        autocast: type of the networks' arithmetic, None for float32; weights and sums stay float32.
        compiled: whether the networks' blocks are compiled before the first step.
        provenance: what a resumed run must find unchanged; stored in each checkpoint.
        should_stop: asked before each step, with the seconds that one more and a save may take; True on any rank
            saves and ends the run early.
        world: this rank among those that train together.
        teacher: what previews are measured against.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        loader: Loader,
        device: torch.device,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
        provenance: dict[str, str] | None = None,
        should_stop: Callable[[float], bool] = lambda reserve_s: False,
        world: World = ALONE,
        teacher: Denoiser | Guided | None = None,
    ):
        self.config, self.objective, self.loader, self.device = config, objective, loader, device
        self.autocast, self.world = autocast, world
        self.provenance, self.should_stop = provenance or {}, should_stop
        self.rows = world.share(config.batch_size)
        self.micro_batch = len(self.rows) if config.micro_batch is None else config.micro_batch
        self.state = TrainState(config, objective, device, autocast)
        # After the weights have moved: blocks and wrapper remember where they are.
        self.blocks = CompiledBlocks(objective, self.state.averages[0].denoiser) if compiled else None
        self.model: Any = objective
        if world.size > 1:
            ids = [world.local_rank] if device.type == "cuda" else None
            with warnings.catch_warnings():  # the name that torch 2.11 knows is deprecated in 2.14
                warnings.simplefilter("ignore", FutureWarning)
                self.model = DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)
        self.previews = Previews(config.folder / "samples", self.micro_batch, world, teacher)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def resume(self, folder: Path, manifest: Manifest) -> None:
        """Go on from a verified checkpoint exactly as if the run had never stopped.

        Raises:
            InputError: the checkpoint does not fit this run.
        """
        self.state.load(folder, manifest, self.world)

    # ------------------------------------------------------------------------------------------------------ one step

    def fetch(self) -> list[tuple[range, Tensor, Tensor | None]]:
        """This rank's micro-batches of the coming step: rows of the global batch, uint8 images, labels.

        Raises:
            InputError: an image can't be read.
        """
        starts = range(self.rows.start, self.rows.stop, self.micro_batch)
        micro = [range(start, start + self.micro_batch) for start in starts]
        return [(rows, *self.loader.batch_at(self.step, rows)) for rows in micro]

    def train_step(self, data: list[tuple[range, Tensor, Tensor | None]]) -> None:
        """One optimizer step on what `fetch` gave; nothing in it waits for the device."""
        self.state.gradient.zero_()
        for rows, images, labels in data:
            batch = self.objective.draw(to_unit_range(images), labels, self.step, rows)
            self.state.window.add(self._backward(batch, last=rows.stop == self.rows.stop))
        self.state.advance()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's share to the gradient; the last one of a step averages it over the ranks."""
        with contextlib.nullcontext() if last or self.world.size == 1 else self.model.no_sync():
            with self._autocast():
                loss, metrics = self.model(batch)
            total = loss.sum()
            # An infinite loss may have a finite gradient; this one tells every rank to skip the step.
            total = total * torch.where(torch.isfinite(total), 1.0, torch.nan)
            # Ranks average their gradients, so each counts its share `size` times.
            (total * (self.state.loss_scale.factor * self.world.size / self.config.batch_size)).backward()
        return {"loss": loss.detach(), **metrics}

    def compile(self) -> bool:
        """Compile the networks' blocks where that is wanted; to be called before the first step of every start.

        Returns:
            False where `should_stop` ended it early.

        Raises:
            InputError: compile=true can't be had here.
        """
        if self.blocks is None:
            return True
        setting, should_stop = self.config.compile, lambda: self.should_stop(0.0)
        return compile_alike(self.blocks, self._try_out, setting, self.world, should_stop)

    def _try_out(self) -> None:
        with self._autocast():
            self.objective(self._black_batch())

    def _settle(self) -> None:
        """Let DDP lay out its buckets before the first step of every start, on a batch that counts for nothing.

        It does so once, after the first backward pass, and with the layout the order of summation changes: a resumed
        run would add three ranks' gradients in another order than the uninterrupted one.
        """
        if self.world.size > 1:
            self._backward(self._black_batch(), last=True)

    def _black_batch(self) -> Batch:
        """A micro-batch of black images, drawn as the coming step's."""
        config = self.objective.denoiser.config
        rows = range(self.rows.start, self.rows.start + self.micro_batch)
        black = torch.zeros(len(rows), config.image_channels, *[config.image_size] * 2, device=self.device)
        labels = torch.zeros(len(rows), dtype=torch.int64, device=self.device) if config.num_classes else None
        return self.objective.draw(black, labels, self.step, rows)

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, tracker: SilentTracker) -> bool:
        """Train to `config.steps`. Returns False where `should_stop` ended it early, after saving.

        Raises:
            InputError: some rank could not read an image; what was trained until then is saved.
            TrainingFailed: `max_skipped` steps in a row were not finite, or the last checkpoint can't be written.
        """
        self.saver = RunSaver(self.config, self.state, self.provenance, self.world, tracker.sync)
        try:
            finished = self._run(tracker)
        except Exception:  # but not KeyboardInterrupt, which asks to quit at once
            self.saver.close()
            raise
        self.saver.close()
        return finished

    def _run(self, tracker: SilentTracker) -> bool:
        config, clock = self.config, time.monotonic
        steps_between, seconds_between = save_interval(config.save_every)
        saved_at, logged_at = clock(), (clock(), self.step)
        longest, first = 0.0, self.step  # seconds from one vote to the next
        if self.step < config.steps:
            with shortage_explained(f"in step {self.step + 1}", self._for_less_memory()):
                if not self.compile():
                    return False
                self._settle()
        while self.step < config.steps:
            began = clock()
            data, trouble = self._try_fetch()
            timed = seconds_between is not None and clock() - saved_at >= seconds_between
            reserve = longest + 2 * self.saver.longest_s
            stop, timed, failed = self.world.any(self.should_stop(reserve), timed, bool(trouble))
            reason = self.world.first_of(trouble) if failed else ""
            if stop or timed or failed:
                self.saver.save(must=stop or failed)
                saved_at = clock()
            if failed:
                raise InputError(reason)
            if stop:
                return False
            if shortage := self._try_step(data):
                self._give_up(shortage)
            tracker.step(self.step)
            last = self.step == config.steps
            previews = config.preview_every > 0 and (self.step % config.preview_every == 0 or last)
            if self.step % config.log_every == 0 or previews or last:
                logged_at = self._log(tracker, *logged_at, previews)
                self._check_finite()
            self.saver.snapshot()
            if last or (steps_between is not None and self.step % steps_between == 0):
                self.saver.save(must=last)
                saved_at = clock()
            if self.step > first + 1:  # the first one may compile
                longest = max(longest, clock() - began)
        return True

    def _try_fetch(self) -> tuple[Any, str]:
        """The coming step's data, and what was wrong where there is none."""
        try:
            return self.fetch(), ""
        except InputError as error:
            return None, str(error)

    def _try_step(self, data: list[tuple[range, Tensor, Tensor | None]]) -> str | None:
        """One step; what was needed where memory ran out. A rank among others can't go on without them, and raises."""
        try:
            self.train_step(data)
        except Exception as error:
            needed = needed_memory(error)
            if needed is None:
                raise
            if self.world.size > 1:
                raise self._out_of_memory(needed) from error
            return needed
        return None

    def _give_up(self, needed: str) -> NoReturn:
        """Save what was learnt, and raise OutOfMemory. The step that had too little has let go of all it held."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not self.state.is_torn:
            self.saver.save(must=True)
        raise self._out_of_memory(needed)

    def _out_of_memory(self, needed: str) -> OutOfMemory:
        return OutOfMemory(f"in step {self.step + 1}", needed, self._for_less_memory())

    def _for_less_memory(self) -> str:
        return f"micro_batch={max(1, self.micro_batch // 2)} (now {self.micro_batch}), or a smaller backbone="

    def _log(self, tracker: SilentTracker, then: float, then_step: int, previews: bool) -> tuple[float, int]:
        """One line of metrics, with a preview's measures where one is due; returns the time and step of its end."""
        step = self.step
        means = self.state.window.close(self.world)  # the one place that waits for the device
        rate = (step - then_step) / max(time.monotonic() - then, 1e-9)
        values: dict[str, float | None] = {"step": step, "images": step * self.config.batch_size, **means}
        values |= {"lr": self.state.optimizer.lr(step - 1), "skipped": int(self.state.skipped)}
        values |= self.objective.schedule(step - 1)
        values |= {"images_per_s": round(rate * self.config.batch_size, 1), "steps_per_s": round(rate, 3)}
        picture = None
        if previews:
            picture, measured = self.previews.make(self.state.averages[0].denoiser, step)
            values |= measured
        tracker.log({k: v if v is None or math.isfinite(v) else None for k, v in values.items()}, picture)
        return time.monotonic(), step

    def _check_finite(self) -> None:
        """Give up where nothing has been learnt for long; every rank finds the same. Raises TrainingFailed."""
        bad = int(self.state.skipped_in_a_row)
        if bad >= self.config.max_skipped:
            self.saver.wait()
            # Skipped steps moved no weight, so the newest is as good as any.
            good = self.world.decide(lambda: [str(folder) for folder in checkpoint.folders(self.config.folder)[:1]])
            kept = f"last good checkpoint: {good[0]}" if good else "nothing was saved before"
            raise TrainingFailed(
                f"the last {bad} steps, to step {self.step}, had a loss or gradient that is not finite; {kept}; "
                "fix: start a run of its own from there with init=... and a lower optimizer.lr, or precision=fp32"
            )
