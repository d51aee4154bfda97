import pytest
import torch

from cm_train.config import parse
from cm_train.precision import LossScale, autocast_type, compiles

CPU = torch.device("cpu")


def test_loss_scale_halves_on_overflow_and_doubles_after_2000_clean_steps():
    scale = LossScale(torch.float16, CPU)
    assert scale.factor == 2**16
    scale.update(torch.tensor(0.0))
    assert scale.factor == 2**15
    for _ in range(1999):
        scale.update(torch.tensor(1.0))
    assert scale.factor == 2**15
    scale.update(torch.tensor(1.0))
    assert scale.factor == 2**16
    assert scale.clean_steps == 0


def test_loss_scale_never_falls_below_one():
    scale = LossScale(torch.float16, CPU)
    for _ in range(40):
        scale.update(torch.tensor(0.0))
    assert scale.factor == 1


def test_loss_scale_goes_on_from_its_state_and_ignores_that_of_another_precision():
    scale = LossScale(torch.float16, CPU)
    for applied in (0.0, 1.0, 1.0):
        scale.update(torch.tensor(applied))
    again = LossScale(torch.float16, CPU)
    again.load({name: value.clone() for name, value in scale.state().items()})
    assert (again.factor, again.clean_steps) == (2**15, 2)
    again.load(LossScale(None, CPU).state())
    assert again.factor == 2**15


def test_loss_scale_is_one_outside_of_fp16():
    scale = LossScale(torch.bfloat16, CPU)
    scale.update(torch.tensor(0.0))
    assert scale.factor == 1
    assert scale.state() == {}


def test_auto_is_plain_float32_on_a_cpu():
    assert autocast_type("auto", CPU) is None
    assert autocast_type("bf16", CPU) == torch.bfloat16
    assert not compiles("auto", CPU)
    assert compiles("true", CPU)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["mode=edm"], torch.bfloat16),
        (["mode=cd"], torch.bfloat16),
        (["mode=ct"], torch.bfloat16),  # 151 points
        (["mode=ict"], torch.float16),  # 1281 points
        (["mode=ict", "noise.curriculum.s1=80"], torch.bfloat16),
        (["mode=ect"], torch.float16),  # levels 1 / 256 apart in the last stage
        (["mode=ect", "objective.num_stages=3"], torch.bfloat16),
        (["mode=sct"], torch.bfloat16),
        (["mode=scd"], torch.bfloat16),
    ],
)
def test_auto_takes_fp16_where_bf16_can_not_tell_a_pair_apart(options, expected, composed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config = parse(composed(*options))
    gpu = torch.device("cuda")
    assert autocast_type("auto", gpu, config.gap()) == expected
    assert autocast_type("bf16", gpu, config.gap()) == torch.bfloat16
