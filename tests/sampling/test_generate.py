import numpy as np
import pytest
import torch
from test_checkpoints import write
from torch import nn

from cm_train.core.errors import InputError
from cm_train.core.rng import PerImageNoise
from cm_train.data.pixels import to_uint8
from cm_train.models.backbones.unet import UNetConfig
from cm_train.models.checkpoints.load import load_denoiser
from cm_train.models.denoiser import DenoiserConfig, build_denoiser
from cm_train.sampling.by_hand import captions, class_names, initial_noise
from cm_train.sampling.choosing import find_sampler
from cm_train.sampling.generate import generate, generate_batches


class Recorder(nn.Module):
    """A denoiser that shrinks its input and remembers what it was called with."""

    def __init__(self, kind="consistency", boundary="sigma_min", num_classes=0, **sampling):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = DenoiserConfig(
            kind=kind,
            boundary=boundary,
            image_size=4,
            image_channels=1,
            num_classes=num_classes,
            sigma_data=0.5,
            sigma_min=0.002,
            sigma_max=80.0,
            sampling=sampling,
        )
        self.calls = []

    def forward(self, x, sigma, labels=None):
        self.calls.append((x.clone(), sigma[0].item(), labels))
        return x / (1 + sigma.view(-1, 1, 1, 1))


@pytest.mark.parametrize(("sampler", "steps"), [("onestep", 1), ("multistep", 3), ("euler", 5), ("heun", 4)])
def test_initial_noise_depends_on_the_seed_alone(sampler, steps):
    denoiser = Recorder()
    generate(denoiser, range(7, 10), sampler=sampler, steps=steps)
    x, sigma, _ = denoiser.calls[0]
    assert sigma == 80.0
    assert torch.equal(x, PerImageNoise(range(7, 10)).randn("initial", (1, 4, 4)) * 80)


@pytest.mark.parametrize(("sampler", "steps"), [("multistep", 3), ("heun", 4)])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_images_do_not_depend_on_the_batch_size(sampler, steps, batch_size):
    whole = generate(Recorder(num_classes=10), range(20), sampler=sampler, steps=steps)
    parts = generate(Recorder(num_classes=10), range(20), sampler=sampler, steps=steps, batch_size=batch_size)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("whole", [False, True])
def test_batches_come_one_by_one_and_are_drawn_when_asked_for(whole):
    denoiser = Recorder(num_classes=10)
    _, sampler = find_sampler("auto", "consistency")
    sizes = {"batch_size": 4, "precision": "fp32", "whole_batches": whole}
    batches = generate_batches(denoiser, sampler, [80.0, 1.0], range(10), None, **sizes)
    first = next(batches)
    assert len(denoiser.calls) == 2, "the first one's, and no more"
    rest = list(batches)
    assert [len(images) for images in (first, *rest)] == [4, 4, 2]
    assert [len(x) for x, _, _ in denoiser.calls] == [4, 4, 4, 4, *([4, 4] if whole else [2, 2])]
    expected = generate(Recorder(num_classes=10), range(10), sigmas=[80.0, 1.0])
    assert torch.equal(torch.cat([first, *rest]), expected)


def test_a_real_network_moves_no_pixel_by_more_than_one_level_between_batch_sizes():
    config = Recorder().config.model_copy(update={"image_size": 8})
    backbone = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]}
    torch.manual_seed(0)
    denoiser = build_denoiser(config, UNetConfig(**backbone, head_channels=8, group_channels=4))
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.1)
    whole, parts = (generate(denoiser, range(12), steps=3, batch_size=b) for b in (12, 5))
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert whole.float().std() > 10


def test_image_i_is_that_of_its_seed_wherever_it_stands():
    a = generate(Recorder(), [5, 6, 7], steps=3)
    b = generate(Recorder(), [7, 5], steps=3)
    assert torch.equal(a[[2, 0]], b)
    assert not torch.equal(a[0], a[1])


def test_random_labels_come_from_the_seeds_and_leave_the_noise_alone():
    first, second, plain = Recorder(num_classes=10), Recorder(num_classes=10), Recorder()
    generate(first, range(100), batch_size=100)
    generate(second, range(50, 100), batch_size=7)
    labels = first.calls[0][2]
    assert torch.equal(labels[50:], torch.cat([c[2] for c in second.calls]))
    assert labels.unique().numel() == 10
    generate(plain, range(100), batch_size=100)
    assert torch.equal(plain.calls[0][0], first.calls[0][0])


def test_given_labels_reach_the_network():
    denoiser = Recorder(num_classes=10)
    generate(denoiser, range(3), labels=[1, 2, 3])
    assert denoiser.calls[0][2].tolist() == [1, 2, 3]
    generate(denoiser, range(3), labels=4)
    assert denoiser.calls[1][2].tolist() == [4, 4, 4]
    for bad in ([1, 2], 10, -1):
        with pytest.raises(InputError, match="label|class"):
            generate(denoiser, range(3), labels=bad)


def test_multistep_uses_fresh_noise_of_exact_variance_at_each_level():
    denoiser = Recorder()
    generate(denoiser, range(3), sigmas=[80.0, 5.0, 0.5])
    noise = PerImageNoise(range(3))
    for i, sigma in ((1, 5.0), (2, 0.5)):
        before, before_sigma, _ = denoiser.calls[i - 1]
        expected = before / (1 + before_sigma) + noise.randn(f"renoise-{i}", (1, 4, 4)) * (sigma**2 - 0.002**2) ** 0.5
        torch.testing.assert_close(denoiser.calls[i][0], expected)


