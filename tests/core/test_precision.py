import os

import pytest
import torch
from test_trainer import build, run  # noqa: F401 - build is a fixture

from cm_train import generate, load_denoiser
from cm_train.core.precision import LossScale, arithmetic, autocast_type
from cm_train.runs.config import parse

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
    assert autocast_type("auto", gpu, config.relative_gap) == expected
    assert autocast_type("bf16", gpu, config.relative_gap) == torch.bfloat16


def float32_flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_float32_is_float32_in_convolutions_too_unless_tf32_is_asked_for():
    """cuDNN's own default is TF32, which a GPU showed to be 7.6e-4 off."""
    before = float32_flags()
    for precision, wanted in (("fp32", False), ("bf16", False), ("auto", False), ("tf32", True)):
        with arithmetic(precision):
            assert float32_flags() == (wanted, wanted), precision
        assert float32_flags() == before
    assert autocast_type("tf32", torch.device("cuda")) is None


def test_training_previews_and_samples_all_compute_in_the_float32_that_was_asked_for(build, monkeypatch):  # noqa: F811
    from cm_train.models import denoiser
    from cm_train.runs import worker

    seen = set()
    forward = denoiser.Denoiser.forward
    monkeypatch.setattr(denoiser.Denoiser, "forward", lambda *a, **k: (seen.add(float32_flags()), forward(*a, **k))[1])
    config = build("mode=ict", "preview_every=3").config
    seen.clear()  # what building tries out is within `worker.run` there
    worker.run(config, lambda reserve_s: False)
    assert seen == {(False, False)}
    generate(load_denoiser(config.folder), range(2))
    assert seen == {(False, False)}
    generate(load_denoiser(config.folder), range(2), precision="tf32")
    assert (True, True) in seen
    config = build("mode=ict", "precision=tf32", name="tf32").config
    seen.clear()
    worker.run(config, lambda reserve_s: False)
    assert seen == {(True, True)}


def test_deterministic_sets_what_torch_needs_and_takes_it_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with arithmetic("fp32", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("mode", ["edm", "ict", "ect"])
def test_deterministic_training_meets_no_operation_without_a_deterministic_form(mode, build):  # noqa: F811
    options = ["deterministic=true", "init=random", "dataset.conditional=true", "backbone.dropout=0.2"]
    trainer = build(f"mode={mode}", *options)
    with arithmetic("auto", deterministic=True):
        run(trainer)
    assert trainer.step == 6


def test_half_precision_images_are_near_float32s(build):  # noqa: F811
    trainer = build("mode=edm", "steps=40", "optimizer.lr=0.01", "optimizer.warmup_steps=0")
    run(trainer)
    denoiser = load_denoiser(trainer.config.folder)
    exact, half = (generate(denoiser, range(16), steps=4, precision=p).float() for p in ("fp32", "bf16"))
    assert not torch.equal(exact, half)
    assert (exact - half).abs().mean() < 2


def test_a_process_that_uses_torchs_newer_switches_keeps_them():
    """Beside them torch refuses to read the older ones."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        cudnn.conv.fp32_precision = "ieee"
        before = cudnn.conv.fp32_precision, matmul.fp32_precision
        with arithmetic("tf32"):
            assert (cudnn.conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
        assert (cudnn.conv.fp32_precision, matmul.fp32_precision) == before
    finally:
        cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
    assert float32_flags() == (True, False)
