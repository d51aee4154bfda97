"""Objectives against closed forms, through the real classes with a known function in place of the network."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cm_train.core import registry
from cm_train.models.averages import flatten_parameters
from cm_train.models.backbones.unet import UNetConfig
from cm_train.models.denoiser import DenoiserConfig, build_denoiser
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule

S, M, EPS, T = 0.5, 0.3, 0.002, 80.0  # the data's spread and mean; the noise levels' ends


class Exact(nn.Module):
    """Any function f(x, sigma) [B, ...] in the place of a denoiser."""

    def __init__(self, function, sigma_data=S):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1))
        self.config = DenoiserConfig(
            kind="diffusion",
            boundary="zero",
            image_size=1,
            image_channels=1,
            sigma_data=sigma_data,
            sigma_min=EPS,
            sigma_max=T,
        )

    def forward(self, x, sigma, labels=None, dropout_keys=None):
        return self.function(x, sigma.view(-1, 1, 1, 1)) + 0 * self.weight


def gaussian_denoiser(x, sigma):
    return (S**2 * x + sigma**2 * M) / (S**2 + sigma**2)


def gaussian_consistency(x, sigma):
    return M + (x - M) * torch.sqrt((S**2 + EPS**2) / (S**2 + sigma**2))


def schedule(num_scales=18, proposal=None, curriculum=None, steps=1000):
    config = NoiseConfig(
        proposal=proposal or {"name": "uniform"},
        curriculum=curriculum or {"name": "constant", "num_scales": num_scales},
    )
    return NoiseSchedule(config, steps)


def consistency(denoiser, noise, teacher=None, **settings):
    values = {"name": "consistency", "pair": "teacher" if teacher else "data", "target_decay": 0.0, **settings}
    return registry.make("objective", values, denoiser, noise, seed=0, teacher=teacher)


def gaussian_batch(objective, count=4096, step=0):
    x0 = M + S * torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return in_double(objective.draw(x0, None, step, range(count)))


def in_double(batch):
    levels = {name: value.double() for name, value in batch.levels.items()}
    return replace(batch, x0=batch.x0.double(), noise=batch.noise.double(), levels=levels)


def small_denoiser(kind="consistency", boundary="sigma_min", dropout=0.0, seed=0):
    config = DenoiserConfig(
        kind=kind, boundary=boundary, image_size=8, image_channels=1, sigma_data=0.5, sigma_min=EPS, sigma_max=T
    )
    backbone = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]}
    backbone |= {"head_channels": 8, "group_channels": 4, "dropout": dropout}
    torch.manual_seed(seed)
    denoiser = build_denoiser(config, UNetConfig(**backbone))
    for p in denoiser.parameters():  # the zero-initialised layers too, or the network is the identity
        nn.init.normal_(p, std=0.1)
    return denoiser


# ------------------------------------------------------------------------------------------------------------ EDM


def test_edm_loss_of_the_exact_denoiser_is_the_posterior_variance():
    """E ||D - x0||^2 = s^2 sigma^2 / (s^2 + sigma^2); times the weight with sigma_data = s that is 1 everywhere."""
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal", "mean": -1.2, "std": 1.2}), 10)
    objective = registry.make("objective", {"name": "edm"}, Exact(gaussian_denoiser), noise, seed=0)
    loss, _ = objective(gaussian_batch(objective, 200_000))
    assert loss.mean().item() == pytest.approx(1.0, abs=0.01)


def test_edm_weight_is_that_of_karras_table_1():
    """A denoiser that is off by 1 everywhere loses exactly the weight, 1/sigma^2 + 1/sigma_data^2."""
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal"}), 10)
    objective = registry.make("objective", {"name": "edm"}, Exact(lambda x, s: x * 0), noise, seed=0)
    batch = gaussian_batch(objective, 16)
    batch = replace(batch, x0=torch.ones_like(batch.x0))
    loss, _ = objective(batch)
    assert torch.allclose(loss, 1 / batch.levels["sigma"] ** 2 + 1 / S**2)


# ------------------------------------------------------------------------------------------------------------- CD


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_cd_loss_of_the_exact_consistency_function_falls_by_its_order(solver, order):
    """Each doubling divides it by 2^(2(p+1)): about 16 for Euler, 64 for Heun."""
    losses = []
    for num in (37, 73, 145):
        objective = consistency(Exact(gaussian_consistency), schedule(num), Exact(gaussian_denoiser), solver=solver)
        batch = gaussian_batch(objective, 1 << 15)
        # Every interval alike, exactly, so that the ratio carries no sampling noise of the levels.
        u = (torch.arange(1 << 15, dtype=torch.float64) + 0.5) / (1 << 15)
        batch = in_double(replace(batch, levels=objective.draw_levels(u, 0)))
        losses.append(objective(batch)[0].mean().item())
    for coarse, fine in itertools.pairwise(losses):
        assert math.log2(coarse / fine) == pytest.approx(2 * (order + 1), abs=0.15)


def test_cd_loss_of_the_teachers_own_solver_chain_is_zero():
    """The optimum is the (N - 1)-step solver of the teacher, here as a slope for each level."""
    noise = schedule(18)
    sigmas, _ = noise._table(18, torch.device("cpu"))
    grid = sigmas.flip(0).float().double()  # as the batch has them
    slopes = [1.0]
    for low, high in itertools.pairwise(grid):  # Heun, drift (x - m) sigma/(s^2+sigma^2)
        k1, k2 = high / (S**2 + high**2), low / (S**2 + low**2)
        slopes.append(slopes[-1] * (1 + (low - high) * 0.5 * (k1 + k2 * (1 + (low - high) * k1))).item())
    slopes = torch.tensor(slopes, dtype=torch.float64)

    def chain(x, sigma):
        index = (sigma.view(-1, 1) - grid).abs().argmin(1)
        return M + slopes[index].view(-1, 1, 1, 1) * (x - M)

    objective = consistency(Exact(chain), noise, Exact(gaussian_denoiser), solver="heun")
    assert objective(gaussian_batch(objective))[0].max().item() < 1e-20


def test_cd_teacher_gets_no_gradient_and_no_dropout():
    teacher = small_denoiser("diffusion", "zero", dropout=0.5).requires_grad_(False)
    student = small_denoiser(dropout=0.0)
    objective = consistency(student, schedule(), teacher)
    batch = objective.draw(torch.randn(4, 1, 8, 8), None, 0, range(4))
    first, _ = objective(batch)
    other_keys = replace(batch, dropout_keys=batch.dropout_keys + 12345)
    assert torch.equal(first, objective(other_keys)[0])
    first.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_every_network_is_told_the_class():
    told = []

    class Told(Exact):
        def forward(self, x, sigma, labels=None, dropout_keys=None):
            told.append(labels)
            return super().forward(x, sigma)

    student, teacher = (Told(lambda x, s: x) for _ in range(2))
    objective = consistency(student, schedule(), teacher, solver="heun", target_decay=0.5)
    labels = torch.arange(8)
    objective(objective.draw(torch.randn(8, 1, 1, 1), labels, 0, range(8)))
    assert len(told) == 4  # student, Heun's two calls of the teacher, target
    assert all(torch.equal(each, labels) for each in told)


# ------------------------------------------------------------------------------------------------------------- CT


def test_ct_loss_at_its_fixed_point_is_the_predicted_one():
    """Slope b_{n+1} = b_n (s^2 + t_n t_{n+1})/(s^2 + t_{n+1}^2), loss b_n^2 s^2 gap^2/(s^2 + t_{n+1}^2)."""
    noise = schedule(18)
    sigmas, _ = noise._table(18, torch.device("cpu"))
    grid = sigmas.flip(0)
    slopes = [1.0]
    for low, high in itertools.pairwise(grid):
        slopes.append(slopes[-1] * ((S**2 + low * high) / (S**2 + high**2)).item())
    slopes = torch.tensor(slopes, dtype=torch.float64)

    def fixed_point(x, sigma):
        index = (sigma.view(-1, 1) - grid).abs().argmin(1)
        return M + slopes[index].view(-1, 1, 1, 1) * (x - M)

    objective = consistency(Exact(fixed_point), noise)
    count = 1 << 17
    batch = gaussian_batch(objective, count)
    loss, _ = objective(batch)
    for interval in (8, 12, 16):
        low, high, b = grid[interval], grid[interval + 1], slopes[interval]
        mine = loss[(batch.levels["sigma"] - high).abs() < 1e-6 * high]
        predicted = b**2 * S**2 * (high - low) ** 2 / (S**2 + high**2)
        assert mine.mean().item() == pytest.approx(predicted.item(), rel=5 * (2 / len(mine)) ** 0.5)


def test_ct_pair_shares_image_and_noise():
    """With f = identity the loss is (gap * noise)^2: both points lie on one line from x0."""
    objective = consistency(Exact(lambda x, s: x), schedule())
    batch = gaussian_batch(objective, 64)
    loss, _ = objective(batch)
    gap = (batch.levels["sigma"] - batch.levels["sigma_next"]).view(-1, 1, 1, 1)
    assert torch.allclose(loss, (gap * batch.noise).square().flatten(1).mean(1))


def test_inverse_gap_weighting():
    plain, weighted = (consistency(Exact(lambda x, s: x), schedule(), weighting=w) for w in ("uniform", "inverse_gap"))
    batch = gaussian_batch(plain, 64)
    ratio = weighted(batch)[0] / plain(batch)[0]
    assert torch.allclose(ratio, 1 / (batch.levels["sigma"] - batch.levels["sigma_next"]))


@pytest.mark.parametrize("name", ["l1", "l2", "pseudo_huber"])
def test_distance_setting_reaches_the_loss(name):
    objective = consistency(Exact(lambda x, s: x), schedule(), distance=name, huber_c=0.5)
    batch = gaussian_batch(objective, 8)
    gap = ((batch.levels["sigma"] - batch.levels["sigma_next"]).view(-1, 1, 1, 1) * batch.noise).flatten(1)
    expected = {
        "l1": gap.abs().mean(1),
        "l2": gap.square().mean(1),
        "pseudo_huber": (gap.square().sum(1) + 0.25).sqrt() - 0.5,
    }
    assert torch.allclose(objective(batch)[0], expected[name])


# ------------------------------------------------------------------------------------------------ target, dropout


def test_student_and_target_share_the_dropout_mask():
    """At sigma = sigma_next and one x the two passes are the same function, dropout included: the loss is 0."""
    student = small_denoiser(dropout=0.5)
    objective = consistency(student, schedule(), target_decay=0.9)
    batch = objective.draw(torch.randn(8, 1, 8, 8), None, 0, range(8))
    batch.levels["sigma_next"] = batch.levels["sigma"]
    assert objective(batch)[0].abs().max().item() == 0.0
    # The mask is really there: other keys, another output.
    x, sigma = torch.randn(8, 1, 8, 8), torch.ones(8)
    keys = batch.dropout_keys
    assert not torch.equal(student(x, sigma, None, keys), student(x, sigma, None, keys + 7))


def test_target_follows_the_student_after_the_step_with_the_decay_of_that_step():
    student = small_denoiser()
    objective = consistency(student, schedule(), target_decay=0.75)
    weights = flatten_parameters(student.parameters())
    before = objective.target_weights.clone()
    weights += 1.0
    objective.after_step(0, weights, torch.tensor(1.0))
    assert torch.allclose(objective.target_weights, before + 0.25, atol=1e-6)
    frozen = objective.target_weights.clone()
    objective.after_step(1, weights, torch.tensor(0.0))  # a skipped step
    assert torch.equal(objective.target_weights, frozen)


def test_target_decay_of_a_step_is_that_of_its_own_number_of_scales():
    """The first step has N = 2 and mu = mu0; the second has many more scales already."""
    objective = consistency(
        small_denoiser(),
        schedule(curriculum={"name": "sqrt", "s0": 2, "s1": 150}, steps=10),
        target_decay=0.5,
        target_schedule="paper",
    )
    weights = flatten_parameters(objective.denoiser.parameters())
    before = objective.target_weights.clone()
    assert objective.target_decay(1) > 0.9
    objective.after_step(0, weights + 1, torch.tensor(1.0))
    torch.testing.assert_close(objective.target_weights, before + 0.5, rtol=0, atol=1e-6)


def test_target_gets_no_gradient():
    objective = consistency(small_denoiser(), schedule(), target_decay=0.5)
    objective(objective.draw(torch.randn(4, 1, 8, 8), None, 0, range(4)))[0].sum().backward()
    assert all(p.grad is None for p in objective.target.parameters())


@pytest.mark.parametrize(
    ("step", "paper", "openai"), [(0, 0.90, 0.81), (1, 0.932, 0.900), (800_000, 0.998605, 0.998596)]
)
def test_target_decay_schedule_against_the_tabled_values(step, paper, openai):
    """CIFAR: mu(k) by the paper (N) and by OpenAI's code (N - 1)."""
    noise = schedule(curriculum={"name": "sqrt", "s0": 2, "s1": 150}, steps=800_000)
    for name, expected in (("paper", paper), ("openai", openai)):
        objective = consistency(Exact(lambda x, s: x), noise, target_decay=0.9, target_schedule=name)
        assert objective.target_decay(step) == pytest.approx(expected, abs=6e-4 if step < 2 else 1e-6)


