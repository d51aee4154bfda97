"""Whole methods against closed forms: what the real trainer converges to, and where a loss's gradient vanishes."""

import itertools
import math
from dataclasses import replace

import numpy
import pytest
import torch
from test_noise import ICT_11
from test_objectives import EPS, Exact, S, T, consistency, gaussian_consistency, in_double, schedule
from test_objectives import M as MEAN
from test_samplers import MEANS, SHARES, STDS, descend, flow_by_rk4, mixture
from torch import nn

from cm_train.core import registry
from cm_train.data.datasets.in_memory import InMemory
from cm_train.data.loader import Loader
from cm_train.data.pixels import to_uint8, to_unit_range
from cm_train.models.denoiser import Denoiser, DenoiserConfig
from cm_train.models.noise_levels import karras_sigmas
from cm_train.objectives.noise import NoiseSchedule
from cm_train.runs.config import parse
from cm_train.sampling.samplers.euler import euler_step
from cm_train.sampling.samplers.heun import heun_step
from cm_train.training.tracking import SilentTracker
from cm_train.training.trainer import Trainer

# ------------------------------------------------------------------------------------- what the real loop converges to


class Tabular(nn.Module):
    """A backbone that knows one slope and one offset a noise level: all that Gaussian data need."""

    def __init__(self, sigmas):
        super().__init__()
        self.levels = sigmas.log() / 4  # as the denoiser tells them
        self.slope, self.offset = (nn.Parameter(torch.zeros(len(sigmas))) for _ in range(2))

    def forward(self, x, c_noise, labels, dropout_keys):
        index = (c_noise[:, None] - self.levels).abs().argmin(1)
        return self.slope[index].view(-1, 1, 1, 1) * x + self.offset[index].view(-1, 1, 1, 1)


class Posterior(nn.Module):
    """A backbone that can be the exact one for Gaussian data under EDM's coefficients: slope 0, offset mean / std.

    F = (D - c_skip x) / c_out with sigma_data = std leaves mean / std * sigma / sqrt(sigma^2 + std^2).
    """

    def __init__(self, std):
        super().__init__()
        self.std, self.slope, self.offset = std, nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, c_noise, labels, dropout_keys):
        sigma = torch.exp(4 * c_noise).view(-1, 1, 1, 1)
        return self.slope * x + self.offset * sigma / (sigma**2 + self.std**2).sqrt()


