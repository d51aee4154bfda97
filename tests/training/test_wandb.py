"""wandb keeps what it was given, and no state of the network or of its server holds up a run."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from cm_train import load_denoiser
from cm_train.models.checkpoints import read as checkpoint
from cm_train.training.tracking import TrackingConfig, base, wandb_run
from cm_train.training.tracking.names import shown
from cm_train.training.tracking.wandb_run import Wandb
from conftest import ENVIRONMENT, TINY, wait_for
from wandb_tools import FakeWandb, history, of_kind, run_config

RUN = ["mode=ict", *TINY[1:]]
IMPATIENT = (
    "import cm_train.training.tracking.base as b; b.Backend.patience_s = {}; "  # seconds
    "from cm_train.commands.train import main; main()"
)


@pytest.fixture
def environment(tmp_path):
    """Of a user who has no wandb login and no settings of it."""
    clean = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("WANDB")}
    return clean | {"HOME": str(tmp_path / "home"), "NETRC": os.devnull}


@pytest.fixture
def train(warm, tmp_path, environment):
    """train("mode=ict", ...) -> the finished process and how long it took."""

    def run(*arguments, patience_s=30, **more):
        (tmp_path / "home").mkdir(exist_ok=True)
        began = time.monotonic()
        argv = ["-c", IMPATIENT.format(patience_s), *RUN, *arguments]
        done = warm.run(argv, cwd=tmp_path, env=environment | more, timeout=200, stdin=subprocess.DEVNULL)
        return done, time.monotonic() - began

    return run


@pytest.fixture
def server():
    """server("fine") -> a FakeWandb; its login() is the environment of a user who has one there."""
    opened = []

    def start(mood):
        opened.append(FakeWandb(mood))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def login(server):
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}


def test_offline_run_keeps_everything_under_one_id_across_a_resume(train, tmp_path):
    """No login: no question asked, no network; the config, curves, previews, group and tags lie in the run folder."""
    options = ["preview_every=2", "tracking.group=sweep-7", "tracking.tags=[a,b]", "tracking.project=mine"]
    for steps in (4, 6):
        done, _ = train(*options, f"steps={steps}")
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits-ict"
    first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    written = {json.loads(line)["step"]: json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()}
    for file, steps in ((first, [2, 4]), (second, [6])):
        (begun,) = of_kind(file, "run")
        assert begun.run_id == (run / "wandb_id").read_text().strip()
        assert (begun.project, begun.display_name, begun.run_group) == ("mine", "digits-ict", "sweep-7")
        assert list(begun.tags) == ["a", "b"]
        assert begun.job_type == "ict"
        axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(file, "metric")}
        assert axes == {"images": "", "*": "images"}
        config = run_config(file)
        assert config["mode"] == "ict"
        assert config["backbone"]["name"] == "unet"
        rows = history(file)
        assert [row["_step"] for row in rows] == steps
        for row in rows:
            assert {k: row[shown(k)] for k in written[row["step"]]} == written[row["step"]], "the values of metrics"
            assert {"train/loss", "perf/images_per_s", "perf/memory_gib", "images", "epoch", "step"} < row.keys()
            picture = file.parent / "files" / row["preview/samples/path"]
            assert picture.read_bytes() == (run / "samples" / f"step_{row['step']:08d}.png").read_bytes()


def test_online_run_sends_curves_and_the_model_which_can_be_sampled(train, server, tmp_path):
    fine = server("fine")
    done, _ = train("tracking.artifact=true", "tracking.group=g", "name='a b'", "ema.decay=0.999", **login(fine))
    assert done.returncode == 0, done.stderr
    assert "uploading the model to wandb, for 10 minutes at most" in done.stderr
    assert [row["_step"] for row in fine.rows] == [2, 4, 6]
    asked = dict(fine.queries)
    assert "g" in [variables.get("groupName") for _, variables in fine.queries]
    artifact = asked["CreateArtifact"]["input"]
    assert (artifact["artifactTypeName"], artifact["artifactCollectionName"]) == ("model", "a-b")
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name in ("manifest.json", "ema_0.999.safetensors"):
        (downloaded / name).write_bytes(fine.uploads[name])
    assert checkpoint.verify(downloaded).step == 6
    again, kept = load_denoiser(downloaded), load_denoiser(tmp_path / "runs" / "a b")
    assert all(map(torch.equal, again.state_dict().values(), kept.state_dict().values()))


def test_own_pictures_are_not_uploaded_unasked(train, server, tmp_path):
    """There is a login, for whatever other work; `tracking=wandb` would be a choice."""
    (tmp_path / "photos").mkdir()
    for i in range(16):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    fine = server("fine")
    own = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "backbone=unet_xs", "name=own"]
    sent = {}
    for words in ((), ("tracking=wandb", "name=asked")):
        fine.uploads.clear()
        done, _ = train(*own, "preview_every=3", "steps=3", *words, **login(fine))
        assert done.returncode == 0, done.stderr
        sent[words] = [name for name in fine.uploads if name.endswith(".png")]
    assert [len(names) for names in sent.values()] == [0, 1]
    assert (tmp_path / "runs" / "own" / "samples" / "step_00000003.png").exists(), "here they are"
    assert "(online, with previews)" in done.stderr


def test_model_is_not_uploaded_unasked(train, server):
    fine = server("fine")
    done, _ = train(**login(fine))
    assert done.returncode == 0, done.stderr
    assert "CreateArtifact" not in dict(fine.queries)


def curves(run):
    (file,) = run.glob("wandb/*run-*/*.wandb")
    return [row["_step"] for row in history(file)]


@pytest.mark.long
@pytest.mark.parametrize("mood", ["hangs", "fails"])
def test_server_that_never_answers_leaves_an_offline_run(mood, train, server, tmp_path):
    """wandb itself takes 10 s to find out, while the run trains."""
    done, took = train(**login(server(mood)))
    assert done.returncode == 0, done.stderr
    assert took < 60
    assert "wandb is offline: " in done.stderr
    assert "Traceback" not in done.stderr
    assert curves(tmp_path / "runs" / "digits-ict") == [2, 4, 6]


def test_server_that_never_answers_is_not_waited_for(train, server):
    done, took = train(patience_s=1, **login(server("hangs")))
    assert done.returncode == 0, done.stderr
    assert took < 30
    assert "wandb was not finished within 1 s; metrics.jsonl has everything" in done.stderr
    assert "done" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_network_that_breaks_between_login_and_start_leaves_an_offline_run(train, server, tmp_path):
    fake = server("fine")
    fake.breaks_after = "Viewer"
    done, took = train(WANDB_INIT_TIMEOUT="3", **login(fake))
    assert done.returncode == 0, done.stderr
    assert took < 60
    assert "wandb is offline: " in done.stderr
    files = list((tmp_path / "runs" / "digits-ict").glob("wandb/offline-run-*/*.wandb"))
    assert [row["_step"] for file in files for row in history(file)] == [2, 4, 6]


def test_address_without_a_server_leaves_an_offline_run(train, server):
    gone = server("fine")
    gone.close()
    done, took = train(patience_s=1, **login(gone))
    assert done.returncode == 0, done.stderr
    assert took < 30


@pytest.mark.long
@pytest.mark.parametrize("trouble", ["hangs", "fails", "goes away"])
def test_network_that_breaks_during_a_run_costs_nothing_that_was_logged(trouble, server, environment, warm, tmp_path):
    """The run goes on to its end; what the server lacks lies in the run folder for `wandb sync`."""
    (tmp_path / "home").mkdir()
    fake = server("fine")
    process = warm.popen(
        ["-c", IMPATIENT.format(3), *RUN, "steps=120", "save_every=1000"],
        cwd=tmp_path,
        env=environment | login(fake),
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: fake.queries and fake.queries[-1][0] == "UpsertBucket")  # wandb is online
        if trouble == "goes away":
            fake.close()
        else:
            fake.mood = trouble
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, err
    identity = (tmp_path / "runs" / "digits-ict" / "wandb_id").read_text()
    assert f"wandb was not finished within 3 s; wandb sync runs/digits-ict/wandb/*run-*-{identity} sends" in err
    assert "Traceback" not in err
    assert curves(tmp_path / "runs" / "digits-ict") == list(range(2, 121, 2))


@pytest.mark.long
@pytest.mark.parametrize("mode", [{}, {"WANDB_MODE": "online"}], ids=["no_login", "online_without_a_login"])
def test_nothing_is_asked_on_a_terminal(mode, environment, tmp_path):
    """With a terminal to ask on, wandb's own start would offer three choices and wait."""
    (tmp_path / "home").mkdir()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cm_train.commands.train", *RUN],
        cwd=tmp_path,
        env=environment | mode | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 100
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the last one has closed the terminal
                    break
            elif process.poll() is not None:
                break
        assert process.wait(timeout=10) == 0, shown.decode()
    finally:
        process.kill()
        os.close(ours)
    text = shown.decode()
    assert "6/6" in text
    assert "Next: cm-sample" in text
    for word in ("choice", "API key", "wandb:"):
        assert word not in text
    assert len(list((tmp_path / "runs" / "digits-ict" / "wandb").glob("offline-run-*"))) == 1


