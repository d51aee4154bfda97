"""cm-sample's folder: what it writes, what it goes on with, and what it leaves alone."""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from test_checkpoints import BACKBONE, CONFIG, write
from test_choosing import midpoint  # noqa: F401 - a fixture

from cm_train import captions, generate, load_denoiser
from cm_train.commands import draw_batches, sample_files
from cm_train.commands.draw import sample
from cm_train.commands.sample_folder import Request, default_name
from cm_train.core import configs, registry
from cm_train.core.command_line import tidy
from cm_train.core.errors import ExitCode, InputError
from cm_train.core.signals import StopFlag
from cm_train.data.pixels import grid
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.models.denoiser import build_denoiser
from cm_train.models.noise_levels import karras_sigmas
from conftest import TINY, wait_for


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw("num=3", ...) -> the exit code of cm-sample on a run of random weights, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", 5)

    def run(*overrides: str) -> int:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(configs.conf_dir()), version_base=None):
            return sample(hydra.compose("sample", overrides=["ckpt=run", *overrides]))

    return run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: which one on the disk it is, and what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.lstat().st_ino, path.read_bytes()) for path in files}


def pixels(folder: Path) -> np.ndarray:
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_0"]
    return np.stack([np.asarray(Image.open(path))[..., None] for path in sorted(folder.glob("images/*.png"))])


def expected(num: int, **kwargs) -> np.ndarray:
    return generate(load_denoiser("run"), range(num), **kwargs).permute(0, 2, 3, 1).numpy()


def test_a_request_says_what_determines_its_images(draw):
    assert draw("num=3", "steps=3", "seed=7", "out=x") == 0
    assert sorted(path.name for path in Path("x").rglob("*")) == [
        *[f"{i:08d}.png" for i in (7, 8, 9)],
        "grid.png",
        "images",
        "request.json",
    ]
    request = json.loads(Path("x/request.json").read_text())
    weights = Path("run/checkpoints/step_00000005/ema_0.9.safetensors").read_bytes()
    assert request["sha256"] == hashlib.sha256(weights).hexdigest()
    grid = karras_sigmas(40, CONFIG.sigma_min, CONFIG.sigma_max).tolist()
    assert request["sigmas"] == [grid[0], grid[13], grid[26]]
    rest = {key: request[key] for key in request if key not in ("sha256", "sigmas", "cm_train")}
    assert rest == {
        "ckpt": "run",
        "step": 5,
        "weights": "ema",
        "num": 3,
        "seed": 7,
        "sampler": "multistep",
        "labels": None,
        "guidance": 1.0,
        "precision": "fp32",
        "format": "png",
        "batch_size": 256,
        "ends": [],
    }


@pytest.mark.parametrize("format", ["png", "npz"])
def test_the_same_request_goes_on_where_it_was_stopped(format, draw, capsys):
    """By a signal in the middle, with half an image left behind; what is there is kept, and the end is the same."""
    home = Path("x")

    def interrupt():
        half = home / "images" / "00000040.png" if format == "png" else home / ".samples.writing"
        wait_for(lambda: half.exists() and (format == "png" or half.stat().st_size > 40 * 64))
        os.kill(os.getpid(), signal.SIGTERM)

    request = ["num=1500", "batch_size=8", "steps=2", f"format={format}", "out=x"]
    with StopFlag():
        thread = threading.Thread(target=interrupt)
        thread.start()
        assert draw(*request) == ExitCode.STOPPED
        thread.join()
    assert "stopped: what was drawn is kept in x, and the command with ckpt=run/" in capsys.readouterr().err
    assert json.loads((home / "request.json").read_text())["num"] == 1500
    assert not (home / "samples.npz").exists()
    before = contents(home)
    if format == "png":
        (home / "images" / "00000011.png").write_bytes(before["images/00000011.png"][1][:-20])
        (home / "images" / "00000012.png").write_bytes(b"")
    else:
        with open(home / ".samples.writing", "ab") as file:
            file.write(b"torn")
    assert draw(*request) == 0
    assert "of 1500 images are there already" in capsys.readouterr().err
    assert np.array_equal(pixels(home), expected(1500, steps=2, batch_size=8))
    after = contents(home)
    if format == "png":
        assert len(before) > 40
        redrawn = {name for name, file in before.items() if file != after[name]}
        assert redrawn == {f"images/{i:08d}.png" for i in range(8, 16)}, "the batch of what was torn, whole"
    assert not [name for name in after if "writing" in name]


