"""Which package an environment needs, and what installs it."""

import importlib.util
import sys

from gymnasium.envs.registration import registry
from lerobot.envs import EnvConfig
from lerobot.envs.configs import HILSerlRobotEnvConfig

from .robots import SIMULATION

# Modules by the environment's type, where it is not LeRobot's `gym_<type>`.
MODULES = {
    "libero": "libero",
    "libero_plus": "libero",
    "metaworld": "metaworld",
    "metaworld_camera": "metaworld",
    "metaworld_state": "metaworld",
    "robocasa": "robocasa",
    "robomme": "robomme",
    "vlabench": "VLABench",
}
# What installs a module; LeRobot has no extra for the others.
INSTALL = {
    "gym_aloha": "pip install 'lerobot[aloha]'",
    "gym_hil": "pip install 'lerobot_policy_pi_rl[gym_hil]'",
    "gym_pusht": "pip install 'lerobot_policy_pi_rl[pusht]'",
    "metaworld": "pip install 'lerobot_policy_pi_rl[metaworld]'",
}
# Its dependency `egl-probe` is built with a CMake that LeRobot brings, and asks for an older one than that knows.
LIBERO = "CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install 'lerobot_policy_pi_rl[libero]'"


def missing_simulator(env: EnvConfig) -> str | None:
    """What to say of an environment whose package is not installed; nothing is imported.

    Returns:
        What is missing and what installs it, or None.
    """
    module = needed_module(env)
    return None if module is None or _is_there(module) else how_to_install(env, module)


def how_to_install(env: EnvConfig, module: str) -> str:
    """The line about an environment whose module is not installed."""
    fix = LIBERO if env.type == "libero" else INSTALL.get(module)
    return f"{env.type!r} needs the package {module!r}, which is not installed: " + (
        fix or "install it as its makers say, or take another environment"
    )


def needed_module(env: EnvConfig) -> str | None:
    """The module that an environment is imported from, if it is known."""
    if isinstance(env, HILSerlRobotEnvConfig):
        return "gym_hil" if env.name == SIMULATION else None
    # One that makes its environments in its own way, or is registered, says itself what it lacks.
    is_gym = type(env).create_envs is EnvConfig.create_envs and env.gym_id not in registry
    return MODULES.get(env.type, env.package_name if is_gym else None)


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None
