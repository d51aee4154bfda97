"""The one loop: steps, log lines, previews, saves, until the end or until it is asked to stop."""

import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..core.errors import InputError, TrainingFailed
from ..core.rng import NEWEST, Versions
from ..core.run_layout import SAMPLES
from ..core.world import ALONE, World
from ..data.loader import Loader
from ..models.checkpoints import read as checkpoint
from ..models.denoiser import Denoiser
from ..objectives.base import Objective
from ..sampling.guidance import Guided
from .config import RunConfig, save_interval
from .previews import Previews
from .saver import RunSaver
from .steps import Steps
from .tracking import SilentTracker

_NO_RENAMING = "its file system can't rename folders, by which checkpoints appear whole; fix: run_dir=... elsewhere"


class Trainer(Steps):
    """Trains `objective` on what `loader` gives, in the run folder of `config`.

    Args:
        autocast: type of the networks' arithmetic, None for float32; weights and sums stay float32.
        compiled: whether the networks' blocks are compiled before the first step.
        provenance: what a resumed run must find unchanged; stored in each checkpoint.
        versions: how the run draws its random numbers, see `rng.NEWEST`; stored likewise.
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
        versions: Versions = NEWEST,
        should_stop: Callable[[float], bool] = lambda reserve_s: False,
        world: World = ALONE,
        teacher: Denoiser | Guided | None = None,
    ):
        super().__init__(config, objective, loader, device, autocast, compiled, world)
        self.provenance, self.versions, self.should_stop = provenance or {}, versions, should_stop
        self.previews = Previews(config.folder / SAMPLES, self.micro_batch, world, teacher)

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, tracker: SilentTracker) -> bool:
        """Train to `config.steps`. Returns False where `should_stop` ended it early, after saving.

        Raises:
            InputError: some rank could not read an image; what was trained until then is saved.
            TrainingFailed: `max_skipped` steps in a row were not finite, or the last checkpoint can't be written.
        """
        self.saver = RunSaver(self.config, self.state, self.provenance, self.versions, self.world, tracker.sync)
        try:
            finished = self._run(tracker)
        except Exception:  # but not KeyboardInterrupt, which asks to quit at once
            self.saver.close()
            raise
        self.saver.close()
        return finished

    def _run(self, tracker: SilentTracker) -> bool:
        config, clock = self.config, time.monotonic
        if not self.prepare(lambda: self.should_stop(0.0)):
            return False
        steps_between, seconds_between = save_interval(config.save_every)
        saved_at, logged_at = clock(), (clock(), self.step)
        longest, first = 0.0, self.step  # seconds from one vote to the next
        while self.step < config.steps:
            began = clock()
            data, trouble = self._try_fetch()
            timed = seconds_between is not None and clock() - saved_at >= seconds_between
            reserve = longest + 2 * self.saver.longest_s
            votes = self.should_stop(reserve), timed, bool(trouble), self.saver.is_stuck
            stop, timed, failed, stuck = self.world.any(*votes)
            if stuck:
                raise TrainingFailed(f"nothing can be saved in {config.folder}: {_NO_RENAMING}")
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

    def _give_up(self, needed: str) -> NoReturn:
        """Save what was learnt, and raise OutOfMemory. The step that had too little has let go of all it held."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not self.state.is_torn:
            self.saver.save(must=True)
        raise self._out_of_memory(needed)

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
