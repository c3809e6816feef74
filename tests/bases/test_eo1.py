"""EO1: pictures without rows, prompts beside others, one network for prompt and actions, and its VLM's weights."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.policies.eo1.modeling_eo1 import EO1Policy
from lerobot.utils.constants import ACTION
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from lerobot_policy_pi_rl.bases.lora import is_adapter
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.processor_pi_rl import make_pi_rl_pre_post_processors
from lerobot_policy_pi_rl.runtime.demonstrations import for_loss
from lerobot_policy_pi_rl.scripts.export import export

from .conftest import (
    ACTION_DIM,
    CHUNK,
    Batch,
    MakeStock,
    features,
    own_chunk,
    packed,
    statistics,
    stock_chunk,
    stock_loss,
)
from .two_cameras import (
    TASKS,
    WRIST,
    from_one_camera,
    raw_observations,
    some_of,
    unpadded,
    whole_state,
)

WIDTH = 8

MakeConfig = Callable[..., PIRLConfig]
MakePolicy = Callable[..., PIRLPolicy]


@pytest.fixture
def name() -> str:
    """The base of these tests."""
    return "eo1"


@pytest.fixture
def two_cameras(make_stock: MakeStock) -> Any:
    """Configuration of a policy with both."""
    seen = features()["input_features"] | {WRIST: PolicyFeature(FeatureType.VISUAL, (3, 16, 64))}
    return make_stock("eo1", input_features=seen)


@pytest.fixture
def mixed(two_cameras: Any) -> dict[str, Any]:
    """Preprocessed observations with two cameras, whose prompts are not equally long."""
    torch.manual_seed(5)
    return packed(two_cameras, raw_observations(16, 64))


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 2, 1]])
def test_rows_are_taken_with_their_own_pictures(
    make_policy: MakePolicy, two_cameras: Any, mixed: dict[str, Any], rows: list[int]
) -> None:
    base = make_policy().base
    assert base.rows(mixed) == 3
    grids = mixed["image_grid_thw"]
    assert len(grids) == 6
    assert not torch.equal(grids[0], grids[1])
    part = base.take(mixed, torch.tensor(rows))
    torch.manual_seed(5)
    expected = packed(two_cameras, some_of(raw_observations(16, 64), rows))
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(part[key], expected[key])
    assert part["task"] == [TASKS[row] for row in rows]
    assert [part[key] for key in ("state_token_id", "action_token_id")] == [
        expected[key] for key in ("state_token_id", "action_token_id")
    ]
    # Prompts keep the padding that they had.
    assert torch.equal(part["input_ids"], mixed["input_ids"][rows])


def stock_chunk_from(policy: Any, batch: dict[str, Any], noise: Tensor) -> Tensor:
    """A stock policy's own chunk from given noise."""
    draw = policy.model.sample_noise
    policy.model.sample_noise = lambda *_: noise.clone()
    try:
        return policy.predict_action_chunk(dict(batch))
    finally:
        policy.model.sample_noise = draw


def test_an_observation_s_chunk_does_not_depend_on_its_neighbours(
    make_policy: MakePolicy, mixed: dict[str, Any]
) -> None:
    policy, noise = make_policy(), torch.randn(3, CHUNK, WIDTH)
    together = policy.predict_action_chunk(dict(mixed), noise=noise)
    assert torch.equal(together, stock_chunk_from(policy.base.policy, mixed, noise))
    for row in range(3):
        part = unpadded(policy.base.take(mixed, torch.tensor([row])))
        alone = policy.predict_action_chunk(dict(part), noise=noise[[row]])
        assert torch.equal(alone, stock_chunk_from(policy.base.policy, part, noise[[row]]))
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=1e-5)
        # Another picture from the second camera is another observation.
        part["pixel_values"] = part["pixel_values"].clone()
        part["pixel_values"][-8:] -= 1
        moved = policy.predict_action_chunk(dict(part), noise=noise[[row]])
        assert float((moved - alone).abs().max()) > 1e-4


@pytest.mark.parametrize("trainable", ["expert", "all"])
def test_a_chunk_is_scored_the_same_beside_any_others(
    make_policy: MakePolicy, mixed: dict[str, Any], trainable: str
) -> None:
    policy = make_policy(trainable=trainable)
    sample = policy.explore(dict(mixed), torch.Generator().manual_seed(1))
    for rows in ([1], [2, 1], [0, 1]):
        part = policy.encode(policy.base.take(mixed, torch.tensor(rows)))
        log_prob = policy.score(part, sample.chain[rows], sample.step[rows]).log_prob
        torch.testing.assert_close(log_prob, sample.log_prob[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "scored"), [("flow_sde", 1), ("flow_noise", 3)])
