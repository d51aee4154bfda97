"""Numbers of a run's images as it trains: cm-eval's, on any number of ranks, and the best checkpoint by them."""

import json

import pytest
import torch

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.signals import Stopped
from cm_train.core.world import ALONE
from cm_train.runs.config import parse
from cm_train.training import evaluations
from cm_train.training.best import Best, best_checkpoint, chosen_number, is_better
from conftest import timeless

RUN = [
    "mode=ict",
    "tracking=none",
    "batch_size=16",
    "log_every=2",
    "preview_every=0",
    "save_every=2",
    "features=pixels",
]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder, name="eval_kid"):
    return {row["step"]: row[name] for row in lines(folder) if name in row}


def steps(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())


def test_numbers_are_those_of_cm_eval(command, tmp_path):
    done = command("train", *RUN, "steps=5", "eval_every=2", "eval_num=32", "metrics=[kid,fd]")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits-ict"
    assert list(numbers(run)) == [2, 4, 5]
    done = command("evaluate", str(run), "num=32", "blocks=1", "features=pixels", "metrics=[kid,fd]", "out=e")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e" / "eval.json").read_text())["metrics"]
    for name in ("kid", "fd"):
        assert numbers(run, f"eval_{name}")[5] == pytest.approx(found[name]["mean"], rel=1e-3)


def test_two_ranks_and_a_resumed_run_have_the_numbers_of_one(command, tmp_path):
    keys = [*RUN, "eval_every=2", "eval_num=33"]
    whole = command("train", *keys, "steps=6", "run_dir=whole")
    first = command("train", *keys, "steps=4", "schedule_steps=6", "run_dir=parts")
    then = command("train", *keys, "steps=6", "schedule_steps=6", "run_dir=parts", "devices=1")
    ranks = command("train", *keys, "steps=6", "run_dir=ranks", "devices=2")
    assert [d.returncode for d in (whole, first, then, ranks)] == [0] * 4, first.stderr + then.stderr + ranks.stderr
    assert timeless(lines(tmp_path / "whole")) == timeless(lines(tmp_path / "parts"))
    one, two = numbers(tmp_path / "whole"), numbers(tmp_path / "ranks")
    assert one.keys() == two.keys() and all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one)


def test_the_best_checkpoint_is_kept_beside_the_newest(command, tmp_path):
    """A learning rate that spoils the weights late: the best numbers are early ones."""
    keys = [*RUN, "eval_every=2", "eval_num=64", "keep=best", "save_every=15m", "optimizer.lr=1.0", "seed=1"]
    done = command("train", *keys, "steps=10", "run_dir=r")
    assert done.returncode == 0, done.stderr
    found = numbers(tmp_path / "r")
    best = min(found, key=found.get)
    assert best <= 6 and best in steps(tmp_path / "r") and 10 in steps(tmp_path / "r")
    assert f"the best by eval_kid, {found[best]:.4g}: r/checkpoints/step_{best:08d}" in done.stderr
    # What was best before still counts, also for what is saved before the first number of the resumed run.
    more = command(
        "train", *keys[:-4], *keys[-2:], "keep=best", "save_every=1", "eval_every=20", "steps=15", "run_dir=r"
    )
    assert more.returncode == 0, more.stderr
    assert steps(tmp_path / "r") == sorted({best, 14, 15})


def test_best_is_of_the_checkpoints_that_are_there(composed, tmp_path):
    config = parse(composed("mode=ict", "features=pixels", f"run_dir={tmp_path}"))
    assert best_checkpoint(config) is None
    values = [(1, 3.0), (3, 1.0), (4, 1.0), (6, 0.5)]
    rows = [{"step": 2}, *({"step": step, "eval_kid": value} for step, value in values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 7, "eval_kid": 0.')  # torn
    for step in (1, 3, 4, 7):  # that of 6 is gone
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    assert best_checkpoint(config) == Best(3, 1.0) and best_checkpoint(config, before=3) == Best(1, 3.0)
    higher = parse(composed("mode=ict", "features=pixels", "metrics=[pr]"))
    assert is_better(higher, Best(1, 0.9), Best(2, 0.8)) and is_better(config, Best(1, 0.8), Best(2, 0.9))


@pytest.mark.parametrize("error", [Stopped(), InputError("features are gone"), MemoryError("no room")])
def test_no_trouble_in_an_evaluation_ends_training(error, tmp_path, monkeypatch, composed, capsys):
    """A signal is seen by the loop, which saves; a number that can't be had is a line on the terminal."""
    config = parse(composed("mode=ict", "features=pixels", "eval_every=1", f"run_dir={tmp_path}", "eval_num=4"))
    dataset = registry.make("dataset", {"name": "digits"})
    made = evaluations.Evaluations(config, dataset, 4, ALONE)
    made.prepare()

    def fail(*_):
        raise error

    monkeypatch.setattr(evaluations, "draw_together", lambda *_: torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(evaluations, "look", fail)
    assert made.make(None, 1) == {} and not made.is_best
    assert isinstance(error, Stopped) or "no evaluation" in capsys.readouterr().err


def test_the_number_to_go_by_is_the_first_or_the_one_named(composed):
    config = parse(composed("mode=ict", "metrics=[kid,pr]", "features=pixels"))
    assert chosen_number(config) == "kid"
    assert chosen_number(config.model_copy(update={"objective_metric": "eval_recall"})) == "recall"
    with pytest.raises(InputError, match="none of the metrics; got 'eval_fid'; allowed: eval_kid, eval_precision"):
        chosen_number(config.model_copy(update={"objective_metric": "eval_fid"}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["keep=best"], "keep=best needs numbers to go by; fix: eval_every=... steps"),
        (["eval_every=2", "metrics=[fid]"], "fid is left out: it is defined on features=inception"),
        (["eval_every=2", "objective_metric=eval_fid"], "allowed: eval_kid"),
        (["eval_every=2", "eval_num=1"], "eval_num"),
        (["eval_every=-1"], "eval_every"),
    ],
)
def test_wrong_input_is_one_line_before_the_first_step(command, tmp_path, keys, words):
    done = command("train", *RUN, "steps=4", *keys)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "runs" / "digits-ict" / "metrics.jsonl").exists()


def test_features_are_settled_by_the_images(composed):
    assert parse(composed("mode=ict")).features.name == "classifier"
    grey = parse(composed("mode=ict", "dataset=image_folder", "dataset.root=x", "dataset.channels=1"))
    assert grey.features.name == "efficientnet"
