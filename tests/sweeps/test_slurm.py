"""Sweeps on Slurm: presets, the script, the wait for jobs, requeueing, several nodes. Slurm itself is a fake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
from hydra.core.config_store import ConfigStore
from test_ddp import assert_same_run, files_of

from cm_train.core import configs
from cm_train.sweeps.launchers import register as plugins
from conftest import ENVIRONMENT, TINY, timeless, wait_for

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

# Stands for the job function of sweeps: does what `name` says.
SWEEP = """
import os, sys, time
import hydra
from cm_train.core import configs
from cm_train.sweeps.launchers import register as plugins, slurm as slurm_launcher

plugins.register()
slurm_launcher._RESULT_PATIENCE_S = 2.0

@hydra.main(version_base=None, config_path=str(configs.conf_dir()), config_name="train")
def job(cfg):
    if cfg.name == "raise":
        raise RuntimeError("a bug")
    if cfg.name == "die":
        os._exit(7)
    if cfg.name == "wait":
        while not os.path.exists("sweep/stop"):
            time.sleep(0.05)
        time.sleep(3)  # as a save takes
    if cfg.name in ("quick", "wait"):
        return float(cfg.seed)
    raise AssertionError(cfg.name)

def show(sweep):
    def launch(self, *args, **kwargs):
        results = sweep(self, *args, **kwargs)
        print("RESULTS", [r.return_value for r in results])
        return results
    return launch

for launcher in (slurm_launcher.SlurmLauncher, slurm_launcher.LocalLauncher):
    launcher.launch = show(launcher.launch)
job()
"""


COMMAND, STAND_IN = ("-m", "cm_train.commands.train"), ("sweep.py",)


@pytest.fixture
def sweep(warm, tmp_path):
    """sweep(launcher, *overrides) -> the running process of a sweep in an empty folder, on a fake Slurm."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    (tmp_path / "slurm").mkdir()
    fake_slurm.install(tmp_path / "bin")
    environment = {
        **{k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM_", "SUBMITIT_"))},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "FAKE_SLURM": str(tmp_path / "slurm"),
    }
    started = []

    def run(launcher, *overrides, program=COMMAND):
        argv = [*program, "-m", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep", *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(warm.popen(argv, cwd=tmp_path, env=environment, start_new_session=True, **pipes))
        return started[-1]

    run.environment = environment
    yield run
    (tmp_path / "sweep").mkdir(exist_ok=True)
    (tmp_path / "sweep" / "stop").touch()
    for process in started:
        process.kill()
        process.wait()
    for state in (tmp_path / "slurm").glob("*.state"):
        if state.read_text() == "RUNNING":  # of a test that failed
            for pid in state.with_suffix(".pids").read_text().split():
                os.kill(int(pid), signal.SIGKILL)


def end_of(process, code=0, patience_s=120):
    out, err = process.communicate(timeout=patience_s)
    assert process.returncode == code, out + err
    return out, err


def states(folder):
    """What became of each job of a sweep by the command itself."""
    return [json.loads(path.read_text())["state"] for path in sorted((folder / "sweep" / "jobs").iterdir())]


def results(out):
    return out[out.index("RESULTS") :].strip().removeprefix("RESULTS ")


@pytest.mark.parametrize("preset", ["submitit_slurm", "submitit_slurm_node", "submitit_slurm_nodes", "submitit_local"])
def test_presets_compose_and_say_how_to_use_them(preset, composed):
    plugins.register()
    cfg = composed(f"hydra/launcher={preset}", "+hydra.launcher.wckey=x")  # composes with what submitit knows besides
    assert "hydra" not in cfg
    text = (configs.conf_dir() / "hydra" / "launcher" / f"{preset}.yaml").read_text()
    assert text.startswith("# A sweep") and f"hydra/launcher={preset}" in text
    assert "submitit_slurm.yaml" not in ConfigStore.instance().repo["hydra"]["launcher"]


def dry(command, *arguments):
    done = command("train", "-m", "hydra.launcher.dry=true", "mode=ct", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_dry_mode_prints_the_script_and_the_jobs_and_submits_nothing(command, tmp_path):
    lines = dry(
        command,
        "hydra/launcher=submitit_slurm",
        "hydra.sweep.dir=sweep",
        *("hydra.launcher.partition=gpu", "hydra.launcher.account=lab", "hydra.launcher.timeout_min=90"),
        *(
            "hydra.launcher.array_parallelism=2",
            "hydra.launcher.cpus_per_task=4",
            "hydra.launcher.setup=[module load x]",
        ),
        "seed=0,1,2",
    )
    assert lines[0] == "#!/bin/bash"
    wanted = {"account=lab", "array=0-2%2", "cpus-per-task=4", "gpus-per-node=1", "nodes=1", "ntasks-per-node=1"}
    wanted |= {"open-mode=append", "partition=gpu", "requeue", "signal=USR2@120", "time=90", "job-name=cm-train"}
    wanted |= {f"output={tmp_path}/sweep/.submitit/%A_%a_0_log.out"}
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} == wanted
    assert "module load x" in lines
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=4" in srun and "submitit.core._submit" in srun
    assert lines[-3:] == [f"# job {i} (mode=ct seed={i})" for i in range(3)]
    assert not (tmp_path / "sweep" / ".submitit").exists()


def test_dry_mode_of_other_presets(command):
    lines = dry(command, "hydra/launcher=submitit_slurm_nodes", "hydra.launcher.nodes=4", "seed=0")
    for wanted in ("nodes=4", "gpus-per-node=8", "ntasks-per-node=1", "exclusive", "requeue"):
        assert f"#SBATCH --{wanted}" in lines
    assert not any("--array" in line for line in lines)
    lines = dry(command, "hydra/launcher=submitit_slurm_node", "seed=0")
    assert "#SBATCH --nodes=1" in lines and "#SBATCH --gpus-per-node=8" in lines
    assert dry(command, "hydra/launcher=submitit_local", "seed=0")[-1] == "# job 0 (mode=ct seed=0)"


@pytest.mark.long
def test_without_the_plugin_or_without_slurm_one_line_says_so(tmp_path):
    code = "import sys; sys.modules['hydra_plugins'] = None; from cm_train.commands import train; train.main()"
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "sbatch").exists())
    for start, message in (
        (["-c", code], "pip install 'cm-train[sweeps]'"),
        (["-m", "cm_train.commands.train"], "needs Slurm, and this machine has no sbatch"),
    ):
        argv = [sys.executable, *start, "-m", "hydra/launcher=submitit_slurm", "seed=0,1"]
        env = {**ENVIRONMENT, "PATH": path}
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_slurm_refuses_is_one_line(sweep):
    _, err = end_of(sweep("submitit_slurm", "hydra.launcher.partition=none", "seed=0,1"), code=2)
    assert "Slurm refused the jobs; got 'sbatch: error: invalid partition specified: none'" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("launcher", ["submitit_slurm", pytest.param("submitit_local", marks=pytest.mark.long)])
