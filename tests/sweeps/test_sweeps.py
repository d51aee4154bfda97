"""Multirun: states, folders, the table, re-runs, and what stops it."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cm_train.core import configs
from cm_train.core.command_line import tidy
from cm_train.core.errors import ExitCode, InputError
from cm_train.runs import teachers
from cm_train.runs.config import parse
from cm_train.runs.lock import lock
from cm_train.sweeps import gpus, naming
from cm_train.sweeps import job as sweep_job
from cm_train.sweeps import leader as sweeps
from cm_train.sweeps.records import Job, SweepRecord, final_metric, read_jobs
from conftest import TINY, children, wait_for

SMALL = [*TINY, "steps=4", "save_every=2"]


def jobs_of(folder):
    sweep = max((folder / "runs" / "sweeps").iterdir(), key=lambda path: (path / "sweep.json").stat().st_mtime)
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


@pytest.mark.long
def test_killed_job_leaves_the_others_alone_and_resumes(command, start_cold, tmp_path):
    process = start_cold("train", "-m", "mode=ct", "seed=0,1", *TINY, "steps=60", "save_every=5", "devices=2")
    checkpoints = tmp_path / "runs" / "digits-ct-seed-0" / "checkpoints"
    wait_for((checkpoints / "step_00000005").exists)
    ranks = [pid for pid in children(process.pid) if "cm_train.runs.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(ranks[-1], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    first, second = jobs_of(tmp_path)
    assert (first["state"], second["state"]) == ("failed", "finished")
    assert 2 <= first["step"] < 60, "killed too late to show anything"
    again = command("train", "-m", "mode=ct", "seed=0,1", *TINY, "steps=60", "save_every=5", "devices=2")
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr and states(tmp_path) == ["finished"] * 2


def test_fail_fast_stops_the_rest(command, tmp_path):
    done = command("train", "-m", "mode=edm", "optimizer.lr=-1,1e-3", *SMALL, "fail_fast=true")
    assert done.returncode == 2
    assert states(tmp_path) == ["refused"] and "1 not started" in done.stderr
    done = command("train", "-m", "mode=edm", "seed=0,1", *SMALL, "fail_fast=true", "objective_metric=fid")
    assert done.returncode == 1 and "1 not started" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "whom"), [([], "one"), pytest.param(["hydra/launcher=joblib"], "group", marks=pytest.mark.long)]
)
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


@pytest.mark.long
def test_ctrl_c_saves_jobs_beside_a_worker_that_has_none(start, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-edm-seed-0").touch()  # its job is refused at once
    arguments = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "mode=edm", "seed=0,1", *TINY, "log_every=1"]
    process = start("train", *arguments, "steps=100000")
    metrics = tmp_path / "runs" / "digits-edm-seed-1" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3, told
    assert states(tmp_path) == ["refused", "stopped"]
    assert list((metrics.parent / "checkpoints").iterdir())


def test_equal_jobs_are_one_run(command, tmp_path):
    done = command("train", "-m", "mode=edm", "seed=3,3", *SMALL)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["finished"] * 2 and "is finished at step 4" in done.stderr


def test_a_mistyped_command_leaves_the_records_of_the_sweep_before(command, tmp_path):
    sweep = ["-m", "mode=edm", "seed=0,1", *SMALL]
    assert command("train", *sweep).returncode == 0
    before = jobs_of(tmp_path)
    assert command("train", *sweep, "hydra/launcher=joblb").returncode == 2
    assert jobs_of(tmp_path) == before
    blocked = tmp_path / "runs" / "sweeps" / "file"
    blocked.touch()
    done = command("train", *sweep, "hydra.sweep.dir=runs/sweeps/file")
    assert done.returncode == 2 and "can't write the sweep's folder" in done.stderr
    assert "fix: set hydra.sweep.dir=" in done.stderr


def test_agents_run_is_the_students_and_not_its_teachers(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abcd")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    with teachers.without_variables_of_one_run():
        assert "WANDB_RUN_ID" not in os.environ
    assert os.environ["WANDB_RUN_ID"] == "abcd" and "WANDB_SWEEP_ID" not in os.environ


@pytest.mark.long
def test_jobs_side_by_side_train_their_teacher_once(command, start, tmp_path):
    # A teacher that was begun goes on with its own settings, so this one stays small.
    process = start("train", "mode=edm", *TINY, "steps=300", "log_every=1")
    metrics = tmp_path / "runs" / "digits-edm" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 3
    done = command("train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "mode=cd,ect", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("edm on digits: 300 steps") == 1
    assert "[job 0] " in done.stderr and "[job 1] " in done.stderr
    assert "waiting for the teacher: run folder runs/digits-edm is in use" in done.stderr
    assert states(tmp_path) == ["finished"] * 2


def test_job_waits_for_another_of_its_sweep_and_for_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cm-train", "-m", "mode=cd,edm"])
    folder, waits = tmp_path / "run", []

    def work():
        with lock(folder):
            return ExitCode.DONE

    def other(argv):
        monkeypatch.setattr(sys, "argv", argv)
        held = lock(folder)
        held.__enter__()
        monkeypatch.setattr(sys, "argv", ["cm-train", "-m", "mode=cd,edm"])
        return held

    held = other(["somewhere/cm-train", "-m", "mode=cd,edm"])
    monkeypatch.setattr(
        sweep_job.time, "sleep", lambda s: waits.append(s) or (len(waits) == 2 and held.__exit__(None, None, None))
    )
    assert sweep_job.when_free(work, lambda: False) == ExitCode.DONE and len(waits) == 2
    held = other(["cm-train", "mode=edm"])
    with pytest.raises(InputError, match="is in use by process"):
        sweep_job.when_free(work, lambda: False)
    held.__exit__(None, None, None)
    held = other(["cm-train", "-m", "mode=cd,edm"])
    assert sweep_job.when_free(work, iter([False, True]).__next__) == ExitCode.STOPPED
    held.__exit__(None, None, None)


@pytest.mark.long
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
    assert not (tmp_path / "runs").exists()


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
def test_missing_plugin_is_named(choice, package, warm, tmp_path):
    script = f"import sys; [sys.modules.pop(name) for name in [*sys.modules] if name.startswith('{package}.')]; "
    script += f"sys.modules['{package}'] = None; from cm_train.commands.train import main; main()"
    done = warm.run(["-c", script, "-m", choice, "seed=0,1"], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "fix: pip install 'cm-train[sweeps]'" in done.stderr


def folder_of(*arguments):
    return sweeps.folder_of(OverridesParser.create().parse_overrides(list(arguments)))


def test_sweep_has_one_folder_whatever_does_not_matter():
    same = folder_of("seed=0,1", "mode=ct")
    assert same == folder_of("mode=ct", "hydra/launcher=joblib", "seed=0,1", "+hydra.launcher.x=4", "devices=2")
    assert same == folder_of("mode=ct", "seed=0,1", "fail_fast=true", "tracking=none", "tracking.tags=[a]")
    assert same != folder_of("seed=0,1,2", "mode=ct")
    assert same != folder_of("seed=0,1", "mode=ct", "steps=10"), "a search would compare what can't be compared"
    known = folder_of("ema.decay=choice(0.9,0.99)", "hydra/sweeper=optuna")
    assert known == folder_of("ema.decay=choice(0.9,0.99)", "hydra/sweeper=optuna", "++ema.half_life_images=null")
    assert same.name.startswith("seed-") and "=" not in str(same)
    assert folder_of("hydra.sweep.dir='a b'", "seed=0,1") == Path("a b")
    many = folder_of(*(f"objective.key_{i}=1,2" for i in range(40)))
    assert len(many.name) < 200
    with pytest.raises(InputError, match="plain path"):
        folder_of("hydra.sweep.dir='x/${now:%Y}'")


def test_grid_is_known_beforehand_only_where_it_is_one():
    def grid(*arguments):
        return sweeps.grid_of(OverridesParser.create().parse_overrides(list(arguments)))

    assert grid("seed=0,1", "mode=ct", "ema.decay=0.9") == ["seed=0", "seed=1"]
    assert grid("seed=range(0,2)", "mode=ct,cd")[1] == "seed=0 mode=cd"
    assert grid("seed=shuffle(range(0,2))") == []
    assert grid("hydra/sweeper=optuna", "seed=choice(0,1)") == []
    assert grid("mode=glob(e*)") == grid("seed=0,1", "batch_size=16,32", "batch_size=16") == []
    assert grid("seed=0,1", "steps=4", "steps=6") == ["seed=0", "seed=1"]


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi"])
def test_every_way_to_ask_for_a_multirun_is_seen(flag):
    assert sweeps.asked_for(tidy(["mode=ct", flag, "seed=0,1"], ["mode"]))
    assert not sweeps.asked_for(tidy(["mode=ct"], ["mode"]))


def test_foreign_folder_is_not_cleared(command, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "0.json").write_text("mine")
    done = command("train", "-m", "hydra.sweep.dir=.", "mode=edm", "seed=0,1", *SMALL)
    assert done.returncode == 2 and "is a folder of other things" in done.stderr
    assert (tmp_path / "jobs" / "0.json").read_text() == "mine"


def test_jobs_that_would_share_a_run_folder_are_refused_but_the_first(command, tmp_path):
    done = command("train", "-m", "mode=edm", "seed=0,1", "run_dir=runs/one", *SMALL)
    assert done.returncode == 2, done.stderr
    assert "job 0 of this sweep has the run folder runs/one too" in done.stderr
    first, second = jobs_of(tmp_path)
    assert (first["state"], second["state"], second["metric"]) == ("finished", "refused", None)


def sweep_of(*keys):
    return SweepRecord(["cm-train"], [*keys], 2, os.getpid(), 0.0, 0.0)


def test_name_that_was_set_is_told_apart_by_mode(composed, monkeypatch):
    def name_of(*overrides):
        cfg = composed(*overrides)
        hydra = OmegaConf.create(
            {"sweeper": {}, "overrides": {"task": list(overrides)}, "sweep": {"dir": "runs/sweeps/x"}}
        )
        monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
        naming.name_run(cfg, sweep_of("mode", "seed"))
        assert cfg.tracking.group == "x" and "seed=" in cfg.tracking.tags[-1]
        return cfg.name

    assert name_of("mode=ct", "seed=3") == "digits-ct-seed-3"
    assert name_of("mode=ct", "seed=3", "name=5") == "5-mode-ct-seed-3"
    long = name_of("mode=ct", f"name={'x' * 200}", "seed=1")
    assert len(long) == 120 and long != name_of("mode=ct", f"name={'x' * 200}", "seed=2")


def test_job_on_several_nodes_is_composed_again_as_it_was_settled(composed, monkeypatch):
    """Names and tags with all that Hydra's grammar minds."""
    task = ["mode=ct", "seed=3", "tracking.tags=[\"it's\",'a, b']", "noise.curriculum={s0: 2, s1: 9}"]
    cfg = composed(*task)
    runtime = {"config_sources": [{"provider": "command-line", "path": "my/conf"}, {"provider": "main", "path": "x"}]}
    overrides = {"task": task, "hydra": ["hydra.searchpath=[file://y]", "hydra.verbose=true"]}
    hydra = {"sweeper": {}, "overrides": overrides, "sweep": {"dir": "runs/sweeps/it's"}, "runtime": runtime}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra))
    naming.name_run(cfg, sweep_of("mode", "seed", "noise.curriculum"))
    folder, place, *arguments = sweep_job.as_arguments(cfg)
    assert (folder, place) == ("--config-dir=my/conf", "hydra.searchpath=[file://y]")
    again = composed(*arguments)
    assert again == cfg
    assert again.tracking.tags[:4] == ["it's", "a, b", "mode=ct", "seed=3"]


