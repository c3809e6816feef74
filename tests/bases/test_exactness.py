"""Every base is the stock policy to the bit, and is scored as it was sampled."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

from lerobot_policy_pi_rl.bases.lora import is_adapter
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

from .conftest import (
    BASES,
    BFLOAT16,
    DRAW_IN_BFLOAT16,
    DTYPES,
    WITHOUT_LOSS_IN_BFLOAT16,
    Batch,
    awaken,
    counted,
    equal,
    own_chunk,
    precision,
    stock_chunk,
    stock_chunk_from,
    stock_loss,
)

pytest.importorskip("transformers")

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
# Flow-Noise records every step, the others one of them.
EXPLORERS = ("flow_sde", "flow_noise")

MakeConfig = Callable[..., PIRLConfig]


@pytest.fixture
def make_policy(make_config: MakeConfig) -> Callable[..., PIRLPolicy]:
    """Makes a policy with random weights, its heads too: a new stock policy's are not zero."""

    def make(name: str, dtype: str = "float32", **settings: Any) -> PIRLPolicy:
        torch.manual_seed(0)
        policy = PIRLPolicy(make_config(name, precision(name, dtype), **settings)).eval()
        awaken(policy)
        return policy

    return make


MakePolicy = Callable[..., PIRLPolicy]


# One minus a time is exact for the toy's.
STEPS = [(name, steps) for name in BASES for steps in ((1, 4) if name == "toy" else (1, 3, 10))]


@pytest.mark.parametrize(("name", "steps"), STEPS)
def test_the_chunk_is_the_stock_policy_s_to_the_bit(
    make_policy: MakePolicy, batch: Batch, name: str, steps: int
) -> None:
    policy = make_policy(name, num_inference_steps=steps)
    expected = stock_chunk(policy.base.policy, batch)
    assert torch.equal(own_chunk(policy, batch), expected)


@pytest.mark.parametrize("name", BFLOAT16)
def test_in_bfloat16_the_chunk_is_the_stock_policy_s_to_the_bit(
    make_policy: MakePolicy, batch: Batch, name: str
) -> None:
    """With four steps, whose length is exact in bfloat16, too."""
    policy = make_policy(name, "bfloat16", num_inference_steps=4)
    if name in DRAW_IN_BFLOAT16:
        noise = policy.initial_noise(policy.encode(dict(batch)))
        expected = stock_chunk_from(policy.base.policy, batch, noise)
        chunk = policy.predict_action_chunk(dict(batch), noise=noise)[:, : expected.shape[1]]
    else:
        chunk, expected = own_chunk(policy, batch), stock_chunk(policy.base.policy, batch)
    assert torch.equal(chunk, expected)
    precise = own_chunk(make_policy(name, num_inference_steps=4), batch)
    assert not torch.equal(chunk, precise[:, : chunk.shape[1]])


@pytest.mark.parametrize("name", [name for name in BFLOAT16 if name not in WITHOUT_LOSS_IN_BFLOAT16])
def test_in_bfloat16_the_supervised_loss_is_the_stock_policy_s(
    make_policy: MakePolicy, batch: Batch, name: str
) -> None:
    policy = make_policy(name, "bfloat16")
    for mode in (True, False):
        policy.train(mode)
        expected = stock_loss(policy.base.policy, batch)
        torch.manual_seed(3)
        assert torch.equal(policy.forward(dict(batch))[0], expected)
    precise = make_policy(name)
    assert not torch.equal(stock_loss(precise.base.policy, batch), expected)


@pytest.mark.parametrize("quantity", [stock_chunk, stock_loss])
@pytest.mark.parametrize("name", ["multi_task_dit"])
def test_multi_task_dit_itself_does_not_run_in_bfloat16(
    make_policy: MakePolicy, batch: Batch, name: str, quantity: Callable[..., Any]
) -> None:
    """It makes tensors in float32 on its way; if this passes one day, add it to `BFLOAT16`."""
    stock = make_policy(name).base.policy.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        quantity(stock, batch)


@pytest.mark.parametrize("name", WITHOUT_LOSS_IN_BFLOAT16)
def test_these_have_no_loss_in_bfloat16_themselves(make_policy: MakePolicy, batch: Batch, name: str) -> None:
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        stock_loss(make_policy(name, "bfloat16").base.policy, batch)


