"""Flat weights, frozen copies, averages and decay schedules."""

import pytest
import torch
from torch import nn

from cm_train.core import registry
from cm_train.models.averages import ema_update, flatten_gradients, flatten_parameters, frozen_copy


def small_net(channels_last=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 4)
    )
    return net.to(memory_format=torch.channels_last) if channels_last else net


def images(seed=0, batch=2):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels_last", [True, False])
def test_flatten_parameters_keeps_values_and_outputs(channels_last):
    net = small_net(channels_last).eval()
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    output = net(images())
    flat = flatten_parameters(net.parameters())
    assert flat.dtype == torch.float32
    assert flat.shape == (sum(v.numel() for v in values.values()),)
    for name, p in net.named_parameters():
        assert p.shape == values[name].shape
        assert torch.equal(p, values[name])
    torch.testing.assert_close(net(images()), output, rtol=1e-5, atol=1e-6)


def test_flatten_parameters_keeps_the_parameter_objects_and_requires_grad():
    net = small_net()
    net[0].bias.requires_grad_(False)
    before = list(net.parameters())
    flatten_parameters(net.parameters())
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
    assert [p.requires_grad for p in net.parameters()] == [True, False] + [True] * 6


def test_flatten_parameters_keeps_convolutions_in_channels_last():
    net = small_net()
    flatten_parameters(net.parameters())
    for p in (net[0].weight, net[2].weight):
        assert p.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.stride() == (27, 1, 9, 3)


def test_flatten_parameters_makes_views_of_one_vector():
    net = small_net()
    flat = flatten_parameters(net.parameters())
    storage = flat.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in net.parameters())
    with torch.no_grad():
        flat.copy_(torch.arange(len(flat)))
    # Each number of the vector is in exactly one parameter, in the order of module.parameters().
    start = 0
    for p in net.parameters():
        assert torch.equal(p.detach().flatten().sort().values, torch.arange(start, start + p.numel()).float())
        start += p.numel()
    assert start == len(flat)
    with torch.no_grad():
        flat.zero_()
    assert torch.equal(net(images()), torch.zeros(2, 4))


def test_flatten_parameters_survives_a_state_dict_round_trip():
    net, other = small_net(), small_net()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    flat = flatten_parameters(net.parameters())
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(flat, flatten_parameters(other.parameters()), rtol=0, atol=0)


def test_flatten_gradients_accumulates_the_real_gradients():
    net, plain = small_net(), small_net()
    flatten_parameters(net.parameters())
    flat = flatten_gradients(net.parameters())
    assert torch.equal(flat, torch.zeros_like(flat))
    expected = [torch.zeros_like(p) for p in plain.parameters()]
    for seed in (1, 2):
        net(images(seed)).square().sum().backward()
        for e, g in zip(
            expected, torch.autograd.grad(plain(images(seed)).square().sum(), list(plain.parameters())), strict=True
        ):
            e += g
    for p, e in zip(net.parameters(), expected, strict=True):
        assert p.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        torch.testing.assert_close(p.grad, e, rtol=1e-5, atol=1e-5)
    flat.zero_()
    assert all(not p.grad.any() for p in net.parameters())


def test_flatten_gradients_is_in_the_order_of_the_parameters():
    # One descent step on the vectors must be the same as one on each tensor.
    net, plain = small_net(), small_net()
    weights, gradient = flatten_parameters(net.parameters()), flatten_gradients(net.parameters())
    for each in (net, plain):
        each(images()).square().sum().backward()
    weights.sub_(gradient, alpha=0.1)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flatten_first", [True, False])
def test_frozen_copy_is_equal_frozen_and_independent(flatten_first):
    net = small_net().train()
    flat = flatten_parameters(net.parameters()) if flatten_first else None
    twin, twin_flat = frozen_copy(net)
    flat = flatten_parameters(net.parameters()) if flat is None else flat
    # Same order in both vectors, or an average would mix weights.
    assert torch.equal(flat, twin_flat)
    assert not any(m.training for m in twin.modules())
    assert net.training
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert twin[0].weight.is_contiguous(memory_format=torch.channels_last)
    before = twin_flat.clone()
    with torch.no_grad():
        flat.add_(1)
    assert torch.equal(twin_flat, before)
    assert torch.equal(twin[0].bias + 1, net[0].bias)
    twin_flat.zero_()
    assert torch.equal(twin(images()), torch.zeros(2, 4))
    assert not torch.equal(flat, torch.zeros_like(flat))


