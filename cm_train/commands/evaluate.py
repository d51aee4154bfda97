"""cm-eval: how good a model's images are, with the protocol that makes the number mean something."""

import sys

from ..core.errors import ExitCode
from ..core.signals import StopFlag


def main() -> None:
    """The command; ends the process with its exit code."""
    with StopFlag():  # before all other imports: a signal is heeded from the first moment
        try:
            from ..core import cli

            cli.begin("eval", plain="ckpt...")
            from .evaluation import evaluate

            cli.run("eval", evaluate)
        except KeyboardInterrupt:
            sys.exit(ExitCode.FAILED)  # asked for twice


if __name__ == "__main__":
    main()
