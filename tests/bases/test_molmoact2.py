"""MolmoAct2: what its sampler keeps, pictures without rows, prompts beside others, and what of it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.molmoact2.modeling_molmoact2 import MolmoAct2Policy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import nn

from lerobot_policy_pi_rl.algorithm.contexts import Contexts
from lerobot_policy_pi_rl.algorithm.storage import Observations
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.processor_pi_rl import make_pi_rl_pre_post_processors
from lerobot_policy_pi_rl.scripts.export import export

from .conftest import (
    ACTION_DIM,
    CAMERA,
    CHUNK,
    MOLMO_BINS,
    STATE_DIM,
    STATISTICS,
    MakeStock,
    own_chunk,
    packed,
    stock_chunk,
    stock_chunk_from,
    stock_loss,
)
from .two_cameras import (
    TASKS,
    WRIST,
    change_config,
    from_one_camera,
    raw_observations,
    some_of,
    unpadded,
)

WIDTH = 32

MakeConfig = Callable[..., PIRLConfig]
MakePolicy = Callable[..., PIRLPolicy]


@pytest.fixture
def name() -> str:
    """The base of these tests."""
    return "molmoact2"


@pytest.fixture
def two_cameras(make_stock: MakeStock) -> Any:
    """Configuration of a policy with both."""
    return make_stock("molmoact2", image_keys=[CAMERA, WRIST])


@pytest.fixture
def mixed(two_cameras: Any) -> dict[str, Any]:
    """Preprocessed observations with two cameras, whose prompts are not equally long."""
    torch.manual_seed(5)
    return packed(two_cameras, raw_observations(16, 24))


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 2, 1]])
def test_rows_are_taken_with_their_own_pictures(
    make_policy: MakePolicy, two_cameras: Any, mixed: dict[str, Any], rows: list[int]
) -> None:
    base = make_policy().base
    assert base.rows(mixed) == 3
    crops = mixed["image_num_crops"].tolist()
    assert crops == [*crops[:2]] * 3
    assert crops[0] != crops[1]
    part = base.take(mixed, torch.tensor(rows))
    expected = packed(two_cameras, some_of(raw_observations(16, 24), rows))
    for key in ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops"):
        assert torch.equal(part[key], expected[key])
    assert part["task"] == [TASKS[row] for row in rows]
    # Prompts keep the padding that they had.
    assert torch.equal(part["input_ids"], mixed["input_ids"][rows])


def test_an_observation_s_chunk_is_what_the_stock_policy_gives_it_alone(
    make_policy: MakePolicy, mixed: dict[str, Any]
) -> None:
    policy, noise = make_policy(), torch.randn(3, CHUNK, WIDTH)
    together = policy.predict_action_chunk(dict(mixed), noise=noise)[:, :3]
    stock: Any = policy.base.policy
    in_batch = stock_chunk_from(stock, mixed, noise)
    for row, task in enumerate(TASKS):
        part = unpadded(policy.base.take(mixed, torch.tensor([row])))
        alone = stock_chunk_from(stock, part, noise[[row]])
        assert torch.equal(policy.predict_action_chunk(dict(part), noise=noise[[row]])[:, :3], alone)
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=1e-5)
        # In a batch, the stock policy counts the padding of all but the longest, by which it turns their keys.
        is_same = torch.allclose(in_batch[[row]], alone, rtol=0, atol=1e-4)
        assert is_same is (len(task.split()) == max(len(other.split()) for other in TASKS))


@pytest.mark.parametrize("trainable", ["expert", "all"])
def test_a_chunk_is_scored_the_same_beside_any_others(
    make_policy: MakePolicy, mixed: dict[str, Any], trainable: str
) -> None:
    policy = make_policy(trainable=trainable)
    sample = policy.explore(dict(mixed), torch.Generator().manual_seed(1))
    parts = {rows: policy.base.take(mixed, torch.tensor(rows)) for rows in ((2, 1), (0, 1), (1,))}
    # Alone, as on a robot, without any padding.
    parts[(1,)] = unpadded(parts[(1,)])
    for rows, part in parts.items():
        log_prob = policy.score(policy.encode(part), sample.chain[[*rows]], sample.step[[*rows]]).log_prob
        torch.testing.assert_close(log_prob, sample.log_prob[[*rows]], rtol=0, atol=1e-4)


def test_kept_contexts_of_prompts_that_are_padded_part_by_part(
    make_policy: MakePolicy, mixed: dict[str, Any]
) -> None:
    """A part's prompts are padded to the longest of that part."""
    policy = make_policy()
    parts = [unpadded(policy.base.take(mixed, torch.tensor([row]))) for row in range(3)]
    assert len({part["input_ids"].shape[1] for part in parts}) > 1
    rows = {"row": torch.arange(3, dtype=torch.uint8)}
    seen = Observations(rows, TASKS, lambda observation, task: parts[int(observation["row"][0])])
    contexts = Contexts(policy, seen, "vlm", 1, 1e9, torch.device("cpu"))
    assert contexts.kept
    sample = policy.explore(dict(mixed), torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = policy.score(contexts.rows(torch.arange(3)), sample.chain, sample.step).log_prob
    torch.testing.assert_close(kept, sample.log_prob, rtol=0, atol=1e-4)


def test_after_an_update_the_velocity_is_that_of_the_new_weights(
    make_policy: MakePolicy, batch: dict[str, Any], tmp_path: Path
) -> None:
    """The stock sampler goes on with modulations of the old ones, until it is loaded anew."""
    policy = make_policy()
    expert = policy.base._expert
    before = own_chunk(policy, batch)
    policy.explore(dict(batch))
    assert expert._modulation_cache_key is None
    assert torch.equal(stock_chunk(policy.base.policy, batch), before)
    assert expert._modulation_cache_key is not None
    with torch.no_grad():
        for block in expert.blocks:
            block.modulation.linear.weight.mul_(1.5)
    after = own_chunk(policy, batch)
    assert float((after - before).abs().max()) > 1e-3
    assert torch.equal(stock_chunk(policy.base.policy, batch), before)
    # What is exported has nothing of it, be it in memory or loaded.
    exported = policy.base.export()
    assert torch.equal(stock_chunk(exported, batch), after)
    exported.save_pretrained(tmp_path / "exported")
    assert torch.equal(stock_chunk(MolmoAct2Policy.from_pretrained(tmp_path / "exported"), batch), after)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_in_bfloat16_the_chunk_is_the_stock_policy_s_to_the_bit(
    make_policy: MakePolicy, batch: dict[str, Any], steps: int
) -> None:
    """From the same noise: the stock sampler rounds its state in every step, and so does evaluation."""
    policy = make_policy({"model_dtype": "bfloat16"}, num_inference_steps=steps)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    noise = torch.randn(2, CHUNK, WIDTH)
    expected = stock_chunk_from(policy.base.policy, batch, noise)
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=noise)[:, :3], expected)


