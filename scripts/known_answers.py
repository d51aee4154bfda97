"""What the metrics say of images whose faults are known: whether they can be trusted on your pictures.

    python scripts/known_answers.py photos.zip --image-size 32
    python scripts/known_answers.py digits --features classifier

The real images are halved. One half is the reference, the other stands for a model: as it is, then with slight noise,
with a 3x3 blur, as thirty images repeated, and as a normal distribution with the pixels' mean and covariance; last come
copies of the reference itself. A quarter of the other half is held out, for memorisation.
"""

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cm_train.core import registry
from cm_train.core.rng import permutation
from cm_train.data.datasets.base import Dataset
from cm_train.data.datasets.in_memory import InMemory
from cm_train.data.pixels import to_uint8, to_unit_range
from cm_train.evaluation import measure
from cm_train.evaluation.comparison import Comparison, chosen_features, compare_with
from cm_train.evaluation.result import Number
from cm_train.evaluation.seen import look
from cm_train.evaluation.sources import Statistics, real_images

METRICS = ("kid", "fd", "is", "pr", "density", "memorisation")
NOISE_STD = 0.1  # on [-1, 1]: 13 grey levels
REPEATED = 30


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def faulty(images: Tensor, training: Tensor) -> dict[str, Tensor]:
    """Sets of images [N, C, S, S], uint8, by what is wrong with them; the first has nothing wrong."""
    x = to_unit_range(images)
    channels = x.shape[1]
    box = torch.full((channels, 1, 3, 3), 1 / 9)
    flat = x.flatten(1).double()
    centred = (flat - flat.mean(0)) / (len(flat) - 1) ** 0.5
    moments = flat.mean(0) + normal(len(flat), len(flat)).double() @ centred
    return {
        "other real images": images,
        "slight noise": to_uint8(x + NOISE_STD * normal(*x.shape)),
        "3x3 blur": to_uint8(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), box, groups=channels)),
        "thirty images repeated": images[torch.arange(len(images)) % REPEATED],
        "normal, their moments": to_uint8(moments.float().view_as(x)),
        "copies of the reference": training[: len(images)],
    }


def halves(dataset: Dataset) -> tuple[InMemory, Tensor, InMemory]:
    """The reference, images that stand for a model's, and held-out ones; always the same."""
    order = permutation(0, "known answers", 0, len(dataset))
    images, labels = dataset.gather(order)
    half, quarter = len(order) // 2, len(order) // 8

    def part(rows: slice) -> InMemory:
        return InMemory(images[rows], None if labels is None else labels[rows], dataset.class_names)

    return part(slice(half)), images[half + quarter :], part(slice(half, half + quarter))


def known_answers(dataset: Dataset, features: str = "auto") -> tuple[Comparison, dict[str, dict[str, Number]]]:
    """The metrics of each set of `faulty`, with spread."""
    reference, images, held_out = halves(dataset)
    config = chosen_features({"name": features}, dataset.channels, dataset.num_classes > 0)
    metrics = [registry.settings("metric", {"name": name}) for name in METRICS]
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    comparison = compare_with(reference, "half of the real images", config, metrics, shape, held_out)
    found = {}
    for what, some in faulty(images, reference.images).items():
        seen = look(comparison.extractor, [some])
        good, _ = measure.usable(comparison.metrics, seen, comparison.real)
        found[what] = measure.over_halves(good, seen, comparison.real)
    return comparison, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="a data set's name, or a folder or .zip of pictures")
    parser.add_argument("--image-size", type=int, default=32, help="what pictures are scaled to (default: 32)")
    parser.add_argument("--features", default="auto", help="what looks at them (default: auto)")
    args = parser.parse_args()
    dataset = real_images(args.reference, args.image_size, 3)
    if isinstance(dataset, Statistics):
        raise SystemExit("statistics have no images to spoil")
    comparison, found = known_answers(dataset, args.features)
    names = list(next(iter(found.values())))
    table = Table("", *names)
    for what, numbers in found.items():
        table.add_row(what, *(str(numbers[name]) for name in names))
    Console(width=None if Console().is_terminal else 160).print(table)
    print(f"features={comparison.features.name}, {comparison.reference.num:,} real images of {len(dataset):,}")


if __name__ == "__main__":
    main()
