"""What may happen to runs, folders and disks: nothing is lost, and nothing outside of a run is touched."""

import copy
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_trainer import after, build, run  # noqa: F401 - build is a fixture

from cm_train.core import files, registry
from cm_train.core.errors import InputError, TrainingFailed
from cm_train.core.signals import StopFlag
from cm_train.core.terminal import complain
from cm_train.data import decoding, fingerprint
from cm_train.models.checkpoints import find, posthoc, verify
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.models.checkpoints.load import load_denoiser
from cm_train.models.checkpoints.manifest import DamagedCheckpoint
from cm_train.runs.lock import _KEYS, check_ours
from cm_train.runs.stored import store_config
from cm_train.sweeps import gpus
from conftest import ENVIRONMENT, TINY


def snapshot(folder):
    """All that lies in a folder: contents, and where links lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture
def quick(monkeypatch):
    """Waiting for a disk takes no time."""
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


# ------------------------------------------------------------------------------------------- checkpoints out of sight


def emptied(home):
    shutil.rmtree(home)
    home.mkdir()


def dangling(home):
    shutil.rmtree(home)
    home.symlink_to("/nowhere/checkpoints")


def linked(home):
    """To a larger disk, as its own user may have done it: refused in words that name run_dir."""
    os.rename(home, home.parent.parent / "elsewhere")
    home.symlink_to(home.parent.parent / "elsewhere")


@pytest.mark.parametrize("harm", [emptied, shutil.rmtree, dangling, linked])
def test_a_run_whose_checkpoints_are_out_of_sight_never_starts_over(harm, build, tmp_path, command):  # noqa: F811
    trainer = build("mode=ict", "save_every=3")
    run(trainer)
    folder = trainer.config.folder
    store_config(folder, yaml.safe_load(yaml.safe_dump(trainer.config.model_dump(mode="json"))))
    harm(folder / "checkpoints")
    before = snapshot(tmp_path)
    done = command("train", "mode=ict", *TINY, "steps=12", "schedule_steps=6", f"run_dir={folder}")
    assert done.returncode == 2, done.stderr
    assert "checkpoints" in done.stderr and "Traceback" not in done.stderr
    if harm is linked:
        assert "run_dir=" in done.stderr
    after_it = snapshot(tmp_path)
    assert {k: v for k, v in after_it.items() if not k.endswith(".lock")} == before


def test_checkpoints_that_may_not_be_listed_are_an_error(build, monkeypatch, quick):  # noqa: F811
    trainer = build("mode=ict")
    run(trainer)

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "listdir", denied)
    for look in (checkpoint.newest_manifest, checkpoint.latest):
        with pytest.raises(InputError, match="can't be seen: .*Permission denied"):
            look(trainer.config.folder)


def test_a_run_killed_before_its_first_save_starts_again(build):  # noqa: F811
    trainer = build("mode=ict", "log_every=1", "save_every=100")
    folder = trainer.config.folder
    (folder / "config.yaml").write_text("mode: ict")
    (folder / "checkpoints").mkdir()
    assert checkpoint.newest_manifest(folder) is None
    run(trainer)
    assert checkpoint.newest_manifest(folder).step == 6


# ------------------------------------------------------------------------------------------------- other people's files


@pytest.mark.parametrize("config", ["model: x\nlr: 1\n", "- a list\n", None])
def test_a_folder_of_somebody_else_is_refused_untouched(config, command, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "metrics.jsonl").write_text('{"step": 1, "mine": true}\n')
    if config is not None:
        (project / "config.yaml").write_text(config)
    before = snapshot(project)
    done = command("train", "mode=ict", *TINY, "run_dir=.", cwd=project)
    assert done.returncode == 2
    assert "run" in done.stderr and "Traceback" not in done.stderr
    assert snapshot(project) == before


def test_what_a_killed_command_and_systems_leave_is_no_bodys_files(tmp_path):
    for name in (".lock", ".DS_Store", ".config.yaml.writing", ".nfs0001", "slurm-17.out", "train.log"):
        (tmp_path / name).touch()
    (tmp_path / "lost+found").mkdir()
    check_ours(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files and no run; got 'thesis.tex'"):
        check_ours(tmp_path)


@pytest.mark.parametrize("part", ["checkpoints", "samples", "snapshots", "tensorboard", "wandb"])
def test_a_run_does_not_follow_links_out_of_itself(part, build, tmp_path):  # noqa: F811
    trainer = build("mode=ict")
    folder = trainer.config.folder
    store_config(folder, dict.fromkeys(_KEYS, 1))
    check_ours(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(folder / part, ignore_errors=True)
    (folder / part).symlink_to(outside)
    with pytest.raises(InputError, match=f"{part} is a link, .*run_dir="):
        check_ours(folder)


def test_a_preview_is_not_written_through_a_link(build, tmp_path, capsys):  # noqa: F811
    trainer = build("mode=ict", "preview_every=6")
    precious = tmp_path / "precious.png"
    precious.write_bytes(b"mine")
    (trainer.config.folder / "samples").mkdir()
    (trainer.config.folder / "samples" / "step_00000006.png").symlink_to(precious)
    run(trainer)
    assert precious.read_bytes() == b"mine"
    assert "could not write the preview of step 6" in capsys.readouterr().err


def test_gpu_locks_are_not_made_in_somebody_elses_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "there").mkdir()
    (tmp_path / f"cm-train-gpus-{os.getuid()}").symlink_to(tmp_path / "there")
    with pytest.raises(InputError, match="somebody else's; fix: set TMPDIR"):
        gpus.locks_folder()


# -------------------------------------------------------------------------------------------------- disks that falter


def faltering(monkeypatch, times, number, wanted):
    """`open` fails so many times for paths that hold `wanted`."""
    left, real = [times], os.open

    def sometimes(path, *args, **kwargs):
        if wanted in str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", sometimes)


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EACCES, errno.ENOMEM, errno.ECONNRESET]
)
@pytest.mark.parametrize("wanted", ["manifest.json", "denoiser.safetensors"])
def test_a_read_that_fails_for_a_moment_is_tried_again(number, wanted, build, monkeypatch, quick):  # noqa: F811
    trainer = build("mode=ict", "save_every=3")
    run(trainer)
    faltering(monkeypatch, 2, number, wanted)
    assert checkpoint.latest(trainer.config.folder, set_aside=True)[1].step == 6


@pytest.mark.parametrize("wanted", ["manifest.json", "denoiser.safetensors", "state.pt"])
def test_what_can_not_be_read_now_is_neither_damaged_nor_set_aside(wanted, build, monkeypatch, quick):  # noqa: F811
    trainer = build("mode=ict", "save_every=3")
    run(trainer)
    folder = trainer.config.folder
    before = snapshot(folder)
    faltering(monkeypatch, 10**9, errno.EIO, f"step_00000006/{wanted}")
    with pytest.raises(InputError, match="can't be read now") as refused:
        checkpoint.latest(folder, set_aside=True)
    assert not isinstance(refused.value, DamagedCheckpoint)
    monkeypatch.undo()
    assert snapshot(folder) == before


def test_headers_that_can_not_be_read_now_are_not_damaged(build, monkeypatch, quick):  # noqa: F811
    trainer = build("mode=ict", "save_every=3")
    run(trainer)

    def away(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verify, "safe_open", away)
    with pytest.raises(InputError, match="can't be read now") as refused:
        checkpoint.latest(trainer.config.folder, set_aside=True)
    assert not isinstance(refused.value, DamagedCheckpoint)


def pictures(folder, count=4, size=12):
    folder.mkdir(parents=True)
    for i in range(count):
        noise = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.bmp")  # all of one size in bytes
    return folder


def image_folder(root, **settings):
    dataset = registry.make("dataset", {"name": "image_folder", "root": str(root), "image_size": 8, **settings})
    dataset.load()
    return dataset


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_an_image_that_can_not_be_read_now_is_not_a_broken_one(memory_gb, tmp_path, monkeypatch, quick):
    """Else a passing fault would be part of the data set's fingerprint, and the run could never be resumed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = pictures(tmp_path / "set")
    whole = image_folder(root, skip_broken=True, memory_gb=memory_gb).fingerprint()
    everything = torch.arange(4)
    with monkeypatch.context() as patch:
        faltering(patch, 2, errno.EIO, "2.bmp")
        found = image_folder(root, skip_broken=True, memory_gb=memory_gb)
        found.gather(everything)
        assert found.fingerprint() == whole
    with monkeypatch.context() as patch:
        faltering(patch, 10**9, errno.ESTALE, "2.bmp")
        with pytest.raises(InputError, match="2.bmp.* can't be read now"):
            image_folder(root, skip_broken=True, memory_gb=memory_gb).gather(everything)