@pytest.mark.parametrize("name", BASES)
def test_an_observation_is_encoded_once_for_all_steps(
    make_policy: MakePolicy, batch: Batch, name: str
) -> None:
    """A decision is one prefix pass and K velocity passes: no layer is called more often than these call it."""
    policy = make_policy(name)
    base, steps = policy.base, policy.config.num_inference_steps
    assert steps >= 3
    with torch.no_grad():
        context = base.encode(dict(batch))
        noise = policy.initial_noise(context)
        prefix = counted(base.policy, lambda: base.encode(dict(batch)))
        velocity = counted(base.policy, lambda: base.velocity(context, noise, torch.ones(2)))
    assert set(prefix.values()) == {1}
    assert velocity
    shared = prefix.keys() & velocity.keys()
    # EO1's language model reads prompt and actions (tests/bases/test_eo1.py has what it reads of them).
    assert bool(shared) is (name == "eo1")
    assert all(base._is_expert(f"{layer}.") for layer in velocity.keys() - shared)
    assert not any("visual" in layer for layer in shared)
    decision = counted(base.policy, lambda: policy.explore(dict(batch)))
    assert decision == Counter({k: prefix[k] + steps * velocity[k] for k in prefix | velocity})


@pytest.mark.parametrize("name", BASES)
def test_the_supervised_loss_is_the_stock_policy_s(make_policy: MakePolicy, batch: Batch, name: str) -> None:
    policy = make_policy(name)
    for mode in (True, False):
        # With its dropout and random crops, as it is trained, and without.
        policy.train(mode)
        expected = stock_loss(policy.base.policy, batch)
        torch.manual_seed(3)
        assert torch.equal(policy.forward(dict(batch))[0], expected)


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [(*which, kind) for which in DTYPES for kind in EXPLORERS if which[0] != "evo1" or kind == "flow_noise"],
)
def test_a_recorded_chunk_scores_as_it_was_sampled(
    make_policy: MakePolicy, batch: Batch, name: str, dtype: str, kind: str
) -> None:
    policy = make_policy(name, dtype, explorer=ExplorerConfig(kind))
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(1))
    with torch.no_grad():
        scored = policy.score(policy.encode(dict(batch)), sample.chain, sample.step)
    ratio = (scored.log_prob - sample.log_prob).sum(1).exp()
    assert float((ratio - 1).abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_dropout_is_off_while_a_density_is_computed(
    make_policy: MakePolicy, batch: Batch, name: str, dtype: str
) -> None:
    policy = make_policy(name, dtype)
    densities = []
    for mode in (True, False):
        sample = policy.train(mode).explore(dict(batch), torch.Generator().manual_seed(1))
        with torch.no_grad():
            context = policy.train(mode).encode(dict(batch))
            scored = policy.train(mode).score(context, sample.chain, sample.step)
        densities.append((sample.chain, sample.log_prob, scored.log_prob))
    training, evaluating = densities
    assert all(torch.equal(one, two) for one, two in zip(training, evaluating, strict=True))
    if dtype == "float32":
        torch.testing.assert_close(scored.log_prob, sample.log_prob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_supervised_training_takes_what_is_trained_with_the_base_s_optimizer(
    make_policy: MakePolicy, name: str
) -> None:
    policy = make_policy(name, trainable="all")
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {p for p in policy.base.parameters() if p.requires_grad}
    # X-VLA's trains the VLM, and what reads it, at a tenth of the rate.
    assert (len(set(rates.values())) == 2) is (name == "xvla")


@pytest.mark.parametrize("name", BASES)
def test_padded_dimensions_have_no_density(make_policy: MakePolicy, batch: Batch, name: str) -> None:
    """They are part of the chain, because the network reads them, and of nothing else."""
    policy = make_policy(name)
    sample = policy.explore(dict(batch))
    assert sample.chain.shape[-1] == policy.base.action_dim
    changed = sample.chain.clone()
    changed[:, 1:, :, policy.base.real_action_dim :] += 1.0
    context = policy.encode(dict(batch))
    one, two = (policy.score(context, chain, sample.step).log_prob for chain in (sample.chain, changed))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", BASES)
def test_a_context_has_a_row_for_each_observation(make_policy: MakePolicy, batch: Batch, name: str) -> None:
    policy = make_policy(name)
    sample = policy.explore(dict(batch))
    with torch.no_grad():
        context = policy.encode(dict(batch))
        both = policy.score(context, sample.chain, sample.step).log_prob
        for row in (0, 1):
            rows = torch.tensor([row])
            cut = {key: value[rows] for key, value in context.items()}
            alone = policy.score(cut, sample.chain[rows], sample.step[rows]).log_prob
            torch.testing.assert_close(alone, both[rows], rtol=0, atol=1e-4)


def with_padding(batch: Batch) -> Batch:
    """The same prompts with three more words that are not to be read; those that are packed are padded on the left."""
    longer = dict(batch)
    tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    longer[OBS_LANGUAGE_TOKENS] = torch.cat([tokens, torch.full((2, 3), 5)], 1)
    longer[OBS_LANGUAGE_ATTENTION_MASK] = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1)
    for key, value in batch.items():
        # Words, mask and kinds of words.
        if (
            "input_ids" in batch
            and isinstance(value, torch.Tensor)
            and value.shape == batch["input_ids"].shape
        ):
            longer[key] = torch.cat([value.new_full((2, 3), 5 if key == "input_ids" else 0), value], 1)
    return longer


@pytest.mark.parametrize("source", ["expert", "encoder"])
@pytest.mark.parametrize("name", BASES)
def test_the_critic_reads_real_tokens_only(
    make_policy: MakePolicy, batch: Batch, name: str, source: str
) -> None:
    base = make_policy(name).base
    source = base.encoder_source if source == "encoder" else source
    features = base.critic_features(base.encode(dict(batch)), source)
    assert features.shape == (2, base.critic_dims[source])
    assert features.requires_grad is base.trains_for_critic(source)
    padded = base.critic_features(base.encode(with_padding(batch)), source)
    if name == "xvla":
        # It attends to padding like to words, so that its prompts always have one length: all of it is real.
        assert not torch.allclose(padded, features, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(padded, features, rtol=1e-4, atol=1e-4)
    # Beside a longer prompt, too, which some policies pad the shorter one to.
    alone = base.critic_features(base.encode(base.take(batch, torch.tensor([1]))), source)
    # VLA-JEPA runs its VLM in bfloat16 autocast, wherever it can.
    tolerance = 2e-2 if name == "vla_jepa" else 1e-4
    torch.testing.assert_close(alone, features[1:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BASES)
def test_the_expert_s_features_know_the_state(make_policy: MakePolicy, batch: Batch, name: str) -> None:
    base = make_policy(name).base
    key = "state" if name == "groot" else OBS_STATE
    moved = dict(batch) | {key: batch[key] + 1}
    one, two = (base.critic_features(base.encode(dict(b)), "expert") for b in (batch, moved))
    # These read their state from the prompt, which the processor writes.
    assert torch.equal(one, two) is (name in ("pi05", "molmoact2"))


# pi0's and pi0.5's loss runs VLM and expert together, all queries of the VLM's last layer included; acting reads only
# keys and values of it.
READ_BY_THE_LOSS = r".*\.language_model\.layers\.1\.self_attn\.q_proj\..*"


@pytest.mark.parametrize("mode", ["expert", "expert_lora", "lora", "all"])
@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_gradients_reach_what_is_to_be_trained(
    make_policy: MakePolicy, batch: Batch, name: str, dtype: str, mode: str
) -> None:
    policy = make_policy(name, dtype, trainable=mode)
    sample = policy.explore(dict(batch))
    policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob.sum().backward()
    names = dict(policy.base.policy.named_parameters())
    reached = {name for name, parameter in names.items() if parameter.grad is not None}
    expert = {name for name in names if policy.base._is_expert(name)}
    adapters = {name for name in names if is_adapter(name)}
    trained = {name for name, parameter in names.items() if parameter.requires_grad}
    frozen = {name for name in names if policy.base._is_one_of(policy.base.frozen_modules, name)}
    allowed = {
        "expert": expert - frozen,
        "expert_lora": (expert - frozen) | adapters,
        "lora": adapters,
        "all": set(names) - frozen,
    }
    assert reached <= trained == allowed[mode]
    # Of the VLM's last layer the actions read keys and values alone; what is behind those has no gradient.
    unread = r"(layers|blocks)\.1\.|(language_model|text_model)\.norm\.|\.ln_f\.|\.post_layernorm\."
    assert [n for n in trained - reached if n in expert or not re.search(unread, n)] == []
    assert bool(adapters - expert) is bool((reached & adapters) - expert) is ("lora" in mode)
    assert bool(adapters & expert) is bool(reached & adapters & expert) is (mode == "lora")
    assert policy.base.context_is_fixed is (mode == "expert")
    if mode == "all":
        assert reached - expert
    if dtype == "bfloat16" and name in WITHOUT_LOSS_IN_BFLOAT16:
        return
    policy.zero_grad(set_to_none=True)
    policy.forward(dict(batch))[0].backward()
    supervised = {name for name, parameter in names.items() if parameter.grad is not None}
    assert reached <= supervised <= trained
    only_by_the_loss = supervised - reached
    assert all(re.fullmatch(READ_BY_THE_LOSS, name) for name in only_by_the_loss)
    assert bool(only_by_the_loss) is (name in ("pi0", "pi05") and mode != "expert")


@pytest.mark.parametrize("mode", ["expert_lora", "lora"])
@pytest.mark.parametrize("name", BASES)
def test_adapters_add_nothing_at_first(make_policy: MakePolicy, batch: Batch, name: str, mode: str) -> None:
    with_adapters, without = (own_chunk(make_policy(name, trainable=m), batch) for m in (mode, "expert"))
    assert equal(name, with_adapters, without)


def test_actions_beyond_the_real_ones_are_cut(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy("pi0")
    assert policy.predict_action_chunk(dict(batch)).shape == batch[ACTION].shape
