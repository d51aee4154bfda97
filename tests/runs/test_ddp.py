"""Several processes are one: the same losses and weights, one folder, one log, no process left behind."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from cm_train.core.errors import InputError
from cm_train.core.signals import StopFlag
from cm_train.core.world import World
from cm_train.models.checkpoints.load import load_denoiser
from cm_train.models.checkpoints.read import latest, read_state
from cm_train.runs import launch as launching
from conftest import ENVIRONMENT, TINY, children, timeless, wait_for

# A batch that 1, 2 and 4 ranks can share, every average, a target, dropout and flips.
EVERYTHING = [*TINY, "ema.extra=[0.5]", "backbone.dropout=0.2", "dataset.hflip=true"]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    """Equal up to the order of summation: float32 sums of a few hundred terms, over six steps."""
    for weights in ("raw", "ema", "ema_0.5"):
        a, b = (dict(load_denoiser(run, weights).named_parameters()) for run in (one, other))
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-6, msg=f"{weights} {name}")
    assert [r["step"] for r in rows(one)] == [r["step"] for r in rows(other)]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


WITH_TEACHER = ("cd", "ect", "sct", "scd")
TARGET = {"cd": ["objective.target_decay=0.9"], "ct": ["objective.target_decay=0.9"]}
QUICK = [("ict", 2)]
ALL = [(mode, ranks) for mode in ("edm", "cd", "ct", "ict", "ect", "sct", "scd") for ranks in (2, 4)]


@pytest.mark.parametrize(
    ("mode", "ranks"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in QUICK)]
)
def test_ranks_equal_one_process(mode, ranks, command, tmp_path):
    """Every objective on 2 and 4 ranks, with micro-batches, a target, dropout, flips and two averages."""
    options = [f"mode={mode}", *EVERYTHING, *TARGET.get(mode, [])]
    if mode in WITH_TEACHER:
        assert command("train", "mode=edm", *TINY, "name=teacher").returncode == 0
        options.append("teacher=runs/teacher")
    for name, more in (("one", []), ("many", [f"devices={ranks}", "micro_batch=2"])):
        done = command("train", *options, f"name={name}", *more)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "runs" / "one", tmp_path / "runs" / "many")


def test_ranks_equal_one_process_where_weights_are_normalised_and_losses_weighted(command, tmp_path):
    """EDM2: after each step every rank gives its weights their length again, with nothing sent."""
    options = [*EVERYTHING, "backbone=edm2_xs", "backbone.channels=8", "backbone.channel_mult=[1,2]"]
    options += ["backbone.num_blocks=1", "backbone.attention_resolutions=[4]", "backbone.head_channels=8"]
    for name, more in (("one", []), ("many", ["devices=2", "micro_batch=2"])):
        done = command("train", "mode=edm", "objective.weighting=learned", *options, f"name={name}", *more)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "runs" / "one", tmp_path / "runs" / "many")


def test_stopped_on_two_ranks_and_resumed_on_one_equals_one_process(command, start, tmp_path):
    """Stopped in the middle of a log window too: its sums are those of all ranks."""
    options = ["mode=ict", *EVERYTHING, "steps=40", "save_every=1000", "log_every=7"]
    assert command("train", *options, "name=one").returncode == 0
    process = start("train", *options, "name=parts", "devices=2")
    metrics = tmp_path / "runs" / "parts" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert err.count("stopping as soon as everything is saved") == 1, "the command says it, not its ranks"
    done = command("train", *options, "name=parts")
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    for a, b in zip(rows(tmp_path / "runs" / "one"), rows(tmp_path / "runs" / "parts"), strict=True):
        assert a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


@pytest.mark.long
def test_any_number_of_ranks_and_micro_batch_goes_on_with_the_same_run(command, tmp_path):
    """4, then 2 with micro-batches, then 8, then 1: one loss curve, to the order of summation."""
    options = ["mode=ict", *EVERYTHING, "schedule_steps=24"]
    assert command("train", *options, "steps=24", "name=one").returncode == 0
    for ranks, steps, micro in ((4, 6, "null"), (2, 12, "2"), (8, 18, "null"), (1, 24, "4")):
        done = command("train", *options, f"steps={steps}", f"devices={ranks}", f"micro_batch={micro}", "name=parts")
        assert done.returncode == 0, done.stderr
    one, parts = (rows(tmp_path / "runs" / name) for name in ("one", "parts"))
    assert [row["step"] for row in one] == [row["step"] for row in parts] == list(range(2, 25, 2))
    for a, b in zip(one, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("victim", ["rank", "parent"])
def test_a_killed_rank_or_parent_ends_the_job_without_orphans(victim, start, tmp_path):
    process = start("train", "mode=ict", *TINY, "steps=100000", "devices=2", "log_every=1")
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1] if victim == "rank" else process.pid, signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode not in (0, 2, 3)
    wait_for(lambda: not any(alive(pid) for pid in ranks), patience_s=60)
    assert time.monotonic() - started < 45


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ranks_whose_parent_dies_while_they_start_end_too(start_cold):
    """They import for seconds before they can ask the kernel to be ended with their parent."""
    process = start_cold("train", "mode=ict", *TINY, "steps=100000", "devices=2")
    wait_for(lambda: len(children(process.pid)) == 2)
    ranks = children(process.pid)
    process.kill()
    wait_for(lambda: not any(alive(pid) for pid in ranks), patience_s=60)


def broken_photos(folder, count, broken):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i:03d}.png")
    for i in broken:
        (folder / f"{i:03d}.png").write_bytes(b"not an image")


def test_an_image_that_one_rank_cannot_read_ends_all_with_everything_saved(command, tmp_path):
    """Decoded on the fly; whichever rank meets it, the file is named once, and the run can go on past it."""
    broken_photos(tmp_path / "photos", 200, broken=[77])
    options = ["mode=ict", "dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "backbone=unet_xs"]
    options += [*TINY, "dataset.memory_gb=0", "noise.sigma_data=0.5", "devices=2", "steps=26", "save_every=1000"]
    done = command("train", *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("077.png") == 1
    assert "Traceback" not in done.stderr
    (saved,) = (tmp_path / "runs" / "photos-ict" / "checkpoints").iterdir()
    done = command("train", *options, "dataset.skip_broken=true")
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {int(saved.name.removeprefix('step_'))}" in done.stderr


COUNTING = """
import os
from cm_train.runs import worker
from cm_train.data import decoder
decode, count = decoder.decode, []
def counted(*args):
    count.append(1)
    return decode(*args)