@pytest.mark.parametrize("format", ["png", "npz"])
def test_more_images_of_a_request_are_added_and_fewer_are_there_already(format, draw, capsys):
    for num, there in ((5, ""), (9, "5 of 9 images"), (3, "3 of 3 images"), (9, "9 of 9 images")):
        assert draw(f"num={num}", f"format={format}", "out=x") == 0
        assert there in capsys.readouterr().err
    assert json.loads(Path("x/request.json").read_text())["num"] == 9
    assert np.array_equal(pixels(Path("x")), expected(9))
    picture = Image.open("x/grid.png")
    assert picture.width == picture.height, "three rows of three"


def drawn_by_batch(monkeypatch):
    """Have every image tell by its pixels which batch it was drawn in: its first seed, its length, and its place."""
    calls = []

    def batches(denoiser, sampler, levels, seeds, labels, **_):
        calls.append((seeds[0], len(seeds)))
        image = torch.arange(64).view(1, 1, 8, 8)
        told = [(seeds[0], len(seeds), i) for i in range(len(seeds))]
        yield torch.stack([(image * 0 + torch.tensor([*t, *[0] * 5]) % 256).to(torch.uint8)[0] for t in told])

    monkeypatch.setattr(draw_batches, "generate_batches", batches)
    return calls


@pytest.mark.parametrize("format", ["png", "npz"])
def test_an_interruption_leaves_no_trace_in_the_batches(format, draw, monkeypatch):
    """Whatever is missing, batches are drawn whole on the same boundaries: the bytes of one that was left alone."""
    calls = drawn_by_batch(monkeypatch)
    words = ["num=45", "batch_size=8", "seed=3", f"format={format}"]
    assert draw(*words, "out=whole") == 0
    assert calls == [(3, 8), (11, 8), (19, 8), (27, 8), (35, 8), (43, 5)]
    whole = {name: content for name, (_, content) in contents(Path("whole")).items()}
    dice = random.Random(0)
    for _ in range(6):
        shutil.rmtree("x", ignore_errors=True)
        assert draw(*words, "out=x") == 0
        if format == "png":
            lost = sorted(dice.sample(range(45), 5))
            for place in lost:
                Path(f"x/images/{3 + place:08d}.png").unlink()
        else:
            count = dice.randrange(45)
            lost = range(count, 45)
            rows = np.load("x/samples.npz")["arr_0"].tobytes()
            Path("x/.samples.writing").write_bytes(rows[: count * 64 + dice.randrange(64)])
            Path("x/samples.npz").unlink()
        calls.clear()
        assert draw(*words, "out=x") == 0
        assert calls == [(3 + b, min(8, 45 - b)) for b in range(0, 45, 8) if {*range(b, b + 8)} & {*lost}]
        assert {name: content for name, (_, content) in contents(Path("x")).items()} == whole


@pytest.mark.parametrize("format", ["png", "npz"])
def test_what_is_added_is_drawn_in_batches_of_its_own(format, draw, monkeypatch):
    calls = drawn_by_batch(monkeypatch)
    for num in (5, 20, 12, 21):
        assert draw(f"num={num}", "batch_size=8", f"format={format}", "out=x") == 0
    assert calls == [(0, 5), (5, 3), (8, 8), (16, 4), (20, 1)]
    request = json.loads(Path("x/request.json").read_text())
    assert (request["num"], request["ends"], request["batch_size"]) == (21, [5, 20], 8)
    expected = pixels(Path("x"))
    if format == "png":
        calls.clear()
        for place in (1, 6, 20):
            Path(f"x/images/{place:08d}.png").unlink()
        assert draw("num=2", "out=x") == 0
        assert calls == [(0, 5)], "whole, though fewer are asked for"
        assert draw("num=21", "out=x") == 0
        assert calls == [(0, 5), (5, 3), (20, 1)]
        assert np.array_equal(pixels(Path("x")), expected)


