"""Which extra of this package installs what a base needs."""

from collections.abc import Iterator
from contextlib import contextmanager

from lerobot.utils.import_utils import require_package

from ..errors import config_error

# By the base's name.
EXTRAS = {
    "eo1": "eo1",
    "evo1": "evo1",
    "groot": "groot",
    "molmoact2": "molmoact2",
    "multi_task_dit": "multi_task_dit",
    "pi0": "pi",
    "pi05": "pi",
    "smolvla": "smolvla",
    "vla_jepa": "vla_jepa",
    "xvla": "xvla",
}
# LeRobot's errors go on with an extra of its own.
THEIR_FIX = " Install it with"


@contextmanager
def naming_extra(name: str) -> Iterator[None]:
    """Turns the error of a missing package into one line with the extra that installs it.

    Args:
        name: The base's; the errors of one that is not this package's are its own.

    Raises:
        ConfigError: If a package is missing.
    """
    try:
        yield
    except ImportError as error:
        if name not in EXTRAS:
            raise
        missing = " ".join(str(error).split()).partition(THEIR_FIX)[0][:120].rstrip(".")
        raise config_error(
            "policy.base.type",
            f"{name!r} needs packages that are not installed ({missing}): "
            f"pip install 'lerobot_policy_pi_rl[{EXTRAS[name]}]'",
        ) from None


def require_transformers(name: str) -> None:
    """Checks that there is what every base of LeRobot's is built with, before its configuration is.

    Some of LeRobot's configurations need it themselves, and would raise an error that the parser spreads over lines.
    """
    if name in EXTRAS:
        with naming_extra(name):
            require_package("transformers", EXTRAS[name])
