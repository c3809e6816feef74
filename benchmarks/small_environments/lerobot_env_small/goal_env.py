"""What the environments have in common: a goal, a sparse reward, and a picture for videos."""

import abc
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

Observation = dict[str, np.ndarray]
PICTURE_SIZE = 96


class GoalEnv(gym.Env, abc.ABC):
    """An environment that ends with a reward of 1 when its goal is reached.

    `reset(seed=s)` determines the episode: equal seeds and actions give equal episodes. The time limit is
    Gymnasium's own (`gymnasium.make(..., max_episode_steps=...)`).

    Attributes:
        state_size: Numbers that are observed, as `agent_pos`.
        action_size: Numbers of an action, each between -1 and 1.
        task_description: What LeRobot tells the policy of the task.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium declares it so
    render_mode = "rgb_array"
    state_size: int
    action_size: int
    task_description: str

    def __init__(self) -> None:
        """States the spaces."""
        state = spaces.Box(-np.inf, np.inf, (self.state_size,), dtype=np.float32)
        self.observation_space = spaces.Dict({"agent_pos": state})
        self.action_space = spaces.Box(-1.0, 1.0, (self.action_size,), dtype=np.float32)

    @abc.abstractmethod
    def begin(self, random: np.random.Generator) -> None:
        """Draws where an episode starts."""

    @abc.abstractmethod
    def move(self, action: np.ndarray) -> None:
        """Advances by one control step; the action lies within its bounds."""

    @abc.abstractmethod
    def state(self) -> np.ndarray:
        """What is observed, `[state_size]`."""

    @abc.abstractmethod
    def solved(self) -> bool:
        """Whether the goal is reached."""

    @abc.abstractmethod
    def control(self) -> np.ndarray:
        """The hand-written controller's action, `[action_size]`; it may exceed the bounds."""

    @abc.abstractmethod
    def points(self) -> np.ndarray:
        """Where to draw dots in a picture, goal first, `[n, 2]` from (-1, -1) at the lower left to (1, 1)."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        self.begin(self.np_random)
        return self.observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes one control step."""
        self.move(np.clip(np.asarray(action, dtype=np.float64), -1, 1))
        solved = self.solved()
        return self.observe(), float(solved), solved, False, {"is_success": solved}

    def observe(self) -> Observation:
        """The observation of this moment."""
        return {"agent_pos": self.state().astype(np.float32)}

    def render(self) -> np.ndarray:
        """A picture: the goal in green, what moves in blue, `[96, 96, 3]` uint8."""
        picture = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), 255, dtype=np.uint8)
        places = ((np.clip(self.points(), -1, 1) + 1) / 2 * (PICTURE_SIZE - 7)).astype(int)
        for number, (x, y) in enumerate(places):
            row = PICTURE_SIZE - 7 - y
            picture[row : row + 7, x : x + 7] = (60, 60, 220) if number else (60, 200, 60)
        return picture
