"""Networks of about equal operations at one budget: the table of docs/networks.md that practical settings follow.

    python scripts/networks.py --data ~/pictures --out networks

Each trains a diffusion model and distils it (cd), each with half of the network calls, and learns with all of them from
nothing (ict); rates and averages are what `auto` comes to. What is finished is kept: the same command goes on.

--data holds FashionMNIST/raw/*.gz and emoji64.zip; what is not there is left out.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from results import DATA, Data, Table, one_seed

from cm_train.evaluation.protocol import check_comparable

_SIZES = "backbone.channels=32", "backbone.channel_mult=[1,2,2]", "backbone.num_blocks=1"
NETWORKS = {
    "unet": ("backbone=auto",),
    "songunet (DDPM++)": ("backbone=ddpmpp_cifar10", *_SIZES),
    "songunet (NCSN++)": ("backbone=ncsnpp_cifar10", "backbone.fourier_scale=0.02", *_SIZES),
    "edm2": ("backbone=edm2_xs", "backbone.head_channels=32", "backbone.noise_embedding=positional", *_SIZES),
}
CALLS = 20e3
ATTENTION = {"fashion": 7, "emoji": 8}  # pixels a side, where `auto` has it too
SHOWN = ("kid", "fd", "precision", "recall", "coverage")


def variant(data: Data, network: str) -> Data:
    """A data set of results.py's with one of the networks."""
    attention = () if network == "unet" else (f"backbone.attention_resolutions=[{ATTENTION[data.name]}]",)
    name = f"{data.name}-{network.split()[-1].strip('()').replace('+', 'p').lower()}"
    keys = (*data.keys, *NETWORKS[network], *attention)
    return replace(data, name=name, keys=keys, calls=CALLS, seeds=(0,), with_teacher=("cd",), alone=("ict",))


def markdown(tables: dict[str, Table]) -> str:
    """A row a network, mode and number of steps."""
    rows, protocols = [], {}
    for network, table in tables.items():
        for mode in ("cd", "ict"):
            plan = json.loads((table.home / "plans" / f"{table.data.name}-{mode}" / "plan.json").read_text())["runs"][
                -1
            ]
            cost = f"{plan['flops']['call'] / 1e6:.0f} | {plan['parameters'] / 1e6:.2f}"
            for steps in (1, 2):
                result = table.result(mode, 0, steps)
                protocols[f"{network} {mode} {steps}"] = result.protocol
                cells = [f"{result.metrics[n].mean:.3g} ± {result.metrics[n].std or 0:.1g}" for n in SHOWN]
                rows.append(
                    f"| {network} | {cost} | `{mode}` | {steps} | {' | '.join(cells)} | {table.minutes(mode)} |"
                )
    check_comparable(protocols)
    head = f"| network | MFLOP a call | M parameters | mode | calls | {' | '.join(SHOWN)} | CPU minutes |"
    return "\n".join([head, "| --- " * (len(SHOWN) + 6) + "|", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data sets are (default: data)")
    parser.add_argument("--out", type=Path, default=Path("networks"), help="for runs and tables (default: networks)")
    parser.add_argument("--only", nargs="*", default=list(ATTENTION), help="some of the data sets")
    parser.add_argument("--jobs", type=int, default=2, help="trained at once, a thread each (default: 2)")
    args = parser.parse_args()
    source, out = args.data.expanduser().resolve(), args.out.expanduser().resolve()
    chosen = [data for data in DATA if data.name in args.only and data.name in ATTENTION]
    found = [data for data in chosen if (source / data.needs).exists()]
    tables = {data.name: {net: Table(variant(data, net), source, out) for net in NETWORKS} for data in found}
    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(one_seed, table, 0) for of in tables.values() for table in of.values()]:
            job.result()
    for name, of in tables.items():
        text = markdown(of)
        (out / f"{name}.md").write_text(text)
        print(f"{name}\n\n{text}")


if __name__ == "__main__":
    main()
