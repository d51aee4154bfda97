import pytest
import torch

from cm_train.core import registry
from cm_train.data.pixels import to_unit_range
from cm_train.evaluation.metrics.agreement import agreement
from cm_train.evaluation.metrics.classifier import train_classifier
from cm_train.evaluation.metrics.frechet import frechet_distance


def test_frechet_distance_of_known_gaussians():
    """||m1 - m2||^2 + tr(C1 + C2 - 2 sqrt(C1 C2)); for diagonal covariances that is a sum over coordinates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 3, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly white
    s1, s2, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 1.0, 0.5]), torch.tensor([0.3, 0.0, -1.0])
    expected = (shift.square() + (s1 - s2).square()).sum().item()
    assert frechet_distance(x * s1, x * s2 + shift) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_against_the_matrix_square_root():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64) @ mix
    y = torch.randn(300, 5, generator=generator, dtype=torch.float64) @ mix.T + 1
    cx, cy = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + (cx + cy - 2 * sqrtm(cx @ cy).real).trace()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_bears_singular_features():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 2]
    assert frechet_distance(x, x + torch.tensor([2.0, 0, 0, 0])) == pytest.approx(4, rel=1e-5)


def test_agreement_by_hand():
    reference = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    reference[:, :, 0] = 255
    assert agreement(reference, reference).rms == 0
    halved = torch.full_like(reference, 64)
    halved[:, :, 0] = 191
    measured = agreement(halved, reference)
    assert measured.rms == pytest.approx(64 / 127.5)
    assert measured.std_ratio == pytest.approx((to_unit_range(halved).std() / 1.0690).item(), rel=1e-3)


def digits(split):
    dataset = registry.make("dataset", {"name": "digits", "split": split, "conditional": True})
    return dataset.gather(torch.arange(len(dataset)))


def test_classifier_knows_held_out_digits_and_is_repeatable():
    images, labels = digits("train")
    held_out, held_out_labels = digits("test")
    one, two = (train_classifier(images, labels, epochs=4) for _ in range(2))
    assert (one.labels(held_out) == held_out_labels).float().mean() > 0.93
    assert torch.equal(one.features(held_out), two.features(held_out))
    # The distance that the measures use tells the originals from their first two moments.
    real = one.features(images)
    x = to_unit_range(images).flatten(1)
    noise = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(0)) / (len(x) - 1) ** 0.5
    gaussian = (x.mean(0) + noise @ (x - x.mean(0))).clamp(-1, 1).view(-1, 1, 8, 8)
    far = frechet_distance(one.body(gaussian).detach(), real)
    near = frechet_distance(one.features(held_out), real)
    assert far > 3 * near
