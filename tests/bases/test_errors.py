"""What is missing, or does not fit, is named in one line."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
import pytest
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils import import_utils
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.scripts.arguments import completed
from lerobot_policy_pi_rl.scripts.console import run_command
from lerobot_policy_pi_rl.scripts.learner import learn

pytest.importorskip("transformers")

MakeConfig = Callable[..., PIRLConfig]


EXTRAS = {
    "pi0": "pi",
    "pi05": "pi",
    "smolvla": "smolvla",
    "xvla": "xvla",
    "multi_task_dit": "multi_task_dit",
    "eo1": "eo1",
    "evo1": "evo1",
    "vla_jepa": "vla_jepa",
    "groot": "groot",
    "molmoact2": "molmoact2",
}


def fix(extra: str) -> str:
    """How such a line ends, with no other fix before it."""
    return rf"`policy.base.type`: ((?!pip install).)*pip install 'lerobot_policy_pi_rl\[{extra}\]'"


@pytest.mark.parametrize(("name", "extra"), EXTRAS.items())
def test_a_missing_package_of_a_base_is_named_with_its_extra(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    config = make_config(name)

    def require(package: str, **_: object) -> None:
        raise ImportError(
            f"{package} is required\nbut not installed. Install it with: pip install 'lerobot[{extra}]'"
        )

    module = "evo1.internvl3_embedder" if name == "evo1" else f"{name}.modeling_{name}"
    monkeypatch.setattr(f"lerobot.policies.{module}.require_package", require)
    with pytest.raises(ConfigError) as error:
        PIRLPolicy(config)
    assert re.fullmatch(fix(extra), str(error.value))


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers had never been installed, to whoever looks for it from now on."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(import_utils._require_package_cache, "transformers", False)


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, where) for name in EXTRAS for where in ("command line", "decoder")]
    # LeRobot's whole parser takes seconds.
    + [("eo1", "file"), ("molmoact2", "file")],
)
def test_the_extra_is_named_before_there_is_a_configuration(
    without_transformers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    where: str,
) -> None:
    """Through the commands' own parser, which would wrap any other error in lines of its own."""
    policy = {"type": "pi_rl", "device": "cpu", "base": {"type": name}}
    (tmp_path / "run.json").write_text(json.dumps({"policy": policy}))
    given = f"--policy.base.type={name}" if where == "command line" else f"--config_path={tmp_path}/run.json"
    monkeypatch.setattr(sys, "argv", ["lerobot-pi-rl-learner", given])
    with pytest.raises(SystemExit) as left:
        draccus.decode(PreTrainedConfig, policy) if where == "decoder" else run_command(learn, completed)
    said = left.value.code if isinstance(left.value.code, str) else capsys.readouterr().err.strip()
    assert re.fullmatch(f"error: {fix(EXTRAS[name])}", said)


@pytest.mark.parametrize(("name", "extra"), EXTRAS.items())
def test_the_extra_is_named_for_a_checkpoint(
    without_transformers: None, tmp_path: Path, name: str, extra: str
) -> None:
    # With it EO1's configuration makes one of transformers'.
    settings = {"vlm_config": {}} if name == "eo1" else {}
    (tmp_path / "config.json").write_text(json.dumps({"type": name, "device": "cpu"} | settings))
    with pytest.raises(ConfigError) as error:
        PIRLConfig(base_path=str(tmp_path), device="cpu")
    assert re.fullmatch(fix(extra), str(error.value))


def test_missing_peft_is_named_with_its_extra(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("smolvla", trainable="lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"policy.trainable.*pip install 'lerobot_policy_pi_rl\[peft\]'"):
        PIRLPolicy(config)


@pytest.mark.parametrize(
    ("stock", "said"),
    [
        (
            {"objective": "diffusion"},
            r"policy.base.objective.*'diffusion' has no flow.*objective=flow_matching",
        ),
        ({"n_obs_steps": 2}, r"policy.base.n_obs_steps.*reads 2; train it with n_obs_steps=1"),
    ],
)
def test_what_multi_task_dit_cannot_do_here_is_one_line(
    make_config: MakeConfig, stock: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        make_config("multi_task_dit", stock)
    assert "\n" not in str(error.value)


def test_multi_task_dit_acts_by_euler_steps(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """LeRobot's default is `rk4`, and a checkpoint's own setting cannot be given beside it."""
    config = make_config("multi_task_dit", {"integration_method": "rk4"})
    assert config.base.integration_method == "euler"
    assert "in place of integration_method=rk4" in caplog.text


@pytest.mark.parametrize("kind", ["flow_sde", "flow_cps"])
def test_evo1_explores_by_flow_noise_only(make_config: MakeConfig, kind: str) -> None:
    said = rf"policy.explorer.kind.*uniform noise.*'{kind}' does not hold; set it to 'flow_noise'"
    with pytest.raises(ConfigError, match=said) as error:
        make_config("evo1", explorer=ExplorerConfig(kind))
    assert "\n" not in str(error.value)


def test_vla_jepa_is_loaded_without_its_world_model(make_config: MakeConfig) -> None:
    """Its encoder would be read from the hub, which is not there."""
    policy = PIRLPolicy(make_config("vla_jepa", {"enable_world_model": True})).base.policy
    assert policy.model.video_encoder is None
    assert not policy.config.enable_world_model


@pytest.mark.parametrize("name", ["smolvla", "groot", "multi_task_dit", "compact"])
def test_a_base_without_a_precision_of_its_own_is_one_line(make_config: MakeConfig, name: str) -> None:
    said = rf"policy.dtype.*'{name}' has no setting.*\['eo1', .*'xvla'\].*leave it out"
    with pytest.raises(ConfigError, match=said) as error:
        PIRLConfig(device="cpu", dtype="bfloat16") if name == "compact" else make_config(
            name, dtype="bfloat16"
        )
    assert "\n" not in str(error.value)


def test_an_unknown_precision_is_one_line(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"policy.dtype.*'float16'.*\['float32', 'bfloat16'\]") as error:
        make_config("pi0", dtype="float16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["expert_lora", "lora"])
def test_a_mode_without_layers_to_adapt_is_one_line(make_config: MakeConfig, mode: str) -> None:
    state_only = {"input_features": {OBS_STATE: PolicyFeature(FeatureType.STATE, (5,))}}
    with pytest.raises(ConfigError, match=rf"policy.trainable.*'{mode}' puts adapters into layers.*'expert'"):
        PIRLPolicy(make_config("multi_task_dit", state_only, trainable=mode))


def test_a_camera_that_is_only_padding_is_not_asked_of_the_environment(make_config: MakeConfig) -> None:
    config = make_config("pi0", {"empty_cameras": 1})
    config.stock.validate_features()
    padded = "observation.images.empty_camera_0"
    assert padded in config.stock.input_features
    assert padded not in config.input_features
    # Saved with the checkpoint, it comes back the same way.
    again = PIRLConfig(base=config.stock, device="cpu")
    assert padded not in again.input_features
    assert again.input_features["observation.state"] == PolicyFeature(FeatureType.STATE, (5,))
