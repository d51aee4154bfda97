"""Noise grids, proposals and curricula against published numbers and independent formulas."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.settings import typed
from cm_train.models.noise_levels import karras_sigmas
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule, check_noise

ICT = {"name": "lognormal", "mean": -1.1, "std": 2.0}


def schedule(curriculum=None, proposal=None, steps=1000, **values):
    config = {"proposal": proposal or {"name": "uniform"}, "curriculum": curriculum, **values}
    return NoiseSchedule(typed(NoiseConfig, config, "noise"), steps)


def curriculum(steps, **values):
    return schedule(values, steps=steps).num_scales


def stratified(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("num", [2, 3, 18, 151])
@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.01, 50.0, 3.0), (0.003, 14.6, 1.0)])
def test_karras_grid_matches_the_ascending_formula_of_song_et_al(num, low, high, rho):
    # Song et al. 2023, section 4, ascending and in plain Python, for a descending grid in torch.
    a, b = low ** (1 / rho), high ** (1 / rho)
    expected = [(a + i / (num - 1) * (b - a)) ** rho for i in range(num)][::-1]
    grid = karras_sigmas(num, low, high, rho)
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num=st.integers(2, 300), low=st.floats(1e-4, 0.1), high=st.floats(1.0, 200.0), rho=st.floats(1.0, 10.0))
def test_karras_grid_descends_between_exact_ends(num, low, high, rho):
    grid = karras_sigmas(num, low, high, rho)
    assert grid[0].item() == high
    assert grid[-1].item() == low
    assert (grid[:-1] > grid[1:]).all()
    assert len(grid) == num


@pytest.mark.parametrize(
    ("index", "num", "sigma"),
    [
        (11, 18, 0.585),  # CIFAR-10 CD, two steps
        (22, 40, 1.382),  # ImageNet-64 CD
        (106, 201, 1.913),  # ImageNet-64 CT
        (17, 40, 4.366),  # LSUN Bedroom CD, LPIPS
        (18, 40, 3.520),  # LSUN Bedroom CD, l2
        (67, 151, 3.991),  # LSUN Bedroom CT
        (62, 151, 5.249),  # LSUN Cat CT
        (16, 40, 5.38),  # stroke-guided editing
        (20, 40, 2.24),
    ],
)
def test_karras_grid_holds_the_published_levels_by_index(index, num, sigma):
    assert karras_sigmas(num, 0.002, 80.0)[index].item() == pytest.approx(sigma, abs=6e-4)


def test_karras_grid_of_eleven_points_is_as_tabled():
    expected = [80.0, 45.3137, 24.4083, 12.3816, 5.8389, 2.5152, 0.9654, 0.3183, 0.0851, 0.0167, 0.002]
    torch.testing.assert_close(
        karras_sigmas(11, 0.002, 80.0), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5.1e-5
    )


# The iCT proposal on N = 11 points, from the noisiest interval down.
ICT_11 = [0.0040, 0.0089, 0.0196, 0.0411, 0.0806, 0.1424, 0.2135, 0.2455, 0.1817, 0.0626]


def test_lognormal_interval_weights_match_the_tabled_ict_probabilities():
    weights = registry.make("proposal", ICT).interval_weights(karras_sigmas(11, 0.002, 80.0))
    torch.testing.assert_close(weights / weights.sum(), torch.tensor(ICT_11, dtype=torch.float64), rtol=0, atol=5.1e-5)


def test_lognormal_interval_weights_are_probabilities_of_a_normal_law():
    # iCT, eq. 10: differences of erf are twice those of the distribution function.
    grid = karras_sigmas(40, 0.002, 80.0)
    law = NormalDist(-1.1, 2.0)
    expected = [2 * (law.cdf(math.log(a)) - law.cdf(math.log(b))) for a, b in itertools.pairwise(grid)]
    weights = registry.make("proposal", ICT).interval_weights(grid)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14)


def test_sigma_pair_draws_intervals_with_the_ict_probabilities():
    source = schedule({"name": "constant", "num_scales": 11}, ICT)
    n = 100_000
    sigma, sigma_next = source.sigma_pair(stratified(n), 0)
    grid = karras_sigmas(11, 0.002, 80.0).float()
    index = (sigma[:, None] == grid).float().argmax(1)
    assert torch.equal(sigma, grid[index])
    assert torch.equal(sigma_next, grid[index + 1])
    # Stratified uniforms: an interval's share is off by at most one stratum at each end, plus the table's rounding.
    shares = torch.bincount(index, minlength=10).double() / n
    torch.testing.assert_close(shares, torch.tensor(ICT_11, dtype=torch.float64), rtol=0, atol=5.1e-5 + 2 / n)


def test_sigma_pair_draws_uniform_intervals_alike():
    n = 17_000
    sigma, sigma_next = schedule({"name": "constant", "num_scales": 18}).sigma_pair(stratified(n), 0)
    values, counts = sigma.unique(return_counts=True)
    torch.testing.assert_close(values, karras_sigmas(18, 0.002, 80.0)[:-1].flip(0).float(), rtol=0, atol=0)
    assert (counts - n // 17).abs().max() <= 2
    assert (sigma > sigma_next).all()


def test_sigma_pair_stays_on_the_grid_for_extreme_uniforms():
    u = torch.tensor([0.0, 1e-300, 1 - 2**-53], dtype=torch.float64)
    for proposal in (ICT, {"name": "uniform"}):
        sigma, sigma_next = schedule({"name": "constant", "num_scales": 1281}, proposal).sigma_pair(u, 0)
        grid = karras_sigmas(1281, 0.002, 80.0).float()
        assert torch.equal(sigma, grid[[0, 0, -2]])
        assert torch.equal(sigma_next, grid[[1, 1, -1]])
        assert sigma.dtype == sigma_next.dtype == torch.float32


def test_sigma_pair_intervals_include_their_lower_end():
    # Uniforms lie in [0, 1): of two equal intervals the first takes [0, 1/2), the second [1/2, 1).
    u = torch.tensor([0.5 - 2**-53, 0.5], dtype=torch.float64)
    sigma, _ = schedule({"name": "constant", "num_scales": 3}).sigma_pair(u, 0)
    assert torch.equal(sigma, karras_sigmas(3, 0.002, 80.0)[:2].float())


def test_sigma_pair_follows_the_curriculum():
    source = schedule({"name": "doubling", "s0": 2, "s1": 4}, steps=100)
    u = torch.full((1,), 0.99, dtype=torch.float64)  # the lowest interval
    for step, num in ((0, 3), (49, 3), (50, 5), (100, 5)):
        assert source.sigma_pair(u, step)[0] == karras_sigmas(num, 0.002, 80.0)[-2].float()


def test_sigma_pair_reaches_all_of_a_fine_grid_without_equal_neighbours():
    # float32 must still tell neighbours apart at N = 1281, or 1 / (sigma - sigma_next) is infinite.
    sigma, sigma_next = schedule({"name": "constant", "num_scales": 1281}).sigma_pair(stratified(12_800), 0)
    assert sigma.unique().numel() == 1280
    assert (sigma > sigma_next).all()


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.4, 1.0), (-1.1, 2.0)])
def test_lognormal_levels_are_the_quantiles_of_the_law(mean, std):
    u = torch.tensor([1e-6, 0.001, 0.02, 0.25, 0.5, 0.841344746, 0.975, 0.9999, 1 - 1e-6], dtype=torch.float64)
    sigma = registry.make("proposal", {"name": "lognormal", "mean": mean, "std": std}).sigma(u)
    expected = [math.exp(NormalDist(mean, std).inv_cdf(v)) for v in u.tolist()]
    torch.testing.assert_close(sigma, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


def test_lognormal_levels_are_finite_for_every_uniform():
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    sigma = registry.make("proposal", {"name": "lognormal"}).sigma(u)
    assert sigma.isfinite().all()
    assert 0 < sigma[0] < 1e-4
    assert sigma[1] > 1e3


def test_schedule_sigma_keeps_continuous_levels_within_the_range():
    source = schedule(proposal={"name": "lognormal"}, sigma_min=0.05, sigma_max=2.0)
    sigma = source.sigma(stratified(10_000))
    assert sigma.dtype == torch.float32
    assert sigma.min() == torch.tensor(0.05)
    assert sigma.max() == torch.tensor(2.0)
    law = NormalDist(-1.2, 1.2)
    assert (sigma == sigma.min()).float().mean() == pytest.approx(law.cdf(math.log(0.05)), abs=2e-4)
    assert sigma.median() == pytest.approx(math.exp(-1.2), rel=1e-3)


def test_noise_that_cannot_serve_the_objective_is_refused():
    uniform, lognormal = {"name": "uniform"}, {"name": "lognormal"}
    grid = {"name": "constant", "num_scales": 18}
    with pytest.raises(InputError, match="lognormal"):
        check_noise(NoiseConfig(proposal=uniform, curriculum=grid), "continuous")
    with pytest.raises(InputError, match=r"noise\.curriculum"):
        check_noise(NoiseConfig(proposal=lognormal), "grid")
    check_noise(NoiseConfig(proposal=lognormal, curriculum=grid), "grid")
    check_noise(NoiseConfig(proposal=lognormal), "continuous")


# Song et al. 2023, appendix C, evaluated with the paper's own settings.
PAPER = [
    # K, s1, {step: N}
    (800_000, 150, {0: 2, 1: 3, 800: 6, 200_000: 76, 400_000: 107, 789_437: 150, 789_438: 151, 799_999: 151}),
    (800_000, 200, {0: 2, 1: 3, 800: 7, 200_000: 101, 400_000: 143, 799_999: 201}),
    (1_000_000, 150, {0: 2, 1: 3, 1000: 6, 250_000: 76, 500_000: 107, 999_999: 151}),
]


@pytest.mark.parametrize(("steps", "s1", "table"), PAPER, ids=["cifar", "imagenet64", "lsun"])
def test_sqrt_curriculum_matches_the_tabled_scales(steps, s1, table):
    num_scales = curriculum(steps, name="sqrt", s0=2, s1=s1)
    assert {k: num_scales(k) for k in table} == table
    for k in (steps, steps + 1, 2 * steps, 10**9):
        assert num_scales(k) == s1 + 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), s0=st.integers(2, 10), extra=st.integers(0, 200), steps=st.integers(1, 1_000_000))
def test_sqrt_curriculum_matches_integer_arithmetic(data, s0, extra, steps):
    # ceil(x - 1) + 1 = ceil(x), and n = ceil(sqrt(a / K)) is the least n with n^2 K >= a.
    s1 = s0 + extra
    k = data.draw(st.integers(0, steps - 1))
    numerator = k * ((s1 + 1) ** 2 - s0**2) + s0**2 * steps
    n = math.isqrt(numerator // steps)
    while n * n * steps < numerator:
        n += 1
    assert curriculum(steps, name="sqrt", s0=s0, s1=s1)(k) == n


def test_sqrt_curriculum_has_two_scales_at_step_zero_only():
    num_scales = curriculum(800_000, name="sqrt")
    assert [num_scales(k) for k in range(4)].count(2) == 1
    sampled = [num_scales(k) for k in range(0, 800_001, 997)]
    assert sampled == sorted(sampled)


def test_doubling_curriculum_matches_the_ict_table():
    num_scales = curriculum(400_000, name="doubling")
    for stage, expected in enumerate([11, 21, 41, 81, 161, 321, 641, 1281]):
        assert num_scales(stage * 50_000) == num_scales(stage * 50_000 + 49_999) == expected
    assert num_scales(400_000) == num_scales(10**9) == 1281


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), s0=st.integers(1, 20), extra=st.integers(0, 1500), steps=st.integers(1, 3_000))
def test_doubling_curriculum_matches_the_formula(data, s0, extra, steps):
    # iCT, section 3.4. K' = floor(K / (log2 r + 1)) in whole numbers: the largest L with r^L <= 2^(K - L); at least 1.
    s1 = s0 + extra
    k = data.draw(st.integers(0, 2 * steps))
    ratio, low, high = s1 // s0, 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ratio**middle <= 2 ** (steps - middle) else (low, middle - 1)
    length = max(low, 1)
    assert curriculum(steps, name="doubling", s0=s0, s1=s1)(k) == min(s0 * 2 ** (k // length), s1) + 1


def test_constant_curriculum_never_changes():
    num_scales = curriculum(100, name="constant", num_scales=18)
    assert {num_scales(k) for k in (0, 1, 50, 100, 1000)} == {18}


def test_first_num_intervals_anchors_the_target_decay():
    # mu(k) = exp(s0 ln mu0 / N(k)): with the paper's CIFAR-10 settings it must start at mu0.
    source = schedule({"name": "sqrt", "s0": 2, "s1": 150}, steps=800_000)
    assert math.exp(source.first_num_intervals * math.log(0.9) / source.num_scales(0)) == pytest.approx(0.9)
    assert schedule({"name": "doubling"}).first_num_intervals == 10
    assert schedule({"name": "constant", "num_scales": 18}).first_num_intervals == 17


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"curriculum": {"name": "sqrt", "s0": 5, "s1": 4}}, "s1"),
        ({"curriculum": {"name": "doubling", "s0": 20, "s1": 10}}, "s1"),
        ({"curriculum": {"name": "sqrt", "s0": 1}}, r"curriculum\.s0"),
        ({"curriculum": {"name": "constant", "num_scales": 1}}, r"curriculum\.num_scales"),
        ({"curriculum": {"name": "sqroot"}}, "curriculum"),
        ({"sigma_min": 1.0, "sigma_max": 1.0}, "sigma_max"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max"),
        ({"sigma_min": 0.0}, r"noise\.sigma_min"),
        ({"rho": -1.0}, r"noise\.rho"),
        ({"proposal": {"name": "lognormal", "std": 0.0}}, r"proposal\.std"),
        ({"proposal": {"name": "lognormal", "scale": 1.0}}, r"proposal\.scale"),
        ({"proposal": {}}, "proposal"),
    ],
)
def test_noise_config_refuses_settings_that_contradict(values, key):
    with pytest.raises(InputError, match=key) as caught:
        typed(NoiseConfig, {"proposal": {"name": "uniform"}, **values}, "noise")
    assert "\n" not in str(caught.value)


def test_noise_config_says_once_what_it_got():
    with pytest.raises(InputError) as caught:
        typed(NoiseConfig, {"proposal": {"name": "lognormal", "std": -1.0}}, "noise")
    assert str(caught.value).count("got") == 1