def test_an_observation_is_encoded_once_for_all_steps(
    make_policy: MakePolicy, batch: Batch, monkeypatch: pytest.MonkeyPatch, kind: str, scored: int
) -> None:
    """What a step reads are its actions; the prompt, and its pictures, are in the cache."""
    policy = make_policy(explorer=ExplorerConfig(kind))
    backbone = policy.base._backbone
    looks = Mock(wraps=backbone.visual.forward)
    reads = Mock(wraps=backbone.language_model.forward)
    monkeypatch.setattr(backbone.visual, "forward", looks)
    monkeypatch.setattr(backbone.language_model, "forward", reads)
    sample = policy.explore(dict(batch))
    lengths = [call.kwargs["inputs_embeds"].shape[1] for call in reads.call_args_list]
    assert lengths[0] > CHUNK
    assert lengths[1:] == [CHUNK] * 3
    context = policy.encode(dict(batch))
    policy.score(context, sample.chain, sample.step)
    assert (looks.call_count, reads.call_count) == (2, 1 + 3 + 1 + scored)
    # Nothing is left in what is kept.
    policy.score(context, sample.chain, sample.step)
    assert context["keys"].shape[3] == lengths[0]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_in_bfloat16_the_chunk_is_the_stock_policy_s_to_the_bit(
    make_policy: MakePolicy, batch: Batch, steps: int
) -> None:
    policy = make_policy({"dtype": "bfloat16"}, num_inference_steps=steps)
    assert policy.base._head.weight.dtype == torch.float32
    assert policy.base._backbone.language_model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(own_chunk(policy, batch), stock_chunk(policy.base.policy, batch))


@pytest.mark.parametrize(
    "stock",
    [
        {"attn_implementation": "eager"},
        {"num_action_layers": 1},
        {"num_action_layers": 3, "action_act": "silu"},
        # LeRobot's own is for training mode.
        {"gradient_checkpointing": True},
    ],
)
def test_settings_of_the_stock_policy_change_nothing_about_that(
    make_policy: MakePolicy, batch: Batch, stock: dict[str, Any]
) -> None:
    policy = make_policy(stock, trainable="lora", lora_rank=2)
    assert torch.equal(own_chunk(policy, batch), stock_chunk(policy.base.policy, batch))
    expected = stock_loss(policy.base.policy.train(), batch)
    torch.manual_seed(3)
    assert torch.equal(policy.train().forward(dict(batch))[0], expected)
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))
    scored = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    torch.testing.assert_close(scored.detach(), sample.log_prob, rtol=0, atol=1e-4)
    scored.sum().backward()
    reached = {key for key, parameter in policy.named_parameters() if parameter.grad is not None}
    assert reached == {key for key, parameter in policy.named_parameters() if parameter.requires_grad}


