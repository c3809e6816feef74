"""The package's own errors: one line that says what is wrong, what would be right, and how to fix it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from draccus.utils import DecodingError

# LeRobot's own commands keep a replay buffer of single steps and cannot carry chunks and their denoising records.
STOCK_COMMANDS = {
    "lerobot.rl.learner": "lerobot-pi-rl-learner",
    "lerobot.rl.actor": "lerobot-pi-rl-actor",
}


class ConfigError(DecodingError):
    """A setting that cannot work."""

    def __init__(self, setting: str, problem: str):
        """Names the setting and the problem.

        Args:
            setting: Dotted name as on the command line, such as `policy.num_inference_steps`.
            problem: What is wrong with it and what would be right.
        """
        super().__init__(tuple(setting.split(".")), problem)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Rebuilds the error from its own two arguments when it is sent between processes."""
        return type(self), (".".join(self.key_path), self.message)

    def strip_prefix(self, prefix: Sequence[str]) -> "ConfigError":
        """Keeps the whole name, which is that of the command line wherever draccus met it."""
        return self


def config_error(setting: str, problem: str) -> BaseException:
    """The error to raise for a setting that cannot work.

    In a program it is a `ConfigError`. In one of LeRobot's commands or ours it is a `SystemExit` that prints one line:
    draccus would wrap any other error in lines of its own, and LeRobot resolves `--policy.path` where nothing catches.

    Args:
        setting: Dotted name as on the command line.
        problem: What is wrong with it and what would be right.
    """
    error = ConfigError(setting, problem)
    return SystemExit(f"error: {error}") if in_command() else error


def check(condition: bool, setting: str, problem: str) -> None:
    """Raises a `config_error` unless the condition holds."""
    if not condition:
        raise config_error(setting, problem)


def running_module() -> str:
    """Name of the module that this process runs (`python -m name`), or nothing."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) or ""


def in_command() -> bool:
    """Whether this process is one of LeRobot's commands or ours."""
    module = running_module()
    return Path(sys.argv[0]).name.startswith("lerobot-") or module.startswith(
        ("lerobot.", "lerobot_pi_rl_launcher")
    )


def refuse_stock_command() -> None:
    """Leaves LeRobot's own learner and actor with one line that names the command to use instead.

    Raises:
        SystemExit: Under `python -m lerobot.rl.learner` or `lerobot.rl.actor`.
    """
    running = running_module()
    if running in STOCK_COMMANDS:
        raise SystemExit(
            f"error: {running} keeps a replay buffer of single steps and cannot train pi_rl; "
            f"run {STOCK_COMMANDS[running]} with the same arguments instead"
        )
