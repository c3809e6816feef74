"""Writes `src/lerobot_pi_rl_cli/settings.json`, from which the commands answer `--help` and mistakes at once.

It describes every setting that the parser accepts: its kind, choices, default and meaning. The commands read it instead
of the configuration classes, whose import takes ten seconds. `python docs/make_configuration.py` writes it as well as
the page; `tests/test_command_line.py` fails when it is not what this makes.
"""

import dataclasses
import enum
import inspect
import json
import re
import runpy
import textwrap
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from draccus.utils import is_choice_type
from lerobot.configs import PreTrainedConfig
from lerobot.rl.algorithms.configs import RLAlgorithmConfig

from lerobot_policy_pi_rl.algorithm import configuration_pi_rl_algorithm as algorithm
from lerobot_policy_pi_rl.bases.configuration import STOCK, BaseConfig
from lerobot_policy_pi_rl.configuration_pi_rl import EXPLORERS, RECORDINGS, TRAINABLE, PIRLConfig
from lerobot_policy_pi_rl.envs import configuration_metaworld as metaworld
from lerobot_policy_pi_rl.runtime.packages import how_to_install, needed_module
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig
from lerobot_policy_pi_rl.runtime.settings import UNREAD

HERE = Path(__file__).parent
FILE = HERE.parent / "src/lerobot_pi_rl_cli/settings.json"
PAGE = runpy.run_path(str(HERE / "make_configuration.py"))

KINDS = {int: "int", float: "float", bool: "bool", str: "str", Path: "path"}
# Settings whose values are checked by their classes, not by their types.
CHOICES = {
    (PIRLConfig, "trainable"): TRAINABLE,
    ("ExplorerConfig", "kind"): EXPLORERS,
    ("ExplorerConfig", "recording"): RECORDINGS,
    ("PIRLAlgorithmConfig", "lr_schedule"): algorithm.LR_SCHEDULES,
    ("PIRLAlgorithmConfig", "advantage"): algorithm.ADVANTAGES,
    ("PIRLAlgorithmConfig", "log_prob_reduction"): algorithm.LOG_PROB_REDUCTIONS,
    ("CollectionConfig", "reward"): algorithm.REWARDS,
    ("MetaworldStateEnv", "reward"): metaworld.REWARDS,
    ("MetaworldCameraEnv", "reward"): metaworld.REWARDS,
}
# Where the walk ends: LeRobot fills it in, and it would lead back to the policy.
FILLED_IN = "policy_config"


def content() -> dict[str, Any]:
    """The whole description."""
    settings = fields_of(PIRLTrainConfig)
    for name, meaning in PAGE["RUN_FIELDS"].items():
        described = find(settings, name)
        if described is not None:
            described |= {"help": plain(meaning), "run": True}
    for name, reason in UNREAD.items():
        described = find(settings, name)
        if described is not None:
            described["unread"] = reason
    policy = settings["policy"]
    policy["stock"], policy["others"] = sorted(STOCK), other_policies()
    policy["fields"] |= {
        "path": {"kind": "path", "help": plain(PAGE["RUN_FIELDS"]["policy.path"]), "run": True},
        "type": {
            "kind": "str",
            "default": "pi_rl",
            "help": "Always pi_rl; a checkpoint of it says so itself.",
        },
    }
    return {"lerobot": version("lerobot"), "settings": settings}


def other_policies() -> list[str]:
    """LeRobot's policies that are neither `pi_rl` nor one of its bases."""
    return sorted(set(choices_of(PreTrainedConfig)) - set(STOCK) - {"pi_rl"})


