"""Gradient checkpointing and compilation change memory and time, and no number."""

import copy
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from lerobot_policy_pi_rl.bases import checkpointing
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

from .conftest import BASES, Batch, awaken

pytest.importorskip("transformers")

# The adapter of docs/bases.md names no blocks.
WITH_BLOCKS = tuple(name for name in BASES if name != "toy")
# Layers of SmolVLA's attention, which is in methods and no modules.
SMOLVLA_ATTENTION = r".*\.(text_model|lm_expert)\.layers\.\d+\.self_attn\.[qkv]_proj"

MakeConfig = Callable[..., PIRLConfig]
MakePolicy = Callable[..., PIRLPolicy]


@pytest.fixture
def make_policy(make_config: MakeConfig) -> MakePolicy:
    """Makes a policy with seeded weights."""

    def make(name: str, **settings: Any) -> PIRLPolicy:
        torch.manual_seed(0)
        policy = PIRLPolicy(make_config(name, **settings)).eval()
        awaken(policy)
        return policy

    return make


def scored(policy: PIRLPolicy, batch: Batch) -> Tensor:
    """Log-probabilities of a sampled chunk, with gradients."""
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))
    return policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob


def supervised(policy: PIRLPolicy, batch: Batch) -> Tensor:
    """The supervised loss with dropout, of one seed."""
    policy.train()
    torch.manual_seed(3)
    return policy.forward(dict(batch))[0]


def gradients(policy: PIRLPolicy, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by name."""
    loss.sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantity", [scored, supervised])
@pytest.mark.parametrize(
    ("mode", "kind"), [("expert", "flow_noise"), ("lora", "flow_sde"), ("all", "flow_sde")]
)
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_checkpointing_changes_no_bit(
    make_policy: MakePolicy,
    batch: Batch,
    name: str,
    mode: str,
    kind: str,
    quantity: Callable[[PIRLPolicy, Batch], Tensor],
) -> None:
    results = []
    for on in (False, True):
        explorer = ExplorerConfig("flow_noise" if name == "evo1" else kind)
        policy = make_policy(name, trainable=mode, explorer=explorer, gradient_checkpointing=on)
        value = quantity(policy, batch)
        results.append((value, gradients(policy, value)))
    (value, without), (same, with_it) = results
    assert torch.equal(value, same)
    assert without.keys() == with_it.keys()
    assert without
    for key, gradient in without.items():
        assert torch.equal(gradient, with_it[key]), key


def layers_in_blocks(policy: PIRLPolicy) -> dict[str, nn.Linear]:
    """The linear layers whose activations are not to be kept."""
    pattern = rf"(?:{policy.base.blocks})(?:\..*)?"
    if policy.base.policy.name == "smolvla":
        pattern += f"|{SMOLVLA_ATTENTION}"
    modules = policy.base.policy.named_modules()
    return {
        name: layer for name, layer in modules if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name)
    }


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_are_computed_again_in_evaluation_mode(
    make_policy: MakePolicy, batch: Batch, name: str, on: bool
) -> None:
    policy = make_policy(name, trainable="all", gradient_checkpointing=on)
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))
    calls: Counter[str] = Counter()
    layers = layers_in_blocks(policy)
    for key, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, key=key: calls.update([key]))
    log_prob = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    assert not policy.training
    forward = Counter(calls)
    log_prob.sum().backward()
    learning = {key for key in forward if layers[key].weight.grad is not None}
    # EO1's blocks read prompt and actions alike.
    assert {policy.base._is_expert(key) for key in learning} == ({False} if name == "eo1" else {True, False})
    for key in learning:
        assert calls[key] == forward[key] * (2 if on else 1), key


def test_nothing_is_computed_again_where_nothing_is_kept(
    make_policy: MakePolicy, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("pi0", gradient_checkpointing=True)
    refuse = Mock(side_effect=AssertionError("there are no gradients"))
    monkeypatch.setattr(checkpointing, "checkpoint", refuse)
    sample = policy.explore(dict(batch))
    refuse.assert_not_called()
    with torch.no_grad():
        context = policy.encode(dict(batch))
    with pytest.raises(AssertionError, match="there are no gradients"):
        policy.score(context, sample.chain, sample.step)


def test_a_copy_computes_with_its_own_weights(make_policy: MakePolicy, batch: Batch) -> None:
    """The reference policy is a copy from before the training."""
    for name in ("pi0", "smolvla"):
        policy = make_policy(name, gradient_checkpointing=True)
        reference = copy.deepcopy(policy)
        before = scored(policy, batch)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        assert torch.equal(scored(reference, batch), before)
        assert not torch.equal(scored(policy, batch), before)
        gradients(reference, scored(reference, batch))
        assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("name", BASES)
def test_the_velocity_is_what_is_compiled(
    make_policy: MakePolicy, batch: Batch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for `torch.compile` that counts; `test_compiled_velocities_are_those_of_eager_mode` traces."""
    calls: list[int] = []

    def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            calls.append(len(args))
            return function(*args)

        return compiled

    expected = scored(make_policy(name), batch)
    monkeypatch.setattr(torch, "compile", stand_in)
    policy = make_policy(name, compile=True)
    sample = policy.explore(dict(batch))
    assert len(calls) == policy.config.num_inference_steps
    context = policy.encode(dict(batch))
    policy.score(context, sample.chain, sample.step)
    assert len(calls) == policy.config.num_inference_steps + policy.recorded_steps()
    # What is copied is not compiled: it would go on with the weights of the first one.
    seen = len(calls)
    assert torch.equal(scored(copy.deepcopy(policy), batch), expected)
    assert len(calls) == seen
    assert torch.equal(scored(policy, batch), expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # It traces forward and backward pass, and generates no code, which takes minutes.
        ("pi0", "aot_eager"),
        ("smolvla", "aot_eager"),
        pytest.param(
            "pi0",
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.timeout(900),
                pytest.mark.skipif(shutil.which("g++") is None, reason="it compiles with g++"),
            ],
        ),
    ],
)
def test_compiled_velocities_are_those_of_eager_mode(
    make_policy: MakePolicy, batch: Batch, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = make_policy(name), make_policy(name, compile=True)
    expected, value = scored(eager, batch), scored(compiled, batch)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-3)
    theirs, ours = gradients(eager, expected), gradients(compiled, value)
    assert theirs.keys() == ours.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-3)
    # The next call has the features of its own state, not those of the one that was compiled.
    context = compiled.encode(dict(batch))
    x = torch.randn(2, 2, 6, 8)
    for state in x:
        pair = [p.base.velocity(context, state, torch.ones(2)) for p in (eager, compiled)]
        torch.testing.assert_close(pair[1].features, pair[0].features, rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_options_of_stock_bases_are_refused_for_the_compact_one(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy.{option}.*set it to false") as error:
        PIRLConfig(device="cpu", **{option: True})
    assert "\n" not in str(error.value)


def test_a_base_without_blocks_is_one_line(make_policy: MakePolicy) -> None:
    with pytest.raises(ConfigError, match=r"policy.gradient_checkpointing.*'toy' names no blocks") as error:
        make_policy("toy", gradient_checkpointing=True)
    assert "\n" not in str(error.value)


def test_compiled_blocks_are_not_computed_again(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"policy.compile.*policy.gradient_checkpointing to false"):
        make_config("pi0", gradient_checkpointing=True, compile=True)
