"""A picture that says what made it, and cm-sample from=PICTURE, which draws it again."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image, PngImagePlugin
from test_checkpoints import BACKBONE, CONFIG, write
from test_sample import draw, draw_classes  # noqa: F401 - fixtures

from cm_train import __version__, generate, load_denoiser
from cm_train.commands.draw import sample
from cm_train.commands.picture_notes import Note
from cm_train.core import configs
from cm_train.core.command_line import tidy
from cm_train.core.errors import ExitCode, InputError
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.models.denoiser import build_denoiser
from conftest import ENVIRONMENT, chunk, with_chunk

PICTURE = Path("x/images/00000008.png")


def redraw(*words):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(configs.conf_dir()), version_base=None):
        return sample(hydra.compose("sample", overrides=tidy([f"from={PICTURE}", *words], [], "ckpt")))


def note_of(path):
    return json.loads(Image.open(path).text["cm-train"])


def with_note(path, note, image=None):
    """Write `path` again with another note, or other pixels."""
    image = Image.open(path) if image is None else Image.fromarray(image)
    info = PngImagePlugin.PngInfo()
    info.add_text("cm-train", note if isinstance(note, str) else json.dumps(note))
    image.save(path, pnginfo=info)


@pytest.fixture
def drawn(draw, capsys):  # noqa: F811
    """PICTURE, of seed 8, in two steps."""
    assert draw("num=3", "seed=7", "steps=2", "out=x") == 0
    capsys.readouterr()


def test_a_picture_says_what_made_it(drawn):
    weights = Path("run/checkpoints/step_00000005/ema_0.9.safetensors").read_bytes()
    assert note_of(PICTURE) == {
        "cm_train": __version__,
        "ckpt": "run",
        "step": 5,
        "weights": "ema",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "seed": 8,
        "sampler": "multistep",
        "steps": 2,
        "sigmas": [80.0, 0.8],
        "label": None,
        "class_name": None,
        "guidance": 1.0,
        "precision": "fp32",
    }
    assert [note_of(path)["seed"] for path in sorted(Path("x/images").iterdir())] == [7, 8, 9]
    assert "cm-train" not in Image.open("x/grid.png").info


def test_pictures_are_the_same_bytes_whatever_the_batches(draw):  # noqa: F811
    for out, *words in (("a", "batch_size=1"), ("b", "batch_size=3"), ("c",)):
        assert draw("num=4", f"out={out}", *words) == 0
    files = [[path.read_bytes() for path in sorted(Path(out, "images").iterdir())] for out in "abc"]
    one_grey_level = [np.stack([np.asarray(Image.open(io.BytesIO(f))).astype(int) for f in each]) for each in files]
    assert all(np.abs(one_grey_level[0] - other).max() <= 1 for other in one_grey_level)
    notes = [[Image.open(io.BytesIO(f)).text for f in each] for each in files]
    assert notes[0] == notes[1] == notes[2]


@pytest.mark.parametrize("labels", [["labels=cat,9"], []])
def test_a_picture_knows_its_class_asked_for_or_drawn(labels, draw_classes):  # noqa: F811
    assert draw_classes("num=4", *tidy(labels, []), "seed=7", "out=x") == 0
    found = [note_of(path) for path in sorted(Path("x/images").iterdir())]
    for note, image in zip(found, sorted(Path("x/images").iterdir()), strict=True):
        assert note["class_name"] == ["10", "9", "cat"][note["label"]]
        made = generate(load_denoiser("run"), [note["seed"]], labels=[note["label"]])[0, 0]
        assert np.array_equal(np.asarray(Image.open(image)), made.numpy())
    if labels:
        assert [note["label"] for note in found] == [2, 1, 2, 1]
    assert redraw() == 0


def test_a_class_is_drawn_again_by_its_number_whatever_others_are_called(draw, capsys):  # noqa: F811
    config = CONFIG.model_copy(update={"num_classes": 3, "class_names": ["1", "2", "0"]})
    denoiser = build_denoiser(config, BACKBONE)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    manifest = {"step": 7, "finished": False, "ema": "ema_0.9", "denoiser": config, "backbone": BACKBONE}
    saving.write(
        checkpoint.step_folder(Path("run"), 7), {"ema_0.9": denoiser.state_dict()}, {}, provenance={}, **manifest
    )
    assert draw("num=3", "seed=7", "labels='1'", "out=x") == 0
    assert note_of(PICTURE)["label"] == 0
    assert redraw() == 0
    assert "of class 1 (0)" in capsys.readouterr().err


def test_a_picture_that_is_what_it_says_agrees(drawn, capsys):
    assert redraw() == ExitCode.DONE
    assert capsys.readouterr().err.splitlines() == [
        "seed 8 from run/checkpoints/step_00000005, ema weights, 2 steps by multistep",
        f"{PICTURE}: drawn again, every pixel agrees (64)",
    ]
    before = PICTURE.read_bytes()
    assert redraw("out=new/again.png", "run") == ExitCode.DONE
    assert Path("new/again.png").read_bytes() == PICTURE.read_bytes() == before
    assert os.listdir("new") == ["again.png"]


@pytest.mark.parametrize(("change", "code", "said"), [(1, 0, "agrees within one grey level"), (2, 1, "does not agree")])
def test_pixels_that_differ_are_counted(change, code, said, drawn, capsys):
    image, note = np.array(Image.open(PICTURE)), note_of(PICTURE)
    sign = np.where(image > 127, -1, 1)
    image[3, 4] += sign[3, 4] * change
    image[6, 1:3] += sign[6, 1:3].astype(np.uint8)
    with_note(PICTURE, note, image)
    assert redraw("out=again.png") == code
    assert f"{said}: 3 of 64 pixels differ, by {change} at most, as at row 3, column 4" in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open("again.png"))[0], image[0])
    with_note(PICTURE, {**note, "cm_train": "0.0.9"}, image)
    assert redraw() == code
    assert (f"cm_train 0.0.9 drew it, and this is {__version__}" in capsys.readouterr().err) == (code == 1)


def test_another_seed_or_size_does_not_agree(drawn, capsys):
    note = note_of(PICTURE)
    with_note(PICTURE, {**note, "seed": 9})
    assert redraw() == ExitCode.FAILED
    assert "pixels differ" in capsys.readouterr().err
    with_note(PICTURE, note, np.zeros((9, 8), np.uint8))
    assert redraw() == ExitCode.FAILED
    assert "does not agree: it is 8x9, and drawn again 8x8" in capsys.readouterr().err


def test_its_checkpoint_is_found_by_its_hash(drawn, tmp_path, monkeypatch, capsys):
    for step in (6, 9):
        write(Path("run"), step, seed=step)
    assert redraw() == 0, "its run has trained on"
    assert redraw("run") == redraw("ckpt=run/checkpoints/step_00000005") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree("../x", "x")
    assert redraw() == 0, "from any folder below that of the run"
    monkeypatch.chdir(tmp_path)
    Path("run").rename("moved")
    capsys.readouterr()
    assert redraw("moved") == 0
    sha256 = note_of(PICTURE)["sha256"][:16]
    with pytest.raises(InputError) as error:
        redraw()
    assert str(error.value) == (
        f"the checkpoint that made {PICTURE} is not at run any more; allowed: the ema weights of step 5 with sha256 "
        f"{sha256}...; fix: ckpt=..., the run or checkpoint where it is now"
    )
    write(Path("other"), 5, seed=3)
    with pytest.raises(InputError) as error:
        redraw("ckpt=other")
    other = hashlib.sha256(Path("other/checkpoints/step_00000005/ema_0.9.safetensors").read_bytes()).hexdigest()[:16]
    assert str(error.value) == (
        f"another checkpoint made {PICTURE}; got 'other/checkpoints/step_00000005 with sha256 {other}...'; "
        f"allowed: the ema weights of step 5 with sha256 {sha256}...; fix: ckpt=... of that one"
    )
    with pytest.raises(InputError, match="no checkpoint there"):
        redraw("ckpt=nowhere")


def test_what_a_picture_says_is_not_said_again(drawn):
    for word in ("num=2", "seed=8", "steps=2", "format=npz", "batch_size=1", "weights=raw", "precision=bf16"):
        with pytest.raises(InputError, match=f"from= takes {word.split('=')[0]} from the picture; .*fix: drop"):
            redraw(word)


def test_a_picture_is_not_written_over_another_file(drawn):
    Path("there.png").write_bytes(b"mine")
    for out, said in (("there.png", "there already"), ("again", "ends in .png"), (str(PICTURE), "there already")):
        with pytest.raises(InputError, match=said):
            redraw(f"out={out}")
    assert Path("there.png").read_bytes() == b"mine"


def notes_of_strangers():
    yield from ("", "{", "[1]", "9" * 5000, "[" * 30_000, '{"seed": 1}', '{"\\ud800": 1}')
    for key, values in {
        "seed": [-1, 1.5, "x", None, True, [1]],
        "sigmas": [[], [1, 2], [0.0], ["x"], [80.0, 1e999], None, [80.0, 80.0]],
        "sampler": ["ddim", "../x", "", 5],
        "weights": ["../../secret", "ema_0.1", "power_0.1", "", "\x1b[31mred"],
        "sha256": ["", "0" * 64, "\x1b[31mred" * 100],
        "ckpt": ["/dev/zero", "\0", "", "a" * 30_000, "/", "~nobody/x", "x/images/00000008.png", "../" * 1000],
        "step": [-1, "x"],
        "label": [0, -1, 10**30, "cat"],
        "guidance": [2.0, -1.0, "x"],
        "precision": ["auto", "fp8"],
        "more": [1],
    }.items():
        yield from ({key: value} for value in values)


def test_a_strangers_note_is_drawn_or_refused_in_one_line(drawn):
    note = note_of(PICTURE)
    for changes in notes_of_strangers():
        text = changes if isinstance(changes, str) else json.dumps({**note, **changes})
        with_note(PICTURE, text)
        try:
            code, said = redraw(), ""
        except InputError as error:
            code, said = ExitCode.WRONG_INPUT, str(error)
        assert code == ExitCode.WRONG_INPUT, changes
        assert "\n" not in said and "\x1b" not in said and len(said) < 2500, changes


TAKEN = """
import atexit, resource
from cm_train.commands import sample
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sample.main()
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts memory in KiB")
def test_a_bomb_takes_little_memory_and_one_line(drawn):
    content, usual = PICTURE.read_bytes(), 0
    bomb = zlib.compress(bytes(1 << 30), 9)
    hidden = chunk(b"zTXt", b"Comment\0\0" + bomb) + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)
    wide = chunk(b"IHDR", (1 << 28).to_bytes(4) + (1 << 28).to_bytes(4) + bytes([8, 0, 0, 0, 0]))
    for name, made, code in (
        ("good", content, 0),
        ("text", with_chunk(content, hidden), 2),
        ("size", content[:8] + wide + content[33:], 1),
        ("pixels", content[: content.index(b"IDAT") - 4] + chunk(b"IDAT", bomb) + chunk(b"IEND", b""), 1),
    ):
        Path(f"{name}.png").write_bytes(made)
        argv = [sys.executable, "-c", TAKEN, f"from={name}.png", "ckpt=run"]
        done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
        usual = usual or int(done.stdout)
        assert int(done.stdout) < usual + (100 << 10), name


def test_the_command_finds_the_picture_and_says_how_it_agrees(command, drawn):
    done = command("sample", f"from={PICTURE}")
    assert done.returncode == 0 and done.stderr.splitlines()[-1].endswith("every pixel agrees (64)"), done.stderr
    PICTURE.write_bytes(PICTURE.read_bytes()[:-20])
    done = command("sample", f"from={PICTURE}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "is cut off" in done.stderr, done.stderr
    done = command("sample")
    assert done.returncode == 2 and "no checkpoint given; fix: cm-sample runs/<name>" in done.stderr


def test_too_many_noise_levels_for_a_note_leave_none():
    note = {"cm_train": "1", "ckpt": "", "step": 1, "weights": "", "sha256": "", "seed": 0, "sampler": "", "steps": 1}
    rest = {"label": None, "class_name": None, "guidance": 1.0, "precision": "fp32"}
    assert Note(**note, **rest, sigmas=[0.1] * 9_000).text() == ""
    assert Note(**note, **rest, sigmas=[0.1] * 900).text()
