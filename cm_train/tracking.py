"""What a run tells the world: metrics.jsonl, the terminal, and wandb; rank 0 only."""

import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
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


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, cut back to the resumed step when a run goes on."""

    def __init__(self, path: Path, step: int):
        kept = b"".join(self._lines_until(path, step)) if path.exists() else b""
        beside = path.with_suffix(".tmp")
        beside.write_bytes(kept)
        os.replace(beside, path)
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as the run

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
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that counts on them appears."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Wandb:
    """wandb in a thread of its own, so that no call of it ever blocks training or asks a question.

    Online where a login exists and the network answers, offline otherwise.
    """

    def __init__(self, config: TrackingConfig, folder: Path, name: str, run_config: dict, say: Callable[[str], None]):
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._args = config, folder, name, run_config, say
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
        config, folder, name, run_config, say = self._args
        try:
            run = self._start(config, folder, name, run_config, say)
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
    def _start(config: TrackingConfig, folder: Path, name: str, run_config: dict, say: Callable[[str], None]) -> Any:
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

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def values(self, values: Mapping[str, float]) -> None:
        """Newly logged values."""
        parts = [f"loss {values['loss']:.4g}", f"{values['images_per_s']:.0f} images/s"]
        if values.get("skipped"):
            parts.append(f"{values['skipped']:.0f} skipped")
        self._shown = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, shown=self._shown)
        elif time.monotonic() >= self._due or self._step == self._total:
            self._due = time.monotonic() + self._every_s
            left = (self._total - self._step) / max(values["steps_per_s"], 1e-9)
            self.say(f"step {self._step}/{self._total}  {self._shown}  {_duration(left)} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        (self._bar.console if self._bar is not None else self._console).print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Tracker:
    """All three together.

    Args:
        folder: the run folder; step: the step that the run starts from; total: the step it ends at.
    """

    def __init__(
        self, config: TrackingConfig, folder: Path, name: str, run_config: dict[str, Any], step: int, total: int
    ):
        self.terminal = Terminal(total, step)
        self.metrics = MetricsFile(folder / "metrics.jsonl", step)
        self.wandb = None
        if config.backend == "wandb":
            self.wandb = Wandb(config, folder, name, run_config, self.terminal.say)

    def log(self, values: Mapping[str, float]) -> None:
        """One line of metrics; `values` holds at least step, loss, images_per_s and steps_per_s."""
        self.metrics.write(values)
        self.terminal.values(values)
        if self.wandb is not None:
            self.wandb.log(values)

    def preview(self, step: int, path: Path, values: Mapping[str, float]) -> None:
        """A picture made at `step`, and what was measured on it."""
        if values:
            self.metrics.write({"step": step, **values})
        if self.wandb is not None:
            self.wandb.image("samples", path, step)
            if values:
                self.wandb.log({"step": step, **values})

    def close(self) -> None:
        self.terminal.close()
        self.metrics.close()
        if self.wandb is not None:
            self.wandb.close()


def warn(text: str) -> None:
    """One line on the terminal, before or beside any bar."""
    print(text, file=sys.stderr, flush=True)
