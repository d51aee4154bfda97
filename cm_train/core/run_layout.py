"""The names of runs, and those inside a run's folder, which no other file spells.

config.yaml  metrics.jsonl  run.log  left_out.txt     samples/data.png  step_00001000.png
checkpoints/step_00001000/        manifest.json  state.pt  denoiser.safetensors  ema_<decay>.safetensors
snapshots/step_00001000/          of its power-function averages
tensorboard/    wandb/            what those trackers keep
"""

import os
import re
from pathlib import Path

CONFIG, METRICS, LEFT_OUT, RUN_LOG = "config.yaml", "metrics.jsonl", "left_out.txt", "run.log"
LOCK, SAVED = ".lock", ".saved.json"
CHECKPOINTS, SNAPSHOTS, SAMPLES = "checkpoints", "snapshots", "samples"
DATA_PICTURE = "data.png"  # in samples
TENSORBOARD, WANDB = "tensorboard", "wandb"
FOLDERS = (CHECKPOINTS, SAMPLES, SNAPSHOTS, TENSORBOARD, WANDB)
MANIFEST, STATE = "manifest.json", "state.pt"

# What people call a part of their pictures, and so no name for them.
_PARTS = frozenset(["train", "training", "val", "valid", "validation", "test", "images", "imgs", "data", "dataset"])
_STEP = re.compile(r"step_([0-9]{1,15})", re.ASCII)


def step_name(step: int) -> str:
    """What is called after a step: eight digits are a format, not a limit."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a name; None where that is no `step_name`."""
    match = _STEP.fullmatch(name)
    return None if match is None else int(match[1])


def step_folder(run: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return run / CHECKPOINTS / step_name(step)


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint folder belongs to; itself where it lies in none."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint


def clean(text: str) -> str:
    """`text` as part of a folder's name, which must not hold an = since ckpt=... could not be parsed."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def called_after(root: str) -> str:
    """What runs on the pictures in a folder or zip are called: "photos" for ~/photos, photos.zip and its folders.

    Where the name is that of a part, as in pets/train, the one above it comes first.
    """
    path = Path(os.path.abspath(os.path.expanduser(root)))
    name = _stem(path.name)
    if name.lower() in _PARTS and _stem(path.parent.name).lower() not in ("", *_PARTS):
        name = f"{_stem(path.parent.name)}-{name}"
    return clean(name).strip("-.") or "pictures"


def _stem(name: str) -> str:
    return name[: -len(".zip")] if name.lower().endswith(".zip") else name
