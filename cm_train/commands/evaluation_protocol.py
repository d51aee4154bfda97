"""The published protocols that cm-eval knows by name, and whether a command follows the one that it names."""

from typing import Any

import yaml

from ..core.configs import conf_dir
from ..core.errors import InputError
from .evaluation_config import EvalConfig


def check_follows(config: EvalConfig) -> None:
    """Refuse the name of a protocol beside settings that are not its own. Raises InputError.

    One that is not among this project's is whoever's brought it.
    """
    path = conf_dir() / "protocol" / f"{config.protocol}.yaml"
    if config.protocol is None or not path.is_file():
        return
    stated: Any = yaml.safe_load(path.read_text())
    chosen = {key.removeprefix("override /"): value for entry in stated["defaults"] for key, value in entry.items()}
    wanted = {"num": stated["num"], "blocks": stated["blocks"], "features": chosen["features"]}
    given = {"num": config.num, "blocks": config.blocks, "features": config.features.get("name")}
    wanted["metrics"], given["metrics"] = (f"[{','.join(sorted(m))}]" for m in (chosen["metrics"], config.metrics))
    others = [f"{key}={given[key]}" for key in wanted if given[key] != wanted[key]]
    if others:
        allowed = ", ".join(f"{key}={value}" for key, value in wanted.items())
        what = f"protocol={config.protocol} is not followed"
        raise InputError(what, ", ".join(others), allowed, "drop protocol=, or what is set beside it")
