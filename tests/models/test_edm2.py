"""EDM2's network: published sizes, the public code's numbers, kept magnitudes, derivatives, refused settings."""

import copy
import functools
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_train.core import registry, rng
from cm_train.core.errors import InputError
from cm_train.models.averages import flatten_parameters, frozen_copy
from cm_train.models.backbones.base import KeyedDropout, blocks_as_written, constrain
from cm_train.models.backbones.edm2 import (
    EDM2,
    EDM2Config,
    MPAttention,
    MPBlock,
    MPFourier,
    MPLayer,
    MPPositional,
    mp_cat,
    mp_silu,
    mp_sum,
    normalized,
)
from cm_train.models.compiling import CompiledBlocks, num_kinds

SMALL = {
    "channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [4],
    "head_channels": 8,
}


def config(**values):
    return EDM2Config(**(SMALL | values))


def small_net(num_classes=0, image_channels=1, **values):
    """With no gain at its initial zero, so that every path carries a signal."""
    torch.manual_seed(0)
    net = EDM2(config(**values), 8, image_channels, num_classes)
    with torch.no_grad():
        net.gains.values.copy_(torch.linspace(0.3, 0.9, len(net.gains.values)))
    return net


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def keys(count, seed=0):
    return rng.Draws(seed, 0, range(count), torch.device("cpu")).bits("dropout", (2,))


def rms(x):
    return x.square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------------ published sizes

HEAD = 128  # weights of the published networks' log-variance, which is the objective's here


@pytest.mark.parametrize(
    ("channels", "latents", "images"),
    [
        (128, 124_713_253, 124_710_949),
        (192, 280_212_837, 280_209_381),
        (256, 497_807_781, 497_803_173),
        (320, 777_498_085, 777_492_325),
        (384, 1_119_283_749, 1_119_276_837),
        (448, 1_523_164_773, None),
    ],
    ids=["xs", "s", "m", "l", "xl", "xxl"],
)
def test_edm2_has_the_published_number_of_parameters(channels, latents, images):
    """Of ImageNet-512, in 4 x 64 x 64 latents, and of ImageNet-64."""
    for image_channels, parameters in ((4, latents), (3, images)):
        with torch.device("meta"):
            net = EDM2(EDM2Config(channels=channels), 64, image_channels, 1000)
        assert parameters in (None, sum(p.numel() for p in net.parameters()) + HEAD)


# ------------------------------------------------------------------------------------------------------ the public code

# Names of a block's weights here and in the published files.
PARTS = {
    "conv_in.weight": "conv_res0.weight",
    "embed.weight": "emb_linear.weight",
    "conv_out.weight": "conv_res1.weight",
    "skip.weight": "conv_skip.weight",
    "attention.qkv.weight": "attn_qkv.weight",
    "attention.proj.weight": "attn_proj.weight",
}
OUTSIDE = {
    "noise.freqs": "emb_fourier.freqs",
    "noise.phases": "emb_fourier.phases",
    "embed_noise.weight": "emb_noise.weight",
    "embed_label.weight": "emb_label.weight",
    "last.weight": "out_conv.weight",
}


def published_blocks(levels, num_blocks, image_size):
    """The published names of the encoder's blocks and of the decoder's, in order."""
    encoder, decoder = [], []
    for level in range(levels):
        kinds = ["down"] * (level > 0) + [f"block{i}" for i in range(num_blocks)]
        encoder += [f"enc.{image_size >> level}x{image_size >> level}_{kind}" for kind in kinds]
    for level in reversed(range(levels)):
        kinds = (["in0", "in1"] if level == levels - 1 else ["up"]) + [f"block{i}" for i in range(num_blocks + 1)]
        decoder += [f"dec.{image_size >> level}x{image_size >> level}_{kind}" for kind in kinds]
    return encoder, decoder


def published_name(name, net, image_size):
    """The published name of one of our tensors but for the gains, which are numbers of their own there."""
    encoder, decoder = published_blocks(len(net.config.channel_mult), net.config.num_blocks, image_size)
    if name == "first.weight":
        return f"enc.{image_size}x{image_size}_conv.weight"
    part, _, rest = name.partition(".")
    if part in ("encoder", "decoder"):
        index, _, rest = rest.partition(".")
        return f"{(encoder if part == 'encoder' else decoder)[int(index)]}.{PARTS[rest]}"
    return OUTSIDE[name]


