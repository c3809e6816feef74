"""A command line of ours, completed for LeRobot's parser.

LeRobot looks up some settings before its parser does, and only where they stand on the command line. Its parser wants
the type of a section before it takes a setting of it.
"""

import atexit
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError

from ..bases.configuration import STOCK, BaseConfig
from ..errors import config_error
from ..runtime.settings import read_configuration

POLICY_PATH, BASE_PATH, CONFIG_PATH = "--policy.path", "--policy.base_path", "--config_path"
POLICY_TYPE, BASE_TYPE, ALGORITHM_TYPE = "--policy.type", "--policy.base.type", "--algorithm.type"
PRETRAINED_PATH, RESUME = "--policy.pretrained_path", "--resume"
OURS = "pi_rl"
# What LeRobot and this module look up before the parser does, and only as `--name=value`.
LOOKED_UP = (
    POLICY_PATH,
    BASE_PATH,
    CONFIG_PATH,
    POLICY_TYPE,
    BASE_TYPE,
    ALGORITHM_TYPE,
    PRETRAINED_PATH,
    RESUME,
)
# Has LeRobot import a package, which may register bases, when it parses the command line.
DISCOVER = ".discover_packages_path"


def completed(arguments: Sequence[str]) -> list[str]:
    """A command line that LeRobot's parser reads as it is meant.

    Args:
        arguments: As the user has given them.

    Raises:
        ConfigError: If there is no policy to begin with, or not one that PI-RL trains.
    """
    if {"--help", "-h"} & {*arguments}:
        return list(arguments)
    result = with_policy(joined(arguments))
    file = read_configuration(_value(result, CONFIG_PATH))
    if file is not None and "type" not in _section(file, "algorithm") and not _value(result, ALGORITHM_TYPE):
        result.append(f"{ALGORITHM_TYPE}={OURS}")
    return result


def joined(arguments: Sequence[str]) -> list[str]:
    """Writes `--name value` as `--name=value`, where LeRobot would overlook the former."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in LOOKED_UP and not argument.startswith("--"):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result


def with_policy(arguments: Sequence[str]) -> list[str]:
    """Says on the command line which policy a run begins with, where that stands in the configuration file.

    A stock checkpoint as `policy.path` becomes the `pi_rl` policy that begins with it: LeRobot would parse the settings
    of the checkpoint's own class, which knows nothing of exploration. A checkpoint on the command line takes the place
    of what the file begins with.

    Args:
        arguments: A command line.

    Raises:
        ConfigError: If there are settings of a base beside the checkpoint that brings its own, if the checkpoint, or
            the named base, is of a policy that PI-RL does not train, or if there is nothing to begin with.
    """
    _refuse_unknown_base(arguments)
    content = read_configuration(_value(arguments, CONFIG_PATH))
    policy = _section(content or {}, "policy")
    base_path = _value(arguments, BASE_PATH)
    _refuse_two_checkpoints(arguments)
    path = _value(arguments, POLICY_PATH) or (None if base_path else policy.get("path"))
    if path:
        config = _find_config(str(path))
        kind = json.loads(config.read_text(encoding="utf-8")).get("type") if config else None
        if kind not in STOCK:
            _refuse_other_policy(arguments, str(path), kind)
            # LeRobot's parser leaves out what is beside a path that it finds on the command line, and only there: it
            # overrides the checkpoint's settings (`PIRLTrainConfig`).
            kept = _without(arguments, POLICY_PATH, f"{POLICY_TYPE}={OURS}")
            if content and policy and "path" not in policy:
                kept = _with_copy(kept, content, {"path": path, **_begun(policy)})
            return [*kept, f"{POLICY_PATH}={path}"]
    if path or (base_path and "path" in policy):
        return _begin_with_stock(arguments, str(path or base_path), content, policy)
    _refuse_two_bases(arguments, base_path or policy.get("base_path"), policy)
    kind = _value(arguments, POLICY_TYPE) or policy.get("type")
    if content is not None:
        _refuse_nothing(arguments, kind, policy)
    # In a file of the hub there may be another type.
    return [*arguments, *([f"{POLICY_TYPE}={OURS}"] if kind is None and content is not None else [])]


def with_path(arguments: Sequence[str]) -> list[str]:
    """The same for a command that trains any policy of LeRobot's: what may be given beside a path must find it."""
    arguments = joined(arguments)
    policy = _section(read_configuration(_value(arguments, CONFIG_PATH)) or {}, "policy")
    if "path" not in policy or _value(arguments, POLICY_PATH) or _value(arguments, POLICY_TYPE):
        return arguments
    return [*arguments, f"{POLICY_PATH}={policy['path']}"]


def _begin_with_stock(
    arguments: Sequence[str], path: str, content: dict[str, Any] | None, policy: dict[str, Any]
) -> list[str]:
    """Begins with a stock checkpoint, whatever the file begins with."""
    kept = _without(arguments, POLICY_PATH, BASE_PATH, f"{POLICY_TYPE}={OURS}")
    # A resumed run has the policy of its checkpoint, wherever the file says that it began.
    if content and policy and _value(arguments, RESUME) != "true":
        kept = _with_copy(kept, content, {"type": OURS, **_begun(policy)})
    _refuse_two_bases(kept, path, {})
    return [*kept, f"{POLICY_TYPE}={OURS}", f"{BASE_PATH}={path}"]


