"""A stock checkpoint on its way in, through a `pi_rl` checkpoint, and out again."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.processor_pi_rl import make_pi_rl_pre_post_processors
from lerobot_policy_pi_rl.scripts.export import export

from .conftest import (
    BASES,
    DRAW_IN_BFLOAT16,
    DTYPES,
    READ_PADDING,
    equal,
    explorer,
    features,
    own_chunk,
    precision,
    stock_chunk,
    stock_chunk_from,
)

pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"


def raw_observation(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "observation.images.top": torch.rand(2, 3, 32, 32, generator=generator),
        OBS_STATE: torch.randn(2, 5, generator=generator),
        # Equally long where the stock policy reads the padding of a shorter one, or counts it.
        "task": ["pick the cube", "pick up the" if name in READ_PADDING else "pick up"],
    }


def loaded_equal(name: str, one: Tensor, two: Tensor, mode: str = "expert") -> bool:
    """Whether chunks are the same, of policies whose weights were put into memory by different loaders.

    X-VLA's matrices are then aligned otherwise, and some processors round a product of equal matrices otherwise in its
    last bit; `assert_same_weights` compares the matrices themselves. What the stock policy trains may be frozen in
    the mode `lora`.
    """
    if name == "xvla":
        return torch.allclose(one, two, rtol=1e-6, atol=1e-6)
    return equal(name, one, two) if mode == "lora" else torch.equal(one, two)


def assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    """Every tensor of two stock policies is the same to the bit."""
    theirs, ours = one.state_dict(), two.state_dict()
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype, key
        assert torch.equal(value, ours[key]), key


@pytest.mark.parametrize("name", BASES)
def test_everything_is_taken_from_the_stock_checkpoint(save_stock: Callable[[str], Path], name: str) -> None:
    folder = save_stock(name)
    stock = get_policy_class(name).from_pretrained(folder)
    config = PIRLConfig(base_path=str(folder), device="cpu", explorer=explorer(name))
    steps = 4 if name == "toy" else 3
    assert (config.chunk_size, config.n_action_steps, config.num_inference_steps) == (6, 3, steps)
    assert config.input_features == stock.config.input_features
    policy = PIRLPolicy(config)
    theirs = make_pre_post_processors(stock.config, str(folder))
    ours = make_pi_rl_pre_post_processors(config)
    batch, expected = ours[0](raw_observation(name)), theirs[0](raw_observation(name))
    assert all(torch.equal(batch[key], value) for key, value in expected.items() if isinstance(value, Tensor))
    chunk = stock_chunk(stock, expected)
    assert_same_weights(stock, policy.base.policy)
    assert loaded_equal(name, own_chunk(policy, batch), chunk)
    assert torch.equal(ours[1](chunk), theirs[1](chunk))


@pytest.mark.parametrize(
    ("name", "was", "wanted"),
    [
        (name, "float32", "bfloat16")
        for name in ("pi0", "pi05", "xvla", "eo1", "evo1", "vla_jepa", "molmoact2")
    ]
    + [("pi0", "bfloat16", "float32")],
)
def test_the_precision_of_a_checkpoint_can_be_changed(
    save_stock: Callable[..., Path], name: str, was: str, wanted: str, tmp_path: Path
) -> None:
    """As if its configuration had it, in the export, too."""
    folder = save_stock(name, **precision(name, was))
    config = PIRLConfig(base_path=str(folder), device="cpu", explorer=explorer(name), dtype=wanted)
    dtypes = {key: value.dtype for key, value in PIRLPolicy(config).base.policy.state_dict().items()}
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | precision(name, wanted)))
    stock = get_policy_class(name).from_pretrained(folder)
    assert dtypes == {key: value.dtype for key, value in stock.state_dict().items()}
    assert (torch.bfloat16 in dtypes.values()) is (wanted == "bfloat16")
    save_pi_rl(config, tmp_path / "pi_rl")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    again = get_policy_class(name).from_pretrained(tmp_path / "stock")
    assert dtypes == {key: value.dtype for key, value in again.state_dict().items()}


RELATIVE = {
    "use_relative_actions": True,
    "relative_exclude_joints": ["gripper"],
    "action_feature_names": ["one", "two", "three", "gripper"],
}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_relative_actions_are_those_of_the_stock_policy(
    save_stock: Callable[..., Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint, a `pi_rl` one and the export: chunks are added to the state that they were chosen in."""
    folder = save_stock(name, **RELATIVE)
    config = PIRLConfig(base_path=str(folder), device="cpu")
    policy = PIRLPolicy(config)
    save_pi_rl(config, tmp_path / "pi_rl")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    # lerobot-eval would add each of a chunk's actions to another state.
    assert "relative to the state, and it executes 3 of them at a time" in capsys.readouterr().err
    stock = get_policy_class(name).from_pretrained(folder)
    theirs = make_pre_post_processors(stock.config, str(folder))
    seen = raw_observation(name)
    shown = {ACTION: torch.randn(2, 6, 4)}
    expected = theirs[0](seen | shown)
    chunk = stock_chunk(stock, expected)
    absolute = theirs[1](chunk)
    stock_config = PreTrainedConfig.from_pretrained(tmp_path / "stock")
    for ours in (
        make_pi_rl_pre_post_processors(config),
        make_pre_post_processors(
            PreTrainedConfig.from_pretrained(tmp_path / "pi_rl"), str(tmp_path / "pi_rl")
        ),
        make_pre_post_processors(stock_config, str(tmp_path / "stock")),
    ):
        batch = ours[0](seen | shown)
        assert torch.equal(batch[ACTION], expected[ACTION])
        del batch[ACTION]
        own = own_chunk(policy, batch)
        assert torch.equal(ours[1](own), absolute)
        # All but the gripper move with the state.
        ours[0](seen | {OBS_STATE: seen[OBS_STATE] + 1})
        moved = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(2, 6, 4)
        torch.testing.assert_close(ours[1](own) - absolute, moved)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_a_checkpoint_is_exported_as_a_stock_one(
    save_stock: Callable[..., Path], name: str, dtype: str, tmp_path: Path
) -> None:
    folder = save_stock(name, **precision(name, dtype))
    config = PIRLConfig(base_path=str(folder), device="cpu", num_inference_steps=2, explorer=explorer(name))
    policy = PIRLPolicy(config)
    with torch.no_grad():
        # As if trained.
        for parameter in policy.base._head.parameters():
            parameter.mul_(1.5)
    policy.save_pretrained(tmp_path / "pi_rl")
    for processor in make_pi_rl_pre_post_processors(config):
        processor.save_pretrained(tmp_path / "pi_rl")
    assert json.loads((tmp_path / "pi_rl" / "config.json").read_text())["base_path"] is None
    said = export(tmp_path / "pi_rl", tmp_path / "stock")
    assert name in said
    stock_config = PreTrainedConfig.from_pretrained(tmp_path / "stock")
    assert (stock_config.type, stock_config.n_action_steps) == (name, 3)
    stock = get_policy_class(name).from_pretrained(tmp_path / "stock", config=stock_config)
    batch = make_pre_post_processors(stock_config, str(tmp_path / "stock"))[0](raw_observation(name))
    expected = own_chunk(policy, batch)
    assert_same_weights(stock, policy.base.policy)
    if dtype == "bfloat16" and name in DRAW_IN_BFLOAT16:
        noise = policy.initial_noise(policy.encode(dict(batch)))
        drawn = policy.predict_action_chunk(dict(batch), noise=noise)
        exported = stock_chunk_from(stock, batch, noise)
        assert torch.equal(exported, drawn[:, : exported.shape[1]])
    else:
        assert loaded_equal(name, stock_chunk(stock, batch), expected)
    assert loaded_equal(name, own_chunk(PIRLPolicy.from_pretrained(tmp_path / "pi_rl"), batch), expected)


