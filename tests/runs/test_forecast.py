"""plan=true: what is found, and what a run would be and cost; nothing is trained."""

import json
import re

import pytest
import torch
from PIL import Image
from test_train import plan  # noqa: F401 - a fixture

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.denoiser import DenoiserConfig, build_denoiser
from cm_train.runs.config import parse
from cm_train.runs.suitability import remarks
from cm_train.training.sketch import sketch

MODES = ("edm", "cd", "ct", "ict", "ect", "sct", "scd")


@pytest.fixture
def own(plan):  # noqa: F811
    plan.usual = ["tracking=none", "plan=true"]
    return plan


def test_plan_says_what_a_run_and_its_teacher_would_be_and_trains_nothing(own, tmp_path, capsys):
    assert own("mode=cd", "budget=10m", "out=there")
    out = capsys.readouterr().out
    for words in (
        "1,797 images, 8x8 grey",
        "1 of 2: the teacher",
        "edm in runs/digits-edm",
        "2 of 2: the student",
        "cd in runs/digits-cd",
        "unet, 390,433 parameters",
    ):
        assert words in out
    assert re.search(r"\nin all +0:(09:5\d|10:00)\n", out)
    assert not own.trained and not (tmp_path / "runs").exists()
    written = json.loads((tmp_path / "there" / "plan.json").read_text())
    teacher, student = written["runs"]
    assert written["seconds"] == teacher["seconds"] + student["seconds"] == pytest.approx(600, rel=0.01)
    assert student["images"] == student["steps"] * student["batch_size"]
    assert student["epochs"] == student["images"] / 1797
    assert written["data"]["images"] == 1797


def test_plan_and_run_come_to_the_same(own):
    assert own("mode=ict", "budget=10m", "out=there")
    with open("there/plan.json") as file:
        (planned,) = json.load(file)["runs"]
    own.usual = ["tracking=none"]
    own.ends["digits-ict"] = 1
    assert not own("mode=ict", "budget=10m")
    (run,) = own.trained
    assert (planned["steps"], planned["batch_size"], planned["previews"]) == (
        run.steps,
        run.batch_size,
        run.num_previews(),
    )


def test_a_published_recipe_is_estimated_without_its_data(own, capsys):
    assert own("experiment=imagenet64-ict")
    out = capsys.readouterr().out
    assert "unet, 295,131,267 parameters" in out and "estimated from its FLOPs" in out
    assert "800,000 steps of 4096, 3,276,800,000 images" in out
    assert not own.measured
    assert own("experiment=cifar10-sct")
    out = capsys.readouterr().out
    assert "the paper's DDPM++ scales and shifts" in out and out.count("songunet, 55,732,739 parameters") == 2


def test_out_without_plan_is_refused(own):
    own.usual = ["tracking=none"]
    with pytest.raises(InputError, match="out is where plan=true writes"):
        own("mode=ict", "out=there")


def test_mode_or_dataset_beside_an_experiment_is_refused(own):
    own.usual = ["tracking=none"]
    with pytest.raises(InputError, match="experiment=cifar10-ict says its own mode; got 'mode=cd'; fix: drop mode=,"):
        own("experiment=cifar10-ict", "mode=cd")
    with pytest.raises(InputError, match="says its own dataset; got 'dataset=mnist'"):
        own("experiment=cifar10-ict", "dataset=mnist")


def test_own_pictures_are_described(own, tmp_path, capsys):
    for i in range(6):
        folder = tmp_path / "pets" / ("cats" if i % 3 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (40 + i, 40), (30 * i, 9, 9, 200)).save(folder / f"{i}.png")
    assert own("mode=ict", "dataset=image_folder", "dataset.root=pets", "dataset.conditional=true", "steps=10")
    out = capsys.readouterr().out
    for words in ("6 images, 32x32 colour", "2 classes: cats (4), dogs (2)", "modes: RGBA (6)", "to a square: 5"):
        assert words in out


@pytest.mark.parametrize("mode", MODES)
def test_sketch_counts_what_a_step_takes(mode, composed):
    """Operations as network calls: three times forward for a gradient, once for each call without one."""
    config = parse(composed(f"mode={mode}"))
    objective = registry.component(config.objective)
    shape = {"image_size": 8, "image_channels": 1, "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    student = DenoiserConfig(kind=objective.kind, boundary=objective.boundary, **shape)
    teacher = DenoiserConfig(kind="diffusion", boundary="zero", **shape)
    found = sketch(config, student, (teacher, config.backbone))
    with torch.device("meta"):
        network = build_denoiser(student, config.backbone)
    assert found.num_parameters == sum(p.numel() for p in network.parameters())
    calls = {"edm": 3, "cd": 6, "ct": 4, "ict": 4, "ect": 4, "sct": 6, "scd": 7}[mode]
    assert found.flops / found.forward_flops == pytest.approx(calls, rel=0.02)
    teachers = {"cd": 2, "scd": 1}.get(mode, 0)  # CD's target is a copy beside
    assert found.num_frozen == teachers * found.num_parameters
    parts = found.parts(4)
    assert parts["optimizer"] == 8 * found.num_trained and parts["averages"] == 4 * found.num_parameters


def test_what_does_not_suit_the_data_is_said(composed):
    config = parse(composed("mode=ict", "steps=1000000", "batch_size=128"))
    said = list(remarks(config, 1000, 64, 400_000, {"a": 1, "b": 900, "c": 0}))
    assert [
        words in " ".join(said) for words in ("by heart", "comes 128,000 times", "1 classes have one image only (a)")
    ]
    assert len(said) == 3
    fine = parse(composed("mode=ict", "steps=1000", "batch_size=128"))
    assert not list(remarks(fine, 50_000, 3072, 1_000_000, {"a": 25_000, "b": 25_000}))


def test_the_plan_of_a_run_looks_at_no_checkpoint(own, tmp_path):
    assert own("mode=ict", "steps=5")
    assert checkpoint.newest_manifest(tmp_path / "runs" / "digits-ict") is None
