"""What the MetaWorld environments of this package have in common in their configurations; loads no simulator."""

import abc
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION

from lerobot_policy_pi_rl.envs.tasks import expand_tasks
from lerobot_policy_pi_rl.errors import check, config_error

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.metaworld import MetaworldGym

REWARDS = ("sparse", "dense")
# MetaWorld itself refuses to step further.
LONGEST_EPISODE = 500
ACTION_SIZE = 4
# Length of MetaWorld's own fully observable state.
STOCK_STATE_SIZE = 39


@dataclass
class MetaworldConfig(EnvConfig, abc.ABC):
    """A task of MetaWorld, or several; what is seen of it is up to the subclass."""

    # Task name (e.g. "peg-insert-side-v3"), several separated by commas, or a group: "MT10", "MT50".
    task: str | None = "peg-insert-side-v3"

    # Control steps per simulated second. MetaWorld's own; other values are refused.
    fps: int = 80

    # Time limit in control steps, 1 to 500. An episode that reaches it unsolved is truncated.
    episode_length: int = 200

    # "sparse": 1 at the step that solves the task, else 0. "dense": MetaWorld's shaped reward / 10, plus 1 at the
    # step that solves the task.
    reward: str = "sparse"

    # What the environment yields and takes, in its own names. Filled in from the other fields.
    features: dict[str, PolicyFeature] = field(default_factory=dict)

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
        action = PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_SIZE,))
        self.features = {ACTION: action, **self.observed_features}

    @property
    @abc.abstractmethod
    def observed_features(self) -> dict[str, PolicyFeature]:
        """What an observation holds, in the environment's names."""

    @property
    def tasks(self) -> list[str]:
        """Names of the selected tasks."""
        return expand_tasks(self.task or "")

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment, except the task."""
        return {"episode_length": self.episode_length, "reward": self.reward}

    @abc.abstractmethod
    def make_env(self, task: str) -> "MetaworldGym":
        """Creates one environment; its simulator is loaded at the first reset.

        Args:
            task: A task name.
        """

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