def test_jobs_that_fail_are_none_and_the_others_go_on(launcher, sweep, tmp_path):
    out, err = end_of(
        sweep(launcher, "hydra.launcher.array_parallelism=2", "name=quick,raise,die", "seed=5", program=STAND_IN)
    )
    assert results(out) == "[5.0, None, None]"
    assert "job 0 (name=quick seed=5) runs as" in err and "job 0 (name=quick seed=5) ended" in err
    assert "job 1 (name=raise seed=5) failed: RuntimeError('a bug'), log" in err
    assert "job 2 (name=die seed=5) failed without a result (F" in err  # FAILED there, FINISHED here
    assert "Traceback" not in err
    logs = [Path(line.split(" log ")[1]) for line in err.splitlines() if " log " in line]
    assert all(log.is_file() for log in logs)


def test_stop_file_takes_back_what_waits_and_lets_the_rest_end(sweep, tmp_path):
    process = sweep("submitit_slurm", "hydra.launcher.array_parallelism=1", "name=wait", "seed=5,6,7", program=STAND_IN)
    state = tmp_path / "slurm" / "100_0.pids"
    wait_for(state.exists)
    (tmp_path / "sweep" / "stop").touch()
    out, err = end_of(process)
    assert results(out) == "[5.0, None, None]"
    assert err.count("did not start") == 2
    states = [(tmp_path / "slurm" / f"100_{i}.state").read_text() for i in (1, 2)]
    assert states == ["CANCELLED by 0"] * 2


