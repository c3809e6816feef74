"""The algorithm: one update of the policy and the critic, its guards, and what it stores and pushes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.rl.algorithms.configs import TrainingStats
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.losses import approximate_kl
from lerobot_policy_pi_rl.algorithm.material import Averages
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm, RatioError
from lerobot_policy_pi_rl.algorithm.storage import Rollout
from lerobot_policy_pi_rl.errors import ConfigError

MakeAlgorithm = Callable[..., PIRLAlgorithm]
Collect = Callable[..., Rollout]
LogRatio = Callable[[PIRLAlgorithm, Rollout], Tensor]

EXPLORERS = [
    {"kind": kind, "recording": recording}
    for kind in ("flow_sde", "flow_cps", "flow_noise")
    for recording in ("hybrid", "joint")
]


def policy_of(algorithm: PIRLAlgorithm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in algorithm.policy.state_dict().items()}


def critic_of(algorithm: PIRLAlgorithm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in algorithm.critic.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def iterate(algorithm: PIRLAlgorithm, collect: Collect, times: int = 1) -> TrainingStats:
    """Collects and updates, as synchronous training does."""
    for number in range(times):
        stats = algorithm.update(iter([collect(algorithm, seed=number)]))
    return stats


def with_reward(rollout: Rollout, row: int, reward: float) -> Rollout:
    """The rollout with one reward replaced."""
    rewards = rollout.decisions.reward.clone()
    rewards[row] = reward
    return replace(rollout, decisions=replace(rollout.decisions, reward=rewards))


# Without a critic, and with demonstrations

GROUPED = {"advantage": "group", "collection": CollectionConfig(num_envs=256, group_size=8)}


def test_groups_of_episodes_improve_the_policy_without_a_critic(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm(**GROUPED, lr=1e-3)
    assert algorithm.critic is None
    assert list(algorithm.get_optimizers()) == ["policy"]
    before = float(collect(algorithm, seed=99).decisions.reward.mean())
    for number in range(12):
        stats = algorithm.update(iter([collect(algorithm, seed=number)]))
        assert stats.extra["ratio_first_error"] < 1e-4
        assert 0 <= stats.extra["filtered"] < 1
        assert "value_loss" not in stats.losses
    assert float(collect(algorithm, seed=99).decisions.reward.mean()) > before + 0.1


def test_groups_that_are_all_alike_teach_nothing(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm(**GROUPED)
    rollout, before = collect(algorithm), policy_of(algorithm)
    alike = replace(rollout.decisions, reward=torch.ones(len(rollout.decisions)))
    stats = algorithm.update(iter([replace(rollout, decisions=alike)]))
    assert stats.extra["filtered"] == 1
    assert stats.extra["epochs"] == 0
    assert same(policy_of(algorithm), before)


def test_an_algorithm_without_a_critic_survives_save_and_load(
    make_algorithm: MakeAlgorithm, tmp_path: Path
) -> None:
    algorithm = make_algorithm(**GROUPED)
    algorithm.save_pretrained(tmp_path)
    assert algorithm.state_dict() == {}
    algorithm.load_state_dict({})


def test_co_training_holds_the_policy_to_the_demonstrations(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "observation.state": torch.rand(64, 4, generator=generator),
        "action": torch.full((64, 3, 2), 0.5),
    }
    losses = {}
    for weight in (0.0, 1.0):
        algorithm = make_algorithm(demonstration_weight=weight, lr=1e-3)
        algorithm.demonstrations = lambda count: {key: value[:count] for key, value in batch.items()}
        torch.manual_seed(0)
        stats = iterate(algorithm, collect, times=8)
        assert ("supervised_loss" in stats.losses) == (weight > 0)
        torch.manual_seed(1)
        losses[weight] = algorithm.policy.base.loss(batch).item()
    assert losses[1.0] < 0.8 * losses[0.0]


def test_co_training_without_demonstrations_is_an_error(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    with pytest.raises(ValueError, match="no demonstrations were given"):
        iterate(make_algorithm(demonstration_weight=0.1), collect)


# The probability ratio


@pytest.mark.parametrize("explorer", EXPLORERS, ids=lambda e: f"{e['kind']}-{e['recording']}")
@pytest.mark.parametrize(
    ("level", "reduction"),
    [
        ("chunk", "sum"),
        ("chunk", "mean_steps"),
        ("chunk", "mean"),
        ("action", "sum"),
        ("token", "mean_chain"),
    ],
)
def test_the_ratio_of_fresh_decisions_is_1(
    make_algorithm: MakeAlgorithm, collect: Collect, explorer: dict[str, Any], level: str, reduction: str
) -> None:
    algorithm = make_algorithm(explorer, ratio_level=level, log_prob_reduction=reduction)
    stats = iterate(algorithm, collect, times=2)
    assert stats.extra["ratio_first_error"] < 1e-4


def test_weights_that_changed_after_collection_are_refused(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm)
    with torch.no_grad():
        algorithm.policy.base.leave.bias.add_(0.05)
    before = policy_of(algorithm)
    with pytest.raises(
        RatioError, match=r"ratio is off by .* check that both run the same version and config"
    ):
        algorithm.update(iter([rollout]))
    assert same(before, policy_of(algorithm))


def test_a_ratio_that_is_not_a_number_is_refused(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm)
    rollout.decisions.log_prob[:] = float("nan")
    with pytest.raises(RatioError, match="off by nan"):
        algorithm.update(iter([rollout]))


def test_decisions_of_older_weights_are_not_checked(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm)
    iterate(algorithm, collect)
    stats = algorithm.update(iter([rollout]))
    assert stats.extra["ratio_first_error"] == 0
    assert stats.extra["approx_kl"] > 0


def test_reductions_of_the_log_probability(make_algorithm: MakeAlgorithm) -> None:
    """Joint recording of 4 steps; 2 of 3 chunk steps executed; 2 real dimensions."""
    per_step, executed = torch.tensor([[3.0, 5.0, 100.0]]), torch.tensor([2])
    for reduction, expected in (("sum", 8.0), ("mean_steps", 2.0), ("mean_chain", 1.6), ("mean", 0.5)):
        algorithm = make_algorithm({"recording": "joint"}, log_prob_reduction=reduction)
        assert algorithm.reduce(per_step, executed).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("level", "reduction", "expected"),
    [
        ("chunk", "sum", [30.0]),
        ("action", "sum", [6.0, 24.0, 0.0]),
        ("token", "sum", [2.0, 4.0, 8.0, 16.0, 0.0, 0.0]),
        ("action", "mean_steps", [1.5, 6.0, 0.0]),
        ("action", "mean", [0.75, 3.0, 0.0]),
        ("token", "mean", [0.5, 1.0, 2.0, 4.0, 0.0, 0.0]),
        ("token", "mean_chain", [0.4, 0.8, 1.6, 3.2, 0.0, 0.0]),
    ],
)
def test_what_a_ratio_is_of(
    make_algorithm: MakeAlgorithm, level: str, reduction: str, expected: list[float]
) -> None:
    """Joint recording of 4 steps; 2 of 3 chunk steps executed; 2 real dimensions. The whole decision is 30 in all."""
    algorithm = make_algorithm({"recording": "joint"}, ratio_level=level, log_prob_reduction=reduction)
    components, executed = torch.tensor([[[2.0, 4.0], [8.0, 16.0], [99.0, 99.0]]]), torch.tensor([2])
    found = algorithm._by_level(components.sum(-1), components, executed)
    assert found.flatten().tolist() == pytest.approx(expected)
    assert algorithm._whole(found, executed).tolist() == pytest.approx([30.0])
    if level != "chunk":
        width = {"action": 1, "token": 2}[level]
        assert algorithm._mask(executed).tolist() == [[True] * 2 * width + [False] * width]


@pytest.mark.parametrize("level", ["action", "token"])
def test_ratios_of_parts_of_a_decision_are_clipped_one_by_one(
    make_algorithm: MakeAlgorithm, collect: Collect, level: str
) -> None:
    """Without clipping, the gradient at ratio 1 is that of the whole decision over the number of its parts."""
    gradients = {}
    for chosen in ("chunk", level):
        algorithm = make_algorithm(ratio_level=chosen)
        material = algorithm.evaluate(collect(algorithm, count=64))
        loss = algorithm._policy_loss(material.contexts.rows(material.trained), material.batch, Averages())
        gradients[chosen] = torch.autograd.grad(loss, algorithm.policy.base.leave.weight)[0]
    parts = {"action": 3, "token": 6}[level]
    torch.testing.assert_close(gradients[level], gradients["chunk"] / parts, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("level", ["action", "token"])
def test_success_rises_with_ratios_of_parts(
    make_algorithm: MakeAlgorithm, collect: Collect, level: str
) -> None:
    algorithm = make_algorithm(ratio_level=level, lr=1e-3, clip_ratio=0.2)
    before = float(collect(algorithm, seed=99).decisions.reward.mean())
    iterate(algorithm, collect, times=12)
    assert float(collect(algorithm, seed=99).decisions.reward.mean()) > before + 0.1


def test_the_divergence_is_that_of_whole_decisions(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    """Adam's steps hardly depend on the reduction, and neither must what the learning rate follows."""
    kl = {}
    for reduction in ("sum", "mean_steps", "mean"):
        torch.manual_seed(0)
        algorithm = make_algorithm(
            {"recording": "joint"}, log_prob_reduction=reduction, lr_schedule="constant", kl_stop=1e9
        )
        kl[reduction] = iterate(algorithm, collect).extra["approx_kl"]
    # A mean of 4 recorded steps would show a sixteenth of it, one over the action's components as well still less.
    assert kl["mean_steps"] == pytest.approx(kl["sum"], rel=0.5)
    assert kl["mean"] == pytest.approx(kl["sum"], rel=0.5)


