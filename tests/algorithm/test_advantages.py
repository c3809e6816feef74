"""Advantages against tables worked out by hand: generalised advantage estimation and groups of episodes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.advantages import (
    Targets,
    advantages,
    episode_numbers,
    group_advantages,
    has_successor,
    next_values,
    normalise,
    says_nothing,
    time_order,
    usable_rows,
)
from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig, discount_within
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch

MakeDecisions = Callable[..., DecisionBatch]
GAMMA, LAMBDA = 0.5, 0.5


def estimate(batch: DecisionBatch, value: list[float], own: list[float]) -> Targets:
    return advantages(batch, torch.tensor(value), torch.tensor(own), GAMMA, LAMBDA)


def test_success_bootstraps_from_nothing(make_decisions: MakeDecisions) -> None:
    """Row 1 succeeds: its error is 1 - 2 = -1; row 0's is 0 + .5 * 2 - 4 = -3, and -3 + .25 * -1 = -3.25."""
    batch = make_decisions(env=[0, 0], reward=[0.0, 1.0], terminated=[False, True])
    targets = estimate(batch, [4.0, 2.0], [])
    assert targets.advantage.tolist() == [-3.25, -1.0]
    assert targets.value_target.tolist() == [0.75, 1.0]


def test_truncation_bootstraps_from_its_own_last_observation(make_decisions: MakeDecisions) -> None:
    """Row 1 runs out of time with 8 to come: 0 + .5 * 8 - 2 = 2. Row 2, of the next episode, must not leak in."""
    batch = make_decisions(env=[0, 0, 0], truncated=[False, True, False], next_row=[1, 2])
    targets = estimate(batch, [4.0, 2.0, 100.0], [8.0, 6.0])
    # Row 2: 0 + .5 * 6 - 100 = -97. Row 0: 0 + .5 * 2 - 4 + .25 * 2 = -2.5.
    assert targets.advantage.tolist() == [-2.5, 2.0, -97.0]


def test_success_ignores_an_observation_that_it_carries(make_decisions: MakeDecisions) -> None:
    batch = make_decisions(env=[0], reward=[1.0], terminated=[True], truncated=[True], next_row=[0])
    assert estimate(batch, [0.0], [1000.0]).advantage.tolist() == [1.0]


def test_the_end_of_a_rollout_bootstraps_from_the_observation_that_follows(
    make_decisions: MakeDecisions,
) -> None:
    """Row 1 goes on: 3 + .5 * 4 - 2 = 3; row 0: 1 + .5 * 2 - 0 + .25 * 3 = 2.75."""
    batch = make_decisions(env=[0, 0], reward=[1.0, 3.0], next_row=[1])
    assert estimate(batch, [0.0, 2.0], [4.0]).advantage.tolist() == [2.75, 3.0]


def test_a_whole_table(make_decisions: MakeDecisions) -> None:
    """Two environments, interleaved and shuffled: a success, a truncation and a rollout's end in one batch.

    Environment 0: decisions 10 (r 0, V 1), 11 (r 1, V 2, success), 12 (r 0, V 3, goes on to 5).
      12: 0 + .5 * 5 - 3 = -.5;  11: 1 - 2 = -1;  10: 0 + .5 * 2 - 1 + .25 * -1 = -.25
    Environment 7: decisions 4 (r 2, V 4), 5 (r 0, V 6, truncated before 2), 6 (r 1, V 0, goes on to 8).
      6: 1 + .5 * 8 - 0 = 5;  5: 0 + .5 * 2 - 6 = -5;  4: 2 + .5 * 6 - 4 + .25 * -5 = -.25
    """
    batch = make_decisions(
        env=[7, 0, 0, 7, 0, 7],
        index=[6, 11, 10, 4, 12, 5],
        reward=[1.0, 1.0, 0.0, 2.0, 0.0, 0.0],
        terminated=[False, True, False, False, False, False],
        truncated=[False, False, False, False, False, True],
        next_row=[0, 4, 5],
    )
    ordered = batch.select(time_order(batch.env, batch.index))
    assert ordered.env.tolist() == [0, 0, 0, 7, 7, 7]
    assert ordered.index.tolist() == [10, 11, 12, 4, 5, 6]
    own = {4: 5.0, 5: 2.0, 0: 8.0}
    # The state of each row is its number before it was moved: find the value of each carried observation by it.
    carried = [own[int(state) - 100] for state in ordered.next_observation["observation.state"][:, 0]]
    targets = estimate(ordered, [1.0, 2.0, 3.0, 4.0, 6.0, 0.0], carried)
    assert targets.advantage.tolist() == [-0.25, -1.0, -0.5, -0.25, -5.0, 5.0]
    assert targets.value_target.tolist() == [0.75, 1.0, 2.5, 3.75, 1.0, 5.0]


