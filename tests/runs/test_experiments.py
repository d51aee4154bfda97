"""Published recipes: they compose, say what they are, and build networks of the published size."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cm_train.core import configs, registry
from cm_train.core.keys import all_keys
from cm_train.objectives.noise import NoiseSchedule
from cm_train.runs.config import parse

FOLDER = Path(configs.conf_dir()) / "experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CLASSES = {"imagenet64": 1000, "lsun256": 0, "cifar10": 0, "ffhq64": 0}
SIZES = {"imagenet64": 64, "lsun256": 256, "cifar10": 32, "ffhq64": 64}


def header_of(name):
    return "".join(line for line in (FOLDER / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#"))


def config_of(name, composed):
    missing = [] if name.startswith("cifar10") else ["dataset.root=somewhere"]
    return parse(composed(f"experiment={name}", *missing))


def test_there_is_one_for_every_published_pair():
    assert (
        sorted(
            [f"{d}-{m}" for d in ("cifar10", "imagenet64") for m in ("cd", "ct", "ect", "ict", "scd", "sct")]
            + ["cifar10-edm", "cifar10-edm-ncsnpp", "cifar10-edm-trigflow", "ffhq64-edm", "ffhq64-edm-ncsnpp"]
            + ["imagenet64-edm", "imagenet64-edm2-s", "imagenet64-edm2-s-trigflow"]
            + ["lsun256-cd", "lsun256-ct", "lsun256-edm"]
        )
        == NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_experiment_composes_as_its_mode_and_opens_with_what_it_is(name, composed):
    config = config_of(name, composed)
    assert config.mode == name.split("-")[1].rstrip("2")  # EDM2 is a network
    assert config.folder.name == f"{name}-paper"
    assert (config.teacher_experiment is not None) == config.needs_teacher()
    if config.needs_teacher():
        teacher = config.teacher_experiment
        assert teacher in NAMES and f"experiment={teacher}" in header_of(name)
        assert config.usual_teacher == config_of(teacher, composed).folder
    NoiseSchedule(config.noise, config.num_schedule_steps)
    header = header_of(name)
    for word in (f"cm-train experiment={name}", "Hardware:", "Hours:", "Score:", "FID", "Network:"):
        assert word in header


# What is not settled by a paper: when to look at the run, and what fits into a machine.
OURS = {"previews", "preview_every", "log_every", "teacher_budget", "micro_batch", "devices", "compile", "precision"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_published_recipe_is_settled_by_the_data(name, composed):
    missing = [] if name.startswith("cifar10") else ["dataset.root=somewhere"]
    values = OmegaConf.to_container(composed(f"experiment={name}", *missing), resolve=True)
    autos = {key for key in all_keys(values) if dict_at(values, key) == "auto"} - {"features.name"}  # of eval_every
    assert {key.rpartition(".")[2] for key in autos} <= OURS


def dict_at(values, key):
    for part in key.split("."):
        values = values[part] if part in values else values[int(part)]
    return values


@pytest.mark.parametrize("name", NAMES)
def test_network_has_the_published_size(name, composed):
    config = config_of(name, composed)
    dataset = name.split("-")[0]
    with torch.device("meta"):
        network = registry.build(config.backbone, SIZES[dataset], 3, CLASSES[dataset])
    published = int(re.search(r"([\d,]+) parameters", header_of(name)).group(1).replace(",", ""))
    assert sum(p.numel() for p in network.parameters()) == published


@pytest.mark.parametrize("name", NAMES)
def test_a_student_has_its_teacher_s_network_and_is_told_the_noise_as_it_is(name, composed):
    student = config_of(name, composed)
    if student.teacher_experiment is not None:
        teacher = config_of(student.teacher_experiment, composed)
        assert student.backbone.with_recipe_of(teacher.backbone) == teacher.backbone
        assert student.noise.c_noise in (None, teacher.noise.c_noise)
        assert (teacher.noise.c_noise == "angle") == (student.mode in ("sct", "scd"))


def test_where_a_network_is_not_the_paper_s_the_run_says_so(composed):
    assert [name for name in NAMES if config_of(name, composed).notice] == ["cifar10-scd", "cifar10-sct"]


def test_table_3_of_the_consistency_models_paper(composed):
    """Learning rate, batch, mu, N or s0 and s1, EMA, steps."""
    rows = {
        "cifar10-cd": (4e-4, 512, 0.0, 18, 0.9999, 800_000),
        "cifar10-ct": (4e-4, 512, 0.9, (2, 150), 0.9999, 800_000),
        "imagenet64-cd": (8e-6, 2048, 0.95, 40, 0.999943, 600_000),
        "imagenet64-ct": (8e-6, 2048, 0.95, (2, 200), 0.999943, 800_000),
        "lsun256-cd": (1e-5, 2048, 0.95, 40, 0.999943, 600_000),
        "lsun256-ct": (1e-5, 2048, 0.95, (2, 150), 0.999943, 1_000_000),
    }
    for name, row in rows.items():
        c = config_of(name, composed)
        curriculum = c.noise.curriculum
        scales = curriculum.num_scales if curriculum.name == "constant" else (curriculum.s0, curriculum.s1)
        found = (c.optimizer.lr, c.batch_size, c.objective.target_decay, scales, c.ema.decay, c.steps)
        assert found == row, name
        assert c.objective.distance == "lpips"
        assert c.precision == ("fp32" if name.startswith("cifar10") else "fp16"), name
        if not name.startswith("cifar10"):  # whose NCSN++ has no such key
            assert c.backbone.noise_multiplier == 1000.0
        assert c.ema.name == "constant"


def test_imagenet_recipes_of_the_successors(composed):
    """Geng et al. 2024, and Lu & Song 2024's appendix G: Adam, falling with the inverse root of the step."""
    rows = {
        "imagenet64-ect": (1e-3, 2000, 128, 100_000, {"mean": -0.8, "std": 1.6}),
        "imagenet64-sct": (1e-4, 35_000, 2048, 400_000, {"mean": -1.0, "std": 1.6}),
        "imagenet64-scd": (1e-4, 35_000, 2048, 400_000, {"mean": -1.0, "std": 1.6}),
    }
    for name, row in rows.items():
        c = config_of(name, composed)
        o, proposal = c.optimizer, {key: getattr(c.noise.proposal, key) for key in ("mean", "std")}
        assert (o.name, o.schedule, o.betas) == ("adam", "inverse_sqrt", [0.9, 0.99]), name
        assert (o.lr, o.decay_after, c.batch_size, c.steps, proposal) == row, name
