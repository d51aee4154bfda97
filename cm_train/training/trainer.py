"""The one loop: steps, log lines, previews, saves, until the end or until it is asked to stop."""

import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..core.errors import InputError, TrainingFailed
from ..core.memory import taken_gib
from ..core.rng import NEWEST, Versions
from ..core.run_layout import METRICS, SAMPLES
from ..core.terminal import duration, say
from ..core.world import ALONE, World
from ..data.loader import Loader
from ..models.checkpoints import read as checkpoint
from ..models.denoiser import Denoiser
from ..objectives.base import Objective
from ..sampling.guidance import Guided
from .config import RunConfig, save_interval
from .evaluations import Evaluations
from .previews import Previews
from .saver import RunSaver
from .steps import Steps
from .tracking import SilentTracker, last_values

_FIRST_PREVIEW_S = 60.0  # after which somebody wants to see something
_PACE_S = 20.0  # after which the pace is known
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
        self._steps_between, self._seconds_between = save_interval(config.save_every)
        self._saved_at = self._logged_at = time.monotonic()
        self._logged_step = self.step
        self._draws_early = False  # a preview after the coming step, since the first one is far away
        self._said_end = False
        self._save_s = 0.0  # what training waits for a save that is written beside it
        self.previews = Previews(config.folder / SAMPLES, self.micro_batch, world, teacher)
        self.evaluations = Evaluations(config, loader.dataset, self.micro_batch, world)

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, tracker: SilentTracker) -> bool:
        """Train to `config.steps`. Returns False where `should_stop` ended it early, after saving.

        Raises:
            InputError: some rank could not read an image; what was trained until then is saved.
            TrainingFailed: `max_skipped` steps in a row were not finite, or the last checkpoint can't be written.
        """
        self._doing = tracker.doing
        self.saver = RunSaver(self.config, self.state, self.provenance, self.versions, self.world, tracker.sync)
        try:
            finished = self._run(tracker)
        except Exception:  # but not KeyboardInterrupt, which asks to quit at once
            self.saver.close()
            raise
        self.saver.close()
        return finished

    def _run(self, tracker: SilentTracker) -> bool:
        if not self.prepare(lambda: self.should_stop(0.0)):
            return False
        first_step, longest_s = self.step, 0.0  # from one vote to the next
        self._started = self._saved_at = self._logged_at = time.monotonic()
        self._first_step = first_step
        self._logged_step = self.step
        # Where the log of the command before ends; a checkpoint that knew the time would differ from run to run.
        earlier = last_values(self.config.folder / METRICS).get("time_s", 0.0)
        self._began = time.monotonic() - earlier
        while self.step < self.config.steps:
            began = time.monotonic()
            data, trouble = self._try_fetch()
            if not self._goes_on(trouble, reserve_s=longest_s + 2 * self.saver.longest_s):
                return False
            if shortage := self._try_step(data):
                self._give_up(shortage)
            self._after_step(tracker)
            if self.step > first_step + 1:  # the first one may compile
                longest_s = max(longest_s, time.monotonic() - began)
        return True

    def _goes_on(self, trouble: str, reserve_s: float) -> bool:
        """Whether the coming step is made, which all ranks decide together; else everything is saved.

        Args:
            trouble: why this rank has no data.
            reserve_s: what one more step and a save may take.

        Raises:
            InputError: some rank has no data.
            TrainingFailed: nothing can be saved.
        """
        is_due = self._seconds_between is not None and time.monotonic() - self._saved_at >= self._seconds_between
        votes = self.should_stop(reserve_s), is_due, bool(trouble), self.saver.is_stuck, self._wants_first_preview()
        stop, is_due, failed, stuck, self._draws_early = self.world.any_rank(*votes)
        if stuck:
            raise TrainingFailed(f"nothing can be saved in {self.config.folder}: {_NO_RENAMING}")
        reason = self.world.first_message(trouble) if failed else ""
        if stop or is_due or failed:
            self._save(must=stop or failed)
        if failed:
            raise InputError(reason)
        return not stop

    def _after_step(self, tracker: SilentTracker) -> None:
        """Log, draw and save what is due after the step that was just made."""
        config, step = self.config, self.step
        tracker.step(step)
        is_last = step == config.steps
        draws, measures = config.draws_at(step), self.evaluations.is_due(step)
        if step % config.log_every == 0 or draws or measures or is_last:
            self._log(tracker, draws, measures)
            self._check_finite()
        elif self._draws_early:  # a picture alone: lines that hang on the clock would differ from run to run
            with tracker.doing("preview"):
                self.previews.make(self.state.averages[0].denoiser, step)
        self._say_end()
        self.saver.snapshot()
        is_best = measures and self.evaluations.is_best
        if is_best or is_last or (self._steps_between is not None and step % self._steps_between == 0):
            self._save(must=is_last)

    def _wants_first_preview(self) -> bool:
        """Whether nobody has seen anything yet for a minute, and the first hundredth of the run is still to come."""
        config = self.config
        is_early = self.previews.num_made == 0 and self.step < config.num_schedule_steps // 100
        waited = time.monotonic() - self._started > _FIRST_PREVIEW_S
        return config.preview_every > 0 and is_early and waited and self.step > self._first_step

    def _say_end(self) -> None:
        """Say once, when the pace is known, when a longer run will be at its end."""
        now, made = time.monotonic(), self.step - self._first_step
        if self._said_end or made < 3 or now - self._started < _PACE_S:
            return
        self._said_end = True
        left_s = (now - self._started) / made * (self.config.steps - self.step) + self._beside_s(self.step)
        if self.world.is_main and left_s > _PACE_S:
            at = time.strftime("%A %H:%M", time.localtime(time.time() + left_s))
            say(f"at this pace it takes {duration(left_s)} more, until {at}")

    def _save(self, must: bool) -> None:
        began = time.monotonic()
        with self._doing("saving"):
            self.saver.save(must=must)
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - began
        self._logged_at += self._save_s  # the rate is that of steps

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

    def _log(self, tracker: SilentTracker, draws: bool, measures: bool) -> None:
        """One line of metrics, with a preview's where one is drawn, and with numbers of images where those are due."""
        step = self.step
        self.state.measure()
        means = self.state.window.close(self.world)  # the one place that waits for the device
        rate = (step - self._logged_step) / max(time.monotonic() - self._logged_at, 1e-9)
        images = step * self.config.batch_size
        values: dict[str, float | None] = {"step": step, "images": images}
        values |= {"epoch": round(images / len(self.loader.dataset), 4), **means}
        values |= {"lr": self.state.optimizer.lr(step - 1), "skipped": int(self.state.skipped)}
        values |= self.objective.schedule(step - 1)
        values |= {"images_per_s": round(rate * self.config.batch_size, 1), "steps_per_s": round(rate, 3)}
        values |= {"time_s": round(time.monotonic() - self._began, 1)}
        values |= {"memory_gib": round(self.world.largest(taken_gib(self.device)), 3)}
        picture = None
        if draws:
            with tracker.doing("preview"):
                picture, measured = self.previews.make(self.state.averages[0].denoiser, step)
            values |= measured
        if measures:
            with tracker.doing("metrics"):
                values |= self.evaluations.make(self.state.averages[0].denoiser, step)
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
        tracker.log(finite, picture, self._beside_s(step))
        self._logged_at, self._logged_step = time.monotonic(), step

    def _beside_s(self, step: int) -> float:
        """What previews and saves will take between here and the end, as far as is known."""
        if step == self.config.steps:
            return 0.0
        saves = 0 if self._steps_between is None else self._times_left(step, self._steps_between) - 1
        drawing_s = self._previews_left(step) * self.previews.took_s
        measuring_s = self.evaluations.num_left(step) * self.evaluations.took_s
        return drawing_s + measuring_s + saves * self._save_s + self.saver.longest_s

    def _previews_left(self, step: int) -> int:
        """How many are drawn after `step`."""
        return self.config.num_previews(step)

    def _times_left(self, step: int, every: int) -> int:
        """How often after `step` something is done that is done each `every` steps and at the end."""
        return -(-self.config.steps // every) - step // every

    def _check_finite(self) -> None:
        """Give up where nothing has been learnt for long; every rank finds the same. Raises TrainingFailed."""
        bad = int(self.state.skipped_in_a_row)
        if bad >= self.config.max_skipped:
            self.saver.wait()
            # Skipped steps moved no weight, so the newest is as good as any.
            good = self.world.run_on_main(lambda: [str(f) for f in checkpoint.folders(self.config.folder)[:1]])
            kept = f"last good checkpoint: {good[0]}" if good else "nothing was saved before"
            raise TrainingFailed(
                f"the last {bad} steps, to step {self.step}, had a loss or gradient that is not finite; {kept}; "
                "fix: start a run of its own from there with init=... and a lower optimizer.lr, or precision=fp32"
            )