def by_parts(qkv, heads):
    """Rows from (head, channel, q|k|v), as published, to (q|k|v, head, channel)."""
    return qkv.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def interleaved(qkv, heads):
    """And back."""
    return qkv.unflatten(0, (3, heads, -1)).movedim(0, 2).flatten(0, 2)


def filled(name, *shape):
    """Numbers of unit variance by a formula that is the same everywhere: a hash of the position, begun by the name."""
    h = torch.arange(math.prod(shape), dtype=torch.int64) * 0x9E3779B1 + zlib.crc32(name.encode())
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        h = h & 0xFFFFFFFF
        h = ((h ^ (h >> shift)) * multiplier) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return (math.sqrt(3) * (h.double() / 2**31 - 1)).reshape(shape)


# From NVlabs/edm2@4bf8162, training/networks_edm2.py: UNet(8, 3, 3, model_channels=16, channel_mult=[1, 2],
# num_blocks=1, attn_resolutions=[4], channels_per_head=8).eval() in float64, every parameter and buffer `filled` under
# its name; images `filled("x", 2, 3, 8, 8)`, c_noise [-1.2, 0.7], labels [2, 0]. OUTPUT is every 24th number of the
# output. GRADIENT is, of the sum of the output times `filled("cotangent", ...)`, the gradient of each parameter times
# `filled("probe " + name, ...)`, summed; for the images under "x".
OUTPUT = [
    *(-1.855250504, -1.135846609, -1.626002599, -1.652881458, 0.5594844594, -0.6619235478, 0.1042819019, 2.421367391),
    *(-1.887483915, 0.3652971934, -0.673786725, -0.5395798058, -0.8322223371, -0.6739375382, 1.867299166),
    -0.07194419908,
]
GRADIENT = {
    "x": 16.85672724,
    "out_gain": -37.24520802,
    "emb_noise.weight": 2.230208582,
    "emb_label.weight": -30.80737656,
    "enc.8x8_conv.weight": -17.90035133,
    "enc.8x8_block0.emb_gain": -11.76631258,
    "enc.8x8_block0.conv_res0.weight": 11.7664501,
    "enc.8x8_block0.emb_linear.weight": -19.09426598,
    "enc.8x8_block0.conv_res1.weight": 19.8173797,
    "enc.4x4_down.emb_gain": 2.615408644,
    "enc.4x4_down.conv_res0.weight": -4.038621528,
    "enc.4x4_down.emb_linear.weight": 1.605128652,
    "enc.4x4_down.conv_res1.weight": -8.464980845,
    "enc.4x4_block0.emb_gain": 0.9098806034,
    "enc.4x4_block0.conv_res0.weight": -5.030198442,
    "enc.4x4_block0.emb_linear.weight": 0.5276794176,
    "enc.4x4_block0.conv_res1.weight": -7.409032494,
    "enc.4x4_block0.conv_skip.weight": -11.76615286,
    "enc.4x4_block0.attn_qkv.weight": -3.783799937,
    "enc.4x4_block0.attn_proj.weight": 1.551528965,
    "dec.4x4_in0.emb_gain": -3.235376105,
    "dec.4x4_in0.conv_res0.weight": 1.190480551,
    "dec.4x4_in0.emb_linear.weight": -1.272073693,
    "dec.4x4_in0.conv_res1.weight": -17.41594665,
    "dec.4x4_in0.attn_qkv.weight": 10.83595395,
    "dec.4x4_in0.attn_proj.weight": 8.345075515,
    "dec.4x4_in1.emb_gain": 0.9932096885,
    "dec.4x4_in1.conv_res0.weight": 0.06670223217,
    "dec.4x4_in1.emb_linear.weight": -3.741900957,
    "dec.4x4_in1.conv_res1.weight": -8.179370521,
    "dec.4x4_block0.emb_gain": -2.249791511,
    "dec.4x4_block0.conv_res0.weight": 4.454094436,
    "dec.4x4_block0.emb_linear.weight": -3.218428302,
    "dec.4x4_block0.conv_res1.weight": 2.030596257,
    "dec.4x4_block0.conv_skip.weight": 1.463958804,
    "dec.4x4_block0.attn_qkv.weight": -0.1862823274,
    "dec.4x4_block0.attn_proj.weight": -4.659040683,
    "dec.4x4_block1.emb_gain": 14.12338283,
    "dec.4x4_block1.conv_res0.weight": 10.75480637,
    "dec.4x4_block1.emb_linear.weight": 1.323269389,
    "dec.4x4_block1.conv_res1.weight": -3.119229894,
    "dec.4x4_block1.conv_skip.weight": -5.269751443,
    "dec.4x4_block1.attn_qkv.weight": -2.436090343,
    "dec.4x4_block1.attn_proj.weight": -6.041689143,
    "dec.8x8_up.emb_gain": -0.6291153703,
    "dec.8x8_up.conv_res0.weight": 19.43516972,
    "dec.8x8_up.emb_linear.weight": 7.59946384,
    "dec.8x8_up.conv_res1.weight": -33.71136343,
    "dec.8x8_block0.emb_gain": -25.35564821,
    "dec.8x8_block0.conv_res0.weight": 0.6780774401,
    "dec.8x8_block0.emb_linear.weight": 6.066877481,
    "dec.8x8_block0.conv_res1.weight": 16.17646524,
    "dec.8x8_block0.conv_skip.weight": -13.89479765,
    "dec.8x8_block1.emb_gain": -26.2225645,
    "dec.8x8_block1.conv_res0.weight": -14.5137388,
    "dec.8x8_block1.emb_linear.weight": -8.281980867,
    "dec.8x8_block1.conv_res1.weight": 13.28855571,
    "dec.8x8_block1.conv_skip.weight": 28.5074508,
    "out_conv.weight": -69.31738926,
}
C_NOISE_GRADIENT = [-22.677332230181904, -13.831401215503131]