def test_one_step_is_the_network_at_sigma_max():
    denoiser = Recorder()
    images = generate(denoiser, range(3))
    x, sigma, _ = denoiser.calls[0]
    assert len(denoiser.calls) == 1
    assert torch.equal(images, to_uint8(x / (1 + sigma)))


def test_a_number_stands_for_so_many_seeds():
    whole = generate(Recorder(), range(5), steps=3)
    for seeds in (5, np.int64(5), [0, 1, 2, 3, 4], np.arange(5), torch.arange(5), iter(range(5)), [*np.arange(5)]):
        assert torch.equal(generate(Recorder(), seeds, steps=3), whole), seeds
    assert generate(Recorder(), 0).shape == (0, 1, 4, 4)
    for seeds, message in (
        (-1, "negative number"),
        ("16", "whole numbers; got '16'"),
        (1.5, "whole"),
        ([0.5], "whole"),
    ):
        with pytest.raises(InputError, match=message):
            generate(Recorder(), seeds)


def test_a_path_stands_for_the_denoiser_in_it(tmp_path):
    write(tmp_path, 5)
    expected = generate(load_denoiser(tmp_path), 4)
    assert torch.equal(generate(tmp_path, 4), expected)
    assert torch.equal(generate(str(tmp_path), 4), expected)
    for model, message in ((tmp_path / "nothing", "nothing"), (nn.Linear(1, 1), "this is no model; got 'Linear'")):
        with pytest.raises(InputError, match=message):
            generate(model, 4)


def test_float_images_are_what_rounding_is_done_to():
    rounded = generate(Recorder(num_classes=3), 7, steps=2, batch_size=3)
    exact = generate(Recorder(num_classes=3), 7, steps=2, batch_size=3, as_float=True)
    assert exact.dtype == torch.float32 and exact.shape == (7, 1, 4, 4)
    assert torch.equal(to_uint8(exact), rounded)
    assert exact.abs().max() > 1, "not clamped"
    assert generate(Recorder(), 0, as_float=True).dtype == torch.float32


@pytest.mark.parametrize("whole", [False, True])
def test_noise_of_ones_own_takes_the_place_of_the_seeds(whole):
    """The first noise alone: what the sampler adds later is the seeds'."""
    denoiser, noise = Recorder(num_classes=5), initial_noise(Recorder(), range(10, 17))
    options = {"steps": 3, "batch_size": 3, "whole_batches": whole}
    generate(denoiser, 7, noise=noise, **options)
    begun = torch.cat([denoiser.calls[i][0] for i in (0, 3, 6)])[:7]
    assert torch.equal(begun, noise * 80)
    plain = Recorder(num_classes=5)
    generate(plain, 7, **options)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(denoiser.calls, plain.calls, strict=True)), "labels"
    added, usual = ((c[1][0] - c[0][0] / (1 + c[0][1])) for c in (denoiser.calls, plain.calls))
    torch.testing.assert_close(added, usual)


def test_initial_noise_is_what_its_seeds_begin_as():
    plain = generate(Recorder(), [3, 4], steps=3)
    assert torch.equal(generate(Recorder(), [3, 4], steps=3, noise=initial_noise(Recorder(), [3, 4])), plain)
    assert torch.equal(generate(Recorder(), [3, 4], steps=3, noise=initial_noise(Recorder(), [3, 4]).double()), plain)
    assert initial_noise(Recorder(), 0).shape == (0, 1, 4, 4)
    for noise in (torch.randn(2, 1, 4, 5), torch.randn(3, 1, 4, 4), torch.ones(2, 1, 4, 4).int(), [1.0, 2.0]):
        with pytest.raises(InputError, match=r"noise is a unit normal.*allowed: a float tensor \[2, 1, 4, 4\]"):
            generate(Recorder(), 2, noise=noise)


def test_labels_go_by_name_and_by_number():
    named = Recorder(num_classes=3)
    named.config = named.config.model_copy(update={"class_names": ["2", "cat", "dog"]})
    for labels, expected in (
        ("cat", [1, 1, 1]),
        (["dog", 0, "2"], [2, 0, 0]),
        (2, [2, 2, 2]),  # in Python a number is no name
        (torch.tensor([2, 1, 0]), [2, 1, 0]),
        (np.int64(1), [1, 1, 1]),
    ):
        generate(named, 3, labels=labels)
        assert named.calls[-1][2].tolist() == expected, labels
    for labels, message in (
        ("cow", "no such class; got 'cow'"),
        (["cat"], "1 labels for 3"),
        (1.5, "names or numbers"),
    ):
        with pytest.raises(InputError, match=message):
            generate(named, 3, labels=labels)


def test_captions_say_what_generate_makes(tmp_path):
    named = Recorder(num_classes=3)
    named.config = named.config.model_copy(update={"class_names": ["a", "b", "c"]})
    generate(named, 20)
    assert captions(named, 20) == ["abc"[label] for label in named.calls[0][2]]
    assert captions(named, 2, labels="b") == ["b", "b"] and captions(named, 2, labels=[2, "a"]) == ["c", "a"]
    assert class_names(named) == ["a", "b", "c"]
    assert captions(Recorder(num_classes=3), 2, labels=1) == ["class 1", "class 1"]
    write(tmp_path, 5)
    assert captions(tmp_path, 4) == class_names(tmp_path) == []


def test_package_offers_load_and_generate_even_after_the_modules_were_imported():
    import cm_train
    import cm_train.models.checkpoints.read
    import cm_train.sampling.generate

    assert cm_train.generate is generate
    assert cm_train.load_denoiser is cm_train.models.checkpoints.load.load_denoiser
