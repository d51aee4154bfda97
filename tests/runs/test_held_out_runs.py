"""Runs on own pictures: what they hold out is settled when they begin, stored, and the same for teacher and student."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.run_layout import CONFIG
from cm_train.runs.as_teacher import as_teacher
from cm_train.runs.config import parse
from cm_train.runs.pretrained import check_data_of_teacher
from cm_train.runs.stored import store_config
from cm_train.training.config import dump
from conftest import TINY

NETWORK = ["backbone=unet_xs", "backbone.channels=8", "backbone.head_channels=8", "backbone.group_channels=4"]
OPTIONS = [*TINY, "schedule_steps=6", *NETWORK, "dataset=image_folder", "dataset.root=photos", "dataset.image_size=8"]


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(24):
        noise = np.random.default_rng(i).integers(256, size=(9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i // 3}-{i % 3}.png")
    return tmp_path / "photos"


def stored(tmp_path, name):
    return yaml.safe_load((tmp_path / "runs" / name / CONFIG).read_text())["dataset"]


def recorded(tmp_path, name):
    manifest = max((tmp_path / "runs" / name / "checkpoints").glob("step_*/manifest.json"))
    return json.loads(manifest.read_text())["provenance"]["dataset"]


def test_a_run_keeps_what_it_holds_out(command, photos, tmp_path):
    options = ["mode=ict", *OPTIONS, "name=x", "dataset.holdout=0.4", r"dataset.group=^(\d+)-"]
    done = command("train", *options, "steps=2")
    assert done.returncode == 0, done.stderr
    assert "of 24 pictures, for cm-eval; 24 of them in 8 groups by their names" in done.stderr
    done = command("train", *options)
    assert done.returncode == 0 and "resuming at step 2" in done.stderr, done.stderr
    found = stored(tmp_path, "x")
    assert (found["holdout"], found["group"], found["part"]) == (0.4, r"^(\d+)-", "train")
    whole = {"name": "image_folder", "root": str(photos), "image_size": 8}
    run = registry.make("dataset", {**whole, "holdout": 0.4, "group": found["group"]})
    run.load()
    assert recorded(tmp_path, "x") == run.fingerprint() != registry.make("dataset", whole).fingerprint()
    done = command("train", *options, "dataset.holdout=0.3", "steps=8")
    assert done.returncode == 2 and "dataset.holdout (0.4 -> 0.3)" in done.stderr
    config = tmp_path / "runs" / "x" / CONFIG  # as a version wrote it that knew of none
    values = yaml.safe_load(config.read_text())
    for key in ("holdout", "group", "part"):
        del values["dataset"][key]
    config.write_text(yaml.safe_dump(values))
    done = command("train", "mode=ict", *OPTIONS, "name=x", "steps=8")
    assert done.returncode == 2 and "changed since the run began" in done.stderr, "it holds none out, so it is another"


def test_without_a_word_few_pictures_hold_none_out(command, photos, tmp_path):
    done = command("train", "mode=ict", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "holding out none: of 24 pictures, 5% are too few to tell anything" in done.stderr
    assert stored(tmp_path, "photos-ict")["holdout"] == 0 and "/" not in recorded(tmp_path, "photos-ict")
    done = command("train", "mode=ict", *OPTIONS, "steps=7")
    assert done.returncode == 0 and "holding out" not in done.stderr, "settled once"


def test_teacher_and_student_hold_out_the_same(command, photos, tmp_path):
    words = ["dataset.holdout=0.4", r"dataset.group=^(\d+)-"]
    lengthless = [word for word in OPTIONS if "steps" not in word]
    done = command("train", "mode=cd", *lengthless, *words, "budget=0.0005M")
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path, "photos-edm") == stored(tmp_path, "photos-cd")
    assert recorded(tmp_path, "photos-edm") == recorded(tmp_path, "photos-cd")
    done = command("train", "mode=cd", *OPTIONS, "name=later")
    assert done.returncode == 0, done.stderr
    assert "holding out what teacher runs/photos-edm does: dataset.holdout=0.4" in done.stderr
    assert recorded(tmp_path, "later") == recorded(tmp_path, "photos-cd") and "trained on" not in done.stderr
    done = command("train", "mode=cd", *OPTIONS, "dataset.holdout=0.5", "name=another")
    assert done.returncode == 0, done.stderr
    assert "note: teacher runs/photos-edm was trained on these pictures with others of them held out" in done.stderr
    assert "it may have seen what this run holds out" in done.stderr
    done = command("train", "mode=ict", *OPTIONS, "dataset.holdout=0.3", "init=runs/photos-cd", "name=begun")
    assert done.returncode == 0, done.stderr
    assert "note: init=runs/photos-cd was trained on these pictures with others of them held out" in done.stderr


def test_as_teacher_takes_what_its_run_says(composed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["mode=cd", "dataset=image_folder", "dataset.root=photos"]
    config = parse(composed(*words))
    auto = {"image_size": "auto", "holdout": "auto", "group": None}
    assert as_teacher(config, auto) == {}, "there is none"
    denoiser = SimpleNamespace(image_size=24)
    monkeypatch.setattr("cm_train.runs.as_teacher.find.peek", lambda _: SimpleNamespace(denoiser=denoiser))
    assert as_teacher(config, auto) == {"image_size": 24, "holdout": 0.0}, "nobody knows what it has seen"
    assert "holding out none, as teacher" in capsys.readouterr().err
    teacher = parse(composed("mode=edm", *words[1:], "dataset.holdout=0.2", r"dataset.group=a(\d)"))
    config.usual_teacher.mkdir(parents=True)
    store_config(config.usual_teacher, dump(teacher))
    assert as_teacher(config, auto) == {"image_size": 24, "holdout": 0.2, "group": r"a(\d)"}
    assert as_teacher(config, auto | {"group": "b"}) == {"image_size": 24, "holdout": 0.2}, "a person's word counts"
    assert as_teacher(config, auto | {"holdout": 0.1}) == {"image_size": 24}
    named = parse(composed(*words, f"teacher={config.usual_teacher}/checkpoints/step_00000006"))
    assert as_teacher(named, auto)["holdout"] == 0.2
    (config.usual_teacher / CONFIG).write_text("[no config")
    assert as_teacher(config, auto)["holdout"] == 0.0
    assert as_teacher(parse(composed("mode=ict", *words[1:])), auto) == {}
    assert as_teacher(config, {"name": "digits"}) == {}


def test_a_teacher_that_has_seen_what_is_held_out_is_said_and_not_refused(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def build(**values):
        dataset = registry.make("dataset", {"name": "image_folder", "root": str(photos), "image_size": 8, **values})
        dataset.load()
        return dataset

    usual, chosen = (SimpleNamespace(teacher="runs/x", usual_teacher=place) for place in ("runs/x", "runs/y"))
    whole, some = build(), build(holdout=0.4)
    for config in (usual, chosen):
        check_data_of_teacher(config, whole.fingerprint(), some)
        assert "or none: it may have seen what this run holds out" in capsys.readouterr().err
        check_data_of_teacher(config, some.fingerprint(), whole)
        assert capsys.readouterr().err.rstrip().endswith("held out, or none"), "there is nothing that it may have seen"
        check_data_of_teacher(config, some.fingerprint(), some)
        assert not capsys.readouterr().err
    with pytest.raises(InputError, match="the teacher in runs/x was trained on other data"):
        check_data_of_teacher(usual, build(image_size=9, holdout=0.4).fingerprint(), some)


def test_no_run_learns_what_is_held_out(composed):
    with pytest.raises(InputError, match="got 'dataset.part=held_out'; allowed: train; fix: drop dataset.part"):
        parse(composed("dataset=image_folder", "dataset.root=photos", "+dataset.part=held_out"))


def test_published_recipes_hold_none_out(composed):
    for name in ("imagenet64-cd", "imagenet64-edm", "lsun256-ct"):
        assert composed(f"experiment={name}", "dataset.root=x").dataset.holdout == 0


def test_ranks_agree_on_what_is_held_out(command, photos, tmp_path):
    options = ["mode=ict", *OPTIONS, "dataset.holdout=0.4", "batch_size=16", "micro_batch=8"]
    for name, more in (("one", []), ("two", ["devices=2"]), ("lazy", ["devices=2", "dataset.memory_gb=0"])):
        done = command("train", *options, f"name={name}", *more)
        assert done.returncode == 0, done.stderr
    losses = []
    for name in ("one", "two", "lazy"):
        rows = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows if "loss" in json.loads(row)])
        assert recorded(tmp_path, name) == recorded(tmp_path, "one")
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)
