"""From a base's configuration to its adapter."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from .adapter import FlowBase
from .extras import naming_extra

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
        ConfigError: If a package that it needs is missing.
    """
    assert config.base is not None
    with naming_extra(config.base.type):
        return _FACTORIES[config.base.type](config)


def _lazy(module: str, name: str) -> BaseFactory:
    """A factory that imports its adapter when it is asked for one."""

    def make(config: "PIRLConfig") -> FlowBase:
        return getattr(importlib.import_module(f".{module}", __package__), name)(config)

    return make


register_base("compact", _lazy("compact", "CompactBase"))
register_base("eo1", _lazy("eo1", "EO1Base"))
register_base("evo1", _lazy("evo1", "Evo1Base"))
register_base("groot", _lazy("groot", "GrootBase"))
register_base("molmoact2", _lazy("molmoact2", "MolmoAct2Base"))
register_base("multi_task_dit", _lazy("multi_task_dit", "MultiTaskDiTBase"))
register_base("pi0", _lazy("pi0", "PI0Base"))
register_base("pi05", _lazy("pi0", "PI05Base"))
register_base("smolvla", _lazy("smolvla", "SmolVLABase"))
register_base("xvla", _lazy("xvla", "XVLABase"))
register_base("vla_jepa", _lazy("vla_jepa", "VLAJEPABase"))