def _refuse_nothing(arguments: Sequence[str], kind: object, policy: dict[str, Any]) -> None:
    """A policy with random weights is no accident that anybody wants to wait for."""
    begins = any(policy.get(name) for name in ("base", "base_path", "pretrained_path")) or any(
        argument.startswith((f"{BASE_PATH}=", f"{PRETRAINED_PATH}=", "--policy.base."))
        for argument in arguments
    )
    if kind in (None, OURS) and not begins and _value(arguments, RESUME) != "true":
        raise config_error(
            "policy.path",
            "is missing, so there is nothing to improve; give the checkpoint of a policy that was trained on "
            "demonstrations (pi_rl, or a stock policy such as smolvla), or --policy.base.type=compact to begin with "
            "random weights",
        )


def _refuse_unknown_base(arguments: Sequence[str]) -> None:
    """A name that is no base is answered in one line, where the parser would print its whole usage."""
    kind = _value(arguments, BASE_TYPE)
    if kind is not None and not _may_register(arguments):
        BaseConfig.get_choice_class(kind)


def _refuse_other_policy(arguments: Sequence[str], path: str, kind: str | None) -> None:
    """A checkpoint that is neither `pi_rl` nor a base: LeRobot would parse the other settings as its own."""
    given = _value(arguments, POLICY_TYPE)
    if given not in (None, OURS, kind):
        raise config_error(
            "policy.type",
            f"{given!r} does not fit policy.path={path}, which holds a {kind or OURS!r}; leave it out",
        )
    if kind not in (None, OURS) and not _may_register(arguments):
        raise config_error(
            "policy.path",
            f"{path} holds a {kind!r}, which PI-RL does not train (docs/bases.md says why); take a checkpoint of one "
            f"of {sorted(STOCK)}, or of 'pi_rl'",
        )


def _may_register(arguments: Sequence[str]) -> bool:
    """Whether the parser will import a package that may bring policies and bases of its own."""
    return any(a.partition("=")[0].endswith(DISCOVER) for a in arguments)


def _value(arguments: Sequence[str], name: str) -> str | None:
    """What the command line gives a setting; the last one counts."""
    return next((a.partition("=")[2] for a in reversed(arguments) if a.startswith(f"{name}=")), None)


def _without(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments but for those that set one of these names, or are one of these as they stand."""
    return [a for a in arguments if a not in names and a.partition("=")[0] not in names]


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a configuration file; nothing where LeRobot's parser will say what is wrong with it."""
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _begun(policy: dict[str, Any]) -> dict[str, Any]:
    """What a file says of the policy beside where to begin."""
    return {
        name: value for name, value in policy.items() if name not in ("path", "base_path", "base", "type")
    }


def _with_copy(arguments: Sequence[str], content: dict[str, Any], policy: dict[str, Any]) -> list[str]:
    """Names a copy of the configuration file with another policy, which this process removes when it ends."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False, encoding="utf-8") as copy:
        json.dump({**content, "policy": policy}, copy)
    atexit.register(Path(copy.name).unlink, missing_ok=True)
    return [*_without(arguments, CONFIG_PATH), f"{CONFIG_PATH}={copy.name}"]


def _refuse_two_checkpoints(arguments: Sequence[str]) -> None:
    """Only one of them could be read."""
    path, base_path = _value(arguments, POLICY_PATH), _value(arguments, BASE_PATH)
    if path and base_path:
        raise config_error(
            "policy.base_path", f"{base_path} beside policy.path={path}; leave one of them out"
        )


def _refuse_two_bases(arguments: Sequence[str], base_path: object, policy: dict[str, Any]) -> None:
    """A checkpoint and settings of a base exclude each other: the settings would replace all of the checkpoint's."""
    given = next(
        (a.partition("=")[0].removeprefix("--") for a in arguments if a.startswith("--policy.base.")), None
    )
    # A file that this package has written names both: the base as it was found in the checkpoint.
    if given is None and "base" in policy and "base_path" not in policy:
        given = "policy.base"
    if base_path and given:
        raise config_error(
            given,
            f"would replace all settings of the checkpoint {base_path}; leave it out, or change {CONFIG_NAME} in "
            "a copy of that folder (policy.dtype sets its precision)",
        )


def _find_config(path: str) -> Path | None:
    """The configuration of a checkpoint in a folder, or on the hub; None if there is none."""
    if (Path(path) / CONFIG_NAME).is_file():
        return Path(path) / CONFIG_NAME
    if Path(path).exists():
        return None
    try:
        return Path(hf_hub_download(path, CONFIG_NAME))
    except (OSError, ValueError, HfHubHTTPError):
        # No name of the hub, not there, or out of reach: LeRobot asks for it again, and says so.
        return None
