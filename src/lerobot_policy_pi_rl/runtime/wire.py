"""What crosses between actor and learner, as bytes: the one encoder and the one decoder.

Payloads are safetensors (a JSON header and raw tensors), never pickle. A decoder takes nothing on trust:
whatever is not exactly what the receiver expects raises `WireError`. Values that are not finite are no wire
error; they make well-formed decisions that must not be learned from, and `finite_rows` tells which.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from lerobot.utils.transition import Transition
from torch import Tensor

from ..algorithm.decisions import DecisionBatch
from ..algorithm.demonstrations import DemonstrationBatch
from .packing import WireError, checksum, pack, read_header, read_json, read_record, short, unpack

Scalar = bool | int | float | str

MAX_HEADER_BYTES = 16 * 2**20
MAX_DECISIONS_HEADER_BYTES = 2**20
MAX_INTERACTION_BYTES = 64 * 2**10
MAX_TASK_CHARACTERS = 4096
MAX_REJECTION_CHARACTERS = 400
# Most steps of a person in one message.
MAX_DEMONSTRATION_ROWS = 1000

# Kinds of messages.
DEMONSTRATIONS = "demonstrations"
REJECTION = "rejection"


@dataclass(frozen=True)
class RolloutHeader:
    """What a message of decisions says about itself.

    Attributes:
        actor: The actor that sends it.
        version: Version of the weights that its decisions were made with.
        part: Number of this quota among those that the actor collected with this version, from 0.
    """

    actor: int
    version: int
    part: int


@dataclass(frozen=True)
class Rollout:
    """A message of decisions, decoded."""

    header: RolloutHeader
    decisions: DecisionBatch


@dataclass(frozen=True)
class WeightsHeader:
    """What a message of weights says about itself.

    Attributes:
        version: Number of these weights, increasing.
        restart: The actors abandon their episodes and begin fresh ones.
        evaluate: The actors run an evaluation before they collect.
        final: Training is over: the actors leave.
        sent_at: When they were published, seconds since the epoch.
    """

    version: int
    restart: bool
    evaluate: bool
    final: bool
    sent_at: float


@dataclass(frozen=True)
class Weights:
    """A message of weights, decoded.

    Attributes:
        header: What it says about itself.
        tensors: The weights.
        task_shares: How large a part of the environments each task gets at a restart, by its text; empty: all the same.
    """

    header: WeightsHeader
    tensors: dict[str, Tensor]
    task_shares: dict[str, float]


@dataclass(frozen=True)
class Rejection:
    """What a learner says of a message that it did not take.

    Attributes:
        text: Why, in one line.
        quota: It was a quota of decisions: this actor's next ones would be rejected as well.
    """

    text: str
    quota: bool


@dataclass(frozen=True)
class TensorField:
    """Type and shape of one row of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WireSpec:
    """The decisions a learner accepts.

    Attributes:
        observation: Type and shape of one observation per key.
        chain: Shape of one recorded chain, `(S + 1, H, D)`.
        action: Shape of one chunk, `(H, A)`.
        denoising_steps: Number K of denoising steps; step indices are below it.
        max_rows: Most decisions in one message.
        demonstration_steps: Most steps of people that are kept; 0 where nobody can take over.
        demonstration_bytes: Most bytes of them.
    """

    observation: dict[str, TensorField]
    chain: tuple[int, int, int]
    action: tuple[int, int]
    denoising_steps: int
    max_rows: int
    demonstration_steps: int = 0
    demonstration_bytes: int = 0

    def layout(self, rows: int, next_rows: int) -> dict[str, TensorField]:
        """Type and full shape of every tensor of a message, by flat name."""
        recorded, horizon = self.chain[0] - 1, self.chain[1]
        info = {
            "chain": TensorField(torch.float32, self.chain),
            "step": TensorField(torch.int64, (recorded,)),
            "log_prob": TensorField(torch.float32, (horizon,)),
            "success": TensorField(torch.bool, ()),
            **{
                name: TensorField(torch.int64, ())
                for name in ("delay", "executed", "version", "env", "index", "task_index")
            },
        }
        row = {
            "action": TensorField(torch.float32, self.action),
            "reward": TensorField(torch.float32, ()),
            "done": TensorField(torch.bool, ()),
            "truncated": TensorField(torch.bool, ()),
            **{f"state.{key}": field for key, field in self.observation.items()},
            **{f"complementary_info.{name}": field for name, field in info.items()},
        }
        next_row = {
            "complementary_info.next_row": TensorField(torch.int64, ()),
            **{f"next_state.{key}": field for key, field in self.observation.items()},
        }
        return _with_rows(row, rows) | _with_rows(next_row, next_rows)

    def demonstration_layout(self, rows: int) -> dict[str, TensorField]:
        """Type and full shape of every tensor of a message of demonstrations, by flat name."""
        row = {
            "action": TensorField(torch.float32, self.action[1:]),
            "complementary_info.last": TensorField(torch.bool, ()),
            "complementary_info.task_index": TensorField(torch.int64, ()),
            **{f"state.{key}": field for key, field in self.observation.items()},
        }
        return _with_rows(row, rows)

    def max_message_bytes(self) -> int:
        """Most bytes of one message: every decision, each with a next observation of its own.

        Where people can take over it may also be what one of them did.
        """
        layouts = [self.layout(self.max_rows, self.max_rows)]
        if self.demonstration_steps:
            layouts.append(self.demonstration_layout(MAX_DEMONSTRATION_ROWS))
        sizes = [
            sum(field.dtype.itemsize * math.prod(field.shape) for field in layout.values())
            for layout in layouts
        ]
        return max(sizes) + MAX_DECISIONS_HEADER_BYTES