def test_a_folder_keeps_its_batch_size_but_for_a_smaller_one(draw, monkeypatch, capsys):
    calls = drawn_by_batch(monkeypatch)

    def lose(place):
        calls.clear()
        Path(f"x/images/{place:08d}.png").unlink(missing_ok=True)

    def recorded():
        return json.loads(Path("x/request.json").read_text())["batch_size"]

    assert draw("num=20", "batch_size=8", "out=x") == 0
    for word in ([], ["batch_size=8"], ["batch_size=9"]):
        lose(9)
        capsys.readouterr()
        assert draw("num=20", "out=x", *word) == 0
        said = "note: in batches of 8, as it was begun" in capsys.readouterr().err
        assert (calls, recorded(), said) == ([(8, 8)], 8, word == ["batch_size=9"])
    lose(9)
    assert draw("num=20", "out=x", "batch_size=3") == 0
    assert "in batches of 3 from now on, not 8: a pixel may differ by a grey level" in capsys.readouterr().err
    assert (calls, recorded()) == ([(9, 3)], 3)
    # One of an older version does not say: what is there stays, and the command's is written down.
    request = json.loads(Path("x/request.json").read_text())
    del request["batch_size"], request["ends"]
    Path("x/request.json").write_text(json.dumps(request))
    lose(9)
    assert draw("num=20", "out=x", "batch_size=5") == 0
    assert (calls, recorded()) == ([(5, 5)], 5)
    with pytest.raises(InputError, match="batch_size"):
        draw("num=20", "out=x", "batch_size=100000000")


def test_what_was_added_keeps_the_name_that_the_checkpoint_had_first(draw):
    assert draw("num=3", "out=x") == 0
    assert draw("num=5", "out=x", "ckpt=run/checkpoints/step_00000005") == 0
    assert json.loads(Path("x/request.json").read_text())["ckpt"] == "run"


