"""Reading a run that is being written, and that keeps no more than its newest checkpoint."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_checkpoints import network, write
from test_trainer import build, run  # noqa: F401 - build is a fixture

from cm_train import load_denoiser
from cm_train.core.errors import InputError
from cm_train.models.checkpoints import find
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.models.checkpoints.vanishing import Vanished, present
from conftest import ENVIRONMENT, wait_for

WRITER = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from cm_train.models.checkpoints import find
from cm_train.models.checkpoints import read as checkpoint, write as saving
run = Path(sys.argv[1])
folder, manifest = find.resolve(run)
weights = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
rest = {k: getattr(manifest, k) for k in ("finished", "ema", "denoiser", "backbone", "provenance", "snapshots")}
for step in range(manifest.step + 1, 10**9):
    saving.write(checkpoint.step_folder(run, step), weights, {}, step=step, **rest)
    saving.prune(run, 1)
"""


@contextmanager
def written(run: Path):
    """While a process writes the newest checkpoint of `run` again as that of the next step, and of the next, ..."""
    before = checkpoint.newest_manifest(run).step
    argv = [sys.executable, "-c", WRITER, str(run)]
    with subprocess.Popen(argv, env=ENVIRONMENT, stderr=subprocess.PIPE) as writer:
        try:
            wait_for(lambda: (newest := checkpoint.folders(run)) and int(newest[0].name[5:]) > before + 2)
            yield
            assert writer.poll() is None, writer.stderr.read()
        finally:
            writer.kill()


def test_a_run_that_is_being_written_can_be_read(tmp_path):
    write(tmp_path, 1)
    expected = list(network(1).parameters())
    with written(tmp_path):
        for _ in range(30):
            assert all(map(torch.equal, load_denoiser(tmp_path).parameters(), expected))
            assert checkpoint.newest_manifest(tmp_path).step > 3
            assert find.resolve(tmp_path)[1].step > 3


@pytest.mark.long
def test_a_teacher_that_is_still_in_training_can_be_learnt_from(build):  # noqa: F811
    teacher = build("mode=edm", name="teacher")
    run(teacher)
    with written(teacher.config.folder):
        for i in range(5):
            build("mode=cd", f"teacher={teacher.config.folder}", name=f"student{i}")
            build("mode=edm", f"init={teacher.config.folder}", name=f"tuned{i}")


@pytest.mark.long
def test_averages_are_made_of_snapshots_while_their_run_goes_on(build):  # noqa: F811
    trainer = build("mode=ict", "ema=power", "ema.num_snapshots=3", "save_every=2")
    run(trainer)
    expected = list(load_denoiser(trainer.config.folder, "power_0.07").parameters())
    with written(trainer.config.folder):
        for _ in range(10):
            assert all(map(torch.equal, load_denoiser(trainer.config.folder, "power_0.07").parameters(), expected))


def test_a_named_checkpoint_that_is_gone_is_one_line_that_names_its_run(tmp_path):
    old = write(tmp_path / "run", 1)
    write(tmp_path / "run", 2)
    saving.prune(tmp_path / "run", 1)
    with pytest.raises(InputError, match="run .* has no such checkpoint, or not any more.*fix: .*run for its newest"):
        load_denoiser(old)


def test_what_has_vanished_is_not_damaged_and_what_is_there_and_damaged_is(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "state.pt").unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint), present(folder):
        checkpoint.verify(folder)
    saving.prune(tmp_path, 0)
    with pytest.raises(Vanished, match="was removed while it was read"):
        checkpoint.verify(folder)
