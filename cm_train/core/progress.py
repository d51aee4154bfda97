"""How far a long job is: a live bar on a terminal, a plain line every few seconds elsewhere."""

import contextlib
import sys
import time
from typing import Any, Self

from .launched import is_follower
from .terminal import duration, has_cursor, is_quiet, is_shared, live_bars, part, put

EVERY_S = 10.0  # between two lines where there is no terminal
_BAR_AFTER_S = 0.5  # a job that is over before that shows no bar


class Progress:
    """As a context: what is on the terminal while a job runs. Only rank 0 shows anything, and nobody where quiet.

    Args:
        total: how much there is to do; None where nobody knows.
        what: a word or two for it.
        start: how much is done already.
        leads: whether it is what the command is for: shown from the first moment to the last, the bar left standing,
            with the part of the command that it is (`terminal.begin_part`). Any other job that is over soon shows
            nothing.
        phase: a word for what is being done, in the place of `what` on a bar; `call` changes it.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        start: int = 0,
        leads: bool = False,
        every_s: float | None = None,
        phase: str | None = None,
    ):
        self.total, self.done = total, start
        self._what, self._start, self._leads = what, start, leads
        self._phase, self._part = what if phase is None else phase, part() if leads else ""
        self._every_s = EVERY_S if every_s is None else every_s
        self._bar: Any = None
        self._stream = sys.stderr  # as it is now: torchvision's chatter is redirected while it downloads
        # Told by the environment: data are prepared before the ranks have met.
        self._silent = is_quiet() or is_follower()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._due = self._began + (0.0 if self._leads else self._every_s)
        if not self._silent:
            from rich.console import Console

            self._console = Console(file=self._stream)
            # Beside other jobs' lines a bar would be torn.
            self._can_move = has_cursor(self._stream) and self._console.is_interactive and not is_shared()
            if self._leads:
                self._start_bar()
        return self

    def _start_bar(self) -> None:
        if not self._can_move:
            return
        self._can_move = False  # whether this one works or not
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
        from rich.table import Column
        from rich.text import Text

        def whole() -> Column:  # where a terminal is narrow the bar gets shorter, and nothing else
            return Column(no_wrap=True)

        class Left(TimeRemainingColumn):
            """Counts down to what `update` was told; the bar's own guess until then."""

            def render(self, task: Task) -> Text:
                ends_at = task.fields["ends_at"]
                if ends_at is None:
                    return super().render(task)
                return Text(duration(max(0.0, ends_at - time.monotonic())), style="progress.remaining")

        bar = Progress(
            TextColumn("{task.description}", table_column=whole()),
            MofNCompleteColumn(table_column=whole()),
            *([TextColumn(self._part, table_column=whole())] if self._part else []),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            *([] if self.total is None else [Left(table_column=whole()), TextColumn("left")]),
            console=self._console,
            refresh_per_second=4,
            transient=not self._leads,
            redirect_stdout=self._leads,
            redirect_stderr=self._leads,
        )
        self._task = bar.add_task(self._phase, total=self.total, completed=self.done, shown="", ends_at=None)
        with contextlib.suppress(OSError):
            bar.start()
            live_bars.append(bar)
            self._bar = bar

    def move(self, done: int) -> None:
        """`done` of the total are done: moves a bar, writes no line."""
        self.done = done
        if self._bar is None and not self._silent and time.monotonic() - self._began > _BAR_AFTER_S:
            self._start_bar()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def call(self, phase: str) -> None:
        """Say what is being done now, where there is a bar."""
        self._phase = phase
        if self._bar is not None:
            self._bar.update(self._task, description=phase)

    def update(self, done: int, shown: str = "", left_s: float | None = None) -> None:
        """`done` of the total are done.

        Args:
            shown: what to say beside that.
            left_s: how long the rest takes, where that is known better than from the pace so far.
        """
        self.move(done)
        if self._silent:
            return
        if self._bar is not None:
            ends_at = None if left_s is None else time.monotonic() + left_s
            self._bar.update(self._task, shown=shown, ends_at=ends_at)
            return
        now, at_end = time.monotonic(), self._leads and done == self.total
        if now < self._due and not at_end:
            return
        self._due = now + self._every_s
        if left_s is None and self.total is not None and done > self._start:
            left_s = (now - self._began) * (self.total - done) / (done - self._start)
        share = f"{done}" if self.total is None else f"{done}/{self.total}"
        left = "" if left_s is None else f"{duration(left_s)} left"
        name = " ".join(filter(None, [self._what, share, self._part]))
        put("  ".join(filter(None, [name, shown, left])), self._console)

    def advance(self, by: int = 1) -> None:
        """`by` more are done."""
        self.update(self.done + by)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            live_bars.remove(self._bar)
            with contextlib.suppress(OSError, SystemExit):
                self._bar.stop()
            self._bar = None


def progress(total: int | None, what: str) -> Progress:
    """The context for a job beside training; its `advance` or `update` says how far it is."""
    return Progress(total, what)
