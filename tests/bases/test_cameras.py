"""Environments that see less than a checkpoint, or otherwise: one line, whose fix works."""

import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.bases.configuration import STOCK
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, check_features, make_player
from lerobot_policy_pi_rl.scripts.arguments import with_policy

from .conftest import BASES, CAMERA, PIXELS, explorer, features, own_chunk, stock_chunk
from .window import WindowConfig

pytest.importorskip("transformers")

WRIST, SIDE = "observation.images.wrist", "observation.images.side"
OPTIONAL = ("pi0", "pi05", "smolvla", "xvla")

MakeConfig = Callable[..., PIRLConfig]


def cameras(*names: str) -> dict[str, Any]:
    """Input features of a policy with these cameras."""
    picture = PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS))
    return {**dict.fromkeys(names, picture), OBS_STATE: features()["input_features"][OBS_STATE]}


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    """What was said."""
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PIRLTrainConfig]:
    """Parses and validates a command line of a run that begins with a checkpoint."""

    def make(base: Path, *arguments: str) -> PIRLTrainConfig:
        begin = ["--policy.type=pi_rl", f"--policy.base_path={base}", "--policy.device=cpu"]
        given = [*begin, "--policy.push_to_hub=false", "--env.type=test_window", *arguments]
        monkeypatch.setattr(sys, "argv", ["command", *given])
        cfg = draccus.parse(PIRLTrainConfig, args=given)
        cfg.validate()
        return cfg

    return make


def test_these_bases_do_without_a_camera() -> None:
    assert {name for name, fields in STOCK.items() if fields.optional_cameras} == set(OPTIONAL)


@pytest.mark.parametrize("name", OPTIONAL)
def test_cameras_that_the_environment_lacks_are_left_out_as_the_error_says(
    save_stock: Callable[..., Path], parse: Callable[..., PIRLTrainConfig], name: str
) -> None:
    base = save_stock(name, input_features=cameras(CAMERA, WRIST, SIDE))
    with pytest.raises(ConfigError, match=rf"env.type.*does not give '{WRIST}', '{SIDE}', which") as error:
        parse(base)
    (fix,) = re.findall(r"--policy.input_features='(.*)'", one_line(error))
    player = make_player(parse(base, f"--policy.input_features={fix}"))
    seen = {
        "pixels/top": np.random.default_rng(0).integers(0, 256, (2, PIXELS, PIXELS, 3), np.uint8),
        "agent_pos": np.ones((2, 5), np.float32),
    }
    tasks = ["pick the cube"] * 2
    observation = player.path.from_environment(seen, tasks)
    assert set(player.path.wire_fields()) == set(observation) == {CAMERA, OBS_STATE}
    batch = player.preprocess(observation, tasks)
    chunk = own_chunk(player.policy, batch)
    assert torch.equal(chunk, stock_chunk(player.policy.base.policy, batch))
    # It is not that of an observation with black pictures in their places.
    black = {key: torch.zeros_like(observation[CAMERA]) for key in (WRIST, SIDE)}
    assert not torch.equal(chunk, own_chunk(player.policy, player.preprocess(observation | black, tasks)))


@pytest.mark.parametrize("name", BASES)
def test_a_base_from_a_folder_is_neither_warned_of_nor_looked_up(
    save_stock: Callable[..., Path],
    parse: Callable[..., PIRLTrainConfig],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the hub within reach: nothing is asked of it, and nothing said of a policy from scratch."""
    asked: list[object] = []

    def ask(*arguments: object, **more: object) -> None:
        asked.append((arguments, more))
        raise OSError("there is no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download, "_hf_hub_download_to_cache_dir", ask)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    base = save_stock(name)
    asked.clear()
    explored = [f"--policy.explorer.kind={explorer(name).kind}"]
    assert with_policy([f"--policy.path={base}"])[-1] == f"--policy.base_path={base}"
    player = make_player(parse(base, *explored))
    assert isinstance(player.policy, PIRLPolicy)
    assert asked == []
    assert "from scratch" not in caplog.text


def test_a_camera_is_renamed_before_others_are_left_out(make_config: MakeConfig) -> None:
    config = make_config("pi0", {"input_features": cameras(CAMERA, WRIST)})
    front = "observation.images.front"
    environment = WindowConfig(
        features_map={ACTION: ACTION, "agent_pos": OBS_STATE, "pixels/top": front},
    )
    rename = {front: CAMERA}
    with pytest.raises(ConfigError, match=re.escape(f"--rename_map='{json.dumps(rename)}'")) as error:
        check_features(config, environment, {})
    one_line(error)
    with pytest.raises(ConfigError, match=r"let it do without by --policy.input_features=") as error:
        check_features(config, environment, rename)
    one_line(error)


def test_a_base_that_reads_all_of_its_cameras_is_to_be_trained_without(make_config: MakeConfig) -> None:
    """Nothing is offered that would not work, and what is tried all the same is one line, too."""
    stock = {"input_features": cameras(CAMERA, WRIST)}
    with pytest.raises(ConfigError, match=rf"does not give '{WRIST}'.*or train the policy on") as error:
        check_features(make_config("eo1", stock), WindowConfig(), {})
    assert "input_features" not in one_line(error)
    with pytest.raises(ConfigError, match=rf"policy.input_features.*leaves out \['{WRIST}'\]") as error:
        make_config("eo1", stock, input_features=cameras(CAMERA))
    one_line(error)


def test_a_policy_without_any_camera_left_is_to_be_trained(make_config: MakeConfig) -> None:
    blind = WindowConfig(features={ACTION: WindowConfig().features[ACTION]}, features_map={ACTION: ACTION})
    with pytest.raises(ConfigError, match=r"or train the policy on") as error:
        check_features(make_config("pi0"), blind, {})
    assert "input_features" not in one_line(error)


def test_a_state_cannot_be_left_out(make_config: MakeConfig) -> None:
    picture = {CAMERA: features()["input_features"][CAMERA]}
    with pytest.raises(ConfigError, match=rf"policy.input_features.*leaves out \['{OBS_STATE}'\]"):
        make_config("pi0", input_features=picture)


@pytest.mark.parametrize(("channels", "fits"), [(1, False), (3, True), (4, False)])
def test_pictures_may_have_another_size_and_no_other_channels(
    make_config: MakeConfig, channels: int, fits: bool
) -> None:
    environment = WindowConfig()
    environment.features["pixels/top"] = PolicyFeature(FeatureType.VISUAL, (48, 64, channels))
    if fits:
        check_features(make_config("pi0"), environment, {})
        return
    said = rf"'{CAMERA}' with {channels} channels, but the policy was trained with 3 channels; set the"
    with pytest.raises(ConfigError, match=said) as error:
        check_features(make_config("pi0"), environment, {})
    one_line(error)


def test_another_shape_names_what_to_do(make_config: MakeConfig) -> None:
    environment = WindowConfig()
    environment.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (7,))
    said = rf"'{OBS_STATE}' with shape \(7,\), but.*with shape \(5,\); set the environment.*lerobot-train"
    with pytest.raises(ConfigError, match=said) as error:
        check_features(make_config("pi0"), environment, {})
    one_line(error)
