"""EDM's augmentation: its public code's numbers, closed forms, keyed draws, and a teacher that is told of it."""

import dataclasses
import math

import pytest
import torch
from test_songunet import TINY, numbers
from test_trainer import after, assert_same, build, run  # noqa: F401 - build is a fixture

from cm_train.core.errors import InputError
from cm_train.core.rng import Draws
from cm_train.data import augmentation
from cm_train.data.augmentation import NUM_LABELS, Augmentation, drawn
from cm_train.runs.config import parse

FIELDS = [field.name for field in dataclasses.fields(Augmentation)]


def change(count=1, **values):
    """What is not named happens to no image."""
    rows = {name: values.get(name, [0.0] * count) for name in FIELDS}
    return Augmentation(**{name: torch.tensor(row) for name, row in rows.items()})


def drawn_for(rows, seed=0, probability=0.4):
    return drawn(Draws(seed, 3, rows, torch.device("cpu")), probability)


# Made once by the public code (NVlabs/edm, training/augment.py), told to draw these numbers. All of the images agreed
# then to 5e-6, and labels to 2e-7; kept is each 61st value.
PUBLISHED = {
    "change": {
        "flip_x": [0.0, 1.0, 0.0, 1.0, 0.0, 1.0],
        "flip_y": [0.0, 0.0, 1.0, 0.0, 0.0, 1.0],
        "zoom": [0.0, 0.7, -1.3, 0.0, 0.4, 0.0],
        "turn": [0.0, 0.0, 0.0, 2.1, -0.6, 0.0],
        "stretch": [0.0, 0.0, 1.2, 0.0, -0.9, 0.0],
        "direction": [0.0, 0.0, 0.0, 0.0, 1.1, 0.0],
        "shift_x": [0.0, 0.0, 0.0, 0.5, -1.1, 0.0],
        "shift_y": [0.0, 0.0, 0.0, -0.3, 0.2, 0.0],
    },
    "images": [
        *(-0.332196, -0.21806, -0.71915, -1.585431, 0.027524, -0.159837, 0.253682, -0.134192, -1.054101, -1.187389),
        *(-0.38282, 0.290386, -1.015387, -1.061707, -1.660462, -0.442453, 1.049695, -0.059283, -1.415578),
    ],
    "labels": [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, -1.3, 0.0, 0.0, 1.2, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, -1.504846, 0.863209, 0.0, 0.0, 0.5, -0.3],
        [0.0, 0.0, 0.4, -0.174664, -0.564642, -0.408236, -0.802087, -1.1, 0.2],
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ],
}


