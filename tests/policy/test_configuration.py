"""The policy's configuration: defaults that follow from others, and errors that say what would be right."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lerobot.configs import PreTrainedConfig

from lerobot_policy_pi_rl.bases.configuration import BaseConfig, CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError

MakeConfig = Callable[..., PIRLConfig]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kind": "sde"}, "explorer.kind.*'sde' is unknown; choose one of .*'flow_sde'"),
        ({"recording": "all"}, "explorer.recording.*'all' is unknown; choose one of .*'hybrid'"),
        ({"noise_level": 0.0}, "noise_level.*above 0"),
        ({"kind": "flow_cps", "noise_level": 1.5}, "noise_level.*at most 1"),
        ({"noise_correlation": 1.0}, "noise_correlation.*below 1"),
        ({"noise_correlation": -0.1}, "noise_correlation.*at least 0"),
        ({"noise_std_min": 0.2, "noise_std_max": 0.1}, r"noise_std_min.*\[0.2, 0.1\] is upside down"),
        ({"noise_std_min": 0.0}, "noise_std_min.*above 0"),
        ({"logit_std": 0.0}, "logit_std.*above 0"),
    ],
)
def test_explorer_settings_that_cannot_work(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        ExplorerConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"num_inference_steps": -1}, "num_inference_steps.*at least 1"),
        ({"chunk_size": -1}, "chunk_size.*at least 1"),
        ({"chunk_size": 5, "n_action_steps": 6}, "n_action_steps.*between 1 and chunk_size=5, got 6"),
        ({"n_action_steps": -1}, "n_action_steps.*between 1"),
        ({"num_inference_steps": 1, "explorer": ExplorerConfig("flow_cps")}, "flow_cps needs at least 2"),
    ],
)
def test_policy_settings_that_cannot_work(
    make_config: MakeConfig, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        make_config(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["act", "diffusion", "wall_x"])
def test_a_policy_of_lerobot_that_cannot_be_a_base(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy.base.type.*{name!r} .*use 'compact'"):
        BaseConfig.get_choice_class(name)()


def test_every_policy_of_lerobot_has_an_answer() -> None:
    """It is a base, or naming it says why not; and docs/bases.md has a row for it."""
    page = (Path(__file__).parents[2] / "docs/bases.md").read_text()
    cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    classes = PreTrainedConfig.get_known_choices()
    names = {name for name, config in classes.items() if config.__module__.startswith("lerobot.policies.")}
    assert len(names) > 15
    assert names <= BaseConfig.get_known_choices().keys()
    assert names <= set(re.findall(r"`(\w+)`", cells))


def test_a_base_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"policy.base.type.*'resnet' is not a flow-matching base policy"):
        BaseConfig.get_choice_class("resnet")


def test_a_base_without_an_adapter(make_config: MakeConfig) -> None:
    class Orphan(BaseConfig):
        type = "orphan"

    with pytest.raises(ConfigError, match=r"'orphan' has no adapter; have .*'compact'"):
        make_config({"base": Orphan()})


def test_features_that_are_missing(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"input_features.*is empty"):
        make_config({"input_features": {}}).validate_features()
    with pytest.raises(ConfigError, match=r"output_features.*has no 'action'"):
        make_config({"output_features": {}}).validate_features()


def test_defaults_that_follow_from_the_explorer(make_config: MakeConfig) -> None:
    assert [ExplorerConfig(kind).recording for kind in ("flow_sde", "flow_cps", "flow_noise")] == [
        "hybrid",
        "hybrid",
        "joint",
    ]
    # The learned deviation goes with independent noise.
    correlated = [ExplorerConfig(kind, noise_correlation=0.5) for kind in ("flow_sde", "flow_noise")]
    assert [explorer.correlation for explorer in correlated] == [0.5, 0.0]
    assert make_config({"base": None}).base == CompactConfig()
