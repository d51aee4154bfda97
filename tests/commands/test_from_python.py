"""train(): what a notebook or a script calls in the place of cm-train."""

import os
import signal
import sys
import threading
from pathlib import Path

import hydra
import numpy as np
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from cm_train import InputError, train
from cm_train.commands import from_python
from cm_train.commands.from_python import as_arguments
from cm_train.core import configs
from cm_train.core.run_layout import CONFIG, METRICS
from cm_train.models.checkpoints.read import newest_manifest
from cm_train.runs.config import Composed, parse
from cm_train.runs.read_back import read_back
from conftest import ENVIRONMENT, wait_for

TINY = {"tracking": "none", "steps": 4, "batch_size": 16, "preview_every": 0, "log_every": 2}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settled(monkeypatch):
    """settled({...}) -> the typed config with which train would train."""

    def settle(settings, **more):
        found = []
        monkeypatch.setattr("cm_train.runs.train.train", lambda composed, *_: found.append(composed.config) or 0)
        train(settings, **more)
        return found[0]

    return settle


def test_settings_mean_what_they_mean_on_the_command_line(settled, composed):
    given = {
        "mode": "ict",
        "optimizer": {"lr": 1e-5, "clip_norm": 1},
        "backbone.channel_mult": (1, 2),
        "sampling": {"points": {2: [80.0, 0.8]}},
        "ema.decay": np.float32(0.5),
        "compile": False,
        "save_every": "15m",
        "micro_batch": None,
        "steps": np.int64(30),
    }
    words = ["mode=ict", "optimizer.lr=1e-5", "optimizer.clip_norm=1", "backbone.channel_mult=[1,2]", "steps=30"]
    words += ["ema.decay=0.5", "compile=false", "save_every=15m", "micro_batch=null", "seed=0", "experiment=null"]
    words += ["++sampling.points={2:[80.0,0.8]}"]
    assert settled(given, seed=0, experiment=None) == parse(composed(*words))


@pytest.mark.parametrize("name", ["a b", "x=1,y", "it's", "null", "12", "a'b\\", "[z]", "{q}", "é", "a#b", "~/x"])
def test_text_is_itself(name, settled):
    assert settled({"name": name, "tracking.group": name}).name == name


def test_a_path_is_text(settled):
    config = settled({"mode": "edm"}, run_dir=Path("some where") / "x", teacher=None)
    assert config.run_dir == "some where/x"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "xx"}, "no such option mode=xx; allowed: .*cd"),
        ({"optimizer.lrr": 1}, "unknown key optimizer.lrr; did you mean optimizer.lr"),
        ({"steps": "100"}, "steps: .*integer; got '100'"),
        ({"steps": [1, 2]}, "steps: "),
        ({"seed": {1, 2}}, "seed can't be of this type; got 'set'"),
        ({"--multirun": True}, "this is no key; got '--multirun'"),
        ({"mode=ct": 1}, "this is no key"),
        ({1: 2}, "this is no key; got '1'"),
        (["mode=ct"], "settings are a dict; got 'list'"),
        ({"hydra.run.dir": "x"}, "Hydra's own"),
        ({"hydra.searchpath": ["nowhere"]}, "."),
        ({"plugins": ["nobody"]}, "nobody"),
        ({"mode": "ct", "teacher": "x"}, "mode ct takes no teacher"),
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(settings, message):
    before = GlobalHydra.instance().hydra
    with pytest.raises(InputError, match=message) as raised:
        train(settings)
    assert "\n" not in str(raised.value) and len(str(raised.value)) > 20
    assert not list(Path().iterdir()) and GlobalHydra.instance().hydra is before
    with pytest.raises(InputError, match="mode is set twice; got 'ct and cd'"):
        train({"mode": "ct"}, mode="cd")


def test_runs_are_trained_one_after_the_other_their_teacher_first(monkeypatch, capfd):
    """In one process, whatever its command line; the surroundings are as they were."""
    monkeypatch.setattr(sys, "argv", arguments := ["notebook", "-m", "--what=ever"])
    with hydra.initialize_config_dir(str(configs.conf_dir()), version_base=None):
        hydras, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        teacher = train({**TINY, "mode": "edm", "recipe": None})
        assert teacher == Path("runs/digits-edm") and newest_manifest(teacher).finished
        Path("runs/digits-edm").rename("elsewhere")
        monkeypatch.setattr(Composed, "teacher", shortened(Composed.teacher))
        student = train(TINY, mode="cd")
        assert GlobalHydra.instance().hydra is hydras and HydraConfig.instance().cfg is config
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert student == Path("runs/digits-cd") and newest_manifest(student).step == 4
    assert read_back(Path("runs/digits-edm")).mode == "edm", "trained on the way"
    assert train(TINY, mode="cd") == student and "is finished" in capfd.readouterr().err
    assert train({**TINY, "steps": 6}, mode="cd") == student and newest_manifest(student).step == 6
    with pytest.raises(InputError, match="seed"):
        train(TINY, mode="cd", seed=3)
    assert sys.argv is arguments and arguments == ["notebook", "-m", "--what=ever"]


def shortened(compose_teacher):
    """The teacher's own recipe, of a few steps."""

    def compose(self, folder, swept, images=None):
        return compose_teacher(self, folder, swept, images).model_copy(update={"steps": 2, "batch_size": 16})

    return compose


@pytest.mark.parametrize(("number", "ends_by"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, SystemExit)])
def test_a_signal_saves_first_and_is_told(number, ends_by):
    folder = Path("runs/digits-ct")

    def interrupt():
        wait_for(lambda: (folder / METRICS).exists() and (folder / METRICS).stat().st_size > 0)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(ends_by) as raised:
        train({**TINY, "steps": 100_000}, mode="ct", recipe=None)
    thread.join()
    assert raised.type is KeyboardInterrupt or raised.value.code == 3
    stopped = newest_manifest(folder).step
    assert 0 < stopped < 100_000
    assert train({**TINY, "steps": stopped + 1}, mode="ct", recipe=None) == folder, "the same call goes on"


def test_a_limit_of_time_is_no_failure():
    folder = train({**TINY, "steps": 100_000}, mode="ct", recipe=None, max_hours=2 / 3600)
    assert not newest_manifest(folder).finished


def test_in_a_thread_it_trains_and_another_call_is_refused():
    done = []

    def body():
        done.append(train({**TINY, "steps": 20}, mode="ct", recipe=None))

    thread = threading.Thread(target=body)
    thread.start()
    wait_for(from_python._under_way.locked)
    with pytest.raises(InputError, match="training a run already"):
        train(TINY, mode="edm")
    thread.join()
    assert done == [Path("runs/digits-ct")]


@pytest.mark.long
def test_a_script_needs_no_guard_for_several_processes(warm, tmp_path):
    lines = "from cm_train import train", f"print(train({TINY!r}, mode='ct', recipe=None, devices=2))"
    (tmp_path / "script.py").write_text("\n".join(lines))
    done = warm.run(["script.py"], cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/digits-ct" and "on 2 processes" in done.stderr
    assert yaml.safe_load(Path("runs/digits-ct", CONFIG).read_text())["devices"] == 2


def test_under_torchrun_it_is_refused(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun starts commands.*fix: cm-train under torchrun"):
        train(TINY, mode="ct")


def test_as_arguments_flattens_what_has_names():
    assert as_arguments({"a": {"b": {"c": 1}, "d": [True, None, "x,y"]}, "e": {}, "f": {1: 2.0}}) == [
        "a.b.c=1",
        "a.d=[true,null,'x,y']",
        "++e={}",
        "++f={1:2.0}",
    ]