def test_adapters_in_bfloat16_are_scored_and_supervised(
    make_policy: MakePolicy, batch: dict[str, Any]
) -> None:
    policy = make_policy({"model_dtype": "bfloat16"}, trainable="lora", lora_rank=2)
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))
    log_prob = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    assert float(((log_prob.detach() - sample.log_prob).sum(1).exp() - 1).abs().max()) <= 0.1
    (log_prob.sum() + policy.forward(dict(batch))[0]).backward()
    reached = {key for key, parameter in policy.named_parameters() if parameter.grad is not None}
    assert reached
    assert all(".lora_" in key for key in reached)


def test_a_model_that_does_not_mask_its_padding_is_the_stock_policy_s(
    make_policy: MakePolicy, batch: dict[str, Any]
) -> None:
    policy = make_policy()
    masked = own_chunk(policy, batch)
    policy.base._backbone.config.mask_action_dim_padding = False
    expected = stock_chunk(policy.base.policy, batch)
    assert torch.equal(own_chunk(policy, batch), expected)
    assert not torch.equal(masked[:, :3], expected)


@pytest.mark.parametrize("freezes", [True, False])
def test_embeddings_are_trained_if_the_stock_policy_trains_them(
    make_policy: MakePolicy, batch: dict[str, Any], freezes: bool
) -> None:
    policy = make_policy({"freeze_embedding": freezes}, trainable="all")
    sample = policy.explore(dict(batch))
    policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob.sum().backward()
    embeddings = policy.base._backbone.transformer.wte.embedding
    assert (embeddings.grad is None) is freezes
    assert not policy.base._model.lm_head.weight.requires_grad


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """Folder with a small tokenizer of actions."""
    from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor

    folder, chunks = tmp_path / "fast", np.random.default_rng(0).uniform(-1, 1, (20, CHUNK, ACTION_DIM))
    made = UniversalActionProcessor.fit(list(chunks), scale=1, vocab_size=MOLMO_BINS)
    made.tokenizer.save_pretrained(folder)
    sizes = {"scale": made.scale, "vocab_size": made.vocab_size, "min_token": made.min_token}
    (folder / "processor_config.json").write_text(json.dumps(sizes))
    return folder


