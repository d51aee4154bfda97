"""Every mode at one budget of network calls, trained and measured: the tables of docs/results.md.

    python scripts/results.py --data ~/pictures --out results

A network call is one image's way through the network. What a training step costs in calls, `cm-train plan=true`
reckons from the operations of its forward and backward passes, target's and teacher's included. Modes that begin with a
diffusion model spend half of the budget on it. What is finished is kept: the same command goes on.

--data holds FashionMNIST/raw/*.gz and emoji64.zip; what is not there is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cm_train import generate, load_denoiser
from cm_train.data.pixels import grid, save_png
from cm_train.evaluation.protocol import check_comparable
from cm_train.evaluation.result import Result, read_result

WITH_TEACHER, FROM_NOTHING = ("cd", "scd", "sct", "ect"), ("ict", "ct")
STEPS = {"edm": (10,)}  # to sample in; (1, 2) elsewhere
SHOWN = ("kid", "fd", "precision", "recall", "coverage", "copies")


@dataclass(frozen=True)
class Data:
    """A data set of the table.

    Attributes:
        keys: what cm-train is told of it.
        calls: network calls that each mode may spend.
        num: images of each of the blocks that a number is of.
        with_teacher: modes that have a teacher of half of the calls; alone: those that have all of them.
    """

    name: str
    keys: tuple[str, ...]
    calls: float
    batch_size: int
    seeds: tuple[int, ...]
    num: int
    features: str
    needs: str = ""
    with_teacher: tuple[str, ...] = WITH_TEACHER
    alone: tuple[str, ...] = ("edm", *FROM_NOTHING)


DATA = (
    Data("digits", ("dataset=digits",), 0.4e6, 128, (0, 1, 2), 1797, "classifier"),
    Data(
        "fashion", ("dataset=fashion_mnist", "dataset.root={data}"), 50e3, 64, (0,), 1024, "classifier", "FashionMNIST"
    ),
    Data(
        "emoji",
        ("dataset=image_folder", "dataset.root={data}/emoji64.zip", "dataset.image_size=32"),
        40e3,
        32,
        (0,),
        1024,
        "efficientnet",
        "emoji64.zip",
    ),
)


class Table:
    """The runs and numbers of one data set."""

    def __init__(self, data: Data, source: Path, out: Path):
        self.data, self.home = data, out
        self._keys = [key.format(data=source) for key in data.keys]

    def steps(self, mode: str, calls: float) -> int:
        """Of training, that cost so many network calls."""
        plan = self.home / "plans" / f"{self.data.name}-{mode}"
        if not (plan / "plan.json").exists():
            self._train(mode, 100, 0, "plan=true", f"out={plan.resolve()}", name=f"{self.data.name}-{mode}-plan")
        flops = next(run for run in json.loads((plan / "plan.json").read_text())["runs"] if run["mode"] == mode)[
            "flops"
        ]
        return round(calls / (flops["step"] / flops["call"]))

    def train(self, mode: str, seed: int, share: float = 1.0, teacher: str | None = None, name: str = "") -> None:
        """One run to its end; `train.json` beside it says what it took."""
        name = name or f"{self.data.name}-{mode}-{seed}"
        done = self.home / "times" / f"{name}.json"
        if done.exists():
            return
        steps = self.steps(mode, share * self.data.calls)
        began = time.monotonic()
        extra = [] if teacher is None else [f"teacher=runs/{teacher}"]
        cpu_s = self._train(mode, steps, seed, *extra, name=name)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps({"steps": steps, "wall_s": time.monotonic() - began, "cpu_s": cpu_s}))

    def evaluate(self, mode: str, seed: int) -> None:
        """Its numbers, in one step and in two."""
        for steps in STEPS.get(mode, (1, 2)):
            keys = [f"num={self.data.num}", f"features={self.data.features}", f"steps={steps}"]
            out = f"evaluations/{self.data.name}-{mode}-{seed}-{steps}"
            _run(self.home, "evaluate", f"runs/{self.data.name}-{mode}-{seed}", *keys, f"out={out}")

    def result(self, mode: str, seed: int, steps: int) -> Result:
        """What `evaluate` found."""
        return read_result(self.home / "evaluations" / f"{self.data.name}-{mode}-{seed}-{steps}" / "eval.json")

    def _train(self, mode: str, steps: int, seed: int, *extra: str, name: str) -> float:
        keys = [f"mode={mode}", f"steps={steps}", f"seed={seed}", f"name={name}", f"batch_size={self.data.batch_size}"]
        return _run(self.home, "train", *keys, *self._keys, *extra, "tracking=none", "preview_every=0", "devices=1")

    def markdown(self) -> str:
        """The table: a row a mode and number of steps, with the deviation over training seeds, or over blocks."""
        rows = [(mode, steps) for mode in ("edm", *WITH_TEACHER, *FROM_NOTHING) for steps in STEPS.get(mode, (1, 2))]
        found = {row: [self.result(row[0], seed, row[1]) for seed in self.data.seeds] for row in rows}
        every = {f"{row} {i}": result for row, results in found.items() for i, result in enumerate(results)}
        check_comparable({name: result.protocol for name, result in every.items()})
        first = next(iter(every.values()))
        names = [name for name in SHOWN if name in first.metrics]
        lines = [f"| mode | calls | {' | '.join(names)} | CPU minutes |", "| --- " * (len(names) + 3) + "|"]
        for (mode, _), results in found.items():
            calls = getattr(results[0].protocol.of, "network_calls", 0)
            cells = [_cell(results, name) for name in names]
            lines.append(f"| `{mode}` | {calls} | {' | '.join(cells)} | {self.minutes(mode)} |")
        if first.real:
            cells = [f"{first.real[name]:.3g}" if name in first.real else "" for name in names]
            lines.append(f"| *held-out pictures* | | {' | '.join(cells)} | |")
        return "\n".join(lines) + "\n"

    def minutes(self, mode: str) -> str:
        parts = [f"{self.data.name}-{mode}-{seed}" for seed in self.data.seeds]
        parts += [f"{self.data.name}-teacher-{seed}" for seed in self.data.seeds] if mode in WITH_TEACHER else []
        took = [json.loads((self.home / "times" / f"{name}.json").read_text())["cpu_s"] for name in parts]
        return f"{sum(took) / 60 / len(self.data.seeds):.1f}"

    def picture(self, path: Path) -> None:
        """The same seeds in rows: the diffusion model, then each mode in one step and in two."""
        rows = []
        for mode in ("edm", *WITH_TEACHER, *FROM_NOTHING):
            denoiser = load_denoiser(self.home / "runs" / f"{self.data.name}-{mode}-{self.data.seeds[0]}")
            rows += [generate(denoiser, 16, steps=steps) for steps in STEPS.get(mode, (1, 2))]
        save_png(grid(torch.cat(rows), columns=16), path)


def _cell(found: list[Result], name: str) -> str:
    numbers = [result.metrics[name] for result in found]
    if len(numbers) == 1:
        return f"{numbers[0].mean:.3g} ± {numbers[0].std or 0:.1g}"
    means = [number.mean for number in numbers]
    return f"{statistics.fmean(means):.3g} ± {statistics.stdev(means):.1g}"


def _run(home: Path, command: str, *arguments: str) -> float:
    """One of our commands, with one thread: two of them are quicker than one on two cores. Returns its CPU seconds."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    argv = [sys.executable, "-m", f"cm_train.commands.{command}", "--quiet", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(argv, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(argv[2:])}: {said.read().strip()}")
    return usage.ru_utime + usage.ru_stime