@pytest.mark.parametrize("name", BASES)
def test_adapters_are_merged_into_what_is_exported(
    save_stock: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    config = PIRLConfig(
        base_path=str(save_stock(name)), device="cpu", trainable="lora", lora_rank=2, explorer=explorer(name)
    )
    policy = PIRLPolicy(config)
    preprocessor, postprocessor = make_pi_rl_pre_post_processors(config)
    batch = preprocessor(raw_observation(name))
    before = own_chunk(policy, batch)
    with torch.no_grad():
        for key, parameter in policy.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.2)
    changed = own_chunk(policy, batch)
    assert float((changed - before).abs().max()) > 1e-3
    policy.save_pretrained(tmp_path / "pi_rl")
    for processor in (preprocessor, postprocessor):
        processor.save_pretrained(tmp_path / "pi_rl")
    again = PIRLPolicy.from_pretrained(tmp_path / "pi_rl")
    assert loaded_equal(name, own_chunk(again, batch), changed, "lora")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    assert not any("lora" in key for key in load_file(tmp_path / "stock" / WEIGHTS))
    stock = get_policy_class(name).from_pretrained(tmp_path / "stock")
    exported = stock_chunk(stock, batch)
    # Merging rounds once more; what is merged is exported to the bit.
    rounding = 0.05 if name == "vla_jepa" else 1e-3  # its VLM runs in bfloat16 autocast
    torch.testing.assert_close(exported, changed, rtol=1e-4, atol=rounding)
    merged = policy.base.export()
    assert_same_weights(stock, merged)
    assert loaded_equal(name, stock_chunk(merged, batch), exported, "lora")


