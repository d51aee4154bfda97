"""Classifier-free guidance and label dropout: numbers, refusals, and the whole way through a run."""

import pytest
import torch
from test_objectives import small_denoiser
from torch import nn

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.models.backbones.unet import UNetConfig
from cm_train.models.denoiser import Denoiser, DenoiserConfig, build_denoiser
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule
from cm_train.sampling.generate import generate
from cm_train.sampling.guidance import Guided, guided
from conftest import TINY, wait_for


def conditional(kind="diffusion", boundary="zero", null_label=True):
    config = DenoiserConfig(
        kind=kind,
        boundary=boundary,
        image_size=8,
        image_channels=1,
        num_classes=3,
        null_label=null_label,
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
    )
    backbone = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]}
    torch.manual_seed(0)
    denoiser = build_denoiser(config, UNetConfig(**backbone, head_channels=8, group_channels=4))
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.1)
    return denoiser.eval()


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guided_denoiser_is_the_weighted_sum_of_two_passes(guidance):
    """D_null + g (D_label - D_null), the null label being the one after the classes."""
    denoiser = conditional()
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0, 80.0]), torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        within, without = denoiser(x, sigma, labels), denoiser(x, sigma, torch.full((4,), 3))
        found = Guided(denoiser, guidance)(x, sigma, labels)
    assert not torch.allclose(within, without)
    torch.testing.assert_close(found, (1 - guidance) * without + guidance * within, rtol=1e-4, atol=1e-4)


def test_no_guidance_is_the_denoiser_itself():
    denoiser = conditional(null_label=False)
    assert guided(denoiser, 1.0) is denoiser


def test_a_guided_model_is_sampled_as_it_is_or_not_at_all():
    """Two guidances can't both hold, and neither is passed over."""
    model = Guided(conditional(), 3.0)
    assert guided(model, None) is model
    once = generate(conditional(), range(4), labels=1, steps=4, guidance=3.0)
    assert torch.equal(generate(model, range(4), labels=1, steps=4), once)
    for guidance in (1.0, 2.0, 3.0):
        with pytest.raises(InputError, match=f"guided already, by 3.0; got 'guidance={guidance}'; fix: drop guidance="):
            generate(model, range(4), steps=4, guidance=guidance)


@pytest.mark.parametrize(
    ("denoiser", "reason"),
    [
        (conditional(null_label=False), "label dropout"),
        (conditional("consistency", "sigma_min"), "only a diffusion model"),
    ],
)
def test_model_that_can_not_be_guided_is_refused(denoiser, reason):
    with pytest.raises(InputError, match=reason):
        Guided(denoiser, 2.0)
    with pytest.raises(InputError, match=reason):
        generate(denoiser, range(2), guidance=2.0)


def test_guidance_moves_samples():
    denoiser = conditional()
    plain, strong = (generate(denoiser, range(4), labels=1, steps=4, guidance=g) for g in (1.0, 4.0))
    assert not torch.equal(plain, strong)
    without = generate(denoiser, range(4), labels=1, steps=4, guidance=0.0)
    assert torch.equal(without, generate(denoiser, range(4), labels=2, steps=4, guidance=0.0))


def test_label_dropout_hides_its_share_of_the_labels_and_no_other_number():
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal"}), 10)
    labels, x0 = torch.arange(4096) % 3, torch.zeros(4096, 1, 8, 8)
    build = lambda p: registry.make("objective", {"name": "edm"}, conditional(), noise, 0, label_dropout=p)  # noqa: E731
    kept, dropped = (build(p).draw(x0, labels, 5, range(4096)) for p in (0.0, 0.25))
    assert torch.equal(kept.labels, labels)
    hidden = dropped.labels == 3
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(dropped.labels[~hidden], labels[~hidden])
    assert all(torch.equal(getattr(kept, k), getattr(dropped, k)) for k in ("x0", "noise", "dropout_keys"))
    assert torch.equal(kept.levels["sigma"], dropped.levels["sigma"])
    part = build(0.25).draw(x0[100:164], labels[100:164], 5, range(100, 164))
    assert torch.equal(part.labels, dropped.labels[100:164])


def test_distillation_matches_the_guided_teacher():
    """The second point of a CD pair is the guided teacher's solver step, so another guidance gives another loss."""
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "uniform"}, curriculum={"name": "constant"}), 10)
    student = conditional("consistency", "sigma_min")
    losses = []
    for guidance in (1.0, 3.0):
        teacher = guided(conditional(), guidance)
        values = {"name": "consistency", "target_decay": 0.0}
        objective = registry.make("objective", values, student, noise, seed=0, teacher=teacher)
        batch = objective.draw(
            torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3, 0, range(4)
        )
        losses.append(objective(batch)[0].detach())
    assert not torch.allclose(losses[0], losses[1])


def test_denoiser_without_classes_has_no_null_label():
    with pytest.raises(ValueError, match="null_label needs classes"):
        DenoiserConfig(**(small_denoiser().config.model_dump() | {"null_label": True}))
    assert isinstance(small_denoiser(), Denoiser)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["cd", "scd"])
def test_guided_distillation_from_the_command_line(mode, command, tmp_path):
    """Trains a teacher with label dropout, distils it guided, and refuses to guide the student."""
    done = command("train", "mode=edm", *TINY, "dataset.conditional=true", "label_dropout=0.1")
    assert done.returncode == 0, done.stderr
    done = command("train", f"mode={mode}", *TINY, "dataset.conditional=true", "guidance=2", "preview_every=6")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / f"digits-{mode}" / "samples").iterdir())
    sampled = command("sample", f"ckpt=runs/digits-{mode}", "num=4", "labels=3")
    assert sampled.returncode == 0, sampled.stderr
    refused = command("sample", f"ckpt=runs/digits-{mode}", "num=4", "guidance=2")
    assert refused.returncode == 2
    assert "only a diffusion model can be guided" in refused.stderr
    guided_teacher = command("sample", "ckpt=runs/digits-edm", "num=4", "steps=3", "guidance=2")
    assert guided_teacher.returncode == 0, guided_teacher.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["mode=ict", "guidance=2"], "has no teacher to guide"),
        (["mode=edm", "label_dropout=0.1"], "label_dropout needs classes"),
    ],
)
def test_guidance_without_its_needs_is_wrong_input(arguments, reason, command):
    done = command("train", *arguments, *TINY)
    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.long
def test_label_dropout_of_a_student_needs_a_teacher_that_knows_it(command, start, tmp_path):
    """One without a null label is refused, in one line; one that is trained by itself learns it."""
    small = [*TINY, "dataset.conditional=true"]
    assert command("train", "mode=edm", *small).returncode == 0
    for options in (["mode=cd"], ["mode=cd", "init=random"], ["mode=ect"]):
        done = command("train", *options, *small, "label_dropout=0.3")
        assert done.returncode == 2 and "label_dropout needs a teacher" in done.stderr, done.stderr
    start("train", "mode=cd", *small, "label_dropout=0.3", "run_dir=elsewhere/student")
    stored = tmp_path / "elsewhere" / "digits-edm" / "config.yaml"
    wait_for(stored.exists)
    assert "label_dropout: 0.1" in stored.read_text()