decoder.decode = counted
build = worker.build_trainer
def built(*args):
    trainer = build(*args)
    open(f"decoded-{os.environ['RANK']}", "w").write(str(len(count)))
    return trainer
worker.build_trainer = built
worker.main()
"""


def test_ranks_share_the_decoding_of_a_set_that_memory_holds(warm, command, tmp_path):
    broken_photos(tmp_path / "photos", 201, broken=[77, 200])
    options = ["mode=ict", "dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "backbone=unet_xs"]
    options += [*TINY, "dataset.skip_broken=true", "schedule_steps=6", "micro_batch=8"]
    for name, steps in (("one", 6), ("two", 1)):
        assert command("train", *options, f"steps={steps}", f"name={name}").returncode == 0
    stored = tmp_path / "runs" / "two" / "config.yaml"
    stored.write_text(stored.read_text().replace("steps: 1\n", "steps: 6\n", 1))
    (tmp_path / "counting.py").write_text(COUNTING)
    code = "from cm_train.runs import launch as launching; from cm_train.core import signals; import sys; "
    code += "sys.exit(launching.launch(2, 'counting', 'runs/two', signals.StopFlag()).code)"
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = warm.run(["-c", code], cwd=tmp_path, env=env, children=2)
    assert done.returncode == 0, done.stderr  # a resume: it is the same data set as one process has decoded
    assert [int((tmp_path / f"decoded-{rank}").read_text()) for rank in (0, 1)] == [101, 100]
    assert done.stderr.count("left out 2 of 201 images that can't be decoded, as '077.png'") == 1, done.stderr
    one, two = (rows(tmp_path / "runs" / name)[-1]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_all_checkpoints_damaged_is_one_line_on_ranks_too(command, tmp_path):
    assert command("train", "mode=ict", *TINY).returncode == 0
    for state in (tmp_path / "runs" / "digits-ict" / "checkpoints").glob("*/state.pt"):
        state.write_bytes(b"")
    done = command("train", "mode=ict", *TINY, "steps=8", "devices=2")
    assert done.returncode == 2, done.stderr
    assert "is damaged" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_signal_before_the_ranks_are_up_does_not_claim_to_have_saved(start_cold, tmp_path):
    process = start_cold("train", "mode=ict", *TINY, "steps=100000", "devices=2")
    wait_for(lambda: bool(children(process.pid)))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("everything saved" in err) == (tmp_path / "runs" / "digits-ict" / "checkpoints").exists()


def test_wrong_input_with_ranks_is_one_line_and_exit_code_2(command):
    for options, message in (
        (["devices=3"], "batch_size must divide by processes times micro_batch; got '16 for 3 x 1'"),
        (["devices=2", "dataset=mnist", "dataset.download=false"], "MNIST is not in data/MNIST/raw"),
        (["devices=1000"], "devices must be auto or a number of processes"),
    ):
        done = command("train", "mode=ict", *TINY, *options)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if message in line]) == 1


@pytest.mark.long
def test_torchrun_on_two_nodes_equals_one_process(command, tmp_path):
    """Two agents on loopback, one rank each."""
    options = ["mode=ct", "objective.target_decay=0.9", *EVERYTHING]
    assert command("train", *options, "name=one").returncode == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=localhost", f"--master-port={port}"]
    agents = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={node}", "-m", "cm_train.commands.train", *options, "name=nodes"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    errors = [agent.communicate(timeout=180)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert_same_run(tmp_path / "runs" / "one", tmp_path / "runs" / "nodes")


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_torchrun_starts_ranks_again_after_one_was_killed(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    argv = [*torchrun, "-m", "cm_train.commands.train", "mode=ict", *TINY, "steps=400", "save_every=50", "log_every=1"]
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    with subprocess.Popen(argv, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as agent:
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        os.kill(children(agent.pid)[-1], signal.SIGKILL)
        _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err
    assert [r["step"] for r in rows(metrics.parent)] == list(range(1, 401))


def files_of(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


@pytest.mark.long
def test_three_ranks_stopped_and_resumed_equal_three_uninterrupted_to_the_bit(command, start, tmp_path):
    """With three the order of summation shows: DDP's layout of its buckets must be the same after a resume."""
    options = ["mode=ict", *EVERYTHING, "batch_size=12", "steps=60", "save_every=1000", "log_every=5", "devices=3"]
    assert command("train", *options, "name=whole").returncode == 0
    process = start("train", *options, "name=parts")
    metrics = tmp_path / "runs" / "parts" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    done = command("train", *options, "name=parts")
    assert done.returncode == 0, done.stderr
    whole, parts = (files_of(tmp_path / "runs" / name / "checkpoints" / "step_00000060") for name in ("whole", "parts"))
    assert whole == parts
    whole, parts = (timeless(rows(tmp_path / "runs" / name)) for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_that_hangs_ends_the_job_and_is_named(start_cold, tmp_path):
    process = start_cold(
        "train", "mode=ict", *TINY, "steps=100000", "devices=2", "log_every=1", CM_TRAIN_PATIENCE_S="5"
    )
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    ranks = children(process.pid)
    hung = next(p for p in ranks if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{p}/environ").read_bytes())
    os.kill(hung, signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("rank 1 of 2 died or hangs, so the job ends") == 1, err
    assert "Traceback" not in err
    wait_for(lambda: not any(alive(pid) for pid in ranks))


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_job_that_is_suspended_for_longer_than_the_patience_goes_on(start, tmp_path):
    """As a laptop's lid, a debugger or a scheduler suspends it: every process of it at about the same time."""
    place = tmp_path / "temporary"
    place.mkdir()
    settings = {"CM_TRAIN_PATIENCE_S": "5", "TMPDIR": str(place)}
    process = start("train", "mode=ict", *TINY, "steps=100000", "devices=2", "log_every=1", **settings)
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    everyone = [process.pid, *children(process.pid)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(12)
    length = metrics.stat().st_size
    for pid in reversed(everyone):
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: metrics.stat().st_size > length)
    shutil.rmtree(place)  # nor does stopping need any room there
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err


@pytest.mark.long
@pytest.mark.skipif(shutil.which("ss") is None, reason="asks ss, which Linux has")
def test_ranks_of_one_machine_listen_to_it_alone_and_leave_nothing_behind(start_cold, tmp_path):
    place = tmp_path / "temporary"
    place.mkdir()
    process = start_cold("train", "mode=ict", *TINY, "steps=100000", "devices=2", "log_every=1", TMPDIR=str(place))
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    pids = [process.pid, *children(process.pid)]
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    own = [line.split()[3] for line in listening if any(f"pid={pid}," in line for pid in pids)]
    assert own
    for pid in pids[1:]:  # a machine may know itself by its loopback address alone, and listen there unasked
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {b"GLOO_SOCKET_IFNAME=lo", b"NCCL_SOCKET_IFNAME=lo"} <= set(environment)
    assert all(address.startswith(("127.0.0.1:", "[::1]:")) for address in own), own
    (meeting,) = place.glob("cm-train-ranks-*")
    assert meeting.stat().st_mode & 0o077 == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids[1:]))
    os.utime(meeting, (0, 0))  # what is younger than a minute may be about to be used
    done = start_cold("train", "mode=ict", *TINY, "devices=2", "name=next", TMPDIR=str(place))
    assert done.wait(timeout=60) == 0
    assert not list(place.glob("cm-train*")) and not list(place.glob("torchelastic*"))


@pytest.mark.long
def test_max_hours_saves_on_all_ranks_and_exits_3(command, tmp_path):
    done = command("train", "mode=ict", *TINY, "steps=100000", "save_every=100000", "devices=2", "max_hours=0.005")
    assert done.returncode == 3, done.stderr
    assert "everything saved" in done.stderr
    assert any((tmp_path / "runs" / "digits-ict" / "checkpoints").iterdir())


@pytest.mark.long
def test_two_jobs_at_once_do_not_meet(start):
    jobs = [start("train", "mode=ict", *TINY, "devices=2", f"name={name}") for name in ("a", "b")]
    assert [job.communicate(timeout=120) and job.returncode for job in jobs] == [0, 0]


@pytest.mark.long
def test_a_second_interrupt_quits_at_once_with_every_rank(start, tmp_path):
    process = start("train", "mode=ict", *TINY, "steps=100000", "devices=2", "log_every=1")
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    ranks = children(process.pid)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # a save that does not end
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)  # sooner it would be the same interrupt
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 1
    wait_for(lambda: not any(alive(pid) for pid in ranks), patience_s=20)


