"""An arm with seven joints that follow their commanded speeds: its tip is to be brought to a point in space."""

import numpy as np

from .goal_env import GoalEnv

TIME_STEP, SPEED = 0.05, 1.5
# Axis of each joint, and the link behind it, in metres; about those of a Franka arm.
AXES = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=float)
LINKS = np.array(
    [[0, 0, 0.33], [0, 0, 0.2], [0, 0, 0.18], [0, 0, 0.2], [0, 0, 0.18], [0.09, 0, 0.05], [0, 0, 0.1]]
)
# Multiplies by a cross product with each axis.
CROSS = np.cross(np.eye(3), AXES[:, None])
REST = np.array([0.0, 0.5, 0.0, 1.2, 0.0, 0.8, 0.0])
REACHED = 0.04


def forward_kinematics(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each joint is, and at last the tip, `[8, 3]`, and the joints' axes, `[7, 3]`, all in the world."""
    sine, cosine = np.sin(joints)[:, None, None], np.cos(joints)[:, None, None]
    # Rodrigues' formula.
    turns = np.eye(3) + sine * CROSS + (1 - cosine) * CROSS @ CROSS
    place, turn = np.zeros(3), np.eye(3)
    places, axes = [place], []
    for axis, link, next_turn in zip(AXES, LINKS, turns, strict=True):
        axes.append(turn @ axis)
        turn = turn @ next_turn
        place = place + turn @ link
        places.append(place)
    return np.array(places), np.array(axes)


class Arm(GoalEnv):
    """Observes joint angles, tip, and the way from it to the goal; acts by joint speeds."""

    state_size, action_size = 13, 7
    task_description = "Bring the tip of the arm to the goal."

    def begin(self, random: np.random.Generator) -> None:
        """Joints near the resting pose; the goal is where another pose would have its tip."""
        self.goal = forward_kinematics(REST + random.uniform(-0.6, 0.6, 7))[0][-1]
        self._place(REST + random.uniform(-0.6, 0.6, 7))

    def move(self, action: np.ndarray) -> None:
        """Joints move at the commanded speed."""
        self._place(self.joints + TIME_STEP * SPEED * action)

    def _place(self, joints: np.ndarray) -> None:
        self.joints = joints
        self.places, self.axes = forward_kinematics(joints)

    @property
    def tip(self) -> np.ndarray:
        """Where the tip is, metres."""
        return self.places[-1]

    def state(self) -> np.ndarray:
        """Joint angles, tip, and the way from it to the goal."""
        return np.concatenate([self.joints, self.tip, self.goal - self.tip])

    def solved(self) -> bool:
        """The tip is near the goal."""
        return bool(np.linalg.norm(self.tip - self.goal) < REACHED)

    def control(self) -> np.ndarray:
        """Damped least squares on the tip's Jacobian."""
        jacobian = np.cross(self.axes, self.tip - self.places[:-1]).T
        wanted = 2.0 * (self.goal - self.tip)
        return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 0.01 * np.eye(3), wanted) / SPEED

    def points(self) -> np.ndarray:
        """Goal and tip, from above."""
        return np.stack([self.goal[:2], self.tip[:2]])
