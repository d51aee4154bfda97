"""What equal jobs of a sweep take is measured once, alone."""

import threading
from dataclasses import replace

import pytest
import yaml

from cm_train.core.signals import StopFlag
from cm_train.runs import execution
from cm_train.runs.config import parse
from cm_train.runs.measuring import Measured
from cm_train.sweeps.measured import measure_first, remembered
from conftest import wait_for

FOUND = Measured(2.0, 0.1, 0.01, 1.0, 4, 1, 0.5, 10, 20)


def test_equal_runs_are_measured_once_and_others_for_themselves(composed, tmp_path):
    def ask(*words):
        run = parse(composed("mode=ict", *words))
        return remembered(tmp_path, run, lambda: measured.append(words) or replace(FOUND, step_s=len(measured)), stop)

    measured, stop = [], StopFlag()
    assert [ask(f"seed={seed}", f"name=run-{seed}", f"steps={9 + seed}").step_s for seed in (0, 1, 2)] == [1, 1, 1]
    assert ask("batch_size=64").step_s == 2 and ask("backbone.channels=32").step_s == 3 and ask("mode=ct").step_s == 4
    assert ask("seed=5").step_s == 1 and len(measured) == 4


def test_nobody_measures_beside_another(composed, tmp_path):
    run, goes_on, order = parse(composed("mode=ict")), threading.Event(), []

    def slowly():
        order.append("begun")
        goes_on.wait(20)
        order.append("ended")
        return FOUND

    def second():
        remembered(tmp_path, run, lambda: order.append("again"), StopFlag())
        order.append("second")

    first = threading.Thread(target=remembered, args=(tmp_path, run, slowly, StopFlag()))
    first.start()
    wait_for(lambda: order == ["begun"])
    other = threading.Thread(target=second)
    other.start()
    goes_on.set()
    first.join()
    other.join()
    assert order == ["begun", "ended", "second"]


def test_a_stop_ends_the_wait_and_is_not_remembered(composed, tmp_path):
    run, stopped = parse(composed("mode=ict")), StopFlag()
    stopped.caught.add(15)
    assert remembered(tmp_path, run, lambda: pytest.fail("it was stopped"), stopped) is None
    assert remembered(tmp_path, run, lambda: None, StopFlag()) is None
    assert remembered(tmp_path, run, lambda: FOUND, StopFlag()) == FOUND


def test_the_leader_measures_each_distinct_network_and_mode_and_its_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = []
    monkeypatch.setattr(execution, "measured", lambda run, *_: measured.append((run.mode, run.batch_size)) or FOUND)
    grid = [f"mode={mode} seed={seed}" for mode in ("cd", "ict") for seed in (0, 1)]
    words = ["mode=cd,ict", "seed=0,1", "budget=1h", "tracking=none", "hydra/launcher=joblib"]
    measure_first([word for word in words if "launcher" not in word], ["mode", "seed"], grid, tmp_path, StopFlag())
    assert measured == [("edm", 128), ("cd", 128), ("ict", 128)]


@pytest.mark.long
def test_a_sweep_beside_one_another_has_equal_steps(command, tmp_path):
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "mode=ict", "seed=0,1", "budget=12s"]
    done = command("train", *words, "tracking=none", "preview_every=0")
    assert done.returncode == 0, done.stderr
    configs = [yaml.safe_load((tmp_path / "runs" / f"digits-ict-seed-{i}" / "config.yaml").read_text()) for i in (0, 1)]
    assert configs[0]["steps"] == configs[1]["steps"] > 10
    assert done.stderr.count("measuring what a step takes") <= 2, "as is, and with smaller batches"
