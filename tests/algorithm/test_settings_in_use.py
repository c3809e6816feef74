"""Each setting of the algorithm arrives where it works: numbers worked out by hand, and none of them the default."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lerobot_policy_pi_rl.algorithm import pi_rl
from lerobot_policy_pi_rl.algorithm.advantages import group_advantages
from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.material import Averages
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout, prepare

from .conftest import CHUNK

MakeAlgorithm = Callable[..., PIRLAlgorithm]
Collect = Callable[..., Rollout]
MakeDecisions = Callable[..., DecisionBatch]


def move(algorithm: PIRLAlgorithm, distance: float) -> None:
    """Changes the policy."""
    with torch.no_grad():
        algorithm.policy.base.leave.bias.add_(distance)


# Advantages


def test_discount_and_lambda_each_have_their_own_place(
    make_algorithm: MakeAlgorithm, make_decisions: MakeDecisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors from the end: 1 + .9 * 3 - 4 = -.3, 0 + .9 * 4 - 2 = 1.6 and .5 + .9 * 2 - 1 = 1.3; .9 * .8 = .72."""
    algorithm = make_algorithm(gamma=0.9, gae_lambda=0.8)
    decisions = make_decisions(
        env=[0, 0, 0], reward=[0.5, 0.0, 1.0], truncated=[False, False, True], next_row=[2]
    )
    values = {3: [1.0, 2.0, 4.0], 1: [3.0]}
    monkeypatch.setattr(algorithm.critic, "value", lambda features: torch.tensor(values[len(features)]))
    material = algorithm.evaluate(prepare(decisions, lambda observation, task: observation))
    advantage = [1.3 + 0.72 * 1.384, 1.6 + 0.72 * -0.3, -0.3]
    assert material.critic.target.tolist() == pytest.approx([3.29648, 3.384, 3.7])
    # Three decisions are too few to be normalised.
    assert material.batch.advantage.tolist() == pytest.approx(advantage, abs=1e-5)


# The objective


def record(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple]:
    """The arguments of every call of a loss."""
    calls: list[tuple] = []
    actual = getattr(pi_rl, name)
    monkeypatch.setattr(pi_rl, name, lambda *given: calls.append(given) or actual(*given))
    return calls


@pytest.mark.parametrize(("dual_clip", "value_clip"), [(2.5, 0.11), (None, None)])
def test_the_losses_get_their_settings_and_the_rollout(
    make_algorithm: MakeAlgorithm,
    collect: Collect,
    monkeypatch: pytest.MonkeyPatch,
    dual_clip: float | None,
    value_clip: float | None,
) -> None:
    algorithm = make_algorithm(
        clip_ratio=0.37,
        clip_ratio_high=0.61,
        dual_clip=dual_clip,
        log_ratio_bound=3.5,
        value_clip=value_clip,
        huber_delta=0.6,
        epochs=1,
    )
    algorithm.optimization_step = 1
    rollout = collect(algorithm, count=16)
    material = algorithm.evaluate(rollout)
    policy, critic = record(monkeypatch, "policy_loss"), record(monkeypatch, "value_loss")
    algorithm.update(iter([rollout]))
    [(_, advantage, clip_ratio, bound, _, log_ratio_bound, high, mask)] = policy
    assert (clip_ratio, bound, log_ratio_bound, high, mask) == (0.37, dual_clip, 3.5, 0.61, None)
    torch.testing.assert_close(advantage.sort().values, material.batch.advantage.sort().values)
    [(value, target, old_value, clip, delta)] = critic
    assert (clip, delta) == (value_clip, 0.6)
    torch.testing.assert_close(target.sort().values, material.critic.target.sort().values)
    torch.testing.assert_close(old_value.sort().values, material.critic.value.sort().values)
    torch.testing.assert_close(value, old_value)


