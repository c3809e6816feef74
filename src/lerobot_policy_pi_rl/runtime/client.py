"""The actor's side of the wire: one channel to the learner, four background streams, bounded waits.

gRPC's core starts with the first `connect`, not with the import: whatever the actor forks, it forks before.
"""

import contextlib
import json
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import grpc_channel_options, receive_bytes_in_chunks, send_bytes_in_chunks

from .access import TOKEN_VARIABLE, Access, find_tls_fault
from .chunks import whole_messages
from .handshake import (
    HEARTBEAT_METADATA,
    HEARTBEAT_SECONDS,
    NEXT_VERSION,
    PROTOCOL,
    STATUS_METADATA,
    Handshake,
)
from .wire import Scalar, Weights, decode_weights, encode_interaction

logger = logging.getLogger(__name__)

MAX_STATUS_BYTES = 2**20
MAX_VERSION_DIGITS = 18
CALL_SECONDS = 5.0
"""How long one attempt to reach the learner may take."""
RETRY_SECONDS = 0.5
LAST_WEIGHTS_SECONDS = 2.0
STOP_POLL_SECONDS = 0.5
"""How often a wait looks whether it should end."""
MESSAGE_SECONDS = 5.0
"""How often the log says that the learner is still waited for."""


# Whether whoever waits has been asked to leave.
Stopping = Callable[[], bool]


class LearnerUnreachable(ConnectionError):
    """Nobody answered within the limit."""


class LearnerLost(ConnectionError):
    """The learner was there and is gone; `reconnect` may find it again."""


class ActorRefused(ConnectionError):
    """The learner does not want this actor, and asking again will not help."""


class ConfigMismatch(ActorRefused):
    """Actor and learner were started with different settings; one line per difference."""


class LinkState(StrEnum):
    """Where a client stands with its learner."""

    NEW = "new"
    CONNECTED = "connected"
    LOST = "lost"
    CLOSED = "closed"


