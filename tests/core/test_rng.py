"""Keyed randomness: numbers depend on their key alone, and look random."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_train.core import rng
from cm_train.core.rng import Draws, PerImageNoise, image_generator

CPU = torch.device("cpu")


def draws(rows, seed=0, step=0):
    return Draws(seed, step, rows, CPU)


def test_key_is_the_blake2b_hash_of_its_parts():
    # Pinned from coreutils: printf 'image/0/x' | b2sum -l 64. A change here would change every published sample.
    assert rng.key("image", 0, "x") == int.from_bytes(bytes.fromhex("082cf7b40969f506"), "little") >> 1


def test_key_differs_above_32_bits():
    assert rng.key(1) != rng.key(1 + 2**32)
    # CPU generators read the low 32 bits only, so these must differ too.
    assert rng.key(1) & 0xFFFFFFFF != rng.key(1 + 2**32) & 0xFFFFFFFF
    a, b = (torch.randn(8, generator=rng.generator(seed)) for seed in (1, 1 + 2**32))
    assert not torch.equal(a, b)


def test_key_has_no_collisions_in_its_low_32_bits_among_neighbours():
    keys = {
        rng.key(seed, "noise", step, chunk) & 0xFFFFFFFF
        for seed in range(3)
        for step in range(20)
        for chunk in range(20)
    }
    assert len(keys) == 3 * 20 * 20  # 1200 keys: a collision has probability 1.7e-4


def test_key_fits_a_signed_64_bit_integer():
    assert all(0 <= rng.key(i) < 2**63 for i in range(200))


def test_permutation_holds_every_index_once_and_depends_on_its_key():
    base = rng.permutation(0, "order", 0, 1000)
    assert base.dtype == torch.int64
    assert torch.equal(base.sort().values, torch.arange(1000))
    assert torch.equal(base, rng.permutation(0, "order", 0, 1000))
    for other in ((1, "order", 0), (0, "valid", 0), (0, "order", 1)):
        # Two random orders share one fixed place on average.
        assert (base == rng.permutation(*other, 1000)).sum() < 10


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    start=st.integers(0, 100),
    size=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    kind=st.sampled_from(["normal", "uniform", "bits"]),
)
def test_draws_do_not_depend_on_how_rows_are_split(start, size, cuts, kind):
    stop = start + size
    edges = sorted({start, stop, *(c for c in cuts if start < c < stop)})
    whole = getattr(draws(range(0, stop), seed=7, step=3), kind)("noise", (2,))[start:]
    parts = [getattr(draws(range(a, b), seed=7, step=3), kind)("noise", (2,)) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_do_not_depend_on_what_was_drawn_before():
    source = draws(range(5))
    torch.manual_seed(1)
    first = source.normal("noise", (4,))
    source.uniform("sigma")
    source.bits("dropout", (2,))
    torch.randn(100)
    assert torch.equal(source.normal("noise", (4,)), first)
    assert torch.equal(draws(range(5)).normal("noise", (4,)), first)


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    draws(range(40)).normal("noise", (4,))
    PerImageNoise([0, 1]).randn("start", (4,))
    rng.permutation(0, "order", 0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_differ_between_seeds_steps_streams_and_chunks():
    size = (1000,)
    rows = range(1)
    base = draws(rows).normal("noise", size)
    others = [
        draws(rows, seed=1).normal("noise", size),
        draws(rows, step=1).normal("noise", size),
        draws(rows).normal("flip", size),
        draws(range(1, 2)).normal("noise", size),
        draws(range(rng.CHUNK, rng.CHUNK + 1)).normal("noise", size),
        draws(rows, seed=1 + 2**32).normal("noise", size),
    ]
    for other in others:
        # Independent unit normals: the correlation of 1000 pairs has standard deviation 0.032.
        assert torch.corrcoef(torch.cat([base, other]))[0, 1].abs() < 0.16


def test_draws_have_documented_types_and_shapes():
    source = draws(range(3, 8))
    assert source.normal("a", (2, 3)).shape == (5, 2, 3)
    assert source.normal("a", (2, 3)).dtype == torch.float32
    assert source.uniform("a").shape == (5,)
    assert source.uniform("a").dtype == torch.float64
    assert source.bits("a", (2,)).shape == (5, 2)
    assert source.bits("a", (2,)).dtype == torch.int32


def test_normal_has_the_moments_of_a_unit_normal():
    x = draws(range(64)).normal("noise", (1000,)).double()
    n = x.numel()
    # Standard errors of the first four moments: 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n.
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 4.5 * (spread / n) ** 0.5


def test_uniform_fills_the_unit_interval_evenly():
    u = draws(range(64)).uniform("sigma", (1000,)).flatten()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    chi2 = ((counts - u.numel() / 50) ** 2 / (u.numel() / 50)).sum()
    assert 49 - 4.5 * 98**0.5 < chi2 < 49 + 4.5 * 98**0.5
    # float64 draws of 53 bits, so that the tails of an inverse distribution are not quantised at 2^-24.
    assert ((u * 2**24) % 1 != 0).float().mean() > 0.99


def test_bits_are_balanced_in_every_position():
    x = draws(range(64)).bits("dropout", (1000,)).flatten().long() & 0xFFFFFFFF
    shares = torch.stack([((x >> i) & 1).double().mean() for i in range(32)])
    assert (shares - 0.5).abs().max() < 4.5 * 0.5 / x.numel() ** 0.5
    assert x.unique().numel() > 0.999 * x.numel()


def test_draws_make_only_the_chunks_that_their_rows_touch(monkeypatch):
    made = []
    real = rng.generator
    monkeypatch.setattr(rng, "generator", lambda *parts, **kw: made.append(parts) or real(*parts, **kw))
    draws(range(10 * rng.CHUNK - 1, 11 * rng.CHUNK + 1)).uniform("sigma")
    assert [parts[-1] for parts in made] == [9, 10, 11]


@pytest.mark.parametrize("rows", [range(0), range(0, 8, 2)])
def test_draws_refuse_rows_that_are_not_a_run(rows):
    with pytest.raises(AssertionError):
        draws(rows)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), data=st.data())
def test_per_image_noise_depends_on_its_own_seed_alone(seeds, data):
    i = data.draw(st.integers(0, len(seeds) - 1))
    assert torch.equal(
        PerImageNoise(seeds).randn("start", (2, 3))[i], PerImageNoise([seeds[i]]).randn("start", (2, 3))[0]
    )
    assert PerImageNoise(seeds).randint("label", 10)[i] == PerImageNoise([seeds[i]]).randint("label", 10)[0]


def test_per_image_noise_differs_between_seeds_and_streams():
    noise = PerImageNoise([0, 1, 1 + 2**32])
    rows = torch.cat([noise.randn("start", (1000,)), noise.randn("again", (1000,))])
    correlations = torch.corrcoef(rows) - torch.eye(6)
    assert correlations.abs().max() < 0.16


def test_per_image_noise_does_not_depend_on_the_order_of_calls():
    a, b = PerImageNoise([3, 4]), PerImageNoise([3, 4])
    a.randn("other", (5,))
    assert torch.equal(a.randn("start", (5,)), b.randn("start", (5,)))
    assert torch.equal(a.randn("start", (5,)), b.randn("start", (5,)))


def test_per_image_noise_has_the_moments_of_a_unit_normal():
    x = PerImageNoise(range(500)).randn("start", (64,)).double()
    n = x.numel()
    assert abs(x.mean()) < 4.5 / n**0.5
    assert abs(x.var() - 1) < 4.5 * (2 / n) ** 0.5
    # Neighbouring seeds must not share their start: one value of each image, over the images.
    first = x[:, 0]
    assert torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1].abs() < 4.5 / 499**0.5


def test_per_image_labels_cover_all_classes_evenly():
    labels = PerImageNoise(range(2000)).randint("label", 10)
    assert labels.dtype == torch.int64
    assert labels.min() == 0
    assert labels.max() == 9
    counts = torch.bincount(labels, minlength=10)
    assert (counts - 200).abs().max() < 4.5 * (2000 * 0.1 * 0.9) ** 0.5


def test_images_of_different_seeds_never_share_their_noise():
    """The generator reads 32 bits: hashed seeds would collide about once in 100,000 images, a bijection never."""
    states = {image_generator(seed, "initial").initial_seed() for seed in range(200_000)}
    assert len(states) == 200_000
    assert max(states) < 2**32
    a, b, c = (PerImageNoise([seed]).randn("initial", (4,)) for seed in (1, 1 + 2**32, 2))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, PerImageNoise([1]).randn("renoise-1", (4,)))
