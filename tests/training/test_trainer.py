import json
import math
import shutil
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cm_train.core import rng
from cm_train.core.errors import InputError, TrainingFailed
from cm_train.core.precision import LossScale
from cm_train.core.world import ALONE
from cm_train.data.pixels import to_unit_range
from cm_train.models.checkpoints import find
from cm_train.models.checkpoints import load as loading
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.runs import worker
from cm_train.runs.config import parse
from cm_train.training.tracking import SilentTracker, Tracker
from conftest import TINY, timeless


@pytest.fixture
def build(tmp_path, composed):
    """build("mode=ct", ...) -> the trainer of a tiny digits run in tmp_path/<name>."""

    def make(*overrides, name="run", **kwargs):
        config = parse(composed(*TINY, f"run_dir={tmp_path / name}", *overrides))
        config = config.model_copy(update={"schedule_steps": config.schedule_steps or config.steps})
        config.folder.mkdir(parents=True, exist_ok=True)
        return worker.build_trainer(config, **kwargs)

    return make


@pytest.fixture
def teacher(build):
    trainer = build("mode=edm", name="teacher")
    run(trainer)
    return f"teacher={trainer.config.folder}"


def run(trainer):
    config = trainer.config
    with Tracker(config.tracking, config.folder, config.name, {}, trainer.step, config.steps) as tracker:
        return trainer.run(tracker)


def after(steps):
    """A should_stop that lets so many steps pass."""
    answers = iter([False] * steps + [True])
    return lambda reserve_s: next(answers)


def lines(trainer):
    return [json.loads(line) for line in (trainer.config.folder / "metrics.jsonl").read_text().splitlines()]


def everything(trainer):
    """Every tensor that defines the run's future."""
    state = trainer.state
    tensors = {"weights": state.weights, **state.optimizer.state_dict(), **trainer.objective.extra_state()}
    return tensors | {a.name: a.weights for a in state.averages}