class Bell(nn.Module):
    """The exact denoiser of N(mean, std^2) as a teacher."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, sigma, labels=None, dropout_keys=None):
        v = sigma.view(-1, 1, 1, 1) ** 2
        return (self.std**2 * x + v * self.mean) / (self.std**2 + v)


@pytest.fixture
def bell():
    """A data set of normal pixels in 8 bits, and the moments that it really has."""
    pixels = 0.1 + 0.2 * torch.randn(4096, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = InMemory(to_uint8(pixels), None, [])
    values = to_unit_range(dataset.images).double()
    mean, std = values.mean().item(), values.std().item()
    # Rounding to steps of 2/255 adds a uniform variance of their square over 12; three standard errors.
    assert std**2 == pytest.approx(0.2**2 + (2 / 255) ** 2 / 12, rel=3 * (2 / values.numel()) ** 0.5)
    return dataset, mean, std


def trained(composed, tmp_path, dataset, backbone, teacher, *overrides):
    """The denoiser that a run of the real loader, objective, optimizer and trainer ends with."""
    common = ["tracking=none", f"run_dir={tmp_path / 'run'}", "batch_size=64", "preview_every=0", "save_every=100000"]
    common += ["optimizer.schedule=cosine", "optimizer.lr=0.03", "optimizer.warmup_steps=0"]
    config = parse(composed(*common, *overrides))
    objective_class = registry.find("objective", config.objective.name)
    denoiser = Denoiser(
        DenoiserConfig(
            kind=objective_class.kind,
            boundary=objective_class.boundary,
            image_size=8,
            image_channels=1,
            sigma_data=dataset.sigma_data(),
            sigma_min=config.noise.sigma_min,
            sigma_max=config.noise.sigma_max,
        ),
        backbone,
    )
    noise = NoiseSchedule(config.noise, config.num_schedule_steps)
    teacher = teacher if config.objective.needs_teacher() else None
    objective = registry.build(config.objective, denoiser, noise, config.seed, False, teacher)
    loader = Loader(dataset, config.seed, config.batch_size)
    assert Trainer(config, objective, loader, torch.device("cpu")).run(SilentTracker())
    return denoiser


def chain(grid, factor):
    """Slopes from the lowest level up: b_1 = 1, b_{n+1} = b_n factor(t_n, t_{n+1})."""
    slopes = [1.0]
    for low, high in itertools.pairwise(grid):
        slopes.append(slopes[-1] * factor(low, high))
    return slopes


FACTORS = {  # of one step from high to low for data of variance v about 0
    "ct": lambda low, high, v: (v + low * high) / (v + high**2),
    "euler": lambda low, high, v: 1 + (low - high) * high / (v + high**2),
    "heun": lambda low, high, v: (
        1 + (low - high) / 2 * (high / (v + high**2) + low / (v + low**2) * (1 + (low - high) * high / (v + high**2)))
    ),
    "exact": lambda low, high, v: ((v + low**2) / (v + high**2)) ** 0.5,
}


def learnt(denoiser, grid, mean, std):
    """What a denoiser linear in x says one standard deviation above and below the mean, by level: centre, spread."""
    grid = torch.tensor(grid)
    spread = (grid**2 + std**2).sqrt()
    with torch.no_grad():
        above, below = (denoiser((mean + s * spread).view(-1, 1, 1, 1), grid).flatten() for s in (1, -1))
    return (above + below) / 2, (above - below) / 2


NUM = 10
CD = ["mode=cd", f"noise.curriculum.num_scales={NUM}"]
CT = ["mode=ct", "noise.curriculum.name=doubling", f"noise.curriculum.s0={NUM - 1}", f"noise.curriculum.s1={NUM - 1}"]


@pytest.mark.parametrize(
    ("law", "overrides"),
    [
        ("euler", [*CD, "objective.solver=euler"]),
        ("heun", [*CD, "objective.solver=heun"]),
        ("heun", [*CD, "objective.target_decay=0.9"]),
        ("ct", [*CT, "objective.target_decay=0.0"]),
        ("ct", [*CT, "objective.target_decay=0.9", "objective.target_schedule=constant"]),
    ],
    ids=["cd-euler", "cd-heun", "cd-heun-target", "ct", "ct-target"],
)
def test_training_reaches_the_predicted_map(law, overrides, composed, tmp_path, bell):
    """CD: the teacher's N - 1 solver steps. CT: the closed form, which is that of Euler's steps. From nothing."""
    dataset, mean, std = bell
    grid = karras_sigmas(NUM, EPS, T).flip(0).tolist()
    backbone = Tabular(torch.tensor(grid))
    denoiser = trained(composed, tmp_path, dataset, backbone, Bell(mean, std), "steps=1200", *overrides)
    centre, spread = learnt(denoiser, grid, mean, std)
    scale = (torch.tensor(grid) ** 2 + std**2).sqrt()
    predicted = {n: scale * torch.tensor(chain(grid, lambda a, b, f=f: f(a, b, std**2))) for n, f in FACTORS.items()}
    torch.testing.assert_close(predicted["ct"], predicted["euler"])
    error = (spread - predicted[law]).abs().max().item()
    assert error < 0.02 * std
    assert (centre - mean).abs().max() < 0.02 * std
    others = {"heun", "exact"} if law in ("ct", "euler") else {"ct", "exact"}
    assert all((spread - predicted[other]).abs().max() > 0.2 * std for other in others), "no proof at this N"
    print(f"{law}: largest error {error / std:.1e} std")


def test_training_a_diffusion_model_reaches_the_posterior_mean(composed, tmp_path, bell):
    dataset, mean, std = bell
    denoiser = trained(composed, tmp_path, dataset, Posterior(std), None, "mode=edm", "steps=300")
    slope, offset = denoiser.backbone.slope.item(), denoiser.backbone.offset.item()
    print(f"slope {slope:.4f} of 0, offset {offset:.4f} of {mean / std:.4f}")
    assert slope == pytest.approx(0, abs=0.01)
    assert offset == pytest.approx(mean / std, abs=0.01)


# ---------------------------------------------------------------------------------------- where the gradient vanishes


def z_scores(objective, draw, batches=64, size=1 << 12):
    """Mean of the loss's gradient to the denoiser's weights over its standard error, each batch one observation.

    Args:
        draw: (normal, uniform) -> x0, both [size, 1, 1, 1]; everything else is the objective's own.

    Returns:
        One row a level, without the lowest, where nothing is trained.
    """
    generator, gradients = torch.Generator().manual_seed(1), []
    for step in range(batches):
        normal = torch.randn(size, 1, 1, 1, dtype=torch.float64, generator=generator)
        uniform = torch.rand(size, 1, 1, 1, dtype=torch.float64, generator=generator)
        batch = objective.draw(draw(normal, uniform), None, step, range(size))
        objective.zero_grad()
        objective(in_double(batch))[0].sum().backward()
        gradients.append(objective.denoiser.weight.grad.clone())
    gradients = torch.stack(gradients)[:, 1:]
    return gradients.mean(0) / (gradients.std(0) / len(gradients) ** 0.5)


class Pushed(Exact):
    """f(x, sigma) + weight of the level * a direction (x, sigma), at weights 0: one weight a level and direction."""

    def __init__(self, function, grid, directions):
        super().__init__(function)
        self.grid, self.directions = grid, directions
        self.weight = nn.Parameter(torch.zeros(len(grid), len(directions), dtype=torch.float64))

    def forward(self, x, sigma, labels=None, dropout_keys=None):
        index = (sigma[:, None] - self.grid).abs().argmin(1)
        ways = torch.stack([way(x, sigma.view(-1, 1, 1, 1)).flatten() for way in self.directions], 1)
        push = (self.weight[index] * ways).sum(1).view(-1, 1, 1, 1)
        return self.function(x, sigma.view(-1, 1, 1, 1)) + push


def test_ct_gradient_vanishes_at_its_fixed_point_and_not_at_the_exact_function():
    """Gaussian data: in slope and offset of each level, through autograd."""
    grid = karras_sigmas(18, EPS, T).flip(0)
    slopes = torch.tensor(chain(grid.tolist(), lambda low, high: FACTORS["ct"](low, high, S**2)), dtype=torch.float64)

    def fixed_point(x, sigma):
        return MEAN + slopes[(sigma.view(-1, 1) - grid).abs().argmin(1)].view(-1, 1, 1, 1) * (x - MEAN)

    # In units of the spread, so that every direction counts alike.
    ways = [lambda x, s: (x - MEAN) / (S**2 + s**2).sqrt(), lambda x, s: torch.ones_like(x)]
    scores = {}
    for name, function in (("fixed", fixed_point), ("exact", gaussian_consistency)):
        objective = consistency(Pushed(function, grid, ways), schedule(18))
        scores[name] = z_scores(objective, lambda normal, uniform: MEAN + S * normal)
    assert scores["fixed"].abs().max() < 4.5  # of 34 numbers
    # The exact map is too steep for the loss (Cauchy-Schwarz), most so where a step spans the data's own spread.
    assert scores["exact"][:, 0].max() > 10
    assert scores["exact"][:, 1].abs().max() < 4.5  # the mean is right in both
    for name, score in scores.items():
        print(f"{name}: largest |z| {score.abs().max():.1f}")


MIXTURE_MEAN = (SHARES * MEANS).sum()
MIXTURE_VARIANCE = (SHARES * (STDS**2 + MEANS**2)).sum() - MIXTURE_MEAN**2


def interpolate(x, nodes, values):
    """Linear in between, constant beyond; ascending nodes."""
    i = torch.searchsorted(nodes, x.contiguous()).clamp(1, len(nodes) - 1)
    share = ((x - nodes[i - 1]) / (nodes[i] - nodes[i - 1])).clamp(0, 1)
    return torch.lerp(values[i - 1], values[i], share)


def posterior(x, sigma):
    """Probability of each component for x [P] at one sigma; [P, 3]."""
    v = STDS**2 + sigma**2
    return torch.softmax(SHARES.log() - 0.5 * v.log() - 0.5 * (x[:, None] - MEANS) ** 2 / v, 1)


def ct_fixed_point(grid, points=6001, order=15):
    """Tables (x, f) from the lowest level of an ascending grid up: f_{n+1}(x) = E[f_n(x_n) | x_{n+1} = x].

    x_n = x0 + t_n z with the same x0 and z: given the component, normal about the component's mean by t_n t_{n+1}.
    """
    nodes, weights = (torch.from_numpy(v) for v in numpy.polynomial.hermite_e.hermegauss(order))
    weights = weights / math.sqrt(2 * math.pi)
    places = torch.linspace(-6, 6, points, dtype=torch.float64)
    x = MIXTURE_MEAN + places * (MIXTURE_VARIANCE + EPS**2).sqrt()
    tables = [(x, x)]
    for low, high in itertools.pairwise(grid):
        x = MIXTURE_MEAN + places * (MIXTURE_VARIANCE + high**2).sqrt()
        v = STDS**2 + high**2
        centre = MEANS + (STDS**2 + low * high) / v * (x[:, None] - MEANS)
        spread = STDS * (high - low) / v.sqrt()
        # Beyond the table's ends the map is a straight line; nothing there is ever asked for in the comparison.
        inner = interpolate(centre[..., None] + spread[:, None] * nodes, *tables[-1])
        tables.append((x, (inner @ weights * posterior(x, high)).sum(1)))
    return tables


def exact_tables(grid, points=4001):
    """Tables (x, f) of the exact consistency function from the lowest level up: one flow, seen at every level."""
    x = MIXTURE_MEAN + torch.linspace(-6, 6, points, dtype=torch.float64) * (MIXTURE_VARIANCE + T**2).sqrt()
    seen = [x[:, None]]
    for high, low in itertools.pairwise(reversed(grid)):
        seen.append(flow_by_rk4(seen[-1], mixture, 40, high, low))
    return [(x[:, 0], seen[-1][:, 0]) for x in reversed(seen)]


@pytest.fixture(scope="module")
def mixture_flow():
    x = MIXTURE_MEAN + torch.linspace(-2.5, 2.5, 201, dtype=torch.float64) * (MIXTURE_VARIANCE + T**2).sqrt()
    return x, flow_by_rk4(x[:, None], mixture, 1000)[:, 0]


# Root-mean-square distance to the exact consistency function at sigma_max, from -2.5 to 2.5 standard deviations.
BIAS = {
    18: {"ct": 0.106, "euler": 0.0746, "heun": 0.0273},
    144: {"ct": 0.0341, "euler": 0.0099, "heun": 5.4e-4},
    288: {"ct": 0.0246, "euler": 0.0053, "heun": 1.3e-4},
}


@pytest.mark.parametrize("steps", [pytest.param(n, marks=pytest.mark.long) if n > 72 else n for n in BIAS])
def test_fixed_points_on_three_modes_have_the_tabled_bias(steps, mixture_flow):
    """CT pays for its one-sample slope: far more than Euler's steps, and on separated modes with order 1/2."""
    x, expected = mixture_flow
    grid = karras_sigmas(steps + 1, EPS, T).flip(0).tolist()
    found = {
        "ct": interpolate(x, *ct_fixed_point(grid)[-1]),
        "euler": descend(euler_step, mixture, x[:, None], steps)[:, 0],
        "heun": descend(heun_step, mixture, x[:, None], steps)[:, 0],
    }
    for name, tabled in BIAS[steps].items():
        rms = (found[name] - expected).square().mean().sqrt().item()
        print(f"{name} {steps}: {rms:.4g}")
        assert rms == pytest.approx(tabled, rel=0.04 if tabled < 1e-3 else 0.01), name
    if steps == 18:
        print(f"spread {found['ct'].std():.3f} of {expected.std():.3f}")


