"""Which base policies exist: a registry of their configurations."""

from dataclasses import dataclass
from typing import Any

import draccus

from ..errors import config_error

# Observation key under which the preprocessor puts the hashed task text.
TASK_EMBEDDING = "observation.task_embedding"


@dataclass
class BaseConfig(draccus.ChoiceRegistry):
    """Registry of flow-matching base policies.

    A registry of its own, because a field typed `PreTrainedConfig` inside a policy configuration makes draccus
    expand every registered policy inside every other one without end.
    """

    @property
    def type(self) -> str:
        """Registered name of this base."""
        return self.get_choice_name(self.__class__)

    @classmethod
    def default_choice_name(cls) -> str:
        """The base that is meant when only its settings are given."""
        return "compact"

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        """Configuration class of a base; an unknown name is one clear line."""
        choices = cls.get_known_choices()
        if name not in choices:
            raise config_error(
                "policy.base.type",
                f"{name!r} is not a flow-matching base policy; choose one of {sorted(choices)}",
            )
        return choices[name]


@BaseConfig.register_subclass("compact")
@dataclass
class CompactConfig(BaseConfig):
    """A small flow-matching chunk policy that trains and runs on a CPU, with no downloads."""

    # Width of the hidden layers.
    hidden_dim: int = 192
    # Number of residual blocks of the velocity network.
    num_blocks: int = 3
    # Number of sine and cosine features of the denoising time.
    time_dim: int = 32
    # Width of the hashed task embedding; 0 leaves the task text out (a single-task policy).
    task_dim: int = 64
    # Width of each camera's features after the convolutional encoder.
    image_dim: int = 128
    # Normalised state components are clipped to this many standard deviations.
    state_clip: float = 8.0


# LeRobot's own policies that are no base here. They are registered so that naming one is answered in one line, where
# the parser alone would print its whole usage first.
NOT_FLOW_MATCHING = ("act", "diffusion", "gaussian_actor", "pi0_fast", "tdmpc", "vqbet")
WITHOUT_ADAPTER = ("pi0", "pi05", "smolvla", "xvla")


def _register_refusal(name: str, reason: str) -> None:
    """Registers a base whose configuration cannot be made."""

    @dataclass
    class RefusedConfig(BaseConfig):
        """A policy of LeRobot's that cannot be a base."""

        def __post_init__(self) -> None:
            """Says why not."""
            raise config_error("policy.base.type", f"{name!r} {reason}; use 'compact'")

    BaseConfig.register_subclass(name, RefusedConfig)


for _name in NOT_FLOW_MATCHING:
    _register_refusal(_name, "is not a flow-matching policy, so its steps have no Gaussian to score")
for _name in WITHOUT_ADAPTER:
    _register_refusal(_name, "has no adapter in this release")
