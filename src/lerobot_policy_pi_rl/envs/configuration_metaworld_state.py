"""Configuration of the state-based MetaWorld environment; loads no simulator."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.envs.configuration_metaworld import STOCK_STATE_SIZE, MetaworldConfig
from lerobot_policy_pi_rl.errors import check

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.metaworld_state import MetaworldStateGym

RENDER_MODES = (None, "rgb_array")
RELATIVE_SIZE = 9


@EnvConfig.register_subclass("metaworld_state")
@dataclass
class MetaworldStateEnv(MetaworldConfig):
    """MetaWorld seen through its simulator state, goal included, instead of through cameras."""

    # Append object - hand, goal - object and goal - hand (3 numbers each, metres) to MetaWorld's 39.
    relative_features: bool = True

    # None: never renders, and `render` gives a picture of a notice. "rgb_array": `render` gives a 480 x 480 picture.
    render_mode: str | None = None

    # The environment's names -> LeRobot's names.
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.render_mode in RENDER_MODES,
            "env.render_mode",
            f"must be null or 'rgb_array'; got {self.render_mode!r}",
        )

    @property
    def observed_features(self) -> dict[str, PolicyFeature]:
        """The state alone."""
        return {"agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(self.state_size,))}

    @property
    def state_size(self) -> int:
        """Length of the observed state: 48, or 39 without the relative features."""
        return STOCK_STATE_SIZE + (RELATIVE_SIZE if self.relative_features else 0)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `MetaworldStateGym`, except the task."""
        return {
            **super().gym_kwargs,
            "relative_features": self.relative_features,
            "render_mode": self.render_mode,
        }

    def make_env(self, task: str) -> "MetaworldStateGym":
        """Creates one environment; its simulator is loaded at the first reset.

        Args:
            task: A task name.
        """
        from lerobot_policy_pi_rl.envs.metaworld_state import MetaworldStateGym

        return MetaworldStateGym(task, **self.gym_kwargs)
