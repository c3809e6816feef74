"""The recipes for MetaWorld from state are read as the commands read them."""

from pathlib import Path

import draccus
import pytest
import yaml

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("metaworld*.json"))
ONLINE = [recipe for recipe in RECIPES if recipe.stem != "metaworld_supervised"]


@pytest.mark.parametrize("recipe", ONLINE, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_read_and_its_numbers_fit_together(recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    # What LeRobot reads before draccus, which does not know it.
    started_from = values["policy"].pop("path")
    assert started_from.endswith("checkpoints/best/pretrained_model")
    cfg = draccus.decode(PIRLTrainConfig, {**values, "policy": {"type": "pi_rl", **values["policy"]}})
    assert isinstance(cfg.algorithm, PIRLAlgorithmConfig)
    assert cfg.env is not None
    collection, tasks = cfg.algorithm.collection, len(cfg.env.tasks)
    # Every task has as many environments as every other, and as many starts in a validation.
    assert collection.num_envs // collection.group_size % tasks == 0
    assert cfg.eval.n_episodes % tasks == 0
    assert cfg.algorithm.minibatch_size <= collection.num_envs * collection.decisions
    assert cfg.env_eval_freq > 0
    assert cfg.save_freq > 0