def one_seed(table: Table, seed: int) -> None:
    """All modes of a seed, one after the other: whoever follows a teacher comes after it."""
    teacher = f"{table.data.name}-teacher-{seed}"
    table.train("edm", seed, share=0.5, name=teacher)
    for mode in table.data.with_teacher:
        table.train(mode, seed, share=0.5, teacher=teacher)
        table.evaluate(mode, seed)
    for mode in table.data.alone:
        table.train(mode, seed)
        table.evaluate(mode, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data sets are (default: data)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="for runs, numbers, tables (default: results)"
    )
    parser.add_argument("--only", nargs="*", default=[data.name for data in DATA], help="some of the data sets")
    parser.add_argument("--jobs", type=int, default=2, help="trained at once, a thread each (default: 2)")
    args = parser.parse_args()
    source, out = args.data.expanduser().resolve(), args.out.expanduser().resolve()
    tables = [Table(data, source, out) for data in DATA if data.name in args.only and (source / data.needs).exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one_seed, table, seed) for table in tables for seed in table.data.seeds]
        for job in jobs:
            job.result()
    for table in tables:
        text = table.markdown()
        (out / f"{table.data.name}.md").write_text(text)
        table.picture(out / f"{table.data.name}.png")
        print(f"{table.data.name}\n\n{text}")


if __name__ == "__main__":
    main()
