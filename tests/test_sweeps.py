"""Multirun: states, folders, the table, re-runs, and what stops it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from cm_train import cli, gpus, sweeps
from cm_train.config import parse
from cm_train.sweep_table import Job, final_metric, read_jobs
from conftest import TINY, children, wait_for

SMALL = [*TINY, "steps=4", "save_every=2"]


def jobs_of(folder):
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    return [json.loads(p.read_text()) for p in sorted((sweep / "jobs").iterdir())]


def states(folder):
    return [j["state"] for j in jobs_of(folder)]


def final_step(folder, run):
    return final_metric(folder / "runs" / run)[1]


def test_sweep_goes_on_past_failures_and_again_with_what_is_left(command, tmp_path):
    (tmp_path / "runs").mkdir()
    in_the_way = tmp_path / "runs" / "digits-edm-seed-1"
    in_the_way.touch()
    done = command("train", "-m", "mode=edm,ict", "seed=0,1", *SMALL)
    assert done.returncode == 2, done.stderr  # nothing but wrong input
    assert states(tmp_path) == ["finished", "refused", "finished", "finished"]
    assert "3 finished, 1 refused" in done.stderr
    assert "job 1 (mode=edm seed=1): can't write the run folder" in done.stderr
    assert "mode=ict seed=1" in done.stderr and "runs/digits-ict-seed-1" in done.stderr

    in_the_way.unlink()
    again = command("train", "-m", "mode=edm,ict", "seed=0,1", *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is finished at step 4") == 3
    assert states(tmp_path) == ["finished"] * 4


def test_killed_job_leaves_the_others_alone_and_resumes(command, start, tmp_path):
    process = start("train", "-m", "mode=ct", "seed=0,1", *TINY, "steps=60", "save_every=5", "devices=2")
    checkpoints = tmp_path / "runs" / "digits-ct-seed-0" / "checkpoints"
    wait_for((checkpoints / "step_00000005").exists)
    ranks = [pid for pid in children(process.pid) if "cm_train.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(ranks[-1], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    first, second = jobs_of(tmp_path)
    assert (first["state"], second["state"]) == ("failed", "finished")
    assert 5 <= first["step"] < 60, "killed too late to show anything"
    again = command("train", "-m", "mode=ct", "seed=0,1", *TINY, "steps=60", "save_every=5", "devices=2")
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr and states(tmp_path) == ["finished"] * 2


def test_fail_fast_stops_the_rest(command, tmp_path):
    done = command("train", "-m", "mode=edm", "optimizer.lr=-1,1e-3", *SMALL, "fail_fast=true")
    assert done.returncode == 2
    assert states(tmp_path) == ["refused"] and "1 not started" in done.stderr


@pytest.mark.parametrize(("launcher", "whom"), [([], "one"), (["hydra/launcher=joblib"], "group")])
def test_ctrl_c_stops_a_sweep_saved(launcher, whom, command, start, tmp_path):
    """To the process alone, as `kill` does, and to all at once, as a terminal does."""
    arguments = ["-m", *launcher, "mode=edm", "seed=0,1,2", *TINY, "log_every=1"]
    process = start("train", *arguments, "steps=100000")
    metrics = tmp_path / "runs" / "digits-edm-seed-0" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    if whom == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3, told
    assert set(states(tmp_path)) == {"stopped"} and "not started" in told
    last = final_step(tmp_path, "digits-edm-seed-0")
    assert (metrics.parent / "checkpoints" / f"step_{last:08d}").exists()


def test_jobs_side_by_side_train_their_teacher_once(command, start, tmp_path):
    # A teacher that was begun goes on with its own settings, so this one stays small.
    process = start("train", "mode=edm", *TINY, "steps=300", "log_every=1")
    metrics = tmp_path / "runs" / "digits-edm" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 3
    done = command("train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "mode=cd", "seed=0,1", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("edm on digits: 300 steps") == 1
    assert "waiting for the teacher: run folder runs/digits-edm is in use" in done.stderr
    assert states(tmp_path) == ["finished"] * 2


def test_search_goes_on_where_it_was_killed(command, start, tmp_path):
    pytest.importorskip("optuna")
    arguments = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra/sweeper/sampler=random", "mode=edm"]
    arguments += [*SMALL, "optimizer.lr=tag(log, interval(1e-5,1e-3))", "objective_metric=loss"]
    process = start("train", *arguments)
    wait_for(lambda: len(list((tmp_path / "runs").glob("digits-edm-*"))) == 2)
    process.kill()
    process.communicate()
    done = command("train", *arguments)
    assert done.returncode == 0, done.stderr
    assert "best of 3 trials: " in done.stderr
    assert len(list((tmp_path / "runs").glob("digits-edm-*"))) == 3, "the trial that was under way is taken up again"
    values = [j["metric"][1] for j in jobs_of(tmp_path)]
    assert len(values) == 2 and all(v > 0 for v in values)
    done = command("train", *arguments)
    assert done.returncode == 0 and "the study has its 3 trials" in done.stderr


def test_a_typing_mistake_leaves_nothing(command, tmp_path):
    done = command("train", "-m", "mode=edm", "seeed=0,1")
    assert done.returncode == 2 and "unknown key seeed; did you mean seed?" in done.stderr
    assert not list((tmp_path / "runs" / "sweeps").iterdir())


def test_unknown_objective_metric_fails(command, tmp_path):
    done = command("train", "-m", "mode=edm", *SMALL, "objective_metric=fid")
    assert done.returncode == 1 and "objective_metric=fid is not in its metrics.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("choice", "package"),
    [
        ("hydra/launcher=joblib", "hydra_plugins.hydra_joblib_launcher"),
        ("hydra/launcher=submitit_slurm", "hydra_plugins.hydra_submitit_launcher"),
        ("hydra/sweeper=optuna", "hydra_plugins.hydra_optuna_sweeper"),
    ],
)
def test_missing_plugin_is_named(choice, package, tmp_path):
    script = f"import sys; sys.modules['{package}'] = None; from cm_train.train import main; main()"
    argv = [sys.executable, "-c", script, "-m", choice, "seed=0,1"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "fix: pip install 'cm-train[sweeps]'" in done.stderr


def test_sweep_has_one_folder_whatever_the_order_and_the_launcher():
    def folder(*arguments):
        swept = [o for o in OverridesParser.create().parse_overrides(list(arguments)) if o.is_sweep_override()]
        return sweeps._folder(swept, list(arguments))

    same = folder("seed=0,1", "mode=ct")
    assert same == folder("mode=ct", "hydra/launcher=joblib", "seed=0,1", "hydra.launcher.n_jobs=4")
    assert same != folder("seed=0,1,2", "mode=ct")
    assert same.name.startswith("seed-") and "=" not in str(same)


def test_table_reads_what_died_as_killed_and_fills_up_the_grid(tmp_path):
    (tmp_path / "jobs").mkdir()
    Job(1, "seed=1").write(tmp_path)
    Job(0, "seed=0", "finished", step=4, metric=("loss", 0.5)).write(tmp_path)
    found = read_jobs(tmp_path, ["seed=0", "seed=1", "seed=2"])
    assert [(j.number, j.state) for j in found] == [(0, "finished"), (1, "killed"), (2, "not started")]
    assert len(read_jobs(tmp_path, [])) == 2
    assert sweeps._exit_code(found, stopped=True, code=0) == 1
    assert sweeps._exit_code([Job(0, "", "stopped")], stopped=True, code=0) == 3


def test_final_metric_prefers_agreement(tmp_path):
    lines = [{"step": 1, "loss": 0.5, "agreement_rms": 0.25}, {"step": 2, "loss": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 3, "lo')
    assert final_metric(tmp_path) == ("agreement_rms", 2, 0.25)
    assert final_metric(tmp_path, "agreement") == ("agreement_rms", 2, 0.25)
    assert final_metric(tmp_path, "loss") == ("loss", 2, 0.4)
    assert final_metric(tmp_path, "fid") == ("fid", 2, None)


def hold(num, log, seconds):
    with gpus.reserved(num, lambda: False) as free:
        assert free
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        log.put(("take", os.getpid(), names))
        time.sleep(seconds)
        log.put(("give", os.getpid(), names))


def test_no_gpu_is_reserved_twice(tmp_path, monkeypatch):
    """Three jobs that want two each, of three: one after the other, whichever is first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-aa/b")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    log = context.Queue()
    processes = [context.Process(target=hold, args=(2, log, 0.3)) for _ in range(3)]
    for p in processes:
        p.start()
    events = [log.get(timeout=60) for _ in range(6)]
    for p in processes:
        p.join()
        assert p.exitcode == 0
    held: set[str] = set()
    for what, _, names in events:
        assert len(names) == 2
        if what == "take":
            assert not held & set(names)
            held |= set(names)
        else:
            held -= set(names)


def test_waiting_for_a_gpu_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "_folder", lambda: tmp_path)
    with gpus.reserved(1, lambda: False) as first:
        assert first
        with gpus.reserved(1, lambda: True) as second:
            assert not second
    with gpus.reserved(1, lambda: True) as third:
        assert third
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_documented_wandb_sweep_starts_a_run(composed, monkeypatch):
    """What wandb's agent makes of the YAML in docs/sweeps.md is a command line that composes."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    text = (Path(cli.conf_dir()).parent / "docs" / "sweeps.md").read_text()
    sweep = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    values = {"args": {"optimizer.lr": {"value": 3e-4}, "ema.decay": {"value": 0.99}}}
    macros = utils.create_sweep_command_args(values) | {"program": [sweep["program"]]}
    words = [w for c in utils.create_sweep_command(sweep["command"]) for w in macros.get(c[2:-1], [c])]
    assert words[0] == "cm-train"
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config = parse(composed(*words[1:]))
    assert config.folder.name == "digits-cd-abc123"
    assert (config.optimizer["lr"], config.ema["decay"]) == (3e-4, 0.99)
