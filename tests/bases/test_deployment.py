"""What is exported runs in LeRobot's own commands where this package cannot be imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.processor_pi_rl import make_pi_rl_pre_post_processors
from lerobot_policy_pi_rl.scripts.export import export

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STAND_IN = Path(__file__).parents[1] / "runtime/stand_in"
# A command of LeRobot's in a Python that finds nothing of ours.
BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("lerobot_policy_pi_rl", "lerobot_pi_rl")):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from lerobot.scripts.{script} import main
main()
assert not any(name.startswith("lerobot_policy_pi_rl") for name in sys.modules)
"""


@pytest.fixture
def exported(save_stock: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A small SmolVLA with the given features that PI-RL has had, given back."""

    def make(inputs: dict[str, PolicyFeature], action_dim: int) -> Path:
        outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))}
        stock = save_stock("smolvla", input_features=inputs, output_features=outputs)
        config = PIRLConfig(base_path=str(stock), device="cpu", num_inference_steps=2)
        ours = tmp_path / "pi_rl"
        PIRLPolicy(config).save_pretrained(ours)
        for processor in make_pi_rl_pre_post_processors(config):
            processor.save_pretrained(ours)
        export(ours, tmp_path / "exported")
        return tmp_path / "exported"

    return make


def run_bare(script: str, *arguments: str) -> str:
    """Runs a command of LeRobot's to its end; returns what it said."""
    environment = os.environ | {"PYTHONPATH": str(STAND_IN), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE.format(script=script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said


def test_lerobot_eval_runs_what_is_exported(exported: Callable[..., Path], tmp_path: Path) -> None:
    policy = exported(
        {
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (2,)),
        },
        action_dim=2,
    )
    run_bare(
        "lerobot_eval",
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--env.type=pusht",
        "--env.observation_height=96",
        "--env.observation_width=96",
        "--env.episode_length=8",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        f"--output_dir={tmp_path / 'eval'}",
    )
    overall = json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 1


def test_lerobot_rollout_runs_what_is_exported(exported: Callable[..., Path]) -> None:
    policy = exported(
        {
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 16, 16)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (4,)),
        },
        action_dim=4,
    )
    said = run_bare(
        "lerobot_rollout",
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--robot.type=scripted",
        "--task=pick up the cube",
        "--fps=10",
        "--duration=2",
        "--play_sounds=false",
        "--return_to_initial_position=false",
    )
    assert "Rollout finished" in said