def published_net():
    """Ours with the public code's weights, in float64."""
    net = EDM2(config(), 8, 3, 3).double()
    encoder, decoder = published_blocks(2, 1, 8)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name == "gains.values":
                gains = [filled(f"{block}.emb_gain") for block in [*encoder, *decoder]]
                tensor.copy_(torch.stack([*gains, filled("out_gain")]))
                continue
            theirs = filled(published_name(name, net, 8), *tensor.shape)
            heads = len(theirs) // 3 // 8
            tensor.copy_(by_parts(theirs, heads) if name.endswith("qkv.weight") else theirs)
    return net


def published_inputs():
    return filled("x", 2, 3, 8, 8), torch.tensor([-1.2, 0.7], dtype=torch.float64), torch.tensor([2, 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_edm2_gives_the_output_of_the_public_code(dtype, tolerance):
    x, c_noise, labels = published_inputs()
    out = published_net().to(dtype)(x.to(dtype), c_noise.to(dtype), labels)
    expected = torch.tensor(OUTPUT, dtype=dtype)
    torch.testing.assert_close(out.flatten()[::24], expected, rtol=tolerance, atol=tolerance)


def test_edm2_gives_the_gradients_of_the_public_code():
    net, (x, c_noise, labels) = published_net(), published_inputs()
    x, c_noise = x.requires_grad_(), c_noise.requires_grad_()
    out = net(x, c_noise, labels)
    (out * filled("cotangent", *out.shape)).sum().backward()

    def check(name, gradient):
        found = (gradient * filled("probe" if name == "x" else f"probe {name}", *gradient.shape)).sum().item()
        assert found == pytest.approx(GRADIENT[name], rel=1e-8, abs=1e-8)
        seen.add(name)

    seen = set()
    check("x", x.grad)
    assert c_noise.grad.tolist() == pytest.approx(C_NOISE_GRADIENT, rel=1e-8)
    for name, p in net.named_parameters():
        if name == "gains.values":
            encoder, decoder = published_blocks(2, 1, 8)
            names = [*(f"{block}.emb_gain" for block in [*encoder, *decoder]), "out_gain"]
            for gain, gradient in zip(names, p.grad, strict=True):
                check(gain, gradient)
        else:
            heads = len(p) // 3 // 8
            check(published_name(name, net, 8), interleaved(p.grad, heads) if name.endswith("qkv.weight") else p.grad)
    assert seen == GRADIENT.keys()


# ----------------------------------------------------------------------------------------------------- kept magnitudes


def test_parts_keep_unit_magnitude():
    """Unit normals in, unit magnitude out, to the few percent that 100,000 numbers leave open."""
    a, b = normal(64, 96, 4, 4), normal(64, 32, 4, 4, seed=1)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    for balance in (0.0, 0.3, 0.5, 1.0):
        assert rms(mp_sum(a[:, :32], b, balance)) == pytest.approx(1, abs=0.02)
        assert rms(mp_cat(a, b, balance)) == pytest.approx(1, abs=0.02)
    torch.manual_seed(0)
    for layer, x in ((MPLayer(96, 64, 3), a), (MPLayer(96, 64, 1), a), (MPLayer(96, 64), a[:, :, 0, 0])):
        inner = layer(x)[..., 1:-1, 1:-1] if layer.weight.shape[-1] == 3 else layer(x)  # at the border zeros come in
        assert rms(inner) == pytest.approx(1, abs=0.05)
    c = torch.linspace(-1.6, 1.1, 200)
    assert rms(MPFourier(512)(c)) == pytest.approx(1, abs=0.05)
    assert rms(MPPositional(512)(c)) == pytest.approx(1, abs=1e-3)


def test_concatenation_gives_both_their_share_whatever_their_widths():
    """What a layer with weights of one size makes of each has magnitudes as 1 - balance to balance."""
    joined = mp_cat(torch.ones(1, 96, 1, 1), torch.ones(1, 32, 1, 1), 0.25)[0, :, 0, 0]
    a, b = joined[:96].norm(), joined[96:].norm()
    assert b / a == pytest.approx(0.25 / 0.75)


def test_normalized_has_unit_root_mean_square_over_its_dimension():
    x = 7 * normal(2, 12, 3, 3)
    torch.testing.assert_close(normalized(x).square().mean(1), torch.ones(2, 3, 3), rtol=1e-3, atol=0)
    torch.testing.assert_close(normalized(x, 2).square().mean(2), torch.ones(2, 12, 3), rtol=1e-3, atol=0)
    assert torch.equal(normalized(torch.zeros(1, 4, 1, 1)), torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalized_keeps_the_type_and_sums_in_float32(dtype):
    x = torch.full((1, 4096, 1, 1), 100.0, dtype=dtype)  # whose squares' sum is no float16
    assert normalized(x).dtype == dtype
    torch.testing.assert_close(normalized(x).float(), torch.ones(1, 4096, 1, 1), rtol=1e-2, atol=0)


def test_network_keeps_unit_magnitude_from_block_to_block_at_first():
    """EDM2's claim for configuration G: at the start no activation grows or shrinks along the network."""
    torch.manual_seed(0)
    net = EDM2(EDM2Config(channels=64, num_blocks=2, attention_resolutions=[8]), 16, 3, 10)
    sizes = []
    for m in net.modules():
        if isinstance(m, MPBlock):
            m.register_forward_hook(lambda m, args, out: sizes.append(rms(out)))
    labels = torch.arange(8)
    net(normal(8, 3, 16, 16), torch.linspace(-1.6, 1.1, 8), labels)
    assert len(sizes) == 28
    print("magnitudes", [round(s, 2) for s in sizes])
    assert min(sizes) > 0.6
    assert max(sizes) < 1.3


def test_layer_does_not_depend_on_the_length_of_its_weights():
    layer = MPLayer(12, 8, 3).double()
    x = normal(2, 12, 4, 4, dtype=torch.float64)
    out = layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(3, 9, 8, dtype=torch.float64).view(-1, 1, 1, 1))
    torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-4)  # but for the 1e-4 that keeps from dividing by 0


def test_gradient_is_at_right_angles_to_each_row():
    layer = MPLayer(12, 8, 3).double()
    layer(normal(2, 12, 4, 4, dtype=torch.float64)).pow(3).sum().backward()
    along = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    assert along.abs().max() < 1e-3 * layer.weight.grad.flatten(1).norm(dim=1).max()


def test_constrain_gives_each_row_its_length_and_changes_no_output():
    net = small_net(3).double()
    x, level, labels = normal(2, 1, 8, 8, dtype=torch.float64), torch.tensor([-1.0, 0.7]).double(), torch.tensor([0, 2])
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(5.0) if p.ndim > 1 else None
    before, gains = net(x, level, labels), net.gains.values.clone()
    constrain(net)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            lengths = p.flatten(1).norm(dim=1)
            expected = torch.full_like(lengths, math.sqrt(p[0].numel()))
            torch.testing.assert_close(lengths, expected, rtol=2e-4, atol=0, msg=name)
    assert torch.equal(net.gains.values, gains)
    torch.testing.assert_close(net(x, level, labels), before, rtol=1e-3, atol=1e-3)


def test_constrain_moves_nothing_where_the_step_was_skipped():
    layer = MPLayer(12, 8)
    with torch.no_grad():
        layer.weight.mul_(3)
    as_it_was = layer.weight.detach().clone()
    constrain(layer, torch.zeros(()))
    assert torch.equal(layer.weight, as_it_was)
    constrain(layer, torch.ones(()))
    assert not torch.equal(layer.weight, as_it_was)


def test_weights_are_drawn_with_their_length():
    for p in small_net(3).parameters():
        if p.ndim > 1:
            lengths = p.flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, torch.full_like(lengths, math.sqrt(p[0].numel())), rtol=2e-3, atol=0)


