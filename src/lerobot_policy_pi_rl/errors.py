"""The package's own errors: one line that says what is wrong, what would be right, and how to fix it."""

from draccus.utils import DecodingError


class ConfigError(DecodingError):
    """A setting that cannot work.

    It derives from draccus' decoding error because that is the one error LeRobot's parser turns into a single
    line (`error: ...`, exit code 1) instead of a stack trace.
    """

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


def check(condition: bool, setting: str, problem: str) -> None:
    """Raises a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(setting, problem)
