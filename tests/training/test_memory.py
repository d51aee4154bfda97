"""Memory that runs out: what was learnt is kept, and the user hears in one line what was needed and what to change."""

import resource
import subprocess
import sys

import pytest
import torch
from test_trainer import build, lines, run  # noqa: F401 - build is a fixture

from cm_train.core import cli
from cm_train.core.errors import ExitCode, OutOfMemory
from cm_train.core.memory import needed_memory, shortage_explained
from cm_train.models.checkpoints import read as checkpoint
from cm_train.sampling import generate as generation
from conftest import ENVIRONMENT, TINY

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is "
    "free. Process 7 has 77.85 GiB memory in use. Of the allocated memory 76.00 GiB is allocated by PyTorch."
)


def take_too_much(*_, **__):
    """More than any machine has, asked for as any tensor is."""
    return torch.empty(2**55, dtype=torch.uint8)


def test_every_kind_of_shortage_is_told_from_other_errors():
    assert needed_memory(torch.OutOfMemoryError(CUDA)) == (
        "Tried to allocate 20.00 GiB; GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is free"
    )
    with pytest.raises(RuntimeError) as torchs:
        take_too_much()
    assert needed_memory(torchs.value) == f"tried to allocate {2**25:.2f} GiB"
    with pytest.raises(MemoryError) as pythons:
        bytearray(2**55)
    assert needed_memory(pythons.value)
    assert needed_memory(RuntimeError("can't start new thread")) == "no memory left for a thread"
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ):
        assert "no device memory left" in needed_memory(RuntimeError(text))
    for other in (RuntimeError("memory format"), ValueError("x"), KeyboardInterrupt(), OSError(12, "x")):
        assert needed_memory(other) is None


def test_a_shortage_becomes_one_line_and_exit_code_1():
    def body():
        with shortage_explained("drawing 8 images at once", "batch_size=4"):
            take_too_much()

    outcome = cli.attempt(body)
    assert outcome.code == ExitCode.FAILED
    assert outcome.complaint == (
        f"out of memory drawing 8 images at once: tried to allocate {2**25:.2f} GiB; fix: batch_size=4"
    )


def test_what_was_learnt_is_saved_where_a_step_runs_out_of_memory(build):  # noqa: F811
    whole, short = build("mode=ict", name="whole"), build("mode=ict", "save_every=1000", name="short")
    run(whole)
    losses = short.objective.losses
    short.objective.losses = lambda batch: losses(batch) if short.step < 4 else take_too_much()
    with pytest.raises(
        OutOfMemory,
        match=r"^out of memory in step 5: .*; fix: micro_batch=8 \(now 16\), or activation_checkpointing=true",
    ):
        run(short)
    assert checkpoint.newest_manifest(short.config.folder).step == 4
    rest = build("mode=ict", "save_every=1000", name="short")
    assert rest.step == 4
    run(rest)
    assert torch.equal(rest.state.weights, whole.state.weights)


def test_a_step_that_is_made_again_is_counted_once(build):  # noqa: F811
    """Memory runs out in the second half of a step, whose first half has reported its loss."""
    options = ["mode=ict", "micro_batch=8", "log_every=3"]
    whole, short = build(*options, name="whole"), build(*options, "save_every=1000", name="short")
    run(whole)
    losses, calls = short.objective.losses, []
    short.objective.losses = lambda batch: losses(batch) if len(calls.append(1) or calls) != 10 else take_too_much()
    with pytest.raises(OutOfMemory, match="in step 5"):
        run(short)
    rest = build(*options, "save_every=1000", name="short")
    run(rest)
    assert [row["loss"] for row in lines(rest)] == [row["loss"] for row in lines(whole)]


def test_a_step_that_was_torn_is_not_saved(build):  # noqa: F811
    """Memory runs out between the optimizer and the averages: the last good checkpoint is the one to go on from."""
    trainer = build("mode=ict", "save_every=3")
    after_step = trainer.objective.after_step
    trainer.objective.after_step = lambda step, *args: take_too_much() if step == 4 else after_step(step, *args)
    with pytest.raises(OutOfMemory):
        run(trainer)
    assert trainer.step == 4
    assert checkpoint.newest_manifest(trainer.config.folder).step == 3
    assert build("mode=ict", "save_every=3").state.optimizer.count == 3


def test_training_goes_on_without_a_preview_that_did_not_fit(build, monkeypatch, capsys):  # noqa: F811
    trainer = build("mode=ict", "preview_every=3")
    monkeypatch.setattr(generation.PerImageNoise, "randn", take_too_much)
    run(trainer)
    assert trainer.step == 6
    assert len(lines(trainer)) == 3 + 1
    told = [line for line in capsys.readouterr().err.splitlines() if "preview" in line]
    assert len(told) == 2
    assert told[0].startswith("no preview, for want of memory: tried to allocate")
    assert told[0].endswith("fix: micro_batch=..., or preview_every=0")


def limited(*argv, cwd, gib):
    """A command that may have so much address space."""
    limit = int(gib * 2**30)
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


@pytest.mark.command
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_that_does_not_fit_is_one_line(ranks, tmp_path):
    options = [*TINY, "batch_size=131072", "micro_batch=null", f"devices={ranks}", "backbone.channels=48"]
    done = limited("cm_train.commands.train", "mode=ict", *options, cwd=tmp_path, gib=8)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "out of memory in step 1: tried to allocate" in last, done.stderr
    assert "fix: micro_batch=" in last


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_more_images_at_once_than_fit_is_one_line(command, tmp_path):
    assert command("train", "mode=ict", *TINY).returncode == 0
    done = limited(
        "cm_train.commands.sample", "ckpt=runs/digits-ict", "num=150000", "batch_size=150000", cwd=tmp_path, gib=7
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "out of memory drawing 150000 images at once: tried to allocate" in last
    assert last.endswith("fix: batch_size=75000 (now 150000)")
    assert "Traceback" not in done.stderr
