"""Composing a config of cm-train without a command: for Python, and for a sweep's leader."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from . import configs
from .command_line import tidy, with_configs_of_plugins
from .errors import InputError


@contextmanager
def composed_of(arguments: Sequence[str]) -> Iterator[DictConfig]:
    """The config of these words; within this context, in which Hydra is as the command has it, and then as it was.

    Raises:
        InputError: they can't be composed.
    """
    hydra, config, base = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    before = hydra.hydra, config.cfg, base.version_base
    hydra.clear()
    try:
        with initialize_config_dir(str(configs.conf_dir()), "cm-train", version_base=None):
            cfg = _compose(with_configs_of_plugins(tidy(arguments, configs.groups("train"))))
            config.set_config(cfg)
            task = copy.deepcopy(cfg)
            with read_write(task), open_dict(task):
                del task["hydra"]
            yield task
    finally:
        GlobalHydra.instance().hydra, config.cfg, base.version_base = before


def _compose(words: list[str]) -> DictConfig:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".* is not available")  # what hydra.searchpath names, and is not there
            return compose("train", words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, UserWarning) as error:
        raise InputError(configs.one_line(error, "train")) from None