def test_ema_update_follows_the_formula():
    average, flat = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 2.0, 0.5])
    ema_update(average, flat, 0.75)
    torch.testing.assert_close(average, torch.tensor([1.5, -1.0, 0.5]), rtol=0, atol=0)
    assert torch.equal(flat, torch.tensor([3.0, 2.0, 0.5]))


@pytest.mark.parametrize("applied", [None, 1.0])
def test_ema_update_is_the_geometric_average(applied):
    average, decay, steps = torch.zeros(1), 0.9999, 2000
    for _ in range(steps):
        ema_update(average, torch.ones(1), decay, None if applied is None else torch.tensor(applied))
    assert average.item() == pytest.approx(1 - decay**steps, rel=1e-4)


def test_ema_update_with_decay_zero_copies():
    average = torch.randn(5)
    flat = torch.randn(5)
    ema_update(average, flat, 0.0)
    assert torch.equal(average, flat)


def test_ema_update_leaves_every_bit_where_nothing_was_applied():
    average = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = average.clone()
    ema_update(average, 1e30 * torch.ones(1000), 0.9, torch.tensor(0.0))
    assert torch.equal(average.view(torch.int32), before.view(torch.int32))


def test_ema_update_takes_no_part_in_the_graph():
    average, flat = torch.zeros(3), torch.ones(3, requires_grad=True)
    ema_update(average, flat, 0.5)
    assert not average.requires_grad


def test_constant_decay_is_constant():
    decay = registry.make("decay", {"name": "constant", "decay": 0.9999})
    assert {decay.at(0.9999, step) for step in (0, 1, 10**6)} == {0.9999}
    assert decay.at(0.5, 3) == 0.5


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (1, 2 / 11), (8, 0.5), (89, 90 / 99), (889, 890 / 899), (8990, 0.999), (10**7, 0.999)],
)
def test_warmup_decay_follows_the_formula(step, expected):
    decay = registry.make("decay", {"name": "warmup", "decay": 0.999})
    assert decay.at(0.999, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("values", [{"decay": 1.0}, {"decay": -0.1}, {"extra": [0.5, 1.0]}])
def test_decay_refuses_values_outside_the_unit_interval(values):
    with pytest.raises(ValueError, match=r"ema\.(decay|extra)"):
        registry.settings("decay", {"name": "warmup", **values})


def test_decay_or_half_life_is_set_and_never_both():
    for values in ({"decay": None}, {"half_life_images": 100}):
        with pytest.raises(ValueError, match="say one thing"):
            registry.settings("decay", {"name": "warmup", **values})
    assert registry.settings("decay", {"name": "warmup", "decay": 0.9}).with_decay(batch_size=512).decay == 0.9
    of_half_life = registry.settings("decay", {"name": "warmup", "decay": None, "half_life_images": 100})
    assert of_half_life.with_decay(batch_size=100).decay == 0.5
    assert of_half_life.with_decay(batch_size=1).decay == 1 - 0.00691, "three digits, since files are named after it"


def test_half_life_decay_is_edms():
    """0.5^(512 / min(500000, 0.05 * images seen)), as Karras et al. write it; 0.999290 in the end."""
    final = 0.5 ** (512 / 500_000)
    assert final == pytest.approx(0.999290, abs=5e-7)
    schedule = registry.make("decay", {"name": "half_life", "decay": final})
    assert schedule.at(final, 0) == 0
    for step in (1, 10, 1000, 19_000, 20_000, 10**6):
        assert schedule.at(final, step) == pytest.approx(0.5 ** (512 / min(500_000, 0.05 * step * 512)), rel=1e-12)


def test_half_life_halves_the_weight_of_the_past_in_its_half_life():
    schedule = registry.make("decay", {"name": "half_life", "decay": 0.5 ** (1 / 100), "rampup": 0.05})
    kept = 1.0
    for step in range(5000, 5100):
        kept *= schedule.at(0.5 ** (1 / 100), step)
    assert kept == pytest.approx(0.5)
