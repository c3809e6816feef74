"""Stands in for gym_hil: a point to be moved to a goal, with the observations and infos that LeRobot's SAC reads."""

from typing import Any

import gymnasium as gym
import numpy as np

EPISODE_STEPS = 10


class Point(gym.Env):
    """A point in the plane; the episode ends near the goal, or after some steps."""

    metadata = {"render_modes": ["human"]}  # noqa: RUF012

    def __init__(self, image_obs: bool, render_mode: str, use_gripper: bool, gripper_penalty: float) -> None:
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = gym.spaces.Dict({"agent_pos": gym.spaces.Box(-4, 4, (4,), np.float32)})
        self.render_mode = render_mode
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        self.steps = 0
        return self._look(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, np.float32).clip(-1, 1)
        self.place = self.place + 0.3 * action
        self.steps += 1
        near = bool(np.linalg.norm(self.place - self.goal) < 0.3)
        info = {"teleop_action": action, "is_intervention": False, "discrete_penalty": 0.0, "succeed": near}
        return self._look(), float(near), near, self.steps >= EPISODE_STEPS, info

    def _look(self) -> dict[str, np.ndarray]:
        return {"agent_pos": np.concatenate([self.place, self.goal]).astype(np.float32)}


class Helped(Point):
    """The same, but a person takes over after some steps and goes to the goal; every step costs a penalty."""

    HELPED_AFTER = 3

    def __init__(self, image_obs: bool, render_mode: str, use_gripper: bool, gripper_penalty: float) -> None:
        super().__init__(image_obs, render_mode, use_gripper, gripper_penalty)
        self.penalty = gripper_penalty

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        # Out of reach of the policy's first steps, and of nobody's in the rest.
        self.goal = self.place + np.float32(2.0)
        return self._look(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        person = self.steps >= self.HELPED_AFTER
        towards = (self.goal - self.place) / 0.3 / max(1, EPISODE_STEPS - 1 - self.steps)
        observation, reward, near, late, info = super().step(towards if person else action)
        return (
            observation,
            reward,
            near,
            late,
            info | {"is_intervention": person, "discrete_penalty": self.penalty},
        )


gym.register("gym_hil/Point-v0", Point)
gym.register("gym_hil/Helped-v0", Helped)
