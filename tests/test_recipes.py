"""The recipes are read as the commands read them, with any setting of the policy beside them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
import pytest
import yaml
from draccus.wrappers import docstring
from lerobot.configs import FeatureType, PolicyFeature, parser
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.runtime import pipeline
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, parts
from lerobot_policy_pi_rl.scripts.arguments import completed

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.json"))
ONLINE = [recipe for recipe in RECIPES if recipe.stem != "metaworld_supervised"]
FROM_STATE = [recipe for recipe in ONLINE if recipe.stem.startswith("metaworld")]
STOCK = {"pi0": PI0Config, "pi05": PI05Config, "smolvla": SmolVLAConfig}
# A list, a null, a section and plain values, of which none is the recipe's.
GIVEN = [
    "--policy.online_steps=1000",
    "--policy.explorer.noise_level=0.4",
    "--policy.num_inference_steps=7",
    "--policy.actor_learner_config.learner_port=50000",
    "--algorithm.collection.actor_id=1",
    "--algorithm.critic_hidden_dims=[16]",
    "--seed=9",
]


@parser.wrap()
def parse(cfg: PIRLTrainConfig) -> PIRLTrainConfig:
    """Reads a configuration as the commands do."""
    return cfg


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PIRLTrainConfig]:
    """Completes, parses and begins as a command does; simulators and devices are looked for later."""
    # The help texts take seconds.
    monkeypatch.setattr(docstring, "get_attribute_docstring", lambda *_: docstring.AttributeDocString())

    def run(*arguments: str) -> PIRLTrainConfig:
        # LeRobot keeps what it has read of the last command line.
        monkeypatch.setattr(parser, "_config_path_args", {})
        monkeypatch.setattr(parser, "_config_yaml_overrides", {})
        monkeypatch.setattr(sys, "argv", ["lerobot-pi-rl-test", *arguments])
        sys.argv[1:] = completed(sys.argv[1:])
        cfg = parse()
        cfg._validate_as_lerobot_does()
        return cfg

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the configuration of a checkpoint: `pi_rl`, or a stock policy's."""

    def write(kind: str) -> Path:
        inputs = {OBS_STATE: PolicyFeature(FeatureType.STATE, (4,))}
        outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (4,))}
        if kind == "pi_rl":
            config: Any = PIRLConfig(device="cpu", input_features=inputs, output_features=outputs)
        else:
            config = STOCK[kind](device="cpu", input_features=inputs, output_features=outputs)
        # As `lerobot-train` leaves it where somebody has asked for a push.
        config.push_to_hub, config.repo_id = True, "me/mine"
        folder = tmp_path / kind
        config.save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def small(tmp_path: Path) -> Callable[[Path, str, Path], Path]:
    """Writes a copy of a recipe that begins with another checkpoint, in the way that the recipe does."""

    def write(recipe: Path, name: str, path: Path) -> Path:
        values = json.loads(recipe.read_text())
        values["policy"][name] = str(path)
        values["output_dir"] = str(tmp_path / "run")
        # The devices of a robot are looked for where it is made.
        copy = tmp_path / recipe.name
        copy.write_text(json.dumps(values))
        return copy

    return write


def check_given(cfg: PIRLTrainConfig) -> PIRLConfig:
    policy, algorithm, _ = parts(cfg)
    assert policy.online_steps == 1000
    assert policy.explorer.noise_level == 0.4
    assert policy.num_inference_steps == 7
    assert policy.actor_learner_config.learner_port == 50000
    assert algorithm.collection.actor_id == 1
    assert algorithm.critic_hidden_dims == [16]
    assert cfg.seed == 9
    # Of a checkpoint, these say what was asked of the training that made it.
    assert (policy.push_to_hub, policy.repo_id) == (False, None)
    return policy


@pytest.mark.parametrize("recipe", ONLINE, ids=lambda recipe: recipe.stem)
def test_every_setting_can_be_given_beside_a_recipe(
    recipe: Path,
    read: Callable[..., PIRLTrainConfig],
    checkpoint: Callable[[str], Path],
    small: Callable[[Path, str, Path], Path],
) -> None:
    policy = json.loads(recipe.read_text())["policy"]
    name = "path" if "path" in policy else "base_path"
    kind = "pi_rl" if name == "path" else recipe.stem.partition("_")[0]
    begun = check_given(read(f"--config_path={small(recipe, name, checkpoint(kind))}", *GIVEN))
    assert begun.base.type == ("compact" if kind == "pi_rl" else kind)
    assert str(begun.pretrained_path or begun.base_path) == str(checkpoint(kind))
    # What the recipe says beside where to begin.
    assert begun.n_action_steps == policy.get("n_action_steps", begun.n_action_steps)


@pytest.mark.parametrize("given", ["pi_rl", "smolvla"])
@pytest.mark.parametrize("recipe", ["metaworld", "smolvla_metaworld"])
def test_a_checkpoint_on_the_command_line_takes_the_place_of_the_recipe_s(
    recipe: str,
    given: str,
    read: Callable[..., PIRLTrainConfig],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """What the recipe begins with need not be there."""
    file = next(path for path in RECIPES if path.stem == recipe)
    path = checkpoint(given)
    found = ["--policy.device=cpu", f"--output_dir={tmp_path / 'run'}", *GIVEN]
    policy = check_given(read(f"--config_path={file}", f"--policy.path={path}", *found))
    assert policy.base.type == ("compact" if given == "pi_rl" else given)
    assert policy.chunk_size == (5 if given == "pi_rl" else 50)


def test_a_stock_checkpoint_needs_nothing_but_an_environment(
    read: Callable[..., PIRLTrainConfig], checkpoint: Callable[[str], Path]
) -> None:
    given = [f"--policy.path={checkpoint('smolvla')}", "--env.type=metaworld"]
    for more in ([], ["--algorithm.micro_batch_size=8"], ["--algorithm.collection.actor_id=1"]):
        cfg = read(*given, *more)
        assert parts(cfg)[0].base.type == "smolvla"
        assert isinstance(cfg.algorithm, PIRLAlgorithmConfig)


def test_lists_and_nulls_of_a_file_reach_a_policy_that_it_names(
    read: Callable[..., PIRLTrainConfig], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """LeRobot makes arguments of what stands beside a path in a file, and loses these."""
    features = {OBS_STATE: {"type": "STATE", "shape": [7]}}
    policy = {
        "path": str(checkpoint("pi_rl")),
        "input_features": features,
        "explorer": {"recording": "joint"},
    }
    for suffix in (".json", ".yaml"):
        file = tmp_path / f"recipe{suffix}"
        file.write_text(json.dumps({"policy": policy, "env": {"type": "metaworld_state"}}))
        found = parts(read(f"--config_path={file}", "--policy.online_steps=5"))[0]
        assert found.input_features == {OBS_STATE: PolicyFeature(FeatureType.STATE, (7,))}
        assert (found.explorer.recording, found.online_steps) == ("joint", 5)


def test_a_policy_that_is_nowhere_is_one_line(
    read: Callable[..., PIRLTrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a program, where an error is raised as it is.
    monkeypatch.setattr(pipeline, "config_error", lambda name, said: ValueError(f"{name}: {said}"))
    with pytest.raises(
        ValueError, match=r"policy.path: 'me/nowhere' is no folder with a config.json, and"
    ) as error:
        read("--policy.path=me/nowhere", "--env.type=metaworld_state")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", FROM_STATE, ids=lambda recipe: recipe.stem)
def test_the_numbers_of_a_recipe_fit_together(recipe: Path) -> None:
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
