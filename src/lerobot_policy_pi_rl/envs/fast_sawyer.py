"""MetaWorld's own tasks with the waste removed; observations, rewards and success flags stay the same.

A fast task is a subclass of MetaWorld's task class, made here and cached. MetaWorld itself is not touched, so stock
environments in the same process behave as ever. `docs/environments.md` says what was slow and how identity is shown.
"""

import functools
import math
import types
from typing import Any

import mujoco
import numpy as np
from gymnasium.utils import seeding
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils

# MetaWorld writes weld constraints of this many numbers; later MuJoCo versions have more.
WELD_SIZE = 11
# `_reset_hand` simulates this many control steps for the arm to reach its start.
SETTLE_STEPS = 50
START_QUATERNION = (1.0, 0.0, 1.0, 0.0)
OPEN_GRIPPER = (-1.0, 1.0)
PHYSICS_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
# Tasks in which something moves, differently for each draw, while the arm goes to its start: an object that falls
# onto a box, a handle with a spring. In the other 40 the arm arrives in the same state to the bit.
DRAW_DEPENDENT_SETTLING = {
    "box-close-v3",
    "disassemble-v3",
    "door-lock-v3",
    "door-unlock-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-unplug-side-v3",
}


class _Quaternion:
    """Stands in for `scipy.spatial.transform.Rotation` in the one use MetaWorld makes of it."""

    def __init__(self, matrix: np.ndarray) -> None:
        self._matrix = matrix

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> "_Quaternion":
        """Takes a rotation matrix `[3, 3]` that is known to be orthogonal (it comes from MuJoCo)."""
        return cls(matrix)

    def as_quat(self) -> np.ndarray:
        """The quaternion `[4]`, scalar last, with the sign scipy gives it."""
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = self._matrix.tolist()
        trace = xx + yy + zz
        largest = max(xx, yy, zz, trace)
        # Ties go to the first of (xx, yy, zz, trace).
        if largest == xx:
            quaternion = (1 - trace + 2 * xx, yx + xy, zx + xz, zy - yz)
        elif largest == yy:
            quaternion = (yx + xy, 1 - trace + 2 * yy, zy + yz, xz - zx)
        elif largest == zz:
            quaternion = (zx + xz, zy + yz, 1 - trace + 2 * zz, yx - xy)
        else:
            quaternion = (zy - yz, xz - zx, yx - xy, 1 + trace)
        x, y, z, w = quaternion
        norm = math.sqrt(x * x + y * y + z * z + w * w)
        return np.array([x / norm, y / norm, z / norm, w / norm])


def _tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Any:
    """`reward_utils.tolerance` for the case that fills MetaWorld's rewards: a number and the long tail."""
    lower, upper = bounds
    if sigmoid != "long_tail" or not isinstance(x, float) or lower > upper or not margin > 0:
        return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)  # type: ignore[arg-type]
    value = float(x)
    if lower <= value <= upper:
        return 1.0
    distance = (lower - value if value < lower else value - upper) / float(margin)
    return 1 / ((distance * math.sqrt(1 / value_at_margin - 1)) ** 2 + 1)


_FAST_REWARD_UTILS = types.SimpleNamespace(**{**vars(reward_utils), "tolerance": _tolerance})
_REPLACED = {"Rotation": _Quaternion, "reward_utils": _FAST_REWARD_UTILS}


