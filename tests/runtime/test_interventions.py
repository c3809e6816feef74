"""What people show: chunks of it, its way over the wire, and how long it stays."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.demonstrations import DemonstrationBatch, chunk_rows
from lerobot_policy_pi_rl.runtime.checkpoint import CheckpointError
from lerobot_policy_pi_rl.runtime.interventions import FOLDER, InterventionStore, either, surplus
from lerobot_policy_pi_rl.runtime.packing import WireError
from lerobot_policy_pi_rl.runtime.wire import (
    MAX_DEMONSTRATION_ROWS,
    TensorField,
    WireSpec,
    decode_demonstrations,
    encode_demonstrations,
    is_of_demonstrations,
)

STATE, CAMERA = "observation.state", "observation.images.front"
SPEC = WireSpec(
    observation={
        STATE: TensorField(torch.float32, (1,)),
        CAMERA: TensorField(torch.uint8, (3, 4, 4)),
    },
    chain=(2, 3, 2),
    action=(3, 2),
    denoising_steps=4,
    max_rows=8,
    demonstration_steps=100,
    demonstration_bytes=10**6,
)
# Of one step: state, picture, action, and whether it is the last.
STEP_BYTES = 4 + 3 * 4 * 4 + 2 * 4 + 1


def shown(
    count: int, first: float = 0.0, last: tuple[int, ...] = (), task: str = "put it there"
) -> DemonstrationBatch:
    """Steps whose state is their number, and whose action is twice that."""
    number = first + torch.arange(count, dtype=torch.float32)
    ends = torch.zeros(count, dtype=torch.bool)
    ends[[*last, count - 1]] = True
    return DemonstrationBatch(
        observation={STATE: number[:, None], CAMERA: torch.full((count, 3, 4, 4), 7, dtype=torch.uint8)},
        task=[task] * count,
        action=torch.stack([2 * number, -number], 1),
        last=ends,
    )


def equal(one: DemonstrationBatch, two: DemonstrationBatch) -> bool:
    return (
        one.task == two.task
        and torch.equal(one.action, two.action)
        and torch.equal(one.last, two.last)
        and all(torch.equal(one.observation[key], two.observation[key]) for key in (STATE, CAMERA))
    )


def test_a_full_disk_costs_no_step_of_a_person_in_this_run(
    tmp_path: Path, full_disk: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    spec = replace(SPEC, demonstration_steps=10)
    store = InterventionStore(tmp_path, spec, lambda observation, task, actions: actions)
    with full_disk():
        store.add(shown(4))
    assert "4 steps of a person are in memory alone" in caplog.text
    store.add(shown(4, first=4))
    assert len(store) == 8
    # Beyond the capacity the oldest go, whether they have a file or not.
    store.add(shown(4, first=8))
    assert len(store) == 8
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_what_comes_a_second_time_is_kept_once(tmp_path: Path) -> None:
    """As an actor sends it whose connection broke, to the same learner or to one that was resumed since."""
    for _ in range(2):
        store = InterventionStore(tmp_path, SPEC, lambda observation, task, actions: actions)
        for batch in (shown(4), shown(3), shown(4)):
            # As it comes over the wire.
            store.add(decode_demonstrations(encode_demonstrations(batch), SPEC))
        assert len(store) == 7


def test_a_chunk_repeats_the_last_action_beyond_the_end() -> None:
    last = torch.tensor([False, False, True, False, True])
    rows, pad = chunk_rows(last, torch.tensor([0, 1, 2, 4]), 3)
    assert rows.tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [4, 4, 4]]
    assert pad.tolist() == [[False] * 3, [False, False, True], [False, True, True], [False, True, True]]


def test_parts_are_joined_to_the_whole_and_end_where_they_were_cut() -> None:
    whole = shown(5, last=(1,))
    parts = whole.split(3)
    assert [len(part) for part in parts] == [3, 2]
    assert parts[0].last.tolist() == [False, True, True]
    joined = DemonstrationBatch.concatenate(parts)
    assert equal(replace(joined, last=whole.last), whole)


# The wire


def test_demonstrations_cross_the_wire_unchanged() -> None:
    batch = DemonstrationBatch.concatenate([shown(2), shown(3, 5, task="and back")])
    data = encode_demonstrations(batch)
    assert is_of_demonstrations(data)
    assert equal(decode_demonstrations(data, SPEC), batch)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def other(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("action"), "missing"),
        (other("extra", torch.zeros(2)), r"not expected \['extra'\]"),
        (other("action", torch.zeros(2, 3)), "action: got"),
        (other("action", torch.zeros(2, 2, dtype=torch.float64)), "action: got"),
        (other("action", torch.tensor([[0.0, torch.nan]] * 2)), "not finite"),
        (other("state.observation.state", torch.tensor([[torch.inf]] * 2)), "not finite"),
        (other("complementary_info.last", torch.tensor([True, False])), "last step is not marked"),
        (other("complementary_info.last", torch.tensor([2, 1], dtype=torch.uint8).view(torch.bool)), "truth"),
        (other("complementary_info.last", torch.zeros(2, 1, dtype=torch.bool)), "one dimension"),
        (other("complementary_info.task_index", torch.tensor([0, 1])), "task_index: values 0..1"),
    ],
)
def test_a_message_that_is_not_what_it_should_be_is_refused(
    change: Callable[[dict[str, Tensor]], None], text: str
) -> None:
    tensors = load(encode_demonstrations(shown(2)))
    change(tensors)
    metadata = {"kind": "demonstrations", "header": "{}", "tasks": json.dumps(["put it there"])}
    with pytest.raises(WireError, match=text):
        decode_demonstrations(save(tensors, metadata), SPEC)


@pytest.mark.parametrize("count", [0, MAX_DEMONSTRATION_ROWS + 1])
def test_a_message_has_a_bounded_number_of_steps(count: int) -> None:
    batch = shown(max(count, 1))
    batch = batch if count else replace(batch, last=batch.last[:0])
    with pytest.raises(WireError, match="steps in one message"):
        decode_demonstrations(encode_demonstrations(batch), SPEC)


# The store


def prepare(observation: dict[str, Tensor], task: list[str], actions: dict[str, Tensor]) -> dict[str, Tensor]:
    assert set(task) == {"put it there"}
    return {**observation, **actions}


def store(folder: Path, capacity: int = 100, size: int = 10**6) -> InterventionStore:
    spec = replace(SPEC, demonstration_steps=capacity, demonstration_bytes=size)
    return InterventionStore(folder, spec, prepare)


def test_a_message_that_does_not_fit_is_refused_and_not_kept(tmp_path: Path) -> None:
    kept = store(tmp_path)
    with pytest.raises(WireError, match="action: got"):
        kept.receive(encode_demonstrations(replace(shown(3), action=torch.zeros(3, 5))))
    assert len(kept) == 0
    kept.receive(encode_demonstrations(shown(3)))
    assert len(kept) == 3
    assert [file.suffix for file in (tmp_path / FOLDER).iterdir()] == [".safetensors"]


def test_batches_hold_chunks_of_what_was_shown(tmp_path: Path) -> None:
    kept = store(tmp_path)
    assert kept(4) is None
    kept.add(shown(4, last=(1,)))
    kept.add(shown(2, first=10))
    batch = kept(200)
    assert batch is not None
    state, action, pad = batch[STATE][:, 0], batch["action"], batch["action_is_pad"]
    assert set(state.tolist()) == {0, 1, 2, 3, 10, 11}
    # A chunk goes on from its own step by one, up to the end of the intervention.
    end = torch.tensor([{0: 1, 1: 1, 2: 3, 3: 3, 10: 11, 11: 11}[int(number)] for number in state])
    wanted = state[:, None] + torch.arange(3)
    torch.testing.assert_close(action[..., 0], 2 * torch.minimum(wanted, end[:, None]).float())
    assert torch.equal(pad, wanted > end[:, None])
    assert batch[CAMERA].dtype == torch.uint8


def test_a_resumed_run_finds_what_was_shown(tmp_path: Path) -> None:
    before = store(tmp_path)
    before.add(shown(3))
    before.add(shown(2, first=10))
    after = store(tmp_path)
    assert len(after) == 5
    after.add(shown(1, first=20))
    assert len(store(tmp_path)) == 6
    assert [file.name for file in sorted((tmp_path / FOLDER).iterdir())] == [
        f"00000{number}.safetensors" for number in range(3)
    ]


def test_the_oldest_are_forgotten_on_the_disk_too(tmp_path: Path) -> None:
    kept = store(tmp_path, capacity=5)
    for first in (0, 10, 20):
        kept.add(shown(2, first))
    assert len(kept) == 4
    batch = kept(50)
    assert batch is not None
    assert set(batch[STATE][:, 0].tolist()) == {10, 11, 20, 21}
    assert len(store(tmp_path)) == 4
    # Reading changes nothing, for another learner may be running there.
    smaller = store(tmp_path, capacity=2)
    assert len(store(tmp_path)) == 4
    smaller.trim()
    assert len(smaller) == len(store(tmp_path)) == 2
    # The newest part stays, however large it is.
    kept.add(shown(7))
    assert len(kept) == 7
    assert kept.forgotten == 6


def test_what_was_shown_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    assert shown(3).nbytes == 3 * STEP_BYTES
    kept = store(tmp_path, size=5 * STEP_BYTES)
    for first in (0, 10, 20):
        kept.add(shown(2, first))
    assert (len(kept), kept.forgotten) == (4, 2)
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    # What is forgotten is not remembered by its digest either: a long run would have ever more of them.
    kept.add(shown(2, 0))
    assert (len(kept), kept.forgotten) == (4, 4)
    # Of two limits the narrower one counts.
    assert surplus([shown(2)] * 4, replace(SPEC, demonstration_bytes=7 * STEP_BYTES)) == 1
    assert surplus([shown(2)] * 4, replace(SPEC, demonstration_steps=3)) == 3
    assert surplus([shown(2)] * 4, SPEC) == surplus([], SPEC) == 0


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    store(tmp_path).add(shown(3))
    file = tmp_path / FOLDER / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"000000.safetensors does not fit this run.*move it"):
        store(tmp_path)


def test_a_source_that_has_nothing_yet_leaves_the_batch_to_the_others() -> None:
    one, nothing = {"action": torch.zeros(1)}, None
    assert either([lambda count: nothing])(3) is None
    assert all(either([lambda count: nothing, lambda count: one])(3) is one for _ in range(10))
    two = {"action": torch.ones(1)}
    drawn = [either([lambda count: two, lambda count: one])(3) for _ in range(100)]
    assert 30 < sum(batch is one for batch in drawn) < 70
