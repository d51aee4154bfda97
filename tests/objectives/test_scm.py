"""Continuous-time consistency models against closed forms, through the real class (float64)."""

import math
from dataclasses import replace

import pytest
import torch
from test_objectives import Exact, gaussian_denoiser, in_double, small_denoiser
from torch import nn

from cm_train.core import registry
from cm_train.models.backbones.unet import UNetConfig
from cm_train.models.denoiser import Denoiser, DenoiserConfig, build_denoiser
from cm_train.objectives import scm as module
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule

M, S, DATA = 0.3, 0.5, 0.7  # the data's mean and spread; sigma_data, on purpose not the spread


class Backbone(nn.Module):
    """Any function denoised(x, sigma) as what a backbone must answer to make it; or a raw function of its inputs."""

    def __init__(self, denoised, config):
        super().__init__()
        self.denoised, self.config, self.weight = denoised, config, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, scaled, c_noise, labels=None, dropout_keys=None):
        sigma = (DATA * c_noise.tan() if self.config.c_noise == "angle" else (4 * c_noise).exp()).view(-1, 1, 1, 1)
        root = (sigma**2 + DATA**2).sqrt()
        c_skip, c_out, x = DATA**2 / root**2, sigma * DATA / root, scaled * root
        return (self.denoised(x, sigma) - c_skip * x) / c_out + self.weight


def config_of(c_noise="angle", kind="consistency", boundary="zero", image_size=1, sigma_data=DATA, **more):
    sizes = {"image_size": image_size, "image_channels": 1, "sigma_min": 0.002, "sigma_max": 80.0}
    facts = {"kind": kind, "boundary": boundary, "c_noise": c_noise}
    return DenoiserConfig(sigma_data=sigma_data, **facts, **sizes, **more)


def exactly(denoised, c_noise="angle"):
    config = config_of(c_noise)
    return Denoiser(config, Backbone(denoised, config))


def scm(denoiser, teacher=None, steps=100, **settings):
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal", "mean": -1.0, "std": 1.4}), steps)
    values = {"name": "scm", "velocity": "teacher" if teacher else "data", "tangent_warmup_steps": 0, **settings}
    return registry.make("objective", values, denoiser, noise, seed=0, teacher=teacher).double()


def batch_of(objective, count=512, step=0, labels=None, x0=None):
    if x0 is None:
        x0 = M + S * torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return in_double(objective.draw(x0, labels, step, range(len(x0))))


@pytest.fixture
def tangents(monkeypatch):
    """The tangents g that an objective's forward found, before they are bounded."""
    seen = []
    bounded = module.SCM._bounded
    monkeypatch.setattr(module.SCM, "_bounded", lambda self, g: (seen.append(g), bounded(self, g))[1])
    return seen


def unet(c_noise, seed=0, embedding_norm=False, **config):
    """A small attention U-Net in float64, no layer of it zero."""
    backbone = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]}
    backbone |= {"head_channels": 8, "group_channels": 4, "dropout": 0.4, "embedding_norm": embedding_norm}
    torch.manual_seed(seed)
    denoiser = build_denoiser(config_of(c_noise, image_size=8, **config), UNetConfig(**backbone))
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.1)
    return denoiser.double()


def images(count=6):
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------------------------------- parametrisation


def test_trigflow_denoiser_is_equation_5_of_the_paper():
    """f = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t), x_t = cos(t) x, sigma = sigma_data tan(t)."""
    network = lambda u, t, *_: -(u.sin() * (1 + t.view(-1, 1, 1, 1)))  # noqa: E731 - minus, by our convention
    x, t = images(), torch.tensor([1e-6, 0.1, 0.7, 1.1, 1.5, math.atan(160)], dtype=torch.float64)
    found = Denoiser(config_of(), network)(x, DATA * t.tan())
    t = t.view(-1, 1, 1, 1)
    x_t = t.cos() * x
    expected = t.cos() * x_t - t.sin() * DATA * ((x_t / DATA).sin() * (1 + t))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_trigflow_denoiser_is_the_identity_at_zero():
    x = images()
    denoiser = unet("angle")
    assert torch.equal(denoiser(x, torch.tensor(0.0, dtype=torch.float64)), x)
    assert denoiser.config.sigma_boundary == 0


