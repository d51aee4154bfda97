"""What cm-convert does: a foreign file read, and a checkpoint folder written."""

import os
import shlex
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..core.errors import ExitCode, InputError
from ..core.run_layout import MANIFEST
from ..core.settings import Text, typed
from ..core.terminal import say
from ..models.checkpoints.manifest import read_manifest
from ..models.checkpoints.verify import sha256_of
from ..models.formats.base import Told
from ..models.formats.importing import describe, import_file, say_licence

HOME = Path("converted")


class ConvertConfig(Told):
    """The keys of cm-convert."""

    src: Text
    format: Literal["auto", "openai", "edm", "edm2"]
    out: Text | None


def convert(cfg: DictConfig) -> ExitCode:
    """The command on its composed config; its exit code."""
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        raise InputError("src is missing", fix="cm-convert model.pkl") from None
    config = typed(ConvertConfig, values)
    source = Path(os.path.expanduser(config.src))
    if not os.path.isfile(source):
        raise InputError("no such file", config.src, "a .pt, .pth, .pkl or .safetensors file")
    out = HOME / source.stem if config.out is None else Path(os.path.expanduser(config.out))
    if os.path.lexists(out):
        _check_is_of(out, source, config)
        say(f"{out} is made of this file already")
        return ExitCode.DONE
    name, found = import_file(source, out, config, None if config.format == "auto" else config.format)
    say(f"{source}: {describe(name, found)}")
    say_licence(found)
    say(f"checkpoint {out}. Next: cm-sample {shlex.quote(str(out))}")
    return ExitCode.DONE


def _check_is_of(out: Path, source: Path, told: Told) -> None:
    """Raises InputError where `out` is something else than this file's checkpoint, read as `told`."""
    known = read_manifest(out).provenance if os.path.isfile(out / MANIFEST) else {}
    if (known.get("sha256"), known.get("told")) != (sha256_of(source), told.words()):
        what = f"{out} is there already, and not of this file and these settings"
        raise InputError(what, fix="out=... where nothing is yet")
