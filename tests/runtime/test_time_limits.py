"""Environments whose episodes may never end."""

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs import EnvConfig

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.collector import Group, make_eval_groups, make_groups

from .conftest import LineConfig


class Endless(gym.Env):
    """An environment that nothing cuts."""

    observation_space = gym.spaces.Dict({"agent_pos": gym.spaces.Box(-1, 1, (2,), np.float32)})
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    task_description = "go on"


@EnvConfig.register_subclass("test_endless")
@dataclass
class EndlessConfig(LineConfig):
    """Configuration of `Endless`, without a time limit."""

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"endless": {0: gym.vector.SyncVectorEnv([Endless] * n_envs)}}


@EnvConfig.register_subclass("test_limited")
@dataclass
class LimitedConfig(EndlessConfig):
    """The same, with a field for one."""

    episode_length: int | None = None


@pytest.mark.parametrize("make", [make_groups, make_eval_groups])
def test_a_time_limit_is_demanded(make: Callable[..., list[Group]]) -> None:
    """Validation would wait for an episode that is never solved."""
    collection = CollectionConfig(num_envs=2, num_workers=0, eval_envs=1)
    for config, said in (
        (
            EndlessConfig(),
            r"`env.type`: 'test_endless' has no time limit \(task 'go on'\).*max_episode_steps",
        ),
        (LimitedConfig(), r"`env.episode_length`: 'test_limited' has no time limit.*; set it to the steps"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            make(config, collection)
        assert "\n" not in str(error.value)
    for group in make(LimitedConfig(episode_length=7), collection):
        assert set(group.envs.time_limits) == {7}
        group.envs.close()
