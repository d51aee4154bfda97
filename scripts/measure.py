"""Quality of runs on a small labelled data set, against their diffusion teacher and against the originals.

    python scripts/measure.py --teacher runs/digits-edm runs/digits-cd runs/digits-ict

For each run: same-seed agreement of its one-step images with the teacher's Heun images (root mean square of the pixel
difference on [-1, 1], pixel spread relative to the teacher's, how often a classifier of the originals gives both the
same label), and the Fréchet distance to the originals on that classifier's features, at one and two steps. Beside them
the same distance for the teacher, for held-out originals' classifier accuracy and for a Gaussian with the originals'
mean and covariance: a model no better than that has learnt two moments.

--picture FILE.png shows the same 16 seeds in rows: the teacher, then each run in one step and in two.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from cm_train import generate, load_denoiser
from cm_train.core import registry
from cm_train.data.pixels import grid, save_png, to_uint8, to_unit_range
from cm_train.evaluation.features.small_classifier import train_classifier
from cm_train.evaluation.metrics.agreement import agreement
from cm_train.evaluation.metrics.frechet import frechet_distance


def originals(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = registry.make("dataset", {"name": name, "split": split, "conditional": True})
    images, labels = dataset.gather(torch.arange(len(dataset)))
    return images, labels


def matched_gaussian(images: torch.Tensor, count: int) -> torch.Tensor:
    """Images drawn from the normal distribution with the pixels' mean and covariance."""
    x = to_unit_range(images).flatten(1).double()
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    normal = torch.randn(count, len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return to_uint8((x.mean(0) + normal @ centred).float()).view(-1, *images.shape[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run or checkpoint folders of consistency models")
    parser.add_argument("--teacher", required=True, help="the diffusion run to compare with")
    parser.add_argument("--dataset", default="digits", help="a data set with labels (default: digits)")
    parser.add_argument("--num", type=int, default=512, help="seeds to compare (default: 512)")
    parser.add_argument("--frechet-num", type=int, default=1437, help="images a Fréchet distance (default: 1437)")
    parser.add_argument("--originals", type=int, help="how many to train the classifier on (default: all)")
    parser.add_argument("--epochs", type=int, default=30, help="of the classifier's training (default: 30)")
    parser.add_argument("--picture", help="write a grid of images to this PNG file")
    args = parser.parse_args()

    images, labels = (part[: args.originals] for part in originals(args.dataset, "train"))
    held_out, held_out_labels = originals(args.dataset, "test")
    classifier = train_classifier(images, labels, epochs=args.epochs)
    accuracy = (classifier.labels(held_out) == held_out_labels).float().mean().item()
    count = min(args.frechet_num, len(images))
    real = classifier.features(images[:count])

    def distance(generated: torch.Tensor) -> str:
        return f"{frechet_distance(classifier.features(generated), real):.0f}"

    seeds = range(max(args.num, count))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = generate(load_denoiser(args.teacher, device=device), seeds, sampler="heun", steps=40)
    table = Table("model", "rms", "same label", "std ratio", "Fréchet 1 step", "2 steps")
    table.add_row(
        "originals, resampled",
        "",
        "",
        "",
        distance(images[torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(0))]),
        "",
    )
    table.add_row("Gaussian of their moments", "", "", "", distance(matched_gaussian(images, count)), "")
    table.add_row("teacher, Heun 40", "0", "1", "1", distance(teacher[:count]), "")
    rows = [teacher[:16]]
    for run in args.runs:
        denoiser = load_denoiser(run, device=device)
        one, two = (generate(denoiser, seeds, sampler="multistep", steps=steps) for steps in (1, 2))
        rows += [one[:16], two[:16]]
        measured = agreement(one[: args.num], teacher[: args.num])
        same = classifier.labels(one[: args.num]) == classifier.labels(teacher[: args.num])
        table.add_row(
            run,
            f"{measured.rms:.3f}",
            f"{same.float().mean().item():.3f}",
            f"{measured.std_ratio:.3f}",
            distance(one[:count]),
            distance(two[:count]),
        )
    if args.picture:
        save_png(grid(torch.cat(rows), columns=16), args.picture)
    Console(width=110).print(table)
    print(
        f"classifier: {accuracy:.3f} right on held-out originals; {args.num} seeds compared, {count} images a distance"
    )


if __name__ == "__main__":
    main()
