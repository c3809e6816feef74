"""An environment with one camera, for runs of small policies."""

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_STATE


class Window(gym.Env):
    """A picture whose brightness is to be raised by the first action; cut after twelve steps.

    Every step is rewarded by what it gained, so that the smallest rollout has something to learn from.
    """

    observation_space = spaces.Dict(
        {
            "pixels": spaces.Dict({"top": spaces.Box(0, 255, (32, 32, 3), np.uint8)}),
            "agent_pos": spaces.Box(-10, 10, (5,), np.float32),
        }
    )
    action_space = spaces.Box(-1, 1, (4,), np.float32)
    task_description = "pick the cube"
    # Its own limit comes first.
    _max_episode_steps = 10_000

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.light, self.time = float(np.random.default_rng(seed).uniform(80, 120)), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        before, self.time = self.light, self.time + 1
        self.light = float(np.clip(before + 20 * action[0], 0, 255))
        solved = self.light > 150
        return self._observe(), (self.light - before) / 20, solved, self.time >= 12, {"is_success": solved}

    def _observe(self) -> dict:
        picture = np.full((32, 32, 3), self.light, np.uint8)
        return {"pixels": {"top": picture}, "agent_pos": np.full(5, self.light / 255, np.float32)}


@EnvConfig.register_subclass("test_window")
@dataclass
class WindowConfig(EnvConfig):
    """Configuration of `Window`."""

    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (5,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (32, 32, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            "pixels/top": "observation.images.top",
        }
    )

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"window": {0: gym.vector.SyncVectorEnv([Window] * n_envs)}}
