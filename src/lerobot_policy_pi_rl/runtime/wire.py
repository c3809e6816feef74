"""What crosses between actor and learner, as bytes: the one encoder and the one decoder.

Payloads are safetensors (a JSON header and raw tensors), never pickle. A decoder takes nothing on trust:
whatever is not exactly what the receiver expects raises `WireError`. Values that are not finite are no wire
error; they make well-formed decisions that must not be learned from, and `finite_rows` tells which.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from lerobot.transport import services_pb2
from lerobot.utils.transition import Transition
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ..algorithm.decisions import DecisionBatch
from ..algorithm.demonstrations import DemonstrationBatch

PROTOCOL = 2
"""Version of everything in this file and of the calls that carry it; actor and learner must agree."""

Scalar = bool | int | float | str

MAX_HEADER_BYTES = 16 * 2**20
MAX_DECISIONS_HEADER_BYTES = 2**20
MAX_INTERACTION_BYTES = 64 * 2**10
MAX_TASK_CHARACTERS = 4096
MAX_SESSION_CHARACTERS = 64
MAX_DIFFERENCE_LINES = 20
MAX_JSON_DEPTH = 16
"""Levels of lists and objects inside each other; deeper ones could exhaust the stack of whoever walks them."""
CHUNK_OVERHEAD = 1024
"""Bytes that a chunk counts at least: those without data take memory, too."""
# Most steps of a person in one message.
MAX_DEMONSTRATION_ROWS = 1000

# Kind of a message.
DEMONSTRATIONS = "demonstrations"

TransferState = services_pb2.TransferState


class WireError(ValueError):
    """A message is not what it should be; the text is one line."""


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
    """

    observation: dict[str, TensorField]
    chain: tuple[int, int, int]
    action: tuple[int, int]
    denoising_steps: int
    max_rows: int

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
        """Most bytes of one message: every decision, each with a next observation of its own, or a person's steps."""
        layouts = (
            self.layout(self.max_rows, self.max_rows),
            self.demonstration_layout(MAX_DEMONSTRATION_ROWS),
        )
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
    return _pack("decisions", asdict(header), _flatten(as_transition(batch)), metadata)


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
    parts = _unpack("decisions", data, MAX_DECISIONS_HEADER_BYTES, spec.layout(0, 0).keys())
    header = _record(RolloutHeader, parts.header)
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
    tasks = _json(text, "the task list")
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


def kind_of(data: bytes) -> str:
    """What a message on the transitions stream says it is.

    Raises:
        WireError: It says nothing.
    """
    metadata = _read_header(data, MAX_DECISIONS_HEADER_BYTES).get("__metadata__")
    return str(metadata.get("kind", "")) if isinstance(metadata, dict) else ""


def encode_demonstrations(batch: DemonstrationBatch) -> bytes:
    """Encodes at most `MAX_DEMONSTRATION_ROWS` steps that a person took."""
    tensors = {
        **{f"state.{key}": value for key, value in batch.observation.items()},
        "action": batch.action,
        "complementary_info.last": batch.last,
        "complementary_info.task_index": _task_index(batch),
    }
    return _pack(DEMONSTRATIONS, {}, tensors, {"tasks": json.dumps(task_vocabulary(batch))})


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
    parts = _unpack(DEMONSTRATIONS, data, MAX_DECISIONS_HEADER_BYTES, names)
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
    """Encodes weights for the parameters stream, each tensor in its own dtype; see `Weights`."""
    return _pack("weights", asdict(header), tensors, {"task_shares": json.dumps(dict(task_shares or {}))})


def decode_weights(data: bytes) -> Weights:
    """Decodes a message of weights.

    Raises:
        WireError: The message is not a well-formed message of weights.
    """
    parts = _unpack("weights", data, MAX_HEADER_BYTES)
    shares = _checked_shares(parts.metadata.get("task_shares"))
    return Weights(_record(WeightsHeader, parts.header), parts.tensors, shares)


def _checked_shares(text: str | None) -> dict[str, float]:
    """The shares of the tasks out of the metadata."""
    shares = _json(text, "the shares of the tasks")
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
    values = _json(data, "the interaction")
    if not isinstance(values, dict):
        raise WireError("an interaction must be a JSON object")
    _check_interaction(values)
    return values