def test_augmentation_does_what_the_public_code_does():
    published = change(**PUBLISHED["change"])
    images = published.applied(numbers(6, 3, 8, 8, key=7).float())
    torch.testing.assert_close(images.flatten()[::61], torch.tensor(PUBLISHED["images"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(published.labels(), torch.tensor(PUBLISHED["labels"]), rtol=0, atol=1e-6)


# Closed forms


@pytest.mark.parametrize("size", [7, 16])
def test_what_is_not_transformed_is_the_same_pixels(size):
    images = numbers(3, 1, size, size, key=1).float()
    assert torch.equal(change(3).applied(images), images)
    still = torch.eye(2).expand(3, 2, 2)  # through the filters too it is the same image, but for rounding
    torch.testing.assert_close(augmentation._moved(images, still, torch.zeros(3, 2)), images, rtol=0, atol=1e-5)


def test_a_shift_of_whole_pixels_moves_them_there_and_mirrors_the_edge():
    images = numbers(1, 2, 16, 16, key=2).float()
    moved = change(shift_x=[1.0], shift_y=[-0.5]).applied(images)  # an eighth of 16 pixels to the right, a 16th up
    wider = torch.nn.functional.pad(images, [2, 2, 2, 2], mode="reflect")
    torch.testing.assert_close(moved, wider[:, :, 3:19, 0:16], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("turn", "quarters"), [(math.pi / 2, 1), (math.pi, 2), (-math.pi / 2, 3)])
def test_a_quarter_turn_is_one(turn, quarters):
    """The filter leans to one side, so that turned images are off by a part of a pixel: smooth ones nearly agree."""
    rows = torch.linspace(0, math.pi, 16)
    images = (torch.cos(rows)[:, None] + torch.sin(2 * rows)[None, :])[None, None]
    turned, expected = change(turn=[turn]).applied(images), images.rot90(quarters, (2, 3))
    assert (turned - expected).abs().max() < 0.1 < (turned - images).abs().max()


def test_zoom_and_stretch_grow_by_powers_of_two():
    side = torch.arange(32) - 15.5
    disc = torch.exp(-(side[:, None] ** 2 + side[None, :] ** 2) / 8)[None, None]

    def spread(image):
        """Standard deviation along x and y of brightness as mass, in pixels."""
        mass = image[0, 0] / image.sum()
        return [float((mass.sum(axis) * side**2).sum().sqrt()) for axis in (0, 1)]

    x, y = spread(disc)
    for values, (grown_x, grown_y) in (
        ({"zoom": [2.0]}, (2**0.4, 2**0.4)),
        ({"stretch": [2.0]}, (2**0.4, 2**-0.4)),
        ({"stretch": [2.0], "direction": [math.pi / 2]}, (2**-0.4, 2**0.4)),
    ):
        found_x, found_y = spread(change(**values).applied(disc))
        assert found_x / x == pytest.approx(grown_x, rel=0.02) and found_y / y == pytest.approx(grown_y, rel=0.02)


def test_flips_are_exact():
    images = numbers(2, 3, 5, 5, key=3).float()
    flipped = change(2, flip_x=[1.0, 0.0], flip_y=[0.0, 1.0]).applied(images)
    assert torch.equal(flipped[0], images[0].flip(2)) and torch.equal(flipped[1], images[1].flip(1))


# Draws


def test_each_transform_happens_as_often_as_it_should():
    count, probability = 4096, 0.4
    found = drawn_for(range(count), probability=probability)
    shares = {name: float((getattr(found, name) != 0).float().mean()) for name in FIELDS}
    expected = dict.fromkeys(FIELDS, probability) | {"flip_x": 0.5, "flip_y": 0.2, "direction": 0.2}
    for name, share in shares.items():
        assert share == pytest.approx(expected[name], abs=4 * math.sqrt(0.25 / count)), name
    zoom = found.zoom[found.zoom != 0]
    assert float(zoom.mean()) == pytest.approx(0, abs=0.1) and float(zoom.std()) == pytest.approx(1, abs=0.1)
    gates = torch.stack([getattr(found, name) != 0 for name in ("zoom", "turn", "stretch", "shift_x")]).double()
    assert (gates.corrcoef() - torch.eye(4)).abs().max() < 0.1  # each is decided by itself


def test_an_image_s_change_hangs_on_its_row_alone():
    images = numbers(70, 1, 8, 8, key=4).float()
    whole = drawn_for(range(70))
    part = drawn_for(range(30, 50))
    assert torch.equal(whole.labels()[30:50], part.labels())
    torch.testing.assert_close(whole.applied(images)[30:50], part.applied(images[30:50]), rtol=0, atol=1e-5)
    assert not torch.equal(whole.labels(), drawn_for(range(70), seed=1).labels())


# A teacher that learns augmented images

WORDS = [f"backbone.{key}={value}".replace(" ", "") for key, value in TINY.items()]
WORDS = ["mode=edm", "backbone=ddpmpp_cifar10", *WORDS, "objective.augment=0.5", f"backbone.augment_dim={NUM_LABELS}"]


def test_a_network_learns_what_it_is_told_of_augmentation_and_goes_on_bit_for_bit(build):  # noqa: F811
    whole = build(*WORDS, name="whole")
    objective, told = whole.objective, []
    batch = objective.draw(torch.zeros(4, 1, 8, 8), None, 0, range(4))
    assert torch.equal(batch.augment_labels, drawn(objective.draws(0, range(4), torch.device("cpu")), 0.5).labels())
    hook = objective.denoiser.backbone.embed_augment.register_forward_hook(lambda m, given, _: told.append(given[0]))
    before = objective.denoiser.backbone.embed_augment.weight.clone()
    run(whole)
    hook.remove()
    assert torch.cat(told).count_nonzero() > 0
    assert not torch.equal(objective.denoiser.backbone.embed_augment.weight, before)
    assert not run(build(*WORDS, name="parts", should_stop=after(3)))
    rest = build(*WORDS, name="parts")
    run(rest)
    assert_same(whole, rest)


def test_a_student_of_such_a_teacher_learns_plain_images(build):  # noqa: F811
    teacher = build(*WORDS, "steps=2", "save_every=2", name="teacher")
    run(teacher)
    words = ["mode=cd", *WORDS[1:-2], f"backbone.augment_dim={NUM_LABELS}", f"teacher={teacher.config.folder}"]
    student = build(*words, "steps=2", name="student")
    assert student.objective.draw(torch.zeros(4, 1, 8, 8), None, 0, range(4)).augment_labels is None
    assert run(student)


@pytest.mark.parametrize(
    "words", [["backbone=unet_xs"], ["backbone=ddpmpp_cifar10"], ["backbone=ddpmpp_cifar10", "backbone.augment_dim=4"]]
)
def test_augmentation_without_its_labels_is_one_line(composed, words):
    with pytest.raises(InputError, match="told of it by 9 numbers.*fix: backbone=ddpmpp_cifar10") as caught:
        parse(composed("mode=edm", "objective.augment=0.12", *words))
    assert "\n" not in str(caught.value)
