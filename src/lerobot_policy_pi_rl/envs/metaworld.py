"""One MetaWorld task as a Gymnasium environment, whatever is observed of it."""

import abc
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lerobot_policy_pi_rl.envs.configuration_metaworld import ACTION_SIZE, STOCK_STATE_SIZE
from lerobot_policy_pi_rl.envs.tasks import task_text

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.fast_sawyer import FastSawyer

# Where MetaWorld's state has the hand's position, and that with the gripper's opening.
HAND = slice(0, 3)
PROPRIOCEPTION = slice(0, 4)

SUCCESS_BONUS = 1.0
# MetaWorld's shaped reward lies between 0 and 10.
DENSE_SCALE = 10.0


class MetaworldGym(gym.Env, abc.ABC):
    """One MetaWorld task; object and goal are drawn anew at every reset.

    A success terminates the episode, the time limit truncates it, and a success at the last step only terminates.
    `reset(seed=s)` gives the same episode whatever happened before. `step` is `act` and then `observe`; whoever
    needs no observation in between calls `act` alone.

    Args:
        task: Task name.
        observation_space: Of what `observe` gives.
        episode_length: Time limit in control steps.
        reward: `sparse` or `dense`, see `MetaworldConfig`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self, task: str, observation_space: spaces.Dict, episode_length: int = 200, reward: str = "sparse"
    ) -> None:
        self.task = task
        self.task_description = task_text(task)
        # LeRobot's evaluation reads the time limit under this name.
        self._max_episode_steps = episode_length
        self._dense = reward == "dense"
        self.observation_space = observation_space
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_SIZE,), dtype=np.float32)
        self._simulation: FastSawyer | None = None
        self._state = np.zeros(STOCK_STATE_SIZE)
        self._elapsed = episode_length

    @abc.abstractmethod
    def observe(self) -> dict[str, np.ndarray]:
        """What is seen at this moment."""

    @abc.abstractmethod
    def _make_simulation(self) -> "FastSawyer":
        """Loads the simulator."""

    @property
    def simulation(self) -> "FastSawyer":
        """The simulator, loaded at its first use: after a fork, and never by who only asks for the spaces."""
        if self._simulation is None:
            self._simulation = self._make_simulation()
        return self._simulation

    @property
    def stock_state(self) -> np.ndarray:
        """MetaWorld's own state of this moment, `[39]` float64; what its scripted experts read."""
        return self._state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Determines object, goal and with them the whole episode; None continues the stream of draws.
            options: Ignored.
        """
        super().reset(seed=seed)
        simulation = self.simulation
        if seed is not None:
            simulation.reseed(seed)
        self._state, _ = simulation.reset()
        self._elapsed = 0
        return self.observe(), {"is_success": False}

    def act(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Executes one action without looking at what comes of it.

        Args:
            action: Hand displacement (x, y, z) and gripper effort, `[4]`, clipped to [-1, 1].

        Returns:
            Reward, terminated, truncated and `{"is_success": ...}`.
        """
        if self._elapsed >= self._max_episode_steps:
            raise RuntimeError("the episode is over: call reset before step")
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (ACTION_SIZE,):
            raise ValueError(f"an action has shape ({ACTION_SIZE},); got {action.shape}")
        self._state, shaped, _, _, info = self.simulation.step(np.minimum(np.maximum(action, -1), 1))
        success = bool(info["success"])
        reward = SUCCESS_BONUS * success + (float(shaped) / DENSE_SCALE if self._dense else 0.0)
        self._elapsed += 1
        truncated = not success and self._elapsed >= self._max_episode_steps
        if success:
            self._elapsed = self._max_episode_steps
        return reward, success, truncated, {"is_success": success}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes one action, see `act`, and observes."""
        reward, terminated, truncated, info = self.act(action)
        return self.observe(), reward, terminated, truncated, info

    def close(self) -> None:
        """Frees the simulator's own renderer, if one was made."""
        if self._simulation is not None:
            self._simulation.close()