def _check_interaction(values: Mapping[str, object]) -> None:
    """Keys are texts, values are scalars, numbers are finite."""
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise WireError(
                f"interaction {_short(key)}: {type(value).__name__} is not a number, text or truth value"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise WireError(f"interaction {_short(key)}: {value} is not finite")


# The handshake


@dataclass(frozen=True)
class Handshake:
    """Who is calling; travels as metadata of each call.

    Attributes:
        actor: Number of the actor, unique among those that are connected.
        session: A random text per actor process: it tells an actor that comes back from a second one with the
            same number.
        settings: What both sides must agree on, by dotted name; sent with `Ready` only.
    """

    actor: int
    session: str
    settings: dict[str, Any] | None = None

    def to_metadata(self) -> list[Any]:
        """The pairs for gRPC's `metadata` argument."""
        pairs: list[Any] = [
            ("pi-rl-protocol", str(PROTOCOL)),
            ("pi-rl-actor", str(self.actor)),
            ("pi-rl-session", self.session),
        ]
        if self.settings is not None:
            text = json.dumps(flat_settings(self.settings), sort_keys=True, separators=(",", ":"))
            pairs.append(("pi-rl-settings-bin", text.encode()))
        return pairs

    @classmethod
    def from_metadata(cls, metadata: Iterable[Any]) -> "Handshake":
        """Reads the metadata of a call.

        Raises:
            WireError: It is not from an actor of this package and protocol version.
        """
        values = {pair[0]: pair[1] for pair in metadata}
        protocol = values.get("pi-rl-protocol")
        if protocol is None:
            raise WireError("the caller is not a PI-RL actor; start one with lerobot-pi-rl-actor")
        if protocol != str(PROTOCOL):
            raise WireError(
                f"protocol: learner {PROTOCOL}, actor {_short(protocol)} (install the same version on both)"
            )
        actor, session = str(values.get("pi-rl-actor")), str(values.get("pi-rl-session"))
        if not (actor.isascii() and actor.isdecimal() and len(actor) <= 9):
            raise WireError(f"actor number {_short(actor)} is not a number from 0 to 999999999")
        if not (session.isascii() and session.isprintable() and len(session) <= MAX_SESSION_CHARACTERS):
            raise WireError(f"the session must be at most {MAX_SESSION_CHARACTERS} printable characters")
        settings = values.get("pi-rl-settings-bin")
        return cls(int(actor), session, None if settings is None else _checked_settings(settings))


def _checked_settings(data: bytes) -> dict[str, Any]:
    """Settings from the bytes of a handshake."""
    settings = _json(data, "the settings")
    if not isinstance(settings, dict):
        raise WireError("the settings must be a JSON object")
    return settings


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name, in the form that JSON gives back (a tuple is a list)."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": leaf for inner, leaf in flat_settings(value).items()})
        else:
            flat[str(name)] = json.loads(json.dumps(value, default=str))
    return flat


_ABSENT = "has no such setting"


def settings_differences(learner: Mapping[str, Any], actor: Mapping[str, Any]) -> list[str]:
    """One line per setting that differs, such as `policy.num_inference_steps: learner 4, actor 5`."""
    ours, theirs = flat_settings(learner), flat_settings(actor)
    lines = [
        f"{_short(name)}: learner {_short(our)}, actor {_short(their)}"
        for name in sorted(ours.keys() | theirs.keys())
        if (our := ours.get(name, _ABSENT)) != (their := theirs.get(name, _ABSENT))
    ]
    rest = len(lines) - MAX_DIFFERENCE_LINES
    return lines if rest <= 0 else [*lines[:MAX_DIFFERENCE_LINES], f"... and {rest} more"]


# Chunks of a stream


def whole_messages(chunks: Iterable[Any], max_bytes: int, reject: Callable[[str], None]) -> Iterator[Any]:
    """Lets only the chunks of well-formed messages through.

    LeRobot's `receive_bytes_in_chunks`, which joins them afterwards, takes any order, has no size limit,
    and raises on an unknown state. A message with a fault is dropped up to its end; the stream lives on.

    Args:
        chunks: Protobuf messages with `transfer_state` and `data`.
        max_bytes: Most bytes of one message.
        reject: Called for each dropped message, with the reason in a few words.

    Yields:
        The chunks of each message, once its last one has come.
    """
    held: list[Any] = []
    size, skipping = 0, False
    for chunk in chunks:
        state = chunk.transfer_state
        if state == TransferState.TRANSFER_BEGIN:
            if held:
                reject("unfinished")
            held, size, skipping = [], 0, False
        size += max(len(chunk.data), CHUNK_OVERHEAD)
        fault = None if skipping else _fault(state, bool(held))
        if size > max_bytes + CHUNK_OVERHEAD:
            # What is dropped is counted, too: a message that never ends is rejected again and again.
            fault = "too large"
        if fault:
            reject(fault)
            # An unknown chunk between two messages is dropped alone; its successor begins a message.
            skipping = skipping or bool(held) or fault != "unknown state"
            held, size = [], 0
        elif not skipping:
            held.append(chunk)
        if state == TransferState.TRANSFER_END:
            yield from held
            held, size, skipping = [], 0, False
    if held:
        reject("unfinished")


