"""From a base's configuration to its adapter."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import config_error
from .adapter import FlowBase

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig

BaseFactory = Callable[["PIRLConfig"], FlowBase]
_FACTORIES: dict[str, BaseFactory] = {}


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
        ConfigError: If no adapter is registered for it.
    """
    assert config.base is not None
    if config.base.type not in _FACTORIES:
        raise config_error(
            "policy.base.type", f"{config.base.type!r} has no adapter; have {sorted(_FACTORIES)}"
        )
    return _FACTORIES[config.base.type](config)


def _compact(config: "PIRLConfig") -> FlowBase:
    from .compact import CompactBase

    return CompactBase(config)


register_base("compact", _compact)
