"""What an actor knows of its learner: how it is reached, left and found again. `link` holds one connection.

gRPC's core starts with the first `connect`, not with the import: whatever the actor forks, it forks before.
"""

import json
import logging
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import receive_bytes_in_chunks

from .access import TOKEN_VARIABLE, Access, find_tls_fault
from .chunks import whole_messages
from .handshake import STATUS_METADATA, Handshake
from .link import ActorRefused, Link, Stopping, channel_options, check_threads, reason_of
from .packing import WireError
from .wire import Scalar, Weights, decode_weights, encode_interaction

logger = logging.getLogger(__name__)

# What a client counts since it was made.
COUNTS = ("failed_attempts", "rejected_pushes", "unsent_messages")
MAX_STATUS_BYTES = 2**20
RETRY_SECONDS = 0.5
MESSAGE_SECONDS = 5.0
"""How often the log says that the learner is still waited for."""


class LearnerUnreachable(ConnectionError):
    """Nobody answered within the limit."""


class LearnerLost(ConnectionError):
    """The learner was there and is gone; `reconnect` may find it again."""


class ConfigMismatch(ActorRefused):
    """Actor and learner were started with different settings; one line per difference."""


class LinkState(StrEnum):
    """Where a client stands with its learner."""

    NEW = "new"
    CONNECTED = "connected"
    LOST = "lost"
    CLOSED = "closed"


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

        Attributes:
            counts: Attempts to connect that failed, pushes that were not taken, and messages that were queued and
                dropped with their connection.
        """
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self._max_weights_bytes = max_weights_bytes
        self._host, self._port, self._access = host, port, access or Access()
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._settings = dict(settings)
        self._handshake = Handshake(actor, uuid.uuid4().hex)
        self._outbox_capacity = outbox_capacity
        self._command = command
        self._link: Link | None = None
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
            self.counts["failed_attempts"] += 1
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
            ActorRefused: The learner cannot use what this actor sends, or the weights never arrive as they were sent.
        """
        link = self._connected_link()
        deadline = None if timeout is None else time.monotonic() + timeout
        arrived = False
        while True:
            held = link.weights
            fresh = held is not None and (held.header.version > newer_than or (arrived and held.header.final))
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            payload = link.take(0.0 if fresh else rest)
            if link.hopeless is not None:
                raise ActorRefused(f"actor {self._handshake.actor} ends: {link.hopeless}")
            if payload is not None:
                try:
                    link.weights, arrived = decode_weights(payload), True
                    link.note_whole()
                except WireError as error:
                    link.ask_again(str(error))
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

    def close(self, flush_s: float = 3.0) -> bool:
        """Sends what is queued, within `flush_s` seconds, and leaves; also when the learner is gone.

        Returns:
            Whether the learner took all decisions, and what people did, that were sent on this connection.
        """
        self._closing.set()
        link, self._link = self._link, None
        return link is not None and link.close(0.0 if link.broken else flush_s)

    def _attempt(self, stopping: Stopping) -> str | None:
        """One try; returns why it failed when trying again may help, or None when connected."""
        check_threads()
        link = Link(
            self._address,
            self._handshake,
            self._access,
            self._outbox_capacity,
            self._max_weights_bytes,
            self.counts,
        )
        try:
            link.call_ready(self._settings, stopping)
            link.open(stopping)
        except grpc.RpcError as error:
            link.close(flush_s=0.0)
            self._raise_refusal(error, stopping)
            return reason_of(error)
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

    def _connected_link(self) -> Link:
        if self._link is None:
            raise LearnerLost(f"not connected to {self._address}; call connect first")
        return self._link

    def _lost_text(self, link: Link) -> str:
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
    with access.open_channel(address, channel_options()) as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        call = stub.StreamParameters(
            services_pb2.Empty(), metadata=[STATUS_METADATA, *access.metadata()], timeout=timeout_s
        )
        try:
            whole = whole_messages(call, MAX_STATUS_BYTES, lambda _: None)
            receive_bytes_in_chunks(whole, SimpleNamespace(put=parts.put), threading.Event())
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise LearnerUnreachable(f"no learner answers at {address}: {reason_of(error)}") from None
            raise ActorRefused(f"the learner at {address} refuses: {reason_of(error)}") from None
    try:
        answer = json.loads(parts.get_nowait())
    except (queue.Empty, ValueError):
        raise ActorRefused(f"{address} answers, but it is not a learner of this package") from None
    if not isinstance(answer, dict) or "progress" not in answer:
        raise ActorRefused(f"the learner at {address} is still starting; ask again in a moment")
    return answer