def test_decisions_of_older_weights_enter_the_objective_with_their_importance_weight(
    make_algorithm: MakeAlgorithm, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make_algorithm(epochs=1, importance_cap=1e9)
    rollout = collect(algorithm, count=16)
    move(algorithm, 0.05)
    algorithm.optimization_step = 1
    expected = algorithm.evaluate(rollout).batch.weight
    assert (expected - 1).abs().max() > 0.01
    calls = record(monkeypatch, "policy_loss")
    algorithm.update(iter([rollout]))
    [(_, _, _, _, weight, *_)] = calls
    torch.testing.assert_close(weight.sort().values, expected.sort().values)


def test_entropy_and_divergence_enter_the_loss_with_their_own_weights(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm({"kind": "flow_noise"}, entropy_coef=0.07, kl_coef=0.3)
    move(algorithm, 0.05)
    material, averages = algorithm.evaluate(collect(algorithm, count=16)), Averages()
    loss = algorithm._policy_loss(material.contexts.rows(material.trained), material.batch, averages)
    part = averages.means()
    assert part["reference_kl"] > 1e-3
    assert abs(part["entropy"]) > 0.1
    expected = part["policy_loss"] - 0.07 * part["entropy"] + 0.3 * part["reference_kl"]
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_entropy_and_divergence_are_those_of_the_executed_steps(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm({"kind": "flow_noise"}, entropy_coef=0.07, kl_coef=0.3)
    move(algorithm, 0.05)
    rollout = collect(algorithm, count=16)
    executed = torch.arange(16) % CHUNK + 1
    material = algorithm.evaluate(replace(rollout, decisions=replace(rollout.decisions, executed=executed)))
    context, averages = material.contexts.rows(torch.arange(16)), Averages()
    algorithm._policy_loss(context, material.batch, averages)
    with torch.no_grad():
        score = algorithm.policy.score(context, material.batch.chain, material.batch.step)
    reference, steps = material.batch.reference, score.steps
    by_component = kl_divergence(Normal(steps.mean, steps.std), Normal(reference.mean, reference.std))
    kl = by_component.sum(-1).sum(1)
    part = averages.means()
    # The entropy is that of one component: 4 recorded steps, of 2 dimensions each.
    entropy = score.entropy / (4 * 2 * executed[:, None])
    for name, per_step in (("entropy", entropy), ("reference_kl", kl)):
        expected = statistics.mean(
            float(row[:count].sum()) for row, count in zip(per_step, executed, strict=True)
        )
        assert part[name] == pytest.approx(expected, rel=1e-4), name


def gradients(
    algorithm: PIRLAlgorithm, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """The policy's gradient of one step on the whole rollout, which is not taken."""
    monkeypatch.setattr(algorithm, "_step", lambda *_: 0)
    material = algorithm.evaluate(rollout)
    algorithm._policy_step(material, material.trained, Averages())
    named = algorithm.policy.named_parameters()
    return {name: value.grad.clone() for name, value in named if value.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [0, 5])
def test_half_a_demonstration_weight_adds_half_the_supervised_gradient_once(
    make_algorithm: MakeAlgorithm, collect: Collect, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
) -> None:
    found = {}
    for weight in (0.0, 0.5):
        algorithm = make_algorithm(
            demonstration_weight=weight, demonstration_batch_size=7, micro_batch_size=micro_batch_size
        )
        asked: list[int] = []
        algorithm.demonstrations = lambda count, asked=asked: asked.append(count) or {}
        bias = algorithm.policy.base.leave.bias
        monkeypatch.setattr(algorithm.policy.base, "loss", lambda batch, bias=bias: 3 * bias.sum())
        found[weight] = gradients(algorithm, collect(algorithm, count=16), monkeypatch)
        assert asked == ([7] if weight else [])
    plain = found[0.0]
    plain["base.leave.bias"] += 0.5 * 3
    assert plain.keys() == found[0.5].keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[0.5][name], value)


def test_the_divergence_is_taken_from_the_policy_at_the_start(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm(kl_coef=0.1, lr=1e-3)
    start = copy.deepcopy(algorithm.policy)
    algorithm.update(iter([collect(algorithm)]))
    rollout = collect(algorithm, count=16, seed=1)
    reference = algorithm.evaluate(rollout).batch.reference
    seen = rollout.observations.rows(torch.arange(16), start.base.take)
    decisions = rollout.decisions
    with torch.no_grad():
        expected, moved = (
            policy.score(policy.encode(seen), decisions.chain, decisions.step).steps
            for policy in (start, algorithm.policy)
        )
    torch.testing.assert_close(reference.mean, expected.mean)
    torch.testing.assert_close(reference.std, expected.std)
    assert (expected.mean - moved.mean).abs().max() > 1e-3


# Order and modes


def test_every_iteration_and_purpose_has_an_order_of_its_own(
    make_algorithm: MakeAlgorithm,
) -> None:
    algorithm, orders = make_algorithm(), set()
    for step in (0, 1, 2):
        algorithm.optimization_step = step
        for purpose in (0, 1, 2):
            one, again = (torch.randperm(64, generator=algorithm._generator(purpose)) for _ in range(2))
            assert torch.equal(one, again)
            orders.add(tuple(one.tolist()))
    assert len(orders) == 9


def test_an_update_is_made_without_dropout(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm, count=16)
    algorithm.policy.train()
    algorithm.update(iter([rollout]))
    assert not any(module.training for module in algorithm.policy.modules())


# What is told


def test_explained_variance_and_value_are_those_of_the_critic_before_the_update(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    """Rows that lost their successor have no target to be explained."""
    algorithm = make_algorithm()
    rollout = collect(algorithm, count=16)
    rollout = replace(rollout, usable=torch.arange(12))
    material = algorithm.evaluate(rollout)
    value, target = material.critic.value, material.critic.target
    found = algorithm.update(iter([rollout])).extra
    expected = 1 - float((target[:12] - value[:12]).var() / target[:12].var())
    assert found["explained_variance"] == pytest.approx(expected, abs=1e-5)
    assert found["value"] == pytest.approx(float(value.mean()))
    assert found["orphaned"] == 4


def test_what_is_over_the_cap_is_not_told_as_filtered(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    """Groups that are alike are filtered; a decision over the cap is left out for another reason."""
    algorithm = make_algorithm(
        advantage="group", importance_cap=1.05, collection=CollectionConfig(num_envs=256, group_size=8)
    )
    rollout = collect(algorithm)
    informative = int(group_advantages(rollout.decisions, 8).informative.sum())
    move(algorithm, 0.3)
    algorithm.optimization_step = 1
    weight = algorithm.evaluate(rollout).batch.weight
    found = algorithm.update(iter([rollout])).extra
    assert 0 < found["over_cap"] < informative < 256
    assert found["filtered"] == pytest.approx(1 - informative / 256)
    # The mean is over what is trained on, which weighs 1.05 at most.
    assert found["importance_weight"] < float(weight.clamp(max=1.05).mean())


# The learning rate


def test_the_critic_has_a_learning_rate_of_its_own(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm(lr=1e-4, critic_lr=3e-3)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in algorithm.optimizers.items()}
    assert rates == {"policy": 1e-4, "critic": 3e-3}


@pytest.mark.parametrize(
    ("divergence", "factor"),
    [(0.0399, 1), (0.0401, 1 / 1.25), (0.0101, 1), (0.0099, 1.25), (0.0, 1.25), (float("inf"), 1 / 1.25)],
)
def test_the_learning_rate_changes_outside_half_to_twice_the_target(
    make_algorithm: MakeAlgorithm, divergence: float, factor: float
) -> None:
    algorithm = make_algorithm(target_kl=0.02, lr_factor=1.25, lr=1e-4)
    algorithm._adapt_lr(divergence)
    assert algorithm.lr == pytest.approx(1e-4 * factor)


def measure(monkeypatch: pytest.MonkeyPatch, *divergences: float) -> None:
    """Makes the epochs of an iteration end with these divergences, one after the other."""
    following = iter(divergences)
    monkeypatch.setattr(PIRLAlgorithm, "divergence", lambda *_: next(following))


@pytest.mark.parametrize(
    ("first", "last", "factor"),
    [
        # The target is .02, and the mean of both epochs lies on the other side of the limit.
        (0.001, 0.043, 1 / 1.5),
        (0.057, 0.032, 1),
        (0.030, 0.005, 1.5),
        (0.001, 0.012, 1),
    ],
)
def test_the_learning_rate_follows_the_last_epoch(
    make_algorithm: MakeAlgorithm,
    collect: Collect,
    monkeypatch: pytest.MonkeyPatch,
    first: float,
    last: float,
    factor: float,
) -> None:
    algorithm = make_algorithm(target_kl=0.02, epochs=2, minibatch_size=8, lr=1e-4)
    measure(monkeypatch, first, last)
    found = algorithm.update(iter([collect(algorithm, count=16)])).extra
    assert found["epochs"] == 2
    assert found["last_epoch_kl"] == last
    assert algorithm.lr == pytest.approx(1e-4 * factor)


@pytest.mark.parametrize("divergence", [0.0, 0.02])
def test_one_skipped_step_lowers_the_learning_rate_whatever_the_others_measured(
    make_algorithm: MakeAlgorithm, collect: Collect, monkeypatch: pytest.MonkeyPatch, divergence: float
) -> None:
    algorithm = make_algorithm(target_kl=0.02, epochs=2, minibatch_size=8, lr=1e-4)
    measure(monkeypatch, *[divergence] * 2)
    skips = iter([0, 1, 0, 0])
    monkeypatch.setattr(algorithm, "_step", lambda name, _: next(skips) if name == "policy" else 0)
    assert algorithm.update(iter([collect(algorithm, count=16)])).extra["skipped_steps"] == 1
    assert algorithm.lr == pytest.approx(1e-4 / 1.5)


@pytest.mark.parametrize(
    ("kl_stop", "divergence", "epochs"), [(3.0, 0.059, 3), (3.0, 0.061, 1), (1.5, 0.029, 3), (1.5, 0.031, 1)]
)
def test_an_iteration_stops_beyond_its_own_multiple_of_the_target(
    make_algorithm: MakeAlgorithm,
    collect: Collect,
    monkeypatch: pytest.MonkeyPatch,
    kl_stop: float,
    divergence: float,
    epochs: int,
) -> None:
    algorithm = make_algorithm(target_kl=0.02, kl_stop=kl_stop, epochs=3)
    measure(monkeypatch, *[divergence] * 3)
    assert algorithm.update(iter([collect(algorithm, count=16)])).extra["epochs"] == epochs