def test_edm_loss_of_an_angle_network_is_trigflows_loss():
    """Karras et al.'s weighted loss is ||sigma_data F - v||^2 / sigma_data^2 with v = cos(t) z - sin(t) x0."""
    denoiser = unet("angle", kind="diffusion")
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal"}), 10)
    objective = registry.make("objective", {"name": "edm"}, denoiser, noise, seed=0)
    batch = batch_of(objective, x0=images())
    t = (batch.levels["sigma"] / DATA).atan()
    cos, sin = (v.view(-1, 1, 1, 1) for v in (t.cos(), t.sin()))
    z = DATA * batch.noise
    output = -denoiser.backbone((cos * batch.x0 + sin * z) / DATA, t, None, batch.dropout_keys)
    loss = (DATA * output - (cos * z - sin * batch.x0)).square().flatten(1).mean(1) / DATA**2
    torch.testing.assert_close(objective(batch)[0], loss)


@pytest.mark.parametrize("c_noise", ["angle", "log_sigma"])
def test_teacher_of_either_conditioning_gives_its_own_network_as_velocity(c_noise, tangents):
    """At zero warm-up g = -cos^2 (sigma_data F - dx/dt): a student with the teacher's weights has none."""
    student, teacher = unet(c_noise), unet(c_noise, kind="diffusion").requires_grad_(False)
    objective = scm(student, teacher, tangent_warmup_steps=10)
    batch = replace(batch_of(objective, x0=images()), dropout_keys=None)
    objective(batch)
    assert tangents[0].abs().max() < 1e-12


# ----------------------------------------------------------------------------------------------------------- tangents


@pytest.mark.parametrize("c_noise", ["angle", "log_sigma"])
def test_tangent_of_the_exact_consistency_function_is_zero_along_the_ode(c_noise, tangents):
    student = exactly(lambda x, s: M + (x - M) * S / (S**2 + s**2).sqrt(), c_noise)
    objective = scm(student, Exact(gaussian_denoiser))
    objective(batch_of(objective))
    assert tangents[0].abs().max() < 1e-10


def test_tangent_of_the_exact_consistency_function_is_zero_on_average_over_data(tangents):
    """sCT's direction is the ODE's only in the mean: uncorrelated with every function of x, as here x and x^2."""
    objective = scm(exactly(lambda x, s: M + (x - M) * S / (S**2 + s**2).sqrt()))
    batch = batch_of(objective, count=200_000)
    objective(batch)
    g = tangents[0].flatten()
    assert g.abs().mean() > 0.01
    sigma = batch.levels["sigma"]
    x = (batch.x0.flatten() + sigma * batch.noise.flatten() - M) / (S**2 + sigma**2).sqrt()
    for function in (torch.ones_like(x), x, x**2, sigma.log() * x):
        product = g * function
        assert product.mean().abs() < 4 * product.std() / len(x) ** 0.5


@pytest.mark.parametrize(("c_noise", "embedding_norm"), [("angle", False), ("log_sigma", False), ("angle", True)])
def test_tangent_is_cos_t_times_the_change_of_the_denoised_image(c_noise, embedding_norm, tangents):
    """g = cos(t) df/dt for any network: against central differences of the denoiser along the path itself.

    Catches a further factor sigma_data in the tangent, a wrong sign, and a part of the network without derivative.
    """
    denoiser = unet(c_noise, embedding_norm=embedding_norm, num_classes=3)
    objective = scm(denoiser)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batch = batch_of(objective, x0=images(), labels=labels)
    objective(batch)

    def f(t):
        sigma = DATA * t.tan()
        return denoiser(batch.x0 + sigma.view(-1, 1, 1, 1) * batch.noise, sigma, labels, batch.dropout_keys)

    t, h = (batch.levels["sigma"] / DATA).atan(), 1e-5
    with torch.no_grad():
        expected = t.cos().view(-1, 1, 1, 1) * (f(t + h) - f(t - h)) / (2 * h)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(tangents[0], expected, rtol=1e-5, atol=1e-7)


