"""Reads a command line once, before anything slow: one line about the first mistake, or the same settings in one form.

Only what is certain is refused here. What may be known to a plugin or to another LeRobot is left to the parser.
"""

import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import settings
from .arguments import (
    CONFIG_PATH,
    PRETRAINED_MODEL,
    expanded,
    inside,
    is_value,
    option,
    read_configuration,
    with_recipe,
)
from .commands import own_options

POLICY, PATH, BASE_PATH = "policy", "policy.path", "policy.base_path"
BEGINNINGS = (PATH, BASE_PATH, "policy.pretrained_path", "policy.base")
HOST = "policy.actor_learner_config.learner_host"
# Sections whose settings depend on a type that is given beside them.
CHOSEN = (
    "env",
    "env.robot",
    "env.teleop",
    "policy.base",
    "algorithm",
    "optimizer",
    "scheduler",
    "reward_model",
)
# As people and other parsers write them.
BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
CONFIG = "config.json"


class Refused(SystemExit):
    """A command line that cannot work: one line on stderr, exit code 1."""

    def __init__(self, name: str, text: str) -> None:
        """Names the setting and the problem."""
        super().__init__(f"error: {name}: {text}")


def preflight(arguments: Sequence[str], command: str = "train") -> list[str]:
    """Checks a command line of the commands that take settings.

    Args:
        arguments: As typed.
        command: Which of them; named in what is said.

    Returns:
        The same settings as `--name=value`, once each, with `~` replaced and recipes found.

    Raises:
        Refused: If it cannot work.
    """
    given = {name: expanded(value) for name, value in pairs(arguments, command)}
    arguments = with_recipe([f"--{name}={value}" for name, value in given.items()])
    content = read_configuration(option(arguments, CONFIG_PATH))
    _check_sections(content)
    chosen = {name: _type(name, given, content) for name in CHOSEN}
    for name, value in given.items():
        _check_given(name, value, chosen, given, command)
    _check_file(content, option(arguments, CONFIG_PATH), chosen, given, command)
    # The parser reads the file itself; what it says of a folder at home is said again.
    at_home = {name: expanded(value) for name, value in _texts(content) if value != expanded(value)}
    arguments += [f"--{name}={value}" for name, value in at_home.items() if name not in given]
    if command != "supervised":
        at = {**at_home, **given}
        _check_environment(at, content, command)
        _check_policy(at, content)
    return [f"--{name}={_written(name, value, chosen)}" for name, value in pairs(arguments, command)]


def pairs(arguments: Sequence[str], command: str) -> list[tuple[str, str]]:
    """Names and values of a command line; of a setting that is given twice, the last one.

    Raises:
        Refused: If something is no option, or an option has no value.
    """
    found: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or argument == "--":
            hint = f"did you mean -{argument}?" if argument.startswith("-") else "settings are --name=value"
            raise Refused(argument, f"is no option; {hint}")
        name, stated, value = argument[2:].partition("=")
        if not stated:
            if position < len(arguments) and is_value(arguments[position]):
                value = arguments[position]
                position += 1
            else:
                value = _flag(name, command)
        found.pop(name, None)
        found[name] = value
    return list(found.items())


def _flag(name: str, command: str) -> str:
    """The value of an option without one: true, where it is a switch."""
    found = settings.look_up(name, {})
    if found.node is None:
        raise Refused(f"--{name}", unknown(name, {}, command))
    if found.node["kind"] != "bool":
        raise Refused(f"--{name}", f"needs a value, as in --{name}=...")
    return "true"


def _type(section: str, given: Mapping[str, str], content: Mapping[str, Any]) -> str | None:
    """The type that a section has, if it is known."""
    kind = given.get(f"{section}.{settings.TYPE}") or inside(content, f"{section}.{settings.TYPE}")
    if kind is None and section == "algorithm":
        return "pi_rl"
    return str(kind) if kind is not None else None


def _may_be_a_plugin(given: Mapping[str, str]) -> bool:
    """Whether something that is not described may know a type."""
    return any(name.endswith(settings.DISCOVER) for name in given) or settings.has_plugins()


def _check_given(
    name: str, value: str, chosen: Mapping[str, str | None], given: Mapping[str, str], command: str
) -> None:
    """Checks one setting of the command line."""
    if name in own_options(command) or name.endswith(settings.DISCOVER) or _is_foreign(name, command):
        return
    found = settings.look_up(name, chosen)
    if found.node is None:
        if not _may_be_known_elsewhere(found):
            raise Refused(f"--{name}", unknown(name, chosen, command))
    else:
        _check_value(name, f"--{name}", found.node, _written(name, value, chosen), given)
        _check_read(name, f"--{name}", found.node, value, command)


def _is_foreign(name: str, command: str) -> bool:
    """Whether a setting is of a policy that need not be ours: supervised training is for any."""
    return command == "supervised" and name.startswith("policy.")