def test_a_lost_decision_makes_the_row_before_it_unusable_and_cuts_the_one_before_that(
    make_decisions: MakeDecisions,
) -> None:
    """Decision 2 of 0..4 is lost: 1 cannot be bootstrapped; 0 still knows the value of 1's observation."""
    batch = make_decisions(env=[0, 0, 0, 0], index=[0, 1, 3, 4], reward=[1.0, 50.0, 0.0, 1.0], next_row=[3])
    assert usable_rows(batch).tolist() == [True, False, True, True]
    targets = estimate(batch, [0.0, 2.0, 0.0, 4.0], [6.0])
    # 3: 1 + 3 - 4 = 0; 2: 0 + 2 - 0 + 0 = 2; 0: 1 + .5 * 2 - 0 = 2, one step.
    assert targets.advantage[[0, 2, 3]].tolist() == [2.0, 2.0, 0.0]
    assert targets.advantage[1] == 0


def test_a_lost_decision_after_a_success_costs_nothing(make_decisions: MakeDecisions) -> None:
    batch = make_decisions(env=[0, 0], index=[0, 2], terminated=[True, True])
    assert usable_rows(batch).tolist() == [True, True]


def test_successors_are_the_next_index_of_the_same_environment_and_episode(
    make_decisions: MakeDecisions,
) -> None:
    batch = make_decisions(
        env=[0, 0, 0, 0, 1, 1],
        index=[0, 1, 2, 4, 5, 6],
        terminated=[True, False, False, False, False, False],
        truncated=[False, False, False, False, True, False],
    )
    assert has_successor(batch).tolist() == [False, True, False, False, False, False]


