"""LeRobot's own SAC beside PI-RL: its parts are left alone, and its own commands train."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from safetensors.torch import load_file

STAND_IN = Path(__file__).parent / "stand_in"
SAVE_FREQ = 20
SOON = 180.0
POLL_S = 0.2

# Everything that SAC's two commands use is loaded and noted, then all of ours, then it is looked at again.
PROBE = """
import importlib, json, pkgutil, sys
for name in ("actor", "learner", "buffer", "trainer", "train_rl", "gym_manipulator", "algorithms.factory",
             "algorithms.sac", "algorithms.sac.sac_algorithm", "data_sources"):
    importlib.import_module(f"lerobot.rl.{name}")
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.policies import factory
from lerobot.policies.gaussian_actor import modeling_gaussian_actor, processor_gaussian_actor
from lerobot.processor import ProcessorStepRegistry
from lerobot.rl.algorithms.configs import RLAlgorithmConfig
from lerobot.robots import RobotConfig
from lerobot.teleoperators import TeleoperatorConfig
from lerobot.transport import services_pb2_grpc, utils

def contents():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "lerobot" or module is None:
            continue
        for key, value in vars(module).items():
            if key.startswith("__") or getattr(value, "__class__", None) is type(sys):
                continue
            found[f"{name}.{key}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for part, content in vars(value).items():
                    if callable(content) or isinstance(content, (classmethod, staticmethod, property)):
                        found[f"{name}.{key}.{part}"] = id(content)
    return found

def registries():
    kinds = (PreTrainedConfig, EnvConfig, RLAlgorithmConfig, RobotConfig, TeleoperatorConfig)
    found = {kind.__name__: {k: id(v) for k, v in kind._choice_registry.items()} for kind in kinds}
    return found | {"processor": {k: id(v) for k, v in ProcessorStepRegistry._registry.items()}}

before, registered = contents(), registries()
import lerobot_policy_pi_rl
for part in pkgutil.walk_packages(lerobot_policy_pi_rl.__path__, "lerobot_policy_pi_rl."):
    importlib.import_module(part.name)
after, now = contents(), registries()
print(json.dumps({
    "changed": sorted(name for name in before if after.get(name) != before[name]),
    "replaced": sorted(k for kind, found in registered.items() for k, v in found.items() if now[kind][k] != v),
    "registered": sorted({key for kind in now for key in now[kind] if key not in registered[kind]}),
    "count": len(before),
}))
"""


def test_importing_the_package_changes_one_function_of_lerobot() -> None:
    """The documented hook, in the module that LeRobot looks it up in."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=SOON)
    assert probe.returncode == 0, probe.stderr
    found = json.loads(probe.stdout.splitlines()[-1])
    assert found["count"] > 1000
    assert found["changed"] == ["lerobot.rl.algorithms.factory.get_algorithm_class"]
    assert found["replaced"] == []
    assert {"pi_rl", "metaworld_state"} <= set(found["registered"])


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes for the offline buffer."""
    root = tmp_path_factory.mktemp("sac") / "demonstrations"
    shapes = {
        "observation.state": ("float32", 4),
        "action": ("float32", 2),
        "next.reward": ("float32", 1),
        "next.done": ("bool", 1),
        "complementary_info.discrete_penalty": ("float32", 1),
    }
    features = {
        name: {"dtype": kind, "shape": (size,), "names": None} for name, (kind, size) in shapes.items()
    }
    data = LeRobotDataset.create("test/points", fps=100, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for _ in range(4):
        for step in range(10):
            frame = {
                name: np.zeros(size, kind)
                if name.startswith(("next", "comp"))
                else generator.uniform(-1, 1, size)
                for name, (kind, size) in shapes.items()
            }
            frame["next.done"][0] = frame["next.reward"][0] = step == 9
            numbers = {name: value.astype(shapes[name][0]) for name, value in frame.items()}
            data.add_frame(numbers | {"task": "reach the goal"})
        data.save_episode()
    data.finalize()
    return root


class SAC:
    """LeRobot's own learner and actor, in real processes."""

    def __init__(self, folder: Path, port: int, demonstrations: Path, *more: str) -> None:
        self.folder, self._more = folder, more
        folder.mkdir()
        self._config = folder / "sac.json"
        self._config.write_text(json.dumps(config(port, demonstrations)))
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(STAND_IN), os.environ.get("PYTHONPATH")]))
        }
        self._processes = [self._start("learner")]
        log = folder / "learner/logs/learner_sac.log"
        self.wait_until(lambda: log.exists() and "gRPC server started" in log.read_text())
        self._processes.append(self._start("actor"))

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.txt").open("wb") as console:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    f"lerobot.rl.{name}",
                    f"--config_path={self._config}",
                    f"--output_dir={self.folder / name}",
                    *self._more,
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"learner/checkpoints/{step:06d}"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < deadline, self.shown()
            assert self._processes[0].poll() is None, self.shown()
            time.sleep(POLL_S)

    def shown(self) -> dict[str, list[str]]:
        return {file.stem: file.read_text().splitlines()[-5:] for file in self.folder.glob("*.txt")}

    def end(self) -> None:
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def config(port: int, demonstrations: Path) -> dict[str, Any]:
    """Settings of both commands."""
    state, action = {"type": "STATE", "shape": [4]}, {"type": "ACTION", "shape": [2]}
    return {
        "policy": {
            "type": "gaussian_actor",
            "device": "cpu",
            "push_to_hub": False,
            "input_features": {"observation.state": state},
            "output_features": {"action": action},
            "dataset_stats": {
                "observation.state": {"min": [-2] * 4, "max": [2] * 4},
                "action": {"min": [-1] * 2, "max": [1] * 2},
            },
            "latent_dim": 16,
            "state_encoder_hidden_dim": 16,
            # The learner learns while there is anything in its buffer; it is ended from outside.
            "online_steps": 10_000,
            "online_buffer_capacity": 1000,
            "offline_buffer_capacity": 1000,
            "online_step_before_learning": 20,
            "actor_learner_config": {
                "learner_host": "127.0.0.1",
                "learner_port": port,
                "policy_parameters_push_frequency": 1,
            },
            "concurrency": {"actor": "threads", "learner": "threads"},
        },
        "env": {
            "type": "gym_manipulator",
            "name": "gym_hil",
            "task": "Point-v0",
            "fps": 50,
            "features": {"action": action, "observation.state": state},
            "features_map": {"action": "action", "observation.state": "observation.state"},
            "processor": {"control_mode": "gamepad", "gripper": {"use_gripper": False}},
        },
        "algorithm": {"type": "sac"},
        "dataset": {"repo_id": "test/points", "root": str(demonstrations)},
        "job_name": "sac",
        "seed": 1,
        "batch_size": 16,
        "save_freq": SAVE_FREQ,
        "log_freq": 10,
        "wandb": {"enable": False},
    }


