"""One run, from its config to a trained folder: claimed, new or resumed, executed, summed up. It knows no teacher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.run_layout import CHECKPOINTS, RUN_LOG, SNAPSHOTS
from ..core.run_log import logged
from ..core.terminal import say
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints import write as saving
from ..models.checkpoints.manifest import Manifest
from ..training.config import RunConfig, dump
from . import announce
from .lock import check_ours, lock
from .machine import Execute
from .read_back import read_back
from .same_run import check_same_run
from .stored import store_config


def run_one(config: RunConfig, execute: Execute) -> bool:
    """Train the run of `config` to its end, new or resumed; False where it was stopped early.

    Raises:
        InputError: its folder is in use or not a run's, or holds another run.
    """
    with claimed(config.folder) as claim:
        return claim.train(claim.resumed(config), execute)


@contextmanager
def claimed(folder: Path) -> Iterator["Claim"]:
    """A run's folder, held by this process, and what is in it. Raises InputError where it can't be had."""
    check_ours(Path(os.path.normpath(folder)))
    with lock(folder):
        check_ours(folder)  # again: x/../y may be another folder once x is there
        for part in (CHECKPOINTS, SNAPSHOTS):
            saving.remove_unfinished(folder / part)
        newest = checkpoint.newest_manifest(folder)
        if newest is not None:
            checkpoint.record_save(folder, newest.step)  # of a version that did not, or killed before it could
        with logged(folder / RUN_LOG):
            yield Claim(folder, newest, None if newest is None else read_back(folder))


class Claim:
    """A run's folder while this process holds it.

    Attributes:
        newest: the newest checkpoint's manifest; None for a new run, of which nothing can be lost yet: its config may
            still change, as when a mistaken first command is corrected.
        stored: the config that the run was last trained with; None for a new run.
    """

    def __init__(self, folder: Path, newest: Manifest | None, stored: RunConfig | None):
        self.folder, self.newest, self.stored = folder, newest, stored
        self._is_verified = False  # whether `newest` is a checkpoint whose files were all read

    def resumed(self, config: RunConfig) -> RunConfig:
        """`config` as the run goes on with it. Raises InputError where it means another run than the stored one."""
        if self.stored is None:
            return config
        # Raising `steps` moves the end; what the schedules count to stays as it was first set.
        if config.schedule_steps is None:
            config = config.model_copy(update={"schedule_steps": self.stored.schedule_steps})
        check_same_run(self.folder, self.stored, config)
        return config

    def is_finished(self, config: RunConfig) -> bool:
        """Whether a good checkpoint of the last step is there; a damaged one is set aside, and trained again."""
        if self.newest is not None and self.newest.step >= config.steps and not self._is_verified:
            self._is_verified = True
            found = checkpoint.latest(self.folder, set_aside=True)
            self.newest = None if found is None else found[1]
        return self.newest is not None and self.newest.step >= config.steps

    def train(self, config: RunConfig, execute: Execute) -> bool:
        """Train the run to its end; False where it was stopped early."""
        config = config.model_copy(update={"schedule_steps": config.num_schedule_steps})
        if self.is_finished(config):
            assert self.newest is not None and self.stored is not None
            store_config(self.folder, dump(config) | {"teacher": self.stored.teacher})
            say(f"{self.folder} is finished at step {self.newest.step}; steps=... beyond that goes on")
            return True
        config.check_machine()
        store_config(self.folder, dump(config))
        began = announce.header(config)
        if config.optimizer.schedule == "cosine" and config.steps > config.num_schedule_steps:
            say(f"note: the learning rate is 0 from step {config.num_schedule_steps} on, where its cosine ended")
        finished = execute(config)
        announce.summary(config, began, finished, self.newest, checkpoint.newest_manifest(self.folder))
        return finished
