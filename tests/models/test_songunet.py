"""DDPM++ and NCSN++: published sizes and outputs, derivatives, keyed dropout, augmentation labels, refused settings."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from test_trainer import after, assert_same, build, run  # noqa: F401 - build is a fixture
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_train import load_denoiser
from cm_train.core import registry, rng
from cm_train.core.errors import InputError
from cm_train.models.averages import frozen_copy
from cm_train.models.backbones import songunet
from cm_train.models.backbones.base import KeyedDropout, blocks_as_written
from cm_train.models.backbones.songunet import Attention, Resample, ResBlock, SongUNet, SongUNetConfig
from cm_train.models.backbones.unet import UNet, UNetConfig
from cm_train.models.compiling import CompiledBlocks
from cm_train.models.denoiser import Denoiser, DenoiserConfig
from cm_train.runs.config import parse

NCSNPP = {"embedding": "fourier", "encoder": "residual", "resample_filter": [1.0, 3.0, 3.0, 1.0]}
SKIPS = {"encoder": "skip", "decoder": "skip", "resample_filter": [1.0, 3.0, 3.0, 1.0]}
VARIANTS = {"ddpmpp": {}, "ncsnpp": NCSNPP, "skips": SKIPS}
SMALL = {"channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 2, "attention_resolutions": [8]}
TINY = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]}


def numbers(*shape, key):
    """Numbers of mean 0 and variance 1 that hang on no library's generator: a hash of each one's position."""
    h = (torch.arange(math.prod(shape)) * 0x9E3779B1 + key * 0x85EBCA77) & 0xFFFFFFFF
    for multiplier, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        h = ((h ^ (h >> 16)) * multiplier) & 0xFFFFFFFF
        h = h ^ (h >> shift)
    return ((h.double() / 2**32 - 0.5) * math.sqrt(12)).view(shape)


def filled(net):
    """Every weight by that formula, so that every path carries a signal of order 1."""
    with torch.no_grad():
        for key, (name, value) in enumerate(net.state_dict().items()):
            new = numbers(*value.shape, key=key)
            if value.ndim > 1:
                new = new / value[0].numel() ** 0.5
            elif name != "frequencies":
                new = 0.3 * new + name.endswith("weight")  # a norm's weights are around 1
            value.copy_(new)
    return net


def tiny(num_classes=0, image_channels=1, **values):
    return filled(SongUNet(SongUNetConfig(**TINY | values), 8, image_channels, num_classes))


def images(count=2, channels=1, key=1000):
    return numbers(count, channels, 8, 8, key=key).float()


def keys(count, seed=0):
    return rng.Draws(seed, 0, range(count), torch.device("cpu")).bits("dropout", (2,))


# Published networks


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("ddpmpp_cifar10", 0, 55_733_891),
        ("ddpmpp_cifar10", 10, 55_735_299),
        ("ncsnpp_cifar10", 0, 56_397_827),
        ("ncsnpp_cifar10", 10, 56_400_643),
        ("ddpmpp_ffhq64", 0, 61_805_571),
        ("ncsnpp_ffhq64", 0, 62_761_091),
    ],
)
def test_songunet_has_the_published_number_of_parameters(name, classes, parameters, composed):
    """Those of the configs, which leave out the weights for EDM's nine augmentation labels."""
    config, size = parse(composed(f"backbone={name}")).backbone, 64 if name.endswith("64") else 32

    def count(augment_dim):
        with torch.device("meta"):
            net = SongUNet(config.model_copy(update={"augment_dim": augment_dim}), size, 3, classes)
        return sum(p.numel() for p in net.parameters())

    assert count(9) == parameters
    assert count(0) == parameters - 9 * (256 if name.startswith("ncsnpp") else 128)


