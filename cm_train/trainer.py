"""The one loop: batch, loss, backward, step, averages, log, preview, save."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .config import RunConfig, save_interval
from .datasets.loader import Loader
from .denoiser import Denoiser
from .ema import ema_update, flatten_gradients, flatten_parameters, frozen_copy
from .generation import generate
from .images import grid, save_png, to_unit_range
from .metrics.agreement import Agreement, agreement
from .objectives.base import Objective
from .registry import build, settings
from .tracking import Tracker

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
        compiled: what calls the objective's forward, e.g. torch.compile of it.
        provenance: what a resumed run must find unchanged; stored in each checkpoint.
        should_stop: asked after each step; True saves and ends the run early.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        loader: Loader,
        device: torch.device,
        tracker: Tracker,
        autocast: torch.dtype | None = None,
        compiled: Callable[..., Any] | None = None,
        provenance: dict[str, str] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.config, self.objective, self.loader, self.device, self.tracker = config, objective, loader, device, tracker
        self.autocast, self.compiled = autocast, objective if compiled is None else compiled
        self.provenance, self.should_stop = provenance or {}, should_stop
        self.schedule_steps = config.schedule_steps or config.steps
        self.step = 0  # steps done

        denoiser = objective.denoiser
        self.weights = flatten_parameters(denoiser)
        self.gradient = flatten_gradients(denoiser)
        self.optimizer = build("optimizer", config.optimizer, self.weights, self.gradient, self.schedule_steps)
        self.decay = build("decay", config.ema)
        ema = settings("decay", config.ema)
        self.averages = [Average(d, *frozen_copy(denoiser)) for d in dict.fromkeys([ema.decay, *ema.extra])]

        # fp16 needs its gradients lifted out of the underflow; the scale lives on the device and is never read.
        self.loss_scale = torch.full((), 2.0**16 if autocast == torch.float16 else 1.0, device=device)
        self.clean_steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.window: dict[str, Tensor] = {}  # sums since the last log line
        self._teacher_previews: Tensor | None = None

    # ------------------------------------------------------------------------------------------------------ one step

    def train_step(self) -> None:
        """One optimizer step on one global batch; nothing in it waits for the device."""
        step, batch_size = self.step, self.config.batch_size
        micro = self.config.micro_batch or batch_size
        self.gradient.zero_()
        for start in range(0, batch_size, micro):
            rows = range(start, start + micro)
            images, labels = self.loader.batch_at(step, rows)
            images = to_unit_range(images.to(self.device, non_blocking=True))
            labels = None if labels is None else labels.to(self.device, non_blocking=True)
            batch = self.objective.draw(images, labels, step, rows)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss, metrics = self.compiled(batch)
            (loss.sum() * (self.loss_scale / batch_size)).backward()
            self._count({"loss": loss.detach(), **metrics})

        grad_norm, applied = self.optimizer.step(step, 1 / self.loss_scale)
        self.objective.after_step(step, self.weights, applied)
        for average in self.averages:
            ema_update(average.weights, self.weights, self.decay.at(average.decay, step), applied)
        self._count({"grad_norm": grad_norm.nan_to_num(0.0, 0.0, 0.0)})
        self.skipped += 1 - applied
        if self.autocast == torch.float16:
            self._rescale(applied)
        self.step += 1

    def _rescale(self, applied: Tensor) -> None:
        """Halve the loss scale after an overflow, double it after 2000 clean steps."""
        self.clean_steps.add_(1).mul_(applied)
        grow = self.clean_steps >= 2000
        self.loss_scale.mul_(torch.where(applied > 0, torch.where(grow, 2.0, 1.0), 0.5))
        self.clean_steps.mul_(~grow)

    def _count(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            pair = torch.stack([value.float().sum(), value.new_full((), value.numel(), dtype=torch.float32)])
            self.window[name] = self.window[name] + pair if name in self.window else pair

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> bool:
        """Train to `config.steps`. Returns False where `should_stop` ended it early, after saving."""
        config = self.config
        steps_between, seconds_between = save_interval(config.save_every)
        saved_at, logged_at = time.monotonic(), (time.monotonic(), self.step)
        while self.step < config.steps:
            self.train_step()
            self.tracker.terminal.step(self.step)
            last, stop = self.step == config.steps, self.should_stop()
            if self.step % config.log_every == 0 or last:
                logged_at = self._log(*logged_at)
            if config.preview_every and (self.step % config.preview_every == 0 or last):
                self.preview()
            due = steps_between and self.step % steps_between == 0
            if due or last or stop or (seconds_between and time.monotonic() - saved_at >= seconds_between):
                self.save(must=last or stop)
                saved_at = time.monotonic()
            if stop and not last:
                return False
        return True

    def _log(self, then: float, then_step: int) -> tuple[float, int]:
        now, step = time.monotonic(), self.step
        sums = torch.stack([*self.window.values()]).cpu()  # the one place that waits for the device
        rate = (step - then_step) / max(now - then, 1e-9)
        values: dict[str, float] = {"step": step, "images": step * self.config.batch_size}
        values |= {name: (total / count).item() for name, (total, count) in zip(self.window, sums, strict=True)}
        values |= {"lr": self.optimizer.lr(step - 1), "skipped": int(self.skipped), **self.objective.schedule(step - 1)}
        values |= {"images_per_s": round(rate * self.config.batch_size, 1), "steps_per_s": round(rate, 3)}
        self.window.clear()
        self.tracker.log(values)
        return now, step

    # ------------------------------------------------------------------------------------------------ previews, saving

    def preview(self) -> None:
        """Write samples of the EMA weights from seeds that never change; measure them against the teacher's."""
        images = generate(self.averages[0].denoiser, range(NUM_PREVIEWS))
        path = self.config.folder / "samples" / f"step_{self.step:08d}.png"
        save_png(grid(images), path)
        values = {}
        if self.objective.teacher is not None:
            # The loss falls during a collapse too; agreement with the teacher does not.
            if self._teacher_previews is None:
                self._teacher_previews = generate(self.objective.teacher, range(NUM_PREVIEWS), sampler="heun")
            measured: Agreement = agreement(images, self._teacher_previews)
            values = {"agreement_rms": measured.rms, "agreement_std_ratio": measured.std_ratio}
        self.tracker.preview(self.step, path, values)

    def save(self, must: bool = True) -> None:
        """Write a checkpoint. One that fails is retried at the next save; where there is no next, it raises."""
        config, folder = self.config, checkpoint.step_folder(self.config.folder, self.step)
        self.tracker.metrics.sync()
        weights = {"denoiser": self.objective.denoiser} | {a.name: a.denoiser for a in self.averages}
        try:
            checkpoint.save(
                folder,
                weights,
                self._state(),
                step=self.step,
                finished=self.step >= config.steps,
                ema=self.averages[0].name,
                denoiser=self.objective.denoiser.config,
                backbone=config.backbone,
                provenance=self.provenance,
            )
        except OSError as error:
            if must:
                raise
            self.tracker.terminal.say(
                f"could not save step {self.step}: {error.strerror}; trying again at the next save"
            )
            return
        checkpoint.prune(config.folder, config.keep)

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.extra_state(),
            "loss_scale": self.loss_scale,
            "clean_steps": self.clean_steps,
            "skipped": self.skipped,
            "window": self.window,
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
        for name in ("loss_scale", "clean_steps", "skipped"):
            getattr(self, name).copy_(state[name])
        self.window = {name: value.to(self.device) for name, value in state["window"].items()}
        self.step = manifest.step
