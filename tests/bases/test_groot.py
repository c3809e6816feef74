"""GR00T N1.7: pictures without rows, prompts beside others, its base model, and what of it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.groot.groot_n1_7 import GR00TN17
from lerobot.policies.groot.modeling_groot import GrootPolicy
from lerobot.utils.constants import OBS_STATE
from safetensors.torch import load_file
from torch import nn

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.bases.groot import UnloadedGroot
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.processor_pi_rl import make_pi_rl_pre_post_processors

from .conftest import (
    ACTION_DIM,
    CHUNK,
    PIXELS,
    STATE_DIM,
    MakeStock,
    features,
    own_chunk,
    packed,
    stock_chunk,
    stock_chunk_from,
)
from .two_cameras import (
    TASKS,
    WRIST,
    change_config,
    from_one_camera,
    raw_observations,
    some_of,
    whole_state,
)

MakeConfig = Callable[..., PIRLConfig]
MakePolicy = Callable[..., PIRLPolicy]


@pytest.fixture
def name() -> str:
    """The base of these tests."""
    return "groot"


@pytest.fixture
def mixed(make_stock: MakeStock) -> dict[str, Any]:
    """Preprocessed observations with two cameras, whose prompts are not equally long."""
    return packed(make_stock("groot"), raw_observations())


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 2, 1]])
def test_rows_are_taken_with_their_own_pictures(
    make_policy: MakePolicy, make_stock: MakeStock, mixed: dict[str, Any], rows: list[int]
) -> None:
    base = make_policy().base
    assert base.rows(mixed) == 3
    assert len(mixed["pixel_values"]) == 3 * 2 * (PIXELS // 8) ** 2
    part = base.take(mixed, torch.tensor(rows))
    expected = packed(make_stock("groot"), some_of(raw_observations(), rows))
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(part[key], expected[key])
    assert part["task"] == [TASKS[row] for row in rows]
    # Prompts keep the padding that they had.
    assert torch.equal(part["input_ids"], mixed["input_ids"][rows])


def test_an_observation_s_chunk_is_what_the_stock_policy_gives_it_alone(
    make_policy: MakePolicy, mixed: dict[str, Any]
) -> None:
    policy, noise = make_policy(), torch.randn(3, CHUNK, 8)
    for parameter in policy.base._action_head.vl_self_attention.parameters():
        # Large enough to see what they attend to.
        nn.init.normal_(parameter, std=0.5)
    together = policy.predict_action_chunk(dict(mixed), noise=noise)[:, :3]
    stock: Any = policy.base.policy
    in_batch = stock_chunk_from(stock, mixed, noise)
    for row, task in enumerate(TASKS):
        part = policy.base.take(mixed, torch.tensor([row]))
        length = int(part["attention_mask"].sum())
        cut = {k: v[:, -length:] for k, v in part.items() if k in ("input_ids", "attention_mask")}
        del part["mm_token_type_ids"]
        alone = stock_chunk_from(stock, part | cut, noise[[row]])
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=1e-5)
        # In a batch, the stock policy reads the padding of all but the longest.
        is_same = torch.allclose(in_batch[[row]], alone, rtol=0, atol=1e-4)
        assert is_same is (len(task.split()) == max(len(other.split()) for other in TASKS))


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


def test_in_autocast_the_chunk_is_the_stock_policy_s_to_the_bit(
    make_policy: MakePolicy, batch: dict[str, Any]
) -> None:
    """With four steps, its default: their length has no rounding in bfloat16."""
    policy = make_policy({"use_bf16": True}, num_inference_steps=4)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    expected = stock_chunk(policy.base.policy, batch)
    assert torch.equal(own_chunk(policy, batch), expected)
    precise = stock_chunk(make_policy({"use_bf16": False}, num_inference_steps=4).base.policy, batch)
    assert not torch.equal(expected, precise)


@pytest.mark.parametrize("use_bf16", [True, False])
def test_a_chunk_of_weights_in_bfloat16_scores_as_it_was_sampled(
    make_policy: MakePolicy, batch: dict[str, Any], gr00t: Path, tmp_path: Path, use_bf16: bool
) -> None:
    base = shutil.copytree(gr00t, tmp_path / "base")
    change_config(base, dtype="bfloat16")
    own = {"base_model_path": str(base), "model_params_fp32": False, "use_bf16": use_bf16}
    policy = make_policy(own)
    assert policy.base._head.W.dtype is torch.bfloat16
    # The small Qwen3-VL's own are in float32.
    policy.base._model.backbone.to(torch.bfloat16)
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_prob = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    assert float(((log_prob - sample.log_prob).sum(1).exp() - 1).abs().max()) <= 0.1


@pytest.mark.parametrize(("use_bf16", "tolerance"), [(True, 0.1), (False, 1e-3)])
def test_autocast_is_allowed_for_in_the_first_ratio(
    make_policy: MakePolicy, use_bf16: bool, tolerance: float
) -> None:
    policy = make_policy({"use_bf16": use_bf16})
    algorithm = PIRLAlgorithm(policy, PIRLAlgorithmConfig(policy_config=policy.config))
    assert algorithm.ratio_tolerance == tolerance


@pytest.mark.parametrize("in_float32", [True, False])
def test_a_checkpoint_needs_no_weights_of_its_base_model(
    save_stock: Callable[..., Path],
    gr00t: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_float32: bool,
) -> None:
    base = shutil.copytree(gr00t, tmp_path / "base")
    change_config(base, dtype="bfloat16")
    folder = save_stock("groot", base_model_path=str(base), model_params_fp32=in_float32)
    expected = GrootPolicy.from_pretrained(folder)
    monkeypatch.setattr(GR00TN17, "from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    (base / "model.safetensors").unlink()
    policy = PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
    theirs, ours = whole_state(expected), whole_state(policy.base.policy)
    assert theirs.keys() == ours.keys()
    assert (torch.bfloat16 in {value.dtype for value in theirs.values()}) is not in_float32
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype
        assert torch.equal(value, ours[key]), key
    # Nor does what came of it.
    policy.save_pretrained(tmp_path / "pi_rl")
    config = PIRLConfig.from_pretrained(tmp_path / "pi_rl")
    again = PIRLPolicy.from_pretrained(tmp_path / "pi_rl", config=config)
    assert isinstance(again.base.policy, UnloadedGroot)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in policy.state_dict().items())


def test_without_a_checkpoint_it_begins_as_its_base_model(make_policy: MakePolicy, gr00t: Path) -> None:
    own = make_policy().base.policy._groot_model.state_dict()
    saved = load_file(gr00t / "model.safetensors")
    assert saved
    assert all(torch.equal(value, own[key]) for key, value in saved.items())


def test_a_base_model_that_is_not_there_is_one_line(
    save_stock: Callable[..., Path], gr00t: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(gr00t, tmp_path / "base")
    folder = save_stock("groot", base_model_path=str(base))
    shutil.rmtree(base)
    with pytest.raises(
        ConfigError, match=r"policy.base.base_model_path.*/base' has no configuration"
    ) as error:
        PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
    assert "\n" not in str(error.value)


@pytest.fixture
def four_actions(gr00t: Path, tmp_path: Path) -> Path:
    """A base model that knows one embodiment, with chunks of four actions, and takes five steps."""
    folder = shutil.copytree(gr00t, tmp_path / "four")
    rep = {"rep": "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT"}
    modality = {
        "state": {"modality_keys": ["arm"]},
        "action": {"modality_keys": ["arm"], "delta_indices": [0, 1, 2, 3], "action_configs": [rep]},
    }
    known = {"processor_kwargs": {"modality_configs": {"new_embodiment": modality}}}
    (folder / "processor_config.json").write_text(json.dumps(known))
    stats = {
        kind: {"arm": {"min": [-2.0] * dim, "max": [4.0] * dim, "mean": [1.0] * dim, "std": [1.0] * dim}}
        for kind, dim in (("state", STATE_DIM), ("action", ACTION_DIM))
    }
    (folder / "statistics.json").write_text(json.dumps({"new_embodiment": stats}))
    change_config(folder, num_inference_timesteps=5)
    return folder


def test_a_chunk_has_the_actions_of_the_embodiment(
    make_policy: MakePolicy, batch: dict[str, Any], four_actions: Path
) -> None:
    own = {"base_model_path": str(four_actions), "n_action_steps": CHUNK, "num_inference_timesteps": None}
    policy = make_policy(own)
    config = policy.config
    assert (config.chunk_size, config.n_action_steps, config.num_inference_steps) == (4, 4, 5)
    # All that its model predicts is denoised, and four of it are actions.
    sample = policy.explore(dict(batch))
    assert sample.chain.shape == (2, 2, CHUNK, 8)
    assert policy.base.actions(sample.x).shape == (2, 4, ACTION_DIM)
    expected = stock_chunk(policy.base.policy, batch)
    assert expected.shape == (2, 4, ACTION_DIM)
    assert torch.equal(own_chunk(policy, batch), expected)


def test_processors_of_a_base_model_are_its_own(make_policy: MakePolicy, four_actions: Path) -> None:
    policy = make_policy({"base_model_path": str(four_actions)})
    preprocessor, postprocessor = make_pi_rl_pre_post_processors(policy.config)
    raw = from_one_camera([0, 1])
    batch = preprocessor(raw)
    # From [-2, 4] to [-1, 1], and back.
    normalised = ((raw_observations()[OBS_STATE][:2] - 1) / 3).clamp(-1, 1)
    torch.testing.assert_close(batch["state"][:, 0, :STATE_DIM], normalised)
    actions = policy.base.actions(policy.explore(batch).x)
    torch.testing.assert_close(postprocessor(actions), actions.clamp(-1, 1) * 3 + 1)


def test_more_actions_than_there_are_is_one_line(
    make_policy: MakePolicy, make_config: MakeConfig, four_actions: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"policy.chunk_size.*6 is more than the 4.*'new_embodiment'"
    ) as error:
        make_config("groot", {"base_model_path": str(four_actions)}, chunk_size=6)
    assert "\n" not in str(error.value)
    with pytest.raises(
        ConfigError, match=r"policy.chunk_size.*7 is more than the 6.*model; set it to 6"
    ) as error:
        make_policy(chunk_size=7)
    assert "\n" not in str(error.value)


def test_the_steps_are_four_where_nothing_names_them(make_config: MakeConfig, tmp_path: Path) -> None:
    own = {"base_model_path": str(tmp_path / "not-here"), "num_inference_timesteps": None}
    assert make_config("groot", own).num_inference_steps == 4


def test_relative_actions_are_refused_in_one_line(
    make_config: MakeConfig, make_stock: MakeStock, save_stock: Callable[..., Path]
) -> None:
    with pytest.raises(
        ConfigError, match=r"policy.base.use_relative_actions.*is not supported.*=false"
    ) as error:
        make_config("groot", {"use_relative_actions": True})
    assert "\n" not in str(error.value)
    folder = save_stock("groot")
    saved = json.loads((folder / "policy_postprocessor.json").read_text())
    saved["steps"][0] = {
        "registry_name": "groot_n1_7_action_decode_v1",
        "config": {"env_action_dim": ACTION_DIM, "use_relative_action": True},
    }
    (folder / "policy_postprocessor.json").write_text(json.dumps(saved))
    with pytest.raises(
        ConfigError, match=r"policy.base_path.*relative to the state, which are not supported"
    ) as error:
        make_pi_rl_pre_post_processors(PIRLConfig(base_path=str(folder), device="cpu"))
    assert "\n" not in str(error.value)


def test_a_head_that_reads_padding_is_refused_in_one_line(
    make_policy: MakePolicy, gr00t: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gr00t, tmp_path / "plain")
    change_config(folder, use_alternate_vl_dit=False)
    with pytest.raises(ConfigError, match=r"policy.base.base_model_path.*attends to padding") as error:
        make_policy({"base_model_path": str(folder)})
    assert "\n" not in str(error.value)


def test_cameras_of_a_robot_may_be_several(make_policy: MakePolicy, mixed: dict[str, Any]) -> None:
    seen = features()["input_features"] | {WRIST: PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS))}
    policy = make_policy({"input_features": seen}, explorer=ExplorerConfig("flow_noise"))
    chunk = policy.predict_action_chunk(dict(mixed))
    darker = dict(mixed)
    # The last picture: the second camera of the third observation.
    patches = len(mixed["pixel_values"]) // 6
    darker["pixel_values"] = mixed["pixel_values"].clone()
    darker["pixel_values"][-patches:] -= 1
    noise = torch.randn(3, CHUNK, 8)
    one, two = (policy.predict_action_chunk(dict(b), noise=noise) for b in (mixed, darker))
    assert chunk.shape == (3, CHUNK, ACTION_DIM)
    assert torch.equal(one[:2], two[:2])
    assert not torch.equal(one[2], two[2])
