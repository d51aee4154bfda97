"""Find out whether cm_train is right, fast and good on the GPU at hand; one command, one table.

    python scripts/gpu_check.py                      all three parts, 150 s each at most
    python scripts/gpu_check.py --part correct       losses, bits, precision, resume, sampling: beside the CPU's
    python scripts/gpu_check.py --part bench         what a step costs, compiled and not
    python scripts/gpu_check.py --part quality       a diffusion model and two students of it, with pictures
    python scripts/gpu_check.py --full               no deadline, and the larger networks too: an hour or so
    python scripts/gpu_check.py --cpu                the same small on a CPU, to see that the script works

Each row is printed and stored in gpu_check.json as soon as it is there. What there was no time for, or what this
machine lacks, is a skipped row that says so. Exit code 0 where no row failed, else 1. Needs no network.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PARTS = ("correct", "bench", "quality")
PART_S = 150.0


def _machine(gpu: bool) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(0) if gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this one (default: all)")
    parser.add_argument(
        "--only", default="*", metavar="NAME", help="only rows of that name; * and ? stand for anything"
    )
    parser.add_argument("--seconds", type=float, default=PART_S, help="for each part (default: %(default).0f)")
    parser.add_argument("--full", action="store_true", help="everything, however long it takes")
    parser.add_argument("--cpu", action="store_true", help="a small version, on the CPU, without the compiler")
    parser.add_argument("--compile", action="store_true", help="with --cpu: with the compiler (minutes)")
    parser.add_argument("--data", type=Path, help="a folder with MNIST, for the quality part (default: digits)")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder for gpu_check.json and pictures (default: here)"
    )
    args = parser.parse_args()
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from cm_train.core.terminal import silence

    silence()
    if args.cpu:
        torch.set_num_threads(1)  # the networks are too small to share
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU here; --cpu tries the script on a CPU")
    from gpu_checks import correct, quality, speed
    from gpu_checks.table import Scale, Table

    checks = {"correct": correct.rows, "bench": speed.rows, "quality": quality.rows}
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(args.out, args.only, _machine(not args.cpu))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as home:
        for part in PARTS if args.part is None else (args.part,):
            folder = Path(home) / part
            folder.mkdir()
            scale = Scale(not args.cpu, not args.cpu or args.compile, args.full, folder, args.out, args.data)
            with table.part(part, None if args.full else args.seconds):
                checks[part](table, scale)
    made = sum(row["ok"] for row in table.rows)
    skipped = sum("skipped" in row for row in table.rows)
    print(f"{made} ok, {len(table.rows) - made - skipped} failed, {skipped} skipped; {args.out / 'gpu_check.json'}")
    sys.exit(table.failed)


if __name__ == "__main__":
    main()
