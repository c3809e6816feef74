"""Decisions keep their next observations when they are shuffled, dropped and joined."""

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch

MakeDecisions = Callable[..., DecisionBatch]
STATE = "observation.state"


def rows_with_next(batch: DecisionBatch) -> dict[float, float]:
    """The state of every row that carries a next observation -> that observation's state."""
    states = batch.observation[STATE][batch.next_row, 0]
    return dict(zip(states.tolist(), batch.next_observation[STATE][:, 0].tolist(), strict=True))


def test_selecting_keeps_rows_and_their_next_observations_together(make_decisions: MakeDecisions) -> None:
    batch = make_decisions(env=[0, 0, 0, 0], reward=[0.0, 1.0, 2.0, 3.0], next_row=[1, 3])
    part = batch.select(torch.tensor([3, 0, 1]))
    assert len(part) == 3
    assert part.reward.tolist() == [3.0, 0.0, 1.0]
    assert part.task == ["task 3", "task 0", "task 1"]
    assert sorted(part.next_row.tolist()) == [0, 2]
    assert rows_with_next(part) == {1.0: 101.0, 3.0: 103.0}


def test_dropping_a_row_drops_its_next_observation(make_decisions: MakeDecisions) -> None:
    part = make_decisions(env=[0, 0, 0], next_row=[0, 2]).select(torch.tensor([0, 1]))
    assert rows_with_next(part) == {0.0: 100.0}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_joining_and_shuffling_loses_nothing(sizes: list[int], random: object) -> None:
    batches = [_carrying_all(size, 10 * number) for number, size in enumerate(sizes)]
    whole = DecisionBatch.concatenate(batches)
    assert len(whole) == sum(sizes)
    order = list(range(len(whole)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = whole.select(torch.tensor(order, dtype=torch.int64))
    expected = {state: state + 1000 for batch in batches for state in batch.observation[STATE][:, 0].tolist()}
    assert rows_with_next(shuffled) == expected
    assert shuffled.steps == 3 * sum(sizes)


def _carrying_all(count: int, first: int) -> DecisionBatch:
    rows, state = torch.arange(count), first + torch.arange(float(count))[:, None]
    flags = torch.zeros(count, dtype=torch.bool)
    return DecisionBatch(
        observation={STATE: state},
        task=[""] * count,
        chain=torch.zeros(count, 2, 3, 2),
        step=torch.zeros(count, 1, dtype=torch.int64),
        log_prob=torch.zeros(count, 3),
        action=torch.zeros(count, 3, 2),
        reward=torch.zeros(count),
        delay=torch.zeros_like(rows),
        executed=torch.full((count,), 3),
        terminated=flags,
        truncated=flags,
        success=flags,
        version=rows,
        env=rows,
        index=rows,
        next_row=rows,
        next_observation={STATE: state + 1000},
    )
