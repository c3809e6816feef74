"""Columns of a user's data set that are no float vectors: LeRobot's own training with the compact base."""

import sys
from pathlib import Path

import numpy as np
import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.scripts import lerobot_train

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

COLUMNS = {
    "observation.state": ("float32", (1,)),
    "observation.tactile": ("float32", (2, 3)),
    "observation.count": ("int64", (1,)),
    "observation.closed": ("bool", (1,)),
    "observation.note": ("string", (1,)),
    "action": ("float32", (1,)),
}
NUMBERS = 1 + 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of eight steps."""
    root = tmp_path_factory.mktemp("columns") / "data"
    features = {
        name: {"dtype": kind, "shape": shape, "names": None} for name, (kind, shape) in COLUMNS.items()
    }
    data = LeRobotDataset.create("nobody/columns", fps=10, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for _ in range(2):
        for step in range(8):
            frame = {
                name: generator.normal(size=shape).astype(np.float32) for name, (_, shape) in COLUMNS.items()
            }
            frame |= {
                "observation.count": np.array([step]),
                "observation.closed": np.array([step % 2 == 0]),
                "observation.note": "near the edge",
                "task": "press",
            }
            data.add_frame(frame)
        data.save_episode()
    data.finalize()
    return root


@pytest.mark.parametrize("chunk", [1, 3])
def test_lerobot_trains_on_columns_of_every_kind(
    dataset: Path,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--dataset.repo_id=nobody/columns",
        f"--dataset.root={dataset}",
        "--policy.type=pi_rl",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        f"--policy.chunk_size={chunk}",
        f"--policy.n_action_steps={chunk}",
        "--steps=2",
        "--batch_size=4",
        "--num_workers=0",
        "--save_freq=2",
        "--env_eval_freq=0",
        "--wandb.enable=false",
        f"--output_dir={tmp_path / 'run'}",
    ]
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *arguments])
    lerobot_train.train()
    said = "leaves out observation.closed (bool), observation.count (int64), observation.note (string)"
    shown = capfd.readouterr()
    assert said in shown.out + shown.err
    policy = PIRLPolicy.from_pretrained(tmp_path / "run/checkpoints/last/pretrained_model")
    assert policy.base.critic_dims == {"observation": NUMBERS + 64}
    assert (policy.base.chunk_size, policy.base.action_dim) == (chunk, 1)


def test_integer_actions_are_one_line() -> None:
    config = PIRLConfig(
        device="cpu", input_features={"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
    )
    with pytest.raises(ConfigError, match=r"policy.output_features.*stored as int64; store it as float32"):
        config.set_dataset_feature_metadata({"action": {"dtype": "int64"}})


def test_actions_of_two_axes_are_one_line() -> None:
    config = PIRLConfig(
        device="cpu",
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (2,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2, 3))},
    )
    with pytest.raises(ConfigError, match=r"policy.output_features.*\(2, 3\).*one axis"):
        PIRLPolicy(config)