FAILING = """
import sys
from cm_train.training import trainer
from cm_train.runs import worker
step = trainer.Trainer.train_step
def failing(self, data):
    if self.world.rank == 1 and self.step == 3:
        raise RuntimeError("a bug in one rank")
    step(self, data)
trainer.Trainer.train_step = failing
worker.main()
"""


@pytest.mark.long
def test_a_rank_that_fails_shows_its_traceback_once(warm, tmp_path, command):
    """Launched as the command launches, with a bug planted in rank 1."""
    assert command("train", "mode=ict", *TINY, "steps=1", "schedule_steps=6", "micro_batch=8").returncode == 0
    (tmp_path / "failing.py").write_text(FAILING)
    stored = tmp_path / "runs" / "digits-ict" / "config.yaml"
    stored.write_text(stored.read_text().replace("steps: 1\n", "steps: 6\n", 1))
    code = "from cm_train.runs import launch as launching; from cm_train.core import signals; import sys; "
    code += "sys.exit(launching.launch(2, 'failing', 'runs/digits-ict', signals.StopFlag()).code)"
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = warm.run(["-c", code], cwd=tmp_path, env=env, children=2)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.count("RuntimeError: a bug in one rank") == 1


LEARNED = """
import torch
from cm_train.core import registry
from cm_train.runs import worker
from cm_train.objectives.edm import EDM

class Learned(EDM):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_weight = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("shift", torch.full((1,), 0.5))

    def forward(self, batch):
        loss, metrics = super().forward(batch)
        total = self.log_weight.sum()
        return loss * total.exp() - total * self.shift, metrics

    def extra_state(self):
        return {"log_weight": self.log_weight.data}

registry.find("objective", "edm")
registry._classes["objective", "edm"] = Learned
worker.main()
"""


