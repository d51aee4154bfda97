"""cm-train: from a composed config to a trained run folder, or with -m to one a job."""

import sys

from . import cli, plugins, sweeps
from .runs import train
from .signals import StopFlag


def main() -> None:
    if "--info" in sys.argv:
        from .info import lines

        print(*lines(), sep="\n", end="\n\n")
    with StopFlag() as stop:  # before the heavy imports: a signal is heeded from the first moment
        plugins.register()
        if sweeps.asked_for(sys.argv):
            sweeps.lead(stop)
        cli.run("train", lambda cfg: train(cfg, stop))


if __name__ == "__main__":
    main()
