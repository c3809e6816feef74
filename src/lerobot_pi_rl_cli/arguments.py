"""Command lines and configuration files: what is given, before anything of it is parsed."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG_PATH = "config_path"
TRAIN_CONFIG, PRETRAINED_MODEL = "train_config.json", "pretrained_model"
_SOURCES = Path(__file__).parents[1]
RECIPES = (_SOURCES / "lerobot_policy_pi_rl/recipes", _SOURCES.parent / "recipes")
"""Where recipes lie: in an installed package, and in a repository that is installed to be edited."""


def option(arguments: Sequence[str], name: str) -> str | None:
    """Value of `--name=value` or `--name value`, the last one given."""
    value = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}" and position + 1 < len(arguments):
            value = arguments[position + 1]
    return value


def without(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments but for `--name=value` and `--name value`."""
    rest, skip = [], False
    for argument in arguments:
        if not skip and argument != f"--{name}" and not argument.startswith(f"--{name}="):
            rest.append(argument)
        skip = argument == f"--{name}"
    return rest


def setting(arguments: Sequence[str], name: str) -> object:
    """A setting from the command line, or from the configuration file, or None."""
    if (given := option(arguments, name)) is not None:
        return given
    return inside(read_configuration(option(arguments, CONFIG_PATH)), name)


def inside(content: object, name: str) -> object:
    """A setting of a configuration file, or None."""
    for key in name.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def read_configuration(given: str | None) -> dict[str, Any]:
    """What a configuration file says; nothing where none is named, or one of the hub.

    Raises:
        SystemExit: If it cannot be read.
    """
    path = Path(given or "")
    # LeRobot also takes the folder of a checkpoint.
    path = path / TRAIN_CONFIG if path.is_dir() else path
    if given is None or not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = _from_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: {CONFIG_PATH}: {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise SystemExit(
            f"error: {CONFIG_PATH}: {path} must hold settings by name, not {type(content).__name__}"
        )
    return content


def _from_yaml(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def with_recipe(arguments: list[str]) -> list[str]:
    """Names a recipe by its place in the package where the working directory has no such file.

    Raises:
        SystemExit: If the named file is nowhere, or cannot be read.
    """
    given = option(arguments, CONFIG_PATH)
    if given is None:
        return arguments
    found = _find(given)
    read_configuration(found)
    return arguments if found == given else [*without(arguments, CONFIG_PATH), f"--{CONFIG_PATH}={found}"]


def _find(given: str) -> str:
    """Where a configuration file is; a name of the hub is left to LeRobot."""
    path = Path(given)
    if path.is_file() or (path / TRAIN_CONFIG).is_file():
        return given
    if (inner := path / PRETRAINED_MODEL / TRAIN_CONFIG).is_file():
        raise SystemExit(f"error: {CONFIG_PATH}: {given} is the folder around the file; name {inner}")
    if path.is_dir():
        raise SystemExit(f"error: {CONFIG_PATH}: the folder {given} has no {TRAIN_CONFIG}")
    recipes = {file.name: file for folder in RECIPES for file in sorted(folder.glob("*.json"))}
    if path.parent == Path("recipes") and path.name in recipes:
        return str(recipes[path.name])
    if path.suffix not in (".json", ".yaml", ".yml") and given.count("/") <= 1:
        return given
    raise SystemExit(
        f"error: {CONFIG_PATH}: there is no file {given} in {Path.cwd()}; the recipes of this package are "
        f"recipes/<name> with one of {', '.join(recipes)}"
    )


def is_value(argument: str) -> bool:
    """Whether an argument can be the value of the one before it: it is no option, or a negative number."""
    return not argument.startswith("-") or re.fullmatch(r"-\d*\.?\d+(e[-+]?\d+)?", argument) is not None


def expanded(value: str) -> str:
    """A path with `~` replaced by the home folder, as a shell does only at the beginning of an argument."""
    return str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else value