@pytest.mark.long
def test_signal_before_the_first_job_is_no_success(start_cold):
    process = start_cold("train", "-m", "mode=edm", "seed=0,1", *SMALL, "steps=100000")
    time.sleep(0.5)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode in (3, -signal.SIGTERM), told  # the second: before Python could hear of it


@pytest.mark.long
def test_search_lives_with_trials_that_fail(command, tmp_path):
    pytest.importorskip("optuna")
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "mode=edm", *SMALL, "objective_metric=loss"]
    done = command("train", *search, "hydra.sweeper.sampler.seed=1", "optimizer.lr=choice(-1,1e-3)")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2 and set(states(tmp_path)) == {"finished", "refused"}
    assert "best of" in done.stderr and "optimizer.lr=0.001" in done.stderr
    done = command("train", *search, "hydra.sweeper.n_trials=1", "optimizer.lr=choice(-1,-2)")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2 and "no trial has finished" in done.stderr
    done = command("train", *search[:-1], "seed=choice(0,1)")
    assert done.returncode == 2 and "set objective_metric=" in done.stderr
    done = command("train", *search, "optimizer.lr=choice(-1,-2)", "hydra.sweeper.direction=maximize")
    assert done.returncode == 2 and "is another" in done.stderr


@pytest.mark.long
def test_search_runs_equal_trials_once(command, tmp_path):
    pytest.importorskip("optuna")
    search = ["hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2"]
    done = command(
        "train",
        "-m",
        *search,
        "hydra.sweeper.n_trials=2",
        "mode=edm",
        "seed=choice(0)",
        *SMALL,
        "objective_metric=loss",
    )
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["finished"] and "best of 2 trials" in done.stderr


