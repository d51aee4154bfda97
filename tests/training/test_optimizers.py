"""Adam and RAdam on a flat vector against torch.optim, clipping, skipped steps and learning-rate schedules."""

import math

import pytest
import torch

from cm_train.core import registry

SIZE = 257


def start(seed=0):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def gradients(count, seed=1):
    # Scales differ over the vector and over time, so that a wrong bias correction shows.
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-4, 2, SIZE)
    return [scales * (0.3 + torch.randn(SIZE, generator=generator)) * (1 + i % 3) for i in range(count)]


def make(name="radam", weights=None, steps=1000, **values):
    weights = start() if weights is None else weights
    return registry.make("optimizer", {"name": name, **values}, weights, torch.zeros_like(weights), steps)


def apply(optimizer, gradient, step=0, **kwargs):
    optimizer.gradient.copy_(gradient)
    return optimizer.step(step, **kwargs)


def bits(optimizer):
    return [t.clone() for t in (optimizer.weights, optimizer.mean, optimizer.square, optimizer.count)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


SETTINGS = [((0.9, 0.999), 1e-8), ((0.9, 0.99), 1e-8), ((0.9, 0.999), 1e-3), ((0.0, 0.9), 1e-11), ((0.5, 0.6), 1e-8)]


@pytest.mark.parametrize(("betas", "eps"), SETTINGS)
@pytest.mark.parametrize(("name", "reference"), [("adam", torch.optim.Adam), ("radam", torch.optim.RAdam)])
def test_optimizers_agree_with_torch(name, reference, betas, eps):
    # RAdam's adaptive part starts at step 6 for beta2 = 0.999 and 0.99, at 7 for 0.9, never for 0.6.
    optimizer = make(name, lr=0.02, betas=list(betas), eps=eps)
    parameter = start().requires_grad_()
    other = reference([parameter], lr=0.02, betas=betas, eps=eps)
    for i, gradient in enumerate(gradients(50)):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        other.step()
        apply(optimizer, gradient, i)
        # Updates, not weights: an update of 1e-6 would hide behind a weight of 1. One rounding of the weight apart.
        moved = (parameter.detach() - before).abs().max()
        assert moved > 0
        torch.testing.assert_close(optimizer.weights, parameter.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_optimizers_agree_with_their_algorithm_in_float64(name):
    """Kingma & Ba 2015, algorithm 1, and Liu et al. 2020, algorithm 2, one number at a time from zero weights."""
    beta1, beta2, lr, eps = 0.9, 0.99, 1e-3, 1e-8
    optimizer = make(name, torch.zeros(SIZE), lr=lr, betas=[beta1, beta2], eps=eps)
    weights, m, v = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(3))
    rho_inf = 2 / (1 - beta2) - 1
    for t, gradient in enumerate(gradients(12), start=1):
        apply(optimizer, gradient, t - 1)
        g = gradient.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if name == "adam":
            weights = weights - lr * m_hat / (v_hat.sqrt() + eps)
        elif rho > 5:  # the threshold that PyTorch and the authors' code take, where the paper says 4
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            weights = weights - lr * r * m_hat / v_hat.sqrt()
        else:
            weights = weights - lr * m_hat
        # eps meets sqrt(v) before or after the bias correction: invisible at 1e-8 with these gradients.
        torch.testing.assert_close(optimizer.weights.double(), weights, rtol=1e-4, atol=1e-3 * lr)


def test_radam_crosses_its_threshold_at_step_six():
    # Before it, the update is lr times the corrected mean however large the gradient; after it, it is bounded.
    optimizer = make("radam", torch.zeros(1), lr=1.0)
    moves = []
    for i in range(8):
        before = optimizer.weights.clone()
        apply(optimizer, torch.full((1,), 1000.0), i)
        moves.append((before - optimizer.weights).item())
    assert moves[:5] == pytest.approx([1000.0] * 5, rel=1e-5)
    assert all(0 < move < 1 for move in moves[5:])


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_clip_norm_agrees_with_torch(factor):
    gradient = gradients(1)[0]
    limit = factor * gradient.norm().item()
    optimizer = make("radam", torch.zeros(SIZE), lr=1.0, clip_norm=limit, betas=[0.0, 0.999])
    reference = torch.zeros(SIZE, requires_grad=True)
    reference.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_([reference], limit)
    norm, applied = apply(optimizer, gradient)
    assert applied == 1.0
    torch.testing.assert_close(norm, expected_norm)
    # RAdam's first step with beta1 = 0 is plain descent, so the weights show the clipped gradient.
    torch.testing.assert_close(-optimizer.weights, reference.grad, rtol=1e-5, atol=1e-7)


def test_grad_scale_multiplies_before_clipping():
    gradient = gradients(1)[0]
    scaled, plain = (make("radam", torch.zeros(SIZE), lr=1.0, clip_norm=gradient.norm().item() / 2) for _ in range(2))
    norm, _ = apply(scaled, gradient * 1024, grad_scale=torch.tensor(1 / 1024))
    torch.testing.assert_close(norm, gradient.norm())
    apply(plain, gradient)
    torch.testing.assert_close(scaled.weights, plain.weights)


def test_step_returns_the_norm_before_clipping_on_the_device():
    norm, applied = apply(make(clip_norm=1e-3), torch.full((SIZE,), 2.0))
    assert norm.shape == applied.shape == ()
    assert applied.dtype == torch.float32
    assert norm.item() == pytest.approx(2 * SIZE**0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("warm", [0, 1, 7], ids=["first", "second", "later"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ["adam", "radam"])
def test_step_skips_a_gradient_that_is_not_finite(name, clip, warm, bad):
    optimizer = make(name, lr=0.01, clip_norm=clip)
    for i, gradient in enumerate(gradients(warm)):
        apply(optimizer, gradient, i)
    before = bits(optimizer)
    gradient = gradients(1, seed=2)[0]
    gradient[5] = bad
    norm, applied = apply(optimizer, gradient, warm)
    assert not norm.isfinite()
    assert applied == 0.0
    assert_same(bits(optimizer), before)


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_step_skips_where_the_scale_is_not_finite(name):
    optimizer = make(name)
    apply(optimizer, gradients(1)[0])
    before = bits(optimizer)
    _, applied = apply(optimizer, gradients(1, seed=2)[0], 1, grad_scale=torch.tensor(float("inf")))
    assert applied == 0.0
    assert_same(bits(optimizer), before)


@pytest.mark.parametrize("skipped", [[0], [0, 1], [3], [4, 5, 6]])
@pytest.mark.parametrize("name", ["adam", "radam"])
def test_step_after_a_skip_goes_on_as_if_that_gradient_never_came(name, skipped):
    with_bad, without = make(name, lr=0.01), make(name, lr=0.01)
    good = iter(gradients(10))
    for i in range(10 + len(skipped)):
        if i in skipped:
            apply(with_bad, torch.full((SIZE,), float("nan")), i)
        else:
            gradient = next(good)
            apply(with_bad, gradient, i)
            apply(without, gradient, i)
    assert without.count == 10
    assert_same(bits(with_bad), bits(without))


def test_a_gradient_of_zero_is_a_step_and_not_a_skip():
    optimizer = make("adam", lr=0.01)
    apply(optimizer, gradients(1)[0])
    mean = optimizer.mean.clone()
    _, applied = apply(optimizer, torch.zeros(SIZE), 1)
    assert applied == 1.0
    assert optimizer.count == 2
    torch.testing.assert_close(optimizer.mean, 0.9 * mean)


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_a_first_gradient_of_zero_moves_nothing(name):
    optimizer = make(name)
    apply(optimizer, torch.zeros(SIZE))
    assert torch.equal(optimizer.weights, start())
    assert optimizer.count == 1


def test_lr_is_constant_after_a_linear_warm_up():
    optimizer = make(lr=0.4, warmup_steps=3)
    assert [optimizer.lr(k) for k in (0, 1, 2, 3, 4, 999, 5000)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])


def test_lr_without_warm_up_is_whole_from_the_first_step():
    assert make(lr=0.4).lr(0) == 0.4


def test_lr_follows_a_cosine_to_zero_and_stays_there():
    optimizer = make(lr=0.4, schedule="cosine", steps=1000)
    expected = {0: 0.4, 250: 0.2 * (1 + 2**-0.5), 500: 0.2, 750: 0.2 * (1 - 2**-0.5), 1000: 0.0, 1500: 0.0, 9000: 0.0}
    assert [optimizer.lr(k) for k in expected] == pytest.approx(list(expected.values()), abs=1e-12)


def test_lr_falls_with_the_inverse_root_of_the_step():
    optimizer = make(lr=0.4, schedule="inverse_sqrt", decay_after=2000, steps=8)
    assert [optimizer.lr(k) for k in (0, 2000, 8000, 200_000)] == pytest.approx([0.4, 0.4, 0.2, 0.04])


def test_lr_multiplies_cosine_and_warm_up():
    assert make(lr=0.4, schedule="cosine", steps=8, warmup_steps=7).lr(4) == pytest.approx(0.2 * 5 / 8)


def test_lr_scales_the_step():
    gradient = gradients(1)[0]
    warming, plain = make("adam", torch.zeros(SIZE), lr=0.4, warmup_steps=3), make("adam", torch.zeros(SIZE), lr=0.3)
    apply(warming, gradient, step=2)
    apply(plain, gradient, step=2)
    torch.testing.assert_close(warming.weights, plain.weights)


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_state_dict_round_trip_goes_on_bitwise(name):
    sequence = gradients(12)
    whole = make(name, lr=0.01)
    for i, gradient in enumerate(sequence[:4]):
        apply(whole, gradient, i)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    resumed = make(name, whole.weights.clone(), lr=0.01)
    resumed.load_state_dict(state)
    for i, gradient in enumerate(sequence[4:], start=4):
        apply(whole, gradient, i)
        apply(resumed, gradient, i)
    assert_same(bits(whole), bits(resumed))


def test_load_state_dict_copies():
    optimizer = make("adam")
    state = {"mean": torch.ones(SIZE), "square": torch.ones(SIZE), "count": torch.tensor(3.0, dtype=torch.float64)}
    optimizer.load_state_dict(state)
    apply(optimizer, torch.ones(SIZE))
    assert state["count"] == 3
    assert torch.equal(state["square"], torch.ones(SIZE))
    assert optimizer.count == 4


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lr": 0.0}, "lr"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"schedule": "linear"}, "schedule"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_optimizer_config_refuses_bad_values(values, key):
    with pytest.raises(ValueError, match=rf"optimizer\.{key}"):
        registry.settings("optimizer", {"name": "adam", **values})