def test_adapters_learn_from_prompt_and_actions(make_policy: MakePolicy, batch: Batch) -> None:
    """They are in layers that read both, and the prompt's keys and values are a part of the graph."""
    policy = make_policy(trainable="lora", lora_rank=2)
    for key, parameter in policy.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.3)
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))

    def gradients(**kept: Tensor) -> list[Tensor]:
        context = policy.encode(dict(batch)) | kept
        policy.zero_grad(set_to_none=True)
        policy.score(context, sample.chain, sample.step).log_prob.sum().backward()
        # Of the last layer's queries, those of the prompt are read by nobody.
        adapters = {key: p.grad for key, p in policy.named_parameters() if is_adapter(key)}
        return [gradient for key, gradient in adapters.items() if re.search(r"\.[kv]_proj\.", key)]

    context = policy.encode(dict(batch))
    whole = gradients()
    actions_only = gradients(keys=context["keys"].detach(), values=context["values"].detach())
    assert len(whole) == 8
    assert all(bool(gradient.any()) for gradient in actions_only)
    assert all(not torch.equal(*pair) for pair in zip(whole, actions_only, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_words_are_not_read_off(
    make_config: MakeConfig, make_policy: MakePolicy, batch: Batch, qwen25: Path, tmp_path: Path, tied: bool
) -> None:
    """The head for words is trained in no mode, the embeddings of words are, where the two are the same, too."""
    folder = shutil.copytree(qwen25, tmp_path / "own")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen25)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(folder)
    policy = make_policy({"vlm_base": str(folder)}, trainable="all")
    sample = policy.explore(dict(batch))
    policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob.sum().backward()
    backbone = policy.base._model.vlm_backbone
    assert (backbone.lm_head.weight is backbone.get_input_embeddings().weight) is tied
    assert backbone.lm_head.weight.requires_grad is tied
    assert bool(backbone.get_input_embeddings().weight.grad.any())
    unreached = {key for key, p in policy.named_parameters() if p.requires_grad and p.grad is None}
    assert not unreached


@pytest.fixture
def demonstrations(make_stock: MakeStock) -> dict[str, Any]:
    """As `lerobot-train` and co-training read them: beside actions, prompts are padded on the right."""
    stock = make_stock("eo1")
    preprocessor, _ = make_pre_post_processors(stock, dataset_stats=statistics(stock))
    raw = from_one_camera([0, 1])
    pad = torch.arange(CHUNK) > torch.tensor([[3], [5]])
    return for_loss(preprocessor(raw | {ACTION: torch.randn(2, CHUNK, ACTION_DIM), "action_is_pad": pad}))


@pytest.mark.parametrize("supervises", [True, False])
def test_demonstrations_have_the_stock_policy_s_loss(
    make_policy: MakePolicy, demonstrations: dict[str, Any], supervises: bool
) -> None:
    own = dict.fromkeys(("supervise_padding_actions", "supervise_padding_action_dims"), supervises)
    policy = make_policy(own)
    assert not demonstrations["attention_mask"][1, -1]
    expected = stock_loss(policy.base.policy, demonstrations)
    torch.manual_seed(3)
    assert torch.equal(policy.forward(demonstrations)[0], expected)
    # Cut, as batches are.
    part = policy.base.take(demonstrations, torch.tensor([1, 0]))
    assert torch.isfinite(policy.forward(part)[0])


def test_prompts_that_are_padded_on_the_right_are_not_acted_on(
    make_policy: MakePolicy, demonstrations: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"begin at \[20, 22\].*padded on the left"):
        make_policy().predict_action_chunk(demonstrations)


def test_a_chunk_of_another_length_changes_the_prompt(
    save_stock: Callable[..., Path], tmp_path: Path
) -> None:
    """The checkpoint's preprocessor writes a token for each action."""
    config = PIRLConfig(base_path=str(save_stock("eo1")), device="cpu", chunk_size=4)
    policy, processors = PIRLPolicy(config), make_pi_rl_pre_post_processors(config)
    raw = from_one_camera([0, 1])
    batch = processors[0](raw)
    chunk = own_chunk(policy, batch)
    assert chunk.shape == (2, 4, ACTION_DIM)
    policy.save_pretrained(tmp_path / "pi_rl")
    for processor in processors:
        processor.save_pretrained(tmp_path / "pi_rl")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    stock = EO1Policy.from_pretrained(tmp_path / "stock")
    theirs = make_pre_post_processors(stock.config, str(tmp_path / "stock"))[0](raw)
    assert torch.equal(stock_chunk(stock, theirs), chunk)
    # In a way that does not go through PI-RL's commands, the two may differ.
    policy.base.chunk_size = 5
    with pytest.raises(ConfigError, match=r"policy.chunk_size.*is 5, and the preprocessor writes \[4\]"):
        policy.encode(batch)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_a_checkpoint_needs_no_weights_of_its_vlm_alone(
    save_stock: Callable[..., Path],
    qwen25: Path,
    tmp_path: Path,
    dtype: str,
) -> None:
    base = shutil.copytree(qwen25, tmp_path / "base")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    folder = save_stock("eo1", vlm_base=str(base), dtype=dtype)
    expected = EO1Policy.from_pretrained(folder)
    (base / "model.safetensors").unlink()
    policy = PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
    theirs, ours = whole_state(expected), whole_state(policy.base.policy)
    assert theirs.keys() == ours.keys()
    assert (torch.bfloat16 in {value.dtype for value in theirs.values()}) is (dtype != "float32")
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype
        assert torch.equal(value, ours[key]), key
    # Nor does what came of it, which knows no more of where it was loaded than the stock policy's own.
    assert policy.config.base.pretrained_path == expected.config.pretrained_path
    policy.save_pretrained(tmp_path / "pi_rl")
    config = PIRLConfig.from_pretrained(tmp_path / "pi_rl")
    again = PIRLPolicy.from_pretrained(tmp_path / "pi_rl", config=config)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in policy.state_dict().items())
    # Nor do LeRobot's commands for what is exported, which name its folder in its configuration.
    for processor in make_pi_rl_pre_post_processors(config):
        processor.save_pretrained(tmp_path / "pi_rl")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    config = PreTrainedConfig.from_pretrained(tmp_path / "stock")
    config.pretrained_path = tmp_path / "stock"
    exported = EO1Policy.from_pretrained(tmp_path / "stock", config=config).state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in policy.base.policy.state_dict().items())


def test_without_a_checkpoint_it_begins_with_its_vlm(make_policy: MakePolicy, qwen25: Path) -> None:
    own = make_policy().base._model.vlm_backbone.state_dict()
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen25).state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(value, own[key]) for key, value in theirs.items())


def test_a_vlm_that_is_not_there_is_one_line(make_policy: MakePolicy, qwen25: Path, tmp_path: Path) -> None:
    base = shutil.copytree(qwen25, tmp_path / "base")
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"policy.base.vlm_base.*/base' cannot be loaded.*name") as error:
        make_policy({"vlm_base": str(base)})
    assert "\n" not in str(error.value)
