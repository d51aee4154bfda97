"""What a user types, made into what Hydra takes: flags anywhere, values as meant, the impossible in one line."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from .errors import InputError
from .keys import refuse_as_flags
from .override import as_meant, parsed, quoted

# Two ways to say one thing: the one that is typed overrules the other, whatever file that is from.
OTHER = {"ema.decay": "ema.half_life_images", "ema.half_life_images": "ema.decay"}
IMPLIED = frozenset(f"++{key}=null" for key in OTHER)
_NO_FLAGS = {
    "config_path": "--config-dir adds a folder of configs to ours",
    "config_name": "make it experiment/<name>.yaml in a folder given with --config-dir, and write experiment=<name>",
    "experimental_rerun": "the same command again goes on with a run",
    "package": "drop it",
}
_INFO = ("--info", "-i")


def tidy(
    arguments: Sequence[str],
    groups: Iterable[str],
    plain: str | None = None,
    meant_by: Callable[[str], list[str]] | None = None,
) -> list[str]:
    """Command-line arguments as Hydra takes them: flags first, values quoted where they would mean something else.

    Args:
        groups: the config groups, as "mode".
        plain: the key that an argument without one is for, at most once; "ckpt..." takes several, as one list.
        meant_by: which keys a word stands for, see `Keys.meant_by`.

    Raises:
        InputError: an unknown flag, what is no setting, or what can't be had.
    """
    parser = get_args_parser()
    parser.error = _fail  # type: ignore[method-assign]
    if plain is None:
        parser.add_argument("--why", nargs="*", action="extend")
    if meant_by is not None:
        refuse_as_flags(arguments, list(parser._option_string_actions), meant_by)
    options = parser.parse_intermixed_args(_with_what_to_show(parser, arguments))
    for name, instead in _NO_FLAGS.items():
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} does not work with this command", fix=instead)
    asked = _take_why(options) if plain is None else []
    options.run = False  # which is what happens anyway
    flags: list[str] = []
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if action.option_strings and value not in (None, False):
            flags.append(action.option_strings[0] if value is True else f"{action.option_strings[0]}={value}")
    known, is_sweep = frozenset(groups), bool(options.multirun)
    settings = _with_keys(options.overrides, plain) if plain else options.overrides
    return [*asked, *flags, *(as_meant(text, known, is_sweep) for text in settings), *_overruled(settings)]


def _take_why(options: argparse.Namespace) -> list[str]:
    """The keys that --why asks about, each as a flag of its own; of its words those that are settings go to these."""
    if options.why is None:
        return []
    words, options.why = [*options.overrides, *options.why], None
    keys = [word for word in words if "=" not in word and not word.startswith("~")]
    options.overrides = [word for word in words if word not in keys]
    if options.help:
        return []
    if not keys or "" in keys:
        raise InputError("--why needs a key", fix="--why steps")
    for name in ("multirun", "cfg", "info", "shell_completion"):
        if getattr(options, name):
            raise InputError(f"--why and --{name.replace('_', '-')} are two commands", fix="one of them")
    return [f"--why={key}" for key in keys]


def _overruled(settings: Iterable[str]) -> list[str]:
    """What `settings` set to null without saying so."""
    values = {key.lstrip("+"): value for key, _, value in (text.partition("=") for text in settings)}
    given = {key for key, value in values.items() if value.strip().lower() not in ("null", "~")}
    return [f"++{other}=null" for key, other in OTHER.items() if key in given and other not in values]


def with_configs_of_plugins(arguments: Sequence[str]) -> list[str]:
    """Tidy arguments with the folders of configs that the plugins bring which plugins=[...] allows.

    Raises:
        InputError: no such plugin is installed, or it is no list.
    """
    names: list[str] = []
    places: list[str] = []
    others: list[str] = []
    for argument in arguments:
        override = None if argument.startswith("-") else parsed(argument)
        key = "" if override is None else override.key_or_group
        value = override.value() if override is not None and key in ("plugins", "hydra.searchpath") else None
        if key == "hydra.searchpath" and isinstance(value, list):
            places += map(str, value)
            continue
        others.append(argument)
        if key == "plugins":
            if not isinstance(value, list):
                given = argument.partition("=")[2]
                what = "plugins is a list, one for all jobs of a sweep"
                raise InputError(what, given, "[name,...]", f"plugins=[{given}]")
            names += map(str, value)
    if not names:
        return list(arguments)
    from .plugins import conf_folders

    places += [f"file://{folder}" for folder in conf_folders(names)]
    return [*others, f"hydra.searchpath=[{','.join(map(quoted, places))}]"] if places else others


def _fail(message: str) -> NoReturn:
    raise InputError(message, fix="--help shows what there is; settings are written key=value")


def _with_what_to_show(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """`arguments` where --info has its own value: argparse would take whatever follows for that."""
    choices = next(action.choices for action in parser._actions if action.dest == "info")
    given = list(arguments)
    for i, argument in enumerate(given):
        if argument in _INFO and (i + 1 == len(given) or given[i + 1] not in (choices or ())):
            given[i] = f"{_INFO[0]}=all"
    return given


def _with_keys(settings: Sequence[str], plain: str) -> list[str]:
    """`settings`, those that are no key=value with the key `plain`."""
    if plain.endswith("..."):
        plain = plain.removesuffix("...")
        words = [text for text in settings if "=" not in text and not text.startswith("~")]
        if len(words) > 1:
            settings = [f"{plain}=[{','.join(words)}]", *(text for text in settings if text not in words)]
    given = [text if "=" in text or text.startswith("~") else f"{plain}={text}" for text in settings]
    own = [text for text in given if text.startswith(f"{plain}=")]
    if len(own) > 1:
        raise InputError(f"{plain} is given more than once", " ".join(own), "once", f"-m {plain}=A,B for a run of each")
    return given
