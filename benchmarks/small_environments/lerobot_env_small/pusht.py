"""gym-pusht seen through its state, with an easier task: a T that lies near its place is to be pushed into it."""

import gym_pusht  # noqa: F401 - registers the environment
import gymnasium as gym
import numpy as np

from .goal_env import GoalEnv

# Half of gym-pusht's table, in pixels, and the T's place: the origin of its body, and its angle.
MIDDLE, PLACE = 256.0, np.array([256.0, 256.0, np.pi / 4])
# Share of its place that the T must cover; gym-pusht itself asks for 0.95.
COVERED = 0.8
# Pixels by which an action of 1 moves the pusher's target.
REACH = 30.0
# Distances of the pusher's middle from the T's edge when it touches, and when it goes past; and from the T's middle
# when it goes around.
TOUCHES, PASSES, AROUND = 15.0, 28.0, 120.0
# Where the controller pushes, in the T's frame: points of its edges, and the direction into it.
CONTACTS = np.array(
    [[-45, 0], [0, 0], [45, 0], [-60, 15], [60, 15], [-15, 95], [15, 95], [0, 120], [-45, 30], [45, 30]]
)
INWARDS = np.array([[0, 1], [0, 1], [0, 1], [1, 0], [-1, 0], [1, 0], [-1, 0], [0, -1], [0, -1], [0, -1]])
CENTRE = np.array([0.0, 45.0])
# Pixels that an error of one radian counts for.
RADIAN = 60.0


def turned(vectors: np.ndarray, angle: float) -> np.ndarray:
    """Vectors of the T's frame in the table's, `[..., 2]`."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return vectors @ np.array([[cosine, sine], [-sine, cosine]])


class PushTState(GoalEnv):
    """Observes the pusher and the T (x and y, pixels) and cosine and sine of its angle; acts by moving the pusher."""

    state_size, action_size = 6, 2
    task_description = "Push the T into its place."

    def __init__(self) -> None:
        """Makes gym-pusht's environment, without its time limit."""
        super().__init__()
        self._pusht = gym.make("gym_pusht/PushT-v0", obs_type="state", disable_env_checker=True).unwrapped

    def begin(self, random: np.random.Generator) -> None:
        """The T lies beside its place, a little turned; the pusher is somewhere around it."""
        pusht = self._pusht
        pusht.reset(seed=0)
        pusht.block.angle = PLACE[2] + random.uniform(-0.4, 0.4)
        pusht.block.position = tuple(PLACE[:2] + random.uniform(-40, 40, 2))
        around = random.uniform(-np.pi, np.pi)
        pusht.agent.position = tuple(self._centre() + AROUND * np.array([np.cos(around), np.sin(around)]))
        pusht.agent.velocity = (0.0, 0.0)
        pusht.space.reindex_shapes_for_body(pusht.block)
        pusht.space.reindex_shapes_for_body(pusht.agent)
        self._covered, self._contact = 0.0, None

    def move(self, action: np.ndarray) -> None:
        """The pusher follows its target for a tenth of a second."""
        self._covered = self._pusht.step(self._pusher + REACH * action)[4]["coverage"]

    @property
    def _pusher(self) -> np.ndarray:
        return np.array(self._pusht.agent.position)

    @property
    def _angle(self) -> float:
        return float(self._pusht.block.angle)

    def _centre(self) -> np.ndarray:
        return np.array(self._pusht.block.position) + turned(CENTRE, self._angle)

    def state(self) -> np.ndarray:
        """Pusher, T, cosine and sine."""
        return np.array(
            [
                *self._pusht.agent.position,
                *self._pusht.block.position,
                np.cos(self._angle),
                np.sin(self._angle),
            ]
        )

    def solved(self) -> bool:
        """The T covers enough of its place."""
        return bool(self._covered > COVERED)

    def control(self) -> np.ndarray:
        """Pushes where the T moves most towards its place, after going around it."""
        angle, centre = self._angle, self._centre()
        points, inwards = turned(CONTACTS, angle), turned(INWARDS, angle)
        arms = points - turned(CENTRE, angle)
        # A slow push turns the T by its lever: x, y and angle for each contact.
        moves = np.column_stack([inwards, (arms[:, 0] * inwards[:, 1] - arms[:, 1] * inwards[:, 0]) / RADIAN])
        missing = np.append(
            PLACE[:2] + turned(CENTRE, PLACE[2]) - centre,
            RADIAN * np.sin(PLACE[2] - angle),
        )
        gains = moves @ missing / np.linalg.norm(moves, axis=1)
        if self._contact is None or gains[self._contact] < 0.3 * gains.max():
            self._contact = int(gains.argmax())
        target = centre + arms[self._contact]
        return (
            self._way(target, inwards[self._contact], centre, gains[self._contact]) - self._pusher
        ) / REACH

    def _way(self, target: np.ndarray, inward: np.ndarray, centre: np.ndarray, gain: float) -> np.ndarray:
        """Where the pusher goes next to push a point of the T."""
        pusher, start = self._pusher, target - PASSES * inward
        along, aside = (pusher - target) @ inward, abs((pusher - target) @ np.array([-inward[1], inward[0]]))
        if aside < 8 and -PASSES - 10 < along < 0:
            return target + (min(gain, 12.0) - TOUCHES) * inward
        here, there = pusher - centre, start - centre
        apart = np.arctan2(here[0] * there[1] - here[1] * there[0], here @ there)
        if abs(apart) < 0.4:
            return start
        angle = np.arctan2(here[1], here[0]) + np.clip(apart, -0.5, 0.5)
        return centre + AROUND * np.array([np.cos(angle), np.sin(angle)])

    def points(self) -> np.ndarray:
        """The T's place, the T and the pusher."""
        goal = PLACE[:2] + turned(CENTRE, PLACE[2])
        return (np.stack([goal, self._centre(), self._pusher]) / MIDDLE - 1) * [1, -1]
