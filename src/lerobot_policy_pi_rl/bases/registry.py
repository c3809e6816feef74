"""From a base's configuration to its adapter."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import config_error
from .adapter import FlowBase

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig

BaseFactory = Callable[["PIRLConfig"], FlowBase]
_FACTORIES: dict[str, BaseFactory] = {}
# Extra of this package that installs what a base needs.
EXTRAS = {"pi0": "pi", "pi05": "pi", "smolvla": "smolvla"}


def register_base(name: str, factory: BaseFactory) -> None:
    """Registers the adapter of a base.

    Args:
        name: Name under which its configuration is registered in `BaseConfig`.
        factory: Builds the adapter from the policy's configuration.
    """
    _FACTORIES[name] = factory


def make_base(config: "PIRLConfig") -> FlowBase:
    """Builds the adapter named by `config.base`.

    Raises:
        ConfigError: If a package that it needs is missing.
    """
    assert config.base is not None
    try:
        return _FACTORIES[config.base.type](config)
    except ImportError as error:
        extra = EXTRAS.get(config.base.type)
        if extra is None:
            raise
        raise config_error(
            "policy.base.type",
            f"{config.base.type!r} needs packages that are not installed ({' '.join(str(error).split())[:120]}): "
            f"pip install 'lerobot_policy_pi_rl[{extra}]'",
        ) from None


def _compact(config: "PIRLConfig") -> FlowBase:
    from .compact import CompactBase

    return CompactBase(config)


def _pi0(config: "PIRLConfig") -> FlowBase:
    from .pi0 import PI0Base

    return PI0Base(config)


def _pi05(config: "PIRLConfig") -> FlowBase:
    from .pi0 import PI05Base

    return PI05Base(config)


def _smolvla(config: "PIRLConfig") -> FlowBase:
    from .smolvla import SmolVLABase

    return SmolVLABase(config)


register_base("compact", _compact)
register_base("pi0", _pi0)
register_base("pi05", _pi05)
register_base("smolvla", _smolvla)