def _rebound(owner: type) -> dict[str, Any]:
    """Copies of the functions of a class that use what is replaced, reading the replacements instead.

    The code objects stay MetaWorld's; only the module names they look up differ.
    """
    copies: dict[str, Any] = {}
    for name, value in vars(owner).items():
        function = value.__func__ if isinstance(value, staticmethod) else value
        if not isinstance(function, types.FunctionType) or not _REPLACED.keys() & set(
            function.__code__.co_names
        ):
            continue
        namespace = {**function.__globals__, **_REPLACED}
        copy = types.FunctionType(
            function.__code__, namespace, name, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copies[name] = staticmethod(copy) if isinstance(value, staticmethod) else copy
    return copies


class FastSawyer(SawyerXYZEnv):
    """What all tasks share. Sits between a task and `SawyerXYZEnv`, so that a task's own overrides still win.

    Every reset equals the first reset of a freshly made stock environment with the same seed: stock tasks leave traces
    of earlier episodes in the model (a moved basket, a moved box), which are removed first.
    """

    def prepare(self, settle_is_fixed: bool) -> None:
        """Makes the goal visible and seeded, and remembers the untouched model; call once.

        Args:
            settle_is_fixed: The arm's way to its start is the same for every draw of object and goal.
        """
        self._partially_observable = False
        self._freeze_rand_vec = False
        self.seeded_rand_vec = True
        self._set_task_called = True
        vars(self).pop("sawyer_observation_space", None)
        self._low = self.sawyer_observation_space.low
        self._high = self.sawyer_observation_space.high
        self._model_before = {name: getattr(self.model, name).copy() for name in ("body_pos", "site_pos")}
        self._settling = False
        self._settle_is_fixed = settle_is_fixed
        self._settled: tuple[np.ndarray, np.ndarray] | None = None

    # -- simulation ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _positions(self) -> dict[str, np.ndarray]:
        """Live views of body positions, by name."""
        names = (self.model.body(number).name for number in range(self.model.nbody))
        return {name: self.data.body(name).xpos for name in names if name}

    @functools.cached_property
    def _site_positions(self) -> dict[str, np.ndarray]:
        """Live views of site positions, by name."""
        names = (self.model.site(number).name for number in range(self.model.nsite))
        return {name: self.data.site(name).xpos for name in names if name}

    @functools.cached_property
    def _mocap(self) -> int:
        return int(self.model.body_mocapid[self.data.body("mocap").id])

    def get_body_com(self, body_name: str) -> np.ndarray:
        """Live position of a body, `[3]`."""
        return self._positions[body_name]

    def get_endeff_pos(self) -> np.ndarray:
        """Live position of the hand, `[3]`."""
        return self._positions["hand"]

    def _get_site_pos(self, site_name: str) -> np.ndarray:
        return self._site_positions[site_name].copy()

    @property
    def tcp_center(self) -> np.ndarray:
        """Middle of the two fingertips, `[3]`."""
        sites = self._site_positions
        return (sites["rightEndEffector"] + sites["leftEndEffector"]) / 2.0

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both finger pads press on a geom."""
        contact = self.data.contact
        pairs = contact.geom
        involved = (pairs == object_geom_id).any(axis=1)
        if not involved.any():
            return False
        return all(self._force(involved & (pairs == pad).any(axis=1)) > 0 for pad in self._pads)

    @functools.cached_property
    def _pads(self) -> tuple[int, int]:
        return self.data.geom("leftpad_geom").id, self.data.geom("rightpad_geom").id

    def _force(self, contacts: np.ndarray) -> float:
        """Sum of the constraint forces at the selected contacts, `[contacts]` bool."""
        return sum(self.data.efc_force[self.data.contact.efc_address[contacts]].tolist())

    # -- reset --------------------------------------------------------------------------------------------------

    def reseed(self, seed: int) -> None:
        """Seeds the draws of the next resets, as `seed` does, without the spaces nobody samples from."""
        self.np_random, _ = seeding.np_random(seed)

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """Starts an episode. Stock draws and settles twice and keeps the second; only its first draw matters."""
        self.curr_path_length = 0
        for name, value in self._model_before.items():
            getattr(self.model, name)[:] = value
        self._settling = False
        mujoco.mj_resetData(self.model, self.data)
        self.reset_model()
        self._settling = True
        mujoco.mj_resetData(self.model, self.data)
        observation = self.reset_model()
        self._prev_obs = observation[:18].copy()
        observation[18:36] = self._prev_obs
        return observation, {}

    def _reset_hand(self, steps: int = SETTLE_STEPS) -> None:
        if self._settling and not self._restore_settled():
            self._settle(steps)
        self.init_tcp = self.tcp_center

    def _settle(self, steps: int) -> None:
        """Simulates the arm's way to its start, and remembers the last moments unless they depend on the draw."""
        for step in range(steps):
            self.data.mocap_pos[self._mocap] = self.hand_init_pos
            self.data.mocap_quat[self._mocap] = START_QUATERNION
            self.data.ctrl[:] = OPEN_GRIPPER
            last = step == steps - 1
            mujoco.mj_step(self.model, self.data, nstep=self.frame_skip - last)
        before = self._physics_state()
        mujoco.mj_step(self.model, self.data)
        if self._settled is None and self._settle_is_fixed:
            self._settled = before, self._physics_state()

    def _restore_settled(self) -> bool:
        """Puts the arm at its start without simulating the way.

        The last substep is simulated all the same: it brings everything that is derived (body and site positions) in
        line with this draw's model, and it must end exactly where it ended when it was remembered.

        Returns:
            Whether that was possible; if not, the simulation is as after `mj_resetData`.
        """
        if self._settled is None:
            return False
        before, after = self._settled
        mujoco.mj_setState(self.model, self.data, before, PHYSICS_STATE)
        mujoco.mj_step(self.model, self.data)
        if np.array_equal(self._physics_state(), after):
            return True
        mujoco.mj_resetData(self.model, self.data)
        return False

    def _physics_state(self) -> np.ndarray:
        """Everything that determines the next substep, `[state size]`."""
        state = np.empty(mujoco.mj_stateSize(self.model, PHYSICS_STATE))
        mujoco.mj_getState(self.model, self.data, state, PHYSICS_STATE)
        return state

    # -- step ---------------------------------------------------------------------------------------------------

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """One control step; same arithmetic as stock, without what `mj_forward` overwrites anyway."""
        if self.curr_path_length >= self.max_path_length:
            raise ValueError(f"the episode is over after {self.max_path_length} steps: call reset")
        delta = np.minimum(np.maximum(action[:3], -1), 1) * self.action_scale
        data = self.data
        data.mocap_pos[0] = np.minimum(np.maximum(data.mocap_pos[0] + delta, self.mocap_low), self.mocap_high)
        data.mocap_quat[0] = START_QUATERNION
        data.ctrl[0], data.ctrl[1] = action[-1], -action[-1]
        mujoco.mj_step(self.model, data, nstep=self.frame_skip)
        self.curr_path_length += 1
        mujoco.mj_forward(self.model, data)
        observation = np.minimum(np.maximum(self._get_obs(), self._low), self._high)
        self._last_stable_obs = observation
        reward, info = self.evaluate_state(observation, action)
        return observation.copy(), reward, False, self.curr_path_length == self.max_path_length, info

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        positions = self._positions
        observation = np.zeros(18)
        observation[:3] = positions["hand"]
        apart = positions["rightclaw"] - positions["leftclaw"]
        observation[3] = min(max(math.sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
        position, quaternion = self._get_pos_objects(), self._get_quat_objects()
        for number in range(len(position) // 3):
            start = 4 + 7 * number
            observation[start : start + 3] = position[3 * number : 3 * number + 3]
            observation[start + 3 : start + 7] = quaternion[4 * number : 4 * number + 4]
        return observation

    def _get_obs(self) -> np.ndarray:
        current = self._get_curr_obs_combined_no_goal()
        goal = self._get_pos_goal() if not self._partially_observable else np.zeros(3)
        observation = np.concatenate((current, self._prev_obs, goal))
        self._prev_obs = current
        return observation


@functools.cache
def fast_class(task: str) -> type[FastSawyer]:
    """The fast subclass of MetaWorld's class for a task."""
    stock = ALL_V3_ENVIRONMENTS[task]
    shared = type("FastSawyer", (FastSawyer,), _rebound(SawyerXYZEnv))
    return type(f"Fast{stock.__name__}", (stock, shared), _rebound(stock))


def make_simulation(task: str, **camera: Any) -> FastSawyer:
    """Makes the simulation of a task.

    Args:
        task: A task name.
        **camera: `render_mode` and `camera_name` of MetaWorld's constructor, when pictures are wanted.

    Raises:
        RuntimeError: The installed MuJoCo is too new for MetaWorld.
    """
    if mujoco.mjNEQDATA != WELD_SIZE:
        raise RuntimeError(
            f"MetaWorld 3.0 does not run on MuJoCo {mujoco.__version__}; "
            "install an older one: pip install 'mujoco<3.10'"
        )
    simulation = fast_class(task)(**camera)
    simulation.prepare(settle_is_fixed=task not in DRAW_DEPENDENT_SETTLING)
    return simulation
