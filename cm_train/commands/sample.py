"""cm-sample: images from a checkpoint."""

import sys

from ..core.errors import ExitCode
from ..core.signals import StopFlag


def main() -> None:
    """The command; ends the process with its exit code."""
    with StopFlag() as stop:  # before all other imports: a signal is heeded from the first moment
        try:
            from ..core import cli

            cli.begin("sample", plain="ckpt")
            from .draw import sample

            cli.run("sample", lambda cfg: sample(cfg, stop))
        except KeyboardInterrupt:
            sys.exit(ExitCode.FAILED)  # asked for twice


if __name__ == "__main__":
    main()