def weights(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / part / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_sac_trains_before_beside_and_after_a_run_of_pi_rl(
    make_run: Callable[..., Any], demonstrations: Path, tmp_path: Path, free_port: int
) -> None:
    plugin = "--policy.discover_packages_path=lerobot_policy_pi_rl"
    for name, more in (("before and beside", ()), ("after, with the plugin loaded", (plugin,))):
        sac = SAC(tmp_path / name.split()[0].strip(","), free_port, demonstrations, *more)
        try:
            first = sac.checkpoint(SAVE_FREQ)
            sac.wait_until((first / "training_state").exists)
            if not more:
                run = make_run("--steps=2")
                assert [command.wait(SOON) for command in (run.learner(), run.actor())] == [0, 0]
                assert len(run.rows()) == 2
                beside = max(int(folder.name) for folder in first.parent.iterdir() if folder.name.isdecimal())
            else:
                beside = SAVE_FREQ
            # It goes on learning: a checkpoint later than everything so far, with other weights.
            later = sac.checkpoint(beside + SAVE_FREQ)
            sac.wait_until((sac.checkpoint(beside + 2 * SAVE_FREQ)).exists)
        finally:
            sac.end()
        for part in ("pretrained_model", "algorithm"):
            one, two = weights(first, part), weights(later, part)
            assert one.keys() == two.keys()
            assert any(not torch.equal(one[key], two[key]) for key in one), part
            assert all(torch.isfinite(value).all() for value in two.values())
        assert "Traceback" not in (sac.folder / "learner.txt").read_text().split("torchcodec")[-1]
