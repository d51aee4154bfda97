"""Distances against hand-computed values and their limits."""

import math

import pytest
import torch

from cm_train.objectives.distances import l1, l2, pseudo_huber


def pair(differences):
    """Two batches [B, 1, 1, D] with these differences, neither of them zero."""
    d = torch.tensor(differences, dtype=torch.float64)[:, None, None]
    x = torch.linspace(-1, 1, d.shape[-1], dtype=torch.float64) + d
    return x, x - d


def test_l2_and_l1_are_means_over_the_pixels_of_each_image():
    x, y = pair([[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, -2.0]])
    torch.testing.assert_close(l2(x, y), torch.tensor([25 / 4, 7 / 4], dtype=torch.float64))
    torch.testing.assert_close(l1(x, y), torch.tensor([7 / 4, 5 / 4], dtype=torch.float64))


def test_pseudo_huber_is_one_root_of_one_norm_an_image():
    x, y = pair([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 12.0, 0.0]])
    # iCT, eq. 8: sqrt(5^2 + 12^2) - 12 = 1 and sqrt(12^2 + 5^2) - 5 = 8.
    torch.testing.assert_close(pseudo_huber(x, y, 12.0)[0].item(), 1.0)
    torch.testing.assert_close(pseudo_huber(x, y, 5.0)[1].item(), 8.0)


def test_pseudo_huber_is_not_the_elementwise_loss():
    x, y = pair([[3.0, -4.0, 0.0, 0.0]])
    elementwise = sum(math.sqrt(d * d + 1) - 1 for d in (3, -4, 0, 0))
    value = pseudo_huber(x, y, 1.0).item()
    assert value == pytest.approx(math.sqrt(26) - 1)
    assert abs(value - elementwise) > 0.5
    assert abs(value - elementwise / 4) > 0.5


@pytest.mark.parametrize(("shape", "c"), [((3, 32, 32), 0.0299), ((3, 64, 64), 0.0599), ((1, 8, 8), 0.0043)])
def test_pseudo_huber_default_smoothing_is_the_papers(shape, c):
    # d = sqrt(r^2 + c^2) - c gives c = (r^2 - d^2) / (2 d).
    x = torch.zeros(1, *shape, dtype=torch.float64)
    x[0, 0, 0, 0] = 0.05
    d = pseudo_huber(x, torch.zeros_like(x)).item()
    assert (0.05**2 - d * d) / (2 * d) == pytest.approx(c, abs=5.1e-5)


@pytest.mark.parametrize("distance", [l1, l2, pseudo_huber])
def test_distances_are_symmetric_zero_at_equality_and_per_image(distance):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert distance(x, y).shape == (3,)
    torch.testing.assert_close(distance(x, y), distance(y, x))
    assert torch.equal(distance(x, x), torch.zeros(3, dtype=torch.float64))
    for i in range(3):
        torch.testing.assert_close(distance(x, y)[i], distance(x[i : i + 1], y[i : i + 1])[0])


@pytest.mark.parametrize("distance", [l1, l2, pseudo_huber])
def test_distances_have_a_finite_gradient_where_the_images_are_equal(distance):
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    distance(x, torch.ones(2, 3, 4, 4)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_pseudo_huber_gradient_matches_the_derivative():
    x, y = pair([[3.0, -4.0, 0.5, 0.0]])
    x.requires_grad_()
    pseudo_huber(x, y, 0.7).sum().backward()
    difference = (x - y).detach()
    torch.testing.assert_close(x.grad, difference / (difference.square().sum() + 0.49).sqrt())


def test_pseudo_huber_is_quadratic_near_zero_even_in_float32():
    # s / (2 c) for ||x - y|| << c; sqrt(s + c^2) - c would round to 0 here in float32.
    x = torch.full((1, 1, 2, 2), 1e-6)
    assert pseudo_huber(x, torch.zeros_like(x), 0.03).item() == pytest.approx(4e-12 / 0.06, rel=1e-5)


def test_pseudo_huber_is_the_norm_far_from_zero():
    x, y = pair([[3e4, 4e4]])
    assert pseudo_huber(x, y, 0.03).item() == pytest.approx(5e4 - 0.03, rel=1e-12)
