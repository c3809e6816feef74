"""A rollout: ordered in time, preprocessed once, and read in minibatches that cover it exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.storage import minibatches, prepare
from lerobot_policy_pi_rl.bases.adapter import take

MakeDecisions = Callable[..., DecisionBatch]
STATE = "observation.state"


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 100))
def test_minibatches_cover_every_row_exactly_once_in_slices_of_nearly_equal_size(
    count: int, size: int, seed: int
) -> None:
    rows = 7 + 3 * torch.arange(count)
    parts = list(minibatches(rows, size, torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.cat(parts).sort().values, rows)
    lengths = [len(part) for part in parts]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert len(parts) == -(-count // size)


def test_minibatches_differ_between_epochs_and_repeat_with_the_seed() -> None:
    rows = torch.arange(50)

    def epochs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.cat(list(minibatches(rows, 8, generator))) for _ in range(2)]

    one, two = epochs(0), epochs(0)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1])


def test_prepare_orders_in_time_and_preprocesses_with_the_right_texts(make_decisions: MakeDecisions) -> None:
    seen: list[tuple[list[float], list[str]]] = []

    def preprocess(observation: dict[str, Tensor], task: list[str]) -> dict[str, Tensor]:
        seen.append((observation[STATE][:, 0].tolist(), task))
        return {STATE: observation[STATE] + 0.5}

    batch = make_decisions(env=[1, 0, 1, 0], index=[3, 9, 2, 8], next_row=[0, 1])
    rollout = prepare(batch, preprocess)
    assert rollout.decisions.observation[STATE][:, 0].tolist() == [3.0, 1.0, 2.0, 0.0]
    assert rollout.observations.rows(torch.arange(4), take)[STATE][:, 0].tolist() == [3.5, 1.5, 2.5, 0.5]
    assert rollout.usable.tolist() == [0, 1, 2, 3]
    # Row 0 carries state 100 and row 1 carries 101; both are preprocessed with their own row's text.
    texts = dict(zip(*next(pair for pair in seen if pair[0][0] >= 100), strict=True))
    assert texts == {100.0: "task 0", 101.0: "task 1"}


def test_prepare_leaves_out_rows_that_lost_their_successor(make_decisions: MakeDecisions) -> None:
    batch = make_decisions(env=[0, 0, 0], index=[0, 1, 3], next_row=[2])
    assert prepare(batch, lambda observation, task: observation).usable.tolist() == [0, 2]


def test_a_rollout_without_next_observations(make_decisions: MakeDecisions) -> None:
    rollout = prepare(
        make_decisions(env=[0, 1], terminated=[True, True]), lambda observation, task: observation
    )
    assert len(rollout.next_observations) == 0


def test_pictures_are_preprocessed_when_they_are_read(make_decisions: MakeDecisions) -> None:
    """All else at once: the pipeline has a price per call."""
    calls: list[int] = []

    def preprocess(observation: dict[str, Tensor], task: list[str]) -> dict[str, Any]:
        calls.append(len(task))
        return {key: value.float() / 255 for key, value in observation.items()} | {"task": task}

    pictures = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2) * 50
    done, rows = [True] * 4, torch.tensor([2, 0])
    plain = prepare(make_decisions(env=[0, 1, 2, 3], terminated=done), preprocess).observations
    assert calls == [4]
    seen = prepare(
        make_decisions(env=[0, 1, 2, 3], terminated=done, observation={"image": pictures}), preprocess
    ).observations
    assert calls == [4]
    read = seen.rows(rows, take)
    assert calls == [4, 2]
    torch.testing.assert_close(read["image"][:, 0, 0, 0], torch.tensor([100 / 255, 0]))
    assert read["task"] == plain.rows(rows, take)["task"] == ["task 2", "task 0"]
    assert calls == [4, 2]


def test_a_rollout_with_nothing_usable(make_decisions: MakeDecisions) -> None:
    with pytest.raises(ValueError, match="none of the 2 decisions of this iteration can be used"):
        prepare(make_decisions(env=[0, 1]), lambda observation, task: observation)
