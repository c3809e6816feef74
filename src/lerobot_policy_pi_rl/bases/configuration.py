"""Which base policies exist: a registry of their configurations."""

from dataclasses import dataclass
from typing import Any

import draccus
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.xvla.configuration_xvla import XVLAConfig

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


@dataclass(frozen=True)
class Sizes:
    """Sizes that the policy takes over from its base where its own settings are 0.

    Attributes:
        chunk_size: Actions H of a chunk.
        n_action_steps: How many of them are executed.
        num_inference_steps: Denoising steps K.
    """

    chunk_size: int
    n_action_steps: int
    num_inference_steps: int


# Of the compact base.
COMPACT_SIZES = Sizes(chunk_size=5, n_action_steps=5, num_inference_steps=4)
# Field of a stock policy's configuration with the number of denoising steps, by the policy's name.
STEPS_FIELD: dict[str, str] = {}


def get_sizes(base: Any) -> Sizes:
    """The sizes that a base's configuration names.

    Raises:
        ConfigError: If nobody has registered this base.
    """
    if isinstance(base, CompactConfig):
        return COMPACT_SIZES
    if base.type not in STEPS_FIELD:
        raise config_error(
            "policy.base.type", f"{base.type!r} has no adapter; have {['compact', *STEPS_FIELD]}"
        )
    return Sizes(base.chunk_size, base.n_action_steps, getattr(base, STEPS_FIELD[base.type]))


def set_sizes(base: Any, sizes: Sizes) -> None:
    """Writes sizes into a stock policy's configuration."""
    if isinstance(base, CompactConfig):
        return
    base.chunk_size, base.n_action_steps = sizes.chunk_size, sizes.n_action_steps
    setattr(base, STEPS_FIELD[base.type], sizes.num_inference_steps)


def register_base_config(config_class: type, steps_field: str = "num_inference_steps") -> None:
    """Makes the configuration of a stock policy one that `policy.base` can hold.

    It stays the class that it is, under the name that it has with LeRobot. Here it counts as a `BaseConfig`, so that
    its name is written along with its settings.

    Args:
        config_class: The configuration, registered with LeRobot; it has `chunk_size` and `n_action_steps`.
        steps_field: Its field with the number of denoising steps.
    """
    name = PreTrainedConfig.get_choice_name(config_class)
    BaseConfig.register_subclass(name, config_class)
    BaseConfig.register(config_class)
    STEPS_FIELD[name] = steps_field


def load_stock_config(path: str) -> Any:
    """Configuration of the stock policy in a checkpoint.

    Args:
        path: Folder, or name on the hub.

    Raises:
        ConfigError: If there is none, or the policy is no base.
    """
    try:
        config = PreTrainedConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        problem = f"{path!r} cannot be read as a LeRobot checkpoint ({' '.join(str(error).split())[:200]})"
        raise config_error("policy.base_path", problem) from None
    if not isinstance(config, BaseConfig):
        raise config_error(
            "policy.base_path",
            f"{path!r} holds a {config.type!r}, which is no base; the bases are {sorted(STEPS_FIELD)}, and a "
            "pi_rl checkpoint is given as policy.path",
        )
    return config


register_base_config(PI0Config)
register_base_config(PI05Config)
register_base_config(SmolVLAConfig, "num_steps")
register_base_config(XVLAConfig, "num_denoising_steps")

# LeRobot's own policies that are no base here. They are registered so that naming one is answered in one line, where
# the parser alone would print its whole usage first.
NOT_FLOW_MATCHING = ("act", "diffusion", "gaussian_actor", "pi0_fast", "tdmpc", "vqbet")


def _register_refusal(name: str) -> None:
    """Registers a base whose configuration cannot be made."""

    @dataclass
    class RefusedConfig(BaseConfig):
        """A policy of LeRobot's that cannot be a base."""

        def __post_init__(self) -> None:
            """Says why not."""
            raise config_error(
                "policy.base.type",
                f"{name!r} is not a flow-matching policy, so its steps have no Gaussian to score; use 'compact'",
            )

    BaseConfig.register_subclass(name, RefusedConfig)


for _name in NOT_FLOW_MATCHING:
    _register_refusal(_name)
