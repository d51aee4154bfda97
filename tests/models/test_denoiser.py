"""Preconditioning against the published coefficients, and the boundary condition bit for bit."""

import math

import pytest
import torch
from torch import nn

from cm_train.models.backbones.unet import UNetConfig
from cm_train.models.denoiser import Denoiser, DenoiserConfig, build_denoiser, per_image


class Recorder(nn.Module):
    """A backbone that keeps what it was given and answers with fixed random numbers or a function of its input."""

    def __init__(self, function=None):
        super().__init__()
        self.function = function

    def forward(self, x, c_noise, labels, dropout_keys):
        self.seen = {"x": x, "c_noise": c_noise, "labels": labels, "dropout_keys": dropout_keys}
        if self.function is not None:
            return self.function(x)
        return 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


def denoiser(boundary="sigma_min", sigma_data=0.5, sigma_min=0.002, backbone=None):
    config = DenoiserConfig(
        kind="consistency",
        boundary=boundary,
        sigma_data=sigma_data,
        sigma_min=sigma_min,
        sigma_max=80.0,
        image_size=4,
        image_channels=2,
    )
    return Denoiser(config, backbone or Recorder())


def images(batch=3, dtype=torch.float32):
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def small_unet(boundary="sigma_min"):
    config = denoiser(boundary).config
    sizes = {"channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "group_channels": 4, "head_channels": 8}
    torch.manual_seed(0)
    net = build_denoiser(config, UNetConfig(**sizes))
    for parameter in net.parameters():  # a random net: nothing left at its initial zero
        nn.init.normal_(parameter, std=0.3)
    return net


def coefficients(boundary, sigma, **kwargs):
    values = denoiser(boundary, **kwargs).coefficients(torch.tensor([sigma], dtype=torch.float64))
    return tuple(v.item() for v in values)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.5, 3.0, 80.0])
@pytest.mark.parametrize("data", [0.5, 0.753])
def test_edm_coefficients_match_table_1(sigma, data):
    # Karras et al. 2022, table 1.
    c_skip, c_out, c_in, c_noise = coefficients("zero", sigma, sigma_data=data)
    variance = sigma * sigma + data * data
    assert c_skip == pytest.approx(data * data / variance, rel=1e-12)
    assert c_out == pytest.approx(sigma * data / math.sqrt(variance), rel=1e-12)
    assert c_in == pytest.approx(1 / math.sqrt(variance), rel=1e-12)
    assert c_noise == pytest.approx(math.log(sigma) / 4, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.5, 3.0, 80.0])
@pytest.mark.parametrize("data", [0.5, 0.753])
def test_consistency_coefficients_match_appendix_c(sigma, data):
    # Song et al. 2023, appendix C: sigma_min is not under c_out's root.
    c_skip, c_out, c_in, c_noise = coefficients("sigma_min", sigma, sigma_data=data)
    gap = sigma - 0.002
    assert c_skip == pytest.approx(data * data / (gap * gap + data * data), rel=1e-12)
    assert c_out == pytest.approx(gap * data / math.sqrt(sigma * sigma + data * data), rel=1e-12, abs=1e-15)
    assert c_in == pytest.approx(1 / math.sqrt(sigma * sigma + data * data), rel=1e-12)
    assert c_noise == pytest.approx(math.log(sigma) / 4, rel=1e-12)


def test_edm_coefficients_miss_the_boundary_by_the_tabled_amounts():
    c_skip, c_out, _, _ = coefficients("zero", 0.002)
    assert c_skip - 1 == pytest.approx(-1.6e-5, rel=1e-3)
    assert c_out == pytest.approx(2e-3, rel=1e-4)