def find(settings: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The description of a setting; None of one that is added later."""
    first, _, rest = name.partition(".")
    described = settings.get(first)
    if described is None or not rest:
        return described
    inner = described.get("fields") or described.get("types", {}).get("pi_rl", {}).get("fields", {})
    return find(inner, rest)


def fields_of(config: type) -> dict[str, Any]:
    """The settings of a configuration class, by name."""
    hints, meanings = typing.get_type_hints(config), meanings_of(config)
    described = {}
    for field in dataclasses.fields(config):
        entry = describe(hints[field.name], field.name)
        choices = CHOICES.get((config, field.name)) or CHOICES.get((config.__name__, field.name))
        if choices:
            entry["choices"] = list(choices)
        if entry["kind"] not in ("section", "choice"):
            entry |= {"default": default_of(field), "help": plain(meanings.get(field.name, ""))}
            if is_ours(config, field.name):
                entry["own"] = True
        described[field.name] = entry
    return described


def describe(hint: Any, name: str) -> dict[str, Any]:
    """Kind and choices of a type annotation."""
    inner, optional = without_none(hint)
    if name == FILLED_IN:
        entry: dict[str, Any] = {"kind": "any"}
    elif inner is PreTrainedConfig:
        entry = section(PIRLConfig)
    elif is_choice_type(inner):
        entry = {
            "kind": "choice",
            "types": {one: section(config) for one, config in choices_of(inner).items()},
        }
    elif dataclasses.is_dataclass(inner):
        entry = section(inner)
    elif isinstance(inner, type) and issubclass(inner, enum.Enum):
        entry = {
            "kind": "str",
            "choices": [member.value for member in inner] + [member.name for member in inner],
        }
    elif typing.get_origin(inner) is typing.Literal:
        entry = {"kind": "str", "choices": [str(value) for value in typing.get_args(inner)]}
    else:
        entry = {"kind": KINDS.get(inner, "any")}
    return entry | {"optional": True} if optional else entry


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type itself of one that may be None, and whether it may; of several types, nothing is checked."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    others = [one for one in typing.get_args(hint) if one is not type(None)]
    return (others[0] if len(others) == 1 else Any), len(others) < len(typing.get_args(hint))


def choices_of(registry: Any) -> dict[str, type]:
    """The classes that a registry has, by name."""
    # Not those of a plugin that happens to be here.
    known = {
        name: config
        for name, config in registry.get_known_choices().items()
        if config.__module__.startswith(("lerobot.", PAGE["PACKAGE"]))
    }
    if registry is BaseConfig:
        known = {name: known[name] for name in ("compact", *sorted(STOCK))}
    if registry is RLAlgorithmConfig:
        known = {"pi_rl": known["pi_rl"]}
    return dict(sorted(known.items()))


def section(config: type) -> dict[str, Any]:
    """A configuration class: its settings, whether all are ours, and the package that it needs."""
    entry: dict[str, Any] = {"kind": "section"}
    if all(is_ours(config, field.name) for field in dataclasses.fields(config)):
        entry["own"] = True
    module = needed_module(config()) if hasattr(config, "create_envs") else None
    if module is not None:
        entry |= {"needs": module, "install": how_to_install(config(), module)}
    return entry | {"fields": fields_of(config)}


def is_ours(config: type, name: str) -> bool:
    """Whether a field is declared in this package."""
    owner = next(one for one in config.__mro__ if name in inspect.get_annotations(one))
    return owner.__module__.startswith(PAGE["PACKAGE"])


def meanings_of(config: type) -> dict[str, str]:
    """The comments above fields, those of ours as they stand on the page."""
    found: dict[str, str] = {}
    for one in reversed(config.__mro__):
        if dataclasses.is_dataclass(one):
            found |= {name: text for name, text in comments_of(one).items() if text}
    return found


def comments_of(config: type) -> dict[str, str]:
    """The comments above the fields that a class declares itself."""
    if config.__module__.startswith(PAGE["PACKAGE"]):
        return {one.name: one.meaning for one in PAGE["declared_fields"](config)}
    lines = textwrap.dedent(inspect.getsource(config)).splitlines()
    found = {}
    for row, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if line.startswith("    ") and name in inspect.get_annotations(config):
            above, beside = PAGE["comment_above"](lines, row), line.partition("  # ")[2]
            found.setdefault(name, above or ("" if beside.startswith(("type:", "noqa")) else beside))
    return found


def default_of(field: Any) -> Any:
    """The default as it is written in a file; None where there is none, or none that can be written."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return None
    try:
        return json.loads(json.dumps(PAGE["_default_of"](field), default=lambda item: item.value))
    except AttributeError:
        return None


def plain(text: str) -> str:
    """A meaning as it is read on a terminal, without the marks of a page."""
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).replace("`", "")


def dump(value: Any, indent: int = 0) -> str:
    """JSON with one line for each setting, so that changes of two people seldom meet."""
    if not isinstance(value, dict) or value.get("kind") in ("any", *KINDS.values()) or not value:
        return json.dumps(value, ensure_ascii=False)
    space = " " * (indent + 1)
    rows = [f"{space}{json.dumps(name)}: {dump(inner, indent + 1)}" for name, inner in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"


def text() -> str:
    """The file."""
    return dump(content()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