@pytest.mark.parametrize("name", BASES)
def test_a_checkpoint_that_lacks_weights_is_refused(save_stock: Callable[[str], Path], name: str) -> None:
    folder = save_stock(name)
    tensors = load_file(folder / WEIGHTS)
    removed = next(
        name for name in tensors if re.search("action_out_proj|action_decoder|output_proj|head.*weight", name)
    )
    del tensors[removed]
    save_file(tensors, folder / WEIGHTS)
    said = rf"policy.base_path.*was not loaded as a {name}: .*{removed}"
    with pytest.raises(ConfigError, match=said) as error:
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu", explorer=explorer(name)))
    assert re.search("[Mm]issing", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_checkpoint_without_its_embedding_is_read_as_lerobot_does(
    save_stock: Callable[[str], Path], name: str, prefix: str
) -> None:
    """So they are published: the embedding is the matrix of the output layer."""
    folder = save_stock(name)
    tensors = load_file(folder / WEIGHTS)
    (embedding,) = (key for key in tensors if key.endswith("language_model.embed_tokens.weight"))
    (head,) = (key for key in tensors if key.endswith("paligemma.lm_head.weight"))
    del tensors[embedding]
    tensors = {prefix + key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    policy = PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
    loaded = policy.base.policy.state_dict()
    assert torch.equal(loaded[embedding], tensors[prefix + head.removeprefix("model.")])
    # Nothing else may be missing.
    del tensors[prefix + head.removeprefix("model.")]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="was not loaded"):
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"policy.base_path.*cannot be read as a LeRobot checkpoint"
    ) as error:
        PIRLConfig(base_path=str(tmp_path), device="cpu")
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_kind_is_one_line(tmp_path: Path) -> None:
    from lerobot.policies.act.configuration_act import ACTConfig

    ACTConfig(device="cpu", push_to_hub=False).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"policy.base_path.*holds a 'act', which is no base; the bases are"
    ):
        PIRLConfig(base_path=str(tmp_path), device="cpu")


def save_pi_rl(config: PIRLConfig, folder: Path) -> None:
    PIRLPolicy(config).save_pretrained(folder)
    for processor in make_pi_rl_pre_post_processors(config):
        processor.save_pretrained(folder)


