"""cm-train: from a composed config to a trained run folder, or with -m to one a job."""

import sys
from typing import TYPE_CHECKING

from ..core.errors import ExitCode
from ..core.signals import StopFlag, answered
from ..core.streams import hold_streams

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """The command; ends the process with its exit code."""
    hold_streams()  # what answers opens a pipe, which must not become stderr
    with StopFlag() as stop, answered():  # before all other imports: a signal is heeded from the first moment
        try:
            _main(stop)
        except KeyboardInterrupt:
            sys.exit(ExitCode.FAILED)  # asked for twice


def _main(stop: StopFlag) -> None:
    from ..core import cli
    from ..sweeps import leader as sweeps
    from ..sweeps.launchers import register as plugins
    from . import why

    cli.begin("train")
    if "--info=all" in sys.argv:
        from .info import lines

        cli.tell("\n".join([*lines(), ""]))
    plugins.register()
    if keys := why.take_keys():
        cli.run("train", lambda cfg: why.explain(cfg, keys))
    if sweeps.asked_for(sys.argv):
        sweeps.lead(stop)
    cli.run("train", lambda cfg: _train(cfg, stop))


def _train(cfg: "DictConfig", stop: StopFlag) -> ExitCode:
    from ..runs.config import Composed  # torch is imported from here on
    from ..runs.train import train

    return train(Composed.of(cfg), stop)


if __name__ == "__main__":
    main()
