"""cm-convert: somebody else's weights as a checkpoint of ours."""

import sys

from ..core.errors import ExitCode
from ..core.signals import StopFlag


def main() -> None:
    """The command; ends the process with its exit code."""
    with StopFlag():  # before all other imports: a signal is heeded from the first moment
        try:
            from ..core import cli

            cli.begin("convert", plain="src")
            from .conversion import convert

            cli.run("convert", convert)
        except KeyboardInterrupt:
            sys.exit(ExitCode.FAILED)  # asked for twice


if __name__ == "__main__":
    main()
