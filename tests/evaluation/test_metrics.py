"""Each metric against closed forms, other people's code, and a computation in loops."""

import math

import pytest
import torch

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.data.pixels import to_unit_range
from cm_train.evaluation.gaussian import Gaussian
from cm_train.evaluation.metrics.agreement import agreement
from cm_train.evaluation.metrics.base import Real
from cm_train.evaluation.metrics.frechet import frechet_distance
from cm_train.evaluation.metrics.kid import mmd
from cm_train.evaluation.seen import Seen


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(features, logits=None):
    return Seen(features, logits)


def real(features, held_out=None, name="pixels"):
    return Real(name, seen(features), held_out=None if held_out is None else seen(held_out))


def measured(name, samples, against, **settings):
    metric = registry.make("metric", {"name": name, **settings})
    assert metric.lacks(samples, against) is None
    return metric.measure(samples, against)


# ------------------------------------------------------------------------------------------------------------- Fréchet


def test_frechet_distance_of_known_gaussians():
    """||m1 - m2||^2 + tr(C1 + C2 - 2 sqrt(C1 C2)); for diagonal covariances that is a sum over coordinates."""
    x = drawn(0, 50_000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly white
    s1, s2, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 1.0, 0.5]), torch.tensor([0.3, 0.0, -1.0])
    expected = (shift.square() + (s1 - s2).square()).sum().item()
    assert frechet_distance(x * s1, x * s2 + shift) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x * s1, Gaussian.of(x * s2 + shift)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_against_the_matrix_square_root():
    from scipy.linalg import sqrtm

    mix = drawn(1, 5, 5)
    x, y = drawn(2, 400, 5) @ mix, drawn(3, 300, 5) @ mix.T + 1
    cx, cy = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + (cx + cy - 2 * sqrtm(cx @ cy).real).trace()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(x, Gaussian.of(y)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_bears_singular_features():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 2]
    moved = x + torch.tensor([2.0, 0, 0, 0])
    assert frechet_distance(x, moved) == pytest.approx(4, rel=1e-5)
    assert frechet_distance(x, Gaussian.of(moved)) == pytest.approx(4, rel=1e-5)
    few = drawn(4, 5, 40)  # fewer images than features
    assert frechet_distance(few, Gaussian.of(few + 1)) == pytest.approx(40, rel=1e-6)


def test_fd_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = drawn(5, 300, 16) @ drawn(6, 16, 16), drawn(7, 260, 16) + 0.2
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    expected = theirs["frechet_inception_distance"]
    assert measured("fd", seen(x), real(y))["fd"] == pytest.approx(expected, rel=1e-6)
    assert measured("fid", seen(x), real(y, name="inception"))["fid"] == pytest.approx(expected, rel=1e-6)


def test_gaussian_is_the_sample_mean_and_covariance():
    x = drawn(8, 5000, 6) + 3
    found = Gaussian.of(x.float())
    torch.testing.assert_close(found.mean, x.float().double().mean(0))
    torch.testing.assert_close(found.cov, torch.cov(x.float().double().T))
    torch.testing.assert_close(found.root.T @ found.root, found.cov)


# ----------------------------------------------------------------------------------------------------------------- KID


def test_mmd_against_loops():
    x, y = drawn(0, 9, 4), drawn(1, 7, 4)

    def k(a, b):
        return (a @ b / 4 + 1).item() ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (9 * 8)
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (7 * 6)
    across = sum(k(a, b) for a in x for b in y) / (9 * 7)
    assert mmd(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)


def test_mmd_of_shifted_normals():
    """For N(0, 1) and N(m, 1) in one dimension the kernel's means are polynomials in the moments of both."""
    m, x, y = 0.7, drawn(2, 5000, 1), drawn(3, 5000, 1) + 0.7
    second, third = 1 + m**2, m**3 + 3 * m
    across = 1 + 3 * second
    expected = 4 + (1 + 3 * m**2 + 3 * second**2 + third**2) - 2 * across
    assert mmd(x, y) == pytest.approx(expected, rel=0.15)
    assert abs(mmd(x, drawn(4, 5000, 1))) < 0.02 * expected


def test_mmd_is_unbiased_for_few_images():
    """Over many small sets of one distribution its mean is 0, which that of a biased estimate is not."""
    estimates = torch.tensor([mmd(drawn(2 * i, 8, 3), drawn(2 * i + 1, 8, 3)) for i in range(2000)])
    assert abs(estimates.mean()) < 4 * estimates.std() / math.sqrt(len(estimates))


def test_kid_of_subsets_is_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    x, y = drawn(5, 300, 8), drawn(6, 300, 8) + 0.3
    expected = poly_mmd(x, y).item()
    # One subset that is the whole set, in whatever order.
    assert measured("kid", seen(x), real(y), subset_size=300, subsets=1)["kid"] == pytest.approx(expected, rel=1e-6)
    assert measured("kid", seen(x), real(y), subset_size=301)["kid"] == pytest.approx(expected, rel=1e-6)
    assert measured("kid", seen(x), real(y), subset_size=100)["kid"] == pytest.approx(expected, rel=0.3)


# ------------------------------------------------------------------------------------------ scores of classes, and sets


