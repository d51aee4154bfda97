"""cm-eval as a user types it."""

import json

import numpy as np
import pytest

from conftest import TINY


@pytest.fixture(scope="module")
def trained(warm, tmp_path_factory):
    """A folder with runs/digits-ict of two checkpoints."""
    home = tmp_path_factory.mktemp("trained")
    from conftest import ENVIRONMENT

    done = warm.run(["-m", "cm_train.commands.train", "mode=ict", *TINY], cwd=home, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def evaluate(command, trained, tmp_path):
    """evaluate("num=32", ...) -> the finished process of cm-eval, beside the runs; quick by its settings."""

    def run(*arguments, cwd=trained, **environment):
        quick = ["num=48", "blocks=2", "features=pixels", "metrics=[kid,fd]"]
        keys = {a.partition("=")[0] for a in arguments}
        given = [q for q in quick if q.partition("=")[0] not in keys]
        return command("evaluate", *arguments, *given, cwd=cwd, XDG_CACHE_HOME=str(tmp_path / "cache"), **environment)

    return run


def test_a_run_is_measured_against_what_it_was_trained_on(evaluate, trained, tmp_path):
    done = evaluate("runs/digits-ict", f"out={tmp_path / 'e'}")
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert set(stored["metrics"]) == {"kid", "fd"}
    assert len(stored["metrics"]["kid"]["values"]) == 2 and stored["metrics"]["kid"]["std"] > 0
    protocol = stored["protocol"]
    assert protocol["num"] == 48 and protocol["of"]["seeds"] == ["0-47", "48-95"] and protocol["of"]["step"] == 6
    assert protocol["reference"]["num"] == 1797 and protocol["features"]["name"] == "pixels"
    assert {"torch", "numpy", "cm_train", "torch-fidelity"} <= set(protocol["versions"])
    assert any("too few" in note for note in stored["notes"])
    assert "data:image/png" in (tmp_path / "e" / "eval.html").read_text()
    assert "kid" in done.stdout and "too few" in done.stderr
    before = (tmp_path / "e" / "eval.json").read_bytes()
    again = evaluate("runs/digits-ict", f"out={tmp_path / 'e'}")
    assert again.returncode == 0 and "is there already" in again.stderr
    assert (tmp_path / "e" / "eval.json").read_bytes() == before
    other = evaluate("runs/digits-ict", f"out={tmp_path / 'e'}", "num=50")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "images (48 and 50)" in other.stderr


def test_all_checkpoints_make_one_table_and_a_curve(evaluate, tmp_path):
    done = evaluate("runs/digits-ict", "checkpoints=all", f"out={tmp_path / 'e'}")
    assert done.returncode == 0, done.stderr
    steps = sorted(json.loads(p.read_text())["protocol"]["of"]["step"] for p in (tmp_path / "e").glob("*/eval.json"))
    assert steps == [3, 6]
    text = (tmp_path / "e" / "eval.html").read_text()
    assert "Over training" in text and text.count("<circle") == 4


def test_samples_give_what_their_model_gave(evaluate, command, trained, tmp_path):
    """The images of the seeds 0 to 47, written by cm-sample and read again, have the numbers of the first block."""
    direct = evaluate("runs/digits-ict", f"out={tmp_path / 'a'}", "batch_size=48")
    drawn = command("sample", "runs/digits-ict", "num=48", "batch_size=48", f"out={tmp_path / 's'}", cwd=trained)
    assert direct.returncode == drawn.returncode == 0, direct.stderr + drawn.stderr
    done = evaluate(f"samples={tmp_path / 's'}", "reference=digits", f"out={tmp_path / 'b'}")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "eval.json").read_text())["metrics"] for name in "ab")
    for name in ("kid", "fd"):
        assert two[name]["mean"] == pytest.approx(one[name]["values"][0], rel=1e-6)


def test_what_can_not_be_measured_is_left_out_and_said(evaluate, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    done = evaluate("runs/digits-ict", f"reference={tmp_path / 'stats.npz'}", f"out={tmp_path / 'e'}")
    assert (
        done.returncode == 0 and "kid is left out: it compares images, and the reference is statistics" in done.stderr
    )
    assert set(json.loads((tmp_path / "e" / "eval.json").read_text())["metrics"]) == {"fd"}
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    done = evaluate("runs/digits-ict", f"reference={tmp_path / 'stats.npz'}", f"out={tmp_path / 'f'}")
    assert done.returncode == 2 and "not of features=pixels; got '3 features'; allowed: 64" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "cm-eval measures a run (cm-eval runs/x) or images that are there (samples=...)"),
        (["runs/digits-ict", "samples=x"], "got 'both'"),
        (["runs/nothing"], "no checkpoint there"),
        (["runs/digits-ict", "metrics=kdi"], "no such option metrics=kdi"),
        (["runs/digits-ict", "metrics=[fid]"], "fid is left out: it is defined on features=inception"),
        (["runs/digits-ict", "metrics=[is]"], "features=pixels knows no classes"),
        (["runs/digits-ict", "features=resnet"], "no such option features=resnet"),
        (["runs/digits-ict", "reference=fashion_mnist"], "mnist"),
        (["runs/digits-ict", "reference=nowhere/at/all"], "nowhere/at/all"),
        (["samples=runs", "num=8"], "samples need something to be compared with"),
        (["runs/digits-ict", "num=1"], "num"),
        (["runs/digits-ict", "protocol=edm"], "protocol=edm is not followed; got 'num=48, blocks=2, features=pixels"),
        (["runs/digits-ict", "held_out=digits"], "the held-out pictures are those of the reference"),
        (["runs/digits-ict", "step=2"], "did you mean steps?"),
        (["runs/digits-ict", "ref=digits"], "reference"),
        (["runs/digits-ict", "out=/dev/null/x"], "can't write to"),
        (["runs/digits-ict", "metrics.kid.subset_size=1"], "subset_size"),
    ],
)
def test_wrong_input_is_one_line(evaluate, arguments, words):
    done = evaluate(*arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("cm") or "evaluate.py" in line]
    assert words in done.stderr and "Traceback" not in done.stderr and len(lines) <= 2


def test_help_fits_a_screen(evaluate):
    done = evaluate("--help")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