@pytest.mark.parametrize("mode", ["expert", "all"])
def test_a_policy_trained_for_both_kinds_of_actions_acts_by_its_flow(
    make_policy: MakePolicy, batch: dict[str, Any], fast: Path, mode: str
) -> None:
    both = {"action_mode": "both", "inference_action_mode": None, "discrete_action_tokenizer": str(fast)}
    policy = make_policy(both, trainable=mode)
    assert policy.base.policy.config.inference_action_mode == "continuous"
    assert torch.equal(own_chunk(policy, batch)[:, :3], stock_chunk(policy.base.policy, batch))
    raw = from_one_camera([0, 1])
    shown = {ACTION: torch.randn(2, CHUNK, ACTION_DIM), "action_is_pad": torch.zeros(2, CHUNK).bool()}
    demonstrations = packed(policy.config.stock, raw | shown)
    # Its loss is of both kinds; the one of tokens reaches the VLM only.
    expected = stock_loss(policy.base.policy, demonstrations)
    torch.manual_seed(3)
    loss = policy.forward(dict(demonstrations))[0]
    assert torch.equal(loss, expected)
    loss.backward()
    reached = {
        policy.base._is_expert(key)
        for key, p in policy.base.policy.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    assert reached == ({True} if mode == "expert" else {True, False})


@pytest.fixture
def tagged(molmo: Path, tmp_path: Path) -> Path:
    """A model that knows an embodiment, with chunks of five actions of which two are executed."""
    folder = shutil.copytree(molmo, tmp_path / "tagged")
    stats = {
        f"{kind}_stats": {stat: [-2.0 if stat in ("min", "q01") else 4.0] * dim for stat in STATISTICS}
        for kind, dim in (("state", STATE_DIM), ("action", ACTION_DIM))
    }
    known = stats | {"action_horizon": 5, "n_action_steps": 2, "setup_type": "arm", "control_mode": "joint"}
    (folder / "norm_stats.json").write_text(json.dumps({"metadata_by_tag": {"robot": known}}))
    return folder


def test_sizes_prompts_and_statistics_of_an_embodiment_are_its_own(
    make_config: MakeConfig, make_policy: MakePolicy, tagged: Path, tmp_path: Path
) -> None:
    own = {"checkpoint_path": str(tagged), "norm_tag": "robot", "num_inference_steps": None}
    config = make_config("molmoact2", own)
    assert (config.chunk_size, config.n_action_steps, config.num_inference_steps) == (5, 2, 3)
    # What is given wins, here and in what is exported.
    policy = make_policy(own, n_action_steps=4)
    assert (policy.config.chunk_size, policy.config.n_action_steps) == (5, 4)
    processors = make_pi_rl_pre_post_processors(policy.config)
    raw = from_one_camera([0])
    batch = processors[0](raw)
    # From [-2, 4] to [-1, 1], and back.
    normalised = ((raw[OBS_STATE] - 1) / 3).clamp(-1, 1)
    torch.testing.assert_close(batch[OBS_STATE], normalised)
    (pack,) = [step for step in processors[0].steps if hasattr(step, "setup_type")]
    assert (pack.setup_type, pack.control_mode) == ("arm", "joint")
    chunk = own_chunk(policy, batch)
    assert chunk.shape == (1, 4, ACTION_DIM)
    torch.testing.assert_close(processors[1](chunk), chunk.clamp(-1, 1) * 3 + 1)
    policy.save_pretrained(tmp_path / "pi_rl")
    for processor in processors:
        processor.save_pretrained(tmp_path / "pi_rl")
    export(tmp_path / "pi_rl", tmp_path / "stock")
    stock = MolmoAct2Policy.from_pretrained(tmp_path / "stock")
    assert (stock.config.norm_tag, stock.config.chunk_size, stock.config.n_action_steps) == (None, 5, 4)
    assert torch.equal(stock_chunk(stock, batch), chunk)


def test_the_steps_are_the_model_s_where_nothing_names_them(
    make_config: MakeConfig, molmo: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(molmo, tmp_path / "five")
    change_config(folder, flow_matching_num_steps=5)
    own = {"checkpoint_path": str(folder), "num_inference_steps": None}
    assert make_config("molmoact2", own).num_inference_steps == 5
    assert make_config("molmoact2", own, num_inference_steps=2).num_inference_steps == 2


@pytest.mark.parametrize(
    ("stock", "settings", "said"),
    [
        ({"action_mode": "discrete", "inference_action_mode": "discrete"}, {}, r"action_mode.*no flow"),
        ({"action_mode": "both", "inference_action_mode": "discrete"}, {}, r"inference_action_mode.*no flow"),
        ({"enable_lora_vlm": True}, {}, r"enable_lora_vlm.*expert_lora"),
        (
            {"enable_knowledge_insulation": True},
            {"trainable": "all"},
            r"enable_knowledge_insulation.*=all.*set it to false",
        ),
        ({"model_dtype": "float16"}, {}, r"model_dtype.*set it to 'bfloat16'"),
        ({"norm_tag": "robot"}, {}, r"norm_tag.*'robot' cannot be looked up.*missing"),
    ],
)
def test_what_it_cannot_do_here_is_one_line(
    make_config: MakeConfig, stock: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"policy.base.{said}") as error:
        make_config("molmoact2", stock, **settings)
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_fit_is_one_line(
    make_config: MakeConfig, make_policy: MakePolicy, molmo: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(molmo, tmp_path / "depth")
    change_config(folder, action_expert_depth_gate=True)
    with pytest.raises(ConfigError, match=r"policy.base.checkpoint_path.*weighs depth tokens") as error:
        make_config("molmoact2", {"checkpoint_path": str(folder)})
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"policy.chunk_size.*9 is more than the 8.*set it to 8") as error:
        make_config("molmoact2", chunk_size=9)
    assert "\n" not in str(error.value)
    with pytest.raises(
        ConfigError, match=r"policy.base.checkpoint_path.*not-here' cannot be loaded"
    ) as error:
        make_policy({"checkpoint_path": str(tmp_path / "not-here")})
    assert "\n" not in str(error.value)


def test_settings_of_the_stock_policy_come_back_with_a_checkpoint(
    make_policy: MakePolicy, batch: dict[str, Any], tmp_path: Path
) -> None:
    policy = make_policy({"freeze_embedding": False}, trainable="all", num_inference_steps=2)
    with torch.no_grad():
        nn.init.normal_(policy.base._head.weight)
    policy.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    again = PIRLPolicy.from_pretrained(tmp_path, config=config)
    assert not again.config.base.freeze_embedding
    assert torch.equal(own_chunk(again, batch), own_chunk(policy, batch))
