"""stdin, stdout and stderr as a command may find them: closed, full, or without letters for what it says."""

import io
import os
import sys


def hold_streams() -> None:
    """Where this process was started without a stderr (2>&-), nothing else that is opened may become it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: letters that it has not are no reason to fail


def give_up_stdout() -> None:
    """What it can't take any more shall not be tried again at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