# Made once by the public code (NVlabs/edm, training/networks.py, SongUNet), in float64 but for the softmax, which it
# takes in float32. Its weights were those of `filled(SongUNet(...))` here under its names, the rows of qkv reordered
# from (q|k|v, channel) to (channel, q|k|v); its loss the sum of the output times `numbers(..., key=1001)`. All numbers
# agreed then: the output's and the image's gradient to 2e-7, those of each weight's gradient to 2e-6 of its largest.
# Kept are each 199th of the output and of the image's gradient, c_noise's gradient, and norms of weights' gradients.
PUBLISHED = {
    "ddpmpp": {
        "output": [0.3408642, 0.1269909, 0.3607829, -0.8155018, -0.4988245, -0.460229, 0.2436434, -0.1386901],
        "x": [0.4655432, -0.1309626, 0.3337112, 0.9833722, -0.1026074, -0.6058775, -0.5586216, -0.2586558],
        "c_noise": [-0.44344, -1.173821],
        "weights": {
            "": 500.742719,
            "embed_label.weight": 12.1028135,
            "embed_augment.weight": 11.8509078,
            "embed_in.weight": 45.9925474,
            "first.weight": 103.883845,
            "encoder.1.1.block.conv_out.weight": 17.9913905,
            "encoder.1.1.attention.norm.weight": 1.6328911,
            "down.0.block.skip.weight": 8.86816623,
            "middle.0.attention.norm.weight": 0.267429914,
            "up.0.block.embed.bias": 3.53854251,
            "decoder.0.0.block.norm_in.weight": 3.56104792,
            "decoder.1.2.attention.proj.weight": 23.3079532,
            "heads.0.norm.bias": 15.851765,
        },
        "qkv": [0.54013, 0.49058, 10.625546],
    },
    "ncsnpp": {
        "output": [-0.2752851, -0.177721, 0.627165, 0.8007027, -0.1816487, 0.1432897, 0.0003172, 0.3373447],
        "x": [-0.2076649, -0.3430797, -0.4329865, -0.8794828, 0.3165219, 0.1110577, -0.1139682, -0.3628894],
        "c_noise": [7.484138, -7.871075],
        "weights": {
            "": 400.667183,
            "embed_in.weight": 16.7616362,
            "first.weight": 85.8826498,
            "encoder.1.1.block.conv_out.weight": 31.0266374,
            "encoder.1.1.attention.norm.weight": 2.13129071,
            "down.0.block.skip.weight": 5.82215832,
            "pyramid.1.conv.weight": 8.01560809,
            "middle.0.attention.norm.weight": 0.327896593,
            "up.0.block.embed.bias": 2.78477896,
            "decoder.0.0.block.norm_in.weight": 6.00327547,
            "decoder.1.2.attention.proj.weight": 25.5309972,
            "heads.0.norm.bias": 8.34442597,
        },
        "qkv": [3.654076, 3.622549, 9.288653],
    },
    "skips": {
        "output": [0.488743, 1.9278438, -0.6663502, 1.6021846, 1.0075798, 0.6614856, -0.6880368, 0.0282256],
        "x": [0.4155983, -0.1043524, -0.0553957, -0.7354472, 0.4960609, 0.2180186, -0.372137, -0.2821703],
        "c_noise": [0.604723, 3.468369],
        "weights": {
            "": 984.471863,
            "embed_in.weight": 50.4843861,
            "first.weight": 114.672162,
            "encoder.1.1.block.conv_out.weight": 215.778371,
            "encoder.1.1.attention.norm.weight": 14.3381516,
            "down.0.block.skip.weight": 26.2163157,
            "pyramid.1.weight": 7.78787643,
            "middle.0.attention.norm.weight": 2.38623421,
            "up.0.block.embed.bias": 4.86106731,
            "decoder.0.0.block.norm_in.weight": 3.29634257,
            "decoder.1.2.attention.proj.weight": 77.519934,
            "heads.0.norm.bias": 18.3758613,
        },
        "qkv": [17.735229, 13.063698, 117.077896],
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_songunet_does_what_the_public_code_does(variant, dtype):
    classes, augment = (3, 4) if variant == "ddpmpp" else (0, 0)
    config = SongUNetConfig(**SMALL, augment_dim=augment, **VARIANTS[variant])
    net = filled(SongUNet(config, 16, 3, classes)).to(dtype, memory_format=torch.channels_last)
    x = numbers(2, 3, 16, 16, key=1000).to(dtype).requires_grad_()
    level = torch.tensor([-1.2, 0.9], dtype=dtype, requires_grad=True)
    labels = torch.tensor([2, 0]) if classes else None
    output = net(x, level, labels, None, numbers(2, augment, key=1002).to(dtype) if augment else None)
    (output * numbers(2, 3, 16, 16, key=1001).to(dtype)).sum().backward()

    wanted = PUBLISHED[variant]
    tight = 1 if dtype == torch.float64 else 10  # how far rounding goes

    def agrees(found, expected, relative, absolute):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected, rtol=tight * relative, atol=tight * absolute)

    agrees(output.detach().flatten()[::199], wanted["output"], 1e-6, 1e-6)
    agrees(x.grad.flatten()[::199], wanted["x"], 1e-6, 1e-6)
    agrees(level.grad, wanted["c_noise"], 2e-6, 2e-6)
    gradients = {name: p.grad for name, p in net.named_parameters()}
    gradients[""] = torch.cat([g.double().flatten() for g in gradients.values()])
    for name, norm in wanted["weights"].items():
        agrees(torch.linalg.vector_norm(gradients[name].double()), norm, 2e-6, 0)
    thirds = gradients["encoder.1.1.attention.qkv.weight"].view(3, -1).norm(dim=1)
    agrees(thirds, wanted["qkv"], 2e-6, 0)


# Parts


def test_positional_embedding_is_sines_then_cosines_of_frequencies_down_to_a_ten_thousandth():
    net, seen = tiny(), []
    net.embed_in.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    levels = [-1.55, 0.3]
    net(images(), torch.tensor(levels))
    expected = [[f(c * 10_000 ** (-i / 3)) for f in (math.sin, math.cos) for i in range(4)] for c in levels]
    torch.testing.assert_close(seen[0], torch.tensor(expected))


def test_fourier_embedding_is_twice_as_wide_and_its_frequencies_are_stored():
    torch.manual_seed(0)
    net = SongUNet(SongUNetConfig(channels=256, channel_mult=[1], num_blocks=1, embedding="fourier"), 1, 1)
    assert net.frequencies.shape == (256,) and net.embed_in.in_features == 512
    assert net.frequencies.std().item() == pytest.approx(16, rel=0.2)  # 4.5 standard deviations of the estimate
    assert "frequencies" in net.state_dict()
    assert "frequencies" not in tiny().state_dict(), "these follow from the settings"
    slow = tiny(embedding="fourier", fourier_scale=0.02)
    copied = SongUNet(slow.config, 8, 1)
    copied.load_state_dict(slow.state_dict())
    target, _ = frozen_copy(copied)
    for other in (copied, target):
        assert torch.equal(other(images(), torch.tensor([-1.0, 1.0])), slow(images(), torch.tensor([-1.0, 1.0])))


def filtered(x, taps):
    """x [H, W] under the outer product of the taps, zeros beyond the edge, at every offset where they overlap."""
    line = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = torch.outer(line, line)
    return F.conv2d(F.pad(x, [len(taps) - 1] * 4)[None, None], kernel[None, None])[0, 0]


@pytest.mark.parametrize("taps", [[1.0, 1.0], [1.0, 3.0, 3.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
def test_resample_is_its_filter_between_zeros(taps):
    x = numbers(2, 3, 4, 6, key=7)
    start, pad = len(taps) - 1, (len(taps) - 1) // 2
    down, up = (Resample(taps, direction).double()(x) for direction in ("down", "up"))
    assert down.shape == (2, 3, 2, 3) and up.shape == (2, 3, 8, 12)
    for image, small, large in zip(x.flatten(0, 1), down.flatten(0, 1), up.flatten(0, 1), strict=True):
        # Windows that begin `pad` before the edge, every second of them.
        expected = filtered(image, taps)[start - pad :: 2, start - pad :: 2]
        torch.testing.assert_close(small, expected[:2, :3])
        spread = torch.zeros(8, 12, dtype=x.dtype)
        spread[::2, ::2] = 4 * image
        torch.testing.assert_close(large, filtered(spread, taps)[pad:, pad:][:8, :12])


def test_resample_keeps_the_mean_brightness_inside():
    x = torch.ones(1, 2, 8, 8)
    for direction in ("down", "up"):
        inner = Resample([1.0, 3.0, 3.0, 1.0], direction)(x)[..., 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.ones_like(inner))


@pytest.mark.parametrize(
    ("resolutions", "expected"),
    [([], [2]), ([4], [4, 4, 2, 4]), ([8, 2], [8, 8, 2, 2, 2, 2, 8])],
    ids=["none", "middle", "ends"],
)
def test_songunet_attends_throughout_the_encoder_and_once_a_level_in_the_decoder(resolutions, expected):
    net, seen = tiny(channel_mult=[1, 1, 1], num_blocks=2, attention_resolutions=resolutions), []
    for m in net.modules():
        if isinstance(m, Attention):
            m.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
            assert m.heads == 1
    net(images(1), torch.zeros(1))
    assert seen == expected


def test_attention_heads_are_of_the_channels_that_are_asked_for():
    assert {m.heads for m in tiny(head_channels=4).modules() if isinstance(m, Attention)} == {4}


def test_songunet_starts_with_published_gains():
    """Uniform within sqrt(6 / (in + out)): times sqrt(0.2) for qkv, 1e-5 for what ends a branch; no biases."""
    torch.manual_seed(0)
    net = SongUNet(SongUNetConfig(channels=32, channel_mult=[1], num_blocks=1), 8, 3, 4)
    gains = {"qkv": math.sqrt(0.2), "conv_out": 1e-5, "proj": 1e-5, "heads.0.conv": 1e-5}
    for name, m in net.named_modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            area = m.weight[0, 0].numel()
            bound = gain * math.sqrt(6 / (area * (m.weight.shape[0] + m.weight.shape[1])))
            assert 0.9 * bound < m.weight.abs().max() <= bound, name
            assert not m.bias.any(), name


# Derivatives


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_songunet_forward_derivative_is_that_of_differences(variant):
    """Along the image and the noise level together, as sCM takes it."""
    net = tiny(3, **VARIANTS[variant], dropout=0.2, augment_dim=2).double().to(memory_format=torch.channels_last)
    labels, drop, augment = torch.tensor([1, 2]), keys(2), numbers(2, 2, key=5)
    x, level = images().double(), torch.tensor([-0.4, 0.3], dtype=torch.float64)
    dx, dlevel = numbers(*x.shape, key=8), torch.tensor([0.7, -1.1], dtype=torch.float64)

    def call(x, level):
        return net(x, level, labels, drop, augment)

    with blocks_as_written(), sdpa_kernel(SDPBackend.MATH):
        value, slope = torch.func.jvp(call, (x, level), (dx, dlevel))
    h = 1e-5
    expected = (call(x + h * dx, level + h * dlevel) - call(x - h * dx, level - h * dlevel)) / (2 * h)
    torch.testing.assert_close(value, call(x, level))
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-7)
    assert slope.abs().max() > 0.1
    single = net.float()
    with blocks_as_written(), sdpa_kernel(SDPBackend.MATH):
        directions = (dx.float(), dlevel.float())
        _, rounded = torch.func.jvp(
            lambda x, level: single(x, level, labels, drop, augment), (x.float(), level.float()), directions
        )
    torch.testing.assert_close(rounded.double(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_songunet_sends_gradient_to_every_parameter(variant, classes):
    net = tiny(classes, **VARIANTS[variant], augment_dim=2)
    labels = torch.tensor([0, 2]) if classes else None
    net(images(), torch.tensor([-1.0, 1.0]), labels, None, numbers(2, 2, key=5)).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert dead == []


# Runs


def test_songunet_run_goes_on_bit_for_bit_and_all_its_averages_have_its_frequencies(build, monkeypatch):  # noqa: F811
    """Drawn anew, or rounded in a sum of snapshots, they would tell the network another noise level."""
    words = [f"backbone.{key}={value}".replace(" ", "") for key, value in TINY.items()]
    words = ["mode=ict", "backbone=ncsnpp_cifar10", *words, "backbone.dropout=0.3", "dataset.conditional=true"]
    words += ["ema=power", "ema.num_snapshots=3"]
    whole = build(*words, name="whole")
    run(whole)
    assert not run(build(*words, name="parts", should_stop=after(3)))
    monkeypatch.setattr(songunet, "_frequencies", lambda count, config: torch.zeros(count))  # nothing is drawn again
    rest = build(*words, name="parts")
    run(rest)
    frequencies = whole.objective.denoiser.backbone.frequencies
    assert frequencies.any()
    for name in ("raw", "ema", "power_0.1", "power_0.12"):
        one, other = (load_denoiser(trainer.config.folder, name).backbone for trainer in (whole, rest))
        assert torch.equal(one.frequencies, frequencies) and torch.equal(other.frequencies, frequencies), name
    assert_same(whole, rest)


@pytest.mark.parametrize("mode", ["cd", "scd"])
def test_songunet_student_takes_over_its_teacher(mode, build):  # noqa: F811
    words = [f"backbone.{key}={value}".replace(" ", "") for key, value in TINY.items()]
    words = ["backbone=ncsnpp_cifar10", *words, "steps=2", "save_every=2"]
    teacher = build("mode=edm", *words, name="teacher")
    run(teacher)
    student = build(f"mode={mode}", *words, "seed=1", f"teacher={teacher.config.folder}", name="student")
    frequencies = teacher.objective.denoiser.backbone.frequencies
    networks = [m for m in student.objective.modules() if isinstance(m, SongUNet)]
    assert len(networks) >= 2 and all(torch.equal(net.frequencies, frequencies) for net in networks)
    run(student)
    assert torch.isfinite(student.state.weights).all()


# Wiring


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_songunet_is_the_same_in_either_memory_format(variant):
    net = tiny(image_channels=3, **VARIANTS[variant], dropout=0.3)
    x, level = images(channels=3), torch.tensor([-1.0, 1.0])
    contiguous = net(x, level, None, keys(2))
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), level, None, keys(2))
    torch.testing.assert_close(last, contiguous, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_songunet_features_stay_in_channels_last(variant):
    """A part that left the layout would have every other one copy."""
    net, formats = tiny(**VARIANTS[variant]).to(memory_format=torch.channels_last), []
    for m in net.modules():
        if isinstance(m, ResBlock | Attention | Resample):
            m.register_forward_hook(
                lambda m, args, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    net(images(), torch.zeros(2))
    assert all(formats) and len(formats) > 10


def test_songunet_image_does_not_depend_on_the_rest_of_the_batch():
    net = tiny(3, **NCSNPP, dropout=0.3, augment_dim=2)
    x, level, labels = images(4), torch.tensor([-1.0, 0.0, 0.5, 1.0]), torch.tensor([0, 1, 2, 0])
    drop, augment = keys(4), numbers(4, 2, key=5).float()
    together = net(x, level, labels, drop, augment)
    for i in range(4):
        one = slice(i, i + 1)
        alone = net(x[one], level[one], labels[one], drop[one], augment[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)


def test_songunet_depends_on_image_level_label_and_augmentation():
    net = tiny(3, augment_dim=2)
    x, level, labels, augment = images(1), torch.zeros(1), torch.tensor([0]), torch.ones(1, 2)
    base = net(x, level, labels, None, augment)
    others = net(-x, level, labels, None, augment), net(x, level + 1, labels, None, augment)
    others += net(x, level, labels + 1, None, augment), net(x, level, labels, None, -augment)
    for other in others:
        assert (other - base).abs().max() > 1e-3


def test_songunet_without_augmentation_labels_is_as_with_zeros():
    net, level = tiny(augment_dim=2), torch.zeros(2)
    assert torch.equal(net(images(), level), net(images(), level, augment_labels=torch.zeros(2, 2)))
    net(images(), level).sum().backward()
    assert net.embed_augment.weight.grad is not None, "the data-parallel wrapper waits for every gradient"


def denoiser(net):
    sizes = {"image_size": 8, "image_channels": 1, "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    return Denoiser(DenoiserConfig(kind="diffusion", boundary="zero", **sizes), net)


def test_denoiser_tells_its_backbone_of_augmentation_and_no_other():
    sigma, augment = torch.tensor([0.5, 2.0]), torch.ones(2, 2)
    net = tiny(augment_dim=2)
    told = denoiser(net)(images(), sigma, augment_labels=augment)
    root = (sigma**2 + 0.25).rsqrt().view(-1, 1, 1, 1)
    answer = net(images() * root, sigma.log() / 4, augment_labels=augment)
    torch.testing.assert_close(told, images() * 0.25 * root**2 + answer * sigma.view(-1, 1, 1, 1) * 0.5 * root)
    assert not torch.equal(told, denoiser(net)(images(), sigma))
    plain = UNet(UNetConfig(channels=8, channel_mult=[1], num_blocks=1, head_channels=8, group_channels=4), 8, 1)
    assert denoiser(plain)(images(), sigma).shape == (2, 1, 8, 8)


@pytest.mark.long
def test_songunet_compiled_block_by_block_is_the_same(monkeypatch):
    """As the compiler traces and differentiates it, without its machine code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    for values in (NCSNPP, SKIPS):
        net = tiny(**values, dropout=0.3).to(memory_format=torch.channels_last)
        x, level = images(), torch.tensor([-1.0, 1.0])
        expected = net(x, level, None, keys(2))
        gradients = torch.autograd.grad(expected.square().sum(), [*net.parameters()])
        blocks = CompiledBlocks(net)
        assert blocks.meet(lambda net=net, x=x, level=level: net(x, level, None, keys(2))) > 3
        assert blocks.compile()
        found = net(x, level, None, keys(2))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        again = torch.autograd.grad(found.square().sum(), [*net.parameters()])
        for a, b in zip(again, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# Keyed dropout


def test_songunet_drops_by_keys_alone():
    net, plain = tiny(dropout=0.3), tiny()
    x, level = images(), torch.zeros(2)
    assert torch.equal(net(x, level), plain(x, level))
    dropped = net(x, level, None, keys(2))
    assert torch.equal(dropped, net.eval()(x, level, None, keys(2)))
    assert (dropped - plain(x, level)).abs().max() > 1e-3
    assert (dropped - net(x, level, None, keys(2, seed=1))).abs().max() > 1e-3
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_songunet_layers_lose_different_units():
    net, drop, inputs = tiny(channel_mult=[1, 1], dropout=0.5), keys(64), {}
    for m in net.modules():
        if isinstance(m, KeyedDropout):
            m.register_forward_hook(lambda m, args, out: inputs.setdefault(m, args[0]))
    net(images(64), torch.zeros(64), None, drop)
    assert len(inputs) == 10  # 2 levels of 1 block down and 2 up, a resampling each way, 2 in the middle
    lost = [
        (m.forward(torch.ones_like(x), drop) == 0).double().flatten(1)[:, :128].flatten() for m, x in inputs.items()
    ]
    alike = torch.corrcoef(torch.stack(lost)) - torch.eye(len(lost))
    assert alike.abs().max() < 5 / (64 * 128) ** 0.5  # five standard deviations


def test_songunet_dropout_can_be_kept_to_coarse_features():
    net, sizes = tiny(dropout=0.5, dropout_max_size=4), set()
    for m in net.modules():
        if isinstance(m, KeyedDropout):
            m.register_forward_hook(lambda m, args, out: sizes.add((out.shape[-1], bool((out == 0).any()))))
    net(images(8), torch.zeros(8), None, keys(8))
    assert sizes == {(8, False), (4, True)}


# Refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 6}, "backbone.channels: .*multiple of 4; got '6'"),
        ({"channels": 132}, "norm groups must divide.*channels=132.*132 in 32 groups'; fix: .*multiple of 32"),
        ({"channels": 100, "channel_mult": [1]}, "norm groups must divide.*200 in 32 groups"),
        ({"channel_mult": []}, "backbone.channel_mult: "),
        ({"num_blocks": 0}, "backbone.num_blocks: "),
        ({"dropout": 1.0}, "backbone.dropout: "),
        ({"embedding": "sines"}, "backbone.embedding: .*'positional' or 'fourier'"),
        ({"encoder": "pyramid"}, "backbone.encoder: .*'standard', 'skip' or 'residual'"),
        ({"decoder": "residual"}, "backbone.decoder: .*'standard' or 'skip'"),
        ({"resample_filter": [1.0, 2.0, 1.0]}, "resample_filter.*got .*; allowed: an even number"),
        ({"resample_filter": [1.0, -1.0]}, "resample_filter.*sum is above 0"),
        ({"fourier_scale": 0.0}, "backbone.fourier_scale: "),
        ({"augment_dim": -1}, "backbone.augment_dim: "),
    ],
)
def test_songunet_settings_refuse_what_makes_no_network(values, message):
    with pytest.raises(InputError, match=message) as caught:
        registry.settings("backbone", {"name": "songunet", **TINY, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        (
            {"channel_mult": [1, 1, 1]},
            6,
            "3 levels halve the image 2 times; got 'image size 6'; allowed: a multiple of 4",
        ),
        ({"head_channels": 5}, 8, "heads must divide the width; got '16 channels in heads of 5'; fix: .*head_channels"),
    ],
)
def test_songunet_refuses_images_and_heads_that_do_not_divide(values, size, message):
    with pytest.raises(InputError, match=message) as caught:
        SongUNet(SongUNetConfig(**TINY | {"attention_resolutions": []} | values), size, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"num_classes": 3}, {}, "labels go with a class-conditional network.*no labels.*3 classes"),
        ({}, {"labels": torch.tensor([1, 0])}, "labels go with a class-conditional network.*0 classes"),
        ({}, {"augment_labels": torch.zeros(2, 9)}, "not told of augmentation.*allowed: .*augment_dim above 0"),
        ({"augment_dim": 2}, {"augment_labels": torch.zeros(2, 9)}, r"got 'shape \[2, 9\]'; allowed: \[2, 2\]"),
    ],
)
def test_songunet_refuses_labels_that_it_has_no_use_for(settings, call, message):
    with pytest.raises(InputError, match=message):
        tiny(**settings)(images(), torch.zeros(2), **call)
