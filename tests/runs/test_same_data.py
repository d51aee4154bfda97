"""Runs and their teachers know their pictures by what is in them, wherever those lie and however they are held."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.data.datasets.in_memory import InMemory
from cm_train.models.checkpoints.manifest import signed
from cm_train.runs.pretrained import check_data_of_teacher
from conftest import TINY

NETWORK = ["backbone=unet_xs", "backbone.channels=8", "backbone.head_channels=8", "backbone.group_channels=4"]
OPTIONS = [*TINY, "schedule_steps=6", *NETWORK, "dataset=image_folder", "dataset.image_size=8"]


def pictures(folder, first=0, classes=("cat", "dog")):
    for i in range(12):
        place = folder / classes[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(first + i).integers(256, size=(9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / f"{i}.png")
    return folder


def weights(tmp_path, name, step):
    return (tmp_path / "runs" / name / "checkpoints" / f"step_{step:08d}" / "denoiser.safetensors").read_bytes()


def test_a_run_goes_on_from_a_zip_of_its_pictures_and_with_less_memory(command, tmp_path):
    pictures(tmp_path / "photos")
    shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path, "photos")
    options = ["mode=ict", *OPTIONS, "dataset.conditional=true"]

    def train(name, *more):
        done = command("train", *options, f"name={name}", *more)
        assert done.returncode == 0, done.stderr
        return done.stderr

    train("whole", "dataset.root=photos")
    train("cut", "dataset.root=photos", "steps=2")
    assert "resuming at step 2" in train("cut", "dataset.root=photos.zip", "steps=4")
    assert "resuming at step 4" in train("cut", f"dataset.root={tmp_path}/./photos/", "dataset.memory_gb=0")
    assert weights(tmp_path, "cut", 6) == weights(tmp_path, "whole", 6)
    pictures(tmp_path / "photos", first=1)
    done = command("train", *options, "name=cut", "dataset.root=photos", "steps=8")
    assert done.returncode == 2
    assert "the dataset of runs/cut changed since the run began" in done.stderr


@pytest.mark.long
def test_a_teacher_is_known_by_its_pictures_and_not_by_where_they_lie(command, tmp_path):
    pictures(tmp_path / "photos")
    done = command("train", "mode=edm", *OPTIONS, "dataset.root=photos")
    assert done.returncode == 0, done.stderr
    teacher = weights(tmp_path, "photos-edm", 6)
    done = command("train", "mode=cd", *OPTIONS, "dataset.root=./photos/", "dataset.memory_gb=0")
    assert done.returncode == 0, done.stderr
    assert "other data" not in done.stderr and "training it first" not in done.stderr

    (tmp_path / "photos").rename(tmp_path / "renamed")
    pictures(tmp_path / "photos", first=1)
    done = command("train", "mode=cd", *OPTIONS, "dataset.root=renamed", "data_name=photos", "name=renamed")
    assert done.returncode == 0, done.stderr
    assert "other data" not in done.stderr and "training it first" not in done.stderr

    # What lies now where the teacher's pictures lay is not taken for them.
    done = command("train", "mode=cd", *OPTIONS, "dataset.root=photos", "name=other")
    assert done.returncode == 2
    assert "the teacher in runs/photos-edm was trained on other data; fix: set teacher=..." in done.stderr
    chosen = tmp_path / "runs" / "photos-edm"
    done = command("train", "mode=cd", *OPTIONS, "dataset.root=photos", "name=other", f"teacher={chosen}")
    assert done.returncode == 0, done.stderr
    assert f"note: teacher {chosen} was trained on other data than this run's" in done.stderr
    shutil.rmtree(chosen / "checkpoints" / "step_00000006")  # as if it had been stopped at 3
    done = command("train", "mode=cd", *OPTIONS, "dataset.root=photos", "name=another")
    assert done.returncode == 2
    assert "the dataset of runs/photos-edm changed since the run began" in done.stderr
    assert "or run_dir=... where it is a teacher" in done.stderr
    done = command("train", "mode=cd", *OPTIONS, "dataset.root=renamed", "data_name=photos", "name=another")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path, "photos-edm", 6) == teacher


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_what_an_earlier_version_recorded_of_a_teacher_is_understood(tmp_path, monkeypatch, capsys, memory_gb):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = {"name": "image_folder", "root": str(pictures(tmp_path / "photos")), "image_size": 8, "conditional": True}
    dataset = registry.make("dataset", {**values, "memory_gb": memory_gb})
    dataset.load()
    images, labels = dataset.gather(torch.arange(12))
    of_pixels = InMemory(images, labels, dataset.class_names).fingerprint()
    usual, chosen = (SimpleNamespace(teacher="runs/x", usual_teacher=place) for place in ("runs/x", "runs/y"))
    for its_data in (None, of_pixels, dataset.fingerprint()):
        for config in (usual, chosen):
            check_data_of_teacher(config, its_data, dataset)
    assert not capsys.readouterr().err
    for its_data in ("0" * 64, f"files:{'0' * 64}"):
        with pytest.raises(InputError, match="the teacher in runs/x was trained on other data"):
            check_data_of_teacher(usual, its_data, dataset)
        check_data_of_teacher(chosen, its_data, dataset)
        assert "teacher runs/x was trained on other data than this run's" in capsys.readouterr().err
    other = InMemory(images, 1 - labels, dataset.class_names).fingerprint()
    with pytest.raises(InputError, match="trained on other data"):
        check_data_of_teacher(usual, other, dataset)


@pytest.mark.parametrize("memory_gb", [4, 0])
def test_an_earlier_fingerprint_becomes_the_present_one(command, tmp_path, memory_gb):
    """So that a run that was begun on a folder by an earlier version goes on from a zip of it, once it was resumed."""
    pictures(tmp_path / "photos")
    shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path, "photos")
    options = ["mode=ict", *OPTIONS, "keep=1", "name=x"]
    assert command("train", *options, "dataset.root=photos", "steps=2").returncode == 0
    dataset = registry.make("dataset", {"name": "image_folder", "root": str(tmp_path / "photos"), "image_size": 8})
    dataset.load()
    manifest = tmp_path / "runs" / "x" / "checkpoints" / "step_00000002" / "manifest.json"
    said = json.loads(manifest.read_text())
    now = said["provenance"]["dataset"]
    assert now == dataset.fingerprint()
    said["provenance"]["dataset"] = InMemory(dataset.gather(torch.arange(12))[0], None, []).fingerprint()
    manifest.write_text(signed(said))
    for step, root in ((4, "photos"), (6, "photos.zip")):
        done = command("train", *options, f"dataset.root={root}", f"steps={step}", f"dataset.memory_gb={memory_gb}")
        assert done.returncode == 0, done.stderr
        said = json.loads((tmp_path / "runs" / "x" / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
        assert said["provenance"]["dataset"] == now