def test_tangent_without_warmup_share_is_the_diffusion_part_alone(tangents):
    denoiser = unet("angle")
    objective = scm(denoiser, tangent_warmup_steps=4)
    parts = []
    for step, share in ((0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0), (10**9, 1.0)):
        assert objective.tangent_warmup(step) == share
        batch = batch_of(objective, x0=images())
        batch.levels["tangent_warmup"] = torch.full((6,), share, dtype=torch.float64)
        assert torch.equal(batch.levels["tangent_warmup"], batch.levels["tangent_warmup"].new_full((6,), share))
        objective(batch)
        parts.append(tangents[-1])
        drawn = objective.draw_levels(torch.rand(6, dtype=torch.float64), step)["tangent_warmup"]
        assert torch.equal(drawn, torch.full((6,), share))
    torch.testing.assert_close(parts[1] - parts[0], (parts[3] - parts[0]) / 4)
    batch = batch_of(objective, x0=images())
    t = (batch.levels["sigma"] / DATA).atan().view(-1, 1, 1, 1)
    x_t = t.cos() * batch.x0 + t.sin() * DATA * batch.noise
    output = -denoiser.backbone(x_t / DATA, t.flatten(), None, batch.dropout_keys)
    velocity = t.cos() * DATA * batch.noise - t.sin() * batch.x0
    torch.testing.assert_close(parts[0], -(t.cos() ** 2) * (DATA * output - velocity))


# ------------------------------------------------------------------------------------------------------------ the loss


def test_bounded_tangent_is_normalised_over_the_image_or_clipped():
    g = images() * torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0, 1e6], dtype=torch.float64).view(-1, 1, 1, 1)
    norm = g.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(scm(unet("angle"))._bounded(g), g / (norm + 0.1))
    torch.testing.assert_close(scm(unet("angle"), tangent_c=2.0)._bounded(g), g / (norm + 2.0))
    assert torch.equal(scm(unet("angle"), tangent="clip")._bounded(g), g.clamp(-1, 1))


def test_loss_and_its_gradient_are_the_papers(tangents):
    """e^w / D ||F - F^- - g||^2 - w: the value at F = F^-, and -2 e^w g / D times dF for the network."""
    objective = scm(exactly(lambda x, s: x / (1 + s**2)))
    batch = batch_of(objective, 8)
    objective.weighting.bias.data.fill_(0.4)
    loss, metrics = objective(batch)
    g = tangents[0]
    bounded = (g / (g.abs() + 0.1)).flatten()  # one pixel an image
    torch.testing.assert_close(loss, math.exp(0.4) * bounded**2 - 0.4)
    torch.testing.assert_close(metrics["tangent_rms"], g.flatten().abs())
    loss.sum().backward()
    # The backbone is minus F and its weight an offset: stepping against the gradient moves F along g.
    expected = (2 * math.exp(0.4) * bounded).sum()
    torch.testing.assert_close(objective.denoiser.backbone.weight.grad, expected.view(1))
    torch.testing.assert_close(objective.weighting.bias.grad, (math.exp(0.4) * bounded**2 - 1).sum().view(1))


def test_weighting_starts_at_one_and_can_be_off():
    losses = []
    for adaptive in (True, False):
        objective = scm(exactly(lambda x, s: x / (1 + s**2)), adaptive_weighting=adaptive)
        losses.append(objective(batch_of(objective, 8))[0])
        assert bool(objective.extra_state()) == adaptive
    torch.testing.assert_close(losses[0], losses[1])


