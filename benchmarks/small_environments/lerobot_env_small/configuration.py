"""What LeRobot needs to know of the environments before it makes them."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_STATE


@dataclass(frozen=True)
class Sizes:
    """Lengths of an environment's vectors, and of its episodes.

    Attributes:
        state: Numbers that are observed.
        action: Numbers of an action.
        limit: Time limit in control steps.
    """

    state: int
    action: int
    limit: int


SIZES = {
    "PointMass-v0": Sizes(state=6, action=2, limit=40),
    "Pendulum-v0": Sizes(state=3, action=1, limit=60),
    "PushTState-v0": Sizes(state=6, action=2, limit=100),
    "Reacher-v0": Sizes(state=8, action=2, limit=60),
    "Arm-v0": Sizes(state=13, action=7, limit=50),
}


@EnvConfig.register_subclass("small")
@dataclass
class SmallEnvConfig(EnvConfig):
    """One of the small environments, by `task`. The reward is 1 at the step that solves it, else 0."""

    # Name of the environment: a key of `SIZES`.
    task: str | None = "PointMass-v0"

    # Control steps per second.
    fps: int = 20

    # Time limit in control steps; null takes the environment's own.
    episode_length: int | None = None

    # What the environment yields and takes, in its own names. Filled in from `task`.
    features: dict[str, PolicyFeature] = field(default_factory=dict)

    # The environment's names -> LeRobot's names.
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    def __post_init__(self) -> None:
        """Looks the sizes up."""
        if self.task not in SIZES:
            raise ValueError(f"env.task: {self.task!r} is unknown; choose one of {', '.join(SIZES)}")
        sizes = SIZES[self.task]
        self.episode_length = self.episode_length or sizes.limit
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(sizes.action,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(sizes.state,)),
        }

    @property
    def package_name(self) -> str:
        """The package that registers the environments with Gymnasium."""
        return "lerobot_env_small"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `gymnasium.make`, which cuts episodes at the time limit."""
        return {"max_episode_steps": self.episode_length}
