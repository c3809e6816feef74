"""One MetaWorld task as a Gymnasium environment that observes the simulator's state."""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces
from PIL import Image, ImageDraw

from lerobot_policy_pi_rl.envs.configuration_metaworld import STOCK_STATE_SIZE
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import RELATIVE_SIZE
from lerobot_policy_pi_rl.envs.metaworld import HAND, MetaworldGym

if TYPE_CHECKING:
    from lerobot_policy_pi_rl.envs.fast_sawyer import FastSawyer

# Where things are in MetaWorld's 39 numbers.
OBJECT = slice(4, 7)
GOAL = slice(36, 39)

CAMERA = "corner2"
# LeRobot moves MetaWorld's third camera here to see the table.
CAMERA_NUMBER, CAMERA_POSITION = 2, (0.75, 0.075, 0.7)
# Evaluation asks for frames whether or not anybody wants a video.
NOTICE = "Not rendered.\n\n--env.render_mode=rgb_array\ndraws the simulation\n(slow without a GPU)."


@cache
def notice_frame() -> np.ndarray:
    """A picture of `NOTICE`, `[128, 192, 3]` uint8: a black video would look like a fault."""
    picture = Image.new("RGB", (192, 128), (32, 32, 32))
    ImageDraw.Draw(picture).multiline_text((8, 8), NOTICE, fill=(230, 230, 230))
    return np.asarray(picture)


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


class MetaworldStateGym(MetaworldGym):
    """A task of which the whole state is observed, as `agent_pos`.

    Args:
        task: Task name.
        episode_length: Time limit in control steps.
        reward: `sparse` or `dense`.
        relative_features: Observe 48 numbers instead of 39.
        render_mode: None or `rgb_array`.
    """

    def __init__(
        self,
        task: str,
        episode_length: int = 200,
        reward: str = "sparse",
        relative_features: bool = True,
        render_mode: str | None = None,
    ) -> None:
        size = STOCK_STATE_SIZE + (RELATIVE_SIZE if relative_features else 0)
        state = spaces.Box(-np.inf, np.inf, (size,), dtype=np.float32)
        super().__init__(task, spaces.Dict({"agent_pos": state}), episode_length, reward)
        self.render_mode = render_mode
        self._relative_features = relative_features

    def observe(self) -> dict[str, np.ndarray]:
        """The state of this moment, `[48]` or `[39]` float32."""
        return {"agent_pos": observed_state(self._state, self._relative_features)}

    def render(self) -> np.ndarray:
        """The camera's picture, `[480, 480, 3]` uint8; that of a notice when `render_mode` is None."""
        if self.render_mode is None:
            return notice_frame()
        # MetaWorld's picture from this camera is upside down and mirrored.
        return np.flip(self.simulation.render(), (0, 1))

    def _make_simulation(self) -> "FastSawyer":
        from lerobot_policy_pi_rl.envs.fast_sawyer import make_simulation

        camera = {"render_mode": self.render_mode, "camera_name": CAMERA} if self.render_mode else {}
        simulation = make_simulation(self.task, **camera)
        simulation.model.cam_pos[CAMERA_NUMBER] = CAMERA_POSITION
        return simulation
