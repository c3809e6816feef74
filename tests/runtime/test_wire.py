"""Bytes out, the same record in; anything else is a WireError."""

import contextlib
import dataclasses
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.utils.transition import move_transition_to_device
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.runtime.handshake import flat_settings, settings_differences
from lerobot_policy_pi_rl.runtime.packing import WireError, checksum
from lerobot_policy_pi_rl.runtime.wire import (
    MAX_DECISIONS_HEADER_BYTES,
    MAX_DEMONSTRATION_ROWS,
    MAX_INTERACTION_BYTES,
    RolloutHeader,
    TensorField,
    WeightsHeader,
    WireSpec,
    as_transition,
    decode_decisions,
    decode_interaction,
    decode_weights,
    encode_decisions,
    encode_interaction,
    encode_weights,
    finite_rows,
    from_transition,
    task_vocabulary,
)

pytestmark = pytest.mark.timeout(120)

HEADER = RolloutHeader(actor=2, version=7, part=1)
WEIGHTS_HEADER = WeightsHeader(version=3, restart=True, evaluate=False, final=False, sent_at=12.5)
DENOISING_STEPS = 4


def make_batch(
    rows: int = 5,
    next_rows: int = 2,
    recorded: int = 1,
    horizon: int = 3,
    dims: tuple[int, int] = (4, 2),
    tasks: tuple[str, ...] = ("reach", "push"),
    image: bool = True,
) -> DecisionBatch:
    """Random decisions: `dims` are the padded and the real action dimensions."""
    count = torch.arange(rows)
    observation = {"observation.state": torch.randn(rows, 6)}
    following = {"observation.state": torch.randn(next_rows, 6)}
    if image:
        observation["observation.images.top"] = torch.randint(0, 256, (rows, 3, 4, 4), dtype=torch.uint8)
        following["observation.images.top"] = torch.randint(0, 256, (next_rows, 3, 4, 4), dtype=torch.uint8)
    return DecisionBatch(
        observation=observation,
        task=[tasks[row % len(tasks)] for row in range(rows)],
        chain=torch.randn(rows, recorded + 1, horizon, dims[0]),
        step=torch.randint(0, DENOISING_STEPS, (rows, recorded)),
        log_prob=torch.randn(rows, horizon),
        action=torch.randn(rows, horizon, dims[1]),
        reward=torch.randn(rows),
        delay=count * 0,
        executed=torch.randint(1, horizon + 1, (rows,)),
        terminated=count % 3 == 1,
        truncated=count % 3 == 2,
        success=count % 2 == 0,
        version=count * 0 + 7,
        env=count % 2,
        index=count // 2,
        next_row=torch.randperm(rows)[:next_rows],
        next_observation=following,
    )


def spec_of(batch: DecisionBatch, max_rows: int = 100) -> WireSpec:
    """The specification that a batch meets."""
    return WireSpec(
        observation={
            key: TensorField(value.dtype, tuple(value.shape[1:])) for key, value in batch.observation.items()
        },
        chain=tuple(batch.chain.shape[1:]),  # type: ignore[arg-type]
        action=tuple(batch.action.shape[1:]),  # type: ignore[arg-type]
        denoising_steps=DENOISING_STEPS,
        max_rows=max_rows,
    )


