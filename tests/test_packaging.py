"""The distribution: its name, its lock, its entry points, and what importing it costs."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NAME = "lerobot_policy_pi_rl"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = [Requirement(line) for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]

# Loaded only when a command needs them.
HEAVY_MODULES = (
    f"{NAME}.algorithm.pi_rl",
    f"{NAME}.bases.compact",
    f"{NAME}.flow",
    f"{NAME}.modeling_pi_rl",
    f"{NAME}.runtime",
    f"{NAME}.scripts",
    f"{NAME}.envs.camera",
    f"{NAME}.envs.metaworld_camera",
    f"{NAME}.envs.metaworld_state",
    "grpc",
    "lerobot.rl.algorithms.sac.modeling_sac",
    "matplotlib",
    "metaworld",
    "mujoco",
    "transformers",
    "wandb",
)


def test_lerobot_finds_the_plugin_by_its_verbatim_name() -> None:
    names = [distribution.metadata["Name"] for distribution in metadata.distributions()]
    assert [name for name in names if name.startswith("lerobot_policy_")] == [NAME]


def test_wheel_keeps_the_name_and_holds_only_the_package(tmp_path: Path) -> None:
    command = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", command, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        roots = {name.split("/")[0] for name in names}
        description = archive.read(f"{NAME}-{PROJECT['version']}.dist-info/METADATA").decode()
    # What answers at once stands beside the package, because importing that takes seconds.
    assert roots == {
        NAME,
        "lerobot_pi_rl_cli",
        "lerobot_pi_rl_launcher.py",
        f"{NAME}-{PROJECT['version']}.dist-info",
    }
    assert f"\nName: {NAME}\n" in description
    recipes = {f"{NAME}/recipes/{file.name}" for file in (ROOT / "recipes").iterdir()}
    assert recipes
    assert recipes | {"lerobot_pi_rl_cli/settings.json"} <= names


def test_lock_holds_nothing_but_exact_pins() -> None:
    loose = [str(pin) for pin in PINS if pin.url or not re.fullmatch(r"==[^,*]+", str(pin.specifier))]
    assert not loose


def test_lock_names_no_address_option_or_path() -> None:
    bad = [line for line in LOCK.splitlines() if "/" in line or "\\" in line or line.startswith("-")]
    assert not bad


@pytest.mark.parametrize("extra", [None, "metaworld", "dev"])
def test_lock_satisfies_the_declared_dependencies(extra: str | None) -> None:
    declared = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_installed_versions_are_those_of_the_lock() -> None:
    here = default_environment()
    wanted = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(dict(here))]
    wrong = [str(pin) for pin in wanted if not pin.specifier.contains(metadata.version(pin.name))]
    assert not wrong


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_command_is_installed_and_importable(command: str) -> None:
    (entry_point,) = metadata.entry_points(group="console_scripts", name=command)
    assert entry_point.value == PROJECT["scripts"][command]
    assert callable(entry_point.load())


# In an interpreter of its own: which modules each step loads that were not there before, and how many threads run.
PROBE = f"""
import json, sys, threading

seen = set()

def added():
    new = sorted(set(sys.modules) - seen)
    seen.update(new)
    return new

import {{first}}
added()
import {NAME}
found = {{{{"package": added()}}}}
from {NAME}.envs.configuration_metaworld_state import MetaworldStateEnv
MetaworldStateEnv(task="MT50").create_envs(1)
found["environments"] = added()
import {NAME}.runtime.client
found["threads"] = threading.active_count()
print(json.dumps(found))
"""


def _probe(first: str) -> dict[str, Any]:
    """What the probe finds that begins by importing a module."""
    command = [sys.executable, "-c", PROBE.format(first=first)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _within(modules: Iterable[str], roots: Iterable[str]) -> list[str]:
    return [name for name in modules if any(name == root or name.startswith(f"{root}.") for root in roots)]


@pytest.mark.slow
def test_what_importing_loads() -> None:
    """Every command of LeRobot's loads its policies, and they transformers, where it is installed."""
    found = _probe("lerobot.policies")
    assert f"{NAME}.configuration_pi_rl" in found["package"]
    assert not _within(found["package"], HEAVY_MODULES)
    # Simulators are loaded where environments are made, and gRPC's client starts no thread by being there.
    assert not _within(found["environments"], ("mujoco", "metaworld"))
    assert found["threads"] == 1


@pytest.mark.slow
def test_import_adds_only_lerobots_own_modules_to_lerobots_training_command() -> None:
    """`lerobot-train` has loaded all that registering needs, so the plugin costs it no other library."""
    added = _probe("lerobot.scripts.lerobot_train")["package"]
    assert len(_within(added, ("lerobot", NAME))) == len(added)
