"""Easy consistency tuning against the paper's numbers and closed forms, through the real class."""

from dataclasses import replace

import pytest
import torch
from test_objectives import Exact, M, S, gaussian_batch, small_denoiser

from cm_train.core import registry
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule


def ect(denoiser, steps=200_000, **settings):
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal", "mean": -1.1, "std": 2.0}), steps)
    return registry.make("objective", {"name": "ect", **settings}, denoiser, noise, seed=0)


def ratio(objective, sigma, step):
    sigma = torch.tensor([sigma], dtype=torch.float64)
    return (objective.sigma_next(sigma, step) / sigma).item()


def test_mapping_against_the_published_numbers():
    slow, fast = ect(small_denoiser()), ect(small_denoiser(), q=256.0, num_stages=1)
    assert ratio(slow, 0.5, 0) == ratio(slow, 1.0, 0) == 0
    assert ratio(slow, 3.0, 0) == pytest.approx(0.31, abs=0.005)
    assert ratio(slow, 80.0, 0) == pytest.approx(0.5, abs=1e-6)
    assert ratio(slow, 1e-6, 199_999) == pytest.approx(0.980, abs=0.0005)
    assert ratio(slow, 80.0, 199_999) == pytest.approx(0.996, abs=0.0005)
    for sigma in (0.01, 0.7, 20.0):
        assert ratio(fast, sigma, 0) == pytest.approx(ratio(slow, sigma, 199_999), abs=1e-12)


def test_stages_are_of_equal_length_and_end_with_the_last():
    """25,000 steps each in the CIFAR-10 recipe of 200,000."""
    objective = ect(small_denoiser())
    steps = (0, 24_999, 25_000, 49_999, 175_000, 199_999, 200_000, 10**9)
    assert [objective.stage(step) for step in steps] == [0, 0, 1, 1, 7, 7, 7, 7]


def test_proposal_is_lognormal():
    objective = ect(small_denoiser())
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log_sigma = objective.draw_levels(u, 0)["sigma"].double().log()
    assert log_sigma.mean().item() == pytest.approx(-1.1, abs=0.01)
    assert log_sigma.median().item() == pytest.approx(-1.1, abs=0.001)


def test_loss_of_the_exact_consistency_function_of_a_point_is_zero():
    """It gives that point for whatever it is shown, and the goal at no noise is the same."""
    objective = ect(Exact(lambda x, s: M + 0 * x))
    batch = gaussian_batch(objective, 4096)
    batch = replace(batch, x0=torch.full_like(batch.x0, M))
    loss, _ = objective(batch)
    moving = batch.levels["sigma_next"] > 0
    # At stage 0 from sigma = ln 7 on, and P(ln sigma > ln ln 7) = 0.1887 under N(-1.1, 4).
    assert moving.double().mean().item() == pytest.approx(0.1887, abs=0.02)
    assert loss.abs().max() < 1e-9


@pytest.mark.parametrize("weighting", ["inverse_gap", "snr_plus_one"])
def test_weight(weighting):
    """A network that answers its sigma loses exactly the gap where the goal is its own answer."""
    objective = ect(Exact(lambda x, s: 0 * x + s), weighting=weighting)
    batch = gaussian_batch(objective, 4096)
    loss, metrics = objective(batch)
    sigma, sigma_next = batch.levels["sigma"], batch.levels["sigma_next"]
    moving = sigma_next > 0
    weight = 1 / (sigma - sigma_next) if weighting == "inverse_gap" else 1 / sigma**2 + 1 / S**2
    torch.testing.assert_close(loss[moving], (weight * (sigma - sigma_next))[moving], rtol=1e-6, atol=0)
    clean = (sigma - batch.x0.flatten()).abs()
    torch.testing.assert_close(metrics["distance"][~moving], clean[~moving], rtol=1e-6, atol=1e-7)


def test_huber_c_reaches_the_loss():
    batch = gaussian_batch(ect(Exact(lambda x, s: x)), 64)
    plain, smooth = (ect(Exact(lambda x, s: x), huber_c=c)(batch)[1]["distance"] for c in (0.0, 0.5))
    torch.testing.assert_close(smooth, torch.sqrt(plain**2 + 0.25) - 0.5)


def test_both_passes_share_the_dropout_mask():
    objective = ect(small_denoiser(dropout=0.5))
    batch = objective.draw(torch.randn(4, 1, 8, 8), None, 0, range(4))
    batch.levels["sigma_next"] = batch.levels["sigma"]
    assert objective(batch)[1]["distance"].abs().max() == 0


def test_the_goal_gets_no_gradient():
    """d/dw |f_w(x) - stopgrad f_w(y)| for f_w = w x: the sign times x, and nothing of y."""
    objective = ect(Exact(lambda x, s: x))
    weight = objective.denoiser.weight
    objective.denoiser.forward = lambda x, sigma, *_: (1 + weight) * x
    batch = gaussian_batch(objective, 256)
    loss, _ = objective(batch)
    loss.sum().backward()
    sigma, sigma_next, x0, noise = *batch.levels.values(), batch.x0.flatten(), batch.noise.flatten()
    difference = torch.where(sigma_next > 0, (sigma - sigma_next) * noise, sigma * noise)
    expected = (difference.sign() * (x0 + sigma * noise) / (sigma - sigma_next)).sum()
    torch.testing.assert_close(weight.grad.double().item(), expected.item(), rtol=1e-4, atol=1e-2)


def test_clean_goals_leave_no_nan_behind():
    objective = ect(small_denoiser())
    batch = objective.draw(torch.randn(64, 1, 8, 8), None, 0, range(64))
    assert (batch.levels["sigma_next"] == 0).any()
    loss, _ = objective(batch)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(p.grad).all() for p in objective.denoiser.parameters())


def test_network_is_preconditioned_as_a_diffusion_model_so_that_its_image_at_no_noise_is_the_goal():
    objective = registry.find("objective", "ect")
    ours, edm = small_denoiser(objective.kind, objective.boundary), small_denoiser("diffusion", "zero")
    x, sigma = torch.randn(5, 1, 8, 8), torch.tensor([1e-5, 0.002, 0.1, 3.0, 80.0])
    assert torch.equal(ours(x, sigma), edm(x, sigma))
    assert ours.config.sigma_boundary == 0