@pytest.mark.long
def test_learned_weights_and_buffers_of_an_objective_train_and_resume_on_ranks(warm, tmp_path, command):
    """An objective with a parameter and a buffer of its own, planted into the ranks that the launcher starts."""
    (tmp_path / "learned.py").write_text(LEARNED)

    def train(name, ranks, steps):
        folder = tmp_path / "runs" / name
        if not folder.exists():
            done = command(
                "train", "mode=edm", *EVERYTHING, "steps=1", "schedule_steps=6", "micro_batch=4", f"name={name}"
            )
            assert done.returncode == 0, done.stderr
            shutil.rmtree(folder / "checkpoints")
            (folder / ".saved.json").unlink()  # or it would look like a run whose checkpoints are lost
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"steps": steps}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        code = "from cm_train.runs import launch as launching; from cm_train.core import signals; import sys; "
        code += f"sys.exit(launching.launch({ranks}, 'learned', 'runs/{name}', signals.StopFlag()).code)"
        env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
        done = warm.run(["-c", code], cwd=tmp_path, env=env, children=2)
        assert done.returncode == 0, done.stderr
        folder, manifest = latest(folder)
        assert manifest.step == steps
        return read_state(folder)["objective"]["log_weight"]

    one, two = train("one", 1, 6), train("two", 2, 6)
    assert one.abs().min() > 0
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7)
    assert_same_run(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    train("parts", 2, 3)
    assert torch.equal(train("parts", 2, 6), two)


@pytest.mark.long
def test_ranks_import_nothing_from_the_current_folder(tmp_path):
    """Which may be a stranger's: the command itself, started by its name, does not look there either."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger was here')")
    argv = [sys.executable, "-P", "-m", "cm_train.commands.train", "mode=ict", *TINY, "devices=2"]
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stranger" not in done.stderr


def test_share_divides_the_batch_in_order():
    shares = [World(rank=r, size=4).share(32) for r in range(4)]
    assert [row for share in shares for row in share] == list(range(32))
    assert World().share(7) == range(7)


def test_without_room_to_meet_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(launching.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(launching.tempfile, "mkdtemp", full)
    with pytest.raises(InputError, match="no room in the temporary folder .*No space left.*; fix: .* TMPDIR="):
        launching.launch(2, "cm_train.runs.worker", "runs/x", StopFlag())


def full(**_):
    raise OSError(errno.ENOSPC, "No space left on device")
