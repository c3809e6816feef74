"""One connection of an actor to its learner: a channel, its four streams and their threads."""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import grpc_channel_options, receive_bytes_in_chunks, send_bytes_in_chunks

from .access import Access
from .chunks import whole_messages
from .handshake import (
    HEARTBEAT_METADATA,
    HEARTBEAT_SECONDS,
    NEXT_VERSION,
    PROTOCOL,
    WEIGHTS_AGAIN,
    Handshake,
)
from .outbox import STOP_POLL_SECONDS, Outbox
from .wire import Weights, decode_rejection

logger = logging.getLogger(__name__)

CALL_SECONDS = 5.0
"""How long one attempt to reach the learner may take."""
LAST_WEIGHTS_SECONDS = 2.0
MAX_VERSION_DIGITS = 18
MAX_DAMAGED = 5
"""With so many pushes in a row that did not arrive whole, an actor ends: it is not the network."""
THREADS = 10
"""A connection's threads: our own five, and those that gRPC makes for its calls."""

# Whether whoever waits has been asked to leave.
Stopping = Callable[[], bool]


class ActorRefused(ConnectionError):
    """The learner does not want this actor, or what it sends, and asking again will not help."""


class Link:
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
        counts: Counter[str],
    ) -> None:
        self._max_weights_bytes = max_weights_bytes
        self._counts = counts
        # The learner has taken all decisions, and what people did, that were sent.
        self._taken = False
        self.weights: Weights | None = None
        self.next_version = 0
        self._changed = threading.Condition()
        self._payload: bytes | None = None
        self._receiving = True
        self.broken: str | None = None
        # Why this actor cannot go on, in one line.
        self.hopeless: str | None = None
        # Pushes in a row that did not arrive whole, and whether the next sign of life asks for the weights again.
        self._damaged, self._again = 0, False
        self.decisions = Outbox(outbox_capacity)
        self.interactions = Outbox(outbox_capacity)
        self._handshake = handshake
        self._access = access
        self._channel = access.open_channel(address, channel_options())
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
        self.next_version = version_of({pair[0]: pair[1] for pair in told}.get(NEXT_VERSION))
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
            self._changed.wait_for(
                lambda: self._payload is not None or not self._receiving or self.hopeless is not None, timeout
            )
            payload, self._payload = self._payload, None
            return payload

    def close(self, flush_s: float) -> bool:
        """Sends what waits, within `flush_s` seconds, and ends channel and threads.

        Returns:
            Whether the learner has said that it took all decisions, and what people did, that were sent on this
            connection.
        """
        deadline = time.monotonic() + flush_s
        self.decisions.flush()
        self.interactions.flush()
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        taken = self._taken and self.broken is None
        self.fail("closed")
        if self._parameters is not None:
            self._parameters.cancel()
        self._channel.close()
        for thread in (*self._senders, self._heartbeat, self._receiver):
            if thread.ident is not None:
                thread.join(1.0)
        return taken

    def fail(self, reason: str) -> None:
        """Marks the connection broken; the first reason stays."""
        with self._changed:
            self.broken = self.broken or reason
            self._counts["unsent_messages"] += self.decisions.end() + self.interactions.end()
        self._over.set()

    def _start_sender(self, name: str, call: Callable[..., Any], message: Any, outbox: Outbox) -> None:
        arguments = (call, message, outbox)
        sender = threading.Thread(target=self._send, args=arguments, name=f"pi-rl-{name}", daemon=True)
        self._senders.append(sender)
        sender.start()

    def _show_life(self) -> None:
        """Sends signs of life until the connection ends."""

        def beats() -> Iterator[Any]:
            while not self._over.wait(HEARTBEAT_SECONDS):
                again, self._again = self._again, False
                yield services_pb2.InteractionMessage(data=WEIGHTS_AGAIN if again else b"")

        self._call(self._stub.SendInteractions, beats(), self._over.is_set, [HEARTBEAT_METADATA])

    def _receive(self) -> None:
        """Keeps the newest payload of the parameters stream."""
        chunks = whole_messages(self._parameters, self._max_weights_bytes, self.ask_again)
        reason = "the learner ended the connection"
        try:
            receive_bytes_in_chunks(chunks, SimpleNamespace(put=self._keep), threading.Event())
        except grpc.RpcError as error:
            reason = reason_of(error)
        self.fail(reason)
        with self._changed:
            self._receiving = False
            self._changed.notify_all()

    def _keep(self, payload: bytes) -> None:
        """Keeps a payload, or says what the learner has said of a message of this actor."""
        if (rejection := decode_rejection(payload)) is not None:
            logger.warning("The learner rejected a message of this actor: %s", rejection.text)
            if rejection.quota:
                self._give_up(f"the learner rejected its decisions: {rejection.text}")
            return
        with self._changed:
            self._payload = payload
            self._changed.notify_all()

    def note_whole(self) -> None:
        """Notes that weights have arrived as they were sent."""
        self._damaged = 0

    def ask_again(self, reason: str) -> None:
        """Counts a push that did not arrive whole, and asks for it again; once, of whichever of its chunks it fails."""
        if self._again:
            return
        self._counts["rejected_pushes"] += 1
        self._damaged += 1
        logger.warning("Rejected a message of the learner: %s; asking for it again", reason)
        if self._damaged >= MAX_DAMAGED:
            self._give_up(
                f"{self._damaged} pushes in a row did not arrive as weights of its policy: {reason}"
            )
        self._again = True

    def _give_up(self, reason: str) -> None:
        with self._changed:
            self.hopeless = self.hopeless or reason
            self._changed.notify_all()

    def _send(self, call: Callable[..., Any], message: Any, outbox: Outbox) -> None:
        """Sends an outbox until it ends."""
        chunks = (chunk for payload in outbox for chunk in send_bytes_in_chunks(payload, message))
        taken = self._call(call, chunks, lambda: outbox.finished)
        if outbox is self.decisions:
            self._taken = taken

    def _call(
        self,
        call: Callable[..., Any],
        chunks: Iterator[Any],
        finished: Callable[[], bool],
        metadata: Sequence[tuple[str, str]] = (),
    ) -> bool:
        """Sends chunks until they are over; if the stream ends before that, the connection is broken.

        Returns:
            Whether the learner took all of them.
        """
        reason, taken = "the learner ended the connection", False
        try:
            call(chunks, metadata=[*self._metadata(self._handshake), *metadata])
            taken = finished()
        except grpc.RpcError as error:
            reason = reason_of(error)
        except (ValueError, RuntimeError) as error:
            # The channel was closed before this thread came to its call; or gRPC cannot make the thread that it
            # needs for each stream.
            reason = str(error)
        if not finished():
            self.fail(reason)
            # The last weights may still be on their way; after them, without this stream, the others end too.
            self._receiver.join(LAST_WEIGHTS_SECONDS)
            self._parameters.cancel()
        return taken


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


def check_threads() -> None:
    """Tries whether the threads of a connection can be made: a channel of gRPC that lacks one can not even be closed.

    Raises:
        ActorRefused: They cannot.
    """
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, name="pi-rl-probe", daemon=True) for _ in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        raise ActorRefused(
            f"no connection can be made: {error}; raise this machine's limit of processes (ulimit -u, or the "
            "container's limit of pids)"
        ) from None
    finally:
        over.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def channel_options() -> list[tuple[str, Any]]:
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


def reason_of(error: grpc.RpcError) -> str:
    """What gRPC says, in one line."""
    code = error.code().name.lower().replace("_", " ")
    details = " ".join((error.details() or "").split())
    return f"{code}: {details[:200]}" if details else code


def version_of(told: str | bytes | None) -> int:
    """A version from metadata; 0 where none was told: the first of all."""
    text = str(told)
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_VERSION_DIGITS else 0
