"""cm-sample by several processes: the images of one, whatever ends some of them in the middle."""

import os
import signal

import numpy as np
import pytest
import torch
from test_checkpoints import CONFIG, write
from test_sample import REQUEST, contents

from cm_train.commands import draw_shares
from cm_train.commands.sample_files import open_files
from cm_train.commands.sample_folder import PARTS, SHARES
from cm_train.core.errors import InputError
from conftest import children, wait_for

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="one GPU has one process")
SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def run(tmp_path):
    write(tmp_path / "run", 5)


def files(folder):
    return {name: content for name, (_, content) in contents(folder).items()}


def request(out, *more):
    return ["run", "num=300", "batch_size=2", "steps=3", f"out={out}", *more]


@pytest.mark.parametrize("format", ["png", "npz"])
def test_several_processes_draw_what_one_does(format, command, tmp_path):
    words = ["run", "num=45", "batch_size=8", "seed=7", "steps=2", f"format={format}"]
    for devices in (1, 2):
        done = command("sample", *words, f"devices={devices}", f"out={devices}")
        assert done.returncode == 0, done.stderr
        assert ("on 2 processes" in done.stderr) == (devices == 2)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    done = command("sample", *words, "devices=2", "out=2", "num=60")
    assert done.returncode == 0 and "45 of 60 images are there already" in done.stderr, done.stderr
    if format == "npz":
        assert np.load(tmp_path / "2" / "samples.npz")["arr_0"].shape == (60, 8, 8, 1)
    assert len(files(tmp_path / "2")) == (3 if format == "npz" else 62)


@pytest.mark.parametrize(
    ("ending", "format"),
    [
        ("signal", "png"),
        ("killed process", "npz"),
        pytest.param("signal", "npz", marks=pytest.mark.long),
        pytest.param("killed process", "png", marks=pytest.mark.long),
        pytest.param("killed command", "png", marks=pytest.mark.long),
        pytest.param("killed command", "npz", marks=pytest.mark.long),
    ],
)
def test_what_was_drawn_is_kept_and_the_same_command_goes_on(ending, format, command, start, tmp_path):
    process = start("sample", *request("x", f"format={format}", "devices=2"))
    images = tmp_path / "x" / ("images" if format == "png" else PARTS)
    wait_for(lambda: images.is_dir() and len(os.listdir(images)) > 8)
    ranks = children(process.pid)
    assert len(ranks) == 2
    if ending == "killed process":
        os.kill(ranks[1], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM if ending == "signal" else signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    wait_for(lambda: not any(os.path.exists(f"/proc/{rank}") for rank in ranks))
    drawn = len(os.listdir(images))
    assert 8 < drawn < 300, "too late to show anything"
    last = err.splitlines()[-1] if err else ""
    if ending == "signal":
        assert process.returncode == 3, err
        assert last.startswith("stopped: what was drawn is kept in x, and the command with ckpt=run/"), err
    elif ending == "killed process":
        assert process.returncode == 1, err
        assert last.endswith("what was drawn is kept in x, and the same command goes on") and "rank 1" in last, err
        assert "SIGKILL" in last and len([line for line in err.splitlines() if "rank" in line]) == 1
    assert (tmp_path / "x" / SHARES).exists() == (ending == "killed command")
    one = "devices=1" if ending == "killed command" else "devices=2"
    done = command("sample", *request("x", f"format={format}", one))
    assert done.returncode == 0, done.stderr
    # Of each process the batch in which it was interrupted is drawn again.
    assert int(done.stderr.split(" of 300 images are there already")[0].split()[-1]) >= drawn - 4
    assert command("sample", *request("y", f"format={format}")).returncode == 0
    assert files(tmp_path / "x") == files(tmp_path / "y")


def test_a_process_that_can_not_write_says_why_once(command, tmp_path):
    (tmp_path / "x").mkdir()
    done = command("sample", "run", "num=2", "out=x", "devices=2")
    assert done.returncode == 0 and "batches of 2 leave 1 of 2 processes idle; fix: batch_size=1" in done.stderr
    (tmp_path / "x" / "images" / "00000009.png").mkdir()
    done = command("sample", "run", "num=20", "out=x", "devices=2", "batch_size=2")
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if "can't write to x" in line]) == 1
    assert "Traceback" not in done.stderr


def test_more_processes_than_there_are_devices_are_refused_before_anything_is_written(command, tmp_path):
    done = command("sample", "run", "devices=999", "out=x")
    assert done.returncode == 2 and "devices must be auto or a number of processes; got '999'" in done.stderr
    assert not (tmp_path / "x").exists()


def test_processes_are_as_many_as_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for devices, device, num in (("auto", "cuda", 4), (2, "cuda", 2), ("auto", "cpu", 1), (6, "cpu", 6)):
        assert draw_shares.num_processes(devices, device) == num
    assert draw_shares.num_processes("auto", "cuda:1") == draw_shares.num_processes(1, "cuda:1") == 1
    for devices, device in ((2, "cuda:1"), (5, "cuda"), (999, "cpu")):
        with pytest.raises(InputError):
            draw_shares.num_processes(devices, device)


def test_parts_of_an_npz_are_packed_in_their_order(tmp_path):
    """Drawn out of turn by two processes that were stopped, one of them within an image."""
    images = torch.randint(256, (30, *SHAPE), dtype=torch.uint8, generator=torch.manual_seed(0))

    def add(file, *places):
        file.add([*places], images[[*places]])

    request = REQUEST.model_copy(update={"format": "npz", "seed": 7})
    packed = open_files(request, tmp_path, CONFIG)
    add(packed, 0, 1, 2)
    add(open_files(request, tmp_path, CONFIG, 0), 3, 4, 10, 11)
    add(open_files(request, tmp_path, CONFIG, 1), 5, 6, 12, 13, 20)
    torn = tmp_path / PARTS / "00000020.png"
    torn.write_bytes(torn.read_bytes()[:-40])
    assert packed.missing(30) == [7, 8, 9, *range(14, 30)]
    assert torch.equal(packed.read(30), images[:7])
    add(packed, 7, 8)
    add(packed, 9)
    add(packed, 14)
    add(packed, *range(15, 30))
    assert packed.missing(30) == []
    packed.finish()
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["samples.npz"]
