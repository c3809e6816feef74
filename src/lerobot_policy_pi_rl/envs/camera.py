"""Small pictures of MetaWorld's simulations, cheap enough to be drawn in software."""

import atexit
import os

import mujoco
import numpy as np

# From where LeRobot's camera for MetaWorld looks, but nearer: degrees, metres.
LOOK_AT, DISTANCE, AZIMUTH, ELEVATION = (0.0, 0.7, 0.12), 1.05, 140.0, -30.0
# Nothing that a policy needs, and slow in software.
SWITCHED_OFF = (
    mujoco.mjtRndFlag.mjRND_SHADOW,
    mujoco.mjtRndFlag.mjRND_REFLECTION,
    mujoco.mjtRndFlag.mjRND_SKYBOX,
    mujoco.mjtRndFlag.mjRND_HAZE,
)
MAX_GEOMS = 1000
# The arm above the hand: four fifths of all triangles, and half of the time that a picture takes.
ARM = ("pedestal", "right_arm_base_link", "head", *(f"right_l{joint}" for joint in range(7)))
# MuJoCo draws groups 0 to 2.
HIDDEN_GROUP = 3


def hide_arm(model: mujoco.MjModel) -> None:
    """Leaves the arm above the hand out of pictures; the physics does not read what is changed."""
    model.geom_group[np.isin(model.geom_bodyid, [model.body(name).id for name in ARM])] = HIDDEN_GROUP


class Camera:
    """Draws the simulations of one task in the process that made it.

    To load a task's meshes takes half a second and 150 MB, so that all environments of a task share a camera.

    Args:
        model: Of any simulation of the task.
        size: Height and width of the picture.

    Raises:
        RuntimeError: MuJoCo cannot draw on this machine.
    """

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._size = size
        self._shown = mujoco.MjData(model)
        self._scene = mujoco.MjvScene(model, MAX_GEOMS)
        for flag in SWITCHED_OFF:
            self._scene.flags[flag] = False
        self._option = mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._view.lookat[:] = LOOK_AT
        self._view.distance, self._view.azimuth, self._view.elevation = DISTANCE, AZIMUTH, ELEVATION
        try:
            self._gl = _make_gl_context(size)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        # Each renderer fails in a way of its own: missing libraries, missing functions, no display, MuJoCo's own error.
        except Exception as error:
            raise RuntimeError(
                f"MuJoCo cannot draw pictures here ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
                "install EGL (Debian: libegl1) and set MUJOCO_GL=egl"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        # EGL's own clean-up at the exit would come first otherwise.
        atexit.register(self._free)

    def draw(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
        """Draws a simulation of the camera's task as it is at this moment, without touching it.

        After a reset, MetaWorld's own derived positions are those of the draw before: its first picture of an episode
        shows the last one's goal. So they are derived anew here, elsewhere.

        Returns:
            `[size, size, 3]` uint8.
        """
        shown = self._shown
        shown.qpos[:], shown.mocap_pos[:], shown.mocap_quat[:] = data.qpos, data.mocap_pos, data.mocap_quat
        mujoco.mj_fwdPosition(model, shown)
        self._gl.make_current()
        mujoco.mjv_updateScene(
            model, shown, self._option, None, self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        frame = mujoco.MjrRect(0, 0, self._size, self._size)
        mujoco.mjr_render(frame, self._scene, self._context)
        picture = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(picture, None, frame, self._context)
        # OpenGL's rows run upwards.
        return picture[::-1].copy()

    def _free(self) -> None:
        self._context.free()
        self._gl.free()


def _make_gl_context(size: int) -> "mujoco.GLContext":
    """What MUJOCO_GL asks for; without it EGL, which needs no display."""
    # Mesa then draws in the thread that asks for it: there are as many processes as cores already, and a process that
    # is forked later would wait for Mesa's threads for ever.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if os.environ.get("MUJOCO_GL"):
        return mujoco.GLContext(size, size)
    from mujoco.egl import GLContext

    return GLContext(size, size)


# By process, because what a fork copies of a renderer does not work.
_cameras: dict[tuple[int, str, int], Camera] = {}


def camera_of_process(task: str, model: mujoco.MjModel, size: int) -> Camera:
    """The camera of this process for a task, made at its first use.

    Args:
        task: Task name.
        model: Of any simulation of the task.
        size: Height and width of the picture.
    """
    key = os.getpid(), task, size
    if key not in _cameras:
        _cameras[key] = Camera(model, size)
    return _cameras[key]
