"""What `auto` comes to: a pure function of the images, the mode and the length of the run."""

import itertools

import pytest
import torch

from cm_train.core import configs, registry
from cm_train.core.errors import InputError
from cm_train.core.keys import all_keys
from cm_train.data.datasets.base import Facts
from cm_train.runs import sizes as usual
from cm_train.runs.config import parse
from cm_train.runs.plan import settle, settle_as, settle_plainly
from cm_train.runs.sizes import AUTO
from cm_train.training.config import dump

MODES = sorted(path.stem for path in (configs.conf_dir() / "mode").glob("*.yaml"))
DIGITS, PHOTOS = Facts(8, 1, 1797), Facts(64, 3, 30_000)


@pytest.fixture
def values(composed):
    """values(mode) -> the plain values of its config, with every `auto` in them."""
    from cm_train.runs.config import plain_values

    return lambda *words: plain_values(composed(*words))


def autos(values):
    found = {key for key in all_keys(values) if at(values, key) == AUTO}
    return {
        key
        for key in found
        if key not in ("devices", "precision", "compile", "micro_batch", "teacher_budget", "tracking.previews")
    }


def at(values, key):
    for part in key.split("."):
        values = values.get(part, values.get(int(part)) if part.isdigit() else None)
    return values


@pytest.mark.parametrize("mode", MODES)
def test_settle_leaves_nothing_open_and_changes_nothing_that_is_given(mode, values):
    given = values(f"mode={mode}", "dataset=image_folder", "dataset.root=x")
    for facts in (DIGITS, PHOTOS, Facts(28, 1, 60_000), Facts(32, 3, 1_281_167), Facts(128, 3, 3)):
        settled = settle(given, facts)
        assert not autos(settled)
        for key in set(all_keys(given)) - autos(given):
            if not isinstance(at(given, key), dict):
                assert at(settled, key) == at(given, key), (key, facts)
        assert settle(settled, PHOTOS, 1) == settled, "settled once"


def test_settle_keeps_what_somebody_has_set(values):
    given = values(
        "mode=ict", "steps=400", "optimizer.lr=0.5", "backbone.channels=48", "preview_every=7", "batch_size=32"
    )
    settled = settle(given, DIGITS)
    kept = {"steps": 400, "optimizer.lr": 0.5, "backbone.channels": 48, "preview_every": 7, "batch_size": 32}
    assert {key: at(settled, key) for key in kept} == kept
    assert at(settled, "optimizer.warmup_steps") == 20, "a twentieth of the run, however short"


def test_settle_is_stated_in_images(values):
    """Half the batch means twice the steps, and the same half-life, warm-up and curriculum in images."""
    whole, half = (settle(values("mode=edm", f"batch_size={size}"), DIGITS) for size in (128, 64))
    assert half["steps"] == 2 * whole["steps"]
    assert at(half, "ema.half_life_images") == at(whole, "ema.half_life_images")
    assert at(half, "optimizer.warmup_steps") == 2 * at(whole, "optimizer.warmup_steps")


def test_settle_suits_a_number_of_images(values):
    for images in (100_000, 1_000_000, 50_000_000):
        settled = settle(values("mode=ict"), PHOTOS, images)
        assert settled["steps"] * settled["batch_size"] == pytest.approx(images, rel=0.01)
    short, long = (settle(values("mode=ict"), PHOTOS, images) for images in (20_000, 10_000_000))
    assert short["batch_size"] < long["batch_size"] == 128, "a short run has more steps than it would have"
    assert at(short, "noise.curriculum.s1") < at(long, "noise.curriculum.s1") == 1280


def test_known_values_of_the_rules(values):
    """Digits' settings before there were rules, to rounding: they were tuned by hand."""
    rows = {
        "cd": (1200, 1e-3, "cosine", 0.95),
        "edm": (2000, 1e-3, "cosine", None),
        "ct": (4000, 1e-3, "constant", 0.0),
        "ict": (5000, 3e-4, "constant", 0.0),
        "ect": (2500, 3e-4, "constant", None),
        "scd": (1200, 5e-4, "cosine", None),
    }
    for mode, row in rows.items():
        settled = settle(values(f"mode={mode}"), DIGITS)
        found = (settled["steps"], *(at(settled, f"optimizer.{key}") for key in ("lr", "schedule")))
        assert (*found, at(settled, "objective.target_decay")) == row, mode
        assert (settled["batch_size"], at(settled, "backbone.channels"), at(settled, "backbone.dropout")) == (
            128,
            24,
            0,
        )