def test_next_values_choose_between_successor_own_observation_and_nothing(
    make_decisions: MakeDecisions,
) -> None:
    batch = make_decisions(
        env=[0, 0, 0, 0],
        terminated=[False, True, False, False],
        truncated=[False, False, True, False],
        next_row=[2, 3],
    )
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert next_values(batch, value, torch.tensor([30.0, 40.0])).tolist() == [2.0, 0.0, 30.0, 40.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_with_lambda_1_the_target_is_the_discounted_return(count: int, seed: int) -> None:
    """An independent recursion: with lambda 1 the values cancel and the target is the return, whatever the critic."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(count, generator=generator, dtype=torch.float64)
    value = torch.randn(count, generator=generator, dtype=torch.float64)
    batch = _one_episode(reward)
    targets = advantages(batch, value, value[:0], 0.9, 1.0)
    returns = sum(0.9**i * reward[i] for i in range(count))
    assert targets.value_target[0].item() == pytest.approx(float(returns), abs=1e-5)


def _one_episode(reward: Tensor) -> DecisionBatch:
    count = len(reward)
    rows, empty = torch.arange(count), torch.zeros(count, 0)
    ended = rows == count - 1
    return DecisionBatch(
        observation={},
        task=[""] * count,
        chain=empty,
        step=empty,
        log_prob=empty,
        action=empty,
        reward=reward,
        delay=torch.zeros_like(rows),
        executed=rows,
        terminated=ended,
        truncated=torch.zeros_like(ended),
        success=ended,
        version=rows,
        env=torch.zeros_like(rows),
        index=rows,
        next_row=rows[:0],
        next_observation={},
    )


def test_normalised_advantages() -> None:
    raw = torch.tensor([1.0, 2.0, 3.0, 6.0, 1.0, 2.0, 3.0, 6.0])
    advantage = normalise(raw, raw)
    assert advantage.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert advantage.std().item() == pytest.approx(1.0, abs=1e-6)
    assert normalise(torch.full((9,), 3.0), torch.zeros(9)).tolist() == [0.0] * 9


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_handful_of_advantages_is_not_normalised(count: int) -> None:
    """A deviation of one number is not a number, one of two says nothing: only the returns' scale is divided by."""
    raw = torch.arange(1.0, count + 1)
    assert normalise(raw, raw, 4.0).tolist() == (raw / 4).tolist()


def test_advantages_that_are_next_to_nothing_beside_the_returns_are_not_blown_up() -> None:
    """Deviations 1e-4 and 1: divided by a hundredth of the returns', they stay a hundredth."""
    unit = torch.tensor([-1.0, 1.0] * 8)
    advantage = normalise(1e-4 * unit, unit)
    torch.testing.assert_close(advantage, 1e-2 * unit / unit.std(), rtol=1e-5, atol=0)


NO, YES = False, True


@pytest.mark.parametrize(
    ("reward", "executed", "terminated", "silent"),
    [
        # No success, whether episodes failed by the task's rules or not.
        ([0.0, 0.0, 0.0], [5, 5, 5], [NO, NO, NO], True),
        ([0.0, 0.0, 0.0], [5, 5, 2], [NO, NO, YES], True),
        # A cost of every step, the last chunk being cut by the time limit.
        ([-0.5, -0.5, -0.2], [5, 5, 2], [NO, NO, NO], True),
        # The same cost, and one episode that ended by success, or a bonus for staying alive and a fall.
        ([-0.5, -0.5, -0.2], [5, 5, 2], [NO, NO, YES], False),
        # All episodes are one decision: all worth the same, or their length is what differs.
        ([1.0, 1.0, 1.0], [5, 3, 2], [YES, YES, YES], True),
        ([-0.5, -0.3, -0.2], [5, 3, 2], [YES, YES, YES], False),
        # One success, one shaped reward.
        ([0.0, 0.0, 1.0], [5, 5, 5], [NO, NO, YES], False),
        ([0.1, 0.1, 0.11], [5, 5, 5], [NO, NO, NO], False),
        # Broken numbers are not silence, and nothing is.
        ([0.0, float("nan"), 0.0], [5, 5, 5], [NO, NO, NO], False),
        ([0.0, float("inf"), 0.0], [5, 5, 5], [NO, NO, NO], False),
        ([], [], [], True),
    ],
)
def test_rewards_that_tell_no_decision_from_another(
    reward: list[float], executed: list[int], terminated: list[bool], silent: bool
) -> None:
    found = says_nothing(
        torch.tensor(reward), torch.tensor(executed), torch.tensor(terminated, dtype=torch.bool)
    )
    assert found is silent


# Groups of episodes from the same start


def test_episodes_are_counted_for_each_environment(make_decisions: MakeDecisions) -> None:
    batch = make_decisions(
        env=[0, 0, 0, 1, 1, 1, 2],
        index=[0, 1, 2, 0, 1, 2, 0],
        terminated=[False, True, False, False, False, True, True],
        truncated=[True, False, False, False, False, False, False],
    )
    assert episode_numbers(batch).tolist() == [0, 1, 2, 0, 0, 0, 0]


def test_an_episode_is_compared_with_those_from_its_start(make_decisions: MakeDecisions) -> None:
    """Group 0 (environments 0, 1): returns 1 and 0, mean .5, deviation .7071. Group 1: all alike."""
    batch = make_decisions(
        env=[0, 0, 1, 2, 3],
        index=[0, 1, 0, 0, 0],
        reward=[0.0, 1.0, 0.0, 1.0, 1.0],
        terminated=[False, True, False, True, True],
        truncated=[False, False, True, False, False],
    )
    targets = group_advantages(batch, 2)
    assert targets.informative.tolist() == [True, True, True, False, False]
    assert targets.advantage.tolist() == pytest.approx([0.7071, 0.7071, -0.7071, 0, 0], abs=1e-4)


def test_a_group_with_an_unfinished_episode_is_left_out(make_decisions: MakeDecisions) -> None:
    batch = make_decisions(
        env=[0, 1, 1], index=[0, 0, 1], reward=[1.0, 0.0, 0.0], terminated=[True, False, False]
    )
    targets = group_advantages(batch, 2)
    assert not targets.informative.any()
    assert not targets.advantage.any()


def test_an_episode_that_lost_a_decision_is_left_out_with_all_that_follow(
    make_decisions: MakeDecisions,
) -> None:
    """Environment 0 lost its decision 1, which may have been the end of an episode."""
    batch = make_decisions(
        env=[0, 0, 0, 1, 1, 1],
        index=[0, 2, 3, 0, 2, 3],
        reward=[0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        terminated=[False, True, True, False, False, False],
        truncated=[False, False, False, False, True, True],
    )
    assert not group_advantages(batch, 2).informative.any()


def test_an_environment_that_lost_its_first_decision_is_left_out(make_decisions: MakeDecisions) -> None:
    """Decision 4 of environment 0, a whole episode, is lost: its second one must not pass for the first."""
    batch = make_decisions(
        env=[0, 1, 1], index=[5, 4, 5], reward=[0.0, 1.0, 1.0], terminated=[True, True, True]
    )
    assert not group_advantages(batch, 2).informative.any()


@pytest.mark.parametrize(
    ("bounds", "informative"),
    [
        (None, [True, True, True]),
        ((0.25, 0.75), [True, True, True]),
        ((0.3, 0.9), [False, True, True]),
        ((0.1, 0.6), [True, True, False]),
    ],
)
def test_groups_outside_of_the_bounds_are_left_out(
    make_decisions: MakeDecisions, bounds: tuple[float, float] | None, informative: list[bool]
) -> None:
    """Three groups of four episodes, of which one, two and three succeed."""
    reward = [1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    batch = make_decisions(env=list(range(12)), index=[0] * 12, reward=reward, terminated=[True] * 12)
    found = group_advantages(batch, 4, bounds).informative
    assert found.view(3, 4)[:, 0].tolist() == informative
    assert torch.equal(found, found.view(3, 4)[:, :1].expand(3, 4).flatten())


def test_a_loss_in_one_group_is_none_of_the_others(make_decisions: MakeDecisions) -> None:
    """Environment 0 lost its decision 1; 2 and 3 begin with another index, as those of another actor may."""
    batch = make_decisions(
        env=[0, 0, 1, 2, 3],
        index=[0, 2, 0, 7, 7],
        reward=[0.0, 1.0, 1.0, 1.0, 0.0],
        terminated=[False, True, True, True, True],
    )
    assert group_advantages(batch, 2).informative.tolist() == [False, False, False, True, True]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_group_advantages_match_a_plain_loop(data: st.DataObject) -> None:
    from .conftest import build_decisions

    size, groups = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    rows: list[tuple[int, int, float, bool]] = []
    returns: dict[tuple[int, int], list[float]] = {}
    for env in range(size * groups):
        lengths = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        index = 0
        for number, length in enumerate(lengths):
            reward = float(data.draw(st.integers(0, 1)))
            for step in range(length):
                last = step == length - 1
                rows.append((env, index, reward if last else 0.0, last))
                index += 1
            returns.setdefault((env // size, number), []).append(reward)
    env, index, reward, ended = zip(*rows, strict=True)
    batch = build_decisions(env=list(env), index=list(index), reward=list(reward), terminated=list(ended))
    targets, number = group_advantages(batch, size), episode_numbers(batch).tolist()
    for row in range(len(rows)):
        own = returns[env[row] // size, number[row]]
        known = torch.tensor(own)
        informative = len(own) == size and float(known.std()) > 0
        assert bool(targets.informative[row]) == informative
        if informative:
            episode = [
                r for e, n, r in zip(env, number, reward, strict=True) if (e, n) == (env[row], number[row])
            ]
            expected = (sum(episode) - known.mean()) / known.std()
            assert float(targets.advantage[row]) == pytest.approx(float(expected), abs=1e-5)
        else:
            assert targets.advantage[row] == 0


@pytest.mark.parametrize(
    ("decisions", "discount"),
    [(40, 0.975), (8, 0.875), (2, 0.5), (1, 0.0), (0.5, 0.0), (100, 0.99), (1000, 0.99)],
)
def test_the_discount_has_the_time_limit_as_its_horizon(decisions: float, discount: float) -> None:
    assert discount_within(decisions) == pytest.approx(discount)
    assert PIRLAlgorithmConfig(gamma=discount).discount == discount


def test_without_a_time_limit_the_discount_is_the_largest() -> None:
    assert PIRLAlgorithmConfig().gamma is None
    assert PIRLAlgorithmConfig().discount == 0.99
