"""What every command shares: plugins, logging, signals, and errors of one line."""

import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Timer
from typing import Any

import yaml
from draccus.utils import DraccusException
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError
from lerobot.utils.import_utils import register_third_party_plugins
from tqdm import tqdm

from ..algorithm.pi_rl import RatioError
from ..bases.configuration import STOCK, BaseConfig
from ..errors import config_error
from ..runtime.checkpoint import CheckpointError
from ..runtime.gather import NothingUsable
from ..runtime.workers import EnvironmentFailed

PACKAGE = "lerobot_policy_pi_rl"
POLICY_PATH, BASE_PATH, CONFIG_PATH = "--policy.path", "--policy.base_path", "--config_path"
BASE_TYPE = "--policy.base.type"
# What LeRobot and this module look up before the parser does, and only as `--name=value`.
LOOKED_UP = (POLICY_PATH, BASE_PATH, CONFIG_PATH, BASE_TYPE, "--resume")
# Has LeRobot import a package, which may register bases, when it parses the command line.
DISCOVER = ".discover_packages_path"


# Seconds that a process which is asked to leave while it starts gets for its environments and its robot.
LEAVE_S = 5.0


class StoppedEarly(BaseException):
    """The process was asked to leave before its work began."""


def run_command(command: Callable[[], None]) -> None:
    """Runs a command; an expected error is one line on stderr and exit code 1, never a stack trace.

    Args:
        command: Does the work.

    Raises:
        SystemExit: With code 1 after an error, 0 when it was asked to leave before its work began.
    """
    logging.getLogger().setLevel(logging.WARNING)
    register_third_party_plugins()
    try:
        sys.argv[1:] = wrap_stock_policy(joined(sys.argv[1:]))
        command()
    except EXPECTED_ERRORS as error:
        logging.getLogger(__name__).debug("Ended by", exc_info=True)
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except StoppedEarly:
        print("stopped while starting; there was nothing to save", file=sys.stderr, flush=True)
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("stopped at once; nothing was saved", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def joined(arguments: Sequence[str]) -> list[str]:
    """Writes `--name value` as `--name=value`, where LeRobot would overlook the former."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in LOOKED_UP and not argument.startswith("--"):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result


def wrap_stock_policy(arguments: Sequence[str]) -> list[str]:
    """Turns a stock checkpoint as `policy.path` into the `pi_rl` policy that begins with it.

    LeRobot would parse the settings of the checkpoint's own class, which knows nothing of exploration. The path may be
    on the command line or in the configuration file; on the command line it takes the place of what is in the file.

    Args:
        arguments: A command line; one whose checkpoint is a `pi_rl` policy is left as it is.

    Raises:
        ConfigError: If there are settings of a base beside the checkpoint that brings its own, or the checkpoint, or
            the named base, is of a policy that PI-RL does not train.
    """
    _refuse_unknown_base(arguments)
    file = _value(arguments, CONFIG_PATH)
    policy = _policy_section(file)
    path = _value(arguments, POLICY_PATH) or policy.get("path")
    config = _find_config(str(path)) if path else None
    kind = json.loads(config.read_text(encoding="utf-8")).get("type") if config else None
    if kind not in STOCK:
        _refuse_other_policy(arguments, str(path), kind)
        _refuse_two_bases(arguments, _value(arguments, BASE_PATH) or policy.get("base_path"), policy)
        return list(arguments)
    kept = [a for a in arguments if a.partition("=")[0] != POLICY_PATH]
    # A resumed run has the policy of its checkpoint, wherever the file says that it began.
    if file is not None and policy and _value(arguments, "--resume") != "true":
        begun = {
            name: value for name, value in policy.items() if name not in ("path", "base_path", "base", "type")
        }
        kept = [a for a in kept if a.partition("=")[0] != CONFIG_PATH]
        kept.append(f"{CONFIG_PATH}={_without_base(file, begun)}")
    _refuse_two_bases(kept, path, {})
    return [*kept, "--policy.type=pi_rl", f"{BASE_PATH}={path}"]


def _refuse_unknown_base(arguments: Sequence[str]) -> None:
    """A name that is no base is answered in one line, where the parser would print its whole usage."""
    kind = _value(arguments, BASE_TYPE)
    if kind is not None and not _may_register(arguments):
        BaseConfig.get_choice_class(kind)


def _refuse_other_policy(arguments: Sequence[str], path: str, kind: str | None) -> None:
    """A checkpoint that is neither `pi_rl` nor a base: LeRobot would parse the other settings as its own."""
    if kind not in (None, "pi_rl") and not _may_register(arguments):
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


def _policy_section(file: str | None) -> dict[str, Any]:
    """What a configuration file says of the policy; nothing where LeRobot's parser will say what is wrong with it."""
    if file is None or not Path(file).is_file():
        return {}
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    policy = content.get("policy") if isinstance(content, dict) else None
    return policy if isinstance(policy, dict) else {}


def _without_base(file: str, policy: dict[str, Any]) -> str:
    """A copy of a configuration file with another section of the policy, which this process removes when it ends."""
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) | {"policy": {"type": "pi_rl", **policy}}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False, encoding="utf-8") as copy:
        json.dump(content, copy)
    atexit.register(Path(copy.name).unlink, missing_ok=True)
    return copy.name


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


# Errors that say what to do; anything else is a defect and keeps its stack trace.
EXPECTED_ERRORS = (
    DraccusException,
    CheckpointError,
    EnvironmentFailed,
    NothingUsable,
    RatioError,
    OSError,
    ValueError,
)


def one_line(error: BaseException) -> str:
    """The text of an error, on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


class ConsoleHandler(logging.Handler):
    """Shows what a user should see, above the progress bar: our own notes, and everybody's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record on stderr; a terminal that was closed is no reason to end a run."""
        if record.levelno >= logging.WARNING or record.name.startswith(PACKAGE):
            with contextlib.suppress(OSError):
                tqdm.write(self.format(record), file=sys.stderr)


class LogFile(logging.FileHandler):
    """The log on the disk. While that is full, lines are lost; the console has those that matter."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leaves out the stack trace that logging would print for every line."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def log_to(file: Path) -> None:
    """Sends the log of this process to a file, and the part that a user should see to stderr as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    to_file, to_console = LogFile(file, encoding="utf-8"), ConsoleHandler()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_console.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(to_file)
    root.addHandler(to_console)
    root.setLevel(logging.INFO)


def leave_on_signals() -> Event:
    """Has Ctrl-C and SIGTERM end this process at once, while it builds what it needs: there is nothing to save yet.

    What was built is closed on the way out; where that takes too long, or somebody holds the exception back, the
    process ends without, and the workers of environments with it.

    Returns:
        The event for `stop_on_signals`, set as well.
    """
    stop = Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            return
        stop.set()
        late = Timer(LEAVE_S, os._exit, [0])
        late.daemon = True
        late.start()
        raise StoppedEarly

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def stop_on_signals(stop: Event) -> None:
    """Has Ctrl-C and SIGTERM set an event from now on; a second Ctrl-C ends the process at once."""

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
