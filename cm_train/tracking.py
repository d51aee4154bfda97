"""What a run tells the world: metrics.jsonl, the terminal, and wandb; rank 0 only."""

import contextlib
import errno
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .registry import Settings


class TrackingConfig(Settings):
    """The `tracking` group."""

    backend: Literal["wandb", "none"] = "wandb"
    project: str = "cm_train"
    entity: str | None = None
    tags: list[str] = []
    group: str | None = None  # in a sweep its name, unless set


def say(text: str) -> None:
    """One line on the terminal; above the bar where one is live."""
    with contextlib.suppress(OSError, SystemExit):  # a full disk or a closed pipe behind stderr must not end a run
        console = _live[-1].console if _live else Console(stderr=True)
        console.print(text, highlight=False, markup=False, soft_wrap=True)


_live: list[Progress] = []


def _not_through_a_link(path: str, flags: int) -> int:
    """For `open`: a stranger's run folder must not lead outside of itself."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before, even after a power cut."""
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "wb", opener=_not_through_a_link) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, cut back to the resumed step when a run goes on."""

    def __init__(self, path: Path, step: int):
        kept = b"".join(self._lines_until(path, step)) if path.exists() else b""
        if not path.exists() or path.read_bytes() != kept:
            write_whole(path, kept)
        self._file = open(path, "ab", buffering=0, opener=_not_through_a_link)  # noqa: SIM115 - open as long as the run
        self._lock = threading.Lock()
        self._waiting = b""  # lines that a full disk did not take yet

    @staticmethod
    def _lines_until(path: Path, step: int) -> list[bytes]:
        lines = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break  # torn by a crash; whatever follows is later than any checkpoint
            lines.append(line)
        return lines

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line, whole or not yet. Raises OSError on a full disk; the next call tries again."""
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._waiting += line
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            size = self._file.seek(0, os.SEEK_END)
            try:
                if self._waiting and self._file.write(self._waiting) != len(self._waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting = b""
            except OSError:
                self._file.truncate(size)
                raise

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that counts on them appears; from any thread."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Wandb:
    """wandb in a thread of its own, so that no call of it ever blocks training or asks a question.

    Online where a login exists and the network answers, offline otherwise.
    """

    def __init__(self, config: TrackingConfig, folder: Path, name: str, run_config: dict[str, Any]):
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._args = config, folder, name, run_config
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any]) -> None:
        self._queue.put(("scalars", dict(values)))

    def image(self, name: str, path: Path, step: int) -> None:
        self._queue.put(("image", (name, path, step)))

    def close(self, patience_s: float = 30.0) -> None:
        """Finish what is queued; give up after `patience_s`."""
        self._queue.put(None)
        self._thread.join(patience_s)

    def _work(self) -> None:
        try:
            run = self._start(*self._args)
        except Exception as error:  # tracking must never end a run
            say(f"wandb is off: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            run = None
        while (item := self._queue.get()) is not None:
            kind, payload = item
            if run is None:
                continue
            try:
                import wandb

                if kind == "scalars":
                    run.log(payload, step=payload["step"])
                else:
                    image, path, step = payload
                    run.log({image: wandb.Image(str(path))}, step=step)
            except Exception as error:
                say(f"wandb: {type(error).__name__}: {error}")
        if run is not None:
            run.finish()

    @staticmethod
    def _start(config: TrackingConfig, folder: Path, name: str, run_config: dict[str, Any]) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None:
            try:
                mode = "online" if wandb.login(prompt=False, verify=True) else "offline"
            except Exception:
                mode = "offline"
        # The same id at every start of this run folder, so that a resumed run's curves go on.
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        return wandb.init(
            project=config.project,
            entity=config.entity,
            tags=config.tags or None,
            group=config.group,
            name=name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=run_config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )


class Terminal:
    """A live bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, total: int, start: int, every_s: float = 10.0):
        self._total, self._step, self._every_s = total, start, every_s
        self._console = Console(stderr=True)
        self._shown = self._last_line = ""
        self._due = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task: TaskID = self._bar.add_task("train", total=total, completed=start, shown="")
            self._bar.start()
            _live.append(self._bar)

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def values(self, values: Mapping[str, Any]) -> None:
        """Newly logged values."""
        loss = values.get("loss")
        parts = ["loss -" if loss is None else f"loss {loss:.4g}", f"{values['images_per_s']:.0f} images/s"]
        if values.get("skipped", 0) > 0:
            parts.append(f"{values['skipped']:.0f} skipped")
        self._shown = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, shown=self._shown)
        elif time.monotonic() >= self._due or self._step == self._total:
            self._due = time.monotonic() + self._every_s
            left = (self._total - self._step) / max(values["steps_per_s"], 1e-9)
            say(f"step {self._step}/{self._total}  {self._shown}  {_duration(left)} left")

    def close(self) -> None:
        if self._bar is not None:
            _live.remove(self._bar)
            with contextlib.suppress(OSError, SystemExit):
                self._bar.stop()

    @property
    def at_end(self) -> bool:
        """Whether the last step is done."""
        return self._step >= self._total


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class SilentTracker:
    """What ranks other than 0 have in a Tracker's place."""

    def step(self, step: int) -> None:
        pass

    def log(self, values: Mapping[str, float | None], picture: Path | None = None) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> "SilentTracker":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Tracker(SilentTracker):
    """All three together, as a context.

    Args:
        folder: the run folder; step: the step that the run starts from; total: the step it ends at.
    """

    def __init__(
        self, config: TrackingConfig, folder: Path, name: str, run_config: dict[str, Any], step: int, total: int
    ):
        self._terminal = Terminal(total, step)
        self._metrics = MetricsFile(folder / "metrics.jsonl", step)
        self._wandb = Wandb(config, folder, name, run_config) if config.backend == "wandb" else None

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._terminal.step(step)

    def log(self, values: Mapping[str, float | None], picture: Path | None = None) -> None:
        """The one line of metrics of a step, and the preview made at it.

        Args:
            values: at least step, loss, images_per_s and steps_per_s; None where nothing finite was seen.
        """
        try:
            self._metrics.write(values)
        except OSError as error:  # a full disk must not end a run; the checkpoint will say so too
            say(f"could not write metrics of step {values['step']}: {error.strerror}")
        self._terminal.values(values)
        if self._wandb is not None:
            self._wandb.log(values)
            if picture is not None:
                self._wandb.image("samples", picture, int(values["step"] or 0))

    def sync(self) -> None:
        """Force metrics.jsonl to the disk. Raises OSError where that fails."""
        self._metrics.sync()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.close()
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.close(30.0 if self._terminal.at_end else 5.0)  # who stops early is in a hurry
