"""Checkpoints that LeRobot has fine-tuned by adapters (`lerobot-train --peft`)."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_policy
from lerobot.policies.factory import get_policy_class
from safetensors.torch import load_file, save_file
from torch import Tensor

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.processor_pi_rl import make_pi_rl_pre_post_processors
from lerobot_policy_pi_rl.scripts.export import export

from .conftest import Batch, own_chunk, stock_chunk
from .window import WindowConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")

SaveAdapters = Callable[..., Path]


def as_lerobot_loads_it(folder: Path) -> Any:
    """The stock policy with its adapters beside its layers."""
    config = PreTrainedConfig.from_pretrained(folder)
    assert config.use_peft
    config.pretrained_path = folder
    return make_policy(config, env_cfg=WindowConfig()).eval()


def chunk_of(policy: Any, batch: Batch) -> Tensor:
    """The chunk of a policy within adapters."""
    return stock_chunk(policy.get_base_model(), batch)


@pytest.mark.parametrize(
    ("name", "peft"),
    [("smolvla", {}), ("pi0", {}), ("pi0", {"full_training_modules": ["action_out_proj"]})],
)
def test_adapters_are_merged_on_the_way_in(
    save_adapters: SaveAdapters, batch: Batch, name: str, peft: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_adapters(name, **peft)
    assert not (folder / "model.safetensors").exists()
    adapted = as_lerobot_loads_it(folder)
    expected = chunk_of(adapted, batch)
    with adapted.disable_adapter():
        assert float((chunk_of(adapted, batch) - expected).abs().max()) > 1e-3
    config = PIRLConfig(base_path=str(folder), device="cpu")
    policy = PIRLPolicy(config)
    assert not any("lora" in key for key in policy.state_dict())
    chunk = own_chunk(policy, batch)
    # Merging rounds once more.
    torch.testing.assert_close(chunk, expected, rtol=1e-4, atol=1e-4)
    policy.save_pretrained(tmp_path / "pi_rl")
    for processor in make_pi_rl_pre_post_processors(config):
        processor.save_pretrained(tmp_path / "pi_rl")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    stock = get_policy_class(name).from_pretrained(tmp_path / "stock")
    assert not stock.config.use_peft
    assert load_file(tmp_path / "stock" / "model.safetensors").keys() <= stock.state_dict().keys()
    assert torch.equal(stock_chunk(stock, batch), chunk)


def test_adapters_of_our_own_are_put_on_top(save_adapters: SaveAdapters, batch: Batch) -> None:
    folder = save_adapters("pi0")
    plain, more = (
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu", trainable=mode))
        for mode in ("expert", "lora")
    )
    assert torch.equal(own_chunk(more, batch), own_chunk(plain, batch))
    trained = {key for key, parameter in more.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in key for key in trained)


def test_adapters_whose_policy_is_not_there_are_one_line(save_adapters: SaveAdapters) -> None:
    folder = save_adapters("pi0")
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text())
    shutil.rmtree(saved["base_model_name_or_path"])
    for base, said in (
        (saved["base_model_name_or_path"], "of .*pi0, which"),
        (None, "of a policy that is not named"),
    ):
        file.write_text(json.dumps(saved | {"base_model_name_or_path": base}))
        with pytest.raises(
            ConfigError, match=rf"policy.base_path.*holds adapters {said}.*put it there"
        ) as error:
            PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
        assert "\n" not in str(error.value)


def test_half_of_the_adapters_is_one_line(save_adapters: SaveAdapters) -> None:
    """They would do nothing, and the run would begin with another policy than the one that was trained."""
    folder = save_adapters("pi0")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(dict(sorted(weights.items())[: len(weights) // 2]), file)
    with pytest.raises(ConfigError, match=r"policy.base_path.*lacks some of its adapters' weights; copy"):
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))


def test_adapters_without_peft_are_one_line(
    save_adapters: SaveAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapters("pi0")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"policy.base_path.*need peft.*\[peft\]") as error:
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
    assert "\n" not in str(error.value)
