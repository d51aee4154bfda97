"""wandb: online where a login exists and the network answers, offline in the run folder otherwise."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...core.files import read_small, write_whole
from ...core.terminal import say
from .base import Backend
from .config import TrackingConfig

UPLOAD_S = 600.0  # patience at the end of a run where a model is to be uploaded


class Wandb(Backend):
    """A run of wandb, which never asks a question.

    Args:
        folder: the run folder; name: of the run; run_config: what to show beside the curves.
    """

    name = "wandb"

    def __init__(self, config: TrackingConfig, folder: Path, name: str, run_config: dict[str, Any]):
        self._config, self._folder, self._run_config = config, folder, run_config
        self._name = _display_name(name, run_config)
        self._files = os.environ.get("WANDB_DIR") or str(folder)
        super().__init__()

    def _open(self) -> None:
        self._run = self._start()
        # Runs of different batch sizes are compared by what they have seen; step is there to be chosen too.
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")
        self.rest = f"wandb sync {self._files}/wandb/*run-*-{self._run.id} sends the rest"

    def _log(self, values: Mapping[str, Any]) -> None:
        self._run.log(values, step=values["step"])

    def _image(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=step)

    def model(self, name: str, files: Mapping[str, Path | str]) -> None:
        if self._config.artifact:
            self.patience_s = max(self.patience_s, UPLOAD_S)
            self._queue.put(lambda: self._model(name, files))

    def _model(self, name: str, files: Mapping[str, Path | str]) -> None:
        import wandb

        artifact = wandb.Artifact("".join(c if c.isalnum() or c in "-_." else "-" for c in name), type="model")
        for target, content in files.items():
            if isinstance(content, Path):  # uploaded from where it lies, without wandb's own copies
                artifact.add_file(str(content.resolve()), target, policy="immutable", skip_cache=True)
            else:
                with artifact.new_file(target) as file:
                    file.write(content)
        if not self._run.offline:
            say(f"uploading the model to wandb, for {UPLOAD_S / 60:.0f} minutes at most")
        self._run.log_artifact(artifact)

    def _finish(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # it reads the environment once, and the next run of this process may have another one

    def _start(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        # Its reports about itself write on the terminal, and hold up the exit where the network hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for variable in [v for v in os.environ if v.startswith("WANDB_") and not os.environ[v]]:
            del os.environ[variable]  # `export WANDB_RUN_ID=` is meant to say nothing, and wandb would refuse it
        import wandb

        try:
            mode: Any = wandb.setup().settings.mode  # by WANDB_MODE, or by `wandb offline` in this folder
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            variable = f"WANDB_{wrong['loc'][0]}".upper() if wrong["loc"] else "the environment"
            raise ValueError(f"{variable} is {wrong['input']!r}: {wrong['msg']}") from None
        if mode in (None, "online", "run"):
            mode = "offline"
            try:
                if wandb.login(prompt=False, verify=True):
                    return self._init("online")
            except Exception as error:  # there is a login, and it is refused or can't be used now
                self._complain("wandb is offline", error)
        return self._init(mode)

    def _init(self, mode: Any) -> Any:
        import wandb

        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=self._config.tags or None,
            name=self._name,
            job_type=os.environ.get("WANDB_JOB_TYPE") or self._run_config.get("mode"),
            id=identity(self._folder / "wandb_id"),
            resume="allow",
            dir=self._files,
            config=self._run_config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )


def _display_name(name: str, run_config: Mapping[str, Any]) -> str:
    """What wandb calls the run: WANDB_NAME, unless the command gave the run a name of its own."""
    data = run_config.get("data_name") or run_config.get("dataset", {}).get("name")
    usual = f"{data}-{run_config.get('mode')}"
    return (os.environ.get("WANDB_NAME") if name == usual else None) or name


def identity(file: Path) -> str:
    """WANDB_RUN_ID or a new one, and the same at every start of this run folder: a resumed run's curves go on."""
    if not file.exists():
        write_whole(file, (os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)).encode())
    return read_small(file, 256).decode().strip()