@pytest.mark.long
def test_a_second_interrupt_leaves_a_cluster_whose_jobs_save_and_end(sweep, tmp_path):
    process = sweep("submitit_slurm", "mode=ict", *TINY, "steps=100000", "save_every=100000", "seed=0,1")
    metrics = [tmp_path / "runs" / f"digits-ict-seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    wait_for(lambda: all(path.exists() and path.stat().st_size > 0 for path in metrics))
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "sweep" / "stop").exists)
    time.sleep(1.2)  # sooner it would be the same interrupt
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (1, 3)
    ended = lambda: {p.read_text() for p in (tmp_path / "slurm").glob("*.state")} <= {"COMPLETED", "FAILED"}  # noqa: E731
    wait_for(ended)
    assert all(list((path.parent / "checkpoints").iterdir()) for path in metrics)


@pytest.mark.long
def test_stop_file_keeps_local_jobs_from_starting(sweep, tmp_path):
    process = sweep("submitit_local", "name=wait", "seed=5,6", program=STAND_IN)
    wait_for(lambda: any((tmp_path / "sweep" / ".submitit").glob("*.out")))
    (tmp_path / "sweep" / "stop").touch()
    assert results(end_of(process)[0]) == "[5.0, None]"


@pytest.mark.long
def test_an_interrupt_of_the_whole_terminal_lets_local_jobs_save(sweep, tmp_path):
    """By itself submitit's controller would end its job a second after Ctrl-C."""
    process = sweep("submitit_local", "mode=ict", *TINY, "steps=100000", "save_every=100000", "name=run")
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    os.killpg(process.pid, signal.SIGINT)
    end_of(process, code=3)
    assert states(tmp_path) == ["stopped"]
    (log,) = (tmp_path / "sweep" / ".submitit").glob("*.out")
    assert "everything saved" in log.read_text()