def test_a_lazy_set_knows_pictures_that_were_exchanged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = pictures(tmp_path / "set")
    before = image_folder(root, memory_gb=0).fingerprint()
    assert image_folder(root, memory_gb=0).fingerprint() == before
    (root / "0.bmp").rename(root / "x")
    (root / "1.bmp").rename(root / "0.bmp")
    (root / "x").rename(root / "1.bmp")
    assert image_folder(root, memory_gb=0).fingerprint() != before
    shutil.copytree(root, tmp_path / "moved")
    assert image_folder(tmp_path / "moved", memory_gb=0).fingerprint() == image_folder(root, memory_gb=0).fingerprint()


def test_bytes_of_a_lazy_set_are_looked_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = pictures(tmp_path / "set")
    image_folder(root, memory_gb=0).fingerprint()
    monkeypatch.setattr(fingerprint, "look_at", lambda *_: pytest.fail("looked again"))
    image_folder(root, memory_gb=0).fingerprint()


def test_a_file_system_that_can_not_rename_folders_is_said_at_once_and_ends_the_run(build, monkeypatch, capsys):  # noqa: F811
    trainer = build("mode=ict", "steps=40", "save_every=1", "log_every=40")
    real = os.replace

    def refuse(source, target):
        if Path(target).name.startswith("step_"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(source, target)

    monkeypatch.setattr(saving.os, "replace", refuse)
    with pytest.raises(TrainingFailed, match="can't rename folders.*; fix: run_dir="):
        run(trainer)
    assert "could not save step 1: this file system can't rename folders" in capsys.readouterr().err
    assert 3 <= trainer.step <= 5


# ----------------------------------------------------------------------------------------- averages made of snapshots


def test_an_average_is_made_of_the_snapshots_that_its_checkpoint_lists(build):  # noqa: F811
    trainer = build("mode=ict", "ema=power", "ema.num_snapshots=3", "save_every=2")
    run(trainer)
    folder = trainer.config.folder
    assert checkpoint.newest_manifest(folder).snapshots == [2, 4, 6]
    made = load_denoiser(folder, "power_0.07").state_dict()
    # Of another past of this run, which went back and came by another way: not of this checkpoint.
    shutil.copytree(folder / "snapshots" / "step_00000004", folder / "snapshots" / "step_00000005")
    again = load_denoiser(folder, "power_0.07").state_dict()
    assert all(torch.equal(made[name], again[name]) for name in made)
    shutil.rmtree(folder / "snapshots" / "step_00000004")
    with pytest.raises(InputError, match="snapshots of .* are gone; got '1 of 3, of step 4'"):
        load_denoiser(folder, "power_0.07")
    shutil.copytree(folder / "snapshots" / "step_00000002", folder / "snapshots" / "step_00000004")
    with pytest.raises(DamagedCheckpoint, match="step_00000004 is of step 2"):
        load_denoiser(folder, "power_0.07")


def test_a_resumed_run_goes_on_with_its_list_of_snapshots(build):  # noqa: F811
    options = ["mode=ict", "ema=power", "ema.num_snapshots=3", "save_every=2"]
    assert not run(build(*options, should_stop=after(5)))
    rest = build(*options)
    shutil.rmtree(rest.config.folder / "snapshots" / "step_00000002")
    run(rest)
    manifest = checkpoint.newest_manifest(rest.config.folder)
    assert manifest.snapshots == [2, 4, 6]  # what it was made of, whether or not it is still there
    assert sorted(posthoc.snapshots(rest.config.folder)) == [4, 6]


# ------------------------------------------------------------------------------------------------ teachers that go on


@pytest.mark.long
def test_a_student_goes_on_with_the_teacher_that_it_began_with(build):  # noqa: F811
    run(build("mode=edm", name="teacher"))
    teacher = f"teacher={build('mode=edm', name='teacher').config.folder}"
    student = build("mode=cd", teacher, name="student", should_stop=after(3))
    known = student.provenance["teacher"]
    assert not run(student)
    home = build("mode=edm", name="teacher").config.folder
    longer = build("mode=edm", "steps=20", "schedule_steps=6", "save_every=2", "keep=2", name="teacher")
    store_config(student.config.folder, {"mode": "cd"})
    run(longer)
    assert [f.name for f in checkpoint.folders(home)] == ["step_00000020", "step_00000018", "step_00000006"]
    # Both together elsewhere: as far from each other as before.
    both = home.parent.rename(home.parent.with_name("moved"))
    saving.prune(both / home.name, 2)
    assert len(checkpoint.folders(both / home.name)) == 3
    both.rename(home.parent)
    rest = build("mode=cd", teacher, name="student")
    assert rest.step == 3
    assert rest.provenance["teacher"] == known
    run(rest)
    # Nobody needs it once the student's folder is gone.
    shutil.rmtree(student.config.folder)
    saving.prune(home, 2)
    assert [f.name for f in checkpoint.folders(home)] == ["step_00000020", "step_00000018"]


@pytest.mark.long
def test_a_student_whose_teacher_is_gone_says_which_it_needs(build):  # noqa: F811
    run(build("mode=edm", name="teacher"))
    home = build("mode=edm", name="teacher").config.folder
    student = build("mode=cd", f"teacher={home}", name="student", should_stop=after(3))
    assert not run(student)
    run(build("mode=edm", "seed=1", name="other"))
    other = build("mode=edm", "seed=1", name="other").config.folder
    known = student.provenance["teacher"][:16]
    with pytest.raises(InputError, match=f"is the teacher that this run began with; .*sha256 {known}.*teacher="):
        build("mode=cd", f"teacher={other}", name="student")


@pytest.mark.parametrize("setting", ["name=..", "run_dir=notyet/../mine"])
def test_a_run_does_not_begin_in_somebodys_folder_by_a_detour(command, tmp_path, setting):
    mine = tmp_path if setting == "name=.." else tmp_path / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "config.yaml").write_text("mine")
    done = command("train", "mode=edm", *TINY, setting)
    assert done.returncode == 2 and "not a run's config" in done.stderr, done.stderr
    assert [path.name for path in mine.iterdir()] == ["config.yaml"] and (mine / "config.yaml").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------- moving together


