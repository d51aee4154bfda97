"""Solvers and samplers on data whose probability flow is known in closed form (float64)."""

import itertools
import math

import pytest
import torch

from cm_train.core import registry
from cm_train.models.noise_levels import karras_sigmas
from cm_train.sampling.samplers.euler import Euler, euler_step
from cm_train.sampling.samplers.heun import Heun, heun_step
from cm_train.sampling.samplers.multistep import Multistep

# Every sampler that solves the ODE is held to the order and the number of calls that it states.
SOLVERS = [
    s for s in (registry.make("sampler", {"name": name}) for name in registry.names("sampler")) if s.order is not None
]
LOW, HIGH = 0.002, 80.0
M, S = 0.3, 0.5  # data N(M, S^2)


def column(sigma, x):
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def gaussian(x, sigma):
    """The exact denoiser of N(M, S^2)."""
    v = column(sigma, x) ** 2
    return (S * S * x + v * M) / (S * S + v)


def exact(x, sigma, end=LOW):
    """The exact probability-flow solution of N(M, S^2), which is its consistency function for end = LOW."""
    return M + (x - M) * ((S * S + end * end) / (S * S + column(sigma, x) ** 2)) ** 0.5


MEANS, STDS, SHARES = (
    torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.1, 0.7], [0.15, 0.08, 0.2], [0.3, 0.3, 0.4])
)


