"""cm-convert, and foreign files in the place of a run."""

import functools
import json
import pickle

import pytest
import torch
from PIL import Image
from test_formats import nvidia, snapshot, state_of  # noqa: F401 - nvidia is a fixture

from cm_train.core.run_layout import MANIFEST


@pytest.fixture
def command(command, tmp_path):
    """As everywhere, with a cache of its own."""
    return functools.partial(command, XDG_CACHE_HOME=str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path, nvidia):  # noqa: F811
    """A small NCSN++ as NVIDIA's tools write it: a diffusion model of 8x8 pictures in colour."""
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(snapshot(state_of("ncsnpp"), "EDMPrecond", nvidia)))
    return path


def test_a_file_becomes_a_checkpoint_that_draws(command, file, tmp_path):
    done = command("convert", "edm.pkl")
    assert done.returncode == 0, done.stderr
    for words in (
        "edm.pkl: edm, a diffusion model, songunet of",
        "8x8x3",
        "CC BY-NC-SA",
        "Next: cm-sample converted/edm",
    ):
        assert words in done.stderr, words
    manifest = json.loads((tmp_path / "converted" / "edm" / MANIFEST).read_text())
    assert manifest["provenance"]["format"] == "edm" and manifest["provenance"]["licence"].startswith("CC BY-NC-SA")
    again = command("convert", "edm.pkl")
    assert again.returncode == 0 and "is made of this file already" in again.stderr
    other = command("convert", "edm.pkl", "preconditioning=consistency")
    assert other.returncode == 2 and "is there already, and not of this file" in other.stderr
    assert "fix: out=" in other.stderr
    drawn = command("sample", "converted/edm", "num=2", "steps=2", "out=drawn")
    assert drawn.returncode == 0, drawn.stderr
    of_file = command("sample", "edm.pkl", "num=2", "steps=2", "out=of-file")
    assert of_file.returncode == 0, of_file.stderr
    for name in ("00000000.png", "00000001.png"):
        one, other = (Image.open(tmp_path / folder / "images" / name) for folder in ("drawn", "of-file"))
        assert one.tobytes() == other.tobytes()


def test_a_file_is_a_teacher_and_first_weights_and_its_student_goes_on(command, file, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(16):
        Image.new("RGB", (8, 8), (16 * i, 255 - 16 * i, 100)).save(tmp_path / "photos" / f"{i}.png")
    words = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "batch_size=4", "tracking=none"]
    words += ["preview_every=0", "save_every=2"]
    done = command("train", "mode=cd", *words, "steps=2", "teacher=edm.pkl")
    assert done.returncode == 0, done.stderr
    assert "network songunet" in done.stderr
    more = command("train", "mode=cd", *words, "steps=4", "schedule_steps=2", "teacher=edm.pkl")
    assert more.returncode == 0 and "resuming at step 2" in more.stderr, more.stderr
    tuned = command("train", "mode=ect", *words, "steps=2", "init=edm.pkl")
    assert tuned.returncode == 0 and "network songunet" in tuned.stderr, tuned.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "src is missing; fix: cm-convert model.pkl"),
        (["nothing.pkl"], "no such file; got 'nothing.pkl'"),
        (["photos"], "no such file; got 'photos'"),
        (["page.pkl"], "page.pkl is no file of weights; allowed: .pt"),
        (["half.pt"], "half.pt is no file of weights that can be read safely"),
        (["edm.pkl", "format=openai"], "edm.pkl has another format; got 'edm'; allowed: openai"),
        (["edm.pkl", "format=tensorflow"], "format: input should be 'auto', 'openai', 'edm' or 'edm2'"),
        (["edm.pkl", "image_size=-1"], "image_size: "),
        (["edm.pkl", "res=64"], "image_size"),
        (["src=edm.pkl", "src=other.pkl"], "src is given more than once"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(arguments, words, command, file, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html>")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1500])
    done = command("convert", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "converted").exists()