def assert_same(a, b):
    a, b = everything(a), everything(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


EVERY_MODE = ["edm", "cd", "ct", "ict", "ect", "sct", "scd"]
WITH_TEACHER = ("cd", "ect", "sct", "scd")


def overrides(mode, teacher):
    return [f"mode={mode}", "backbone.dropout=0.3", "ema.extra=[0.5]", *([teacher] if mode in WITH_TEACHER else [])]


@pytest.mark.parametrize("mode", ["ict", *(pytest.param(m, marks=pytest.mark.long) for m in EVERY_MODE if m != "ict")])
def test_training_twice_gives_the_same_bits(mode, build, teacher):
    first, second = (build(*overrides(mode, teacher), name=n) for n in ("a", "b"))
    run(first)
    run(second)
    assert_same(first, second)
    assert timeless(lines(first)) == timeless(lines(second))


@pytest.mark.parametrize(
    "mode", [m if m in ("cd", "ict", "scd") else pytest.param(m, marks=pytest.mark.long) for m in EVERY_MODE]
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(mode, build, teacher):
    """Stopped at step 3, in the middle of a log window, and built anew from the folder."""
    options = [*overrides(mode, teacher), "objective.target_decay=0.9" if mode in ("cd", "ct", "ict") else "seed=0"]
    whole = build(*options, name="whole")
    run(whole)
    run(build(*options, name="parts", should_stop=after(1)))  # one step
    assert not run(build(*options, name="parts", should_stop=after(2)))
    rest = build(*options, name="parts")
    assert rest.step == 3
    run(rest)
    assert_same(whole, rest)
    assert timeless(lines(whole)) == timeless(lines(rest))


EDM2 = [
    *("backbone=edm2_xs", "backbone.channels=8", "backbone.channel_mult=[1,2]", "backbone.num_blocks=1"),
    *("backbone.attention_resolutions=[4]", "backbone.head_channels=8"),
]

FAST = ["optimizer.lr=0.1", "optimizer.warmup_steps=0", "optimizer.schedule=constant"]


def rows_of(denoiser):
    """The norm of each row of each layer of EDM2's, relative to the root of its length."""
    layers = [p.detach().flatten(1) for p in denoiser.parameters() if p.ndim > 1]
    return torch.cat([layer.norm(dim=1) / layer.shape[1] ** 0.5 for layer in layers])


def assert_of_length_one(rows):
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    "options", [["mode=edm", "objective.weighting=learned"], ["mode=ict", "objective.target_decay=0.9"]], ids=str
)
def test_resumed_run_of_normalised_weights_equals_the_uninterrupted_one(options, build):
    """Stopped at step 3; weights that were brought back to their length before they were stored are not once more."""
    options = [*options, *EDM2, "backbone.dropout=0.3", "ema.extra=[0.5]", "optimizer.lr=0.01"]
    whole = build(*options, name="whole")
    run(whole)
    assert not run(build(*options, name="parts", should_stop=after(3)))
    rest = build(*options, name="parts")
    assert rest.step == 3
    run(rest)
    assert_same(whole, rest)
    assert timeless(lines(whole)) == timeless(lines(rest))
    assert_of_length_one(rows_of(rest.objective.denoiser))


def test_weights_have_their_length_before_averages_and_target_read_them(build, monkeypatch):
    """Adam lengthens them: the optimizer's step alone would leave most rows longer."""
    trainer = build("mode=ict", "objective.target_decay=0.9", *EDM2, "optimizer=adam", *FAST)
    denoiser, seen = trainer.objective.denoiser, []
    step, after_step = trainer.state.optimizer.step, trainer.objective.after_step

    def stepped(*arguments):
        result = step(*arguments)
        seen.append(rows_of(denoiser))
        return result

    def followed(*arguments):
        seen.append(rows_of(denoiser))
        after_step(*arguments)

    monkeypatch.setattr(trainer.state.optimizer, "step", stepped)
    monkeypatch.setattr(trainer.objective, "after_step", followed)
    run(trainer)
    assert len(seen) == 12
    assert torch.cat(seen[::2]).max() > 1.001
    assert_of_length_one(torch.cat(seen[1::2]))


def test_skipped_step_leaves_normalised_weights_as_they_are(build):
    trainer = build("mode=ict", *EDM2, "optimizer.lr=0.05")
    state = trainer.state
    trainer.train_step(trainer.fetch())
    before = state.weights.clone()
    state.gradient.fill_(math.nan)
    state.advance()
    assert torch.equal(state.weights, before)
    assert state.skipped == 1


def test_run_that_starts_from_an_average_gives_its_rows_their_length(build):
    """An average of unit vectors is shorter than one: the first steps would turn it further than later ones do."""
    teacher = build("mode=edm", *EDM2, *FAST, "ema=constant", "+ema.decay=0.9", name="teacher")
    run(teacher)
    average = teacher.state.averages[0].denoiser
    assert rows_of(average).min() < 0.997
    student = build("mode=ect", *EDM2, f"teacher={teacher.config.folder}", name="student")
    assert_of_length_one(rows_of(student.objective.denoiser))
    torch.testing.assert_close(
        student.objective.denoiser.backbone.gains.values, average.backbone.gains.values, rtol=0, atol=0
    )
    x, sigma = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 4.0])
    torch.testing.assert_close(student.objective.denoiser(x, sigma), average(x, sigma), rtol=1e-3, atol=1e-3)


def test_stored_runs_keep_the_way_in_which_their_numbers_are_drawn(build, monkeypatch):
    """Whoever changes how numbers are drawn adds a version: new runs take it, those that have begun do not."""
    whole = build("mode=ict", name="whole")
    run(whole)
    run(build("mode=ict", name="begun", should_stop=after(3)))

    def other_order(size, g):
        return torch.randperm(size, generator=g).flip(0)

    def other_rows(draws, stream, draw, shape):
        return draw((len(draws.rows), *shape), rng.generator(draws.seed, stream, draws.step, "another way"))

    monkeypatch.setitem(rng._ORDERS, 2, other_order)
    monkeypatch.setitem(rng._ROWS, 2, other_rows)
    monkeypatch.setattr(rng, "NEWEST", {"order": 2, "rows": 2})
    new, begun = build("mode=ict", name="new"), build("mode=ict", name="begun")
    assert begun.step == 3
    run(begun)
    assert_same(whole, begun)
    run(new)
    assert not torch.equal(new.state.weights, whole.state.weights)
    assert checkpoint.newest_manifest(new.config.folder).versions == {"order": 2, "rows": 2}
    monkeypatch.undo()
    with pytest.raises(InputError, match="order 2'; allowed: order 1 to 1, rows 1 to 1; fix: install"):
        build("mode=ict", "steps=8", name="new")


