"""The closed registry and the typed settings: what a config may say, and what it is told where it is wrong."""

import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.settings import Settings, typed
from cm_train.models.backbones.unet import UNet, UNetConfig
from cm_train.objectives.noise import LogNormal


class Inner(Settings):
    width: Annotated[int, Field(ge=1, le=8)] = 4


class Outer(Settings):
    count: int
    rate: Annotated[float, Field(gt=0)] = 0.5
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    many: list[Inner] = []


def refusal(values, cls=Outer):
    """The message that `values` are refused with; every one fits one line."""
    with pytest.raises(InputError) as caught:
        typed(cls, values, "outer")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_input_error_is_one_line_with_what_got_allowed_and_fix():
    message = str(InputError("bad\n  name", "x\ny", "a, b", "write a"))
    assert message == r"bad name; got 'x\ny'; allowed: a, b; fix: write a"
    assert issubclass(InputError, ValueError)


def test_find_returns_the_registered_class():
    assert registry.find("backbone", "unet") is UNet
    assert registry.find("proposal", "lognormal") is LogNormal


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("proposal", {"lognormal", "uniform"}),
        ("curriculum", {"constant", "doubling", "sqrt"}),
        ("optimizer", {"adam", "radam"}),
        ("decay", {"constant", "warmup"}),
        ("backbone", {"unet"}),
    ],
)
def test_names_are_sorted_and_of_one_kind(kind, some):
    names = registry.names(kind)
    assert some <= set(names)
    assert names == sorted(names)
    assert "unet" not in names or kind == "backbone"


def test_find_lists_the_allowed_names_and_the_nearest_for_an_unknown_one():
    with pytest.raises(InputError) as caught:
        registry.find("curriculum", "doublin")
    message = str(caught.value)
    assert "curriculum" in message
    assert "'doublin'" in message
    assert "\n" not in message
    assert all(name in message for name in ("constant", "doubling", "sqrt"))
    assert "curriculum.name=doubling" in message


def test_find_suggests_nothing_where_nothing_is_near():
    with pytest.raises(InputError) as caught:
        registry.find("curriculum", "zzzz")
    assert "fix" not in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ["adam"], {"name": "adam"}])
def test_find_refuses_a_name_that_is_not_text(name):
    with pytest.raises(InputError, match=r"allowed: .*radam"):
        registry.find("optimizer", name)


