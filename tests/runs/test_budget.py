"""How long runs are: by a budget that is measured once, shared with a teacher, and kept."""

import pytest
from test_train import plan  # noqa: F401 - a fixture

from cm_train.core.errors import InputError
from cm_train.runs.config import parse
from cm_train.runs.measuring import Measured
from cm_train.runs.read_back import read_back

START = 2.0  # seconds, of `Plan`'s machine, on which 128 images take 0.1 s


@pytest.fixture
def own(plan):  # noqa: F811
    """`plan`, but with no words that say how long a run is, or how often it shows."""
    plan.usual = ["tracking=none", "preview_every=0"]
    return plan


def images(run):
    return run.steps * run.batch_size


def test_a_budget_of_time_becomes_steps(own):
    assert own("mode=ict", "budget=300s")
    (run,) = own.trained
    assert (run.budget, run.batch_size, run.micro_batch) == ("300s", 128, 4)
    assert run.steps * 0.1 + START == pytest.approx(300, abs=0.2)
    assert len(own.measured) == 1


def test_a_short_one_has_smaller_batches_which_are_measured_too(own):
    assert own("mode=ict", "budget=10s")
    (run,) = own.trained
    assert run.batch_size == 16 and [config.batch_size for config in own.measured] == [128, 16]
    assert run.steps * 0.1 / 8 + START == pytest.approx(10, abs=0.1)


def test_what_was_spent_before_counts(own, monkeypatch):
    """As the minutes in which a teacher was trained, or in which it was measured what a step takes."""
    from cm_train.runs import budget
    from cm_train.runs.machine import Machine

    assert own("mode=ict", "budget=300s")
    before, as_it_is = own.trained[0].steps, budget.planned
    slow = Machine(own._execute, own._measure, spent_s=lambda: 100.0)
    monkeypatch.setattr(budget, "planned", lambda settled, machine, *rest: as_it_is(settled, slow, *rest))
    assert own("mode=ict", "budget=300s", "name=late")
    assert own.trained[0].steps == before - 1000


def test_a_budget_of_images_is_not_measured(own):
    assert own("mode=ict", "budget=200k")
    assert images(own.trained[0]) == pytest.approx(200_000, abs=64) and not own.measured


def test_a_teacher_that_is_trained_first_has_its_part(own):
    assert own("mode=cd", "budget=200k")
    assert [images(run) for run in own.trained] == pytest.approx([100_000] * 2, abs=128)
    assert own("mode=cd", "budget=200k", "name=b", "run_dir=other/b", "teacher_budget=50k")
    assert [images(run) for run in own.trained] == pytest.approx([50_000, 150_000], abs=128)


def test_a_teacher_that_is_there_takes_nothing(own):
    assert own("mode=edm", "steps=3")
    assert own("mode=cd", "budget=200k")
    assert own.names == ["digits-cd"] and images(own.trained[0]) == pytest.approx(200_000, abs=128)


def test_a_run_goes_on_by_the_budget_that_it_began_with_unmeasured(own):
    own.ends["digits-ict"] = 5
    assert not own("mode=ict", "budget=300s")
    first = own.trained[0]
    own.measured.clear()
    own.ends.clear()
    own.step_s = 50.0  # a slow day
    for words in (["budget=300s"], []):
        own.ends["digits-ict"] = 6 + len(words)
        own("mode=ict", *words)
        assert own.trained[0].steps == first.steps and not own.measured
        assert read_back(first.folder).budget == "300s"


def test_another_budget_later_is_refused_and_steps_are_the_way(own):
    own.ends["digits-ict"] = 5
    assert not own("mode=ict", "budget=300s")
    with pytest.raises(
        InputError, match=r"began with budget=300s; got 'budget=8h'; allowed: 300s; fix: steps=\.\.\. in"
    ):
        own("mode=ict", "budget=8h")
    own.ends["digits-ict"] = 7
    assert own("mode=ict", "steps=7")
    assert own.trained[0].steps == 7 and read_back(own.trained[0].folder).budget is None


