"""The table of commands, and what `--help` and `--version` say."""

import json
import shutil
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import settings
from .arguments import option

PACKAGE = "lerobot_policy_pi_rl"
HELP, HELP_ALL, VERSION = ("-h", "--help"), "--help-all", "--version"
# Columns that a line of help has at most, and those before a meaning.
WIDTH, INDENT = 110, 8


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        purpose: One line.
        examples: Command lines to begin with.
        takes_settings: Whether it reads the configuration of a run, and not options of its own.
    """

    purpose: str
    examples: tuple[str, ...]
    takes_settings: bool = True


RECIPE = "--config_path=recipes/metaworld.json"
COMMANDS = {
    "train": Command(
        "Trains a policy by reinforcement learning: one learner and its actors, on this machine.",
        (
            f"lerobot-pi-rl-train {RECIPE} --actors=2",
            f"lerobot-pi-rl-train {RECIPE} --resume=true",
            "lerobot-pi-rl-train --policy.path=<checkpoint> --env.type=metaworld_state --env.task=reach-v3",
        ),
    ),
    "learner": Command(
        "Trains a policy from what actors collect; waits for actors.",
        (
            f"lerobot-pi-rl-learner {RECIPE}",
            f"lerobot-pi-rl-learner {RECIPE} --policy.actor_learner_config.learner_host=192.0.2.10 \\\n"
            "      --algorithm.security.token_file=~/.pi_rl/token",
        ),
    ),
    "actor": Command(
        "Collects decisions for a learner, with the learner's configuration; each actor needs its own number.",
        (f"lerobot-pi-rl-actor {RECIPE} --algorithm.collection.actor_id=1",),
    ),
    "supervised": Command(
        "LeRobot's supervised training (lerobot-train) with this package's recipes, which can end by validation.",
        (
            "lerobot-pi-rl-supervised --config_path=recipes/metaworld_supervised.json --dataset.root=...",
            "lerobot-pi-rl-supervised --config_path=recipes/metaworld_supervised.json --env.type=metaworld_state \\\n"
            "      --env.task=peg-insert-side-v3 --env_eval_freq=500 --save_freq=500 --patience=4",
        ),
    ),
    "check": Command(
        "Measures what a run would begin with and says whether there is a signal; trains nothing.",
        (f"lerobot-pi-rl-check {RECIPE} --output_dir=outputs/check",),
    ),
    "demos": Command(
        "Records MetaWorld's scripted experts as a LeRobotDataset.",
        (
            "lerobot-pi-rl-demos --task=peg-insert-side-v3 --num_episodes=8 --root=outputs/demonstrations \\\n"
            "      --repo_id=pi_rl/metaworld",
        ),
        takes_settings=False,
    ),
    "export": Command(
        "Gives back the stock policy of a pi_rl checkpoint.",
        (
            "lerobot-pi-rl-export --policy.path=outputs/run/checkpoints/best/pretrained_model \\\n"
            "      --output_dir=outputs/stock",
        ),
        takes_settings=False,
    ),
    "status": Command(
        "Asks a running learner how it stands.",
        ("lerobot-pi-rl-status --learner=127.0.0.1:50051",),
        takes_settings=False,
    ),
}

# What people change, in this order; `SUPERVISED` of supervised training.
FIRST = (
    "policy.path",
    "policy.base_path",
    "policy.device",
    "policy.online_steps",
    "env.type",
    "env.task",
    "output_dir",
    "resume",
    "seed",
    "save_freq",
    "env_eval_freq",
    "eval.n_episodes",
    "algorithm.lr",
    "algorithm.collection.num_envs",
    "algorithm.collection.decisions",
)
SUPERVISED = (
    "dataset.repo_id",
    "dataset.root",
    "policy.path",
    "policy.device",
    "env.type",
    "env.task",
    "output_dir",
    "resume",
    "steps",
    "batch_size",
    "save_freq",
    "env_eval_freq",
    "eval.n_episodes",
    "seed",
)
# What the package fills in by itself.
FILLED_IN = ("algorithm.policy_config", "policy.type")
# Options that are no settings of LeRobot's parser, by command; those of "" are of every one.
OWN_OPTIONS = {
    "": {
        "config_path": (
            "FILE",
            "Settings in a JSON or YAML file, such as recipes/metaworld.json; options win over it.",
        )
    },
    "train": {"actors": ("N", "Actors on this machine; short for --algorithm.collection.num_actors.")},
    "supervised": {
        "patience": ("N", "End after so many validations in a row without a new best."),
        "max_minutes": ("X", "End at the first validation after so many minutes."),
    },
}


def own_options(command: str) -> dict[str, tuple[str, str]]:
    """Options of a command that are no settings: their unit and meaning."""
    return OWN_OPTIONS[""] | OWN_OPTIONS.get(command, {})


# Headings of our own settings, and how those below them begin.
GROUPS = {
    "The run": "",
    "Policy": "policy.",
    "Exploration": "policy.explorer.",
    "Base": "policy.base.",
    "Algorithm": "algorithm.",
    "Collection": "algorithm.collection.",
    "Token and TLS": "algorithm.security.",
    "Environment": "env.",
}
UNIT = {"int": "N", "float": "X", "bool": "true|false", "str": "NAME", "path": "PATH", "any": "JSON"}


def is_help(arguments: list[str]) -> bool:
    """Whether a command line only asks what there is."""
    return any(argument in (*HELP, HELP_ALL) for argument in arguments)


def versions() -> str:
    """Versions of what a report of a fault has to name; nothing is imported."""
    found = [f"{PACKAGE} {_version(PACKAGE)}"]
    found += [f"{name} {_version(name)}" for name in ("lerobot", "torch")]
    return ", ".join([*found, f"Python {sys.version.split()[0]}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def help_text(name: str, arguments: list[str]) -> str:
    """What `--help` and `--help-all` print for a command that takes settings.

    Args:
        name: The command.
        arguments: The command line; `--env.type=` in it chooses the environment that is described.
    """
    command, whole = COMMANDS[name], HELP_ALL in arguments
    chosen = {
        "env": option(arguments, "env.type") or "metaworld_state",
        "policy.base": option(arguments, "policy.base.type") or "compact",
        "algorithm": "pi_rl",
    }
    lines = [f"usage: lerobot-pi-rl-{name} [--NAME=VALUE ...]", "", command.purpose, ""]
    lines += [f"  {example}" for example in command.examples]
    lines += ["", "Most used:"]
    for own, (unit, meaning) in own_options(name).items():
        lines += _described(f"--{own}={unit}", "", meaning)
    known = dict(settings.names(chosen))
    if name == "supervised":
        lines += [f"  --{setting}={_unit(known[setting])}" for setting in SUPERVISED]
        return "\n".join([*lines, "", "The others are LeRobot's and the policy's own: lerobot-train --help"])
    for setting in (one for one in FIRST if one in known):
        lines += _setting(setting, known[setting])
    lines += [
        f"  {', '.join(HELP)}; {HELP_ALL}: this list; all settings, LeRobot's as well, with their whole meaning",
        f"  {VERSION}",
    ]
    ours = _ours(chosen)
    for title, prefix in GROUPS.items():
        lines += ["", f"{title}:"] if ours[prefix] else []
        for setting in ours[prefix]:
            lines += _setting(setting, known[setting]) if whole else [_short(setting, known[setting])]
    if whole:
        shown = {setting for group in ours.values() for setting in group}
        lines += ["", f"LeRobot's own, of version {settings.described()['lerobot']}:"]
        for setting in (one for one in known if one not in shown):
            lines += _setting(setting, known[setting])
    return "\n".join(
        [*lines, "", "All, at length: docs/configuration.md. What to change when: docs/learning.md."]
    )


def _ours(chosen: dict[str, str]) -> dict[str, list[str]]:
    """Our own settings, and those of LeRobot that a run reads, by section."""
    groups: dict[str, list[str]] = {prefix: [] for prefix in GROUPS.values()}
    for name, node in settings.names(chosen):
        if (node.get("run") or node.get("own")) and name not in FILLED_IN and "unread" not in node:
            prefix = max((one for one in groups if name.startswith(one)), key=len)
            groups[prefix].append(name)
    return groups


def _setting(name: str, node: dict[str, Any]) -> list[str]:
    """A setting with its whole meaning."""
    meaning = f"No effect here: {node['unread']}." if "unread" in node else node.get("help", "")
    return _described(f"--{name}={_unit(node)}", _default(node), meaning)


def _described(head: str, default: str, meaning: str) -> list[str]:
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 1)).columns)
    lines = [f"  {head}{default}"]
    return lines + textwrap.wrap(meaning, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)


def _short(name: str, node: dict[str, Any]) -> str:
    """A setting on one line, with the beginning of its meaning."""
    head = f"  --{name}={_unit(node)}{_default(node)}"
    meaning = textwrap.shorten(node.get("help", ""), max(WIDTH - len(head) - 2, 4), placeholder=" ...")
    return f"{head}  {meaning}".rstrip(" .") if meaning == "..." else f"{head}  {meaning}"


def _unit(node: dict[str, Any]) -> str:
    return "|".join(map(str, node["choices"])) if "choices" in node else UNIT[node["kind"]]


def _default(node: dict[str, Any]) -> str:
    if "default" not in node:
        return ""
    value = node["default"]
    return f" [{value if isinstance(value, str) else json.dumps(value)}]"
