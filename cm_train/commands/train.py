"""cm-train: from a composed config to a trained run folder, or with -m to one a job."""

import sys

from ..core.signals import StopFlag


def main() -> None:
    with StopFlag() as stop:  # before all other imports: a signal is heeded from the first moment
        try:
            _main(stop)
        except KeyboardInterrupt:
            sys.exit(1)  # asked for twice


def _main(stop: StopFlag) -> None:
    from ..core import cli
    from ..runs.lifecycle import train
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
    cli.run("train", lambda cfg: train(cfg, stop))


if __name__ == "__main__":
    main()