@pytest.mark.long
def test_killed_worker_of_joblib_leaves_a_table_and_nothing_behind(start, tmp_path):
    process = start(
        "train",
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "mode=edm",
        "seed=0,1,2",
        *TINY,
        "steps=100000",
    )
    for seed in (0, 1):  # both workers are at work, whichever was the first
        wait_for((tmp_path / "runs" / f"digits-edm-seed-{seed}" / "config.yaml").exists)
    workers = [pid for pid in children(process.pid) if "LokyProcess" in cmdline(pid)]
    os.kill(workers[0], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in told and "the sweep ended early: TerminatedWorkerError" in told
    assert "killed" in told and "1 not started" in told
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_table_reads_what_died_as_killed_and_fills_up_the_grid(tmp_path):
    (tmp_path / "jobs").mkdir()
    Job(1, "seed=1").write(tmp_path)
    Job(0, "seed=0", state="finished", step=4, metric=("loss", 0.5)).write(tmp_path)
    Job(3, "seed=3", sweep=5.0, state="finished").write(tmp_path)  # of another time
    found = read_jobs(tmp_path, 0.0, ["seed=0", "seed=1", "seed=2"])
    assert [(j.number, j.state) for j in found] == [(0, "finished"), (1, "killed"), (2, "not started")]
    (tmp_path / "jobs" / "torn.json").write_text("[")
    assert len(read_jobs(tmp_path, 0.0)) == 2
    assert [j.state for j in read_jobs(tmp_path, 7.0, ["seed=0"])] == ["not started"]


@pytest.mark.parametrize(
    ("found", "signalled", "code", "expected"),
    [
        (["finished", "finished"], False, 0, 0),
        (["finished"], True, 0, 0),  # in its last moment
        (["finished", "stopped", "not started"], True, 0, 3),
        (["refused", "stopped"], True, 0, 3),
        ([], True, 0, 3),
        (["finished", "stopped"], False, 3, 3),  # by max_hours
        (["finished", "killed"], False, 0, 1),
        (["failed", "refused"], False, 0, 1),
        (["finished", "refused"], False, 0, 2),
        ([], False, 2, 2),  # found out by Hydra
        (["stopped"], True, 1, 1),  # the launcher broke
    ],
)
def test_exit_code(found, signalled, code, expected):
    jobs = [Job(i, "", state=state) for i, state in enumerate(found)]
    assert sweeps.exit_code(jobs, signalled, code) == expected


def test_final_metric_prefers_agreement(tmp_path):
    lines = [{"step": 1, "loss": 0.5, "agreement_rms": 0.25}, {"step": 2, "loss": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 3, "lo')
    assert final_metric(tmp_path) == ("agreement_rms", 2, 0.25)
    assert final_metric(tmp_path, "agreement") == ("agreement_rms", 2, 0.25)
    assert final_metric(tmp_path, "loss") == ("loss", 2, 0.4)
    assert final_metric(tmp_path, "fid") == ("fid", 2, None)


def hold(num, log, seconds):
    gpus.torch.cuda.is_available = lambda: True
    with gpus.reserved(num, lambda: False) as free:
        assert free
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        log.put(("take", os.getpid(), names))
        time.sleep(seconds)
        log.put(("give", os.getpid(), names))


@pytest.mark.long
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


def test_machine_without_a_usable_gpu_has_none_to_wait_for(monkeypatch):
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with gpus.reserved(2, lambda: True) as free:
        assert free


def test_waiting_for_a_gpu_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "locks_folder", lambda: tmp_path)
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
    text = (Path(configs.conf_dir()).parent / "docs" / "sweeps.md").read_text()
    sweep = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    values = {"args": {"optimizer.lr": {"value": 3e-4}, "ema.decay": {"value": 0.99}}}
    macros = utils.create_sweep_command_args(values) | {"program": [sweep["program"]]}
    words = [w for c in utils.create_sweep_command(sweep["command"]) for w in macros.get(c[2:-1], [c])]
    assert words[0] == "cm-train"
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config = parse(composed(*words[1:]))
    assert config.folder.name == "digits-cd-abc123"
    assert (config.optimizer.lr, config.ema.decay) == (3e-4, 0.99)