def test_boundary_target_is_the_point_itself():
    """At sigma_next = sigma_min the target is x_next bit for bit, whatever its weights."""
    objective = consistency(small_denoiser(), schedule(2))
    batch = objective.draw(torch.randn(4, 1, 8, 8), None, 0, range(4))
    assert torch.equal(batch.levels["sigma_next"], torch.full((4,), EPS))
    x_next = torch.randn(4, 1, 8, 8)
    assert torch.equal(objective.denoiser(x_next, batch.levels["sigma_next"]), x_next)


# ------------------------------------------------------------------------------------------------------- drawing


def test_draw_is_the_same_for_any_split_of_the_rows():
    objective = registry.make(
        "objective", {"name": "consistency", "pair": "data"}, small_denoiser(), schedule(), seed=3, hflip=True
    )
    x0 = torch.randn(96, 1, 8, 8)
    whole = objective.draw(x0, None, 5, range(96))
    parts = [objective.draw(x0[a:b], None, 5, range(a, b)) for a, b in ((0, 40), (40, 41), (41, 96))]
    for name in ("x0", "noise", "dropout_keys"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    for name, value in whole.levels.items():
        assert torch.equal(value, torch.cat([part.levels[name] for part in parts])), name


def test_flip_mirrors_about_half_of_the_images_and_only_when_asked():
    x0 = torch.randn(512, 1, 8, 8)
    denoiser, noise = small_denoiser("diffusion", "zero"), schedule(proposal={"name": "lognormal"})
    build = lambda hflip: registry.make("objective", {"name": "edm"}, denoiser, noise, 0, hflip)  # noqa: E731
    assert torch.equal(build(False).draw(x0, None, 0, range(512)).x0, x0)
    flipped = build(True).draw(x0, None, 0, range(512)).x0
    same = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, x0, strict=True)])
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x0, strict=True)])
    assert (same ^ mirrored).all()
    assert 200 < mirrored.sum() < 312
