"""A point mass in the plane: damped, moved by forces, to be brought to rest at a goal."""

import numpy as np

from .goal_env import GoalEnv

TIME_STEP = 0.05
FORCE, DAMPING = 4.0, 0.5
REACHED, AT_REST = 0.04, 0.06


class PointMass(GoalEnv):
    """Observes position, velocity and goal (x and y of each); acts by a force."""

    state_size, action_size = 6, 2
    task_description = "Bring the point to rest at the goal."

    def begin(self, random: np.random.Generator) -> None:
        """Position and goal lie anywhere in the square."""
        self.position, self.velocity = random.uniform(-1, 1, 2), np.zeros(2)
        self.goal = random.uniform(-1, 1, 2)

    def move(self, action: np.ndarray) -> None:
        """Semi-implicit Euler."""
        self.velocity = self.velocity + TIME_STEP * (FORCE * action - DAMPING * self.velocity)
        self.position = self.position + TIME_STEP * self.velocity

    def state(self) -> np.ndarray:
        """Position, velocity, goal."""
        return np.concatenate([self.position, self.velocity, self.goal])

    def solved(self) -> bool:
        """Near the goal, and slow."""
        near = np.linalg.norm(self.position - self.goal) < REACHED
        return bool(near and np.linalg.norm(self.velocity) < AT_REST)

    def control(self) -> np.ndarray:
        """A spring to the goal with a damper."""
        return 2.0 * (self.goal - self.position) - 1.0 * self.velocity

    def points(self) -> np.ndarray:
        """Goal and point."""
        return np.stack([self.goal, self.position])