def test_disabled_by_the_user_writes_nothing(train, tmp_path):
    done, _ = train(WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs" / "digits-ict" / "wandb").exists()


def test_wandb_never_blocks_and_never_ends_a_run(tmp_path, monkeypatch, capsys):
    """A start that hangs, then fails, costs the caller nothing but a line."""
    release = threading.Event()

    def hang(*_):
        release.wait(30)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Wandb, "_start", staticmethod(hang))
    start = time.monotonic()
    tracker = Wandb(TrackingConfig(), tmp_path, "run", {})
    for step in range(1000):
        tracker.log({"step": step, "loss": 1.0})
    tracker.image("samples", tmp_path / "none.png", 5)
    tracker.model("run", {"weights": tmp_path / "none"})
    tracker.patience_s = 0.1
    tracker.close()  # still hanging: given up, not waited for
    assert time.monotonic() - start < 20
    assert "wandb was not finished within 0 s" in capsys.readouterr().err
    other = Wandb(TrackingConfig(), tmp_path, "run", {})
    release.set()
    other.close()
    assert capsys.readouterr().err == "wandb is off: ConnectionError: no route\n"


def test_upload_has_more_patience_until_there_is_a_hurry(tmp_path, monkeypatch):
    release, began = threading.Event(), threading.Event()

    def hang(*_):
        began.set()
        release.wait(30)

    monkeypatch.setattr(Wandb, "_start", staticmethod(hang))
    monkeypatch.setattr(base, "HURRY_S", 0.3)
    tracker = Wandb(TrackingConfig(artifact=True), tmp_path, "run", {})
    assert tracker.patience_s == 30
    tracker.model("run", {})
    assert tracker.patience_s == 600
    start = time.monotonic()
    tracker.close(give_up=lambda: time.monotonic() - start > 0.6)  # as when a signal comes
    assert 0.5 < time.monotonic() - start < 10
    release.set()


