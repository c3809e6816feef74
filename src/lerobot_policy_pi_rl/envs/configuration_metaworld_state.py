"""Configuration of the state-based MetaWorld environment; loads no simulator."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.envs.tasks import expand_tasks
from lerobot_policy_pi_rl.errors import check, config_error

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.metaworld_state import MetaworldStateGym

REWARDS = ("sparse", "dense")
RENDER_MODES = (None, "rgb_array")
# MetaWorld itself refuses to step further.
LONGEST_EPISODE = 500
STOCK_STATE_SIZE = 39
RELATIVE_SIZE = 9
ACTION_SIZE = 4


@EnvConfig.register_subclass("metaworld_state")
@dataclass
class MetaworldStateEnv(EnvConfig):
    """MetaWorld seen through its simulator state, goal included, instead of through cameras."""

    # Task name (e.g. "peg-insert-side-v3"), several separated by commas, or a group: "MT10", "MT50".
    task: str | None = "peg-insert-side-v3"

    # Control steps per simulated second. MetaWorld's own; other values are refused.
    fps: int = 80

    # Time limit in control steps, 1 to 500. An episode that reaches it unsolved is truncated.
    episode_length: int = 200

    # "sparse": 1 at the step that solves the task, else 0. "dense": MetaWorld's shaped reward / 10, plus 1 at the
    # step that solves the task.
    reward: str = "sparse"

    # Append object - hand, goal - object and goal - hand (3 numbers each, metres) to MetaWorld's 39.
    relative_features: bool = True

    # None: never renders, and `render` gives a blank frame. "rgb_array": `render` gives a 480 x 480 picture.
    render_mode: str | None = None

    # What the environment yields and takes, in its own names. Filled in from the fields above.
    features: dict[str, PolicyFeature] = field(default_factory=dict)

    # The environment's names -> LeRobot's names.
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    def __post_init__(self) -> None:
        try:
            expand_tasks(self.task or "")
        except ValueError as error:
            raise config_error("env.task", str(error)) from None
        check(self.fps == 80, "env.fps", f"must be 80, MetaWorld's control rate; got {self.fps}")
        check(
            1 <= self.episode_length <= LONGEST_EPISODE,
            "env.episode_length",
            f"must be 1 to {LONGEST_EPISODE} control steps; got {self.episode_length}",
        )
        check(
            self.reward in REWARDS, "env.reward", f"must be one of {', '.join(REWARDS)}; got {self.reward!r}"
        )
        check(
            self.render_mode in RENDER_MODES,
            "env.render_mode",
            f"must be null or 'rgb_array'; got {self.render_mode!r}",
        )
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_SIZE,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(self.state_size,)),
        }

    @property
    def tasks(self) -> list[str]:
        """Names of the selected tasks."""
        return expand_tasks(self.task or "")

    @property
    def state_size(self) -> int:
        """Length of the observed state: 48, or 39 without the relative features."""
        return STOCK_STATE_SIZE + (RELATIVE_SIZE if self.relative_features else 0)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `MetaworldStateGym`, except the task."""
        return {
            "episode_length": self.episode_length,
            "reward": self.reward,
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

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Creates one vector of `n_envs` environments per task, as LeRobot's evaluation expects.

        Args:
            n_envs: Environments per task.
            use_async_envs: Run each environment of a vector in a process of its own.

        Returns:
            `{suite: {task number: vector}}`; the suite is the group's name, or this environment's type.
        """
        suite = self.task if self.task in ("MT10", "MT50") else self.type
        return {
            suite: {
                number: self._vector(task, n_envs, use_async_envs) for number, task in enumerate(self.tasks)
            }
        }

    def _vector(self, task: str, n_envs: int, use_async_envs: bool) -> gym.vector.VectorEnv:
        makers = [functools.partial(self.make_env, task) for _ in range(n_envs)]
        same_step = gym.vector.AutoresetMode.SAME_STEP
        if use_async_envs and n_envs > 1:
            return gym.vector.AsyncVectorEnv(makers, autoreset_mode=same_step, context="forkserver")
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=same_step)
