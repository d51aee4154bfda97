"""From a run's config to its trainer: data, networks and objective, resumed where the folder holds a checkpoint."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..core import registry, rng
from ..core.errors import InputError
from ..core.precision import autocast_type
from ..core.run_layout import LEFT_OUT
from ..core.terminal import say
from ..core.world import ALONE, World
from ..data.datasets.base import Dataset
from ..data.loader import Loader
from ..models.backbones.base import recompute_blocks
from ..models.checkpoints import find
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints.weights import open_weights
from ..models.denoiser import Denoiser, DenoiserConfig
from ..objectives.base import Objective
from ..objectives.noise import NoiseSchedule
from ..sampling.guidance import Guided, guided
from ..training import micro_batch as fitting
from ..training.compile_policy import compiles
from ..training.config import RunConfig
from ..training.trainer import Trainer
from . import announce
from .inheritance import random_student, stand_in_teacher, student_config
from .pretrained import check_data_of_teacher, check_teacher, find_and_open, load_teacher, say_what_was_seen


def build_trainer(
    config: RunConfig,
    should_stop: Callable[[float], bool] = lambda reserve_s: False,
    world: World = ALONE,
    stand_in: bool = False,
) -> Trainer:
    """Data, networks, objective and trainer of a run, resumed where the folder holds a checkpoint.

    Args:
        stand_in: whether random weights stand for a teacher that is not there, to measure what a step takes.
    """
    check_divides(config, world.size)
    dataset = _load_dataset(config, world)
    data = world.run_on_main(dataset.fingerprint)

    # Rank 0 looks, since what is damaged is renamed on the way.
    found = world.run_on_main(lambda: checkpoint.latest(config.folder, set_aside=True))
    known, versions = None, rng.NEWEST
    if found is not None:
        stored = found[1].versions
        versions = world.run_on_all(lambda: rng.kept_versions(stored))
        recorded = found[1].provenance.get("dataset", "")
        if recorded != data:
            world.run_on_all(lambda: _check_data(config.folder, dataset, recorded))
            data = world.run_on_main(dataset.fingerprint)  # of the set as the run has learnt it
        known = found[1].provenance.get("teacher")
    provenance = {"dataset": data}
    if known is not None:
        provenance["teacher"] = known  # kept where the teacher is gone that gave the first weights
    teacher = None
    if config.teacher is not None:
        teacher, manifest = load_teacher(config.teacher, known, config.folder, world)
        provenance["teacher"] = checkpoint.averaged_sha256(manifest)
        check_teacher(teacher, config.teacher, dataset)
        its_data = manifest.provenance.get("dataset")
        world.run_on_main(lambda: check_data_of_teacher(config, its_data, dataset))

    elif stand_in and config.needs_teacher():
        teacher = stand_in_teacher(config, dataset, world.device)
    denoiser = _build_student(config, dataset, teacher, None if found is None else found[1].denoiser, world)
    guide = None if teacher is None else world.run_on_all(lambda: guided(teacher, config.guidance))
    objective = world.run_on_all(lambda: _build_objective(config, dataset, denoiser, guide, versions))
    autocast = autocast_type(config.precision, world.device, config.relative_gap)
    needed = fitting.need(config, objective, world.device, autocast, world)
    share = len(world.share(config.batch_size))
    if config.micro_batch == "auto":
        micro_batch = fitting.settle(share, needed, objective, world.device, autocast, world)
        config = config.model_copy(update={"micro_batch": micro_batch})
    at_once = share if config.micro_batch is None else int(config.micro_batch)
    if found is not None:
        fitting.check_fits(at_once, share, needed)
    images = config.num_schedule_steps * config.batch_size
    compiled, why = compiles(config.compile, world.device, denoiser, config.backbone, images)
    if world.is_main:
        announce.machine(config, world, why)
        announce.scale(config, dataset, denoiser, needed.say_of(at_once))
    trainer = Trainer(
        config,
        objective,
        Loader(dataset, config.seed, config.batch_size, versions),
        world.device,
        autocast=autocast,
        compiled=compiled,
        provenance=provenance,
        versions=versions,
        should_stop=should_stop,
        world=world,
        teacher=guide,
    )
    if found is not None:
        world.run_on_all(lambda: trainer.resume(*found))
        if world.is_main:
            say(f"resuming at step {trainer.step}")
    return trainer


def _load_dataset(config: RunConfig, world: World) -> Dataset:
    """The data set on this rank's device; rank 0 says what it is."""
    dataset: Dataset = world.run_on_all(lambda: registry.build(config.dataset, world))
    left_out = config.folder / LEFT_OUT
    world.run_on_main(lambda: _forget(left_out, config.folder))
    dataset.load(left_out)
    dataset.to(world.device)
    if world.is_main:
        say(f"{config.dataset.place or config.dataset.name}: {dataset.summary()}")
        for note in dataset.notes:
            say(f"note: {note}")
    return dataset


def _build_student(
    config: RunConfig, dataset: Dataset, teacher: Denoiser | None, resumed: DenoiserConfig | None, world: World
) -> Denoiser:
    """The network that is trained, with the weights that it starts from; those of a resumed run come later."""
    start, weights = resumed, None
    if resumed is None and config.init == "teacher":
        assert teacher is not None, "the command checks this"
        start = teacher.config
    elif resumed is None and config.start is not None:
        source = config.start
        weights, manifest = find_and_open(
            lambda: find.resolve(source), lambda folder, manifest: open_weights(folder, manifest, "ema"), world
        )
        start, its_data = manifest.denoiser, manifest.provenance.get("dataset")
        world.run_on_main(lambda: say_what_was_seen(f"init={source}", its_data, dataset))
    settings = world.run_on_all(lambda: student_config(config, dataset, teacher, start))
    denoiser = random_student(config, settings, world.device)
    if config.activation_checkpointing:
        recompute_blocks(denoiser)
    if weights is not None:
        world.run_on_all(lambda: weights.load_into(denoiser))
    elif resumed is None and config.init == "teacher" and teacher is not None:
        denoiser.load_state_dict(teacher.state_dict())
    return denoiser


def _build_objective(
    config: RunConfig, dataset: Dataset, denoiser: Denoiser, guide: Denoiser | Guided | None, versions: rng.Versions
) -> Objective:
    objective: Objective = registry.build(
        config.objective,
        denoiser,
        NoiseSchedule(config.noise, config.num_schedule_steps),
        config.seed,
        dataset.hflip,
        guide if config.objective.needs_teacher() else None,
        config.label_dropout,
        versions,
    )
    return objective


def _forget(left_out: Path, run: Path) -> None:
    """Begin the list of what is left out anew where the run does: its first try may have had other pictures."""
    if not checkpoint.folders(run):
        with suppress(OSError):
            left_out.unlink(missing_ok=True)


def check_divides(config: RunConfig, ranks: int) -> None:
    """Refuse a batch that `ranks` processes can't share evenly. Raises InputError."""
    micro = config.micro_batch if isinstance(config.micro_batch, int) else 1
    if config.batch_size % (ranks * micro):
        raise InputError(
            "batch_size must divide by processes times micro_batch",
            f"{config.batch_size} for {ranks} x {micro}",
            fix="change batch_size, devices or micro_batch",
        )


def _check_data(folder: Path, dataset: Dataset, recorded: str) -> None:
    if not dataset.was_known_as(recorded):
        fix = "bring the old one back, or start a run of its own with name=..., or run_dir=... where it is a teacher"
        raise InputError(f"the dataset of {folder} changed since the run began", fix=fix)
