"""What a rank runs: from a checked config to a trained run folder."""

from collections.abc import Callable
from pathlib import Path

from ..core.free_memory import give_back
from ..core.memory import shortage_explained
from ..core.precision import arithmetic
from ..core.run_layout import RUN_LOG, SAMPLES, step_folder
from ..core.run_log import log_from_here_on
from ..core.signals import StopFlag, Stopped
from ..core.world import ALONE, World
from ..models.checkpoints import read as checkpoint
from ..training.config import RunConfig, dump
from ..training.previews import show_data
from ..training.tracking import SilentTracker, Tracker
from ..training.trainer import Trainer
from .build import build_trainer
from .rank import in_rank
from .stored import store_config


def run(config: RunConfig, should_stop: Callable[[float], bool], world: World = ALONE) -> bool:
    """Train the run of `config` to its end, from its newest good checkpoint where it has one.

    Returns:
        False where `should_stop` ended it early, after saving.

    Raises:
        InputError: the data set, the teacher or the checkpoint can't be used.
        TrainingFailed: too many steps in a row were not finite, the last checkpoint can't be written, or memory has run
            out.
    """
    try:
        with arithmetic(config.precision, config.deterministic):
            return _run(config, should_stop, world)
    except Stopped:  # before the first step, so that there is nothing to save
        return False
    finally:
        give_back()


def _run(config: RunConfig, should_stop: Callable[[float], bool], world: World) -> bool:
    with shortage_explained("before the first step", "a smaller backbone= or batch_size="):
        trainer = build_trainer(config, should_stop, world)
    if world.is_main:
        if trainer.config.micro_batch != config.micro_batch:  # settled for good
            store_config(config.folder, dump(trainer.config))
        show_data(trainer.loader, config.folder / SAMPLES, anew=trainer.step == 0)
    with shortage_explained("while the real images were looked at", "a smaller features=, or eval_every=0"):
        trainer.evaluations.prepare()
    if not trainer.prepare(lambda: should_stop(0.0)):  # before the clocks of progress and rate begin to count
        return False
    with world.run_on_all(lambda: _tracker(trainer, world, should_stop)) as tracker:
        finished = trainer.run(tracker)
        if finished and world.is_main and config.tracking.artifact:
            tracker.model(checkpoint.averaged_only(step_folder(config.folder, trainer.step)))
        return finished


def _tracker(trainer: Trainer, world: World, should_stop: Callable[[float], bool]) -> SilentTracker:
    config = trainer.config
    if not world.is_main:
        return SilentTracker()
    total, give_up = config.steps, lambda: should_stop(0.0)
    about = config.tracking, config.folder, config.name, dump(config)
    return Tracker(*about, trainer.step, total, give_up, config.sends_pictures)


def main() -> None:
    """A rank that the command launched: the run's folder is its one argument."""

    def work(config: RunConfig, folder: Path, stop: StopFlag, world: World) -> None:
        log_from_here_on(folder / RUN_LOG)
        run(config, stop, world)

    in_rank(work)


if __name__ == "__main__":
    main()