def _with_rows(row: Mapping[str, TensorField], count: int) -> dict[str, TensorField]:
    return {name: TensorField(field.dtype, (count, *field.shape)) for name, field in row.items()}


# Decisions


def as_transition(batch: DecisionBatch) -> Transition:
    """A batch of decisions as one stacked LeRobot transition.

    LeRobot's `Transition` holds tensors only, so a task is a number: its place in `task_vocabulary(batch)`.

    Args:
        batch: N decisions.

    Returns:
        The transition; `next_state` has a row for each of `complementary_info["next_row"]` only.
    """
    info = {
        "chain": batch.chain,
        "step": batch.step,
        "log_prob": batch.log_prob,
        "delay": batch.delay,
        "executed": batch.executed,
        "success": batch.success,
        "version": batch.version,
        "env": batch.env,
        "index": batch.index,
        "next_row": batch.next_row,
        "task_index": _task_index(batch),
    }
    # LeRobot types reward and done as one step's scalars; here they are the columns of N decisions.
    stacked = {
        "state": batch.observation,
        "action": batch.action,
        "reward": batch.reward,
        "next_state": batch.next_observation,
        "done": batch.terminated,
        "truncated": batch.truncated,
        "complementary_info": info,
    }
    return cast(Transition, stacked)


def from_transition(transition: Transition, tasks: Sequence[str]) -> DecisionBatch:
    """The decisions of a stacked transition.

    Args:
        transition: As `as_transition` makes it.
        tasks: Its task vocabulary.

    Returns:
        The N decisions.
    """
    columns = cast(dict[str, Any], transition)
    info = dict(columns["complementary_info"])
    task_index = info.pop("task_index")
    return DecisionBatch(
        observation=columns["state"],
        task=[tasks[place] for place in task_index.tolist()],
        action=columns["action"],
        reward=columns["reward"],
        terminated=columns["done"],
        truncated=columns["truncated"],
        next_observation=columns["next_state"],
        **info,
    )


def task_vocabulary(batch: DecisionBatch | DemonstrationBatch) -> list[str]:
    """The different task texts of a batch, sorted."""
    return sorted(set(batch.task))


def _task_index(batch: DecisionBatch | DemonstrationBatch) -> Tensor:
    """Place of each row's task in `task_vocabulary(batch)`, `[N]` int64."""
    place = {task: number for number, task in enumerate(task_vocabulary(batch))}
    return torch.tensor([place[task] for task in batch.task], dtype=torch.int64)


