"""The options of the commands that do not read the configuration of a run: demos, export and status."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import settings
from .arguments import expanded
from .commands import COMMANDS, VERSION, versions
from .preflight import is_installed

DEFAULT_LEARNER = "127.0.0.1:50051"
DEMO_ENVIRONMENTS = ("metaworld_state", "metaworld_camera")


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, with the option that may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Ends with one line and exit code 1."""
        raise SystemExit(f"error: {self._with_near_match(message)}")

    def _with_near_match(self, message: str) -> str:
        given = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        known = [one.lstrip("-") for action in self._actions for one in action.option_strings]
        near = difflib.get_close_matches(given.lstrip("-").replace("-", "_"), known, 1) if given else []
        meant = f"; did you mean --{near[0]}?" if near else ""
        return f"{message}{meant} (see {self.prog} --help)"


def parse(command: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line of one of these commands.

    Args:
        command: Which.
        arguments: Without the program's name; None reads `sys.argv`.

    Raises:
        SystemExit: If it is wrong.
    """
    options: argparse.Namespace = PARSERS[command]().parse_args(arguments)
    return options


def look(command: str, options: argparse.Namespace) -> None:
    """Looks for what would end the command, before anything slow is imported.

    Raises:
        SystemExit: If there is something.
    """
    if command == "demos":
        _look_demos(options)


def _make(command: str) -> Parser:
    about = COMMANDS[command]
    parser = Parser(
        prog=f"lerobot-pi-rl-{command}",
        description=about.purpose,
        epilog="example:\n  " + "\n  ".join(about.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(VERSION, action="version", version=versions())
    return parser


def path(text: str) -> Path:
    """A path, with `~` replaced."""
    if not text:
        raise argparse.ArgumentTypeError("needs a value")
    return Path(expanded(text))


def demos_parser() -> Parser:
    """Options of `lerobot-pi-rl-demos`."""
    camera = settings.tree()["fields"]["env"]["types"]["metaworld_camera"]["fields"]["camera_size"]["default"]
    parser = _make("demos")
    parser.add_argument(
        "--task",
        "--env.task",
        dest="task",
        default="peg-insert-side-v3",
        help="task name, several separated by commas, MT10 or MT50",
    )
    parser.add_argument(
        "--env.type",
        dest="env_type",
        choices=DEMO_ENVIRONMENTS,
        default="metaworld_state",
        help="environment whose observations are recorded",
    )
    parser.add_argument(
        "--camera_size",
        "--env.camera_size",
        dest="camera_size",
        type=int,
        default=None,
        help=f"height and width of metaworld_camera's picture (default: {camera})",
    )
    parser.add_argument("--num_episodes", type=int, default=10, help="episodes to keep per task")
    parser.add_argument(
        "--task_episodes",
        type=task_episodes,
        default={},
        metavar="TASK=COUNT,...",
        help="episodes to keep of single tasks, in place of --num_episodes",
    )
    parser.add_argument("--seed", type=int, default=0, help="block of reset seeds, 0 to 49")
    parser.add_argument(
        "--action_noise",
        type=float,
        default=0.0,
        help="standard deviation of the noise on the executed action; the expert's own action is recorded",
    )
    parser.add_argument(
        "--episode_length",
        "--env.episode_length",
        dest="episode_length",
        type=int,
        default=200,
        help="control steps after which the expert has failed",
    )
    parser.add_argument("--keep_failures", action="store_true", help="keep unsolved episodes, too")
    parser.add_argument("--repo_id", default="local/metaworld-demos", help="name of the dataset; no upload")
    parser.add_argument("--root", type=path, default=None, help="folder to create (default: LeRobot's cache)")
    return parser


def task_episodes(text: str) -> dict[str, int]:
    """Reads `task=count,...`.

    Raises:
        argparse.ArgumentTypeError: If it is not of that form, or names a task twice.
    """
    pairs = [entry.partition("=") for entry in text.split(",")]
    if not all(name and count.isdecimal() for name, _, count in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form reach-v3=5,push-v3=10")
    counts = {name.strip(): int(count) for name, _, count in pairs}
    if len(counts) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a task twice")
    return counts


def _look_demos(options: argparse.Namespace) -> None:
    """What can be known before the simulator is imported."""
    if options.root is not None and options.root.exists():
        raise SystemExit(f"error: {options.root} exists already: choose another --root, or remove it first")
    env = settings.tree()["fields"]["env"]["types"][options.env_type]
    if not is_installed(env["needs"]):
        raise SystemExit(f"error: `env.type`: {env['install']}")


def export_parser() -> Parser:
    """Options of `lerobot-pi-rl-export`."""
    parser = _make("export")
    parser.add_argument(
        "--policy.path", dest="path", type=path, required=True, help="a `pretrained_model` folder of pi_rl"
    )
    parser.add_argument("--output_dir", type=path, required=True, help="folder to create")
    return parser


def status_parser() -> Parser:
    """Options of `lerobot-pi-rl-status`."""
    parser = _make("status")
    parser.add_argument(
        "--learner", type=address, default=DEFAULT_LEARNER, metavar="HOST:PORT", help="where it listens"
    )
    parser.add_argument("--json", action="store_true", help="print everything, for programs")
    for name in ("token_file", "certificate", "key", "authority"):
        parser.add_argument(f"--{name}", type=expanded, help=f"as algorithm.security.{name} of an actor")
    parser.add_argument("--mutual", action="store_true", help="as algorithm.security.mutual of an actor")
    return parser


def address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        argparse.ArgumentTypeError: If it is not that.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give one such as {DEFAULT_LEARNER}")
    return host.strip("[]"), int(port)


PARSERS: dict[str, Any] = {"demos": demos_parser, "export": export_parser, "status": status_parser}