# -------------------------------------------------------------------------------------------------------------- wiring


def test_edm2_is_zero_at_first():
    net = EDM2(config(), 8, 1, 3)
    assert torch.equal(net(normal(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 2])), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("embedding", ["fourier", "positional"])
def test_edm2_sends_gradient_to_every_parameter(classes, embedding):
    net = small_net(classes, noise_embedding=embedding)
    labels = torch.tensor([0, 2]) if classes else None
    net(normal(2, 1, 8, 8), torch.tensor([-1.0, 1.0]), labels).pow(3).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert dead == []


def test_edm2_depends_on_image_level_and_label():
    net = small_net(3)
    x, level, labels = normal(1, 1, 8, 8), torch.zeros(1), torch.tensor([0])
    base = net(x, level, labels)
    for other in (net(-x, level, labels), net(x, level + 1, labels), net(x, level, labels + 1)):
        assert (other - base).abs().max() > 1e-3


def test_edm2_image_does_not_depend_on_the_rest_of_the_batch():
    net = small_net(3, dropout=0.3)
    x, level, labels, drop = normal(3, 1, 8, 8), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 1, 2]), keys(3)
    together = net(x, level, labels, drop)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], net(x[one], level[one], labels[one], drop[one]), rtol=1e-4, atol=1e-4)


