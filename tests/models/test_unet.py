"""The ADM U-Net: published sizes, its parts against independent computations, keyed dropout, refused settings."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_songunet import filled, numbers
from torch import nn

from cm_train.core import registry, rng
from cm_train.core.errors import InputError
from cm_train.models.backbones.base import KeyedDropout, sinusoidal_embedding
from cm_train.models.backbones.unet import Attention, ResBlock, UNet, UNetConfig

SMALL = {
    "channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [4],
    "head_channels": 8,
    "group_channels": 4,
}


def config(**values):
    return UNetConfig(**(SMALL | values))


def randomise(net, std=0.2):
    """No parameter left at its initial zero, so that every path carries a signal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return net


def small_net(num_classes=0, **values):
    return randomise(UNet(config(**values), 8, 1, num_classes))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def keys(count, seed=0):
    return rng.Draws(seed, 0, range(count), torch.device("cpu")).bits("dropout", (2,))


# Published networks


@pytest.mark.parametrize(
    ("values", "image_size", "classes", "parameters", "tensors"),
    [
        ({}, 64, 1000, 295_899_267, 541),  # the defaults are ImageNet-64
        (
            {"channels": 256, "num_blocks": 2, "channel_mult": [1, 1, 2, 2, 4, 4], "scale_shift": False},
            256,
            0,
            526_304_771,
            566,
        ),
        # OpenAI's guided-diffusion, less the weights of the last convolution by which it tells a variance too.
        (
            {"channels": 256, "num_blocks": 2, "channel_mult": [1, 1, 2, 3, 4], "num_heads": 4},
            128,
            1000,
            421_522_691,
            None,
        ),
        ({"channels": 256, "num_blocks": 2, "channel_mult": [1, 1, 2, 2, 4, 4]}, 256, 1000, 553_831_171, None),
        ({"channels": 256, "num_blocks": 2, "channel_mult": [0.5, 1, 1, 2, 2, 4, 4]}, 512, 1000, 558_994_179, None),
    ],
    ids=["imagenet64", "lsun256", "imagenet128", "imagenet256", "imagenet512"],
)
def test_unet_has_the_published_number_of_parameters(values, image_size, classes, parameters, tensors):
    with torch.device("meta"):
        net = UNet(UNetConfig(**values), image_size, 3, classes)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == len(list(net.parameters()))  # published files hold parameters only, no buffers
    assert tensors in (None, len(list(net.parameters())))


def test_unet_runs_at_the_published_lsun_shape_on_the_meta_device():
    values = {"channels": 256, "num_blocks": 2, "channel_mult": [1, 1, 2, 2, 4, 4], "scale_shift": False}
    with torch.device("meta"):
        net = UNet(UNetConfig(**values), 256, 3)
        assert net(torch.empty(2, 3, 256, 256), torch.empty(2)).shape == (2, 3, 256, 256)