def test_a_budget_for_a_run_that_began_without_one_is_refused(own):
    own.ends["digits-ict"] = 5
    assert not own("mode=ict", "steps=9")
    with pytest.raises(InputError, match="began with no budget"):
        own("mode=ict", "budget=8h")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget=8h", "steps=100"], "budget and steps say one thing"),
        (["budget=8h", "teacher_budget=9h"], "teacher_budget is the teacher's part of budget; got '9h'; allowed: less"),
        (["budget=8h", "teacher_budget=1M"], "allowed: less than budget=8h, in its units"),
        (["budget=tomorrow"], "can't read budget"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(words, message, own):
    with pytest.raises(InputError, match=message):
        own("mode=cd", *words)
    assert not own.trained


def test_a_stop_while_measuring_leaves_the_run_unbegun(own, monkeypatch):
    monkeypatch.setattr(own, "_measure", lambda config: None)
    assert not own("mode=ict", "budget=300s")
    assert not own.trained


def test_jobs_of_a_sweep_are_equally_long_whether_or_not_their_teacher_is_there(own, monkeypatch):
    from cm_train.runs import config as composing

    of = composing.Composed.of
    monkeypatch.setattr(composing.Composed, "of", lambda cfg: of(cfg, in_sweep=True))
    assert own("mode=cd", "budget=200k", "seed=0")
    first = own.trained[-1]
    assert own("mode=cd", "budget=200k", "seed=1", "name=second")
    assert own.names == ["second"] and own.trained[0].steps == first.steps


def test_time_is_of_start_steps_previews_and_the_last_save(composed):
    machine = Measured(2.0, 0.5, 0.1, 3.0, 128, 1, 0.5, 0, 0)
    run = parse(composed("mode=ict", "steps=1000", "preview_every=100"))
    assert run.num_previews() == 11, "one at a hundredth"
    assert machine.seconds(run) == pytest.approx(2 + 500 + 11 * 0.1 + 3)
    run = parse(composed("mode=edm", "steps=1000", "preview_every=300"))
    assert machine.seconds(run) == pytest.approx(2 + 500 + 5 * 79 * 0.1 + 3), "by Heun's method, and the last step's"
    run = parse(composed("mode=cd", "steps=1000", "preview_every=0"))
    assert machine.seconds(run) == pytest.approx(2 + 500 + 3), "no teacher's either"


@pytest.mark.parametrize("call_s", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("minutes", [2, 5, 7, 30])
def test_a_run_with_its_previews_fills_its_time_and_no_more(minutes, call_s, composed):
    """Of a diffusion model, whose previews take 79 calls each, and are more in longer runs."""
    from cm_train.core.settings import typed
    from cm_train.data.datasets.base import Facts
    from cm_train.runs.config import plain_values
    from cm_train.runs.plan import settle
    from cm_train.training.config import RunConfig, dump

    values = plain_values(composed("mode=edm", "dataset=image_folder", "dataset.root=x"))

    def settled(images, like=None):
        known = None if like is None else dump(like)
        run = typed(RunConfig, settle(values, Facts(32, 3, 3800), images, known))
        return run.model_copy(update={"ema": run.ema.with_decay(run.batch_size)})

    tried = settled(5000)
    machine = Measured(1.0, 0.25, call_s, 0.1, 16, 1, 0.5, 0, 0)
    run = settled(machine.images_within(60 * minutes, settled, tried), tried)
    assert 0.85 * 60 * minutes < machine.seconds(run) < 60 * minutes + 0.5


def test_previews_come_after_a_hundredth_then_evenly_and_at_the_end(composed):
    run = parse(composed("mode=ict", "steps=1050", "preview_every=200"))
    due = [step for step in range(1, 1051) if run.draws_at(step)]
    assert due == [10, 200, 400, 600, 800, 1000, 1050]
    assert [run.num_previews(after) for after in (0, 9, 10, 199, 200, 1000, 1049, 1050)] == [7, 7, 6, 6, 5, 1, 1, 0]
    none = parse(composed("mode=ict", "steps=50", "preview_every=0"))
    assert none.num_previews() == 0 and not any(none.draws_at(step) for step in range(51))