def test_edm2_attends_at_the_listed_resolutions_and_where_the_decoder_starts():
    def sizes(resolutions):
        net, seen = small_net(channel_mult=[1, 1, 1], attention_resolutions=resolutions), []
        for m in net.modules():
            if isinstance(m, MPAttention):
                m.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
        net(normal(1, 1, 8, 8), torch.zeros(1))
        return seen

    assert sizes([]) == [2]
    assert sizes([4]) == [4, 2, 4, 4]  # one block down, num_blocks + 1 up
    assert sizes([8, 2]) == [8, 2, 2, 2, 2, 8, 8]


def test_blocks_clip_what_they_give():
    net, largest = small_net(clip=0.5), []
    for m in net.modules():
        if isinstance(m, MPBlock):
            m.register_forward_hook(lambda m, args, out: largest.append(out.abs().max().item()))
    net(normal(2, 1, 8, 8), torch.zeros(2))
    assert set(largest) == {0.5}
    assert not torch.equal(
        small_net(clip=None)(normal(2, 1, 8, 8), torch.zeros(2)), net(normal(2, 1, 8, 8), torch.zeros(2))
    )


def test_weights_lie_on_boundaries_of_sixteen_bytes_in_one_vector():
    """Off them, blocks of one kind would be compiled four times, and a GPU reads them number by number."""
    offset = 0
    for name, p in small_net(4, image_channels=3).named_parameters():
        assert offset % 4 == 0, name
        offset += p.numel()