# One update


def test_an_update_moves_the_policy_towards_what_paid(
    make_algorithm: MakeAlgorithm, collect: Collect, log_ratio: LogRatio
) -> None:
    algorithm = make_algorithm()
    rollout = collect(algorithm, count=512)
    stats = algorithm.update(iter([rollout]))
    ratio = log_ratio(algorithm, rollout)
    paid = rollout.decisions.reward > 0
    assert ratio[paid].mean() > 0 > ratio[~paid].mean()
    assert stats.losses.keys() == {"policy_loss", "value_loss"}
    assert stats.grad_norms.keys() == {"policy", "critic"}
    expected = {
        "approx_kl",
        "last_epoch_kl",
        "clip_fraction",
        "entropy",
        "explained_variance",
        "lr",
        "epochs",
        "skipped_steps",
    }
    assert expected <= stats.extra.keys()
    assert all(isinstance(value, int | float) for value in stats.to_log_dict().values())


def test_the_critic_explains_a_reward_that_the_state_tells(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm(critic_warmup=100, epochs=10, value_clip=None)
    rollout = collect(algorithm, count=512)
    told = (rollout.decisions.observation["observation.state"][:, 0] > 0).float()
    rollout = replace(rollout, decisions=replace(rollout.decisions, reward=told))
    explained = [algorithm.update(iter([rollout])).extra["explained_variance"] for _ in range(8)]
    assert explained[0] < 0.3
    assert explained[-1] > 0.7


def test_a_critic_cannot_train_features_that_are_the_observation_itself(
    make_algorithm: MakeAlgorithm,
) -> None:
    with pytest.raises(ConfigError, match=r"algorithm.critic_coef.*no effect.*'observation'"):
        make_algorithm(critic_coef=1.0)


def test_critic_warm_up_leaves_the_policy_bitwise_unchanged(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm = make_algorithm(critic_warmup=2)
    policy, critic, lr = policy_of(algorithm), critic_of(algorithm), algorithm.lr
    stats = iterate(algorithm, collect, times=2)
    assert same(policy, policy_of(algorithm))
    assert not same(critic, critic_of(algorithm))
    assert algorithm.lr == lr
    assert "policy_loss" not in stats.losses
    iterate(algorithm, collect)
    assert not same(policy, policy_of(algorithm))


def test_actors_can_have_the_improved_policy_before_the_critic_is_trained(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm, other = make_algorithm(), make_algorithm()
    before, seen = (policy_of(algorithm), critic_of(algorithm)), []
    algorithm.policy_ready = lambda: seen.append((policy_of(algorithm), critic_of(algorithm)))
    iterate(algorithm, collect)
    iterate(other, collect)
    [(policy, critic)] = seen
    assert same(policy, policy_of(algorithm))
    assert not same(policy, before[0])
    weights = [name for name, _ in algorithm.critic.named_parameters()]
    assert all(torch.equal(critic[name], before[1][name]) for name in weights)
    assert not same(critic, critic_of(algorithm))
    assert same(critic_of(algorithm), critic_of(other))


def test_rows_that_lost_their_successor_are_not_trained_on(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    """Their content cannot matter: nonsense in them gives the same weights."""
    results = []
    for nonsense in (0.0, 1e6):
        algorithm = make_algorithm()
        rollout = collect(algorithm, count=64)
        keep = torch.arange(10, 64)
        rollout.decisions.terminated[:10] = False
        rollout.decisions.reward[:10] = nonsense
        rollout.decisions.log_prob[:10] = nonsense
        stats = algorithm.update(iter([replace(rollout, usable=keep)]))
        assert stats.extra["orphaned"] == 10
        results.append(policy_of(algorithm) | critic_of(algorithm))
    assert same(*results)


@pytest.mark.parametrize("explorer", EXPLORERS[::2], ids=lambda e: e["kind"])
def test_the_same_seed_and_data_give_bitwise_the_same_weights(
    make_algorithm: MakeAlgorithm, collect: Collect, explorer: dict[str, Any]
) -> None:
    one, two = make_algorithm(explorer), make_algorithm(explorer)
    stats = [iterate(algorithm, collect, times=3).to_log_dict() for algorithm in (one, two)]
    assert same(policy_of(one), policy_of(two))
    assert same(critic_of(one), critic_of(two))
    assert stats[0] == stats[1]
    other = make_algorithm(explorer)
    other.seed = 1
    iterate(other, collect, times=3)
    assert not same(policy_of(one), policy_of(other))


# Guards


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_steps_with_a_non_finite_gradient_are_counted_and_never_applied(
    make_algorithm: MakeAlgorithm, collect: Collect, reward: float
) -> None:
    """One bad reward spoils every advantage, because they are normalised together: 4 epochs of 4 minibatches."""
    algorithm = make_algorithm()
    before = policy_of(algorithm)
    stats = algorithm.update(iter([with_reward(collect(algorithm), 7, reward)]))
    assert stats.extra["skipped_steps"] >= 16
    assert same(before, policy_of(algorithm))
    assert all(torch.isfinite(value).all() for value in critic_of(algorithm).values())
    # The next, sound rollout trains as if nothing had happened to the policy's optimizer.
    assert iterate(algorithm, collect).extra["skipped_steps"] == 0
    assert not same(before, policy_of(algorithm))


@pytest.mark.parametrize(("target_kl", "factor"), [(1e-6, 1 / 1.5), (100.0, 1.5)])
def test_the_learning_rate_adapts_to_the_divergence(
    make_algorithm: MakeAlgorithm, collect: Collect, target_kl: float, factor: float
) -> None:
    algorithm = make_algorithm(target_kl=target_kl, lr=1e-4)
    stats = iterate(algorithm, collect)
    assert algorithm.lr == pytest.approx(1e-4 * factor)
    assert stats.extra["lr"] == algorithm.lr


def test_the_learning_rate_stays_in_its_range(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    fast, slow = make_algorithm(target_kl=100.0, lr_max=3e-4), make_algorithm(target_kl=1e-6, lr_min=1e-4)
    iterate(fast, collect, times=3)
    iterate(slow, collect, times=3)
    assert fast.lr == 3e-4
    assert slow.lr == 1e-4


def test_a_divergence_that_is_not_a_number_lowers_the_learning_rate(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm()
    algorithm._adapt_lr(float("nan"))
    assert algorithm.lr == pytest.approx(1e-4 / 1.5)


def test_a_cosine_lowers_the_learning_rate(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    """Over 4 iterations: cos(45), cos(90) and cos(135) degrees leave .8536, .5 and .1464 of it, and then lr_min."""
    algorithm = make_algorithm(lr_schedule="cosine", lr_decay_iterations=4, lr_min=1e-6, lr=1e-4)
    rates = [iterate(algorithm, collect).extra["lr"] for _ in range(6)]
    assert rates == pytest.approx([8.536e-5, 5e-5, 1.464e-5, 1e-6, 1e-6, 1e-6], rel=1e-3)


def test_a_cosine_goes_on_from_half_the_rate_after_a_rollback(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm(lr_schedule="cosine", lr_decay_iterations=4, lr=1e-4)
    algorithm.optimization_step = 2
    algorithm.set_rates(2.5e-5)
    algorithm._decay_lr()
    assert algorithm.lr == pytest.approx(2.5e-5 * 0.1464 / 0.5, rel=1e-3)


def test_a_constant_learning_rate_stays(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm(target_kl=1e-6, lr_schedule="constant")
    iterate(algorithm, collect, times=2)
    assert algorithm.lr == 1e-4


def test_the_remaining_epochs_are_skipped_once_the_divergence_is_too_large(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    calm = make_algorithm(target_kl=100.0, epochs=6)
    assert iterate(calm, collect).extra["epochs"] == 6
    wild = make_algorithm(target_kl=1e-3, lr=1e-2, lr_max=1e-2, epochs=6)
    assert iterate(wild, collect).extra["epochs"] < 6


def test_divergence_stays_near_its_target_over_many_iterations(
    make_algorithm: MakeAlgorithm, collect: Collect, log_ratio: LogRatio
) -> None:
    """Even from a learning rate far too large; measured on the whole rollout, after the update."""
    algorithm = make_algorithm(lr=1e-3, target_kl=0.02)
    measured = []
    for number in range(12):
        rollout = collect(algorithm, seed=number)
        algorithm.update(iter([rollout]))
        measured.append(float(approximate_kl(log_ratio(algorithm, rollout))))
    assert max(measured[4:]) < 0.02 * 5


def test_the_divergence_is_measured_after_the_last_step(
    make_algorithm: MakeAlgorithm, collect: Collect, log_ratio: LogRatio
) -> None:
    """Before the only step of one epoch it is 0, whatever the step does."""
    algorithm = make_algorithm(epochs=1, minibatch_size=256, lr=1e-3)
    rollout = collect(algorithm, count=256)
    found = algorithm.update(iter([rollout])).extra
    assert found["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["last_epoch_kl"] == pytest.approx(
        float(approximate_kl(log_ratio(algorithm, rollout))), rel=1e-4
    )
    assert found["last_epoch_kl"] > 1e-4


@pytest.mark.parametrize(("target_kl", "factor"), [(1e-6, 1 / 1.5), (100.0, 1.5)])
def test_one_step_an_iteration_is_enough_for_the_schedule(
    make_algorithm: MakeAlgorithm, collect: Collect, target_kl: float, factor: float
) -> None:
    algorithm = make_algorithm(epochs=1, minibatch_size=256, target_kl=target_kl, lr=1e-4)
    iterate(algorithm, collect)
    assert algorithm.lr == pytest.approx(1e-4 * factor)


def test_the_divergence_costs_a_bounded_number_of_rows(
    make_algorithm: MakeAlgorithm, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make_algorithm(micro_batch_size=100)
    material = algorithm.evaluate(collect(algorithm, count=1000))
    scored, actual = [], algorithm.policy.score
    monkeypatch.setattr(
        algorithm.policy,
        "score",
        lambda context, *rest: scored.append(len(rest[0])) or actual(context, *rest),
    )
    algorithm.divergence(material)
    assert scored == [86, 85, 85]


def test_the_whole_first_minibatch_is_checked(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    """One decision of 48 is off, wherever it lies in the micro-batches of 16."""
    for row in range(0, 48, 5):
        algorithm = make_algorithm(micro_batch_size=16, minibatch_size=48)
        rollout = collect(algorithm, count=48)
        rollout.decisions.log_prob[row] += 0.005
        with pytest.raises(RatioError):
            algorithm.update(iter([rollout]))


def test_an_actor_that_is_off_is_named_before_anything_changes(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    """Actor 2 of 4 has a quarter of 48 decisions; a minibatch of 8 holds two of them, all of which are off."""
    algorithm = make_algorithm(minibatch_size=8, collection=CollectionConfig(num_envs=12))
    assert algorithm.critic.is_cold
    rollout, policy, critic = collect(algorithm, count=48), policy_of(algorithm), critic_of(algorithm)
    rollout.decisions.log_prob[24:36] += 0.005
    random_state = torch.get_rng_state()
    with pytest.raises(RatioError, match=r"decisions of actor\(s\) \[2\] are not scored") as error:
        algorithm.update(iter([rollout]))
    assert error.value.actors == [2]
    assert same(policy_of(algorithm), policy)
    assert same(critic_of(algorithm), critic)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert algorithm.optimization_step == 0


def test_some_decisions_of_every_actor_are_checked(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    """Each of 24 actors has two decisions; 5 of a minibatch, rounded up, are one of each. Older ones are left out."""
    algorithm = make_algorithm(minibatch_size=5, collection=CollectionConfig(num_envs=2))
    rollout = collect(algorithm, count=48)
    rollout.decisions.log_prob[:] += 0.005
    rollout.decisions.version[:2] = -1
    with pytest.raises(RatioError) as error:
        algorithm.update(iter([rollout]))
    assert error.value.actors == list(range(1, 24))


# Rollouts that say nothing


def silence(rollout: Rollout, reward: float = 0.0) -> Rollout:
    """The rollout with the same reward for all decisions, none of which ended its episode."""
    decisions, count = rollout.decisions, len(rollout.decisions)
    return replace(
        rollout,
        decisions=replace(
            decisions,
            reward=torch.full((count,), reward),
            terminated=torch.zeros(count, dtype=torch.bool),
            truncated=torch.ones(count, dtype=torch.bool),
            next_row=torch.arange(count),
            next_observation=decisions.observation,
        ),
        next_observations=rollout.observations,
    )


@pytest.mark.parametrize("reward", [0.0, -0.3, 50.0])
def test_rollouts_without_any_difference_in_reward_move_nothing(
    make_algorithm: MakeAlgorithm, collect: Collect, caplog: pytest.LogCaptureFixture, reward: float
) -> None:
    algorithm = make_algorithm(lr_schedule="adaptive", kl_coef=0.1, entropy_coef=0.1)
    policy, critic, lr = policy_of(algorithm), critic_of(algorithm), algorithm.lr
    for number in range(25):
        found = algorithm.update(iter([silence(collect(algorithm, count=64, seed=number), reward)]))
        assert (found.extra["signal"], found.extra["epochs"]) == (0.0, 0)
        assert "value_loss" in found.losses
    assert same(policy, policy_of(algorithm))
    assert algorithm.lr == lr
    assert not same(critic, critic_of(algorithm))
    assert len([one for one in caplog.records if "tell no decision from another" in one.message]) == 1
    assert iterate(algorithm, collect).extra["signal"] == 1.0
    assert not same(policy, policy_of(algorithm))


def test_demonstrations_teach_where_rewards_say_nothing_and_do_not_raise_the_learning_rate(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    batch = {"observation.state": torch.zeros(64, 4), "action": torch.full((64, 3, 2), 0.5)}
    moved = {}
    for shown in (None, batch):
        algorithm = make_algorithm(demonstration_weight=0.1, target_kl=100.0, lr=1e-4)
        algorithm.demonstrations = lambda count, shown=shown: shown
        before = policy_of(algorithm)
        # A first rollout with a signal, so that Adam has a momentum.
        algorithm.update(iter([collect(algorithm, count=64)]))
        before, lr = policy_of(algorithm), algorithm.lr
        stats = algorithm.update(iter([silence(collect(algorithm, count=64, seed=1))]))
        assert ("supervised_loss" in stats.losses) == (shown is not None)
        assert algorithm.lr == lr
        moved[shown is not None] = not same(before, policy_of(algorithm))
    assert moved == {False: False, True: True}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_iteration_of_a_handful_of_decisions_is_an_iteration(
    make_algorithm: MakeAlgorithm, collect: Collect, count: int
) -> None:
    algorithm = make_algorithm()
    before = policy_of(algorithm)
    rollout = collect(algorithm, count=count)
    rewarded = replace(rollout, decisions=replace(rollout.decisions, reward=torch.arange(1.0, count + 1)))
    stats = algorithm.update(iter([rewarded]))
    assert stats.extra["skipped_steps"] == 0
    assert all(math.isfinite(value) for value in stats.to_log_dict().values())
    # One decision, like any that agree, says nothing about what would have been better.
    assert same(before, policy_of(algorithm)) == (count == 1)


# Rewards on another scale


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (30.0, 0.0), (30.0, -500.0), (0.01, 0.0)])
def test_the_critic_explains_returns_of_any_scale(
    make_algorithm: MakeAlgorithm, collect: Collect, scale: float, offset: float
) -> None:
    """A reward of 0 to 1, which the state tells; with the value clip and the Huber loss of the defaults."""
    algorithm = make_algorithm(critic_warmup=100, epochs=6)
    rollout = collect(algorithm, count=512)
    told = rollout.decisions.observation["observation.state"][:, 0].clamp(min=0) * scale + offset
    rollout = replace(rollout, decisions=replace(rollout.decisions, reward=told))
    explained = [algorithm.update(iter([rollout])).extra["explained_variance"] for _ in range(12)]
    assert explained[-1] > 0.7


def test_the_scale_of_the_returns_is_part_of_the_state(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    algorithm, fresh = make_algorithm(), make_algorithm()
    rollout = collect(algorithm)
    large = replace(rollout, decisions=replace(rollout.decisions, reward=100 * rollout.decisions.reward))
    algorithm.update(iter([large]))
    assert algorithm.critic.scale > 10
    fresh.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    assert same(critic_of(algorithm), critic_of(fresh))


def test_a_checkpoint_from_before_there_was_a_scale_loads(make_algorithm: MakeAlgorithm) -> None:
    algorithm, fresh = make_algorithm(), make_algorithm()
    buffers = {f"critic.{name}" for name, _ in algorithm.critic.named_buffers()}
    old = {name: value for name, value in algorithm.state_dict().items() if name not in buffers}
    assert len(old) < len(algorithm.state_dict())
    fresh.load_state_dict(copy.deepcopy(old))
    # Its critic is not cold: a first scale may not change its values.
    assert not fresh.critic.is_cold
    algorithm.critic.rollouts.fill_(1)
    assert same(critic_of(algorithm), critic_of(fresh))


# Terms of the objective


def test_divergence_from_the_policy_before_rl_holds_the_policy_back(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    moved, divergences = [], []
    for coefficient in (0.001, 10.0):
        algorithm = make_algorithm(kl_coef=coefficient)
        start = policy_of(algorithm)
        stats = iterate(algorithm, collect, times=4)
        divergences.append(stats.extra["reference_kl"])
        moved.append(sum(float((value - start[name]).norm()) for name, value in policy_of(algorithm).items()))
        assert same(start, dict(algorithm.reference.state_dict()))
        assert not any(p.requires_grad for p in algorithm.reference.parameters())
    assert divergences[1] < divergences[0] / 2
    assert min(divergences) >= 0
    assert make_algorithm(kl_coef=0.0).reference is None


def test_entropy_bonus_widens_a_learned_deviation(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    algorithm = make_algorithm({"kind": "flow_noise"}, entropy_coef=240.0, lr=1e-3, target_kl=100.0)
    first = iterate(algorithm, collect).extra["entropy"]
    assert iterate(algorithm, collect, times=3).extra["entropy"] > first + 0.1 / 24


def test_dual_clip_changes_nothing_while_ratios_are_moderate(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    plain, dual = make_algorithm(), make_algorithm(dual_clip=1000.0)
    iterate(plain, collect)
    iterate(dual, collect)
    assert same(policy_of(plain), policy_of(dual))


# What is stored and pushed


def test_weights_bring_an_actor_to_the_learner_s_policy(
    make_algorithm: MakeAlgorithm, collect: Collect
) -> None:
    learner, actor = make_algorithm({"kind": "flow_noise"}), make_algorithm({"kind": "flow_noise"})
    iterate(learner, collect, times=2)
    assert not same(policy_of(learner), policy_of(actor))
    actor.load_weights(copy.deepcopy(learner.get_weights()))
    assert same(policy_of(learner), policy_of(actor))


def test_only_trainable_tensors_are_pushed(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm()
    algorithm.policy.base.observe.requires_grad_(False)
    names = set(algorithm.get_weights())
    assert names == {name for name, p in algorithm.policy.named_parameters() if p.requires_grad}
    assert "base.observe.weight" not in names
    assert not any("critic" in name or "frequencies" in name for name in names)
    algorithm.load_weights(algorithm.get_weights())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.half(), "differ"),
        (lambda t: t[..., :1], "differ"),
        (lambda t: t * float("nan"), "not finite"),
    ],
)
def test_other_weights_than_those_of_the_policy_are_refused(
    make_algorithm: MakeAlgorithm, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    policy = make_algorithm().policy
    before = policy.trainable_state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    last = max(before)
    with pytest.raises(ValueError, match=reason):
        policy.load_trainable_state(before | {last: change(before[last])})
    assert all(torch.equal(policy.trainable_state()[name], kept[name]) for name in kept)


def test_weights_of_another_policy_are_refused_and_change_nothing(make_algorithm: MakeAlgorithm) -> None:
    algorithm = make_algorithm()
    before = policy_of(algorithm)
    weights = {name: value + 1 for name, value in algorithm.get_weights().items()}
    missing = {name: value for name, value in weights.items() if name != "base.leave.bias"}
    reshaped = weights | {"base.leave.bias": torch.zeros(3)}
    for wrong in (missing, weights | {"base.extra": torch.zeros(1)}, reshaped):
        with pytest.raises(ValueError, match=r"do not fit this policy: \['base\.\w+.*\] differ; start both"):
            algorithm.load_weights(wrong)
    assert same(before, policy_of(algorithm))


def test_state_carries_the_critic_and_the_reference(make_algorithm: MakeAlgorithm, collect: Collect) -> None:
    trained = make_algorithm(kl_coef=0.1)
    start = policy_of(trained)
    iterate(trained, collect, times=2)
    fresh = make_algorithm(kl_coef=0.1)
    with torch.no_grad():
        for parameter in [*fresh.critic.parameters(), *fresh.reference.parameters()]:
            parameter.zero_()
    parameters = list(fresh.critic.parameters())
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert same(critic_of(trained), critic_of(fresh))
    assert same(start, dict(fresh.reference.state_dict()))
    # The optimizer still holds these very tensors.
    assert all(one is two for one, two in zip(parameters, fresh.critic.parameters(), strict=True))


def test_the_algorithm_survives_lerobot_s_own_save_and_load(
    make_algorithm: MakeAlgorithm, collect: Collect, tmp_path: Path
) -> None:
    trained = make_algorithm(gamma=0.9, dual_clip=3.0, kl_coef=0.1)
    iterate(trained, collect)
    trained.save_pretrained(tmp_path)
    loaded = PIRLAlgorithm.from_pretrained(tmp_path, policy=trained.policy)
    assert loaded.config == trained.config
    assert same(trained.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("settings", [{}, {"critic_features": "separate"}])
def test_a_resumed_algorithm_goes_on_as_if_it_had_never_stopped(
    make_algorithm: MakeAlgorithm, collect: Collect, settings: dict[str, Any]
) -> None:
    """Policy, algorithm and optimizer states, and the step: the next update is bitwise the same."""
    whole = make_algorithm(**settings)
    iterate(whole, collect, times=2)
    resumed = make_algorithm(**settings)
    resumed.policy.load_state_dict(copy.deepcopy(whole.policy.state_dict()))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for name, optimizer in resumed.get_optimizers().items():
        optimizer.load_state_dict(copy.deepcopy(whole.get_optimizers()[name].state_dict()))
    resumed.optimization_step = whole.optimization_step
    stats = [
        algorithm.update(iter([collect(algorithm, seed=9)])).to_log_dict() for algorithm in (whole, resumed)
    ]
    assert stats[0] == stats[1]
    assert same(policy_of(whole), policy_of(resumed))
    assert same(critic_of(whole), critic_of(resumed))


# Settings


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gamma": 1.5}, r"algorithm.gamma.*between 0 and 1, got 1.5"),
        ({"epochs": 0}, r"algorithm.epochs.*at least 1"),
        ({"clip_ratio": 0.0}, r"algorithm.clip_ratio.*above 0"),
        ({"dual_clip": 1.0}, r"algorithm.dual_clip.*above 1 or null"),
        ({"lr": 1.0}, r"algorithm.lr.*between lr_min=1e-06 and lr_max=0.001, got 1.0"),
        ({"lr_factor": 1.0}, r"algorithm.lr_factor.*above 1"),
        ({"adam_eps": 0.0}, r"algorithm.adam_eps.*above 0"),
        ({"adam_betas": (0.9, 1.0)}, r"algorithm.adam_betas.*at least 0 and below 1, got \[0.9, 1.0\]"),
        ({"adam_betas": (0.9,)}, r"algorithm.adam_betas.*must be two numbers"),
        ({"weight_decay": -0.1}, r"algorithm.weight_decay.*0 or above"),
        ({"ratio_level": "step"}, r"algorithm.ratio_level.*'step' is unknown; choose one of .*'chunk'"),
        ({"clip_ratio_high": 0.0}, r"algorithm.clip_ratio_high.*above 0 or null"),
        ({"group_bounds": (0.1, 0.9)}, r"algorithm.group_bounds.*needs algorithm.advantage='group'"),
        ({"lr_decay_iterations": 0}, r"algorithm.lr_decay_iterations.*at least 1"),
        ({"log_ratio_bound": 0.0}, r"algorithm.log_ratio_bound.*above 0 or null"),
        (
            {"lr_schedule": "linear"},
            r"algorithm.lr_schedule.*'linear' is unknown; choose one of .*'adaptive'",
        ),
        ({"log_prob_reduction": "max"}, r"log_prob_reduction.*'max' is unknown; choose one of .*'sum'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        PIRLAlgorithmConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"num_envs": 0}, r"collection.num_envs.*at least 1, got 0"),
        ({"num_workers": -1}, r"collection.num_workers.*at least 0"),
        ({"num_actors": 33}, r"collection.num_actors.*at most max_actors=32, got 33"),
        ({"max_staleness": -1}, r"collection.max_staleness.*at least 0, got -1"),
    ],
)
def test_collection_settings_that_cannot_work(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        CollectionConfig(**settings)