def test_seeds_are_another_way_to_say_seed_and_num(draw):
    for words, seed, num in (
        (["seeds=100-102"], 100, 3),
        (["seeds=7"], 7, 1),
        (["seeds= 3 - 4 "], 3, 2),
        (["seeds=5-6", "num=2", "seed=5"], 5, 2),
    ):
        shutil.rmtree("x", ignore_errors=True)
        assert draw("out=x", *tidy(words, [])) == 0
        request = json.loads(Path("x/request.json").read_text())
        assert (request["seed"], request["num"]) == (seed, num)
        assert len(list(Path("x/images").iterdir())) == num
    for words, said in (
        (["seeds=5-6", "num=3"], "seeds and num disagree; got 'seeds=5-6 and num=3'; fix: drop num=, or seeds="),
        (["seeds=5-6", "seed=0"], "seeds and seed disagree"),
        (["seeds=6-5"], "seeds can't be read; got '6-5'; allowed: a first and a last seed as 100-199, or one seed"),
        (["seeds=-1"], "seeds can't be read"),
        (["seeds=cat"], "seeds can't be read"),
        (["seeds='1-2,5-6'"], "fix: -m seeds=0-63,1000-1063 for a folder of each"),
        (["seeds=" + "9" * 50], "seeds can't be read"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            draw("out=x", *words)


def test_an_image_that_can_not_be_written_ends_the_command_in_one_line(draw, monkeypatch):
    drawn_by_batch(monkeypatch)
    save, room = sample_files.save_png, iter(range(20))

    def until_full(picture, path, *note):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(picture, path, *note)

    monkeypatch.setattr(sample_files, "save_png", until_full)
    with pytest.raises(InputError, match="can't write to x: No space left on device; fix: free space, or set out="):
        draw("num=400", "batch_size=8", "out=x")
    assert len(list(Path("x/images").iterdir())) == 20


def test_every_file_that_was_written_is_said(draw, capsys):
    for words, said in (
        (["num=1", "out=x"], ["wrote to x:", "  images/00000000.png (1 image)", "  grid.png, request.json"]),
        (["num=4", "out=x"], ["wrote to x:", "  images/00000001.png to images/00000003.png (3 new images)"]),
        (["num=4", "out=x"], ["nothing to draw; the images are in x"]),
        (["num=2", "format=npz", "out=y"], ["wrote to y:", "  samples.npz (2 images)", "  grid.png, request.json"]),
        (["num=3", "format=npz", "out=y"], ["wrote to y:", "  samples.npz (1 new image)", "  grid.png, request.json"]),
    ):
        assert draw(*words) == 0
        lines = capsys.readouterr().err.splitlines()
        start = lines.index(said[0])
        assert lines[start : start + len(said)] == said


def test_a_sweep_of_samples_has_a_folder_for_each(command, tmp_path):
    write(tmp_path / "run", 5)
    done = command("sample", "-m", "run", "num=2", "steps=1,2", "seed=0,3")
    assert done.returncode == 0, done.stderr
    names = ["1-step", "1-step-seed-3", "2-steps", "2-steps-seed-3"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"run-step-5-{name}" for name in names]
    assert done.stderr.count("images/00000003.png to images/00000004.png (2 images)") == 2


def test_another_request_is_refused_with_its_differences_and_changes_nothing(draw):
    assert draw("num=3", "steps=2", "out=x") == 0
    before = contents(Path("x"))
    for overrides, named in (
        (["seed=1", "steps=2"], r"seed \(0 -> 1\)"),
        (["steps=1"], r"sigmas \(\[80.0, 0.8\] -> \[80.0\]\)"),
        (["steps=2", "weights=raw"], r"weights \(ema -> raw\), sha256 \("),
        (["steps=2", "precision=bf16", "format=npz"], r"precision \(fp32 -> bf16\), format \(png -> npz\)"),
    ):
        with pytest.raises(InputError, match=f"holds the images of another request: {named}.*fix: out="):
            draw("num=3", "out=x", *overrides)
    write(Path("run"), 6)
    with pytest.raises(InputError, match=r"step \(5 -> 6\)"):
        draw("num=3", "steps=2", "out=x")
    assert contents(Path("x")) == before
    # The same checkpoint by another name means the same images.
    assert draw("num=3", "steps=2", "out=x", f"ckpt={Path('run/checkpoints/step_00000005').absolute()}") == 0
    assert contents(Path("x")) == before


def test_before_the_first_image_a_mistaken_request_may_be_corrected(draw):
    assert draw("num=3", "out=x") == 0
    shutil.rmtree("x/images")
    assert draw("num=2", "seed=4", "out=x") == 0
    request = json.loads(Path("x/request.json").read_text())
    assert (request["num"], request["seed"]) == (2, 4)


def test_a_folder_of_somebody_elses_is_left_untouched(draw):
    Path("x").mkdir()
    Path("x/thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"x holds other files and no request.json; got 'thesis.tex'"):
        draw("num=3", "out=x")
    assert [path.name for path in Path("x").iterdir()] == ["thesis.tex"]
    assert draw("num=1", "out=y") == 0
    Path("y/images").rename("elsewhere")
    Path("y/images").symlink_to("../elsewhere")
    before = contents(Path("elsewhere"))
    with pytest.raises(InputError, match="y/images is a link, which is not followed"):
        draw("num=3", "out=y")
    assert contents(Path("elsewhere")) == before


@pytest.mark.parametrize("kind", ["huge", "other JSON", "no JSON", "link", "pipe"])
def test_a_strangers_request_is_refused(kind, draw):
    assert draw("num=1", "out=x") == 0
    file = Path("x/request.json")
    known = file.read_bytes()
    file.unlink()
    if kind == "huge":
        file.touch()
        os.truncate(file, 8 << 30)
    elif kind == "link":
        Path("real.json").write_bytes(known)
        file.symlink_to("../real.json")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_text('{"num": 1}' if kind == "other JSON" else "[" * 100_000)
    with pytest.raises(InputError, match=r"x/request.json is none of this cm-sample.*fix: set out="):
        draw("num=3", "out=x")
    assert len(list(Path("x/images").iterdir())) == 1


def test_a_packed_file_of_somebody_elses_is_refused(draw):
    assert draw("num=2", "format=npz", "out=x") == 0
    for array in (np.zeros((2, 9, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), np.float32)):
        np.savez("x/samples.npz", array)
        before = Path("x/samples.npz").read_bytes()
        with pytest.raises(InputError, match=r"x/samples.npz is not what cm-sample wrote"):
            draw("num=3", "format=npz", "out=x")
        assert Path("x/samples.npz").read_bytes() == before


def test_two_commands_do_not_write_into_one_folder(draw):
    assert draw("num=1", "out=x") == 0
    handle = os.open("x", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="folder x is in use by another process; fix: wait for it, or set out="):
        draw("num=3", "out=x")
    os.close(handle)
    assert draw("num=3", "out=x") == 0


@pytest.fixture
def draw_classes(draw):
    """`draw` from a checkpoint that has classes."""
    config = CONFIG.model_copy(update={"num_classes": 3, "class_names": ["10", "9", "cat"]})
    denoiser = build_denoiser(config, BACKBONE)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    manifest = {"step": 7, "finished": False, "ema": "ema_0.9", "denoiser": config, "backbone": BACKBONE}
    saving.write(
        checkpoint.step_folder(Path("run"), 7), {"ema_0.9": denoiser.state_dict()}, {}, provenance={}, **manifest
    )
    return draw


def test_classes_are_asked_for_by_name(draw_classes, capsys):
    draw = draw_classes
    for out, typed, said, numbers in (
        ("a", "cat", "cat (2)", 2),
        ("b", "10", "10 (0)", 0),
        ("c", "[9,cat,1]", "9 (1), cat (2)", [1, 2, 1]),
    ):
        assert draw("num=3", f"labels={typed}", f"out={out}") == 0
        assert f"of class {said}\n" in capsys.readouterr().err
        assert np.array_equal(pixels(Path(out)), expected(3, labels=numbers))
        assert json.loads(Path(out, "request.json").read_text())["labels"] == numbers
    assert not np.array_equal(expected(3, labels=0), expected(3, labels=2))
    with pytest.raises(InputError, match="no such class; got 'cats'; allowed: 10, 9, cat, or 0 to 2; fix: labels=cat"):
        draw("labels=cats")
    with pytest.raises(InputError, match="labels: a class is a name or a number; got 1.5"):
        draw("labels=1.5")


def test_several_classes_take_turns_however_many_images(draw_classes):
    for num in (4, 5, 3):
        assert draw_classes(f"num={num}", *tidy(["labels=cat,9"], []), "out=x") == 0
    assert np.array_equal(pixels(Path("x")), expected(5, labels=["cat", "9", "cat", "9", "cat"]))
    assert json.loads(Path("x/request.json").read_text())["labels"] == [2, 1]
    with pytest.raises(InputError, match=r"holds the images of another request: labels"):
        draw_classes("num=4", "labels=[cat,9,10]", "out=x")


@pytest.mark.parametrize("labels", [["labels=cat,9"], []])
def test_the_grid_names_the_classes(labels, draw_classes):
    assert draw_classes("num=5", *tidy(labels, []), "seed=3", "out=x") == 0
    seeds, asked = range(3, 8), ["cat", "9", "cat", "9", "cat"] if labels else None
    images = generate("run", seeds, labels=asked)
    words = captions("run", seeds, asked)
    assert set(words) <= {"10", "9", "cat"} and len(set(words)) > 1
    assert np.array_equal(np.asarray(Image.open("x/grid.png")), grid(images, captions=words)[0].numpy())


def test_a_new_sampler_is_drawn_by_without_a_word_of_it_here(draw, midpoint, capsys):  # noqa: F811
    assert draw("num=3", "steps=3", "sampler=midpoint") == 0
    assert "3 images from run/checkpoints/step_00000005, ema weights, 5 network calls each" in capsys.readouterr().err
    home = Path("samples/run-step-5-3-steps-midpoint")
    assert json.loads((home / "request.json").read_text())["sampler"] == "midpoint"
    assert np.array_equal(pixels(home), expected(3, steps=3, sampler="midpoint"))


def test_the_usual_sampler_by_its_name_and_one_step_are_the_same_request(draw, capsys):
    assert draw("num=3") == 0
    for sampler in ("multistep", "onestep"):
        assert draw("num=3", f"sampler={sampler}") == 0
        assert "3 of 3 images are there already" in capsys.readouterr().err


def test_help_and_config_name_the_samplers_that_there_are():
    known = ", ".join(["auto", *registry.names("sampler")])
    assert f"sampler: auto # {known}\n" in (configs.conf_dir() / "sample.yaml").read_text()
    assert f"  sampler     {known}\n" in (configs.conf_dir() / "hydra" / "help" / "cm_sample.yaml").read_text()


REQUEST = Request(
    cm_train="1",
    ckpt="run",
    step=12,
    weights="ema",
    sha256="",
    num=1,
    seed=0,
    sampler="multistep",
    sigmas=[80.0],
    labels=None,
    guidance=1.0,
    precision="fp32",
    format="png",
)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "a-step-12-1-step"),
        ({"sigmas": [80.0, 1.0], "weights": "raw"}, "a-step-12-2-steps-raw"),
        ({"guidance": 1.5, "seed": 3, "format": "npz"}, "a-step-12-1-step-guidance-1.5-seed-3-npz"),
        ({"labels": 1}, "a-step-12-1-step-class-cat"),
        ({"labels": 0}, "a-step-12-1-step-class-0"),
        ({"labels": [1, 0]}, "a-step-12-1-step-classes"),
        ({"num": 9, "ckpt": "b"}, "a-step-12-1-step"),
    ],
)
def test_the_usual_folder_differs_by_what_is_compared(changed, name):
    folder = Path("runs/a/checkpoints/step_00000012")
    assert default_name(folder, REQUEST.model_copy(update=changed), "", False, ["../x", "cat"]) == name