def test_other_seed_gives_another_run(build):
    a, b = build("mode=ict", "seed=0", name="a"), build("mode=ict", "seed=1", name="b")
    assert not torch.equal(a.state.weights, b.state.weights)


@pytest.mark.parametrize("mode", ["edm", "ict"])
def test_micro_batches_change_nothing_but_memory(mode, build):
    """Only the order of summation differs; dropout masks are keyed by image, so they agree too."""
    whole = build(
        f"mode={mode}",
        "backbone.dropout=0.3",
        name="whole",
    )
    parts = build(f"mode={mode}", "backbone.dropout=0.3", "micro_batch=4", name="parts")
    for trainer in (whole, parts):
        trainer.train_step(trainer.fetch())
        trainer.train_step(trainer.fetch())
    torch.testing.assert_close(parts.state.optimizer.mean, whole.state.optimizer.mean, rtol=2e-4, atol=2e-6)
    loss = [t.state.window.close(ALONE)["loss"] for t in (whole, parts)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


@pytest.mark.long
def test_loss_falls_on_digits(build):
    trainer = build("mode=edm", "steps=120", "batch_size=64", "log_every=20", "optimizer.warmup_steps=10")
    run(trainer)
    losses = [row["loss"] for row in lines(trainer)]
    assert losses[-1] < 0.75 * losses[0]


def poison(trainer, at_step):
    """Make the data of one step NaN."""
    batch_at = trainer.loader.batch_at

    def poisoned(step, rows):
        images, labels = batch_at(step, rows)
        return (images.float() * float("nan") if step == at_step else images), labels

    trainer.loader.batch_at = poisoned


def test_a_step_that_is_not_finite_moves_nothing_but_the_step_number(build):
    trainer = build("mode=ct", "objective.target_decay=0.9")
    poison(trainer, at_step=2)
    trainer.train_step(trainer.fetch())
    trainer.train_step(trainer.fetch())
    before = {k: v.clone() for k, v in everything(trainer).items()}
    trainer.train_step(trainer.fetch())
    assert trainer.step == 3
    for name, value in everything(trainer).items():
        assert torch.equal(value, before[name]), name
    assert trainer.state.skipped.item() == 1
    trainer.train_step(trainer.fetch())
    assert not torch.equal(trainer.state.weights, before["weights"])
    assert all(torch.isfinite(v).all() for v in everything(trainer).values())


def test_skipped_steps_are_counted_in_the_log_and_left_out_of_its_means(build):
    trainer, clean = build("mode=ict", name="poisoned"), build("mode=ict", name="clean")
    poison(trainer, at_step=1)
    run(trainer)
    run(clean)
    assert [row["skipped"] for row in lines(trainer)] == [1, 1, 1]
    assert lines(trainer)[0]["loss"] != lines(clean)[0]["loss"]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in lines(trainer))


def test_a_window_without_a_finite_loss_is_null(build):
    trainer = build("mode=ict", "log_every=1")
    poison(trainer, at_step=1)
    run(trainer)
    assert [row["loss"] is None for row in lines(trainer)] == [False, True, False, False, False, False]


def test_a_line_tells_how_far_the_last_step_moved_the_weights_and_how_far_they_are_from_their_average(build):
    for optimizer in ("adam", "radam"):
        name = f"optimizer={optimizer}"
        logged = build("mode=edm", name, "log_every=3", "optimizer.clip_norm=0.1", name=optimizer)
        run(logged)
        again = build("mode=edm", name, "optimizer.clip_norm=0.1", name=f"{optimizer}-again")
        for row in lines(logged):
            while again.step < row["step"]:
                before = again.state.weights.double()
                again.train_step(again.fetch())
            weights, average = again.state.weights.double(), again.state.averages[0].weights.double()
            assert row["update_ratio"] == pytest.approx(((weights - before).norm() / before.norm()).item(), rel=1e-3)
            assert row["ema_gap"] == pytest.approx(((weights - average).norm() / weights.norm()).item(), rel=1e-3)
            assert row["update_ratio"] > 0 and row["ema_gap"] > 0
        assert_same(logged, again)  # measuring changes nothing