def test_what_is_exported_runs_where_it_was_trained(
    save_stock: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wherever the export itself was made."""
    checkpoint = tmp_path / "000010" / "pretrained_model"
    save_pi_rl(PIRLConfig(base_path=str(save_stock("smolvla")), device="cpu"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"device": "cuda"}))
    export(checkpoint, tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["device"] == "cuda"


def test_half_a_checkpoint_is_not_exported(save_stock: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "000010" / "pretrained_model"
    save_pi_rl(PIRLConfig(base_path=str(save_stock("smolvla")), device="cpu"), checkpoint)
    (checkpoint / "policy_postprocessor.json").unlink()
    for path, said in (
        (checkpoint, "lacks policy_postprocessor.json"),
        (checkpoint.parent, f"is in {checkpoint}"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            export(path, tmp_path / "stock")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "stock").exists()


def test_folders_of_the_processors_are_exported(save_stock: Callable[[str], Path], tmp_path: Path) -> None:
    """LeRobot after 0.6.1 saves a tokenizer in a folder beside the processor that reads it."""
    checkpoint = tmp_path / "000010" / "pretrained_model"
    save_pi_rl(PIRLConfig(base_path=str(save_stock("smolvla")), device="cpu"), checkpoint)
    (checkpoint / "tokenizer/parts").mkdir(parents=True, exist_ok=True)
    (checkpoint / "tokenizer/parts/words.txt").write_text("one two", encoding="utf-8")
    export(checkpoint, tmp_path / "stock")
    assert (tmp_path / "stock/tokenizer/parts/words.txt").read_text(encoding="utf-8") == "one two"


def test_an_export_that_does_not_load_is_no_success(
    save_stock: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "000010" / "pretrained_model"
    save_pi_rl(PIRLConfig(base_path=str(save_stock("smolvla")), device="cpu"), checkpoint)
    next(checkpoint.glob("policy_preprocessor_step_*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"stock was written, but LeRobot .* cannot load it here") as error:
        export(checkpoint, tmp_path / "stock")
    assert "\n" not in str(error.value)


def test_weights_in_shards_only_are_one_line(save_stock: Callable[[str], Path]) -> None:
    folder = save_stock("smolvla")
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ConfigError, match=r"policy.base_path.*shards only.*lerobot-convert-dcp"):
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))


@pytest.mark.parametrize("memory", ["use_visual_memory", "use_proprioceptive_memory"])
def test_a_policy_that_reads_earlier_observations_is_refused(
    save_stock: Callable[[str], Path], memory: str
) -> None:
    """pi0.5 after LeRobot 0.6.1."""
    folder = save_stock("pi05")
    config = PreTrainedConfig.from_pretrained(folder)
    setattr(config, memory, True)
    with pytest.raises(ConfigError, match=rf"policy.base.{memory}.*a decision has one"):
        PIRLConfig(base=config, device="cpu")


def test_a_step_that_is_none_is_not_exported(save_stock: Callable[[str], Path], tmp_path: Path) -> None:
    """LeRobot's commands would run what the copied file names."""
    checkpoint = tmp_path / "000010" / "pretrained_model"
    save_pi_rl(PIRLConfig(base_path=str(save_stock("smolvla")), device="cpu"), checkpoint)
    step = {"class": "subprocess.Popen", "config": {"args": ["true"]}}
    (checkpoint / "policy_preprocessor.json").write_text(json.dumps({"name": "x", "steps": [step]}))
    with pytest.raises(ConfigError, match=r"'subprocess\.Popen', which is no processor step"):
        export(checkpoint, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_the_compact_base_has_nothing_to_export(tmp_path: Path) -> None:
    save_pi_rl(PIRLConfig(device="cpu", **features()), tmp_path / "compact")
    with pytest.raises(ConfigError, match="has the compact base"):
        export(tmp_path / "compact", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