def test_ct_gradient_vanishes_at_its_fixed_point_on_three_modes():
    """The tables in the network's place, pushed level by level in several shapes; the exact function is not stable."""
    grid = karras_sigmas(19, EPS, T).flip(0)

    def tabled(tables):
        def function(x, sigma):
            out = torch.empty_like(x)
            for level, table in zip(grid, tables, strict=True):
                here = (sigma - level).abs().flatten() < 1e-6 * level
                out[here] = interpolate(x[here], *table)
            return out

        return function

    def shape(k):
        return lambda x, s: torch.cos(k * (x - MIXTURE_MEAN) / (MIXTURE_VARIANCE + s**2).sqrt() + k)

    def draw(normal, uniform):
        k = torch.searchsorted(SHARES.cumsum(0), uniform)
        return MEANS[k] + STDS[k] * normal

    scores = {}
    for name, tables in (("fixed", ct_fixed_point(grid.tolist())), ("exact", exact_tables(grid.tolist()))):
        objective = consistency(Pushed(tabled(tables), grid, [shape(k) for k in range(4)]), schedule(19))
        scores[name] = z_scores(objective, draw)
    for name, score in scores.items():
        print(f"{name}: largest |z| {score.abs().max():.1f}")
    assert scores["fixed"].abs().max() < 4.5  # of 72 numbers
    assert scores["exact"].abs().max() > 15


