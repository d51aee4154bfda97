"""The one loop: batch, loss, backward, step, averages, log, preview, save."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .config import RunConfig, save_interval
from .datasets.loader import Loader
from .denoiser import Denoiser
from .distributed import ALONE, World
from .ema import ema_update, flatten_gradients, flatten_parameters, frozen_copy
from .errors import InputError
from .generation import generate
from .images import grid, save_png, to_unit_range
from .metrics.agreement import agreement
from .objectives.base import Objective
from .registry import build, settings
from .tracking import SilentTracker, say

NUM_PREVIEWS = 64


@dataclass
class Average:
    """One sampling EMA: its final decay, its network, and that network's flat weights."""

    decay: float
    denoiser: Denoiser
    weights: Tensor

    @property
    def name(self) -> str:
        return f"ema_{self.decay}"


class Trainer:
    """Trains `objective` on what `loader` gives, in the run folder of `config`.

    Args:
        autocast: type of the networks' arithmetic, None for float32; weights and sums stay float32.
        compiled: the objective compiled, None to call it as it is.
        provenance: what a resumed run must find unchanged; stored in each checkpoint.
        should_stop: asked after each step; True on any rank saves and ends the run early.
        world: this rank among those that train together.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        loader: Loader,
        device: torch.device,
        autocast: torch.dtype | None = None,
        compiled: Any = None,
        provenance: dict[str, str] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        world: World = ALONE,
    ):
        self.config, self.objective, self.loader, self.device = config, objective, loader, device
        self.autocast, self.world = autocast, world
        self.provenance, self.should_stop = provenance or {}, should_stop
        self.rows = world.share(config.batch_size)
        self.micro_batch = len(self.rows) if config.micro_batch is None else config.micro_batch
        self.step = 0  # steps done

        # The denoiser's weights come first, so that averages and target follow a slice; whatever else an objective
        # learns comes after them.
        denoiser = objective.denoiser
        trained = list(dict.fromkeys([*denoiser.parameters(), *(p for p in objective.parameters() if p.requires_grad)]))
        learned = flatten_parameters(trained)
        self.weights = learned[: sum(p.numel() for p in denoiser.parameters())]
        self.gradient = flatten_gradients(trained)
        # After the weights have moved: the wrapper remembers where they are.
        self.model: Any = objective if compiled is None else compiled
        if world.size > 1:
            ids = [world.local_rank] if device.type == "cuda" else None
            with warnings.catch_warnings():  # the name that torch 2.11 knows is deprecated in 2.14
                warnings.simplefilter("ignore", FutureWarning)
                self.model = DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)
        self.optimizer = build("optimizer", config.optimizer, learned, self.gradient, config.num_schedule_steps)
        self.decay = build("decay", config.ema)
        ema = settings("decay", config.ema)
        self.averages = [Average(d, *frozen_copy(denoiser)) for d in dict.fromkeys([ema.decay, *ema.extra])]

        # fp16 needs its gradients lifted out of the underflow; the scale lives on the device and is never read.
        self.loss_scale = torch.full((), 2.0**16 if autocast == torch.float16 else 1.0, device=device)
        self.clean_steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.window: dict[str, Tensor] = {}  # sums since the last log line
        self._saved_step = 0
        self._teacher_previews: Tensor | None = None

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
        step, batch_size = self.step, self.config.batch_size
        self.gradient.zero_()
        for rows, images, labels in data:
            batch = self.objective.draw(to_unit_range(images), labels, step, rows)
            last = rows.stop == self.rows.stop
            # Ranks average their gradients, once a step, so each counts its share `size` times.
            with contextlib.nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                    loss, metrics = self.model(batch)
                (loss.sum() * (self.loss_scale * self.world.size / batch_size)).backward()
            self._count({"loss": loss.detach(), **metrics})

        grad_norm, applied = self.optimizer.step(step, 1 / self.loss_scale)
        self.objective.after_step(step, self.weights, applied)
        for average in self.averages:
            ema_update(average.weights, self.weights, self.decay.at(average.decay, step), applied)
        self._count({"grad_norm": grad_norm})
        self.skipped += 1 - applied
        if self.autocast == torch.float16:
            self._rescale(applied)
        self.step += 1

    def _rescale(self, applied: Tensor) -> None:
        """Halve the loss scale after an overflow, double it after 2000 clean steps."""
        self.clean_steps.add_(1).mul_(applied)
        grow = self.clean_steps >= 2000
        self.loss_scale.mul_(torch.where(applied > 0, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(min=1.0)
        self.clean_steps.mul_(~grow)

    def _count(self, values: dict[str, Tensor]) -> None:
        """Add to the window's sum and number of values; one that is not finite counts as a skipped step, not here."""
        for name, value in values.items():
            finite = torch.isfinite(value)
            pair = torch.stack([torch.where(finite, value, 0.0).float().sum(), finite.sum()])
            self.window[name] = self.window[name] + pair if name in self.window else pair

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, tracker: SilentTracker) -> bool:
        """Train to `config.steps`. Returns False where `should_stop` ended it early, after saving.

        Raises:
            InputError: some rank could not read an image; what was trained until then is saved.
            OSError: the last checkpoint could not be written.
        """
        config = self.config
        steps_between, seconds_between = save_interval(config.save_every)
        saved_at, logged_at = time.monotonic(), (time.monotonic(), self.step)
        while self.step < config.steps:
            data, trouble = self._try_fetch()
            timed = seconds_between is not None and time.monotonic() - saved_at >= seconds_between
            stop, timed, failed = self.world.any(self.should_stop(), timed, bool(trouble))
            if stop or timed or failed:
                self.save(tracker, must=stop or failed)
                saved_at = time.monotonic()
            if failed:
                raise InputError(self.world.first_of(trouble))
            if stop:
                return False
            self.train_step(data)
            tracker.step(self.step)
            last = self.step == config.steps
            previews = config.preview_every > 0 and (self.step % config.preview_every == 0 or last)
            if self.step % config.log_every == 0 or previews or last:
                logged_at = self._log(tracker, *logged_at, previews)
            if last or (steps_between is not None and self.step % steps_between == 0):
                self.save(tracker, must=last)
                saved_at = time.monotonic()
        return True

    def _try_fetch(self) -> tuple[Any, str]:
        """The coming step's data, and what was wrong where there is none."""
        try:
            return self.fetch(), ""
        except InputError as error:
            return None, str(error)

    def _log(self, tracker: SilentTracker, then: float, then_step: int, previews: bool) -> tuple[float, int]:
        """One line of metrics, with a preview's measures where one is due; returns the time and step of its end."""
        step = self.step
        # The one place that waits for the device.
        sums = self.world.sum_(torch.stack([*self.window.values()])).tolist()
        rate = (step - then_step) / max(time.monotonic() - then, 1e-9)
        values: dict[str, float | None] = {"step": step, "images": step * self.config.batch_size}
        for name, (total, count) in zip(self.window, sums, strict=True):
            values[name] = total / count if count else None
        values |= {"lr": self.optimizer.lr(step - 1), "skipped": int(self.skipped), **self.objective.schedule(step - 1)}
        values |= {"images_per_s": round(rate * self.config.batch_size, 1), "steps_per_s": round(rate, 3)}
        self.window.clear()
        picture = None
        if previews and self.world.is_main:
            picture, measured = self.preview()
            values |= measured
        tracker.log({k: v if v is None or math.isfinite(v) else None for k, v in values.items()}, picture)
        return time.monotonic(), step

    # ------------------------------------------------------------------------------------------------ previews, saving

    def preview(self) -> tuple[Path | None, dict[str, float]]:
        """Write samples of the EMA weights from seeds that never change; measure them against the teacher's."""
        batch_size = min(self.micro_batch, NUM_PREVIEWS)  # no more at once than training has shown to fit
        images = generate(self.averages[0].denoiser, range(NUM_PREVIEWS), batch_size=batch_size)
        values = {}
        teacher = self.objective.teacher
        if teacher is not None:
            # The loss falls during a collapse too; agreement with the teacher does not.
            if self._teacher_previews is None:
                self._teacher_previews = generate(teacher, range(NUM_PREVIEWS), batch_size=batch_size)
            measured = agreement(images, self._teacher_previews)
            values = {"agreement_rms": measured.rms, "agreement_std_ratio": measured.std_ratio}
        path = self.config.folder / "samples" / f"step_{self.step:08d}.png"
        try:
            save_png(grid(images), path)
        except OSError as error:
            say(f"could not write the preview of step {self.step}: {error.strerror}")
            return None, values
        return path, values

    def _window_of_all(self) -> dict[str, Tensor]:
        return {name: self.world.sum_(value.clone()) for name, value in self.window.items()}

    def save(self, tracker: SilentTracker, must: bool = True) -> None:
        """Write a checkpoint. One that fails is retried at the next save; where there is no next, it raises OSError."""
        config, folder = self.config, checkpoint.step_folder(self.config.folder, self.step)
        window = self._window_of_all()
        if not self.world.is_main or self.step in (0, self._saved_step):
            return
        weights = {"denoiser": self.objective.denoiser} | {a.name: a.denoiser for a in self.averages}
        try:
            tracker.sync()
            checkpoint.save(
                folder,
                weights,
                self._state() | {"window": window},
                step=self.step,
                finished=self.step >= config.steps,
                ema=self.averages[0].name,
                denoiser=self.objective.denoiser.config,
                backbone=config.backbone,
                provenance=self.provenance,
            )
            self._saved_step = self.step
            checkpoint.prune(config.folder, config.keep)
        except OSError as error:
            if must:
                raise
            say(f"could not save step {self.step}: {error.strerror}; trying again at the next save")

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.extra_state(),
            "fp16": self.autocast == torch.float16,
            "loss_scale": self.loss_scale,
            "clean_steps": self.clean_steps,
            "skipped": self.skipped,
        }

    def resume(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        """Go on from a verified checkpoint exactly as if the run had never stopped.

        Raises:
            InputError: the checkpoint does not fit this run.
        """
        checkpoint.read_weights(folder, manifest, "raw", self.objective.denoiser)
        for average in self.averages:
            checkpoint.read_weights(folder, manifest, average.name, average.denoiser)
        state = checkpoint.read_state(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in self.objective.extra_state().items():
            tensor.copy_(state["objective"][name])
        self.skipped.copy_(state["skipped"])
        if self.autocast == torch.float16 and state["fp16"]:  # else the scale says nothing
            self.loss_scale.copy_(state["loss_scale"])
            self.clean_steps.copy_(state["clean_steps"])
        # The saved sums are of all ranks; one goes on with them.
        self.window = {k: v.to(self.device) * self.world.is_main for k, v in state["window"].items()}
        self.step = self._saved_step = manifest.step
