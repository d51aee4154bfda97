"""How commands end: the exit codes, and the errors that become one line."""

import unicodedata
from enum import IntEnum


class ExitCode(IntEnum):
    """What a command, or a rank, ends with."""

    DONE = 0
    FAILED = 1  # training can't go on, or a mistake of ours
    WRONG_INPUT = 2  # the user's to mend
    STOPPED = 3  # by a signal or a limit of time, everything saved


def printable(text: str) -> str:
    """`text` with every character written out that a terminal would obey, or that can't be encoded."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(c: str) -> str:
    return c.encode("unicode_escape").decode() if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c


class InputError(ValueError):
    """What is wrong, what was got, what is allowed and how to fix it, in one line."""

    def __init__(self, what: str, got: object = None, allowed: str | None = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {got!r}" if isinstance(got, str) else f"got {got}")
        if allowed:
            parts.append(f"allowed: {allowed}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(" ".join(printable(part).split()) for part in parts))


class TrainingFailed(RuntimeError):
    """Training can't go on, and the message says all there is to say: why, what is kept, what to do."""


class OutOfMemory(TrainingFailed):
    """Memory ran out: `doing` what, what was `needed`, and what would need less."""

    def __init__(self, doing: str, needed: str, fix: str):
        super().__init__(f"out of memory {doing}: {needed}; fix: {fix}")
