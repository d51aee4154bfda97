"""The learned weight of a noise level: where its optimum lies, and what it does to a diffusion model's loss."""

import math
from dataclasses import replace

import pytest
import torch
from test_objectives import Exact, M, S, gaussian_batch, small_denoiser

from cm_train.core import registry
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule


def edm(denoiser, **settings):
    noise = NoiseSchedule(NoiseConfig(proposal={"name": "lognormal", "mean": -1.2, "std": 1.2}), 10)
    return registry.make("objective", {"name": "edm", **settings}, denoiser, noise, seed=0)


def zero(x, sigma):
    return x * 0


def test_uncertainty_learns_the_logarithm_of_the_expected_loss():
    """A denoiser that says 0 loses (1/sigma^2 + 1/sigma_data^2) x0^2; u(sigma) = ln E of that, which is not E ln."""
    objective = edm(Exact(zero), weighting="learned").double()
    batch = gaussian_batch(objective, 50_000)
    optimizer = torch.optim.LBFGS(
        objective.weighting.parameters(), max_iter=400, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(batch)[0].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    sigma = torch.tensor([0.03, 0.1, 0.3, 1.0, 3.0], dtype=torch.float64)  # two standard deviations either way
    expected = ((1 / sigma**2 + 1 / S**2) * (M**2 + S**2)).log()
    found = -objective.weighting.w(sigma).detach()
    print("u", found.tolist(), "expected", expected.tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    # There the loss is 1 + u on average, and without u's part each noise level has 1.
    weighted = objective(batch)[0] + objective.weighting.w(batch.levels["sigma"])
    low = batch.levels["sigma"] < math.exp(-1.2)
    assert weighted[low].mean().item() == pytest.approx(1, abs=0.03)
    assert weighted[~low].mean().item() == pytest.approx(1, abs=0.03)


def test_learned_loss_is_the_fixed_one_at_first():
    fixed, learned = edm(Exact(zero)), edm(Exact(zero), weighting="learned")
    batch = gaussian_batch(fixed, 16)
    assert torch.equal(learned.double()(batch)[0], fixed.double()(batch)[0])
    assert fixed.weighting is None
    assert fixed.extra_state() == {}
    assert learned.extra_state().keys() == {"weight", "bias"}


def test_learned_loss_and_its_gradients_are_those_of_equation_21():
    """exp(-u) L + u, of which u's derivative is 1 - exp(-u) L and the network's is exp(-u) times the fixed one's."""
    fixed = edm(small_denoiser("diffusion", "zero")).double()
    learned = edm(small_denoiser("diffusion", "zero"), weighting="learned").double()
    u = 0.7
    with torch.no_grad():
        learned.weighting.bias.fill_(-u)
    x0 = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = fixed.draw(x0, None, 0, range(4))
    batch = replace(batch, noise=batch.noise.double(), levels={k: v.double() for k, v in batch.levels.items()})
    plain, loss = fixed(batch)[0], learned(batch)[0]
    torch.testing.assert_close(loss, math.exp(-u) * plain + u)
    plain.sum().backward()
    loss.sum().backward()
    for a, b in zip(fixed.denoiser.parameters(), learned.denoiser.parameters(), strict=True):
        torch.testing.assert_close(b.grad, math.exp(-u) * a.grad)
    torch.testing.assert_close(learned.weighting.bias.grad, (math.exp(-u) * plain - 1).sum().view(1).detach())


def test_distance_is_reported_without_weights():
    """Else a run's curve would show what the weights learn."""
    learned = edm(Exact(zero), weighting="learned").double()
    batch = gaussian_batch(learned, 16)
    with torch.no_grad():
        learned.weighting.bias.fill_(2.0)
    torch.testing.assert_close(learned(batch)[1]["distance"], batch.x0.flatten().square())