def assert_same(one: DecisionBatch, two: DecisionBatch) -> None:
    """Every field is equal, NaN to NaN, in value, type and shape."""
    for field in dataclasses.fields(DecisionBatch):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if field.name == "task":
            assert left == right
        else:
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@st.composite
def batches(draw: st.DrawFn) -> DecisionBatch:
    """Batches of any shape, without rows or next rows too."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(0, 6))
    real = draw(st.integers(1, 4))
    return make_batch(
        rows=rows,
        next_rows=draw(st.integers(0, rows)),
        recorded=draw(st.integers(1, 4)),
        horizon=draw(st.integers(1, 5)),
        dims=(real + draw(st.integers(0, 3)), real),
        tasks=tuple(draw(st.lists(st.text(max_size=8), min_size=1, max_size=4))),
        image=draw(st.booleans()),
    )


# Decisions


@settings(deadline=None, max_examples=60)
@given(batches())
def test_decisions_round_trip(batch: DecisionBatch) -> None:
    rollout = decode_decisions(encode_decisions(batch, HEADER), spec_of(batch))
    assert rollout.header == HEADER
    assert_same(rollout.decisions, batch)


def test_a_transition_is_lerobots_and_holds_tensors_only() -> None:
    batch = make_batch()
    transition = as_transition(batch)
    assert set(transition) == {
        "state",
        "action",
        "reward",
        "next_state",
        "done",
        "truncated",
        "complementary_info",
    }
    moved = move_transition_to_device(transition, "cpu")
    assert_same(from_transition(moved, task_vocabulary(batch)), batch)


def test_views_of_one_tensor_are_sent_each_in_full() -> None:
    batch = make_batch(image=False)
    shared = torch.randn(10, 6)
    batch = dataclasses.replace(
        batch,
        observation={"observation.state": shared[:5]},
        next_observation={"observation.state": shared[5::3]},
        terminated=batch.success,
    )
    assert_same(decode_decisions(encode_decisions(batch, HEADER), spec_of(batch)).decisions, batch)


def test_values_that_are_not_finite_pass_and_are_named() -> None:
    batch = make_batch(rows=6, next_rows=1)
    batch.reward[0] = math.nan
    batch.chain[1, 1, 0, 0] = math.inf
    batch.action[2, 0, 0] = -math.inf
    batch.log_prob[3, 0] = math.nan
    batch.next_row[0] = 4
    batch.next_observation["observation.state"][0, 3] = math.nan
    decoded = decode_decisions(encode_decisions(batch, HEADER), spec_of(batch)).decisions
    assert finite_rows(decoded).tolist() == [False, False, False, False, False, True]
    assert len(decoded.select(finite_rows(decoded).nonzero()[:, 0])) == 1


def test_finite_rows_of_no_rows() -> None:
    assert finite_rows(make_batch(rows=0, next_rows=0)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"executed": torch.tensor([1, 0, 1])}, r"executed: values 0\.\.1, expected 1\.\.3"),
        ({"executed": torch.tensor([1, 4, 1])}, r"executed: values 1\.\.4, expected 1\.\.3"),
        ({"delay": torch.tensor([0, -1, 0])}, r"delay: values -1\.\.0, expected 0\.\.2"),
        (
            {"delay": torch.tensor([0, 2, 0]), "executed": torch.tensor([3, 2, 1])},
            r"delay \+ executed is 4, a chunk has 3 steps",
        ),
        ({"step": torch.tensor([[0], [4], [1]])}, r"step: values 0\.\.4, expected 0\.\.3"),
        ({"step": torch.tensor([[0], [-1], [1]])}, "step"),
        ({"next_row": torch.tensor([3])}, r"next_row: values 3\.\.3, expected 0\.\.2"),
        ({"next_row": torch.tensor([-1])}, "next_row"),
        ({"version": torch.tensor([1, -1, 1])}, "version"),
        ({"env": torch.tensor([1, -1, 1])}, "env"),
        ({"index": torch.tensor([1, -1, 1])}, "index"),
        ({"reward": torch.zeros(3, dtype=torch.float64)}, r"reward: got torch\.float64"),
        ({"reward": torch.zeros(3, 1)}, "reward: expected a tensor with one dimension"),
        ({"reward": torch.zeros(2)}, "expected"),
        ({"log_prob": torch.zeros(3, 4)}, r"log_prob: got torch\.float32 \(3, 4\), expected .* \(3, 3\)"),
        ({"chain": torch.zeros(3, 2, 3, 5)}, "chain"),
        ({"action": torch.zeros(3, 3, 3)}, "action"),
        ({"success": torch.zeros(3)}, "success"),
        ({"terminated": torch.zeros(3, dtype=torch.uint8)}, "done"),
        ({"observation": {"observation.state": torch.zeros(3, 7)}}, r"state\.observation\.state"),
        ({"observation": {"observation.other": torch.zeros(3, 6)}}, "wrong set of tensors"),
        ({"next_observation": {"observation.state": torch.zeros(2, 6)}}, "next_state"),
    ],
)
def test_what_the_learner_does_not_expect_is_refused(change: dict, message: str) -> None:
    good = make_batch(rows=3, next_rows=1, image=False)
    data = encode_decisions(dataclasses.replace(good, **change), HEADER)
    with pytest.raises(WireError, match=message) as error:
        decode_decisions(data, spec_of(good))
    assert "\n" not in str(error.value)


def test_a_row_named_twice_is_refused() -> None:
    good = make_batch(rows=3, next_rows=2, image=False)
    data = encode_decisions(dataclasses.replace(good, next_row=torch.tensor([1, 1])), HEADER)
    with pytest.raises(WireError, match="names a row twice"):
        decode_decisions(data, spec_of(good))


def test_too_many_rows_are_refused() -> None:
    batch = make_batch(rows=5)
    with pytest.raises(WireError, match="5 decisions in one message, at most 4"):
        decode_decisions(encode_decisions(batch, HEADER), spec_of(batch, max_rows=4))


def test_a_truth_value_that_is_a_number_is_refused() -> None:
    batch = make_batch(rows=3, image=False)
    # Three bytes that a bool tensor may not hold, where there were truth values.
    odd = torch.tensor([7, 0, 1], dtype=torch.uint8).view(torch.bool)
    with pytest.raises(WireError, match="neither 0 nor 1"):
        decode_decisions(encode_decisions(dataclasses.replace(batch, success=odd), HEADER), spec_of(batch))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "weights"}, "a message of weights where decisions were expected"),
        ({"header": "{}"}, "exactly the fields actor, version, part"),
        ({"header": '{"actor": 0, "version": true, "part": 0}'}, "version: got bool"),
        ({"header": '{"actor": -1, "version": 0, "part": 0}'}, "actor: -1 is out of"),
        ({"header": '{"actor": 1e99, "version": 0, "part": 0}'}, "actor: got float"),
        ({"header": "[" * 100_000}, "the header is not JSON"),
        ({"header": "not json"}, "the header is not JSON"),
        ({"tasks": '["a"]'}, "task_index"),
        ({"tasks": '["a", 1]'}, "a task must be a text"),
        ({"tasks": "{}"}, "the task list must be a list"),
        ({"tasks": json.dumps([str(n) for n in range(99)])}, "at most 5 texts"),
        ({"tasks": json.dumps(["a" * 5000, "b"])}, "at most 4096 characters"),
        ({"tasks": None}, "the task list is missing"),
    ],
)
def test_metadata_is_checked(metadata: dict, message: str) -> None:
    batch = make_batch()
    data = encode_decisions(batch, HEADER)
    text, tensors = _taken_apart(data)
    changed = {key: value for key, value in {**text, **metadata}.items() if value is not None}
    with pytest.raises(WireError, match=message):
        decode_decisions(save_safetensors(tensors, changed), spec_of(batch))


def _taken_apart(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a payload."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"], load_safetensors(data)


# Corruption

GOOD = make_batch(rows=2, next_rows=1)
GOOD_DATA = encode_decisions(GOOD, HEADER)
WEIGHTS_DATA = encode_weights({"head": torch.ones(3)}, WEIGHTS_HEADER)


@settings(deadline=None)
@given(st.integers(0, len(GOOD_DATA) - 1))
def test_a_message_cut_short_is_a_wire_error(length: int) -> None:
    with pytest.raises(WireError):
        decode_decisions(GOOD_DATA[:length], spec_of(GOOD))


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(GOOD_DATA) - 1), st.binary(min_size=1, max_size=12))
def test_a_corrupted_message_is_a_wire_error_or_well_formed(place: int, noise: bytes) -> None:
    data = GOOD_DATA[:place] + noise + GOOD_DATA[place + len(noise) :]
    for decode in (lambda: decode_decisions(data, spec_of(GOOD)), lambda: decode_weights(data)):
        with contextlib.suppress(WireError):
            decode()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_wire_error(data: bytes) -> None:
    for decode in (lambda: decode_decisions(data, spec_of(GOOD)), lambda: decode_weights(data)):
        with pytest.raises(WireError):
            decode()


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
        {"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}},
        {"a": [1, 2]},
    ],
)
def test_hostile_safetensors_headers_are_a_wire_error(header: dict) -> None:
    metadata = {"kind": "weights", "header": json.dumps(dataclasses.asdict(WEIGHTS_HEADER))}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    with pytest.raises(WireError) as error:
        decode_weights(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "\n" not in str(error.value)


def test_a_header_that_claims_to_be_huge_is_not_read() -> None:
    with pytest.raises(WireError, match="cut short or not safetensors"):
        decode_weights(struct.pack("<Q", 2**63) + bytes(100))


# Weights


def test_weights_round_trip_in_their_own_dtypes() -> None:
    tied = torch.randn(3, 2)
    tensors = {
        "half": torch.randn(4, 5).bfloat16(),
        "turned": torch.randn(4, 5).t(),
        "scalar": torch.tensor(1.5),
        "count": torch.tensor([3]),
        "tied": tied,
        "tied_too": tied,
        "trained": torch.nn.Parameter(torch.randn(2)),
    }
    weights = decode_weights(encode_weights(tensors, WEIGHTS_HEADER))
    assert weights.header == WEIGHTS_HEADER
    assert weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert weights.tensors[name].dtype == tensor.dtype
        assert torch.equal(weights.tensors[name], tensor)


def test_weights_that_were_damaged_on_their_way_are_refused() -> None:
    for place in (-1, -5):
        damaged = bytearray(WEIGHTS_DATA)
        damaged[place] ^= 1
        with pytest.raises(WireError, match="checksum differs"):
            decode_weights(bytes(damaged))


def test_a_checksum_tells_names_dtypes_and_shapes_apart() -> None:
    one = torch.zeros(2, 3)
    others = ({"b": one}, {"a": one.half()}, {"a": one.t()}, {"a": one + 1}, {"a": one, "b": one}, {})
    assert checksum({"a": one}) == checksum({"a": one.clone()})
    assert checksum({"a": one, "b": one + 1}) == checksum({"b": one + 1, "a": one})
    assert checksum({"a": one}) not in [checksum(other) for other in others]


def test_decisions_are_no_weights() -> None:
    with pytest.raises(WireError, match="a message of decisions where weights were expected"):
        decode_weights(GOOD_DATA)
    with pytest.raises(WireError, match="a message of weights where decisions were expected"):
        decode_decisions(WEIGHTS_DATA, spec_of(GOOD))


# Interactions

scalars = st.one_of(
    st.booleans(), st.integers(), st.text(max_size=20), st.floats(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(st.text(max_size=20), scalars, max_size=10))
def test_interactions_round_trip(values: dict) -> None:
    assert decode_interaction(encode_interaction(values)) == values


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": null}',
        b'{"a": [1]}',
        b'{"a": {"b": 1}}',
        b"[" * 60_000,
        b'{"a": "' + b"x" * MAX_INTERACTION_BYTES + b'"}',
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_malformed_interactions_are_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError) as error:
        decode_interaction(data)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=50))
def test_random_interactions_are_a_wire_error_or_well_formed(data: bytes) -> None:
    try:
        values = decode_interaction(data)
    except WireError:
        return
    assert isinstance(values, dict)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, [1], torch.ones(1)])
def test_an_interaction_that_is_no_scalar_is_not_sent(value: object) -> None:
    with pytest.raises(WireError, match="interaction return"):
        encode_interaction({"return": value})  # type: ignore[dict-item]


# Settings


def test_settings_are_flat_and_in_the_form_of_json() -> None:
    assert flat_settings({"policy": {"shape": (1, 2), "empty": {}}, "seed": 1}) == {
        "policy.shape": [1, 2],
        "policy.empty": {},
        "seed": 1,
    }


def test_differences_name_setting_and_both_values() -> None:
    learner = {"policy": {"num_inference_steps": 4, "noise": 0.5}, "only.learner": 1}
    actor = {"policy": {"num_inference_steps": 5, "noise": 0.5}, "only.actor": None}
    assert settings_differences(learner, actor) == [
        "only.actor: learner has no such setting, actor None",
        "only.learner: learner 1, actor has no such setting",
        "policy.num_inference_steps: learner 4, actor 5",
    ]
    assert settings_differences(learner, learner) == []


def test_many_or_long_differences_stay_short() -> None:
    lines = settings_differences({str(n): "x\n" * 1000 for n in range(100)}, {})
    assert len(lines) == 21
    assert lines[-1] == "... and 80 more"
    assert all(len(line) < 400 and "\n" not in line for line in lines)


def test_only_a_robots_message_may_be_as_large_as_what_a_person_did() -> None:
    state = {"observation.state": TensorField(torch.float32, (3,))}
    spec = WireSpec(state, chain=(2, 3, 4), action=(3, 2), denoising_steps=4, max_rows=4)
    quota = spec.layout(4, 4)
    size = sum(field.dtype.itemsize * math.prod(field.shape) for field in quota.values())
    assert spec.max_message_bytes() == size + MAX_DECISIONS_HEADER_BYTES
    robot = dataclasses.replace(spec, demonstration_steps=20_000)
    # State, action, task and mark of each step.
    assert robot.max_message_bytes() == MAX_DEMONSTRATION_ROWS * (12 + 8 + 8 + 1) + MAX_DECISIONS_HEADER_BYTES