def mixture(x, sigma):
    """The exact denoiser of a mixture of three Gaussians: the posterior mean, component by component."""
    v = STDS**2 + column(sigma, x)[..., None] ** 2
    offset = x[..., None] - MEANS
    logits = SHARES.log() - 0.5 * v.log() - 0.5 * offset**2 / v
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return (weights * (MEANS + STDS**2 / v * offset)).sum(-1) / weights.sum(-1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def descend(stepper, denoise, x, steps):
    """From HIGH to LOW in `steps` steps of the Karras grid, without the last step to 0."""
    grid = karras_sigmas(steps + 1, LOW, HIGH)
    for sigma, sigma_next in itertools.pairwise(grid):
        x = stepper(denoise, x, sigma.expand(len(x)), sigma_next.expand(len(x)))
    return x


def solved(sampler, denoise, x, sigmas):
    return sampler.sample(denoise, x, sigmas, boundary=0.0, noise=None)


def multistep(denoise, x, sigmas, boundary, noise):
    return Multistep(Multistep.Config()).sample(denoise, x, sigmas, boundary, noise)


def counted(denoise):
    calls = []

    def call(x, sigma):
        calls.append(sigma.tolist())
        return denoise(x, sigma)

    return call, calls


# Global error at sigma_min from x = 60 at sigma_max, by number of steps.
TABLE = {
    euler_step: {18: 5.448e-2, 36: 2.832e-2, 72: 1.444e-2, 144: 7.291e-3},
    heun_step: {18: 1.827e-2, 36: 4.303e-3, 72: 1.044e-3, 144: 2.572e-4},
}


@pytest.mark.parametrize("stepper", [euler_step, heun_step])
@pytest.mark.parametrize("steps", [18, 36, 72, 144])
def test_steps_make_the_tabled_error_on_a_gaussian(stepper, steps):
    x = tensor([60.0])
    error = (descend(stepper, gaussian, x, steps) - exact(x, tensor(HIGH))).abs().item()
    assert error == pytest.approx(TABLE[stepper][steps], rel=1e-3)


def slack(order):
    return 0.05 + 0.05 * order  # of the order that is seen with 36 steps and more


@pytest.mark.parametrize("solver", SOLVERS, ids=type)
@pytest.mark.parametrize("start", [60.0, -130.0])
def test_steps_have_their_order(solver, start):
    x = tensor([start])
    errors = [(descend(solver.step, gaussian, x, n) - exact(x, tensor(HIGH))).abs().item() for n in (36, 72, 144, 288)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=slack(solver.order))


def test_the_solvers_are_of_the_order_that_they_are_known_for():
    assert (Euler.order, Heun.order) == (1, 2)


def test_heun_step_matches_the_mean_of_two_slopes():
    # On the line x' = x / sigma * sigma^2 / (S^2 + sigma^2) the two slopes can be written down.
    x, sigma, sigma_next = tensor([1.7]), tensor(2.0), tensor(0.5)
    k, k_next = 2.0 / (S * S + 4.0), 0.5 / (S * S + 0.25)
    d = k * (1.7 - M)
    predicted = 1.7 - 1.5 * d
    torch.testing.assert_close(euler_step(gaussian, x, sigma, sigma_next), tensor([predicted]))
    expected = 1.7 - 1.5 * (d + k_next * (predicted - M)) / 2
    torch.testing.assert_close(heun_step(gaussian, x, sigma, sigma_next), tensor([expected]))


@pytest.mark.parametrize("stepper", [euler_step, heun_step])
def test_steps_take_a_level_of_its_own_for_each_image(stepper):
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, sigma_next = tensor(80.0, 3.0, 0.1), tensor(40.0, 2.0, 0.002)
    together = stepper(gaussian, x, sigma, sigma_next)
    for i in range(3):
        alone = stepper(gaussian, x[i : i + 1], sigma[i : i + 1], sigma_next[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize(("stepper", "calls"), [(euler_step, [[80.0]]), (heun_step, [[80.0], [40.0]])])
def test_steps_call_the_network_at_their_ends(stepper, calls):
    denoise, seen = counted(gaussian)
    stepper(denoise, tensor([5.0]), tensor(80.0), tensor(40.0))
    assert seen == calls


def test_euler_step_to_zero_is_the_denoiser():
    x = tensor([60.0], [-3.0])
    sigma = tensor(80.0, 0.7)
    torch.testing.assert_close(euler_step(gaussian, x, sigma, torch.zeros_like(sigma)), gaussian(x, sigma))


@pytest.mark.parametrize("solver", SOLVERS, ids=type)
def test_solvers_reach_zero_noise_with_their_order(solver):
    # The last step to 0 is exact to sigma_min^2 here: compare with the exact flow all the way to 0.
    x = tensor([60.0])
    errors = []
    for steps in (36, 72, 144):
        out = solved(solver, gaussian, x, karras_sigmas(steps + 1, LOW, HIGH).tolist())
        errors.append((out - exact(x, tensor(HIGH), end=0.0)).abs().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=slack(solver.order))


@pytest.mark.parametrize("num", [1, 2, 18, 40])
def test_solvers_cost_the_published_number_of_calls(num):
    sigmas = karras_sigmas(max(num, 2), LOW, HIGH).tolist()[:num]
    for solver, nfe in ((Euler(Euler.Config()), num), (Heun(Heun.Config()), 2 * num - 1)):
        denoise, seen = counted(gaussian)
        solved(solver, denoise, tensor([5.0]), sigmas)
        assert len(seen) == solver.num_calls(num) == nfe
        assert sorted({s for (s,) in seen}, reverse=True) == sigmas  # every level, no other, 0 never


def test_heun_costs_35_calls_on_18_levels():
    denoise, seen = counted(gaussian)
    solved(Heun(Heun.Config()), denoise, tensor([5.0]), karras_sigmas(18, LOW, HIGH).tolist())
    assert len(seen) == 35  # Karras et al. 2022, CIFAR-10


@pytest.mark.parametrize("solver", SOLVERS, ids=type)
def test_solvers_on_one_level_are_the_denoiser(solver):
    x = tensor([60.0], [-3.0])
    assert torch.equal(solved(solver, gaussian, x, [HIGH]), gaussian(x, tensor(HIGH, HIGH)))


def flow_by_rk4(x, denoise, steps, start=HIGH, end=LOW):
    """The probability flow by classical Runge-Kutta in ln(sigma), sharing nothing with the solvers."""
    h = (math.log(end) - math.log(start)) / steps

    def rate(x, u):
        return x - denoise(x, torch.tensor(math.exp(u), dtype=torch.float64).expand(len(x)))  # dx / d ln(sigma)

    for i in range(steps):
        u = math.log(start) + i * h
        a = rate(x, u)
        b = rate(x + h / 2 * a, u + h / 2)
        c = rate(x + h / 2 * b, u + h / 2)
        d = rate(x + h * c, u + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


@pytest.fixture(scope="module")
def mixture_flow():
    mean = (SHARES * MEANS).sum()
    std = ((SHARES * (STDS**2 + MEANS**2)).sum() - mean**2 + HIGH**2).sqrt()
    x = (mean + torch.linspace(-2.5, 2.5, 201, dtype=torch.float64) * std)[:, None]
    return x, flow_by_rk4(x, mixture, 500)


def test_runge_kutta_reference_agrees_with_the_closed_form():
    x = tensor([60.0], [-20.0])
    torch.testing.assert_close(flow_by_rk4(x, gaussian, 500), exact(x, tensor(HIGH, HIGH)), rtol=0, atol=1e-7)


# Root-mean-square errors over the marginal from -2.5 to 2.5 standard deviations.
@pytest.mark.parametrize(
    ("stepper", "steps", "rms"),
    [(heun_step, 18, 2.727e-2), (heun_step, 72, 2.204e-3), (heun_step, 144, 5.424e-4), (euler_step, 72, 1.912e-2)],
)
def test_steps_solve_a_mixture_with_the_tabled_error(stepper, steps, rms, mixture_flow):
    x, expected = mixture_flow
    error = (descend(stepper, mixture, x, steps) - expected).square().mean().sqrt().item()
    assert error == pytest.approx(rms, rel=5e-3)


def test_heun_solves_a_mixture_down_to_zero(mixture_flow):
    x, at_low = mixture_flow
    expected = mixture(at_low, torch.full((len(x),), LOW, dtype=torch.float64))
    errors = []
    for steps in (144, 288):
        out = solved(Heun(Heun.Config()), mixture, x, karras_sigmas(steps + 1, LOW, HIGH).tolist())
        errors.append((out - expected).square().mean().sqrt().item())
    assert errors[0] < 6e-4
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


def test_multistep_with_one_level_is_one_call_of_the_consistency_function():
    x = tensor([60.0], [-3.0])
    denoise, seen = counted(exact)
    assert torch.equal(multistep(denoise, x, [HIGH], LOW, noise=None), exact(x, tensor(HIGH, HIGH)))
    assert seen == [[HIGH, HIGH]]


def test_one_step_has_the_tabled_mean_and_standard_deviation():
    # Linear in the noise, so two noises tell mean and standard deviation over N(0, HIGH^2).
    low, high = multistep(exact, HIGH * tensor([-1.0], [1.0]), [HIGH], LOW, noise=None).flatten().tolist()
    assert (low + high) / 2 == pytest.approx(0.298125, abs=5e-7)
    assert (high - low) / 2 == pytest.approx(0.499994, abs=5e-7)


LEVELS = [80.0, 5.249, 0.821, 0.1, 0.01]


def spread(initial_std, levels):
    """Variance of the multistep output, exactly: each independent noise is one coordinate of an 'image'.

    With the linear map of N(0, S^2) a sample is a combination of its noises, and the vector holds the factors.
    """
    basis = torch.eye(len(levels), dtype=torch.float64)

    def linear(x, sigma):
        return exact(x + M, sigma) - M

    x = multistep(linear, initial_std * basis[:1], levels, LOW, noise=lambda i: basis[i : i + 1])
    return x.square().sum().item()


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5])
def test_multistep_keeps_the_variance(num):
    # From the exact marginal at the first level. Re-noising by sigma itself would add LOW^2 = 4e-6 less what f takes.
    variance = spread((S * S + HIGH * HIGH) ** 0.5, LEVELS[:num])
    assert variance == pytest.approx(S * S + LOW * LOW, abs=1e-10)


def test_multistep_from_pure_noise_has_the_tabled_deviation():
    assert spread(HIGH, [HIGH]) ** 0.5 == pytest.approx(0.499994, abs=5e-7)
    # Pure noise lacks the data's share of the variance at HIGH; each later level shrinks what is missing.
    missing = S * S + LOW * LOW - spread(HIGH, [HIGH])
    factor = (S * S + LOW * LOW) / (S * S + 0.821**2)
    assert spread(HIGH, [HIGH, 0.821]) == pytest.approx(S * S + LOW * LOW - factor * missing, abs=1e-12)


def test_multistep_costs_one_call_a_level_and_draws_noise_for_each_but_the_first():
    denoise, seen = counted(exact)
    drawn = []

    def noise(i):
        drawn.append(i)
        return tensor([0.3])

    multistep(denoise, tensor([5.0]), LEVELS, LOW, noise)
    assert [s for (s,) in seen] == LEVELS
    assert Multistep(Multistep.Config()).num_calls(len(LEVELS)) == 5
    assert drawn == [1, 2, 3, 4]


def test_multistep_adds_no_noise_at_sigma_min():
    # The published index lists end with the last grid point, where sqrt(sigma^2 - sigma_min^2) = 0.
    x = tensor([5.0])
    identity_at_low = multistep(exact, x, [HIGH, LOW], LOW, noise=lambda i: tensor([1e6]))
    torch.testing.assert_close(identity_at_low, exact(x, tensor(HIGH)), rtol=1e-12, atol=0)