class Outbox:
    """A bounded queue of payloads that one stream sends."""

    def __init__(self, capacity: int) -> None:
        """Makes an empty outbox.

        Args:
            capacity: Most payloads that wait at once.
        """
        self._capacity = capacity
        self._items: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._flushing = False

    @property
    def finished(self) -> bool:
        """Whether it takes nothing more."""
        return self._ended or self._flushing

    def put(self, payload: bytes, stop: threading.Event | None = None) -> bool:
        """Adds a payload, waiting for room; false when the stream ended, or `stop` is set while there is none."""
        with self._changed:
            while not self._changed.wait_for(self._may_put, STOP_POLL_SECONDS if stop else None):
                if stop is not None and stop.is_set():
                    return False
            if self.finished:
                return False
            self._items.append(payload)
            self._changed.notify_all()
            return True

    def _may_put(self) -> bool:
        """Whether a wait for room is over. Needs the lock."""
        return self.finished or len(self._items) < self._capacity

    def flush(self) -> None:
        """Takes no more; the stream ends by itself once all is sent."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()

    def end(self) -> None:
        """Drops what is left and frees everybody who waits."""
        with self._changed:
            self._ended = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """Yields payloads until `end`, or until all is sent after `flush`."""
        while (payload := self._next()) is not None:
            yield payload

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self.finished or bool(self._items))
            if not self._items:
                return None
            payload = self._items.popleft()
            self._changed.notify_all()
            return payload


class _Link:
    """One connection: a channel, its four streams and their threads. Used once; a reconnect makes another.

    What `__init__` sets below `_changed` is guarded by it.
    """

    def __init__(
        self,
        address: str,
        handshake: Handshake,
        access: Access,
        outbox_capacity: int,
        max_weights_bytes: int,
    ) -> None:
        self._max_weights_bytes = max_weights_bytes
        self.weights: Weights | None = None
        self.next_version = 0
        self._changed = threading.Condition()
        self._payload: bytes | None = None
        self._receiving = True
        self.broken: str | None = None
        self.decisions = Outbox(outbox_capacity)
        self.interactions = Outbox(outbox_capacity)
        self._handshake = handshake
        self._access = access
        self._channel = access.open_channel(address, _channel_options())
        self._stub = services_pb2_grpc.LearnerServiceStub(self._channel)
        self._parameters: Any = None
        self._senders: list[threading.Thread] = []
        self._over = threading.Event()
        self._heartbeat = threading.Thread(target=self._show_life, name="pi-rl-heartbeat", daemon=True)
        self._receiver = threading.Thread(target=self._receive, name="pi-rl-parameters", daemon=True)

    def call_ready(self, settings: Mapping[str, Any], stopping: Stopping) -> None:
        """Introduces the actor with its settings.

        Args:
            settings: What must agree with the learner's.
            stopping: Whether nobody waits for the answer any longer.

        Raises:
            grpc.RpcError: The learner is not there, or refuses; or nobody waits.
            ActorRefused: Whoever answers is not a learner of this package.
        """
        hello = Handshake(self._handshake.actor, self._handshake.session, dict(settings))
        call = self._stub.Ready.future(
            services_pb2.Empty(), timeout=CALL_SECONDS, metadata=self._metadata(hello)
        )
        with _patience(call, stopping):
            # Waits for the end, whichever it is.
            answered = call.code() == grpc.StatusCode.OK
        if not answered:
            raise call
        # LeRobot's own learner admits everybody, and would send pickled weights.
        if {pair[0]: pair[1] for pair in call.initial_metadata()}.get("pi-rl-protocol") != str(PROTOCOL):
            raise ActorRefused("it answers, but it is not a PI-RL learner of this version")

    def open(self, stopping: Stopping) -> None:
        """Opens the streams, the parameters first: it is what makes the actor connected.

        Args:
            stopping: As in `call_ready`.

        Raises:
            grpc.RpcError: The learner refuses, or is gone again; or nobody waits.
        """
        metadata = self._metadata(self._handshake)
        self._parameters = self._stub.StreamParameters(services_pb2.Empty(), metadata=metadata)
        # The stream itself has no time limit, but the learner's first word has: the network may have stalled.
        with _patience(self._parameters, stopping):
            # The learner sends metadata of its own once it has listed this actor; a refusal comes without.
            if not (told := self._parameters.initial_metadata()):
                next(self._parameters)
        self.next_version = _version({pair[0]: pair[1] for pair in told}.get(NEXT_VERSION))
        self._receiver.start()
        self._heartbeat.start()
        self._start_sender("decisions", self._stub.SendTransitions, services_pb2.Transition, self.decisions)
        self._start_sender(
            "interactions", self._stub.SendInteractions, services_pb2.InteractionMessage, self.interactions
        )

    def _metadata(self, hello: Handshake) -> list[Any]:
        return [*hello.to_metadata(), *self._access.metadata()]

    def take(self, timeout: float | None) -> bytes | None:
        """The newest payload that was not taken yet; None when there is none in time, or the stream ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._payload is not None or not self._receiving, timeout)
            payload, self._payload = self._payload, None
            return payload

    def close(self, flush_s: float) -> None:
        """Sends what waits, within `flush_s` seconds, and ends channel and threads."""
        deadline = time.monotonic() + flush_s
        self.decisions.flush()
        self.interactions.flush()
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        self.fail("closed")
        if self._parameters is not None:
            self._parameters.cancel()
        self._channel.close()
        for thread in (*self._senders, self._heartbeat, self._receiver):
            if thread.ident is not None:
                thread.join(1.0)

    def fail(self, reason: str) -> None:
        """Marks the connection broken; the first reason stays."""
        with self._changed:
            self.broken = self.broken or reason
        self._over.set()
        self.decisions.end()
        self.interactions.end()

    def _start_sender(self, name: str, call: Callable[..., Any], message: Any, outbox: Outbox) -> None:
        arguments = (call, message, outbox)
        sender = threading.Thread(target=self._send, args=arguments, name=f"pi-rl-{name}", daemon=True)
        self._senders.append(sender)
        sender.start()

    def _show_life(self) -> None:
        """Sends signs of life until the connection ends."""

        def beats() -> Iterator[Any]:
            while not self._over.wait(HEARTBEAT_SECONDS):
                yield services_pb2.InteractionMessage()

        self._call(self._stub.SendInteractions, beats(), self._over.is_set, [HEARTBEAT_METADATA])

    def _receive(self) -> None:
        """Keeps the newest payload of the parameters stream."""
        chunks = whole_messages(self._parameters, self._max_weights_bytes, self._reject)
        reason = "the learner ended the connection"
        try:
            receive_bytes_in_chunks(chunks, SimpleNamespace(put=self._keep), threading.Event())
        except grpc.RpcError as error:
            reason = _reason(error)
        self.fail(reason)
        with self._changed:
            self._receiving = False
            self._changed.notify_all()

    def _keep(self, payload: bytes) -> None:
        with self._changed:
            self._payload = payload
            self._changed.notify_all()

    def _reject(self, reason: str) -> None:
        logger.warning("Rejected a message of the learner: %s", reason)

    def _send(self, call: Callable[..., Any], message: Any, outbox: Outbox) -> None:
        """Sends an outbox until it ends."""
        chunks = (chunk for payload in outbox for chunk in send_bytes_in_chunks(payload, message))
        self._call(call, chunks, lambda: outbox.finished)

    def _call(
        self,
        call: Callable[..., Any],
        chunks: Iterator[Any],
        finished: Callable[[], bool],
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Sends chunks until they are over; if the stream ends before that, the connection is broken."""
        reason = "the learner ended the connection"
        try:
            call(chunks, metadata=[*self._metadata(self._handshake), *metadata])
        except grpc.RpcError as error:
            reason = _reason(error)
        except ValueError as error:
            # The channel was closed before this thread came to its call.
            reason = str(error)
        if not finished():
            self.fail(reason)
            # The last weights may still be on their way; after them, without this stream, the others end too.
            self._receiver.join(LAST_WEIGHTS_SECONDS)
            self._parameters.cancel()


class LearnerClient:
    """What an actor knows of its learner. Its methods belong to one thread, `close` to any."""

    def __init__(
        self,
        host: str,
        port: int,
        actor: int,
        settings: Mapping[str, Any],
        outbox_capacity: int = 8,
        command: str = "lerobot-pi-rl-learner --config_path=<the actor's config>",
        access: Access | None = None,
        max_weights_bytes: int = 16 * 2**30,
    ) -> None:
        """Prepares a client; nothing of gRPC starts before `connect`.

        Args:
            host: Where the learner listens.
            port: Its port.
            actor: This actor's number.
            settings: What must agree with the learner's, nested or by dotted name.
            outbox_capacity: Most payloads that wait in each direction before `send_decisions` blocks.
            command: How a learner is started, for the text of `LearnerUnreachable`.
            access: Token and TLS; None has neither.
            max_weights_bytes: Most bytes of a push; a larger one is not taken.
        """
        self._max_weights_bytes = max_weights_bytes
        self._host, self._port, self._access = host, port, access or Access()
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._settings = dict(settings)
        self._handshake = Handshake(actor, uuid.uuid4().hex)
        self._outbox_capacity = outbox_capacity
        self._command = command
        self._link: _Link | None = None
        self._fault: str | None = None
        self._closing = threading.Event()

    @property
    def state(self) -> LinkState:
        """Where this client stands with its learner."""
        if self._closing.is_set():
            return LinkState.CLOSED
        if self._link is None:
            return LinkState.NEW
        return LinkState.LOST if self._link.broken else LinkState.CONNECTED

    @property
    def next_version(self) -> int:
        """The version whose iteration takes the first quota that is sent on this connection; 0 without one."""
        return self._link.next_version if self._link is not None else 0

    def connect(self, timeout_s: float = 120.0, stop: threading.Event | None = None) -> None:
        """Waits for the learner and opens the streams.

        Args:
            timeout_s: Longest wait.
            stop: Set from outside to end the wait; there is then no connection, and no error.

        Raises:
            LearnerUnreachable: Nobody answered in time.
            ConfigMismatch: The learner has other settings.
            ActorRefused: It does not want this actor for another reason.
        """
        began = time.monotonic()
        told = began

        def stopping() -> bool:
            return self._closing.is_set() or (stop is not None and stop.is_set())

        while not stopping():
            error = self._attempt(stopping)
            now = time.monotonic()
            if error is None:
                return
            if now - began >= timeout_s:
                raise LearnerUnreachable(
                    f"no learner answers at {self._address} after {now - began:.0f} s; start it with "
                    f"{self._command}"
                )
            if now - told >= MESSAGE_SECONDS or told == began:
                told = now
                logger.info(
                    "Waiting for the learner at %s (%.0f of %.0f s)", self._address, now - began, timeout_s
                )
            self._closing.wait(min(RETRY_SECONDS, began + timeout_s - now))

    def reconnect(self, timeout_s: float = 120.0, stop: threading.Event | None = None) -> None:
        """Drops a broken connection, with what was queued on it, and connects again.

        The learner may be a resumed one whose versions are lower: ask `wait_weights` for any version next.

        Raises:
            ConnectionError: As `connect`.
        """
        if self._link is not None:
            self._link.close(flush_s=0.0)
            self._link = None
        self.connect(timeout_s, stop)

    def wait_weights(self, newer_than: int, timeout: float | None = None) -> Weights | None:
        """Waits for weights; only ever the newest that arrived.

        Args:
            newer_than: Version that the actor already has; -1 for any. Final weights count as newer when they
                arrive: a learner that is stopped repeats its version with them.
            timeout: Seconds to wait; None waits until there are some.

        Returns:
            The newest weights, or None when none newer came in time.

        Raises:
            LearnerLost: The connection broke, and nothing newer had arrived before.
            WireError: The learner sent something that is no message of weights.
        """
        link = self._connected_link()
        deadline = None if timeout is None else time.monotonic() + timeout
        arrived = False
        while True:
            held = link.weights
            fresh = held is not None and (held.header.version > newer_than or (arrived and held.header.final))
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            payload = link.take(0.0 if fresh else rest)
            if payload is not None:
                link.weights, arrived = decode_weights(payload), True
            elif fresh:
                return held
            elif link.broken:
                raise LearnerLost(self._lost_text(link))
            else:
                return None

    def send_decisions(self, payload: bytes, stop: threading.Event | None = None) -> None:
        """Queues encoded decisions; blocks while the learner is behind.

        Args:
            payload: Of `wire.encode_decisions`, or of `wire.encode_demonstrations`.
            stop: Set from outside to end the wait for room.

        Raises:
            LearnerLost: The connection is broken, or `stop` was set before there was room.
        """
        link = self._connected_link()
        if not link.decisions.put(payload, stop):
            raise LearnerLost(self._lost_text(link))

    def send_interaction(self, values: Mapping[str, Scalar], stop: threading.Event | None = None) -> None:
        """Queues one line of statistics.

        Args:
            values: The line.
            stop: As in `send_decisions`.

        Raises:
            LearnerLost: As `send_decisions`.
            WireError: A value is not a finite number, a text or a truth value.
        """
        link = self._connected_link()
        if not link.interactions.put(encode_interaction(values), stop):
            raise LearnerLost(self._lost_text(link))

    def close(self, flush_s: float = 3.0) -> None:
        """Sends what is queued, within `flush_s` seconds, and leaves; also when the learner is gone."""
        self._closing.set()
        link, self._link = self._link, None
        if link is not None:
            link.close(0.0 if link.broken else flush_s)

    def _attempt(self, stopping: Stopping) -> str | None:
        """One try; returns why it failed when trying again may help, or None when connected."""
        link = _Link(
            self._address, self._handshake, self._access, self._outbox_capacity, self._max_weights_bytes
        )
        try:
            link.call_ready(self._settings, stopping)
            link.open(stopping)
        except grpc.RpcError as error:
            link.close(flush_s=0.0)
            self._raise_refusal(error, stopping)
            return _reason(error)
        except ActorRefused as error:
            link.close(flush_s=0.0)
            raise ActorRefused(f"{self._address}: {error}") from None
        self._link = link
        return None

    def _raise_refusal(self, error: grpc.RpcError, stopping: Stopping) -> None:
        """Raises for answers that another try would not change."""
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            raise ConfigMismatch(f"the learner at {self._address} has other settings:\n{details}") from None
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise ActorRefused(f"{self._address} answers, but it is not a learner") from None
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise ActorRefused(self._token_text()) from None
        if code in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.PERMISSION_DENIED):
            raise ActorRefused(f"the learner at {self._address} refuses: {details}") from None
        if stopping():
            # The look takes seconds in which nobody is interested.
            return
        before, self._fault = self._fault, find_tls_fault(self._host, self._port, self._access)
        # Twice, because a learner that is just ending looks the same.
        if self._fault is not None and self._fault == before:
            raise ActorRefused(f"no connection to the learner at {self._address}: {self._fault}") from None

    def _token_text(self) -> str:
        fix = f"put the learner's into the environment variable {TOKEN_VARIABLE} or algorithm.security.token_file"
        what = (
            "wants an access token, and this actor has none"
            if self._access.token is None
            else "has another access token"
        )
        return f"the learner at {self._address} {what}; {fix}"

    def _connected_link(self) -> _Link:
        if self._link is None:
            raise LearnerLost(f"not connected to {self._address}; call connect first")
        return self._link

    def _lost_text(self, link: _Link) -> str:
        return f"lost the learner at {self._address}: {link.broken or 'it is behind, and nobody waits any longer'}"


def ask_status(host: str, port: int, access: Access, timeout_s: float = 10.0) -> dict[str, Any]:
    """Asks a learner how it stands, without being one of its actors.

    Args:
        host: Where the learner listens.
        port: Its port.
        access: Token and TLS.
        timeout_s: Longest wait.

    Returns:
        `PIRLLearnerService.status`.

    Raises:
        LearnerUnreachable: Nobody answered.
        ActorRefused: Who answered refuses, or is no learner of this package.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    parts: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with access.open_channel(address, _channel_options()) as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        call = stub.StreamParameters(
            services_pb2.Empty(), metadata=[STATUS_METADATA, *access.metadata()], timeout=timeout_s
        )
        try:
            whole = whole_messages(call, MAX_STATUS_BYTES, lambda _: None)
            receive_bytes_in_chunks(whole, SimpleNamespace(put=parts.put), threading.Event())
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise LearnerUnreachable(f"no learner answers at {address}: {_reason(error)}") from None
            raise ActorRefused(f"the learner at {address} refuses: {_reason(error)}") from None
    try:
        answer = json.loads(parts.get_nowait())
    except (queue.Empty, ValueError):
        raise ActorRefused(f"{address} answers, but it is not a learner of this package") from None
    if not isinstance(answer, dict) or "progress" not in answer:
        raise ActorRefused(f"the learner at {address} is still starting; ask again in a moment")
    return answer


@contextlib.contextmanager
def _patience(call: Any, stopping: Stopping) -> Iterator[None]:
    """Cancels a call that is not answered within `CALL_SECONDS`, or before its actor is asked to leave."""
    answered = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + CALL_SECONDS
        while not answered.wait(STOP_POLL_SECONDS):
            if stopping() or time.monotonic() >= deadline:
                call.cancel()
                return

    threading.Thread(target=watch, name="pi-rl-patience", daemon=True).start()
    try:
        yield
    finally:
        answered.set()


def _channel_options() -> list[tuple[str, Any]]:
    """LeRobot's options, without gRPC's own retries: a stream that broke must be seen to have broken."""
    return [
        *grpc_channel_options(enable_retries=False),
        ("grpc.max_metadata_size", 2**20),
        # A channel of its own each time: no back-off left over from attempts before the learner was up.
        ("grpc.use_local_subchannel_pool", 1),
        # An http_proxy in the environment would take even loopback connections.
        ("grpc.enable_http_proxy", 0),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # gRPC would stop asking after two questions, which is before a long update has ended.
        ("grpc.http2.max_pings_without_data", 0),
        # For its other pings, behind which the one that asks has to wait; a minute by default.
        ("grpc.http2.ping_timeout_ms", 20_000),
    ]


def _reason(error: grpc.RpcError) -> str:
    """What gRPC says, in one line."""
    code = error.code().name.lower().replace("_", " ")
    details = " ".join((error.details() or "").split())
    return f"{code}: {details[:200]}" if details else code


def _version(told: str | bytes | None) -> int:
    """A version from metadata; 0 where none was told: the first of all."""
    text = str(told)
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_VERSION_DIGITS else 0