def test_fourier_features_are_stored_and_copied_with_the_weights():
    """They are drawn once: a student without its teacher's would see other noise levels."""
    net, other = small_net(), copy.deepcopy(small_net())
    other.noise.freqs.mul_(2)
    assert {"noise.freqs", "noise.phases"} <= net.state_dict().keys()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(normal(1, 1, 8, 8), torch.ones(1)), net(normal(1, 1, 8, 8), torch.ones(1)))


# --------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("embedding", ["fourier", "positional"])
def test_edm2_forward_derivative_agrees_with_differences(embedding):
    """Along images and noise level at once, with labels, attention and dropout."""
    net = small_net(3, noise_embedding=embedding, dropout=0.3).double()
    x, direction = normal(2, 1, 8, 8, dtype=torch.float64), normal(2, 1, 8, 8, seed=1, dtype=torch.float64)
    level, rate = torch.tensor([-1.0, 0.6]).double(), torch.tensor([0.7, -0.4]).double()
    labels, drop = torch.tensor([0, 2]), keys(2)

    def along(x, level):
        return net(x, level, labels, drop)

    with torch.no_grad(), blocks_as_written(), sdpa_kernel(SDPBackend.MATH):
        out, slope = torch.func.jvp(along, (x, level), (direction, rate))
        assert torch.equal(out, along(x, level))
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (along(x + s * direction, level + s * rate) for s in (step, -step))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)
    assert slope.abs().max() > 1


def test_positional_embedding_changes_more_slowly_with_the_level():
    """The derivative of the features along c_noise, root mean square: about 2 pi of random ones, below 1/2 of these."""
    c, one = torch.linspace(-1.6, 1.1, 50), torch.ones(50)
    fourier, positional = (torch.func.jvp(e, (c,), (one,))[1] for e in (MPFourier(4096), MPPositional(4096)))
    assert rms(fourier) == pytest.approx(2 * math.pi, rel=0.05)
    assert rms(positional) < 0.5


# ----------------------------------------------------------------------------------------------- compiled, autocast