def logged(run):
    return timeless([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


def assert_same_bits(one, other):
    last = max(p.name for p in (one / "checkpoints").iterdir())
    assert files_of(one / "checkpoints" / last) == files_of(other / "checkpoints" / last)
    assert logged(one) == logged(other)


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_job_out_of_time_is_requeued_and_ends_as_if_nothing_had_happened(nodes, sweep, command, tmp_path):
    """Each node's process gets the signal that Slurm sends before the limit."""
    options = ["mode=ict", *TINY, "steps=60", "save_every=1000", "log_every=5"]
    process = sweep(
        "submitit_slurm", f"hydra.launcher.nodes={nodes}", "hydra.launcher.timeout_min=5", *options, "name=parts"
    )
    metrics = tmp_path / "runs" / "parts" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    for pid in (tmp_path / "slurm" / "100.pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR2)
    end_of(process)
    assert states(tmp_path) == ["finished"]
    log = (tmp_path / "sweep" / ".submitit" / "100_0_log.out").read_text()
    assert "Requeued job 100 (19 remaining timeouts)" in log
    assert "resuming at step" in log
    assert "stopped at step" in log
    assert (tmp_path / "slurm" / "calls").read_text().count("scontrol requeue 100") == 1
    assert command("train", *options, "name=whole").returncode == 0
    if nodes == 1:
        assert_same_bits(tmp_path / "runs" / "parts", tmp_path / "runs" / "whole")


@pytest.mark.long
def test_a_job_out_of_requeues_or_stopped_by_another_signal_is_not_requeued(sweep, tmp_path):
    for number, signals in ((100, [signal.SIGUSR2]), (101, [signal.SIGUSR1])):
        name = f"run{number}"
        options = ["mode=ict", *TINY, "steps=100000", "save_every=100000", f"name={name}"]
        process = sweep("submitit_slurm", "hydra.launcher.max_num_timeout=0", "hydra.launcher.timeout_min=5", *options)
        metrics = tmp_path / "runs" / name / "metrics.jsonl"
        wait_for(lambda metrics=metrics: metrics.exists() and metrics.stat().st_size > 0)
        for one in signals:
            os.kill(int((tmp_path / "slurm" / f"{number}.pids").read_text()), one)
        end_of(process, code=3)
        assert states(tmp_path) == ["stopped"]
        log = (tmp_path / "sweep" / ".submitit" / f"{number}_0_log.out").read_text()
        assert ("out of time" in log) == (number == 100)
    assert "scontrol" not in (tmp_path / "slurm" / "calls").read_text()


@pytest.mark.long
def test_the_script_in_the_docs_goes_on_after_its_time_limit(sweep, command, tmp_path):
    """The one for a single node, with a small run in its place; its shell is signalled as it asks Slurm to."""
    options = ["mode=ict", *TINY, "steps=60", "save_every=1000", "log_every=5"]
    docs = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    script = docs.split("```bash\n")[1].split("```")[0]
    small = " ".join([sys.executable, "-m", "cm_train.commands.train", *options, "name=parts"])
    assert "--signal=B:USR1" in script and "cm-train experiment=imagenet64-ct dataset.root=imagenet/train" in script
    (tmp_path / "job.sh").write_text(
        script.replace("cm-train experiment=imagenet64-ct dataset.root=imagenet/train", small)
    )
    assert subprocess.run(["sbatch", "job.sh"], cwd=tmp_path, env=sweep.environment).returncode == 0
    metrics = tmp_path / "runs" / "parts" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    os.kill(int((tmp_path / "slurm" / "100.shell").read_text()), signal.SIGUSR1)
    wait_for(lambda: (tmp_path / "slurm" / "100.state").read_text() in ("COMPLETED", "FAILED"))
    assert (tmp_path / "slurm" / "100.state").read_text() == "COMPLETED"
    assert "scontrol requeue 100" in (tmp_path / "slurm" / "calls").read_text()
    assert command("train", *options, "name=whole").returncode == 0
    assert_same_bits(tmp_path / "runs" / "parts", tmp_path / "runs" / "whole")


@pytest.mark.long
def test_submitit_itself_signals_and_starts_again_a_local_job_out_of_time(sweep, command, tmp_path):
    """Signalled 30 s after each start; six starts are allowed."""
    options = ["mode=ict", *TINY, "batch_size=128", "backbone=unet_s", "save_every=1000", "log_every=10"]
    assert command("train", *options, "steps=30", "name=speed").returncode == 0
    last = (tmp_path / "runs" / "speed" / "metrics.jsonl").read_text().splitlines()[-1]
    rate = json.loads(last)["steps_per_s"]
    options += [f"steps={round(60 * rate)}"]  # a minute of training: three starts or four
    limits = ["hydra.launcher.timeout_min=1.5", "hydra.launcher.signal_delay_s=60"]
    end_of(sweep("submitit_local", *limits, *options, "name=slow"), patience_s=400)
    assert states(tmp_path) == ["finished"]
    (log,) = (tmp_path / "sweep" / ".submitit").glob("*.out")
    assert "Requeued job" in log.read_text() and "resuming at step" in log.read_text()
    assert command("train", *options, "name=whole").returncode == 0
    assert_same_bits(tmp_path / "runs" / "slow", tmp_path / "runs" / "whole")


@pytest.mark.long
def test_two_nodes_train_the_run_of_one_process(sweep, command, tmp_path):
    options = ["mode=ct", "objective.target_decay=0.9", *TINY, "ema.extra=[0.5]", "backbone.dropout=0.2"]
    end_of(sweep("submitit_slurm", "hydra.launcher.nodes=2", *options, "name=nodes"))
    assert states(tmp_path) == ["finished"]
    assert len((tmp_path / "slurm" / "100.pids").read_text().split()) == 2
    assert command("train", *options, "name=one").returncode == 0
    assert_same_run(tmp_path / "runs" / "one", tmp_path / "runs" / "nodes")
    first, second = ((tmp_path / "sweep" / ".submitit" / f"100_{i}_log.out").read_text() for i in (0, 1))
    assert "Next: cm-sample" in first
    assert "Next: cm-sample" not in second


@pytest.mark.long
def test_a_sweep_on_slurm_ends_with_the_table_of_its_jobs(sweep, tmp_path):
    _, err = end_of(sweep("submitit_slurm", "mode=edm", "seed=0,1", "optimizer.lr=1e-3,-1", *TINY), code=2)
    assert states(tmp_path) == ["finished", "refused"] * 2
    assert "2 finished, 2 refused" in err and "runs/digits-edm-optimizer.lr-0.001-seed-1" in err


@pytest.mark.long
def test_ranks_signalled_while_they_start_stop_in_good_order(start_cold, tmp_path):
    """As Slurm may signal every process of a job; without a handler the signal would end a rank."""
    process = start_cold("train", "mode=ict", *TINY, "steps=100000", "devices=2")
    ps = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    ranks = []

    def found():
        ranks[:] = [int(p) for p in subprocess.run(ps, capture_output=True, text=True).stdout.split()]
        return len(ranks) == 2

    wait_for(found)
    for pid in ranks:
        os.kill(pid, signal.SIGUSR2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "Traceback" not in err


def test_fake_slurm_has_every_command_that_submitit_calls(tmp_path):
    fake_slurm.install(tmp_path / "bin")
    assert all(shutil.which(name, path=str(tmp_path / "bin")) for name in ("sbatch", "srun", "sacct", "scancel"))
