"""What one composed config leads to, by calling the plan: which runs are trained, in which order, with which settings.

A training here saves first weights as those of its last step; `tests/commands` has whole commands.
"""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from PIL import Image

from cm_train.core import configs, terminal
from cm_train.core.command_line import tidy
from cm_train.core.errors import InputError, TrainingFailed
from cm_train.core.signals import StopFlag
from cm_train.core.world import ALONE
from cm_train.models.checkpoints import read as checkpoint
from cm_train.runs import lock, teachers, worker
from cm_train.runs.config import Composed
from cm_train.runs.machine import Machine
from cm_train.runs.measuring import Measured
from cm_train.runs.read_back import read_back
from cm_train.runs.train import train_in_order
from cm_train.training.saver import RunSaver
from conftest import TINY


@dataclass
class Plan:
    """Stands for a command: `plan("mode=cd")` is whether that came to its end.

    Attributes:
        trained: the configs of what was trained, in order; parts: as which part of the command.
        usual: words of each command.
        ends: of runs that end otherwise, by their folder's name: an error, or the step at which they are stopped.
        measured: the configs of what was measured, in order.
    """

    trained: list = field(default_factory=list)
    parts: list = field(default_factory=list)
    usual: list = field(default_factory=lambda: TINY)
    ends: dict = field(default_factory=dict)
    measured: list = field(default_factory=list)
    step_s: float = 0.1  # of a batch of 128

    def __call__(self, *words, swept=(), stop=None):
        self.trained.clear()
        self.parts.clear()
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(configs.conf_dir()), version_base=None), hydra_config() as known:
            overrides = tidy([*self.usual, *words], configs.groups("train"))
            cfg = hydra.compose("train", overrides=overrides, return_hydra_config=True)
            known.set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            machine = Machine(self._execute, self._measure)
            return train_in_order(Composed.of(cfg), machine, stop or StopFlag(), frozenset(swept))

    def _measure(self, config):
        self.measured.append(config)
        return Measured(
            start_s=2.0,
            step_s=self.step_s * config.batch_size / 128,
            call_s=0.0,
            save_s=0.0,
            micro_batch=4,
            ranks=1,
            sigma_data=0.5,
            peak_bytes=0,
            free_bytes=0,
        )

    def _execute(self, config):
        self.trained.append(config)
        self.parts.append(terminal.part())
        end = self.ends.get(config.folder.name, config.steps)
        if isinstance(end, Exception):
            raise end
        if end:
            trainer = worker.build_trainer(config)
            saver = RunSaver(config, trainer.state, trainer.provenance, trainer.versions, ALONE)
            trainer.state.step = end
            saver.save(must=True)
            saver.close()
        return end == config.steps

    @property
    def names(self):
        """The folders of what was trained, in order."""
        return [config.folder.name for config in self.trained]


@contextmanager
def hydra_config():
    known = HydraConfig.instance()
    before = known.cfg
    try:
        yield known
    finally:
        known.cfg = before


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Plan()


def test_a_run_without_a_teacher_is_one_training(plan):
    assert plan("mode=ict")
    assert plan.names == ["digits-ict"]
    assert plan.trained[0].teacher is None and plan.trained[0].schedule_steps == 6


def test_a_missing_teacher_is_trained_first_by_its_own_recipe_on_the_same_data_and_network(plan, capsys):
    assert plan("mode=cd", "backbone.channels=24", "seed=3", "dataset.hflip=true", "precision=fp32")
    teacher, student = plan.trained
    assert plan.names == ["digits-edm", "digits-cd"] and student.teacher == "runs/digits-edm"
    assert (teacher.mode, teacher.steps, teacher.teacher) == ("edm", 2000, None), (
        "its recipe's steps, not the student's"
    )
    shared = ("seed", "precision", "devices", "dataset", "backbone", "tracking")
    assert all(getattr(teacher, key) == getattr(student, key) for key in shared)
    assert "no finished teacher in runs/digits-edm: training it first" in capsys.readouterr().err
    assert plan.parts == ["(1 of 2: the teacher)", "(2 of 2)"]
    assert plan("mode=cd", "steps=8", "name=other", "seed=3") and plan.parts == [""], "it has its teacher"