def _may_be_known_elsewhere(found: settings.Found) -> bool:
    """Whether another LeRobot than the one that is described may have such a setting."""
    return settings.is_other_lerobot() and not found.section.get("own")


def _check_value(
    name: str, shown: str, node: settings.Described, value: object, given: Mapping[str, str]
) -> None:
    """Checks a value; a whole section is not looked into."""
    if node["kind"] in ("section", "choice", "any"):
        return
    if name == "policy.type":
        _check_policy_type(shown, str(value), given)
        return
    wrong = settings.problem(node, value)
    if wrong is None:
        return
    if name.endswith(f".{settings.TYPE}"):
        if _may_be_a_plugin(given) or settings.is_other_lerobot():
            return
        wrong = _unknown_type(name, str(value), node["choices"])
    elif settings.is_other_lerobot() and not _is_ours(name):
        return
    raise Refused(shown, wrong)


def _check_read(name: str, shown: str, node: settings.Described, value: object, command: str) -> None:
    """Checks that a setting has an effect, if it is another than the default."""
    parts = name.split(".")
    on_the_way = [settings.look_up(".".join(parts[: end + 1]), {}).node or {} for end in range(len(parts))]
    unread = next((one for one in on_the_way if "unread" in one), None)
    if unread is None or command == "supervised":
        return
    # A section that is not there by default is there because of this setting.
    is_new = unread is not node and unread.get("optional", False)
    is_default = str(value).strip() in (str(node.get("default")), json.dumps(node.get("default")))
    if is_new or ("default" in node and not is_default):
        raise Refused(shown, f"has no effect here: {unread['unread']}")


def _is_ours(name: str) -> bool:
    """Whether a setting is in a section that LeRobot does not know."""
    return bool(settings.look_up(name, {"algorithm": "pi_rl"}).section.get("own"))


def _unknown_type(name: str, value: str, known: list[str]) -> str:
    if name == "algorithm.type" and value == "sac":
        return "'sac' is trained by lerobot.rl.learner; this command trains pi_rl"
    near = difflib.get_close_matches(value, known, 1)
    meant = f"did you mean {near[0]!r}? Choose one of" if near else "choose one of"
    return f"{value!r} is unknown; {meant} {', '.join(known)}"


def _check_policy_type(shown: str, kind: str, given: Mapping[str, str]) -> None:
    """Checks that the policy is `pi_rl`, and says how to begin with another one."""
    policy = settings.tree()["fields"][POLICY]
    if kind == "pi_rl":
        return
    if kind in policy["stock"]:
        raise Refused(
            shown,
            f"is {kind!r}; this command trains 'pi_rl': begin with a checkpoint of it by --policy.path=<checkpoint> "
            "or by --policy.type=pi_rl --policy.base_path=<checkpoint>",
        )
    if kind in policy["others"]:
        raise Refused(
            shown, f"is {kind!r}, which PI-RL does not train (docs/bases.md says why); leave it out"
        )
    if not (_may_be_a_plugin(given) or settings.is_other_lerobot()):
        raise Refused(shown, _unknown_type("policy.type", kind, ["pi_rl"]))


def _check_sections(content: Mapping[str, Any]) -> None:
    """Checks that sections of a file are sections, before they are looked into."""
    for name in CHOSEN:
        part = inside(content, name)
        if part is not None and not isinstance(part, dict):
            raise Refused(f"`{name}`", f"must be a section of settings, got {part!r}")


def _check_file(
    content: Mapping[str, Any],
    file: str | None,
    chosen: Mapping[str, str | None],
    given: Mapping[str, str],
    command: str,
) -> None:
    """Checks names and values of a configuration file."""
    for name, value in _entries(content, chosen):
        if _is_foreign(name, command):
            continue
        shown = f"{file}: `{name}`"
        found = settings.look_up(name, chosen)
        if found.node is None:
            if not _may_be_known_elsewhere(found):
                raise Refused(shown, unknown(name, chosen, command).replace("--", ""))
        elif found.node["kind"] == "section" and not isinstance(value, dict | None):
            raise Refused(shown, f"must be a section of settings, got {value!r}")
        elif name not in given and value is not None:
            _check_value(name, shown, found.node, value, given)
            if Path(file or "").parent.name != PRETRAINED_MODEL:
                # What a checkpoint's own file says was not given now.
                _check_read(name, shown, found.node, value, command)


def _entries(
    content: Mapping[str, Any], chosen: Mapping[str, str | None], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Names and values of a file, down to where a value may have names of its own."""
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        node = settings.look_up(name, chosen).node
        if isinstance(value, dict) and node is not None and node["kind"] in ("section", "choice"):
            yield from _entries(value, chosen, name)
        else:
            yield name, value


def _texts(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a file, by name."""
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict):
            yield from _texts(value, name)
        elif isinstance(value, str):
            yield name, value


