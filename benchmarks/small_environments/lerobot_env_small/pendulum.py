"""A pendulum whose motor is too weak to lift it: to be swung up, and to stand still there."""

import numpy as np

from .goal_env import GoalEnv

TIME_STEP = 0.05
GRAVITY, TORQUE = 10.0, 3.0
UPRIGHT, AT_REST = 0.15, 0.5


class Pendulum(GoalEnv):
    """Observes cosine and sine of the angle (0 is upright) and the speed; acts by a torque."""

    state_size, action_size = 3, 1
    task_description = "Swing the pendulum up and hold it."

    def begin(self, random: np.random.Generator) -> None:
        """Any angle, and a small speed."""
        self.angle, self.speed = random.uniform(-np.pi, np.pi), random.uniform(-1, 1)

    def move(self, action: np.ndarray) -> None:
        """Semi-implicit Euler of a rod of length and mass 1."""
        push = 1.5 * GRAVITY * np.sin(self.angle) + 3 * TORQUE * action[0]
        self.speed = float(np.clip(self.speed + TIME_STEP * push, -8, 8))
        self.angle += TIME_STEP * self.speed

    def state(self) -> np.ndarray:
        """Cosine, sine, speed."""
        return np.array([np.cos(self.angle), np.sin(self.angle), self.speed])

    def solved(self) -> bool:
        """Upright, and slow."""
        return bool(abs(self._from_upright) < UPRIGHT and abs(self.speed) < AT_REST)

    @property
    def _from_upright(self) -> float:
        return float((self.angle + np.pi) % (2 * np.pi) - np.pi)

    def control(self) -> np.ndarray:
        """Pumps energy in until it is enough to stand upright, and balances near the top."""
        angle = self._from_upright
        if abs(angle) < 0.6:
            return np.array([-(4.0 * angle + 0.7 * self.speed)])
        missing = 1.5 * GRAVITY * (1 - np.cos(angle)) - self.speed**2 / 2
        return np.array([np.sign(self.speed or 1.0) * np.clip(missing, -1, 1)])

    def points(self) -> np.ndarray:
        """The tip when upright, and where it is."""
        return np.array([[0.0, 0.8], [0.8 * np.sin(self.angle), 0.8 * np.cos(self.angle)]])