@pytest.mark.parametrize("mode", ["ict", "cd"])
def test_own_pictures_go_to_a_tracker_only_where_that_was_chosen(mode, plan):
    """Of a run, and of a teacher that is trained on the way."""
    plan.usual, plan.ends = TINY[1:], SimpleNamespace(get=lambda *_: 0)  # nothing is built
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    own = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", f"run_dir=runs/photos-{mode}"]
    for words, sent in (
        ([], False),
        (["tracking.group=night", "tracking.tags=[a]"], False),  # as a sweep sets them
        (["tracking=wandb"], True),
        (["tracking=tensorboard"], True),
        (["tracking.project=faces"], True),
        (["tracking.previews=true"], True),
        (["tracking=wandb", "tracking.previews=false"], False),
    ):
        assert not plan(f"mode={mode}", *own, *words)
        assert [config.sends_pictures for config in plan.trained] == [sent], words
    for words, sent in (([], True), (["tracking.previews=false"], False)):
        assert not plan(f"mode={mode}", *words)
        assert [config.sends_pictures for config in plan.trained] == [sent], "everybody has these"


def test_a_finished_teacher_is_taken_as_it_is(plan):
    assert plan("mode=edm", "backbone.channels=24")
    assert plan("mode=cd")
    assert plan.names == ["digits-cd"]
    assert plan.trained[0].backbone.channels == 24, "a student has its teacher's network"
    assert plan("mode=sct", "teacher=runs/digits-edm")
    assert plan.names == ["digits-sct"]


def test_a_teacher_that_was_begun_goes_on_by_its_own_settings(plan):
    plan.ends["digits-edm"] = 4
    assert not plan("mode=edm", "steps=6", "optimizer.lr=0.5", "seed=8")
    plan.ends.clear()
    assert plan("mode=cd", "seed=1")
    teacher, student = plan.trained
    assert (teacher.steps, teacher.seed, teacher.optimizer.lr) == (6, 8, 0.5)
    assert student.seed == 1


def test_a_teacher_whose_steps_were_lowered_to_what_it_has_is_finished(plan, capsys):
    plan.ends["digits-edm"] = 4
    assert not plan("mode=edm", "steps=6")
    assert plan("mode=edm", "steps=4", "schedule_steps=6")
    assert plan.names == []
    assert plan("mode=cd")
    assert plan.names == ["digits-cd"]
    assert "training it first" not in capsys.readouterr().err


def test_a_teacher_that_is_stopped_ends_the_command_and_leaves_the_student_unbegun(plan, tmp_path):
    plan.ends["digits-edm"] = 0
    assert not plan("mode=cd")
    assert plan.names == ["digits-edm"]
    assert not (tmp_path / "runs" / "digits-cd" / "config.yaml").exists()


def test_a_teacher_that_can_not_be_trained_is_named(plan):
    plan.ends["digits-edm"] = TrainingFailed("not finite")
    with pytest.raises(TrainingFailed, match="the teacher in runs/digits-edm: not finite"):
        plan("mode=cd")


def test_what_a_sweep_sets_differently_has_no_say_in_the_teacher(plan):
    assert plan("mode=cd", "seed=3", "precision=fp32", swept=("seed", "guidance"))
    assert (plan.trained[0].seed, plan.trained[0].precision) == (0, "fp32")
    assert plan.trained[1].seed == 3


def test_a_teacher_to_be_guided_hides_a_tenth_of_its_labels(plan):
    assert plan("mode=cd", "dataset.conditional=true", "guidance=2")
    assert [config.label_dropout for config in plan.trained] == [0.1, 0.0]
    shutil.rmtree("runs")
    assert plan("mode=cd", "dataset.conditional=true")
    assert plan.trained[0].label_dropout == 0.0


def test_a_run_can_not_be_its_own_teacher(plan):
    with pytest.raises(InputError, match="can't be its own teacher"):
        plan("mode=cd", "name=digits-edm")
    assert plan.names == []


def test_a_teacher_of_other_data_is_refused(plan):
    assert plan("mode=edm", "dataset.conditional=true")
    with pytest.raises(InputError, match="was trained on other data"):
        plan("mode=cd")
    assert plan.names == []