# ---------------------------------------------------------------------------------------------- iCT from its own YAML


@pytest.fixture
def ict(composed):
    """ict(function) -> the objective of mode=ict with the published schedule and a function for a network."""
    config = parse(composed("mode=ict", "steps=400000"))
    noise = NoiseSchedule(config.noise, config.num_schedule_steps)
    return lambda function: registry.build(config.objective, Exact(function), noise, seed=0)


def test_ict_draws_its_intervals_with_the_tabled_probabilities(ict):
    """The real draws of a batch of 40,000: a chi-square of 9 degrees of freedom, below its 99.9 % point."""
    size = 40_000
    batch = ict(lambda x, s: x).draw(torch.zeros(size, 1, 1, 1), None, 0, range(size))
    grid = karras_sigmas(11, EPS, T).flip(0).float()
    counts = torch.bincount(torch.searchsorted(grid, batch.levels["sigma"]) - 1, minlength=10)
    expected = size * torch.tensor(ICT_11[::-1]) / sum(ICT_11)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    print(f"chi-square {chi_square:.1f}; shares {[round(c / size, 3) for c in counts.tolist()]}")
    assert chi_square < 27.88


@pytest.mark.parametrize(("step", "num", "mean"), [(0, 11, 8.4), (399_999, 1281, 1129)])
def test_ict_weights_are_as_tabled(step, num, mean, ict):
    objective = ict(lambda x, s: x)
    size = 1 << 17
    u = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    batch = objective.draw(torch.zeros(size, 1, 1, 1), None, step, range(size))
    batch = replace(batch, levels=objective.draw_levels(u, step), noise=torch.ones(size, 1, 1, 1))
    loss, metrics = objective(batch)
    weight = loss / metrics["distance"]
    assert objective.schedule(step)["num_scales"] == num
    assert weight.mean().item() == pytest.approx(mean, rel=0.01)
    if num == 11:
        assert weight.max().item() == pytest.approx(67.9, abs=0.05)
        assert weight.min().item() == pytest.approx(0.029, abs=5e-4)
    print(f"N {num}: weights {weight.max():.1f} to {weight.min():.3g}, mean {weight.mean():.4g}")


@pytest.mark.parametrize(("size", "c"), [(32, 0.0299), (64, 0.0599)])
def test_ict_smooths_by_the_papers_constant(size, c, ict):
    """d = sqrt(r^2 + c^2) - c gives c = (r^2 - d^2) / (2 d), for one r over all pixels."""
    objective = ict(lambda x, s: x)
    x0 = torch.zeros(16, 3, size, size, dtype=torch.float64)
    batch = in_double(objective.draw(x0, None, 0, range(16)))
    r = (batch.levels["sigma"] - batch.levels["sigma_next"]) * batch.noise.flatten(1).norm(dim=1)
    d = objective(batch)[1]["distance"]
    torch.testing.assert_close((r**2 - d**2) / (2 * d), torch.full_like(d, c), rtol=0, atol=5e-5)
    print(f"c {((r**2 - d**2) / (2 * d)).mean():.5f}")