def unknown(name: str, chosen: Mapping[str, str | None], command: str) -> str:
    """What to say of a name that there is not."""
    owners = [kind for kind in _types_with(name) if kind != chosen.get(name.rpartition(".")[0])]
    section = name.rpartition(".")[0]
    if owners and chosen.get(section):
        return f"is a setting of {section}.type={' or '.join(owners)}; here it is {chosen[section]}"
    near = nearest(name, chosen, command)
    meant = f"did you mean {' or '.join(f'--{one}' for one in near)}? All" if near else "all"
    return f"there is no such setting; {meant} are listed by lerobot-pi-rl-{command} --help-all"


def _types_with(name: str) -> list[str]:
    """Types of the section that have a setting of this name."""
    section, _, part = name.rpartition(".")
    node = settings.look_up(section, {}).node if section else None
    types = node["types"] if node is not None and node["kind"] == "choice" else {}
    return [kind for kind, one in types.items() if part in one["fields"]]


def nearest(name: str, chosen: Mapping[str, str | None], command: str) -> list[str]:
    """Settings that may be meant by a name that there is not, the likeliest first."""
    known = [*own_options(command), *dict(settings.names(chosen))]
    spelled = name.replace("-", "_")
    if spelled in known:
        return [spelled]
    if own := difflib.get_close_matches(spelled, own_options(command), 1, 0.75):
        return own
    # The right name without its section, or in another one.
    elsewhere = [one for one in known if one.rpartition(".")[2] == spelled.rpartition(".")[2] and "." in one]
    ours = [one for one in elsewhere if one.startswith(("algorithm.", "policy.", "env."))] or elsewhere
    likely = difflib.get_close_matches(spelled, ours, 1, 0.0)
    return likely or difflib.get_close_matches(spelled, known, 1, 0.7)


def _written(name: str, value: str, chosen: Mapping[str, str | None]) -> str:
    """A value as the parser reads it: it knows only `true` and `false`."""
    node = settings.look_up(name, chosen).node
    return BOOLEANS.get(value.lower(), value) if node is not None and node["kind"] == "bool" else value


def _check_policy(given: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """Checks that there is a policy to begin with, where one is named."""
    if str(given.get("resume", inside(content, "resume"))).lower() == "true":
        # It comes from the run's own checkpoint, wherever it once began.
        return
    for name in (PATH, BASE_PATH):
        value = given.get(name) or inside(content, name)
        # The command line takes the place of what is in the file.
        if value and not (name not in given and (PATH in given or BASE_PATH in given)):
            _check_checkpoint(name, str(value))
    kind = given.get("policy.type") or inside(content, "policy.type")
    begins = any(given.get(name) or inside(content, name) for name in BEGINNINGS)
    begins = begins or any(name.startswith("policy.base.") for name in given)
    if kind in (None, "pi_rl") and not begins and (content or CONFIG_PATH not in given):
        raise Refused(
            f"`{PATH}`",
            "is missing, so there is nothing to improve; give the checkpoint of a policy that was trained on "
            "demonstrations (pi_rl, or a stock policy such as smolvla), or --policy.base.type=compact to begin with "
            "random weights",
        )


def _check_checkpoint(name: str, given: str) -> None:
    """Checks that a folder holds a policy of the right kind; a name on the hub is left to LeRobot."""
    folder = Path(given)
    file = folder / CONFIG
    if not file.is_file():
        if folder.exists() or folder.is_absolute() or len(folder.parts) > 2 or given.startswith("."):
            raise Refused(
                f"`{name}`", f"{folder} holds no policy (no {CONFIG}); name a pretrained_model folder"
            )
        return
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("type")
    except (OSError, ValueError, AttributeError):
        raise Refused(f"`{name}`", f"{file} cannot be read; take a whole checkpoint") from None
    policy = settings.tree()["fields"][POLICY]
    if kind in policy["others"]:
        raise Refused(
            f"`{name}`",
            f"{folder} holds a {kind!r}, which PI-RL does not train (docs/bases.md says why); take a checkpoint of one "
            f"of {policy['stock']}, or of 'pi_rl'",
        )


def _check_environment(given: Mapping[str, str], content: Mapping[str, Any], command: str) -> None:
    """Checks that there is an environment, and what it is made of."""
    kind = given.get("env.type") or inside(content, "env.type")
    if kind is None:
        if CONFIG_PATH not in given or content:
            raise Refused(
                "`env.type`",
                "is missing; online training needs an environment, such as that of "
                "--config_path=recipes/metaworld.json",
            )
        return
    host = str(given.get(HOST) or inside(content, HOST) or "127.0.0.1")
    if command == "learner" and not host.startswith(("127.", "localhost", "::1")):
        # Its actors are on other machines, and so are their simulators.
        return
    env = settings.tree()["fields"]["env"]["types"].get(kind, {})
    if "needs" in env and not is_installed(env["needs"]):
        raise Refused("`env.type`", env["install"])


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None