def test_rate_of_edm2_is_ten_times_as_high(values):
    """Its weights keep their length: Karras et al. 2024 train at 0.012 / sqrt(channels / 128), ECT on it at 1e-3."""
    names = ("edm2_xs", "ddpmpp_cifar10", "unet_s")
    sizes = ("backbone.channels=32", "backbone.channel_mult=[1,2,2]")
    rates = {name: at(settle(values("mode=edm", f"backbone={name}", *sizes), DIGITS), "optimizer.lr") for name in names}
    assert rates == {"edm2_xs": 1e-2, "ddpmpp_cifar10": 1e-3, "unet_s": 1e-3}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12, 13, 16, 24, 28, 32, 48, 50, 64, 96, 100, 128, 256])
def test_network_can_be_built_for_every_size(size, channels):
    for count in (1, 1000, 100_000, 1_000_000):
        sizes = usual.network(Facts(size, channels, count))
        config = registry.settings("backbone", {"name": "unet", **sizes})
        with torch.device("meta"):
            network = registry.build(config, size, channels, 0)
            assert network(torch.empty(1, channels, size, size), torch.empty(1)).shape == (1, channels, size, size)


def test_network_is_wider_for_more_images():
    widths = [usual.network(Facts(64, 3, count))["channels"] for count in (3000, 30_000, 1_000_000)]
    assert widths == sorted(set(widths))


def test_dropout_comes_where_images_come_often(values):
    drops = [
        at(settle(values("mode=ict"), Facts(32, 3, count), 1_000_000), "backbone.dropout")
        for count in (1000, 5000, 50_000)
    ]
    assert drops == [0.2, 0.1, 0.0]


def test_previews_take_a_twentieth_of_the_run_at_most(values):
    for mode, facts in itertools.product(("edm", "ict"), (DIGITS, PHOTOS)):
        settled = settle(values(f"mode={mode}"), facts)
        images, num = settled["steps"] * settled["batch_size"], settled["steps"] / settled["preview_every"]
        calls, step_calls = (79, 3) if mode == "edm" else (1, 6)
        assert 2 <= round(num) <= 20 and num * 64 * calls <= 0.06 * images * step_calls


def test_a_run_that_took_over_another_network_goes_on_with_that(values, composed):
    """`auto` is a unet; a student of a songunet has no sizes that would do for one."""
    stored = dump(parse(composed("mode=edm", "backbone=ddpmpp_cifar10", "backbone.dropout=0.1")))
    for words, dropout in (([], 0.1), (["backbone.dropout=0.25"], 0.25)):
        settled = settle_as(values("mode=edm", *words), stored)
        assert settled["backbone"] == stored["backbone"] | {"dropout": dropout}
    asked = settle_as(values("mode=edm", "backbone=unet_s"), stored)
    assert at(asked, "backbone.name") == "unet"


def test_settle_plainly_takes_what_components_say_themselves(values):
    given = values("mode=ict", "recipe=none", "steps=10", "batch_size=4")
    plain = settle_plainly(given, DIGITS)
    assert "s1" not in plain["noise"]["curriculum"] and "lr" not in plain["optimizer"]
    assert at(plain, "backbone.channels") == 24, "the network is a matter of size"
    assert not autos(plain)


def test_settle_as_takes_the_numbers_of_the_run_that_goes_on(composed, values):
    stored = parse(composed("mode=edm", "steps=77", "optimizer.lr=0.25", "backbone=unet_s"))
    again = settle_as(values("mode=edm", "dataset=image_folder", "dataset.root=x"), dump(stored))
    assert (again["steps"], at(again, "optimizer.lr"), at(again, "backbone.channels")) == (77, 0.25, 32)
    assert at(again, "ema.decay") == stored.ema.decay and at(again, "ema.half_life_images") is None


def test_a_mode_of_somebody_elses_is_settled_too(values):
    given = values("mode=ict") | {"mode": "mine"}
    assert not autos(settle(given, DIGITS))


@pytest.mark.parametrize("text", ["", "m", "0m", "-5m", "5", "5 m", "1e3h", "20MM", "5w"])
def test_budget_that_says_nothing_is_refused(text):
    from cm_train.training.budget import Budget

    with pytest.raises(InputError, match="can't read budget"):
        Budget.parse("budget", text)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("30m", 1800, "s"), ("1.5h", 5400, "s"), ("90s", 90, "s"), ("2d", 172_800, "s"), ("20M", 2e7, "images")],
)
def test_budget_is_a_time_or_a_number_of_images(text, amount, unit):
    from cm_train.training.budget import Budget

    assert Budget.parse("budget", text) == Budget(amount, unit)
