"""Runs that version 0.1.0 left half done still sample, and go on to the weights to which that version took them.

tests/data/runs-of-0.1.0.zip has a small run of each kind at step 4 of 8 (`runs`), the pictures of two of them, and
`expected.npz`: what 0.1.0 drew from them, and their weights after it had trained them to step 8.
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cm_train import generate, load_denoiser

ARCHIVE = Path(__file__).parents[1] / "stored" / "runs-of-0.1.0.zip"
NETWORK = [f"backbone.{key}" for key in ("channels=4", "head_channels=4", "group_channels=2", "channel_mult=[1,1]")]
COMMAND = ["tracking=none", "batch_size=16", "log_every=2", "preview_every=0", "save_every=4", "keep=1", "steps=8"]
FOLDER = ["mode=ict", "dataset=image_folder", "dataset.root=pictures", "dataset.image_size=8"]
SETTINGS = {
    "digits-cd": ["mode=cd"],
    "folder": [*FOLDER, "dataset.conditional=true"],  # classes 1, 2 and 10, in the order that 0.1.0 gave them
    "lazy": [*FOLDER, "dataset.conditional=true", "dataset.memory_gb=0"],
    "power": ["mode=ict", "ema=power"],
    "digits-sct": ["mode=sct"],
    "digits-ct": ["mode=ct"],
    "digits-ict": ["mode=ict"],
    "digits-ect": ["mode=ect"],
    "digits-scd": ["mode=scd"],
    "classes": ["mode=edm", "dataset.conditional=true", "label_dropout=0.1"],
}
SOON = ("digits-cd", "folder", "lazy")


@pytest.fixture
def expected(tmp_path):
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return np.load(tmp_path / "expected.npz")


def test_stored_runs_sample_as_they_did(expected, tmp_path):
    for name in expected:
        run, what = name.split("/")
        if not what.startswith("images"):
            continue
        denoiser = load_denoiser(tmp_path / "runs" / run, "power_0.1" if what.endswith("0.1") else "ema")
        labels = [0, 1, 2, 1] if denoiser.config.num_classes else None
        images = generate(denoiser, range(4), labels=labels).numpy()
        assert np.abs(images.astype(int) - expected[name]).max() <= 1, name


@pytest.mark.parametrize("run", [pytest.param(run, marks=[] if run in SOON else pytest.mark.long) for run in SETTINGS])
def test_stored_runs_go_on_as_they_did(expected, command, tmp_path, run):
    done = command("train", *COMMAND, *NETWORK, *SETTINGS[run], "backbone.num_blocks=1", f"name={run}")
    assert done.returncode == 0 and "resuming at step 4" in done.stderr, done.stderr
    weights = load_file(tmp_path / "runs" / run / "checkpoints" / "step_00000008" / "denoiser.safetensors")
    found = np.concatenate([value.numpy().ravel() for _, value in sorted(weights.items())])
    np.testing.assert_allclose(found, expected[f"{run}/weights"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", ["folder", "lazy"])
def test_stored_runs_keep_their_order_of_classes_however_often_they_go_on(expected, command, tmp_path, run):
    options = [*COMMAND, *NETWORK, *SETTINGS[run], "backbone.num_blocks=1", f"name={run}"]
    for step in (6, 8):
        done = command("train", *options, f"steps={step}")
        assert done.returncode == 0, done.stderr
        denoiser = load_denoiser(tmp_path / "runs" / run / "checkpoints" / f"step_{step:08d}")
        assert denoiser.config.class_names == ["1", "10", "2"]
    weights = load_file(tmp_path / "runs" / run / "checkpoints" / "step_00000008" / "denoiser.safetensors")
    found = np.concatenate([value.numpy().ravel() for _, value in sorted(weights.items())])
    np.testing.assert_allclose(found, expected[f"{run}/weights"], rtol=1e-4, atol=1e-6)
