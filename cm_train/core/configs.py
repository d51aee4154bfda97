"""What conf/ offers to a command: its groups of options, its keys, and in words what is wrong with a choice."""

import contextlib
import difflib
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import InputError
from .keys import Keys, all_keys, keys_of_options
from .run_layout import called_after


def conf_dir() -> Path:
    """The configs: packed into the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    packed = package / "conf"
    return packed if packed.is_dir() else package.parent / "conf"


def _named_after(dataset: str, root: str | None) -> str:
    """${named_after:${dataset.name},${dataset.root}}: own pictures are known by their folder, others by their name."""
    return called_after(root) if dataset == "image_folder" and root else dataset


OmegaConf.register_new_resolver("named_after", _named_after)


def groups(config_name: str) -> list[str]:
    """The groups of configs that a command has options of: those that its own config chooses from."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{config_name}.yaml"))
    names = [str(key) for entry in entries.get("defaults", []) if isinstance(entry, dict) for key in entry]
    return sorted(name for name in names if not name.startswith("override "))


def one_line(error: BaseException, config_name: str) -> str:
    """What Hydra found wrong: without its layout, with the cause, what is allowed and the nearest known key."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        near = difflib.get_close_matches(option.lower(), error.options, 1)
        fix = f"{group}={near[0]}" if near else None
        return str(InputError(f"no such option {group}={option}", allowed=", ".join(error.options), fix=fix))
    if found := re.search(r"Could not load '(\w+)/([^']*)'", str(error)):  # one of a list of options
        known = ", ".join(sorted(path.stem for path in (conf_dir() / found[1]).glob("*.yaml")))
        return str(InputError(f"no such option {found[1]}={found[2]}", allowed=known))
    text = " ".join(str(error).split("\nTo append")[0].split("full_key")[0].split())
    cause = error.__cause__
    if cause is not None and str(cause).splitlines():
        text = f"{text} {str(cause).splitlines()[0]}"
    if "Could not override '" in text:
        key = text.split("Could not override '")[1].split("'")[0]
        text = f"unknown key {key}" if "not in" in text else text
        text += f"; {keys_of(config_name).advice(key)}"
    return text


def keys_of(config_name: str) -> Keys:
    """What this command line can set: its groups' options chosen as it says, where that can be."""
    known = groups(config_name)
    chosen = [word for word in sys.argv[1:] if word.partition("=")[0] in known and re.fullmatch(r"\w+=\w+", word)]
    config = None
    for words in (chosen, []):
        GlobalHydra.instance().clear()
        with contextlib.suppress(HydraException, OmegaConfBaseException), _composing():
            config = hydra.compose(config_name, overrides=words)
            break
    here = [*known, *all_keys(OmegaConf.to_container(config))] if config is not None else known
    ours = [group for group in known if group not in ("experiment", "recipe")]  # whose keys all are others' too
    elsewhere = keys_of_options(conf_dir(), ours)
    return Keys(config_name, dict.fromkeys(here), {k: v for k, v in elsewhere.items() if k not in here})


def _composing() -> contextlib.AbstractContextManager[None]:
    return hydra.initialize_config_dir(str(conf_dir()), version_base=None)