def test_the_usual_folder_names_what_is_unusual_and_a_checkpoint_without_a_run():
    two = REQUEST.model_copy(update={"sigmas": [80.0, 0.5]})
    assert default_name(Path("downloaded"), two, "euler", True, []) == "downloaded-step-12-2-steps-at-80-0.5-euler"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["runs/x"], ["ckpt=runs/x"]),
        (["num=3", "runs/o'x"], ["num=3", r"ckpt='runs/o\'x'"]),
        (["ckpt=runs/x", "--cfg", "job"], ["--cfg=job", "ckpt=runs/x"]),
        (["-i", "searchpath", "runs/x", "~seed"], ["--info=searchpath", "ckpt=runs/x", "~seed"]),
    ],
)
def test_the_checkpoint_may_be_named_alone(typed, meant):
    assert tidy(typed, [], "ckpt") == meant


@pytest.mark.parametrize("typed", [["runs/x", "runs/y"], ["runs/x", "ckpt=runs/x"]])
def test_two_checkpoints_are_refused(typed):
    with pytest.raises(InputError, match="ckpt is given more than once"):
        tidy(typed, [], "ckpt")


def test_sampling_stops_at_a_signal_and_goes_on(command, start, tmp_path):
    assert command("train", "mode=ict", *TINY).returncode == 0
    request = ["runs/digits-ict", "num=400", "batch_size=2", "out=x"]
    process = start("sample", *request)
    wait_for((tmp_path / "x" / "images" / "00000009.png").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    folder = "runs/digits-ict/checkpoints/step_00000006"
    assert err.splitlines()[-1] == f"stopped: what was drawn is kept in x, and the command with ckpt={folder} goes on"
    done = command("sample", f"ckpt={folder}", *request[1:])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "x" / "images").iterdir())) == 400
    done = command("sample", "runs/digits-ict", "runs/other")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
