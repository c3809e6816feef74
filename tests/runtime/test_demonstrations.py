"""Demonstrations for co-training, from a data set that the test writes."""

import dataclasses
import json
import sys
from pathlib import Path

import draccus
import pytest
import torch
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.demonstrations import DemonstrationSource, for_loss
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, make_player
from lerobot_policy_pi_rl.scripts.demos import main

RECIPE = Path(__file__).parents[2] / "recipes/metaworld_cotraining.json"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demonstrations") / "reach"
    assert main(["--task=reach-v3", "--num_episodes=1", f"--root={root}", "--repo_id=test/reach"]) == 0
    return root


def configured(root: Path, monkeypatch: pytest.MonkeyPatch) -> PIRLTrainConfig:
    """The recipe, with a policy from nothing and these demonstrations."""
    recipe = json.loads(RECIPE.read_text())
    recipe["policy"] = {"type": "pi_rl", "device": "cpu", "push_to_hub": False}
    recipe["dataset"] = {"repo_id": "test/reach", "root": str(root)}
    recipe["output_dir"] = None
    monkeypatch.setattr(sys, "argv", ["test"])
    return draccus.decode(PIRLTrainConfig, recipe)


def test_batches_are_what_supervised_training_reads(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = configured(recorded, monkeypatch)
    cfg.validate()
    player = make_player(cfg)
    source = DemonstrationSource(cfg, player)
    torch.manual_seed(0)
    batch = source(16)
    torch.manual_seed(0)
    again = source(16)
    assert batch[OBS_STATE].shape == (16, 48)
    assert batch[ACTION].shape == (16, player.policy.config.chunk_size, 4)
    assert batch["action_is_pad"].shape == (16, player.policy.config.chunk_size)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    # The texts go with their rows.
    assert batch["task"] == again["task"]
    assert len(batch["task"]) == 16
    assert torch.isfinite(player.policy.base.loss(batch))


def test_a_loss_may_read_rows_texts_and_numbers_that_hold_for_all() -> None:
    """EO1 is told which tokens stand for actions; EVO1 reads the texts."""
    read = {"action": torch.zeros(2, 3), "task": ["pick", "place"], "action_token_id": 19}
    rest = {"next.reward": 0.0, "info": {}, "index": torch.tensor(3), "observation.absent": None}
    assert for_loss(read | rest) == read


def test_co_training_without_a_data_set_is_one_line(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = configured(recorded, monkeypatch)
    cfg.dataset = None
    with pytest.raises(
        ConfigError, match=r"dataset\.repo_id.*is missing; algorithm\.demonstration_weight needs"
    ):
        cfg.validate()


def test_a_folder_without_a_data_set_is_one_line(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = configured(recorded, monkeypatch)
    assert cfg.dataset is not None
    cfg.dataset.root = str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"dataset\.root`: .* is not a LeRobotDataset: meta/info.json is missing"
    ):
        cfg.validate()
    # A second machine's actor needs no demonstrations.
    cfg.is_actor = True
    cfg.validate()


def test_a_data_set_that_lacks_what_the_policy_reads_is_one_line(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configured(recorded, monkeypatch)
    cfg.validate()
    player = make_player(cfg)
    assert player.policy.config.input_features is not None
    player.policy.config.input_features["observation.images.top"] = player.policy.config.input_features[
        OBS_STATE
    ]
    with pytest.raises(ConfigError, match=r"has no \['observation.images.top'\], which the policy reads"):
        DemonstrationSource(cfg, player)


@pytest.mark.parametrize("key", [OBS_STATE, ACTION])
def test_demonstrations_of_another_size_are_one_line(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    cfg = configured(recorded, monkeypatch)
    cfg.validate()
    player = make_player(cfg)
    policy = player.policy.config
    features = policy.output_features if key == ACTION else policy.input_features
    assert features is not None
    (size,) = features[key].shape
    features[key] = dataclasses.replace(features[key], shape=(size + 1,))
    said = rf"`dataset.repo_id`: 'test/reach' has '{key}' with shape \({size},\), but .*\({size + 1},\)"
    with pytest.raises(ConfigError, match=said) as error:
        DemonstrationSource(cfg, player)
    assert "\n" not in str(error.value)