# Made once by the public code (openai/guided-diffusion, guided_diffusion/unet.py, which is OpenAI's consistency models'
# too), in float64. Its weights were those of `filled(UNet(...))` here under its names, the rows of "conv"'s qkv in the
# old order of (head, q|k|v, channel); its loss the sum of the output times `numbers(..., key=1001)`. All numbers agreed
# then, the output's and the image's gradient to 5e-7. Kept are each 53rd of both, and the norm of all other gradients.
PUBLISHED = {
    "conv": {
        "settings": {
            **{"channel_mult": [1, 2], "attention_resolutions": [4], "num_heads": 2, "scale_shift": False},
            **{"resample_in_block": False, "strided_conv": True},
        },
        "output": [-0.0273669, 0.9226902, -0.5771061, 0.3237054, -1.0770617, 0.2035847, 0.3277979, 0.879791],
        "x": [-0.8469946, 0.3158092, 0.9516538, 1.2881292, -0.2062996, 0.1834932, -0.0338363, -0.4205819],
        "weights": 666.473025,
    },
    "block": {
        "settings": {"channel_mult": [0.5, 1], "attention_resolutions": [8, 4], "head_channels": 16},
        "output": [-0.5041196, 0.1081362, 0.2182206, 0.0670387, 0.2060625, 0.5650198, 0.0550233, -0.3109474],
        "x": [-1.5549634, -0.3777157, -1.7024564, -1.7359321, 0.4498513, 0.3312651, -0.9832666, -1.807142],
        "weights": 758.950156,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_unet_does_what_the_public_code_does(variant, dtype):
    wanted, classes = PUBLISHED[variant], 3 if variant == "block" else 0
    net = filled(UNet(UNetConfig(channels=64, num_blocks=1, **wanted["settings"]), 8, 3, classes))
    net.to(dtype, memory_format=torch.channels_last)
    x = numbers(2, 3, 8, 8, key=1000).to(dtype).requires_grad_()
    output = net(x, torch.tensor([0.3, -0.7], dtype=dtype), torch.tensor([1, 0]) if classes else None)
    (output * numbers(2, 3, 8, 8, key=1001).to(dtype)).sum().backward()
    gradients = torch.cat([p.grad.double().flatten() for p in net.parameters()])
    tight = 1e-6 if dtype == torch.float64 else 1e-5
    for found, name in (
        (output.flatten()[::53], "output"),
        (x.grad.flatten()[::53], "x"),
        (gradients.norm(), "weights"),
    ):
        expected = torch.tensor(wanted[name], dtype=torch.float64)
        torch.testing.assert_close(found.detach().double(), expected, rtol=tight, atol=tight)


# Parts


def test_sinusoidal_embedding_is_cosines_then_sines_of_falling_frequencies():
    levels, width = [-1.55, 0.0, 0.3, 1.095], 6
    expected = [
        [f(c * 10_000 ** (-i / (width / 2))) for f in (math.cos, math.sin) for i in range(width // 2)] for c in levels
    ]
    torch.testing.assert_close(sinusoidal_embedding(torch.tensor(levels), width), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sinusoidal_embedding_is_float32_for_levels_of_less_precision(dtype):
    assert sinusoidal_embedding(torch.tensor([250.0], dtype=dtype), 8).dtype == torch.float32


def group_norm(x, groups, weight, bias):
    """GroupNorm of [C, H, W] by hand."""
    parts = x.reshape(groups, -1)
    parts = (parts - parts.mean(1, keepdim=True)) / (parts.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def test_attention_matches_plain_softmax_over_the_pixels():
    channels, head, pixels = 12, 4, 6
    layer = randomise(Attention(channels, config(head_channels=head, group_channels=4)), 0.5)
    x = normal(2, channels, 2, 3)
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    for image, out in zip(x.double(), layer(x), strict=True):
        flat = group_norm(image, 3, weights["norm.weight"], weights["norm.bias"]).reshape(channels, pixels)
        rows = weights["qkv.weight"].reshape(3 * channels, channels) @ flat + weights["qkv.bias"][:, None]
        mixed = []
        for h in range(channels // head):
            # Rows are ordered (q|k|v, head, channel).
            q, k, v = (rows[part * channels + h * head : part * channels + (h + 1) * head] for part in range(3))
            scores = (q.T @ k) / math.sqrt(head)  # [query pixel, key pixel]
            shares = scores.exp() / scores.exp().sum(1, keepdim=True)
            mixed.append(v @ shares.T)
        projected = weights["proj.weight"].reshape(channels, channels) @ torch.cat(mixed)
        expected = image + (projected + weights["proj.bias"][:, None]).reshape(image.shape)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", ["", "down", "up"])
@pytest.mark.parametrize(("scale_shift", "embedding_norm"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("cout", [8, 12])
def test_res_block_matches_its_definition(cout, scale_shift, embedding_norm, resample):
    cin = 8
    settings = config(scale_shift=scale_shift, embedding_norm=embedding_norm)
    block = randomise(ResBlock(cin, cout, 4, 10, settings, 0, resample), 0.4)
    x, embedding = normal(1, cin, 4, 4), normal(1, 10, seed=1)
    w = {name: p.detach().double() for name, p in block.named_parameters()}

    def silu(v):
        return v / (1 + (-v).exp())

    def resized(v):
        if resample == "down":  # 2 x 2 mean
            return (v[:, ::2, ::2] + v[:, 1::2, ::2] + v[:, ::2, 1::2] + v[:, 1::2, 1::2]) / 4
        return v.repeat_interleave(2, 1).repeat_interleave(2, 2) if resample == "up" else v

    def conv(v, name):
        return F.conv2d(v[None], w[f"{name}.weight"], w[f"{name}.bias"], padding="same")[0]

    image = x[0].double()
    h = conv(resized(silu(group_norm(image, 2, w["norm_in.weight"], w["norm_in.bias"]))), "conv_in")
    e = (w["embed.weight"] @ embedding[0].double() + w["embed.bias"])[:, None, None]
    groups = cout // 4
    if embedding_norm:
        scale, shift = (v / (v**2).mean().sqrt() for v in (e[:cout], e[cout:]))
        h = group_norm(h, groups, w["norm_out.weight"], w["norm_out.bias"]) * scale + shift
    elif scale_shift:
        h = group_norm(h, groups, w["norm_out.weight"], w["norm_out.bias"]) * (1 + e[:cout]) + e[cout:]
    else:
        h = group_norm(h + e, groups, w["norm_out.weight"], w["norm_out.bias"])
    skip = resized(image) if cout == cin else conv(resized(image), "skip")
    expected = skip + conv(silu(h), "conv_out")
    torch.testing.assert_close(block(x, embedding, None)[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_norm_has_32_groups_unless_told():
    with torch.device("meta"):
        net = UNet(UNetConfig(channels=64, channel_mult=[1, 2], num_blocks=1), 8, 1)
    assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {32}
    told = small_net()
    assert {m.num_channels // m.num_groups for m in told.modules() if isinstance(m, nn.GroupNorm)} == {4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_computes_in_float32_and_keeps_the_type(dtype):
    norm = UNet(config(), 8, 1).norm_out
    x = (100 + normal(2, 16, 8, 8)).to(dtype)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), nn.GroupNorm(4, 16)(x.float()).to(dtype), rtol=0, atol=0)


# Wiring


@pytest.mark.parametrize("classes", [0, 3])
def test_blocks_are_given_the_activated_embedding(classes):
    net, seen = small_net(classes), []
    for m in net.modules():
        if isinstance(m, ResBlock):
            m.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    level, labels = torch.tensor([-1.0, 0.7]), torch.tensor([2, 0]) if classes else None
    net(normal(2, 1, 8, 8), level, labels)
    # Linear, SiLU, Linear, plus the label, SiLU: the last one stands in front of each block's own Linear.
    w = {name: p.detach() for name, p in net.named_parameters()}
    angles = level[:, None] * 10_000 ** (-torch.arange(8) / 8)
    e = torch.cat([angles.cos(), angles.sin()], 1) @ w["embed_in.weight"].T + w["embed_in.bias"]
    e = (e * e.sigmoid()) @ w["embed_out.weight"].T + w["embed_out.bias"]
    if classes:
        e = e + w["embed_label.weight"][labels]
    assert len(seen) == 10
    for given in seen:
        torch.testing.assert_close(given, e * e.sigmoid(), rtol=1e-4, atol=1e-5)


def test_unet_ends_with_norm_silu_and_convolution():
    net, seen = small_net(), {}
    net.decoder[-1].register_forward_hook(lambda m, args, out: seen.update(features=out))
    out = net(normal(1, 1, 8, 8), torch.zeros(1))
    h = group_norm(seen["features"][0], 4, net.norm_out.weight, net.norm_out.bias)
    expected = F.conv2d((h * h.sigmoid())[None], net.last.weight, net.last.bias, padding=1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_decoder_concatenates_its_input_before_the_skip():
    net, seen = small_net(), {}
    net.encoder[-1].register_forward_hook(lambda m, args, out: seen.update(skip=out))
    net.middle[-1].register_forward_hook(lambda m, args, out: seen.update(middle=out))
    net.decoder[0].register_forward_hook(lambda m, args, out: seen.update(joined=args[0]))
    net(normal(2, 1, 8, 8), torch.zeros(2))
    assert torch.equal(seen["joined"], torch.cat([seen["middle"], seen["skip"]], 1))


def test_unet_attends_at_the_listed_resolutions_and_in_the_middle():
    def sizes(resolutions):
        net, seen = small_net(channel_mult=[1, 1, 1], attention_resolutions=resolutions), []
        for m in net.modules():
            if isinstance(m, Attention):
                m.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
        net(normal(1, 1, 8, 8), torch.zeros(1))
        return seen

    assert sizes([]) == [2]
    assert sizes([4]) == [4, 2, 4, 4]  # one block down, num_blocks + 1 up
    assert sizes([8, 2]) == [8, 2, 2, 2, 2, 8, 8]


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("resample_in_block", "strided_conv"), [(True, False), (False, False), (False, True)])
def test_unet_keeps_the_image_shape(scale_shift, resample_in_block, strided_conv):
    net = UNet(config(scale_shift=scale_shift, resample_in_block=resample_in_block, strided_conv=strided_conv), 8, 3)
    randomise(net)
    assert net(normal(2, 3, 8, 8), torch.zeros(2)).shape == (2, 3, 8, 8)


def test_unet_is_zero_at_first():
    net = UNet(config(), 8, 1, 3)
    out = net(normal(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 2]))
    assert torch.equal(out, torch.zeros(2, 1, 8, 8))


def test_unet_residual_branches_are_zero_at_first():
    net = UNet(config(), 8, 1)
    x = normal(2, 32, 4, 4)
    assert torch.equal(net.middle[0](x, normal(2, 64), None), x)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("resample_in_block", "strided_conv"), [(True, False), (False, False), (False, True)])
def test_unet_sends_gradient_to_every_parameter(classes, scale_shift, resample_in_block, strided_conv):
    net = small_net(classes, scale_shift=scale_shift, resample_in_block=resample_in_block, strided_conv=strided_conv)
    labels = torch.tensor([0, 2]) if classes else None
    net(normal(2, 1, 8, 8), torch.tensor([-1.0, 1.0]), labels).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert dead == []


def test_unet_image_does_not_depend_on_the_rest_of_the_batch():
    net = small_net(3, dropout=0.3)
    x, level, labels, drop = (
        normal(4, 1, 8, 8),
        torch.tensor([-1.0, 0.0, 0.5, 1.0]),
        torch.tensor([0, 1, 2, 0]),
        keys(4),
    )
    together = net(x, level, labels, drop)
    for i in range(4):
        one = slice(i, i + 1)
        alone = net(x[one], level[one], labels[one], drop[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)


def test_unet_depends_on_image_level_and_label():
    net = small_net(3)
    x, level, labels = normal(1, 1, 8, 8), torch.zeros(1), torch.tensor([0])
    base = net(x, level, labels)
    for other in (net(-x, level, labels), net(x, level + 1, labels), net(x, level, labels + 1)):
        assert (other - base).abs().max() > 1e-3


def test_unet_noise_multiplier_scales_the_level():
    plain, scaled = small_net(), small_net(noise_multiplier=1000.0)
    x = normal(2, 1, 8, 8)
    torch.testing.assert_close(plain(x, torch.tensor([-1000.0, 500.0])), scaled(x, torch.tensor([-1.0, 0.5])))


@pytest.mark.parametrize(("classes", "labels"), [(3, None), (0, torch.tensor([1]))])
def test_unet_wants_labels_exactly_where_it_has_classes(classes, labels):
    net = small_net(classes)
    with pytest.raises(InputError, match="labels"):
        net(normal(1, 1, 8, 8), torch.zeros(1), labels)


@pytest.mark.parametrize(
    ("values", "image_size", "word"),
    [
        ({"channel_mult": [1, 1, 1]}, 6, "image size 6"),
        ({"channel_mult": [1, 2, 2, 2, 2]}, 8, "image size 8"),
        ({"head_channels": 7}, 8, "head_channels"),
        ({"head_channels": 64}, 8, "head_channels"),
        ({"num_heads": 3}, 8, "num_heads"),
        ({"group_channels": 7}, 8, "group_channels"),
        ({"group_channels": None}, 8, "group_channels"),  # 32 groups in 16 channels
    ],
)
def test_unet_refuses_sizes_that_do_not_divide(values, image_size, word):
    with pytest.raises(InputError, match=word) as caught:
        UNet(config(**values), image_size, 1)
    assert "\n" not in str(caught.value)
    assert "fix" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"dropout": 1.0},
        {"channels": 0},
        {"channel_mult": [0]},
        {"num_blocks": 0},
        {"embedding_norm": True, "scale_shift": False},
        {"strided_conv": True},
        {"channel_mult": [0.3, 1]},
    ],
)
def test_unet_config_refuses_values_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        config(**values)


def test_unet_refuses_a_network_without_levels():
    with pytest.raises(ValueError, match="channel_mult"):
        UNet(config(channel_mult=[]), 8, 1)


# Keyed dropout

SHAPE = (4, 4, 4)


def masks(p, drop_keys, shape=SHAPE, salt=0):
    """1 where a unit is dropped; [keys, *shape]."""
    return (KeyedDropout(p, shape, salt)(torch.ones(len(drop_keys), *shape), drop_keys) == 0).double()


def test_dropout_without_keys_or_rate_is_the_identity():
    x = normal(2, *SHAPE)
    assert KeyedDropout(0.5, SHAPE, 0)(x, None) is x
    assert KeyedDropout(0.0, SHAPE, 0)(x, keys(2)) is x


def test_dropout_depends_on_keys_and_not_on_training_mode():
    layer = KeyedDropout(0.5, SHAPE, 0)
    x = normal(2, *SHAPE)
    assert torch.equal(layer.train()(x, keys(2)), layer.eval()(x, keys(2)))


def test_dropout_gives_the_same_mask_for_the_same_keys_and_draws_nothing():
    state = torch.get_rng_state()
    a, b = masks(0.3, keys(8)), masks(0.3, keys(8))
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_mask_of_an_image_depends_on_its_own_key_alone():
    drop_keys = keys(8)
    together = masks(0.3, drop_keys)
    for i in range(8):
        assert torch.equal(masks(0.3, drop_keys[i : i + 1])[0], together[i])
    assert torch.equal(masks(0.3, drop_keys.flip(0)), together.flip(0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_scales_what_it_keeps(p):
    x = 1 + normal(16, *SHAPE).abs()
    out = KeyedDropout(p, SHAPE, 0)(x, keys(16))
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - p))
    assert 0 < kept.float().mean() < 1


@pytest.mark.parametrize("p", [0.01, 0.1, 0.13, 0.3, 0.5, 0.9])
def test_dropout_drops_at_its_rate(p):
    many = 2000
    m = masks(p, keys(many))
    units = m[0].numel()
    bound = 4.5 * (p * (1 - p)) ** 0.5
    assert abs(m.mean() - p) < bound / (many * units) ** 0.5
    # And so does each unit over the keys: none is favoured.
    assert (m.mean(0) - p).abs().max() < bound / many**0.5


def test_dropout_counts_spread_like_independent_units():
    m = masks(0.3, keys(4000)).flatten(1).sum(1)
    # Variance of a binomial count; its estimate over 4000 keys is off by 2.2 % a standard deviation.
    assert m.var() == pytest.approx(64 * 0.3 * 0.7, rel=0.15)


@pytest.mark.parametrize("first", [0, 1, 2**16, -(2**31), 2**31 - 1])
def test_dropout_has_no_weak_key(first):
    # A zero or even first half must not send all positions to a few values.
    drop_keys = torch.stack([torch.full((200,), first, dtype=torch.int32), keys(200)[:, 1]], 1)
    per_image = masks(0.3, drop_keys, shape=(16, 16, 16)).flatten(1).mean(1)
    assert (per_image - 0.3).abs().max() < 4.5 * (0.3 * 0.7 / 16**3) ** 0.5


def correlations(rows):
    """Pearson correlations of the rows, without the diagonal."""
    return torch.corrcoef(rows) - torch.eye(len(rows), dtype=rows.dtype)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_units_are_pairwise_uncorrelated(p):
    # Every pair of 64 units, neighbours included, over 6000 keys: 2016 pairs stay within 5 standard deviations.
    m = masks(p, keys(6000)).flatten(1)
    assert correlations(m.T).abs().max() < 5 / 6000**0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_masks_of_different_images_are_uncorrelated(p):
    m = masks(p, keys(60), shape=(16, 16, 16)).flatten(1)
    assert correlations(m).abs().max() < 5 / 16**1.5


def test_dropout_masks_of_neighbouring_keys_are_uncorrelated():
    shape = (16, 16, 16)
    # Steps of one in either half of the key, past the lowest bit of the first, which the hash does not use.
    near = torch.tensor([[1000, 7], [1002, 7], [1004, 7]], dtype=torch.int32)
    assert correlations(masks(0.5, near, shape).flatten(1)).abs().max() < 5 / 16**1.5


def test_dropout_layers_of_a_network_lose_different_units():
    """Two layers that hashed the same positions would lose the same units for every key."""
    net = small_net(channel_mult=[1, 2, 2], num_blocks=2, dropout=0.5)
    drop_keys, inputs = keys(64), {}
    for m in net.modules():
        if isinstance(m, KeyedDropout):
            m.register_forward_hook(lambda m, args, out: inputs.setdefault(m, args[0]))
    net(normal(64, 1, 8, 8), torch.zeros(64), None, drop_keys)
    assert len(inputs) == 21  # 3 levels of 2 blocks down and 3 up, 2 resamplings each way, 2 in the middle
    lost = [(m.forward(torch.ones_like(x), drop_keys) == 0).double().flatten(1) for m, x in inputs.items()]
    alike = []
    for i, a in enumerate(lost):
        for j, b in enumerate(lost[:i]):
            width = min(a.shape[1], b.shape[1])
            r = torch.corrcoef(torch.stack([a[:, :width].flatten(), b[:, :width].flatten()]))[0, 1].item()
            if abs(r) > 5 / (64 * width) ** 0.5:  # five standard deviations, in 210 pairs
                alike.append((j, i, round(r, 3)))
    assert alike == []


def test_dropout_can_be_kept_to_coarse_features():
    net = small_net(channel_mult=[1, 2, 2], dropout=0.5, dropout_max_size=4)
    sizes = set()
    for m in net.modules():
        if isinstance(m, KeyedDropout):
            m.register_forward_hook(lambda m, args, out: sizes.add((out.shape[-1], bool((out == 0).any()))))
    net(normal(8, 1, 8, 8), torch.zeros(8), None, keys(8))
    assert sizes == {(8, False), (4, True), (2, True)}


def test_dropout_does_not_add_to_the_state_dict():
    with_dropout, without = (UNet(config(dropout=p), 8, 1).state_dict() for p in (0.3, 0.0))
    assert with_dropout.keys() == without.keys()


def test_unet_with_keys_drops_and_without_is_the_plain_network():
    net, plain = small_net(dropout=0.3), small_net()
    x, level = normal(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(net(x, level), plain(x, level))
    dropped = net(x, level, None, keys(2))
    assert torch.equal(dropped, net(x, level, None, keys(2)))
    assert (dropped - plain(x, level)).abs().max() > 1e-3
    assert (dropped - net(x, level, None, keys(2, seed=1))).abs().max() > 1e-3


def test_unet_settings_refuse_an_odd_width_and_no_levels():
    """An odd width has no half for the sines: the embedding would come out one short."""
    for values in ({"channels": 15}, {"channel_mult": []}):
        with pytest.raises(InputError, match=f"backbone.{next(iter(values))}"):
            registry.settings("backbone", {"name": "unet", **SMALL, **values})
