"""The settings that the commands take, from the packaged description `settings.json` (`docs/make_settings.py`)."""

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("settings.json")
TYPE = "type"
# LeRobot imports the package that such a setting names, which may register types of its own.
DISCOVER = "discover_packages_path"
# Names of the distributions that LeRobot imports for the same reason.
PLUGINS = tuple(f"lerobot_{kind}_" for kind in ("robot", "camera", "teleoperator", "policy", "env"))
OUR_PLUGIN = "lerobot_policy_pi_rl"

Described = dict[str, Any]


@functools.cache
def tree() -> Described:
    """All settings, as one section."""
    return {"kind": "section", "fields": described()["settings"]}


@functools.cache
def described() -> Described:
    """The file: the settings, and the version of LeRobot that they were read from."""
    content: Described = json.loads(FILE.read_text(encoding="utf-8"))
    return content


@functools.cache
def is_other_lerobot() -> bool:
    """Whether the installed LeRobot is not the one that is described, so that it may know other settings."""
    try:
        return version("lerobot") != described()["lerobot"]
    except PackageNotFoundError:
        return True


def has_plugins() -> bool:
    """Whether another package may bring environments, robots or policies: one that is installed, or was imported."""
    if "lerobot" in sys.modules:
        return True
    for place in sys.path:
        folder = Path(place or ".")
        for entry in folder.iterdir() if folder.is_dir() else ():
            name = entry.name.replace("-", "_")
            is_plugin = name.startswith(PLUGINS) and not name.startswith(OUR_PLUGIN)
            if is_plugin and name.endswith((".dist_info", ".egg_info")):
                return True
    return False


@dataclass(frozen=True)
class Found:
    """What is known of a name.

    Attributes:
        node: Its description; None of a name that there is not.
        section: The section, or the choice of types, in which the name was looked for last.
    """

    node: Described | None
    section: Described


ANY: Described = {"kind": "any"}


def look_up(name: str, chosen: Mapping[str, str | None]) -> Found:
    """Finds a setting.

    Args:
        name: Dotted, as on the command line.
        chosen: The type of each section that has several, by its name; None where it is not known.
    """
    node, prefix = tree(), ""
    for part in name.split("."):
        inner = inner_of(node, prefix, part, chosen)
        section = _of_type(node, chosen.get(prefix))
        if inner is None or inner["kind"] == "any":
            return Found(inner, section)
        node, prefix = inner, f"{prefix}.{part}" if prefix else part
    return Found(node, section)


def _of_type(node: Described, kind: str | None) -> Described:
    """The section itself of one that has several types."""
    section: Described = node.get("types", {}).get(kind, node)
    return section


def inner_of(node: Described, prefix: str, part: str, chosen: Mapping[str, str | None]) -> Described | None:
    """One step of `look_up`."""
    if node["kind"] == "section":
        inner: Described | None = node["fields"].get(part)
        return inner
    if node["kind"] != "choice":
        return None
    if part == TYPE:
        return {"kind": "str", "choices": list(node["types"])}
    kind = chosen.get(prefix)
    if kind is not None and kind not in node["types"]:
        # Of a type that is not described nothing is known.
        return ANY
    types = node["types"].values() if kind is None else [node["types"][kind]]
    return next((one["fields"][part] for one in types if part in one["fields"]), None)


def names(
    chosen: Mapping[str, str | None], node: Described | None = None, prefix: str = ""
) -> Iterator[tuple[str, Described]]:
    """All settings with their names; of sections with several types, those of the chosen one, or of all."""
    node = tree() if node is None else node
    if node["kind"] == "section":
        fields = node["fields"].items()
    elif node["kind"] == "choice":
        kind = chosen.get(prefix)
        yield f"{prefix}.{TYPE}", {"kind": "str", "choices": list(node["types"])}
        types = [node["types"][kind]] if kind in node["types"] else node["types"].values()
        fields = {name: inner for one in types for name, inner in one["fields"].items()}.items()
    else:
        yield prefix, node
        return
    for name, inner in fields:
        yield from names(chosen, inner, f"{prefix}.{name}" if prefix else name)


def problem(node: Described, value: object) -> str | None:
    """What is wrong with a value, and what would be right; None if nothing is.

    Args:
        node: The setting.
        value: From a file, or the text that stands on the command line.
    """
    kind, optional = node["kind"], node.get("optional", False)
    text = value.strip() if isinstance(value, str) else value
    if optional and text in (None, "null"):
        return None
    or_null = " or null" if optional else ""
    if text == "" and (kind in ("int", "float", "bool", "path") or "choices" in node):
        return "needs a value"
    if kind in CHECKS and not CHECKS[kind](text):
        return f"must be {WORDS[kind]}{or_null}, got {value!r}"
    if "choices" in node and text not in node["choices"] and isinstance(text, str):
        return f"{text!r} is unknown; choose one of {node['choices']}"
    return None


def is_whole(value: object) -> bool:
    """Whether the parser takes this for an int."""
    if isinstance(value, str):
        return _converts(int, value.strip("\"'"))
    return isinstance(value, int)


def is_number(value: object) -> bool:
    """Whether the parser takes this for a float."""
    if isinstance(value, str):
        return _converts(float, value.strip("\"'"))
    return isinstance(value, int | float)


def is_boolean(value: object) -> bool:
    """Whether the parser takes this for a bool."""
    return isinstance(value, bool) or value in ("true", "false")


def is_text(value: object) -> bool:
    """Whether the parser can take this for one text."""
    return not isinstance(value, dict | list)


def _converts(kind: type, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


CHECKS = {"int": is_whole, "float": is_number, "bool": is_boolean, "str": is_text, "path": is_text}
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "path": "a path",
}