def test_a_line_tells_where_the_loss_comes_from(build):
    """The mean of the bands, each weighted by its share of the images, is the loss; at low noise EDM's is not small."""
    trainer = build("mode=edm", "log_every=6", "micro_batch=4")
    sigmas, draw = [], trainer.objective.draw

    def spied(*args):
        batch = draw(*args)
        sigmas.append(batch.levels["sigma"])
        return batch

    trainer.objective.draw = spied
    run(trainer)
    (row,) = lines(trainer)
    noise = trainer.config.noise
    place = (torch.cat(sigmas).double() / noise.sigma_min).log() / math.log(noise.sigma_max / noise.sigma_min)
    counts = (place * 8).long().clamp(0, 7).bincount(minlength=8)
    means = [row.get(f"loss_band_{i}", 0.0) for i in range(8)]
    assert [m > 0 for m in means] == [n > 0 for n in counts.tolist()]
    assert sum(n * m for n, m in zip(counts.tolist(), means, strict=True)) / 96 == pytest.approx(row["loss"], rel=1e-9)


def test_a_line_tells_the_share_of_skipped_steps_time_and_memory(build):
    trainer = build("mode=ict", "log_every=4", "steps=8")
    poison(trainer, at_step=1)
    run(trainer)
    first, second = lines(trainer)
    assert (first["skipped_share"], second["skipped_share"]) == (0.25, 0.0)
    assert (first["epoch"], second["epoch"]) == (round(64 / 1797, 4), round(128 / 1797, 4))
    assert 0 < first["time_s"] <= second["time_s"] < 100
    assert 0.05 < first["memory_gib"] < 50, "the process's own"


def test_time_goes_on_where_the_command_before_stopped(build):
    run(build("mode=ict", should_stop=after(3)))
    file = build("mode=ict").config.folder / "metrics.jsonl"
    (row,) = (json.loads(line) for line in file.read_text().splitlines())
    file.write_text(json.dumps(row | {"time_s": 1000.0}) + "\n")
    resumed = build("mode=ict")
    run(resumed)
    assert [1000 <= row["time_s"] < 1100 for row in lines(resumed)] == [True] * 3


def test_lr_ema_and_curriculum_are_functions_of_the_step(build):
    trainer = build("mode=ict", "steps=40", "optimizer.warmup_steps=4", "noise.curriculum.s1=1280", "log_every=1")
    run(trainer)
    rows = lines(trainer)
    assert [r["step"] for r in rows] == list(range(1, 41))
    assert [r["images"] for r in rows] == [16 * (i + 1) for i in range(40)]
    assert rows[0]["lr"] == pytest.approx(3e-4 / 5)
    assert rows[10]["lr"] == pytest.approx(3e-4)
    # 8 stages of 5 steps: 11, 21, ... 1281.
    assert [r["num_scales"] for r in rows[::5]] == [10 * 2**i + 1 for i in range(8)]


def test_gradient_clipping_is_applied(build):
    free, clipped = build("mode=edm", name="a"), build("mode=edm", "optimizer.clip_norm=1e-3", name="b")
    for trainer in (free, clipped):
        trainer.train_step(trainer.fetch())
    # After one step the first moment is (1 - beta1) times the gradient.
    assert free.state.optimizer.mean.norm() / 0.1 > 1e-2
    assert clipped.state.optimizer.mean.norm().item() / 0.1 == pytest.approx(1e-3, rel=1e-3)