def test_consistency_coefficients_at_sigma_max_are_as_tabled():
    c_skip, c_out, c_in, c_noise = coefficients("sigma_min", 80.0)
    assert c_skip == pytest.approx(3.906293e-5, rel=1e-6)
    assert c_out == pytest.approx(0.499978, abs=5e-7)
    assert c_in == pytest.approx(0.0125, abs=5e-7)
    assert c_noise == pytest.approx(1.0955066, abs=5e-7)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_edm_preconditioning_has_unit_variance_inside(sigma):
    # Karras et al. 2022, appendix B.6: unit variance of the input and of the training target for sigma_data's data.
    c_skip, c_out, c_in, _ = coefficients("zero", sigma)
    assert c_in**2 * (sigma**2 + 0.25) == pytest.approx(1)
    assert (((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_min", [0.002, 0.0031])
def test_denoiser_is_identity_at_sigma_min(sigma_min, dtype):
    # Bit for bit, and for every sigma_data: the measured ones are not round numbers.
    x = 2 * images(dtype=dtype)
    sigma = torch.full((3,), sigma_min, dtype=dtype)
    values = [thousandths / 1000 for thousandths in range(1, 1500, 7)] + [0.5, 0.753]
    broken = [data for data in values if not torch.equal(denoiser(sigma_data=data, sigma_min=sigma_min)(x, sigma), x)]
    assert broken == []


def test_denoiser_is_identity_at_sigma_min_with_a_random_unet():
    net = small_unet()
    x = images()
    assert torch.equal(net(x, torch.tensor(0.002)), x)
    assert (net(x, torch.tensor(0.1)) - x).abs().max() > 0.01  # the network does say something


def test_edm_denoiser_is_not_the_identity_at_sigma_min():
    x = images()
    assert not torch.allclose(denoiser("zero")(x, torch.tensor(0.002)), x, atol=1e-4)


@pytest.mark.parametrize("boundary", ["zero", "sigma_min"])
def test_denoiser_combines_the_input_and_the_network(boundary):
    net = Recorder()
    x = images(dtype=torch.float64)
    sigmas = [0.05, 1.0, 20.0]
    out = denoiser(boundary, backbone=net)(x, torch.tensor(sigmas, dtype=torch.float64))
    for i, sigma in enumerate(sigmas):
        c_skip, c_out, c_in, c_noise = coefficients(boundary, sigma)
        torch.testing.assert_close(net.seen["x"][i], c_in * x[i])
        torch.testing.assert_close(net.seen["c_noise"][i].item(), c_noise)
        raw = 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[i]
        torch.testing.assert_close(out[i], c_skip * x[i] + c_out * raw)


def test_denoiser_gives_the_network_a_quarter_of_the_log_noise_level():
    net = Recorder()
    denoiser(backbone=net)(images(4), torch.tensor([math.exp(-8.0), 1.0, math.exp(2.0), math.exp(4.0)]).clamp(min=0))
    torch.testing.assert_close(net.seen["c_noise"], torch.tensor([-2.0, 0.0, 0.5, 1.0]), rtol=1e-6, atol=1e-6)


def test_denoiser_takes_one_sigma_for_all_or_one_an_image():
    net = denoiser(backbone=Recorder(torch.sin))
    x = images()
    scalar = net(x, torch.tensor(1.7))
    assert torch.equal(scalar, net(x, torch.full((3,), 1.7)))
    mixed = net(x, torch.tensor([0.1, 1.7, 30.0]))
    torch.testing.assert_close(mixed[1], scalar[1])
    assert not torch.allclose(mixed[0], scalar[0])
    assert not torch.allclose(mixed[2], scalar[2])


def test_denoiser_with_the_exact_gaussian_network_is_the_exact_denoiser():
    # For data N(0, s^2) and any coefficients, F = (D - c_skip x) / c_out with D = s^2 x / (s^2 + sigma^2).
    s, sigma = 0.8, 2.0
    c_skip, c_out, c_in, _ = coefficients("zero", sigma)
    slope = (s * s / (s * s + sigma * sigma) - c_skip) / (c_out * c_in)
    x = images(dtype=torch.float64)
    out = denoiser("zero", backbone=Recorder(lambda h: slope * h))(x, torch.tensor(sigma))
    torch.testing.assert_close(out, s * s / (s * s + sigma * sigma) * x)


def test_denoiser_passes_labels_and_dropout_keys_through():
    net = Recorder()
    labels, keys = torch.tensor([2, 0, 1]), torch.arange(6, dtype=torch.int32).view(3, 2)
    denoiser(backbone=net)(images(), torch.tensor(1.0), labels, keys)
    assert net.seen["labels"] is labels
    assert net.seen["dropout_keys"] is keys
    denoiser(backbone=net)(images(), torch.tensor(1.0))
    assert net.seen["labels"] is None
    assert net.seen["dropout_keys"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoiser_keeps_the_type_of_its_input(dtype):
    half = Recorder(lambda h: h.bfloat16())  # what autocast hands back
    for sigma in (torch.tensor(1.0), torch.ones(3), torch.ones(3, dtype=torch.float64)):
        assert denoiser(backbone=half)(images(dtype=dtype), sigma).dtype == dtype
        assert half.seen["x"].dtype == half.seen["c_noise"].dtype == dtype


def test_denoiser_does_not_clamp():
    assert denoiser(backbone=Recorder(lambda h: 100 * torch.ones_like(h)))(images(), torch.tensor(80.0)).max() > 40


def test_build_denoiser_keeps_convolutions_in_channels_last():
    net = small_unet("zero")
    convolutions = [p for p in net.parameters() if p.ndim == 4]
    assert convolutions
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


def test_build_denoiser_gives_the_network_the_image_shape():
    x = images()
    assert small_unet()(x, torch.tensor([0.1, 1.0, 10.0])).shape == x.shape


def test_per_image_broadcasts_over_any_rank():
    values = torch.tensor([1.0, 2.0])
    assert per_image(values, torch.zeros(2, 3, 4, 4)).shape == (2, 1, 1, 1)
    assert per_image(values, torch.zeros(2, 3)).shape == (2, 1)
    assert torch.equal(per_image(values, torch.ones(2, 3)) * torch.ones(2, 3), torch.tensor([[1.0] * 3, [2.0] * 3]))


@pytest.mark.parametrize(
    ("key", "value"), [("kind", "flow"), ("boundary", "sigma_max"), ("sigma_data", 0.0), ("sigma_min", -1.0)]
)
def test_denoiser_config_refuses_bad_values(key, value):
    config = denoiser().config.model_dump() | {key: value}
    with pytest.raises(ValueError, match=key):
        DenoiserConfig(**config)


def test_the_boundary_is_a_noise_level_and_a_diffusion_models_is_zero():
    config = denoiser("sigma_min", sigma_min=0.003).config
    assert config.sigma_boundary == 0.003
    assert denoiser("zero").config.sigma_boundary == 0
    with pytest.raises(ValueError, match="the boundary of a diffusion model is zero, not sigma_min"):
        DenoiserConfig(**config.model_dump() | {"kind": "diffusion"})
    assert DenoiserConfig(**config.model_dump() | {"kind": "diffusion", "boundary": "zero"}).sigma_boundary == 0