@pytest.mark.parametrize(
    "name",
    ["os.system", "torch.nn.Linear", "cm_train.core.rng.key", "intruder", "intruder.Net", "../intruder", "__import__"],
)
def test_find_never_reaches_code_that_a_config_names(name, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('a config ran code')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("backbone", "optimizer"):
        with pytest.raises(InputError, match=f"unknown {kind}"):
            registry.make(kind, {"name": name})
    assert "intruder" not in sys.modules


def test_find_keeps_kinds_apart():
    with pytest.raises(InputError):
        registry.find("optimizer", "unet")


def test_register_refuses_a_second_class_of_the_same_name():
    with pytest.raises(ValueError, match="optimizer 'adam' is registered twice"):
        registry.register(type("Other", (), {"Config": registry.find("optimizer", "adam").Config}))
    assert registry.find("optimizer", "adam").__name__ == "Adam"


def test_settings_types_the_config_of_the_named_component():
    config = registry.settings("backbone", {"name": "unet", "channels": 64})
    assert isinstance(config, UNetConfig)
    assert config.channels == 64
    assert config.channel_mult == [1, 2, 3, 4]


def test_settings_names_the_component_and_key_that_is_wrong():
    with pytest.raises(InputError, match=r"backbone\.channels.*'64'"):
        registry.settings("backbone", {"name": "unet", "channels": "64"})


@pytest.mark.parametrize("values", ["unet", None, 3])
def test_settings_refuses_what_is_not_a_group(values):
    with pytest.raises(InputError, match="group of keys"):
        registry.settings("optimizer", values)


def test_build_passes_further_arguments_to_the_class():
    net = registry.make(
        "backbone",
        {"name": "unet", "channels": 8, "channel_mult": [1], "group_channels": 4, "head_channels": 8, "num_blocks": 1},
        4,
        1,
        num_classes=5,
    )
    assert isinstance(net, UNet)
    assert net.num_classes == 5


def test_typed_fills_defaults():
    config = typed(Outer, {"count": 1})
    assert (config.count, config.rate, config.flag, config.kind, config.inner.width) == (1, 0.5, False, "a", 4)


@pytest.mark.parametrize("value", ["3", 3.0, True, None, [3]])
def test_typed_refuses_what_is_not_an_int_for_an_int(value):
    assert "outer.count" in refusal({"count": value})


def test_typed_takes_an_int_for_a_float():
    rate = typed(Outer, {"count": 1, "rate": 2}).rate
    assert rate == 2.0
    assert isinstance(rate, float)


@pytest.mark.parametrize("value", ["0.5", True, None])
def test_typed_refuses_what_is_not_a_number_for_a_float(value):
    assert "outer.rate" in refusal({"count": 1, "rate": value})


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_typed_refuses_what_is_not_a_bool_for_a_bool(value):
    assert "outer.flag" in refusal({"count": 1, "flag": value})


def test_typed_names_a_missing_key():
    message = refusal({})
    assert "outer.count is missing" in message
    assert "outer.count=..." in message


def test_typed_lists_the_known_keys_and_the_nearest_for_an_extra_one():
    message = refusal({"count": 1, "rat": 2})
    assert "outer.rat" in message
    assert "count, rate, flag, kind, inner, many" in message
    assert "did you mean rate?" in message


def test_typed_lists_the_choices_of_a_literal():
    message = refusal({"count": 1, "kind": "c"})
    assert "outer.kind" in message
    assert "'a'" in message
    assert "'b'" in message
    assert "'c'" in message


@pytest.mark.parametrize("value", [0, -1.5])
def test_typed_holds_a_bound_that_is_excluded(value):
    assert "outer.rate" in refusal({"count": 1, "rate": value})


def test_typed_holds_bounds_that_are_included():
    assert typed(Outer, {"count": 1, "inner": {"width": 1}}).inner.width == 1
    assert typed(Outer, {"count": 1, "inner": {"width": 8}}).inner.width == 8
    for value in (0, 9):
        message = refusal({"count": 1, "inner": {"width": value}})
        assert "outer.inner.width" in message
        assert str(value) in message


def test_typed_nests_settings_given_as_plain_dicts():
    config = typed(Outer, {"count": 1, "inner": {"width": 2}, "many": [{"width": 3}, {}]})
    assert isinstance(config.inner, Inner)
    assert config.inner.width == 2
    assert [inner.width for inner in config.many] == [3, 4]


def test_typed_is_strict_in_nested_settings_too():
    assert "outer.inner.width" in refusal({"count": 1, "inner": {"width": "2"}})
    assert "outer.many.1.width" in refusal({"count": 1, "many": [{}, {"width": True}]})


def test_typed_lists_the_keys_of_the_nested_group_for_an_extra_one_in_it():
    message = refusal({"count": 1, "inner": {"widht": 2}})
    assert "outer.inner.widht" in message
    assert "allowed: width" in message
    assert "did you mean width?" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_typed_refuses_numbers_that_are_not_finite(value):
    """YAML has .nan and .inf; nothing that a config sets can mean either, and both train to NaN without a word."""

    class Plain(Settings):
        mean: float = 0.0

    assert "outer.mean" in refusal({"mean": value}, Plain)


def test_typed_does_not_change_the_values_it_is_given():
    values = {"count": 1, "inner": {"width": 2}}
    typed(Outer, values)
    assert values == {"count": 1, "inner": {"width": 2}}


def test_settings_are_frozen():
    config = typed(Outer, {"count": 1})
    with pytest.raises(ValidationError, match="frozen"):
        config.count = 2


def test_input_error_stays_one_line_for_values_with_line_breaks():
    assert "outer.count" in refusal({"count": "a\nb"})


def test_a_person_may_write_an_integer_with_an_exponent_and_a_program_may_not():
    """1e5 is read as the float 100000.0; also deeper down, and where another word would do too."""

    class Wide(Outer):
        every: int | str = 1
        most: Annotated[int, Field(ge=1)] | None = None
        either: int | float = 0

    values = {"count": 1e5, "rate": 1e1, "inner": {"width": 8e0}, "every": 2e3, "most": 3e3, "either": 4e0}
    config = typed(Wide, values, as_written=True)
    found = [config.count, config.inner.width, config.every, config.most]
    assert found == [100000, 8, 2000, 3000] and all(type(value) is int for value in found)
    assert type(config.rate) is float and type(config.either) is float
    assert "outer.count" in refusal({"count": 1e5})
    for wrong in ({"count": 100.5}, {"count": 2.0**54}, {"count": float("inf")}, {"count": 1, "flag": 1.0}):
        with pytest.raises(InputError, match="got"):
            typed(Outer, wrong, as_written=True)
    with pytest.raises(InputError, match=r"width: input should be less than or equal to 8; got '9'"):
        typed(Outer, {"count": 1, "inner": {"width": 9e0}}, as_written=True)