def test_several_averages_are_kept_and_saved(build, tmp_path):
    trainer = build("mode=ict", "ema=constant", "ema.decay=0.9", "ema.extra=[0.5,0.99]")
    run(trainer)
    _folder, manifest = find.resolve(tmp_path / "run")
    assert manifest.ema == "ema_0.9"
    for average in trainer.state.averages:
        loaded = loading.load_denoiser(tmp_path / "run", average.name)
        for (name, ours), theirs in zip(average.denoiser.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    a, b = (loading.load_denoiser(tmp_path / "run", f"ema_{d}") for d in (0.5, 0.99))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_ema_after_two_steps_by_hand(build):
    trainer = build("mode=edm", "ema=constant", "ema.decay=0.75")
    w0 = trainer.state.weights.clone()
    trainer.train_step(trainer.fetch())
    w1 = trainer.state.weights.clone()
    trainer.train_step(trainer.fetch())
    expected = 0.75 * (0.75 * w0 + 0.25 * w1) + 0.25 * trainer.state.weights
    torch.testing.assert_close(trainer.state.averages[0].weights, expected)


def test_target_follows_the_weights_that_the_step_made(build):
    """Not those from before it, nor the sampling average."""
    options = ["objective.target_decay=0.75", "objective.target_schedule=constant"]
    trainer = build("mode=ct", *options, "optimizer.lr=0.1", "optimizer.warmup_steps=0")
    weights = trainer.state.weights.clone()
    assert torch.equal(trainer.objective.target_weights, weights)
    trainer.train_step(trainer.fetch())
    moved = trainer.state.weights - weights
    assert moved.norm() > 1e-3 * weights.norm()
    torch.testing.assert_close(trainer.objective.target_weights, weights + 0.25 * moved)


def test_schedules_count_to_schedule_steps_however_long_the_run(build):
    short, longer = (
        build("mode=ict", "optimizer.schedule=cosine", f"steps={steps}", "schedule_steps=40", name=str(steps))
        for steps in (40, 80)
    )
    for step in (0, 5, 39, 40, 79):
        assert longer.objective.schedule(step) == short.objective.schedule(step)
        assert longer.state.optimizer.lr(step) == short.state.optimizer.lr(step)
    assert short.objective.schedule(39)["num_scales"] == 21  # as suits a run of 40 steps
    assert short.state.optimizer.lr(40) == 0


def test_student_starts_as_its_teacher(build, teacher):
    trainer = build("mode=cd", teacher)
    theirs = dict(trainer.objective.teacher.named_parameters())
    for name, parameter in trainer.objective.denoiser.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    config = trainer.objective.denoiser.config
    assert (config.kind, config.boundary) == ("consistency", "sigma_min")
    assert trainer.objective.denoiser.config.sigma_data == trainer.objective.teacher.config.sigma_data


def test_random_init_ignores_the_teacher(build, teacher):
    trainer = build("mode=cd", teacher, "init=random")
    theirs = dict(trainer.objective.teacher.named_parameters())
    assert any(not torch.equal(p, theirs[n]) for n, p in trainer.objective.denoiser.named_parameters())


def test_sigma_data_is_measured_on_the_data(build):
    assert build("mode=edm").objective.denoiser.config.sigma_data == pytest.approx(0.752, abs=0.002)
    assert build("mode=edm", "noise.sigma_data=0.5", name="b").objective.denoiser.config.sigma_data == 0.5


def test_previews_show_the_ema_and_measure_agreement(build, teacher, tmp_path):
    trainer = build("mode=cd", teacher, "preview_every=6")
    run(trainer)
    assert (tmp_path / "run" / "samples" / "step_00000006.png").stat().st_size > 500
    measured = [row for row in lines(trainer) if "agreement_rms" in row]
    assert [row["step"] for row in measured] == [6]
    assert 0 < measured[0]["agreement_rms"] < 2
    assert math.isfinite(measured[0]["agreement_std_ratio"])


def test_time_left_has_previews_and_saves_in_it(build):
    """At step 2 of 10: previews at 4, 8 and 10, saves at 3, 6, 9 and at the end, which is waited for."""
    trainer = build("mode=ict", "steps=10", "preview_every=4", "save_every=3")
    trainer.saver = SimpleNamespace(longest_s=1000.0)
    trainer.previews.took_s, trainer._save_s = 10.0, 1.0
    assert trainer._beside_s(2) == 30 + 3 + 1000
    assert trainer._beside_s(9) == 10 + 0 + 1000
    assert trainer._beside_s(10) == 0
    rare = build("mode=ict", "steps=10", "preview_every=0", "save_every=15m", name="rare")
    rare.saver, rare._save_s = trainer.saver, 1.0
    assert rare._beside_s(2) == 1000


def test_the_tracker_hears_what_is_being_done(build):
    heard = []

    class Listener(SilentTracker):
        def step(self, step):
            heard.append(step)

        @contextmanager
        def doing(self, what):
            heard.append(what)
            yield

        def log(self, values, picture=None, beside_s=0.0):
            heard.append(f"log {values['step']}")

    build("mode=ict", "steps=4", "log_every=3", "preview_every=2", "save_every=3").run(Listener())
    log_2, log_3, log_4 = (f"log {step}" for step in (2, 3, 4))
    assert heard == [1, 2, "preview", log_2, 3, log_3, "saving", 4, "preview", log_4, "saving"]


def test_class_conditional_training_uses_the_labels(build):
    trainer = build("mode=edm", "dataset.conditional=true")
    run(trainer)
    table = trainer.objective.denoiser.backbone.embed_label.weight
    assert table.shape[0] == 10
    assert trainer.state.optimizer.square.count_nonzero() > 0
    denoiser = loading.load_denoiser(trainer.config.folder)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    one, two = (denoiser(x, sigma, torch.full((2,), c)) for c in (1, 2))
    assert not torch.equal(one, two)


def test_failed_save_keeps_the_run_alive_and_the_last_one_raises(build, monkeypatch, capsys):
    original, fails = saving.write, [3]

    def write(folder, *args, step, **kwargs):
        if step in fails:
            raise OSError(28, "No space left on device")
        original(folder, *args, step=step, **kwargs)

    monkeypatch.setattr(saving, "write", write)
    trainer = build("mode=ict")
    run(trainer)
    assert checkpoint.latest(trainer.config.folder)[1].step == 6
    assert "could not save step 3: No space left on device" in capsys.readouterr().err
    fails.append(6)
    with pytest.raises(TrainingFailed, match="step 6 could not be written: No space"):
        run(build("mode=ict", name="other"))


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(build):
    trainer = build("mode=ict", "max_skipped=2", "log_every=1", "save_every=1", "steps=20")
    for step in (1, 4, 5):
        poison(trainer, at_step=step)
    with pytest.raises(TrainingFailed, match=r"last 2 steps, to step 6.*last good checkpoint: .*step_00000005;"):
        run(trainer)
    assert trainer.state.skipped == 3


def test_bad_steps_in_a_row_are_counted_across_a_resume(build):
    options = ["mode=ict", "max_skipped=2", "log_every=1", "steps=20"]
    trainer = build(*options, should_stop=after(5))
    poison(trainer, at_step=4)
    run(trainer)
    resumed = build(*options)
    poison(resumed, at_step=5)
    with pytest.raises(TrainingFailed, match="last 2 steps, to step 6"):
        run(resumed)


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too(build):
    trainer = build("mode=ict")
    forward = trainer.objective.forward

    def infinite(batch):
        loss, metrics = forward(batch)
        return loss + torch.inf, metrics

    trainer.objective.forward = infinite
    before = trainer.state.weights.clone()
    trainer.train_step(trainer.fetch())
    assert trainer.state.skipped == 1
    assert torch.equal(trainer.state.weights, before)


def test_the_trainer_asks_to_stop_early_enough_for_a_step_and_a_save(build):
    asked = []
    trainer = build("mode=ict", "save_every=1", should_stop=lambda reserve_s: asked.append(reserve_s))
    run(trainer)
    guess = 2 * trainer.state.weights.nbytes * 5 / 100e6  # before a save was seen: weights, average, moments, target
    assert asked[0] == pytest.approx(guess)
    assert asked == sorted(asked)
    assert asked[-1] > guess, "steps and saves have been seen since"


def test_an_unreadable_image_ends_the_run_with_everything_saved(build):
    trainer = build("mode=ict", "micro_batch=8")
    batch_at = trainer.loader.batch_at

    def broken(step, rows):
        if step == 4 and rows.start == 8:
            raise InputError("image 7.png can't be read")
        return batch_at(step, rows)

    trainer.loader.batch_at = broken
    with pytest.raises(InputError, match=r"7\.png"):
        run(trainer)
    assert checkpoint.latest(trainer.config.folder)[1].step == 4


def test_a_run_stopped_before_its_first_step_saves_nothing_and_starts_anew(build):
    trainer = build("mode=ict", should_stop=after(0))
    assert not run(trainer)
    assert checkpoint.latest(trainer.config.folder) is None
    assert build("mode=ict", "optimizer.lr=0.5").step == 0


def test_fp16_loss_scale_starts_high_when_precision_changes_on_resume(build):
    run(build("mode=ict", should_stop=after(1)))
    trainer = build("mode=ict")
    trainer.autocast = torch.float16  # as a GPU would have it
    trainer.state.loss_scale = LossScale(torch.float16, trainer.device)
    trainer.resume(*checkpoint.latest(trainer.config.folder))
    assert trainer.state.loss_scale.factor == 2.0**16


def test_an_init_checkpoint_is_needed_at_the_start_only(build, tmp_path):
    source = build("mode=ict", name="source")
    run(source)
    option = f"init={source.config.folder}"
    trainer = build("mode=ict", option, should_stop=after(1))
    assert torch.equal(trainer.state.weights, source.state.averages[0].weights)
    run(trainer)
    shutil.rmtree(source.config.folder)
    assert build("mode=ict", option).step == 1


def test_old_checkpoints_are_pruned(build):
    trainer = build("mode=ict", "save_every=1", "keep=2")
    run(trainer)
    names = sorted(p.name for p in (trainer.config.folder / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006"]


def test_resume_refuses_changed_data(build):
    run(build("mode=ict", should_stop=after(1)))
    with pytest.raises(InputError, match="the dataset of .* changed"):
        build("mode=ict", "dataset.split=test")


def test_teacher_of_another_kind_is_refused(build, teacher, composed):
    student = build("mode=ict", name="student")
    run(student)
    with pytest.raises(InputError, match="is not a diffusion model"):
        build("mode=cd", f"teacher={student.config.folder}", name="b")
    with pytest.raises(InputError, match="has other classes"):
        build("mode=cd", teacher, "dataset.conditional=true", name="c")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["edm", "cd", "ict", "ect", "scd"])
def test_objective_traces_whole(mode, build, teacher):
    """No graph break: nothing in forward draws, branches on data or leaves the graph."""
    trainer = build(*overrides(mode, teacher))
    trainer.model = torch.compile(trainer.objective, fullgraph=True, backend="eager")
    plain = build(*overrides(mode, teacher), name="plain")
    for t in (trainer, plain):
        t.train_step(t.fetch())
    torch.testing.assert_close(trainer.state.optimizer.mean, plain.state.optimizer.mean)


def test_student_takes_over_what_its_first_weights_were_told(build, teacher):
    source = build("mode=edm", "noise.c_noise=angle", "noise.sigma_data=0.5", name="source")
    run(source)
    option = f"init={source.config.folder}"
    settings = build("mode=ict", option, name="a").objective.denoiser.config
    assert (settings.c_noise, settings.sigma_data) == ("angle", 0.5)
    settings = build("mode=cd", teacher, option, name="b").objective.denoiser.config
    assert (settings.c_noise, settings.sigma_data) == ("angle", 0.5)
    for wrong in ("noise.c_noise=log_sigma", "noise.sigma_data=0.25"):
        with pytest.raises(InputError, match=wrong.split("=")[0]):
            build("mode=ict", option, wrong, name="c")
    free = build("mode=cd", teacher, "init=random", "noise.sigma_data=0.25", name="d").objective.denoiser.config
    assert (free.c_noise, free.sigma_data) == ("log_sigma", 0.25)


def gradient(objective, batch, dtype):
    objective.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        objective(batch)[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in objective.denoiser.parameters()])


@pytest.mark.long
def test_gradient_of_a_fine_grid_keeps_its_direction_in_fp16_and_not_in_bf16(build):
    """Cosine with float32's gradient, of iCT's loss of a network that denoises well: what `auto` goes by."""
    trainer = build("mode=edm", "steps=600", "batch_size=128", "optimizer.warmup_steps=50", "ema.decay=0.98")
    run(trainer)
    start = f"init={trainer.config.folder}"
    found = {}
    for num_scales in (81, 1281):
        grid = [f"noise.curriculum.{s}={num_scales - 1}" for s in ("s0", "s1")]
        objective = build("mode=ict", start, *grid, name=f"ict{num_scales}").objective
        images, _ = trainer.loader.batch_at(0, range(128))
        batch = objective.draw(to_unit_range(images), None, 0, range(128))
        exact = gradient(objective, batch, None)
        for t in (torch.float16, torch.bfloat16):
            half = gradient(objective, batch, t)
            found[num_scales, t] = torch.cosine_similarity(half, exact, dim=0).item()
    print(found)
    assert min(found[81, t] for t in (torch.float16, torch.bfloat16)) > 0.98
    assert found[1281, torch.float16] > 0.98
    assert found[1281, torch.bfloat16] < 0.95


def test_a_finished_run_lets_go_of_all_it_held(build, monkeypatch):
    """A teacher and its student are two runs of one process, and a GPU has room for one of them."""
    held, build_trainer = [], worker.build_trainer

    def spied(*args):
        trainer = build_trainer(*args)
        held.extend(weakref.ref(part) for part in (trainer, trainer.objective, trainer.loader, trainer.state.weights))
        return trainer

    config = build("mode=ict", "preview_every=3").config
    monkeypatch.setattr(worker, "build_trainer", spied)
    assert worker.run(config, lambda reserve_s: False)
    assert len(held) == 4
    assert not any(part() for part in held)
