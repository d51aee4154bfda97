"""The one loop: batch, loss, backward, step, averages, log, preview, save."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from .ema import ema_update, flatten_gradients, flatten_parameters, frozen_copy, power_decay
from .errors import InputError, TrainingFailed
from .guidance import Guided
from .images import to_unit_range
from .meters import Window
from .objectives.base import Batch, Objective
from .precision import LossScale
from .previews import Previews
from .registry import build, settings
from .saving import Saver
from .tracking import SilentTracker

_SLOW_DISK = 100e6  # bytes a second: what a save is reckoned with until one was seen


@dataclass
class Average:
    """One sampling average: its name in files, its decay at each step, its network and that one's flat weights."""

    name: str
    decay: Callable[[int], float]
    denoiser: Denoiser
    weights: Tensor


class Trainer:
    """Trains `objective` on what `loader` gives, in the run folder of `config`.

    Args:
        autocast: type of the networks' arithmetic, None for float32; weights and sums stay float32.
        compiled: the objective compiled, None to call it as it is.
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
        compiled: Any = None,
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
        decays: dict[str, Callable[[int], float]] = {
            f"ema_{d}": partial(self.decay.at, d) for d in dict.fromkeys([ema.decay, *ema.extra])
        }
        decays |= {f"power_{w}": partial(power_decay, w) for w in ema.power}
        self.averages = [Average(name, decay, *frozen_copy(denoiser)) for name, decay in decays.items()]
        self.snapshot_every = max(1, config.num_schedule_steps // ema.num_snapshots) if ema.power else None

        self.loss_scale = LossScale(autocast, device)
        self.skipped = torch.zeros((), device=device)  # steps that were not finite, and how many of them just now
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.window = Window()
        self.previews = Previews(config.folder / "samples", self.micro_batch, world, teacher)

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
        step = self.step
        self.gradient.zero_()
        for rows, images, labels in data:
            batch = self.objective.draw(to_unit_range(images), labels, step, rows)
            self.window.add(self._backward(batch, last=rows.stop == self.rows.stop))

        grad_norm, applied = self.optimizer.step(step, 1 / self.loss_scale.factor)
        self.objective.after_step(step, self.weights, applied)
        for average in self.averages:
            ema_update(average.weights, self.weights, average.decay(step), applied)
        self.loss_scale.update(applied)
        self.skipped += 1 - applied
        self.skipped_in_a_row.add_(1).mul_(1 - applied)
        self.window.add({"grad_norm": grad_norm})
        self.step += 1

    def _backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's share to the gradient; the last one of a step averages it over the ranks."""
        with contextlib.nullcontext() if last or self.world.size == 1 else self.model.no_sync():
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss, metrics = self.model(batch)
            total = loss.sum()
            # An infinite loss may have a finite gradient; this one tells every rank to skip the step.
            total = total * torch.where(torch.isfinite(total), 1.0, torch.nan)
            # Ranks average their gradients, so each counts its share `size` times.
            (total * (self.loss_scale.factor * self.world.size / self.config.batch_size)).backward()
        return {"loss": loss.detach(), **metrics}

    def _settle(self) -> None:
        """Let DDP lay out its buckets before the first step of every start, on a batch that counts for nothing.

        It does so once, after the first backward pass, and with the layout the order of summation changes: a resumed
        run would add three ranks' gradients in another order than the uninterrupted one.
        """
        if self.world.size > 1:
            config = self.objective.denoiser.config
            rows = range(self.rows.start, self.rows.start + self.micro_batch)
            black = torch.zeros(len(rows), config.image_channels, *[config.image_size] * 2, device=self.device)
            labels = torch.zeros(len(rows), dtype=torch.int64, device=self.device) if config.num_classes else None
            self._backward(self.objective.draw(black, labels, self.step, rows), last=True)

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, tracker: SilentTracker) -> bool:
        """Train to `config.steps`. Returns False where `should_stop` ended it early, after saving.

        Raises:
            InputError: some rank could not read an image; what was trained until then is saved.
            TrainingFailed: `max_skipped` steps in a row were not finite, or the last checkpoint can't be written.
        """
        num_bytes = self.weights.nbytes * (1 + len(self.averages) + 3)  # the optimizer's two moments, and a target
        self.saver = Saver(
            self.config.folder, self.config.keep, tracker.sync, self.step, expected_s=num_bytes / _SLOW_DISK
        )
        self.snapshots = Saver(self.config.folder, keep=None)
        try:
            finished = self._run(tracker)
        except Exception:  # but not KeyboardInterrupt, which asks to quit at once
            self.saver.wait()
            self.snapshots.wait()
            raise
        self.saver.wait()
        self.snapshots.wait()
        return finished

    def _run(self, tracker: SilentTracker) -> bool:
        config, clock = self.config, time.monotonic
        steps_between, seconds_between = save_interval(config.save_every)
        saved_at, logged_at = clock(), (clock(), self.step)
        longest, first = 0.0, self.step  # seconds from one vote to the next
        if self.step < config.steps:
            self._settle()
        while self.step < config.steps:
            began = clock()
            data, trouble = self._try_fetch()
            timed = seconds_between is not None and clock() - saved_at >= seconds_between
            reserve = longest + 2 * self.saver.longest_s
            stop, timed, failed = self.world.any(self.should_stop(reserve), timed, bool(trouble))
            reason = self.world.first_of(trouble) if failed else ""
            if stop or timed or failed:
                self.save(must=stop or failed)
                saved_at = clock()
            if failed:
                raise InputError(reason)
            if stop:
                return False
            self.train_step(data)
            tracker.step(self.step)
            last = self.step == config.steps
            previews = config.preview_every > 0 and (self.step % config.preview_every == 0 or last)
            if self.step % config.log_every == 0 or previews or last:
                logged_at = self._log(tracker, *logged_at, previews)
                self._check_finite()
            if self.snapshot_every is not None and (last or self.step % self.snapshot_every == 0):
                self._snapshot()
            if last or (steps_between is not None and self.step % steps_between == 0):
                self.save(must=last)
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

    def _log(self, tracker: SilentTracker, then: float, then_step: int, previews: bool) -> tuple[float, int]:
        """One line of metrics, with a preview's measures where one is due; returns the time and step of its end."""
        step = self.step
        means = self.window.close(self.world)  # the one place that waits for the device
        rate = (step - then_step) / max(time.monotonic() - then, 1e-9)
        values: dict[str, float | None] = {"step": step, "images": step * self.config.batch_size, **means}
        values |= {"lr": self.optimizer.lr(step - 1), "skipped": int(self.skipped), **self.objective.schedule(step - 1)}
        values |= {"images_per_s": round(rate * self.config.batch_size, 1), "steps_per_s": round(rate, 3)}
        picture = None
        if previews:
            picture, measured = self.previews.make(self.averages[0].denoiser, step)
            values |= measured
        tracker.log({k: v if v is None or math.isfinite(v) else None for k, v in values.items()}, picture)
        return time.monotonic(), step

    def _check_finite(self) -> None:
        """Give up where nothing has been learnt for long; every rank finds the same. Raises TrainingFailed."""
        bad = int(self.skipped_in_a_row)
        if bad >= self.config.max_skipped:
            self.saver.wait()
            # Skipped steps moved no weight, so the newest is as good as any.
            good = self.world.decide(lambda: [str(folder) for folder in checkpoint.folders(self.config.folder)[:1]])
            kept = f"last good checkpoint: {good[0]}" if good else "nothing was saved before"
            raise TrainingFailed(
                f"the last {bad} steps, to step {self.step}, had a loss or gradient that is not finite; {kept}; "
                "fix: start a run of its own from there with init=... and a lower optimizer.lr, or precision=fp32"
            )

    # ------------------------------------------------------------------------------------------------- saving, resuming

    def save(self, must: bool) -> None:
        """Write a checkpoint: beside training, or, where it `must` be there, at once. Every rank calls this.

        Raises:
            TrainingFailed: it must be there, and can't be written.
        """
        window, trouble = self.window.state(self.world), ""
        if self.world.is_main and self.step > 0:
            try:
                self._save(self.saver.now if must else self.saver.start, window)
            except OSError as error:
                trouble = error.strerror or str(error)
        if must and (trouble := self.world.from_main(trouble)):
            raise TrainingFailed(
                f"the checkpoint of step {self.step} could not be written: {trouble}; "
                "fix: make room, and the same command goes on from the one before"
            )

    def _save(self, write: Callable[..., None], window: dict[str, Tensor]) -> None:
        networks = {"denoiser": self.objective.denoiser} | {a.name: a.denoiser for a in self.averages}
        write(
            checkpoint.step_folder(self.config.folder, self.step),
            {stem: network.state_dict() for stem, network in networks.items()},
            self._state() | {"window": window},
            **self._manifest(),
        )

    def _snapshot(self) -> None:
        """Keep the power-function averages of this step, beside training; one that is missed is no great loss."""
        if self.world.is_main:
            powers = [a for a in self.averages if a.name.startswith("power_")]
            folder = self.config.folder / "snapshots" / f"step_{self.step:08d}"
            self.snapshots.start(folder, {a.name: a.denoiser.state_dict() for a in powers}, None, **self._manifest())

    def _manifest(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "finished": self.step >= self.config.steps,
            "ema": self.averages[0].name,
            "denoiser": self.objective.denoiser.config,
            "backbone": self.config.backbone,
            "provenance": self.provenance,
        }

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.extra_state(),
            "loss_scale": self.loss_scale.state(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
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
        try:
            self._load(state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{folder}/state.pt does not fit this run: {error}") from None
        self.step = manifest.step

    def _load(self, state: dict[str, Any]) -> None:
        own = self._state()
        for group in ("optimizer", "objective"):
            for name, tensor in own[group].items():
                _fill(tensor, state[group][name], f"{group} {name}")
        for name in ("skipped", "skipped_in_a_row"):
            _fill(own[name], state[name], name)
        self.loss_scale.load(state["loss_scale"])
        self.window.load(state["window"], self.device, self.world)


def _fill(tensor: Tensor, stored: Any, name: str) -> None:
    """Copy without broadcasting, which would hide a foreign state. Raises TypeError or RuntimeError."""
    if not isinstance(stored, Tensor) or stored.shape != tensor.shape or stored.dtype != tensor.dtype:
        got = f"{stored.dtype} {list(stored.shape)}" if isinstance(stored, Tensor) else type(stored).__name__
        raise TypeError(f"{name}, got {got}, allowed: {tensor.dtype} {list(tensor.shape)}")
    tensor.copy_(stored)
