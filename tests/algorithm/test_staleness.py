"""Decisions that older weights made: the decoupled objective."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.losses import policy_loss
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout

MakeAlgorithm = Callable[..., PIRLAlgorithm]
Collect = Callable[..., Rollout]
LogRatio = Callable[[PIRLAlgorithm, Rollout], Tensor]


@pytest.fixture
def moved(make_algorithm: MakeAlgorithm, collect: Collect) -> Callable[..., tuple[PIRLAlgorithm, Rollout]]:
    """An algorithm that has learned for some iterations, and a rollout from before the last of them."""

    def make(**settings: object) -> tuple[PIRLAlgorithm, Rollout]:
        algorithm = make_algorithm(lr=1e-3, **settings)
        for seed in range(3):
            old = collect(algorithm, seed=10 + seed)
            algorithm.update(iter([collect(algorithm, seed=seed)]))
        return algorithm, old

    return make


def test_the_clip_range_is_around_the_policy_before_the_update(
    moved: Callable[..., tuple[PIRLAlgorithm, Rollout]], log_ratio: LogRatio
) -> None:
    algorithm, old = moved(importance_cap=1e9)
    material, expected = algorithm.evaluate(old), log_ratio(algorithm, old)
    assert expected.abs().max() > 0.05, "the policy must have moved"
    torch.testing.assert_close(material.batch.weight, expected.exp(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        score = algorithm._score(material.contexts.rows(material.trained), material.batch)
        assert algorithm._log_ratio(material.batch, score).abs().max() < 1e-4
    assert material.over_cap == 0


def test_fresh_decisions_have_weight_1(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm)
    material = algorithm.evaluate(rollout)
    assert bool((material.batch.weight == 1).all())
    assert torch.equal(material.batch.log_prob, rollout.decisions.log_prob.sum(1))


def test_fresh_decisions_are_not_scored_again(
    make_algorithm: MakeAlgorithm, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm)
    # Not even none of them: pi0's attention refuses a batch of no rows.
    monkeypatch.setattr(algorithm.policy, "score", lambda *_: pytest.fail("scored"))
    algorithm.evaluate(rollout)


def test_older_and_fresh_decisions_may_be_mixed(
    moved: Callable[..., tuple[PIRLAlgorithm, Rollout]], log_ratio: LogRatio
) -> None:
    algorithm, old = moved()
    fresh = torch.arange(len(old.decisions)) % 2 == 0
    version = torch.where(fresh, algorithm.optimization_step, old.decisions.version)
    material = algorithm.evaluate(replace(old, decisions=replace(old.decisions, version=version)))
    assert bool((material.batch.weight[fresh] == 1).all())
    expected = log_ratio(algorithm, old).exp()
    torch.testing.assert_close(material.batch.weight[~fresh], expected[~fresh], rtol=1e-4, atol=1e-5)


def test_decisions_over_the_cap_are_counted_and_not_trained_on(
    moved: Callable[..., tuple[PIRLAlgorithm, Rollout]], log_ratio: LogRatio
) -> None:
    policies, over = [], None
    for bonus in (0.0, 100.0):
        algorithm, old = moved(importance_cap=1.05)
        over = log_ratio(algorithm, old).exp() > 1.05
        assert 0 < int(over.sum()) < len(over)
        # What is not trained on must not matter, whatever it earned.
        reward = old.decisions.reward + bonus * over
        stats = algorithm.update(iter([replace(old, decisions=replace(old.decisions, reward=reward))]))
        assert stats.extra["over_cap"] == int(over.sum())
        assert stats.extra["importance_weight"] <= 1.05
        policies.append(algorithm.policy.state_dict())
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_nothing_is_learned_from_decisions_that_cannot_be_weighted(
    moved: Callable[..., tuple[PIRLAlgorithm, Rollout]], weight: float
) -> None:
    algorithm, old = moved()
    before = {name: value.clone() for name, value in algorithm.policy.state_dict().items()}
    decisions = replace(old.decisions, log_prob=torch.full_like(old.decisions.log_prob, -weight))
    stats = algorithm.update(iter([replace(old, decisions=decisions)]))
    assert stats.extra["over_cap"] == len(decisions)
    assert stats.extra["epochs"] == 0
    assert all(torch.equal(value, algorithm.policy.state_dict()[name]) for name, value in before.items())


def test_the_gradient_is_that_of_the_present_policy() -> None:
    """Over actions taken as often as the behaviour policy takes them, the weighted objective has no bias."""
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    behaviour, advantage = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([1.0, -2.0, 0.5])
    now = logits.log_softmax(0)
    objective = expected_objective(now, now.detach(), behaviour, advantage)
    (wanted,) = torch.autograd.grad((now.exp() * advantage).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(found, wanted)


def expected_objective(now: Tensor, proximal: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
    """Expected objective under the behaviour policy."""
    parts = [
        -policy_loss(
            (now - proximal)[[action]],
            advantage[[action]],
            0.2,
            weight=(proximal.exp() / behaviour)[[action]],
        ).loss
        * behaviour[action]
        for action in range(len(behaviour))
    ]
    return torch.stack(parts).sum()


def test_it_learns_from_decisions_that_are_one_version_old(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm(lr=1e-3)
    before = float(collect(algorithm, seed=99).decisions.reward.mean())
    waiting = collect(algorithm, seed=100)
    for seed in range(12):
        fresh = collect(algorithm, seed=seed)
        algorithm.update(iter([waiting]))
        waiting = fresh
    assert float(collect(algorithm, seed=99).decisions.reward.mean()) > before + 0.1