def encode_decisions(batch: DecisionBatch, header: RolloutHeader) -> bytes:
    """Encodes decisions for the transitions stream."""
    metadata = {"tasks": json.dumps(task_vocabulary(batch))}
    return pack("decisions", asdict(header), _flatten(as_transition(batch)), metadata)


def decode_decisions(data: bytes, spec: WireSpec) -> Rollout:
    """Decodes and checks a message of decisions.

    Args:
        data: The message.
        spec: What the learner accepts.

    Returns:
        The decisions with their header.

    Raises:
        WireError: Anything differs from `spec`: a name, type, shape, count or range.
    """
    parts = unpack("decisions", data, MAX_DECISIONS_HEADER_BYTES, spec.layout(0, 0).keys())
    header = read_record(RolloutHeader, parts.header)
    _check_layout(parts.tensors, spec)
    tasks = _checked_tasks(parts.metadata.get("tasks"), len(parts.tensors["reward"]))
    _check_ranges(parts.tensors, spec, len(tasks))
    return Rollout(header, from_transition(_unflatten(parts.tensors), tasks))


def finite_rows(batch: DecisionBatch) -> Tensor:
    """Tells which decisions hold only finite numbers.

    Args:
        batch: N decisions.

    Returns:
        `[N]` bool, false where a number of the decision, or of the observation after it, is NaN or infinite.
    """
    columns = [batch.chain, batch.log_prob, batch.action, batch.reward, *batch.observation.values()]
    clean = torch.stack([_finite(column) for column in columns]).all(0)
    for column in batch.next_observation.values():
        clean[batch.next_row] &= _finite(column)
    return clean


def _finite(column: Tensor) -> Tensor:
    """`[N]` bool from `[N, ...]`."""
    if not column.is_floating_point():
        return torch.ones(len(column), dtype=torch.bool)
    return (
        torch.isfinite(column).reshape(len(column), -1).all(1)
        if len(column)
        else torch.ones(0, dtype=torch.bool)
    )


