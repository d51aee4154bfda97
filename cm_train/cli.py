"""What the commands share: finding conf/, running Hydra, and turning errors into one line and an exit code."""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import InputError, TrainingFailed

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3


def conf_dir() -> Path:
    """The configs: packed into the installed package, or at the top of a checkout."""
    packed = Path(__file__).parent / "conf"
    return packed if packed.is_dir() else Path(__file__).parent.parent / "conf"


def run(config_name: str, body: Callable[[DictConfig], int]) -> None:
    """Run `body` on the composed config and exit with its code, or with 2 after one line on wrong input."""
    _heed_quiet()
    full = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("0", "")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them itself
    codes: list[int] = []  # one a job

    @hydra.main(version_base=None, config_path=str(conf_dir()), config_name=config_name)
    def job(cfg: DictConfig) -> None:
        try:
            codes.append(body(cfg))
        except InputError as error:
            if full:
                raise
            if str(error):  # else the ranks have said it
                _complain(str(error))
            codes.append(WRONG_INPUT)
        except TrainingFailed as error:
            if full:
                raise
            _complain(str(error))
            codes.append(FAILED)
        except OSError as error:
            if full or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _complain(f"{error.strerror}: {error.filename or 'in the run folder'}; the same command goes on")
            codes.append(FAILED)
        if codes[-1] == STOPPED:
            sys.exit(STOPPED)  # past Hydra, which would start the next job of a sweep

    try:
        job()
    except (HydraException, OmegaConfBaseException, InputError) as error:
        if full:
            raise
        _complain(_one_line(error, config_name))
        sys.exit(WRONG_INPUT)
    except KeyboardInterrupt:
        sys.exit(FAILED)
    sys.exit(max(codes, default=DONE))


def _heed_quiet() -> None:
    """Take --quiet off the command line, which is Hydra's, and see that the ranks hear of it too."""
    if not {"--quiet", "-q"} & set(sys.argv[1:]):
        return
    from .tracking.terminal import silence

    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ("--quiet", "-q")]
    silence()


def _complain(text: str) -> None:
    name = Path(sys.argv[0]).name
    with contextlib.suppress(OSError):  # nobody listens; the exit code still tells
        print(f"{name}: {text}", file=sys.stderr, flush=True)


def _one_line(error: BaseException, config_name: str) -> str:
    """Hydra's message without its layout, with the cause, what is allowed and the nearest known key."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return str(InputError(f"no such option {group}={option}", allowed=", ".join(error.options)))
    text = " ".join(str(error).split("\nTo append")[0].split("full_key")[0].split())
    cause = error.__cause__
    if cause is not None and str(cause).splitlines():
        text = f"{text} {str(cause).splitlines()[0]}"
    if "Could not override '" in text:
        key = text.split("Could not override '")[1].split("'")[0]
        near = difflib.get_close_matches(key, _known_keys(config_name), 1, cutoff=0.5)
        text = f"unknown key {key}" if "not in" in text else text
        text += f"; did you mean {near[0]}?" if near else "; see --help, or --cfg job for all keys"
    return text


def _known_keys(config_name: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base=None):
        cfg = hydra.compose(config_name)
    keys: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for k, v in node.items():
                keys.append(f"{prefix}{k}")
                walk(v, f"{prefix}{k}.")

    walk(OmegaConf.to_container(cfg), "")
    return keys
