"""What is saved of a run as it trains, and when it must be: checkpoints, and snapshots of power-function averages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import registry
from ..core.errors import TrainingFailed
from ..core.rng import Versions
from ..core.run_layout import SNAPSHOTS, step_folder, step_name
from ..core.world import World
from ..models.checkpoints import posthoc
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints.write import CantAppear, Saver, prune
from .best import best_checkpoint
from .config import RunConfig
from .state import TrainState

_BESIDE_BEST = 2  # newest checkpoints that `keep=best` keeps: one could be damaged
_MOST_REFUSED = 3  # saves in a row that may fail for want of renaming, before the run is not worth its time
_SLOW_DISK = 100e6  # bytes a second: what a save is reckoned with until one was seen


class RunSaver:
    """Saves `state` into the run folder of `config`. Rank 0 writes; every rank calls `save` and `snapshot` alike.

    Args:
        provenance: what a resumed run must find unchanged.
        versions: how the run draws its random numbers, see `rng.NEWEST`.
        before: called ahead of each checkpoint; what it syncs is on the disk before that appears.
    """

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        provenance: dict[str, str],
        versions: Versions,
        world: World,
        before: Callable[[], None] = lambda: None,
    ):
        self._config, self._state, self._world = config, state, world
        self._provenance, self._versions = provenance, versions
        num_bytes = state.weights.nbytes * (1 + len(state.averages) + 3)  # the optimizer's two moments, and a target
        expected_s = num_bytes / _SLOW_DISK
        self._checkpoints = Saver(self._before_saving, self._after_saving, state.step, expected_s)
        self._snapshots = Saver(after=lambda step: self._taken.append(step))
        known = state.snapshots
        if known is None:  # of a checkpoint that was written before they were listed
            known = [step for step in posthoc.snapshots(config.folder) if step <= state.step]
        self._sync, self._taken = before, known
        if world.is_main:
            self._checkpoints.prepare(state.networks(), state.other_tensors())
            self._snapshots.prepare(self._powers(), None)
        ema = config.ema
        self._snapshot_every = max(1, config.num_schedule_steps // ema.num_snapshots) if ema.power else None

    @property
    def longest_s(self) -> float:
        """What writing a checkpoint takes at most, as far as is known; in seconds."""
        return self._checkpoints.longest_s

    @property
    def is_stuck(self) -> bool:
        """Whether saving has been refused for good."""
        return self._checkpoints.num_refused >= _MOST_REFUSED

    def save(self, must: bool) -> None:
        """Write a checkpoint: beside training, or, where it `must` be there, at once.

        Raises:
            TrainingFailed: it must be there, and can't be written.
        """
        window, trouble = self._state.window.state(self._world), ""
        if self._world.is_main and self._state.step > 0:
            write = self._checkpoints.now if must else self._checkpoints.start
            folder = step_folder(self._config.folder, self._state.step)
            try:
                write(
                    folder, self._state.networks(), self._state.other_tensors() | {"window": window}, **self._manifest()
                )
            except OSError as error:
                fix = "run_dir=... elsewhere" if isinstance(error, CantAppear) else "make room"
                trouble = f"{error.strerror or error}; fix: {fix}, and the same command goes on from the one before"
        if must and (trouble := self._world.broadcast(trouble)):
            raise TrainingFailed(f"the checkpoint of step {self._state.step} could not be written: {trouble}")

    def snapshot(self) -> None:
        """Keep the power-function averages where one is due, beside training; a missed one is no great loss."""
        step = self._state.step
        if self._snapshot_every is None or not self._world.is_main:
            return
        if step == self._config.steps or step % self._snapshot_every == 0:
            folder = self._config.folder / SNAPSHOTS / step_name(step)
            self._snapshots.start(folder, self._powers(), None, **self._manifest())

    def wait(self) -> None:
        """Return when nothing is being written."""
        self._checkpoints.wait()
        self._snapshots.wait()

    def close(self) -> None:
        """Wait, and give back the memory that saving has held."""
        self._checkpoints.close()
        self._snapshots.close()

    def _before_saving(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` counts on is on the disk; the snapshots are named that there are until then."""
        self._sync()
        if self._snapshot_every is None:
            return {}
        self._snapshots.settle()
        return {"snapshots": sorted({s for s in self._taken if s <= step})}

    def _after_saving(self, step: int) -> None:
        folder = self._config.folder
        checkpoint.record_save(folder, step)
        keep, best = self._config.keep, None
        if keep == "best":
            best = best_checkpoint(self._config)
        prune(folder, _BESIDE_BEST if keep == "best" else keep, None if best is None else best.step)

    def _powers(self) -> dict[str, dict[str, Tensor]]:
        return {a.name: a.denoiser.state_dict() for a in self._state.averages if a.name.startswith("power_")}

    def _manifest(self) -> dict[str, Any]:
        return {
            "step": self._state.step,
            "finished": self._state.step >= self._config.steps,
            "ema": self._state.averages[0].name,
            "denoiser": self._state.objective.denoiser.config,
            "backbone": self._config.backbone,
            "plugins": registry.plugins_of(self._config.backbone),
            "provenance": self._provenance,
            "versions": dict(self._versions),
            "threads": torch.get_num_threads(),
        }