def _flatten(transition: Transition) -> dict[str, Tensor]:
    """Nested dicts to flat names: `state.observation.state`, `complementary_info.chain`."""
    flat: dict[str, Tensor] = {}
    for name, value in cast(dict[str, Any], transition).items():
        flat.update(
            {f"{name}.{key}": tensor for key, tensor in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def _unflatten(tensors: Mapping[str, Tensor]) -> Transition:
    """Undoes `_flatten`; only the first dot separates, observation keys have dots of their own."""
    nested: dict[str, Any] = {"state": {}, "next_state": {}, "complementary_info": {}}
    for name, tensor in tensors.items():
        outer, dot, inner = name.partition(".")
        if dot:
            nested[outer][inner] = tensor
        else:
            nested[outer] = tensor
    return cast(Transition, nested)


def _check_layout(tensors: Mapping[str, Tensor], spec: WireSpec) -> None:
    """Types and shapes are exactly the expected ones."""
    rows = _length(tensors, "reward")
    if rows > spec.max_rows:
        raise WireError(f"{rows} decisions in one message, at most {spec.max_rows} are accepted")
    _compare(tensors, spec.layout(rows, _length(tensors, "complementary_info.next_row")))


def _compare(tensors: Mapping[str, Tensor], layout: Mapping[str, TensorField]) -> None:
    """Names, types and shapes are those of a layout."""
    for name, field in layout.items():
        found = TensorField(tensors[name].dtype, tuple(tensors[name].shape))
        if found != field:
            raise WireError(f"{name}: got {found.dtype} {found.shape}, expected {field.dtype} {field.shape}")


def _check_ranges(tensors: Mapping[str, Tensor], spec: WireSpec, tasks: int) -> None:
    """Numbers that the learner indexes with are in range."""
    rows = len(tensors["reward"])
    top = torch.iinfo(torch.int64).max
    _check_range(tensors, "executed", 1, spec.action[0])
    _check_range(tensors, "delay", 0, spec.action[0] - 1)
    _check_fits(tensors, spec.action[0])
    _check_range(tensors, "step", 0, spec.denoising_steps - 1)
    _check_range(tensors, "task_index", 0, tasks - 1)
    _check_range(tensors, "next_row", 0, rows - 1)
    for name in ("version", "env", "index"):
        _check_range(tensors, name, 0, top)
    next_row = tensors["complementary_info.next_row"]
    if len(next_row.unique()) != len(next_row):
        raise WireError("complementary_info.next_row names a row twice")
    _check_truths(tensors)


def _check_fits(tensors: Mapping[str, Tensor], horizon: int) -> None:
    """No chunk was executed beyond its end."""
    reached = tensors["complementary_info.delay"] + tensors["complementary_info.executed"]
    if len(reached) and int(reached.max()) > horizon:
        raise WireError(
            f"complementary_info: delay + executed is {int(reached.max())}, a chunk has {horizon} steps"
        )


def _check_truths(tensors: Mapping[str, Tensor]) -> None:
    """Truth values are 0 or 1."""
    for name, tensor in tensors.items():
        # Any other byte in a bool tensor is undefined behaviour in torch.
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise WireError(f"{name}: a truth value is neither 0 nor 1")


def _check_range(tensors: Mapping[str, Tensor], name: str, low: int, high: int) -> None:
    """Every value of an integer tensor lies in `low..high`."""
    tensor = tensors[f"complementary_info.{name}"]
    if not tensor.numel():
        return
    lowest, highest = int(tensor.min()), int(tensor.max())
    if lowest < low or highest > high:
        raise WireError(f"complementary_info.{name}: values {lowest}..{highest}, expected {low}..{high}")


def _checked_tasks(text: str | None, rows: int) -> list[str]:
    """The task vocabulary out of the metadata."""
    tasks = read_json(text, "the task list")
    if not isinstance(tasks, list) or len(tasks) > rows:
        raise WireError(f"the task list must be a list of at most {rows} texts")
    if not all(isinstance(task, str) and len(task) <= MAX_TASK_CHARACTERS for task in tasks):
        raise WireError(f"a task must be a text of at most {MAX_TASK_CHARACTERS} characters")
    return tasks


def _length(tensors: Mapping[str, Tensor], name: str) -> int:
    """Rows of a one-dimensional tensor."""
    if tensors[name].ndim != 1:
        raise WireError(f"{name}: expected a tensor with one dimension")
    return tensors[name].shape[0]


# Demonstrations by people, on the same stream as decisions


def is_of_demonstrations(data: bytes) -> bool:
    """Whether a message on the transitions stream says that it is one of demonstrations."""
    try:
        metadata = read_header(data, MAX_DECISIONS_HEADER_BYTES).get("__metadata__")
    except WireError:
        return False
    return isinstance(metadata, dict) and metadata.get("kind") == DEMONSTRATIONS


def encode_demonstrations(batch: DemonstrationBatch) -> bytes:
    """Encodes at most `MAX_DEMONSTRATION_ROWS` steps that a person took."""
    tensors = {
        **{f"state.{key}": value for key, value in batch.observation.items()},
        "action": batch.action,
        "complementary_info.last": batch.last,
        "complementary_info.task_index": _task_index(batch),
    }
    return pack(DEMONSTRATIONS, {}, tensors, {"tasks": json.dumps(task_vocabulary(batch))})


def decode_demonstrations(data: bytes, spec: WireSpec) -> DemonstrationBatch:
    """Decodes and checks a message of demonstrations.

    Args:
        data: The message.
        spec: What the learner accepts.

    Returns:
        At least one step.

    Raises:
        WireError: Anything differs from `spec`, or is not finite.
    """
    names = spec.demonstration_layout(0).keys()
    parts = unpack(DEMONSTRATIONS, data, MAX_DECISIONS_HEADER_BYTES, names)
    tensors = parts.tensors
    rows = _length(tensors, "complementary_info.last")
    if not 0 < rows <= MAX_DEMONSTRATION_ROWS:
        raise WireError(f"{rows} steps in one message, 1 to {MAX_DEMONSTRATION_ROWS} are accepted")
    _compare(tensors, spec.demonstration_layout(rows))
    _check_truths(tensors)
    tasks = _checked_tasks(parts.metadata.get("tasks"), rows)
    _check_range(tensors, "task_index", 0, len(tasks) - 1)
    if not bool(tensors["complementary_info.last"][-1]):
        raise WireError("complementary_info.last: the last step is not marked")
    if not all(bool(_finite(tensor).all()) for tensor in tensors.values()):
        raise WireError("a number is not finite")
    return DemonstrationBatch(
        observation={key: tensors[f"state.{key}"] for key in spec.observation},
        task=[tasks[place] for place in tensors["complementary_info.task_index"].tolist()],
        action=tensors["action"],
        last=tensors["complementary_info.last"],
    )


# Weights and interactions


def encode_weights(
    tensors: Mapping[str, Tensor], header: WeightsHeader, task_shares: Mapping[str, float] | None = None
) -> bytes:
    """Encodes weights for the parameters stream, each tensor in its own dtype, with a checksum; see `Weights`."""
    metadata = {"task_shares": json.dumps(dict(task_shares or {})), "checksum": checksum(tensors)}
    return pack("weights", asdict(header), tensors, metadata)


def max_weights_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Most bytes of a message of weights that has these tensors."""
    return sum(tensor.nbytes for tensor in tensors.values()) + MAX_HEADER_BYTES


def decode_weights(data: bytes) -> Weights:
    """Decodes a message of weights.

    Raises:
        WireError: The message is not a well-formed message of weights, or was damaged on its way.
    """
    parts = unpack("weights", data, MAX_HEADER_BYTES)
    if parts.metadata.get("checksum") != checksum(parts.tensors):
        raise WireError("the weights are not those that were sent: their checksum differs")
    shares = _checked_shares(parts.metadata.get("task_shares"))
    return Weights(read_record(WeightsHeader, parts.header), parts.tensors, shares)


def encode_rejection(text: str, quota: bool) -> bytes:
    """Encodes what the learner says on the parameters stream of a message that it did not take; see `Rejection`."""
    return pack(
        REJECTION, {}, {}, {"text": short(text, MAX_REJECTION_CHARACTERS), "quota": json.dumps(quota)}
    )


def decode_rejection(data: bytes) -> Rejection | None:
    """Decodes a rejection; None if a message is something else."""
    try:
        metadata = read_header(data, MAX_HEADER_BYTES).get("__metadata__")
    except WireError:
        return None
    if not isinstance(metadata, dict) or metadata.get("kind") != REJECTION:
        return None
    return Rejection(
        short(metadata.get("text", ""), MAX_REJECTION_CHARACTERS), metadata.get("quota") == json.dumps(True)
    )


def _checked_shares(text: str | None) -> dict[str, float]:
    """The shares of the tasks out of the metadata."""
    shares = read_json(text, "the shares of the tasks")
    if not isinstance(shares, dict) or not all(isinstance(share, float) for share in shares.values()):
        raise WireError("the shares of the tasks must be numbers by text")
    if not all(0 <= share <= 1 for share in shares.values()):
        raise WireError("a task's share must be 0 to 1")
    return shares


def encode_interaction(values: Mapping[str, Scalar]) -> bytes:
    """Encodes one line of an actor's statistics.

    Raises:
        WireError: A value is not a finite number, a text or a truth value.
    """
    _check_interaction(values)
    return json.dumps(dict(values)).encode()


def decode_interaction(data: bytes) -> dict[str, Scalar]:
    """Decodes one line of an actor's statistics.

    Raises:
        WireError: It is too long, not JSON, or has anything but finite numbers, texts and truth values.
    """
    if len(data) > MAX_INTERACTION_BYTES:
        raise WireError(f"an interaction of {len(data)} bytes, at most {MAX_INTERACTION_BYTES} are accepted")
    values = read_json(data, "the interaction")
    if not isinstance(values, dict):
        raise WireError("an interaction must be a JSON object")
    _check_interaction(values)
    return values


def _check_interaction(values: Mapping[str, object]) -> None:
    """Keys are texts, values are scalars, numbers are finite."""
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise WireError(
                f"interaction {short(key)}: {type(value).__name__} is not a number, text or truth value"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"interaction {short(key)}: {value} is not finite")