def _fault(state: int, begun: bool) -> str | None:
    """What is wrong with a chunk in its place, or None."""
    if state not in (TransferState.TRANSFER_BEGIN, TransferState.TRANSFER_MIDDLE, TransferState.TRANSFER_END):
        return "unknown state"
    return "no beginning" if state == TransferState.TRANSFER_MIDDLE and not begun else None


# Safetensors with a header


@dataclass(frozen=True)
class _Parts:
    """A payload taken apart, nothing in it checked yet but its kind."""

    header: object
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def _pack(
    kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> bytes:
    """Writes tensors, a kind and a JSON header as safetensors."""
    text = {**metadata, "kind": kind, "header": json.dumps(dict(header))}
    return save_safetensors(_independent(tensors), metadata=text)


def _unpack(kind: str, data: bytes, max_header_bytes: int, names: Set[str] | None = None) -> _Parts:
    """Reads what `_pack` wrote.

    Args:
        kind: Kind of message that is expected.
        data: The message.
        max_header_bytes: Most bytes of its header.
        names: The tensors that must be in it, looked at before one is made; None takes any.

    Raises:
        WireError: It is no safetensors payload of this kind.
    """
    header = _read_header(data, max_header_bytes)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WireError("the safetensors header has no metadata")
    if metadata.get("kind") != kind:
        raise WireError(f"a message of {_short(metadata.get('kind'))} where {kind} were expected")
    if names is not None and header.keys() != names:
        missing, extra = sorted(names - header.keys()), sorted(header.keys() - names)
        raise WireError(f"wrong set of tensors: missing {_short(missing)}, not expected {_short(extra[:3])}")
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
        # KeyError: a dtype that torch lacks; the others: a shape or buffer that torch refuses.
        raise WireError(f"not a safetensors payload: {_short(error)}") from error
    return _Parts(_json(metadata.get("header"), "the header"), metadata, tensors)


def _read_header(data: bytes, max_bytes: int) -> dict[str, Any]:
    """The header of a safetensors payload, whose metadata safetensors' own `load` does not return.

    The format is eight bytes of length, little-endian, then that many bytes of JSON.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, max_bytes):
        raise WireError(f"cut short or not safetensors: {len(data)} bytes")
    header = _json(data[8 : 8 + length], "the safetensors header")
    if not isinstance(header, dict):
        raise WireError("the safetensors header is no JSON object")
    return header


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on CPU, contiguous, none sharing memory with another, as safetensors demands."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _record[T](kind: type[T], values: object) -> T:
    """A header record from parsed JSON, with exactly its fields in exactly their types."""
    expected = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or values.keys() != expected.keys():
        raise WireError(f"the header must have exactly the fields {', '.join(expected)}")
    for name, value in values.items():
        if type(value) is not expected[name]:
            raise WireError(f"header field {name}: got {type(value).__name__} {_short(value)}")
        if not 0 <= value < 2**63:
            raise WireError(f"header field {name}: {_short(value)} is out of range")
    return kind(**values)


def _json(text: bytes | str | None, what: str) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no half characters, not deep."""
    if text is None:
        raise WireError(f"{what} is missing")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_constant=_refuse_constant)
        _check_json(value)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {_short(error)}") from error
    return value


def _check_json(value: object) -> None:
    """Every text can be written, and nothing is nested deeper than `MAX_JSON_DEPTH`.

    Raises:
        ValueError: If not.
    """
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        texts = (item for item in level if isinstance(item, str))
        # JSON can escape one half of a surrogate pair, which is no character and cannot be encoded.
        "".join(texts).encode()
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def _inside(value: object) -> Iterable[object]:
    """What a JSON value holds, names included."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    """`json` would take NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is not allowed")


def _short(value: object, limit: int = 120) -> str:
    """A value for an error text: one line, printable, never long."""
    text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."