def test_weighting_depends_on_the_noise_level():
    objective = scm(exactly(lambda x, s: x / (1 + s**2)))
    batch = batch_of(objective, 8)
    loss, _ = objective(batch)
    loss.sum().backward()
    assert (objective.weighting.weight.grad != 0).float().mean() > 0.9


def test_gradient_goes_through_one_pass_only():
    """With the goal held still, the gradient is that of <F, goal - F>: nothing flows through the JVP or the teacher."""
    student, teacher = unet("angle"), unet("angle", seed=1, kind="diffusion").requires_grad_(False)
    objective = scm(student, teacher, adaptive_weighting=False)
    batch = batch_of(objective, x0=images())
    loss, _ = objective(batch)
    loss.sum().backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    with torch.no_grad():
        t = (batch.levels["sigma"] / DATA).atan()
        scaled = (t.cos().view(-1, 1, 1, 1) * (batch.x0 + batch.levels["sigma"].view(-1, 1, 1, 1) * batch.noise)) / DATA
    again = scm(student, teacher, adaptive_weighting=False)
    bounded = []
    again._bounded = lambda g: bounded.append(module.SCM._bounded(again, g)) or bounded[0]
    with torch.no_grad():
        again(batch)
    output = -student.backbone(scaled, t, None, batch.dropout_keys)
    (-2 * (output * bounded[0]).flatten(1).mean(1)).sum().backward()
    for mine, expected in zip(found, (p.grad for p in student.parameters()), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())


class Linear(nn.Module):
    """F(u, t) = a(t) u with a polynomial a, for data N(0, sigma_data^2), whose consistency model is -tan(t/2) u."""

    def __init__(self):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def slope(self, t):
        return torch.stack([t**i for i in range(6)], -1) @ self.coefficients

    def forward(self, scaled, t, labels=None, dropout_keys=None):
        return -self.slope(t).view(-1, 1, 1, 1) * scaled


@pytest.mark.parametrize("velocity", ["data", "teacher"])
def test_training_on_gaussian_data_finds_the_exact_consistency_model(velocity):
    teacher = Exact(lambda x, s: DATA**2 * x / (DATA**2 + s**2), DATA) if velocity == "teacher" else None
    backbone = Linear()
    objective = scm(Denoiser(config_of(), backbone), teacher, tangent_warmup_steps=100)
    optimizer = torch.optim.Adam(objective.parameters(), 0.02, betas=(0.9, 0.99))
    steps = 800
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        generator = torch.Generator().manual_seed(step)
        x0 = DATA * torch.randn(128, 1, 8, 8, dtype=torch.float64, generator=generator)
        loss, _ = objective(batch_of(objective, x0=x0, step=step))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    t = torch.linspace(0.05, 1.4, 50, dtype=torch.float64)
    error = (backbone.slope(t) + (t / 2).tan()).abs().max().item()
    assert error < 0.02


# -------------------------------------------------------------------------------------------------- compiled, autocast


@pytest.mark.long
@pytest.mark.parametrize("c_noise", ["angle", "log_sigma"])
def test_scm_compiles_whole_and_to_the_same_gradient(c_noise):
    denoiser = unet(c_noise, num_classes=3)
    objective = scm(denoiser)
    batch = batch_of(objective, x0=images(), labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    gradients = []
    for call in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        denoiser.zero_grad()
        call(batch)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)


def test_tangent_is_float32_under_autocast(tangents):
    """The derivative is a difference of large parts, of which bfloat16 would leave noise."""
    denoiser = small_denoiser(boundary="zero")
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal"}), 10)
    objective = registry.make("objective", {"name": "scm", "tangent_warmup_steps": 0}, denoiser, noise, seed=0)
    batch = objective.draw(images(8).float(), None, 0, range(8))
    objective(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective(batch)
        loss.sum().backward()
    assert tangents[0].dtype == tangents[1].dtype == torch.float32
    # The direction is the data's, so nothing of the half-precision pass enters.
    assert torch.equal(tangents[0], tangents[1])
