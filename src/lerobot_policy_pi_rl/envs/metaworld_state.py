"""One MetaWorld task as a Gymnasium environment that observes the simulator's state."""

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import (
    ACTION_SIZE,
    RELATIVE_SIZE,
    STOCK_STATE_SIZE,
)
from lerobot_policy_pi_rl.envs.tasks import task_text

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.fast_sawyer import FastSawyer

# Where things are in MetaWorld's 39 numbers.
HAND = slice(0, 3)
OBJECT = slice(4, 7)
GOAL = slice(36, 39)

SUCCESS_BONUS = 1.0
# MetaWorld's shaped reward lies between 0 and 10.
DENSE_SCALE = 10.0
CAMERA = "corner2"
# LeRobot moves MetaWorld's third camera here to see the table.
CAMERA_NUMBER, CAMERA_POSITION = 2, (0.75, 0.075, 0.7)
# Evaluation asks for frames whether or not anybody wants a video.
BLANK_FRAME = np.zeros((64, 64, 3), dtype=np.uint8)


def observed_state(state: np.ndarray, relative_features: bool) -> np.ndarray:
    """Adds relative positions to MetaWorld's state.

    Args:
        state: MetaWorld's fully observable state, `[39]` float64.
        relative_features: Append object - hand, goal - object and goal - hand, `[9]` in metres.

    Returns:
        `[48]` or `[39]` float32.
    """
    if not relative_features:
        return state.astype(np.float32)
    hand, thing, goal = state[HAND], state[OBJECT], state[GOAL]
    result = np.empty(STOCK_STATE_SIZE + RELATIVE_SIZE, dtype=np.float32)
    result[:STOCK_STATE_SIZE] = state
    result[39:42] = thing - hand
    result[42:45] = goal - thing
    result[45:48] = goal - hand
    return result


class MetaworldStateGym(gym.Env):
    """One MetaWorld task; object and goal are drawn anew at every reset.

    A success terminates the episode, the time limit truncates it, and a success at the last step only terminates.
    `reset(seed=s)` gives the same episode whatever happened before.

    Args:
        task: Task name.
        episode_length: Time limit in control steps.
        reward: `sparse` or `dense`, see `MetaworldStateEnv`.
        relative_features: Observe 48 numbers instead of 39.
        render_mode: None or `rgb_array`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        task: str,
        episode_length: int = 200,
        reward: str = "sparse",
        relative_features: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self.task = task
        self.task_description = task_text(task)
        self.render_mode = render_mode
        # LeRobot's evaluation reads the time limit under this name.
        self._max_episode_steps = episode_length
        self._dense = reward == "dense"
        self._relative_features = relative_features
        size = STOCK_STATE_SIZE + (RELATIVE_SIZE if relative_features else 0)
        state = spaces.Box(-np.inf, np.inf, (size,), dtype=np.float32)
        self.observation_space = spaces.Dict({"agent_pos": state})
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_SIZE,), dtype=np.float32)
        self._simulation: FastSawyer | None = None
        self._state = np.zeros(STOCK_STATE_SIZE)
        self._elapsed = episode_length

    @property
    def simulation(self) -> "FastSawyer":
        """The simulator, loaded at its first use: after a fork, and never by who only asks for the spaces."""
        if self._simulation is None:
            from lerobot_policy_pi_rl.envs.fast_sawyer import make_simulation

            camera = {"render_mode": self.render_mode, "camera_name": CAMERA} if self.render_mode else {}
            self._simulation = make_simulation(self.task, **camera)
            self._simulation.model.cam_pos[CAMERA_NUMBER] = CAMERA_POSITION
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
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes one action.

        Args:
            action: Hand displacement (x, y, z) and gripper effort, `[4]`, clipped to [-1, 1].
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
        return self._observation(), reward, success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """The camera's picture, `[480, 480, 3]` uint8, or a small blank one when `render_mode` is None."""
        if self.render_mode is None:
            return BLANK_FRAME
        # MetaWorld's picture from this camera is upside down and mirrored.
        return np.flip(self.simulation.render(), (0, 1))

    def close(self) -> None:
        """Frees the renderer, if one was made."""
        if self._simulation is not None:
            self._simulation.close()

    def _observation(self) -> dict[str, np.ndarray]:
        return {"agent_pos": observed_state(self._state, self._relative_features)}