def test_identity_is_the_users_or_a_new_one_and_stays(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    own = wandb_run.identity(tmp_path / "own")
    assert len(own) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert wandb_run.identity(tmp_path / "chosen") == "chosen"
    assert wandb_run.identity(tmp_path / "own") == own


# ------------------------------------------------------------------------------------- the environment

VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "lab",
    "WANDB_RUN_GROUP": "night",
    "WANDB_TAGS": "a, b",
    "WANDB_NAME": "my favourite",
    "WANDB_RUN_ID": "abc-1",
    "WANDB_RESUME": "must",
    "WANDB_NOTES": "try again",
}


def begun_runs(folder):
    """The record of each start, in order."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    return [of_kind(file, "run")[0] for file in files]


def test_environment_says_what_the_command_line_leaves_open(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plain = TrackingConfig(project=None, tags=[])
    assert (plain.project, plain.entity, plain.group, plain.tags) == ("cm_train", None, None, [])
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    filled = TrackingConfig(project=None, entity=None, group=None, tags=[])
    assert (filled.project, filled.entity, filled.group, filled.tags) == ("theirs", "lab", "night", ["a", "b"])
    said = TrackingConfig(project="p", entity="e", group="g", tags=["t"])
    assert (said.project, said.entity, said.group, said.tags) == ("p", "e", "g", ["t"])
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert TrackingConfig(project=None) == TrackingConfig(project="cm_train"), "an empty one says nothing"


@pytest.mark.long
def test_environment_rules_over_defaults_and_the_command_line_over_both(train, tmp_path):
    """A run of its own, the same resumed, and another whose command says it all."""
    elsewhere = tmp_path / "elsewhere"
    done, _ = train("steps=4", **VARIABLES, WANDB_DIR=str(elsewhere))
    assert done.returncode == 0, done.stderr
    assert "tracking: wandb project theirs" in done.stderr
    assert not (tmp_path / "runs" / "digits-ict" / "wandb").exists()
    done, _ = train("steps=6", WANDB_RUN_ID="another", WANDB_RESUME="never", WANDB_DIR=str(elsewhere), WANDB_PROJECT="")
    assert done.returncode == 0, done.stderr
    first, second = begun_runs(elsewhere)
    assert (first.run_id, first.display_name, first.notes) == ("abc-1", "my favourite", "try again")
    assert (first.project, first.entity, first.run_group, list(first.tags)) == ("theirs", "lab", "night", ["a", "b"])
    assert (second.run_id, second.display_name, second.project) == ("abc-1", "digits-ict", "cm_train")

    words = ["name=own", "tracking.project=p", "tracking.entity=e", "tracking.group=g", "tracking.tags=[t]"]
    done, _ = train(*words, **VARIABLES)
    assert done.returncode == 0, done.stderr
    (third,) = begun_runs(tmp_path / "runs" / "own")
    assert (third.project, third.entity, third.run_group, list(third.tags)) == ("p", "e", "g", ["t"])
    assert third.display_name == "own"


@pytest.mark.long
def test_jobs_of_a_sweep_share_no_id_and_no_name(environment, warm, tmp_path):
    (tmp_path / "home").mkdir()
    argv = ["-m", "cm_train.commands.train", "-m", *RUN, "seed=0,1"]
    more = {"WANDB_SWEEP_ID": "theirs"}  # an agent whose trial is a sweep
    done = warm.run(argv, cwd=tmp_path, env=environment | VARIABLES | more)
    assert done.returncode == 0, done.stderr
    jobs = [begun_runs(tmp_path / "runs" / f"digits-ict-seed-{seed}") for seed in (0, 1)]
    (one,), (two,) = jobs
    assert len({one.run_id, two.run_id, "abc-1"}) == 3
    assert (one.display_name, two.display_name) == ("digits-ict-seed-0", "digits-ict-seed-1")
    assert one.run_group == two.run_group == "night", "the environment's rather than the sweep's"
    assert [list(run.tags) for run in (one, two)] == [["a", "b", "seed=0"], ["a", "b", "seed=1"]]


@pytest.mark.long
def test_agents_sweep_has_the_student_although_its_teacher_trained_in_the_same_process(train, server, tmp_path):
    assert train("mode=edm", "tracking=none")[0].returncode == 0
    shutil.rmtree(tmp_path / "runs" / "digits-edm" / "checkpoints" / "step_00000006")  # there is something left to do
    fine = server("fine")
    done, _ = train("mode=cd", "steps=4", **login(fine), WANDB_SWEEP_ID="theirs", WANDB_RUN_ID="abc-1")
    assert done.returncode == 0, done.stderr
    assert "training it first" in done.stderr
    teacher = (tmp_path / "runs" / "digits-edm" / "wandb_id").read_text()
    first = {}
    for operation, variables in fine.queries:
        if operation == "UpsertBucket":
            first.setdefault(variables["name"], variables.get("sweep"))
    assert first == {teacher: None, "abc-1": "theirs"}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WANDB_MODE", "of", "wandb is off: ValueError: WANDB_MODE is 'of': Input should be 'online', 'offline'"),
        ("WANDB_RUN_ID", "a:b", "wandb is off: UsageError: Run ID cannot contain"),
    ],
)
def test_variable_that_wandb_refuses_is_one_line_and_kept_nowhere(variable, value, words, train, tmp_path):
    done, _ = train(**{variable: value})
    assert done.returncode == 0, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "digits-ict" / "wandb_id").exists()
