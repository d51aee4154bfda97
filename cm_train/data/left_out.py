"""The files of a data set that can't be used, written down once, whichever process of a run meets them first."""

import threading
from contextlib import suppress
from pathlib import Path

from ..core.errors import printable
from ..core.files import not_through_a_link
from ..core.terminal import say

_MOST_SAID = 10


class LeftOut:
    """Names and reasons, as they are found; `path`, once it is set, is a file that all ranks of a run share."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._path: Path | None = None
        self._written: set[bytes] = set()  # names in the file, as far as it has been read
        self._read_to = self._said = 0
        self._lock = threading.Lock()

    def write_to(self, path: Path) -> None:
        """From here on, and what is known already, into a file: a line each, of name, tab and reason."""
        with self._lock:
            self._path = path
            known = self.reasons.copy()
        for name, reason in known.items():
            self._write(name, reason)

    def add(self, name: str, reason: str) -> bool:
        """Note a file. Returns whether nobody has before: neither this process nor, by the file, another one."""
        with self._lock:
            if name in self.reasons:
                return False
            self.reasons[name] = reason
        return self._write(name, reason)

    def __contains__(self, name: str) -> bool:
        return name in self.reasons

    def example(self) -> str:
        """A name and its reason; "" where there is none."""
        known = self.reasons.copy()  # since other threads may add to it
        return f"{min(known)!r} ({known[min(known)]})" if known else ""

    def all_in(self) -> str:
        """What to add to a line about some: where all are, once they are written down."""
        return f"; all are in {self._path}" if self._path else ""

    def say(self, name: str) -> None:
        """A line on the terminal for a file that another image stands in for; the first few of this process alone."""
        self._said += 1
        if self._said <= _MOST_SAID:
            rest = self.all_in() if self._said == _MOST_SAID else ""
            say(f"left out {name!r} ({self.reasons[name]}): another image stands in for it{rest}")

    def _write(self, name: str, reason: str) -> bool:
        if self._path is None:
            return True
        shown = "\\n".join(printable(name).split("\n")).replace("\t", "\\t").encode()
        line = shown + b"\t" + " ".join(printable(reason).split()).encode() + b"\n"
        path, opener = self._path, not_through_a_link
        # A full disk is no trouble: the list is no more than a help.
        with self._lock, suppress(OSError), open(path, "a+b", buffering=0, opener=opener) as file:
            file.seek(self._read_to)
            new = file.read()
            self._read_to += len(new)
            self._written.update(row.partition(b"\t")[0] for row in new.splitlines())
            if shown in self._written:
                return False
            file.write(line)
        return True