def test_inception_score_of_sure_classes_is_their_number():
    sure = 200.0 * torch.eye(4).repeat(250, 1)
    against = real(drawn(0, 10, 2))
    assert measured("is", seen(sure, sure), against)["is"] == pytest.approx(4, rel=0.02)
    alike = torch.zeros(1000, 4)
    assert measured("is", seen(alike, alike), against)["is"] == pytest.approx(1, abs=1e-9)
    metric = registry.make("metric", {"name": "is"})
    assert "knows no classes" in metric.lacks(seen(sure), against)


def test_precision_and_recall_by_hand():
    """Real images at 0, 1, 2, 3 on a line: the 1st neighbour is 1 away, so each covers its surroundings up to 1."""
    there = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    made = torch.tensor([[0.5], [3.2], [9.0], [9.5]])
    found = measured("pr", seen(made), real(there), neighbours=1)
    assert found["precision"] == 0.5  # 9 and 9.5 are far from all
    # Made ones cover 2.7 (0.5 to 3.2) about 0.5 and 3.2, and 0.5 about 9 and 9.5: all four real ones are within.
    assert found["recall"] == 1.0
    same = measured("pr", seen(there), real(there), neighbours=1)
    assert same == {"precision": 1.0, "recall": 1.0}


def test_density_and_coverage_against_loops():
    there, made, k = drawn(0, 40, 3), drawn(1, 30, 3) * 0.8, 5
    radius = [sorted((a - b).norm().item() for b in there)[k] for a in there]
    inside = [[(a - b).norm().item() < r for b, r in zip(there, radius, strict=True)] for a in made]
    density = sum(map(sum, inside)) / (k * len(made))
    coverage = sum(any(row[i] for row in inside) for i in range(len(there))) / len(there)
    found = measured("density", seen(made), real(there))
    assert found["density"] == pytest.approx(density) and found["coverage"] == pytest.approx(coverage)


def test_density_of_the_same_distribution_is_one():
    found = measured("density", seen(drawn(2, 3000, 2)), real(drawn(3, 3000, 2)))
    assert found["density"] == pytest.approx(1, abs=0.05)  # E = 1, Naeem et al. 2020, lemma 2
    assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)  # 1 - 1 / 2^k for equal numbers, lemma 1


# --------------------------------------------------------------------------------------------------------- memorisation


def test_memorisation_of_copies_and_of_a_model_that_learnt():
    training, held_out = drawn(0, 500, 4), drawn(1, 400, 4)
    against = real(training, held_out)
    copied = measured("memorisation", seen(training[:100]), against)
    assert copied == {"copies": 1.0, "nearer": 1.0}
    fresh = measured("memorisation", seen(drawn(2, 4000, 4)), against)
    assert fresh["copies"] == pytest.approx(0.05, abs=0.03) and fresh["nearer"] == pytest.approx(0.5, abs=0.03)
    far = measured("memorisation", seen(drawn(3, 50, 4) + 30), against)
    assert far == {"copies": 0.0, "nearer": 0.0}
    half = measured("memorisation", seen(torch.cat([training[:50], drawn(3, 50, 4) + 30])), against)
    assert half == {"copies": 0.5, "nearer": 0.5}


def test_memorisation_counts_ties_half():
    training = torch.tensor([[0.0]])
    held_out = torch.tensor([[1.0], [2.0]]).repeat(10, 1)
    found = measured("memorisation", seen(torch.tensor([[1.0], [-2.0], [1.5]])), real(training.repeat(2, 1), held_out))
    # Against 1, 2: the one at 1 ties and is less; that at 2 is more and ties; 1.5 is more and less.
    assert found["nearer"] == pytest.approx((0.75 + 0.25 + 0.5) / 3)


# ---------------------------------------------------------------------------------------------------- what can't be had


def test_metrics_say_what_they_lack():
    few, statistics = seen(drawn(0, 3, 2)), Real("inception", None, Gaussian.of(drawn(1, 9, 2)))
    lacks = {name: registry.make("metric", {"name": name}).lacks(few, statistics) for name in registry.names("metric")}
    assert lacks["fd"] is None and lacks["fid"] is None
    assert "statistics" in lacks["kid"] and "statistics" in lacks["pr"] and "statistics" in lacks["density"]
    assert "held_out=" in lacks["memorisation"]
    with_images = real(drawn(1, 9, 2))
    assert "features=inception" in registry.make("metric", {"name": "fid"}).lacks(few, with_images)
    assert "takes 4 images" in registry.make("metric", {"name": "pr"}).lacks(few, with_images)
    with pytest.raises(InputError, match=r"unknown metric; got 'fdi'; allowed: density, fd, fid.*metrics=fd"):
        registry.make("metric", {"name": "fdi"})


def test_agreement_by_hand():
    reference = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    reference[:, :, 0] = 255
    assert agreement(reference, reference).rms == 0
    halved = torch.full_like(reference, 64)
    halved[:, :, 0] = 191
    found = agreement(halved, reference)
    assert found.rms == pytest.approx(64 / 127.5)
    assert found.std_ratio == pytest.approx((to_unit_range(halved).std() / 1.0690).item(), rel=1e-3)