def test_another_network_than_the_teachers_is_refused_before_anything_trains(plan):
    assert plan("mode=edm")
    with pytest.raises(InputError, match="a student has the backbone that it starts from"):
        plan("mode=cd", "backbone.channels=64", "teacher=runs/digits-edm")
    assert plan.names == []
    assert plan("mode=cd", "backbone.dropout=0.2", "teacher=runs/digits-edm"), "is how it is trained"
    assert plan.trained[0].backbone.dropout == 0.2


def test_a_teacher_that_another_command_trains_is_waited_for(plan, monkeypatch, capsys):
    stop = StopFlag()
    waited = []
    clock = SimpleNamespace(sleep=lambda s: waited.append(s) or stop.caught.add(15))
    monkeypatch.setattr(teachers, "time", clock)

    def in_use(config, execute):
        raise lock.FolderInUse(config.folder, "process 1", "the run folder", "run_dir")

    monkeypatch.setattr(teachers, "run_one", in_use)
    assert not plan("mode=cd", stop=stop)
    assert waited == [1] and plan.names == []
    assert "waiting for the teacher" in capsys.readouterr().err


def test_a_run_that_is_begun_goes_on_and_one_that_is_finished_says_so(plan, capsys):
    assert plan("mode=ict", "steps=4")
    assert plan("mode=ict", "steps=9")
    assert (plan.trained[0].steps, plan.trained[0].schedule_steps) == (9, 4), "schedules count to what they began with"
    assert plan("mode=ict", "steps=9")
    assert plan.names == []
    assert "runs/digits-ict is finished at step 9" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"holds a run with another config: seed \(0 -> 1\)"):
        plan("mode=ict", "steps=12", "seed=1")


def test_a_run_that_has_saved_nothing_may_be_begun_anew(plan):
    plan.ends["digits-ict"] = TrainingFailed("no memory")
    with pytest.raises(TrainingFailed):
        plan("mode=ict")
    plan.ends.clear()
    assert plan("mode=ict", "seed=1", "optimizer.lr=0.1")
    assert read_back(plan.trained[0].folder).seed == 1


def test_a_student_goes_on_with_the_teacher_that_it_began_with(plan, tmp_path, capsys):
    assert plan("mode=cd") and plan("mode=edm", "name=other", "seed=5")
    (tmp_path / "runs" / "digits-edm").rename(tmp_path / "moved")
    gone = "the teacher that runs/digits-cd began with is not in runs/"
    for more in ([], ["teacher=runs/nowhere"], ["teacher=runs/other"]):
        with pytest.raises(InputError, match=gone):
            plan("mode=cd", "steps=9", "schedule_steps=6", *more)
        assert plan.names == []
    assert plan("mode=cd", "steps=9", "schedule_steps=6", "teacher=moved")
    assert plan.trained[0].teacher == "moved"
    assert plan("mode=cd", "steps=10", "schedule_steps=6")
    assert plan.trained[0].teacher == "moved", "and is remembered"


def test_a_student_that_had_only_its_first_weights_of_a_teacher_goes_on_without_it(plan, tmp_path, capsys):
    assert plan("mode=sct")
    shutil.rmtree(tmp_path / "runs" / "digits-edm")
    assert plan("mode=sct", "steps=9", "schedule_steps=6")
    assert plan.names == ["digits-sct"]
    assert "no longer measured" in capsys.readouterr().err


def test_first_weights_of_ones_own_bring_their_network(plan):
    assert plan("mode=edm", "backbone.channels=24", "name=start")
    with pytest.raises(InputError, match="a student has the backbone that it starts from"):
        plan("mode=ict", "init=runs/start", "backbone.channels=64")
    assert plan("mode=ict", "init=runs/start", "backbone.dropout=0.1")
    assert (plan.trained[0].backbone.channels, plan.trained[0].backbone.dropout) == (24, 0.1)
    assert plan("mode=ict", "init=runs/start", "backbone.dropout=0.1", "steps=8", "schedule_steps=6"), (
        "its own from then on"
    )
    with pytest.raises(InputError, match="another config: init"):
        plan("mode=ict", "init=random", "backbone.dropout=0.1", "steps=9", "schedule_steps=6")


def test_first_weights_that_are_damaged_are_found_before_a_teacher_trains(plan, tmp_path):
    assert plan("mode=edm", "name=start")
    for file in (tmp_path / "runs" / "start" / "checkpoints").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="is damaged"):
        plan("mode=cd", "init=runs/start")
    assert plan.names == []