def test_edm2_blocks_compile_once_a_kind_and_give_the_same(monkeypatch):
    """By the compiler without its last and slowest part, with frozen copies and without gradient too."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    net = small_net(3, channel_mult=[1], attention_resolutions=[], dropout=0.3)
    net = net.to(memory_format=torch.channels_last)
    flatten_parameters(net.parameters())
    twin, _ = frozen_copy(net)
    x, level, labels, drop = normal(2, 1, 8, 8), torch.tensor([-1.0, 0.7]), torch.tensor([0, 2]), keys(2)

    def everything():
        with torch.no_grad():
            frozen = net(x, level, labels, drop), twin(x, level, labels, drop)
        return net(x, level, labels, drop), *frozen

    expected = everything()
    gradient = torch.autograd.grad(expected[0].square().sum(), [*net.parameters()])
    blocks = CompiledBlocks(net, twin)
    # One in the encoder, and in the decoder one with attention, one without, and two of one kind that take skips.
    assert num_kinds(net) == 4
    assert blocks.meet(everything) == 2 * 4
    assert blocks.compile()
    assert blocks.meet(everything) == 0
    found = everything()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    compiled = torch.autograd.grad(found[0].square().sum(), [*net.parameters()])
    for a, b in zip(compiled, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_edm2_block_is_compiled_by_the_whole_compiler():
    torch._dynamo.reset()
    net = small_net(channel_mult=[1]).to(memory_format=torch.channels_last)
    block, x, e = net.decoder[0], normal(2, 16, 8, 8).to(memory_format=torch.channels_last), normal(2, 16, seed=1)
    call = lambda: block(x, None, e, torch.tensor(0.5), None)  # noqa: E731
    expected = call()
    gradient = torch.autograd.grad(expected.square().sum(), [*block.parameters()])
    blocks = CompiledBlocks(block)
    assert blocks.meet(call) == 1
    assert blocks.compile()
    found = call()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    compiled = torch.autograd.grad(found.square().sum(), [*block.parameters()])
    for a, b in zip(compiled, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_edm2_under_autocast_is_near_float32_and_told_close_levels_apart():
    """Blocks in bfloat16; noise levels that lie close must not round to the same."""
    net = small_net(3, channels=32)
    x, level, labels = normal(2, 1, 8, 8), torch.tensor([1.0, 1.001]), torch.tensor([2, 2])
    x[1] = x[0]
    seen = []
    net.encoder[0].register_forward_hook(lambda m, args, out: seen.append((args[2], out)))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, level, labels)
    embedding, features = seen[0]
    assert embedding.dtype == torch.float32
    assert features.dtype == torch.bfloat16
    assert (embedding[0] - embedding[1]).abs().max() > 1e-4
    torch.testing.assert_close(out.float(), net(x, level, labels), rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------------- dropout


def test_edm2_with_keys_drops_and_without_is_the_plain_network():
    net, plain = small_net(dropout=0.3), small_net()
    x, level = normal(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(net(x, level), plain(x, level))
    dropped = net(x, level, None, keys(2))
    assert torch.equal(dropped, net(x, level, None, keys(2)))
    assert (dropped - plain(x, level)).abs().max() > 1e-3
    assert (dropped - net(x, level, None, keys(2, seed=1))).abs().max() > 1e-3
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_dropout_can_be_kept_to_coarse_features():
    net = small_net(channel_mult=[1, 2, 2], dropout=0.5, dropout_max_size=4)
    sizes, salted = set(), 0
    for m in net.modules():
        if isinstance(m, KeyedDropout):
            salted += 1
            m.register_forward_hook(lambda m, args, out: sizes.add((out.shape[-1], bool((out == 0).any()))))
    net(normal(8, 1, 8, 8), torch.zeros(8), None, keys(8))
    assert sizes == {(8, False), (4, True), (2, True)}
    assert salted == len(net.encoder) + len(net.decoder)


def test_dropout_layers_lose_different_units():
    net, lost = small_net(dropout=0.5), []
    for block in [*net.encoder, *net.decoder]:
        positions = block.dropout.positions.flatten()[:256]
        assert not any(torch.equal(positions, other) for other in lost)
        lost.append(positions)
    assert len(lost) == 10


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("classes", "labels"), [(3, None), (0, torch.tensor([1]))])
def test_edm2_wants_labels_exactly_where_it_has_classes(classes, labels):
    with pytest.raises(InputError, match="labels"):
        small_net(classes)(normal(1, 1, 8, 8), torch.zeros(1), labels)


@pytest.mark.parametrize(
    ("values", "image_size", "word"),
    [
        ({"channel_mult": [1, 1, 1]}, 6, "image size 6"),
        ({"head_channels": 7}, 8, "head_channels"),
        ({"head_channels": 64}, 8, "head_channels"),
    ],
)
def test_edm2_refuses_sizes_that_do_not_divide(values, image_size, word):
    with pytest.raises(InputError, match=word) as caught:
        EDM2(config(**values), image_size, 1)
    assert "\n" not in str(caught.value)
    assert "fix" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"dropout": 1.0},
        {"channels": 15},
        {"channel_mult": []},
        {"num_blocks": 0},
        {"res_balance": 1.5},
        {"attn_balance": -0.1},
        {"clip": 0},
        {"noise_embedding": "sinus"},
    ],
)
def test_edm2_settings_refuse_values_out_of_range(values):
    with pytest.raises(InputError, match=f"backbone.{next(iter(values))}") as caught:
        registry.settings("backbone", {"name": "edm2", **SMALL, **values})
    assert "\n" not in str(caught.value)


def test_resampling_is_the_published_filter():
    """[1, 1]: 2 x 2 means down, and four of each up."""
    net, seen = small_net(), {}
    x = normal(1, 16, 8, 8)
    down = net.encoder[1]
    down.conv_in.register_forward_hook(lambda m, args, out: seen.update(down=args[0]))
    down(x, None, torch.zeros(1, 32), torch.zeros(()), None)
    kernel = torch.full((16, 1, 2, 2), 0.25)
    expected = mp_silu(normalized(F.conv2d(x, kernel, stride=2, groups=16)))
    torch.testing.assert_close(seen["down"], expected)
