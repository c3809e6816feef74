"""PPO on a small stock policy: contexts are kept or computed again, minibatches are cut, and nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.contexts import Contexts
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.material import Material
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Observations, Rollout, prepare
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

from .conftest import BASES, BFLOAT16, DTYPES, PACKED, awaken, counted, packed, precision

pytest.importorskip("transformers")

COUNT = 12

MakeAlgorithm = Callable[..., PIRLAlgorithm]


@pytest.fixture
def make_algorithm(make_config: Callable[..., PIRLConfig]) -> MakeAlgorithm:
    """Makes an algorithm around a small stock policy with seeded weights."""

    def make(
        name: str = "smolvla", trainable: str = "expert", dtype: str = "float32", **settings: Any
    ) -> PIRLAlgorithm:
        torch.manual_seed(1)
        config = make_config(name, precision(name, dtype), trainable=trainable)
        defaults = {"critic_warmup": 0, "critic_hidden_dims": [16], "minibatch_size": 6, "epochs": 2}
        policy = PIRLPolicy(config)
        awaken(policy)
        algorithm = PIRLAlgorithm(policy, PIRLAlgorithmConfig(**defaults | settings, policy_config=config))
        algorithm.make_optimizers_and_scheduler()
        return algorithm

    return make


def observations(policy: PIRLPolicy | None = None) -> dict[str, Any]:
    """Preprocessed observations with prompts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    length = torch.randint(1, 5, (COUNT, 1), generator=generator)
    seen = {
        "observation.images.top": torch.rand(COUNT, 3, 32, 32, generator=generator),
        OBS_STATE: torch.randn(COUNT, 5, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.randint(4, 8, (COUNT, 4), generator=generator),
        OBS_LANGUAGE_ATTENTION_MASK: torch.arange(4) < length,
        "task": [" ".join(["cube"] * int(words)) for words in length],
    }
    packs = policy is not None and policy.base.policy.name in PACKED
    return packed(policy.config.stock, seen) if packs else seen


def whole(seen: dict[str, Any]) -> Observations:
    """Preprocessed observations."""
    return Observations({}, ["pick"] * COUNT, lambda observation, task: seen)


def collect(algorithm: PIRLAlgorithm) -> Rollout:
    """One decision of each of twelve environments, all of which end."""
    seen = observations(algorithm.policy)
    algorithm.policy.eval()
    sample = algorithm.policy.explore(dict(seen), torch.Generator().manual_seed(0))
    flags = torch.zeros(COUNT, dtype=torch.bool)
    decisions = DecisionBatch(
        observation={OBS_STATE: seen[OBS_STATE]},
        task=["pick"] * COUNT,
        chain=sample.chain,
        step=sample.step,
        log_prob=sample.log_prob,
        action=sample.x[..., :4],
        reward=(sample.x[:, 0, 0] > 0).float(),
        delay=torch.zeros(COUNT, dtype=torch.int64),
        executed=torch.full((COUNT,), 3),
        terminated=~flags,
        truncated=flags,
        success=flags,
        version=torch.full((COUNT,), algorithm.optimization_step),
        env=torch.arange(COUNT),
        index=torch.zeros(COUNT, dtype=torch.int64),
        next_row=torch.zeros(0, dtype=torch.int64),
        next_observation={},
    )
    return prepare(decisions, lambda observation, task: seen)


def trained(algorithm: PIRLAlgorithm) -> dict[str, Tensor]:
    """The trained weights after one update."""
    algorithm.update(iter([collect(algorithm)]))
    return {name: value.clone() for name, value in algorithm.get_weights().items()}


@pytest.mark.parametrize("name", BASES)
def test_an_update_moves_the_expert_and_leaves_the_vlm(make_algorithm: MakeAlgorithm, name: str) -> None:
    algorithm = make_algorithm(name)
    before = {key: value.clone() for key, value in algorithm.policy.state_dict().items()}
    rollout = collect(algorithm)
    stats = algorithm.update(iter([rollout]))
    assert stats.extra["ratio_first_error"] <= 1e-4
    base = algorithm.policy.base
    for key, value in base.policy.state_dict().items():
        if not base._is_expert(key):
            assert torch.equal(value, before[f"base.policy.{key}"]), key
    heads = {id(weight) for weight in base._head.parameters()}
    moved = {key for key, p in algorithm.policy.named_parameters() if not torch.equal(p, before[key])}
    assert heads <= {id(p) for key, p in algorithm.policy.named_parameters() if key in moved}


@pytest.mark.parametrize("name", BFLOAT16)
def test_an_update_in_bfloat16_moves_the_expert_and_is_checked_within_its_own_tolerance(
    make_algorithm: MakeAlgorithm, name: str
) -> None:
    algorithm = make_algorithm(name, dtype="bfloat16")
    before = {key: value.clone() for key, value in algorithm.policy.named_parameters()}
    # Parts of the others than X-VLA and MolmoAct2 stay in float32, and all of GR00T, which runs in autocast.
    assert (torch.bfloat16 in {value.dtype for value in before.values()}) is (name != "groot")
    assert algorithm.ratio_tolerance == 0.1
    stats = algorithm.update(iter([collect(algorithm)]))
    assert stats.extra["ratio_first_error"] <= 0.1
    after = dict(algorithm.policy.named_parameters())
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert moved <= {key for key, value in after.items() if value.requires_grad}
    heads = {id(weight) for weight in algorithm.policy.base._head.parameters()}
    assert heads <= {id(after[key]) for key in moved}
    assert make_algorithm(name).ratio_tolerance == 1e-3


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_kept_contexts_give_the_numbers_of_those_computed_again(
    make_algorithm: MakeAlgorithm, name: str, dtype: str
) -> None:
    kept = trained(make_algorithm(name, dtype=dtype))
    again = trained(make_algorithm(name, dtype=dtype, context_memory_gb=0.0))
    if dtype == "float32":
        for key, value in kept.items():
            torch.testing.assert_close(value, again[key], rtol=0, atol=1e-5)
        return
    # A processor may round another batch otherwise: a small part of what the update moved.
    start = make_algorithm(name, dtype=dtype).get_weights()
    apart, step = (
        sum(float((value.float() - other[key].float()).abs().sum()) for key, value in kept.items())
        for other in (again, start)
    )
    assert apart <= 0.1 * step
    assert step > 0


@pytest.mark.parametrize("name", BASES)
def test_an_update_encodes_each_observation_once(
    make_algorithm: MakeAlgorithm, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two epochs of two minibatches each, and the critic: what encodes runs before them, and not again."""
    algorithm = make_algorithm(name)
    base, rollout = algorithm.policy.base, collect(algorithm)
    seen = rollout.observations.rows(torch.arange(COUNT), base.take)
    with torch.no_grad():
        context = base.encode(seen)
        noise = base.initial_noise(COUNT, torch.device("cpu"))
        prefix = counted(base.policy, lambda: base.encode(seen))
        velocity = counted(base.policy, lambda: base.velocity(context, noise, torch.ones(COUNT)))
    encoded: list[int] = []
    encode = base.encode

    def count(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded.append(base.rows(batch))
        return encode(batch)

    monkeypatch.setattr(base, "encode", count)
    calls = counted(base.policy, lambda: algorithm.update(iter([rollout])))
    assert encoded == [COUNT]
    assert prefix.keys() - velocity.keys()
    for layer in prefix.keys() - velocity.keys():
        assert calls[layer] == prefix[layer], layer
    # Each of the two epochs scores each of its two minibatches.
    for layer in velocity.keys() - prefix.keys():
        assert calls[layer] >= 4 * velocity[layer], layer


@pytest.mark.parametrize("mode", ["expert", "all"])
def test_a_minibatch_in_parts_gives_the_same_step(make_algorithm: MakeAlgorithm, mode: str) -> None:
    whole = trained(make_algorithm(trainable=mode, epochs=1))
    parts = trained(make_algorithm(trainable=mode, epochs=1, micro_batch_size=1))
    for key, value in whole.items():
        # Adam divides by the gradient's size, so a gradient that is nearly nothing may be rounded to another one.
        torch.testing.assert_close(value, parts[key], rtol=0, atol=2e-4)
    assert sum(float((whole[key] - parts[key]).abs().sum()) for key in whole) < 0.05 * sum(
        float(value.abs().sum()) for value in whole.values()
    )


@pytest.mark.parametrize(
    ("mode", "budget", "expected"), [("expert", 1e9, True), ("expert", 10.0, False), ("all", 1e9, False)]
)
def test_contexts_are_kept_if_they_stay_and_fit(
    make_algorithm: MakeAlgorithm, monkeypatch: pytest.MonkeyPatch, mode: str, budget: float, expected: bool
) -> None:
    policy = make_algorithm(trainable=mode).policy.eval()
    encoded: list[int] = []
    encode = policy.base.encode

    def count(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded.append(len(batch[OBS_STATE]))
        return encode(batch)

    monkeypatch.setattr(policy.base, "encode", count)
    contexts = Contexts(policy, whole(observations()), "vlm", 5, budget, torch.device("cpu"))
    assert contexts.kept is expected
    assert sum(encoded) == COUNT
    assert max(encoded) <= 5
    rows = torch.tensor([7, 2])
    context = contexts.rows(rows)
    assert sum(encoded) == (COUNT if expected else COUNT + 2)
    direct = encode(policy.base.take(observations(), rows))
    for key, value in direct.items():
        torch.testing.assert_close(context[key].float(), value.float(), rtol=0, atol=1e-5)


def test_kept_contexts_of_different_lengths_are_padded(make_algorithm: MakeAlgorithm) -> None:
    """EVO1 pads its prompts to the longest of those that are encoded together."""
    policy = make_algorithm("evo1").policy.eval()
    seen = observations() | {"task": ["cube"] * 5 + ["pick the cube up"] * (COUNT - 5)}
    contexts = Contexts(policy, whole(seen), "vlm", 5, 1e9, torch.device("cpu"))
    assert contexts.kept
    rows, x = torch.tensor([7, 2]), torch.randn(2, 6, 8)
    kept, direct = contexts.rows(rows), policy.encode(policy.base.take(seen, rows[1:]))
    assert kept["tokens"].shape[1] > direct["tokens"].shape[1]
    velocities = (
        policy.base.velocity(
            context, x[-len(context["tokens"]) :], torch.ones(len(context["tokens"]))
        ).velocity
        for context in (kept, direct)
    )
    two, one = velocities
    torch.testing.assert_close(two[1:], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["smolvla", "pi0", "xvla", "eo1"])
def test_kept_contexts_of_prompts_that_are_padded_part_by_part(
    make_algorithm: MakeAlgorithm, name: str
) -> None:
    """A tokenizer pads to the longest prompt of those that it is given together."""
    algorithm = make_algorithm(name)
    policy = algorithm.policy.eval()
    seen = observations(policy)
    is_packed = name in PACKED
    mask = seen["attention_mask" if is_packed else OBS_LANGUAGE_ATTENTION_MASK]
    lengths = mask.sum(1)

    def preprocess(observation: dict[str, Tensor], task: list[str]) -> dict[str, Any]:
        rows = observation["row"].long()
        part = policy.base.take(seen, rows)
        # X-VLA's has one length.
        longest = mask.shape[1] if name == "xvla" else int(lengths[rows].max())
        # What is packed is padded on the left.
        kept = slice(-longest, None) if is_packed else slice(longest)
        return {
            key: value[:, kept] if getattr(value, "shape", None) == mask[rows].shape else value
            for key, value in part.items()
        }

    lazy = Observations({"row": torch.arange(COUNT, dtype=torch.uint8)}, ["pick"] * COUNT, preprocess)
    parts = torch.arange(COUNT).split(1)
    contexts = Contexts(policy, lazy, "vlm", 1, 1e9, torch.device("cpu"))
    assert contexts.kept
    assert name == "xvla" or len({int(lengths[rows].max()) for rows in parts}) > 1
    sample = policy.explore(dict(seen), torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = policy.score(contexts.rows(torch.arange(COUNT)), sample.chain, sample.step).log_prob
    torch.testing.assert_close(kept, sample.log_prob, rtol=1e-4, atol=1e-4)


def test_nothing_is_encoded_for_a_critic_that_is_not_there(
    make_algorithm: MakeAlgorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_algorithm(trainable="all").policy.eval()
    monkeypatch.setattr(policy.base, "encode", lambda batch: pytest.fail("it was encoded"))
    contexts = Contexts(policy, whole(observations()), None, 5, 1e9, torch.device("cpu"))
    assert contexts.critic_features is None
    assert not contexts.kept


def test_the_reference_shares_what_is_not_trained(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm(kl_coef=0.1)
    assert algorithm.reference is not None
    theirs = dict(algorithm.reference.named_parameters())
    expert = {name for name, p in algorithm.policy.named_parameters() if p.requires_grad}
    for name, parameter in algorithm.policy.named_parameters():
        assert (theirs[name] is parameter) is (name not in expert)
    stats = algorithm.update(iter([collect(algorithm)]))
    assert stats.extra["reference_kl"] >= 0


def test_the_reference_encodes_nothing_that_was_kept(
    make_algorithm: MakeAlgorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make_algorithm(kl_coef=0.1)
    assert algorithm.reference is not None
    rollout = collect(algorithm)
    monkeypatch.setattr(algorithm.reference.base, "encode", lambda batch: pytest.fail("it was encoded again"))
    assert algorithm.update(iter([rollout])).extra["reference_kl"] >= 0


def test_features_that_the_base_does_not_offer_are_one_line(make_algorithm: MakeAlgorithm) -> None:
    with pytest.raises(
        ConfigError,
        match=r"algorithm.critic_features.*'eyes'.*choose one of \['expert', 'vlm', 'separate'\]",
    ):
        make_algorithm(critic_features="eyes")


def without_advantage(algorithm: PIRLAlgorithm, monkeypatch: pytest.MonkeyPatch) -> Rollout:
    """A rollout that has something to say to the critic, and in which no decision is better than another."""
    assert algorithm.critic is not None
    nn.init.zeros_(algorithm.critic.head.weight)
    rollout = collect(algorithm)
    evaluate = algorithm.evaluate

    def level(*given: Any) -> Material:
        material = evaluate(*given)
        batch = replace(material.batch, advantage=torch.zeros_like(material.batch.advantage))
        return replace(material, batch=batch, has_signal=True)

    monkeypatch.setattr(algorithm, "evaluate", level)
    return replace(rollout, decisions=replace(rollout.decisions, reward=torch.ones(COUNT)))


@pytest.mark.parametrize("name", ["smolvla", "pi0", "pi05"])
@pytest.mark.parametrize(
    ("mode", "source", "coef", "expected"),
    [
        ("expert", "expert", 0.0, set()),
        ("expert", "expert", 0.5, {"expert"}),
        ("all", "vlm", 0.5, {"vlm"}),
        ("all", "vlm", 0.0, set()),
    ],
)
def test_the_critic_s_loss_trains_what_makes_its_features_if_it_is_to(
    make_algorithm: MakeAlgorithm,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mode: str,
    source: str,
    coef: float,
    expected: set[str],
) -> None:
    algorithm = make_algorithm(name, mode, critic_features=source, critic_coef=coef, micro_batch_size=4)
    rollout = without_advantage(algorithm, monkeypatch)
    before = {key: value.clone() for key, value in algorithm.policy.named_parameters()}
    critic = {key: value.clone() for key, value in algorithm.critic.named_parameters()}
    stats = algorithm.update(iter([rollout]))
    base = algorithm.policy.base
    moved = {
        "expert" if base._is_expert(key.removeprefix("base.policy.")) else "vlm"
        for key, value in algorithm.policy.named_parameters()
        if not torch.equal(value, before[key])
    }
    assert moved == expected
    assert any(not torch.equal(value, critic[key]) for key, value in algorithm.critic.named_parameters())
    assert stats.losses["value_loss"] > 0


def test_a_weight_of_the_critic_s_loss_that_trains_nothing_is_refused(make_algorithm: MakeAlgorithm) -> None:
    for source in ("vlm", "separate"):
        with pytest.raises(ConfigError, match=f"algorithm.critic_coef.*no effect.*'{source}'.*set it to 0"):
            make_algorithm(critic_features=source, critic_coef=1.0)
    with pytest.raises(ConfigError, match=r"algorithm.critic_coef.*has no critic"):
        PIRLAlgorithmConfig(
            advantage="group", collection=CollectionConfig(group_size=2, num_envs=2), critic_coef=1.0
        )


@pytest.mark.parametrize("name", ["smolvla", "pi0", "xvla", "multi_task_dit", "eo1", "molmoact2"])
def test_a_separate_critic_sees_for_itself(make_algorithm: MakeAlgorithm, name: str) -> None:
    algorithm = make_algorithm(name, critic_features="separate")
    before = {key: value.clone() for key, value in algorithm.critic.state_dict().items()}
    stats = algorithm.update(iter([collect(algorithm)]))
    assert stats.extra["ratio_first_error"] <= 1e-4
    after = algorithm.critic.state_dict()
    learned = {key.split(".")[0] for key, _ in algorithm.critic.named_parameters()}
    assert learned == {"encoders", "body", "head"}
    assert all(not torch.equal(value, before[key]) for key, value in after.items() if "weight" in key)


def test_a_separate_critic_needs_pictures_that_are_not_packed_away(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm("groot", critic_features="separate")
    with pytest.raises(ConfigError, match=r"algorithm.critic_features.*images.top.*packs away"):
        algorithm.update(iter([collect(algorithm)]))


def test_only_what_is_trained_is_pushed(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm("pi0")
    pushed = sum(value.numel() for value in algorithm.get_weights().values())
    assert 0 < pushed < sum(p.numel() for p in algorithm.policy.parameters()) / 2
    other = make_algorithm("pi0")
    nn.init.zeros_(other.policy.base.policy.model.action_out_proj.weight)
    other.load_weights(algorithm.get_weights())
    batch = observations()
    noise = torch.randn(COUNT, 6, 8)
    chunks = [a.policy.predict_action_chunk(dict(batch), noise=noise) for a in (algorithm, other)]
    assert torch.equal(*chunks)
    assert chunks[0].shape == (COUNT, 6, 4)
    assert ACTION not in batch