def test_a_run_its_teacher_and_their_pictures_move_together(command, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    pictures(here / "set", count=8)
    options = ["dataset=image_folder", "dataset.image_size=8", *TINY, "steps=4", "schedule_steps=4"]
    options += ["backbone.channels=8", "backbone.head_channels=8", "backbone.group_channels=4"]

    def train(home, mode, name, *more):
        places = [f"dataset.root={home / 'set'}", f"run_dir={home / 'runs' / name}"]
        return command("train", f"mode={mode}", *options, *places, *more)

    for mode, name in (("edm", "set-edm"), ("cd", "x")):
        first = train(here, mode, name)
        assert first.returncode == 0, first.stderr
    here.rename(there)
    done = train(there, "cd", "x", "steps=6")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stderr and "training it first" not in done.stderr
    # Other pictures under the new path are another set.
    Image.new("RGB", (12, 12), "red").save(there / "set" / "0.bmp")
    done = train(there, "cd", "x", "steps=8")
    assert done.returncode == 2
    assert "dataset of" in done.stderr and "changed since the run began" in done.stderr


def test_another_number_of_threads_is_noted_at_a_resume(build, capsys):  # noqa: F811
    assert not run(build("mode=ict", should_stop=after(3)))
    before = torch.get_num_threads()
    assert checkpoint.newest_manifest(build("mode=ict").config.folder).threads == before
    capsys.readouterr()
    torch.set_num_threads(before + 1)
    try:
        build("mode=ict")
    finally:
        torch.set_num_threads(before)
    assert f"saved with {before} threads a process, and now there are {before + 1}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- litter


def test_what_a_killed_prune_left_is_removed_at_the_next_start(command, tmp_path):
    """Of a finished run too, which writes nothing any more; a link is removed, and not what it leads to."""
    assert command("train", "mode=ict", *TINY).returncode == 0
    home, outside = tmp_path / "runs" / "digits-ict" / "checkpoints", tmp_path / "outside"
    for folder in (home / ".step_00000001.writing", outside):
        folder.mkdir()
        (folder / "denoiser.safetensors").write_bytes(bytes(100))
    (home / ".step_00000002.writing").symlink_to(outside)
    assert command("train", "mode=ict", *TINY).returncode == 0
    assert sorted(path.name for path in home.iterdir()) == ["step_00000003", "step_00000006"]
    assert (outside / "denoiser.safetensors").exists()


def test_modes_of_files_follow_the_umask(build):  # noqa: F811
    trainer = build("mode=ict")
    before = os.umask(0o022)
    try:
        run(trainer)
    finally:
        os.umask(before)
    folder, _ = find.resolve(trainer.config.folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_a_run_of_a_version_that_kept_no_record_gets_one_when_it_is_met(command, tmp_path):
    assert command("train", "mode=ict", *TINY).returncode == 0
    folder = tmp_path / "runs" / "digits-ict"
    (folder / ".saved.json").unlink()
    assert "is finished" in command("train", "mode=ict", *TINY).stderr
    assert (folder / ".saved.json").exists()


@pytest.mark.long
def test_a_metrics_file_that_is_none_is_one_line_with_ranks_too(command, tmp_path):
    """Only the first rank opens it."""
    assert command("train", "mode=ict", *TINY).returncode == 0
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    done = command("train", "mode=ict", *TINY, "steps=8", "schedule_steps=6", "devices=2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("can't write runs/digits-ict/metrics.jsonl: Is a directory") == 1


def test_files_of_the_same_sizes_and_times_elsewhere_are_others(tmp_path, monkeypatch):
    """As archives unpack them whose times are all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = []
    for name, flip in (("a", False), ("b", True)):
        root = pictures(tmp_path / name)
        if flip:
            (root / "0.bmp").write_bytes((root / "1.bmp").read_bytes())
        for path in root.iterdir():
            os.utime(path, (1, 1))
        found.append(image_folder(root, memory_gb=0).fingerprint())
    assert found[0] != found[1]


def test_a_lazy_set_that_an_earlier_version_knew_by_names_and_sizes_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = image_folder(pictures(tmp_path / "set"), memory_gb=0)
    settings = repr((8, 3, False, 255)).encode()
    listed = b"".join(
        repr((f"{i}.bmp", str((tmp_path / "set" / f"{i}.bmp").stat().st_size))).encode() for i in range(4)
    )
    assert found.was_known_as(hashlib.sha256(settings + listed).hexdigest())
    assert not found.was_known_as("0" * 64)


def test_a_lazy_set_with_a_link_to_itself_is_as_good_as_any(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = pictures(tmp_path / "set")
    (root / "z.png").symlink_to("z.png")
    assert image_folder(root, memory_gb=0, skip_broken=True).fingerprint()


def test_a_record_of_a_save_names_its_step(build):  # noqa: F811
    trainer = build("mode=ict", "save_every=3")
    run(trainer)
    assert json.loads((trainer.config.folder / ".saved.json").read_text()) == {"step": 6}


# ------------------------------------------------------------------------------------------------------- a stranger's


@pytest.mark.long
def test_jobs_of_a_sweep_import_nothing_from_the_current_folder(command, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    trap = "import pathlib; pathlib.Path('was-imported').touch(); raise SystemExit('a stranger says hello')"
    for name in ("numpy", "torch", "joblib", "cloudpickle", "hydra"):
        (tmp_path / f"{name}.py").write_text(trap)
    argv = [shutil.which("cm-train", path=str(Path(sys.executable).parent)) or pytest.skip("not installed"), "-m"]
    argv += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "mode=ict", "seed=0,1", *TINY]
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "was-imported").exists()


def pickled(instructions):
    """A state.pt of these instructions."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (
            ("data.pkl", b"\x80\x02" + instructions + b"."),
            ("version", b"3\n"),
            ("byteorder", b"little"),
        ):
            archive.writestr(f"state/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "instructions",
    [
        b"}()q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01u",  # {a tuple of the tuple before, twice, ...: 1}
        b"]q\x00" + b"(h\x00h\x00lq\x00" * 60,  # the same of lists
        b")" + b"2\x86" * 60,  # by duplicating what is on the stack
    ],
    ids=["tuples", "lists", "duplicates"],
)
def test_a_state_of_things_used_twice_is_refused_at_once(instructions, tmp_path):
    """Some hundred bytes, a tree of 2^60: walking it, as a dict does with its keys, would never end."""
    content = pickled(instructions)
    assert len(content) < 1000
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="the same thing twice"):
        checkpoint.read_state(tmp_path)


@pytest.mark.parametrize(
    "instructions",
    [b"})" + b"\x85" * 10**6 + b"K\x01s", b"]" * 10**5 + b"a" * (10**5 - 1), b"(" * 10**5 + b"t" * 10**5],
)
def test_a_state_nested_without_end_is_refused_at_once(instructions, tmp_path):
    """Walking it in C, as a dict does with its keys, ends the process."""
    (tmp_path / "state.pt").write_bytes(pickled(instructions))
    with pytest.raises(DamagedCheckpoint, match="nested too deeply"):
        checkpoint.read_state(tmp_path)


def test_names_reach_the_terminal_without_their_escapes(capsys):
    complain("a \x1b[31mred\x1b[0m name\r\x07 of \udcff bytes, and \u202eright to left")
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\r" not in shown and "\u202e" not in shown
    assert r"a \x1b[31mred\x1b[0m name\r\x07 of \udcff bytes" in shown
    assert str(InputError("no \x1b]0;x\x07 such", "\x1b[2J")) == r"no \x1b]0;x\x07 such; got '\x1b[2J'"


@pytest.mark.long
def test_a_command_without_stderr_runs_as_any_other(tmp_path):
    options = " ".join([*TINY, "mode=ict", "devices=2"])
    shell = f"{sys.executable} -m cm_train.commands.train {options} 2>&- >&- <&-"
    assert subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=ENVIRONMENT, timeout=300).returncode == 0
    assert len((tmp_path / "runs" / "digits-ict" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_zip_whose_members_overlap_is_refused(tmp_path):
    """Many names for the same bytes: a small file that inflates for ever."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.bmp", bytes(10**6))
        (first,) = archive.infolist()
        for i in range(1, 200):
            again = copy.copy(first)
            again.filename = again.orig_filename = f"{i}.bmp"
            archive.filelist.append(again)
    assert path.stat().st_size < 10**5
    with pytest.raises(InputError, match="its members overlap"):
        image_folder(path)


def test_links_that_multiply_are_not_listed_for_ever(tmp_path):
    """Thirty folders, each with two links to the next: 2^30 ways to the last."""
    for i in range(30):
        (tmp_path / f"d{i}").mkdir()
        for name in "ab":
            (tmp_path / f"d{i}" / name).symlink_to(tmp_path / f"d{i + 1}")
    pictures(tmp_path / "d30")
    with pytest.raises(InputError, match="links lead to .* more than 64 times"):
        image_folder(tmp_path / "d0")


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    root, inside = pictures(tmp_path / "set", count=64, size=32), []

    class Counted:
        def __enter__(self):
            lock.acquire()
            inside.append(1)
            assert sum(inside) == 1

        def __exit__(self, *_):
            inside.append(-1)
            lock.release()

    lock = threading.Lock()
    monkeypatch.setattr(decoding, "_large", Counted())
    monkeypatch.setattr(decoding, "_LARGE_PIXELS", 1000)
    assert len(image_folder(root)) == 64
    assert inside.count(1) == 64


def test_max_hours_does_not_heed_the_clock_on_the_wall(monkeypatch):
    stop = StopFlag(deadline=time.monotonic() + 100)
    monkeypatch.setattr(time, "time", lambda: 10.0**10)
    assert not stop()
