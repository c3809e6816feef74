"""The learner's side of the wire: LeRobot's `LearnerService`, extended from one actor to many.

Proto and rpc names are LeRobot's. What differs: an actor introduces itself (`handshake.Handshake`) and is refused
without the access token or with other settings, and every connected actor gets the newest weights whenever there are
new ones. What arrives goes to bounded inboxes as raw bytes, which the learner decodes, so that a slow learner slows
its actors down; only what people did is kept at once, before its actor hears that it has arrived. An actor that sends
too much is slowed, one that sends nonsense is cut off, and one that gives no sign of life loses its number to whoever
comes with it.
"""

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
from lerobot.rl.learner_service import LearnerService
from lerobot.transport import services_pb2
from lerobot.transport.utils import (
    CHUNK_SIZE,
    receive_bytes_in_chunks,
    send_bytes_in_chunks,
)

from .access import Access, Gate
from .chunks import TOO_LARGE, whole_messages
from .handshake import (
    HEARTBEAT_METADATA,
    NEXT_VERSION,
    OWN_METADATA,
    STATUS_METADATA,
    WEIGHTS_AGAIN,
    Handshake,
    encode_settings,
    flat_settings,
    settings_differences,
)
from .inbox import Handover, Inbox, Received
from .limits import NUMBERS_PER_PLACE, Bucket, Limits
from .packing import WireError
from .register import Link, Refusal, Register, Stream
from .wire import MAX_INTERACTION_BYTES, Rejection, encode_rejection, is_of_demonstrations

logger = logging.getLogger(__name__)

WARNINGS_PER_S, WARNINGS_AT_ONCE = 1.0, 50
"""Lines about rejected messages and refused calls in the log; further ones are counted only."""
ENDED = "the learner ended the connection"
DRAIN_SECONDS = 1.5
"""How long `stop` lets the parameter streams deliver the last weights before it cuts them."""

MALFORMED = "malformed"
"""Why a whole message is rejected whose content is not what it should be."""

BREAK_SECONDS = 0.2
"""A call that is over within this time after its last chunk broke."""

GONE_SECONDS = 1.0
"""A call that broke this long before its actor's connection did broke alone."""


@dataclass(frozen=True)
class Traffic:
    """Counters since the learner started.

    Attributes:
        messages: Whole messages received, decisions and interactions together.
        bytes: Their bytes.
        sent: Messages of weights sent, one per actor and version.
        sent_bytes: Their bytes.
        joined: Times that an actor connected.
        reconnected: Of these, times that its number had been there before.
        replaced: Numbers that were taken over from an actor that gave no sign of life.
        slowed: Chunks that were read later, because their actor sent too many.
        unfinished: Messages of which some or all had come when their connection ended, and that nobody took.
        rejected: Rejected messages and refused calls, by reason.
    """

    messages: int
    bytes: int
    sent: int
    sent_bytes: int
    joined: int
    reconnected: int
    replaced: int
    slowed: int
    unfinished: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class _Published:
    """The newest weights; `sequence` counts publications, for versions may repeat after a resume."""

    sequence: int
    version: int
    payload: bytes


COUNTED = ("messages", "bytes", "sent", "sent_bytes", "slowed", "unfinished")
"""What of `Traffic` the service counts itself."""

Put = Callable[[Received, Callable[[], bool]], bool]
"""Takes a message; false when there was no room for it before its sender left."""


class _Incoming:
    """What a stream has brought and nobody has taken.

    Attributes:
        begun: It is in the middle of a message.
        untaken: Whole messages for which there was no room before the connection ended.
    """

    def __init__(self) -> None:
        self.begun, self.untaken = False, 0

    def of(self, chunks: Iterator[Any], over: threading.Event) -> Iterator[Any]:
        """The chunks, noted as they pass; whoever asks for the next one is done with those before.

        Args:
            chunks: What gRPC gives of the stream.
            over: Set when the call is.

        Raises:
            RpcError: The stream broke. gRPC may end one that breaks like one that is complete; then its call is over,
                which it is not while its caller waits for the answer.
        """
        for chunk in chunks:
            self.begun = True
            yield chunk
            if chunk.transfer_state == services_pb2.TransferState.TRANSFER_END:
                self.begun = False
        if self.begun and over.wait(BREAK_SECONDS):
            raise grpc.RpcError(ENDED)


class PIRLLearnerService(LearnerService):
    """LeRobot's learner service for many actors, with versions, settings and limits.

    What `__init__` sets below `_changed` is guarded by its lock, which is that of the list of actors.
    """

    def __init__(self, settings: Mapping[str, Any], max_actors: int, limits: Limits) -> None:
        """Makes the service; `LearnerServer` puts it on a port.

        Args:
            settings: What actors must agree with, nested or by dotted name.
            max_actors: Most actors connected at once.
            limits: What one actor may send.
        """
        waiting = (limits.waiting_messages, limits.waiting_bytes, NUMBERS_PER_PLACE * max_actors)
        self.decisions, self.interactions = Inbox(*waiting), Inbox(*waiting)
        self.demonstrations = Handover()
        super().__init__(
            shutdown_event=threading.Event(),
            parameters_queue=None,
            seconds_between_pushes=0,
            transition_queue=self.decisions,
            interaction_message_queue=self.interactions,
        )
        self._settings = flat_settings(settings)
        # Fails here, and not for every actor, if they are too long.
        encode_settings(self._settings)
        self._limits = limits
        self.actors = Register(max_actors, limits, self.shutdown_event, self._wake, self._warn)
        self._changed = self.actors.changed
        self._newest: _Published | None = None
        self._report: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._warnings = Bucket(WARNINGS_PER_S, WARNINGS_AT_ONCE)
        self._unsaid = 0

    # For the learner

    def publish(self, version: int, payload: bytes) -> None:
        """Sends weights to every connected actor, and to each that connects before the next ones.

        Args:
            version: Their number, for the log.
            payload: `wire.encode_weights`.
        """
        with self._changed:
            sequence = self._newest.sequence + 1 if self._newest else 1
            self._newest = _Published(sequence, version, payload)
            self._changed.notify_all()

    def report(self, values: Mapping[str, Any]) -> None:
        """Takes what the learner says of itself, for whoever asks (`lerobot-pi-rl-status`).

        Args:
            values: What JSON can hold.
        """
        with self._changed:
            self._report = dict(values)

    def status(self) -> dict[str, Any]:
        """The newest report, with what the service knows itself; as JSON can hold it.

        All times in it are of the learner's monotonic clock, which `now` tells: nobody sets that one.
        """
        with self._changed:
            report = dict(self._report)
            connected = self.actors.connected()
            rejected = dict(self._rejected)
            came = {f"actors_{name}": count for name, count in asdict(self.actors.counts).items()}
        sent = report.pop("sent", {})
        nothing = {"version": None, "sent_at": None, "env_steps_per_s": 0.0}
        actors = [asdict(info) | nothing | sent.get(str(info.actor), {}) for info in connected]
        waiting = {"decisions": len(self.decisions), "interactions": len(self.interactions)}
        known = {
            "actors": actors,
            "max_actors": self.actors.max_actors,
            "waiting": waiting,
            "refused": rejected,
        }
        return report | known | came | {"now": time.monotonic()}

    def reject(self, actor: int, reason: str, detail: str = "", quota: bool = False) -> None:
        """Counts and logs a message that was not taken, here or by whoever decodes it, and tells its sender.

        Too many cut the sender off.

        Args:
            actor: Who sent it.
            reason: A few words, the same for all messages of a kind.
            detail: What exactly, one line.
            quota: It was a quota of decisions.
        """
        text = f"{reason}: {detail}" if detail else reason
        self._count_rejected(reason, f"Rejected a message of actor {actor}: {text}")
        self.actors.tell(actor, Rejection(text, quota))
        if (rejected := self.actors.note_rejected(actor)) is not None:
            self._count_rejected(
                "cut off", f"Cut off actor {actor}: {rejected} of its messages were rejected"
            )

    def traffic(self) -> Traffic:
        """The counters."""
        with self._changed:
            return Traffic(
                **{name: self._counts[name] for name in COUNTED},
                **asdict(self.actors.counts),
                rejected=dict(self._rejected),
            )

    def end(self, drain_s: float = DRAIN_SECONDS) -> None:
        """Ends every stream, after the newest weights went out.

        Args:
            drain_s: Seconds after which streams that did not end by themselves are left to the server to cut.
        """
        self.shutdown_event.set()
        for place in (self.decisions, self.interactions, self.demonstrations):
            place.close()
        self.actors.end()
        self.actors.wait_empty(drain_s)

    # The four calls of LeRobot's service

    def Ready(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Admits an actor whose settings agree."""
        hello = self._introduced(context)
        differences = settings_differences(self._settings, hello.settings or {})
        if differences:
            self._refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "settings", "\n".join(differences))
        with self._refusing(context):
            self.actors.admit(hello, context.peer())
        context.send_initial_metadata(OWN_METADATA)
        return services_pb2.Empty()

    def StreamParameters(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """Sends the newest weights whenever there are new ones, and rejections, until either side ends.

        To a caller that asks for the status it sends that, once.
        """
        if _shows(context, STATUS_METADATA):
            yield from send_bytes_in_chunks(json.dumps(self.status()).encode(), services_pb2.Parameters)
            return
        hello = self._introduced(context)
        with self._refusing(context):
            link = self.actors.join(hello, context)
        # Sent before any weights exist: tells the actor that it is connected.
        context.send_initial_metadata((*OWN_METADATA, (NEXT_VERSION, str(link.next_version))))
        sent = 0
        try:
            while (news := self._wait_news(link, sent)) is not None:
                if isinstance(news, Rejection):
                    payload = encode_rejection(news.text, news.quota)
                    yield from send_bytes_in_chunks(payload, services_pb2.Parameters)
                    continue
                yield from send_bytes_in_chunks(news.payload, services_pb2.Parameters)
                sent = news.sequence
                self._count("sent", "sent_bytes", len(news.payload))
        finally:
            self.actors.leave(link)

    def SendTransitions(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Takes decisions into their inbox, and has demonstrations kept."""
        return self._receive(
            request_iterator, context, "decisions", self._put_decisions, self._limits.message_bytes
        )

    def SendInteractions(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Takes interactions into their inbox, or notes that the caller lives."""
        if _shows(context, HEARTBEAT_METADATA):
            return self._listen(request_iterator, context)
        return self._receive(
            request_iterator, context, "interactions", self.interactions.put, MAX_INTERACTION_BYTES
        )

    # Behind the calls

    def _introduced(self, context: grpc.ServicerContext) -> Handshake:
        """Who is calling; refuses callers that are not our actors."""
        try:
            return Handshake.from_metadata(context.invocation_metadata())
        except WireError as error:
            self._refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "not an actor", str(error))

    def _wait_news(self, link: Link, sent: int) -> _Published | Rejection | None:
        """The next rejection, or the newest weights once there is a reason to send them; None when the stream ends."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    bool(link.rejections)
                    or self._is_due(link, sent)
                    or not link.open
                    or self.shutdown_event.is_set()
                )
            )
            if link.open and link.rejections:
                return link.rejections.popleft()
            if not link.open or not self._is_due(link, sent):
                return None
            link.again = False
            return self._newest

    def _is_due(self, link: Link, sent: int) -> bool:
        """Whether there are weights that a stream has not sent, or is to send again. Needs the lock."""
        return self._newest is not None and (self._newest.sequence > sent or link.again)

    def _receive(
        self,
        chunks: Iterator[Any],
        context: grpc.ServicerContext,
        stream: Stream,
        put: Put,
        max_bytes: int,
    ) -> Any:
        """Puts every whole message of a stream where it belongs until the stream ends.

        Its good end tells the actor that all of it was taken.
        """
        if self.shutdown_event.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, ENDED)
        link = self._attach(context, stream)
        actor, progress, over = link.info.actor, _Incoming(), threading.Event()
        context.add_callback(over.set)
        context.add_callback(self._wake)

        def wanted() -> bool:
            return link.open and context.is_active()

        def deliver(payload: bytes) -> None:
            if put(Received(actor, payload), wanted):
                self._count("messages", "bytes", len(payload))
            else:
                progress.untaken += 1

        def reject(reason: str) -> None:
            # What is left of a connection that was given up is nobody's fault.
            if link.open:
                progress.begun = False
                self.reject(actor, reason, quota=stream == "decisions" and reason == TOO_LARGE)

        paced = self._paced(progress.of(chunks, over), link, stream, wanted)
        try:
            receive_bytes_in_chunks(
                whole_messages(paced, max_bytes, reject), SimpleNamespace(put=deliver), self.shutdown_event
            )
        except grpc.RpcError:
            self._note_break(link, stream, context)
        self._note_rest(progress, context)
        return services_pb2.Empty()

    def _put_decisions(self, message: Received, wanted: Callable[[], bool]) -> bool:
        """Has demonstrations kept, and puts everything else into the inbox of decisions."""
        if not is_of_demonstrations(message.payload):
            return self.decisions.put(message, wanted)
        try:
            return self.demonstrations.put(message, wanted)
        except WireError as error:
            self.reject(message.actor, MALFORMED, str(error))
            return True

    def _wake(self) -> None:
        """Lets waiting senders look whether they are still there."""
        for place in (self.decisions, self.interactions, self.demonstrations):
            place.wake()

    def _note_rest(self, progress: _Incoming, context: grpc.ServicerContext) -> None:
        """Counts what a stream has brought and nobody has taken, and tells its actor."""
        if missed := progress.untaken + progress.begun:
            with self._changed:
                self._counts["unfinished"] += missed
            context.abort(grpc.StatusCode.UNAVAILABLE, ENDED)

    def _note_break(self, link: Link, stream: Stream, context: grpc.ServicerContext) -> None:
        """Counts a call that broke alone: its actor is still there, and made no other in its place."""
        with self._changed:
            replaced = link.calls.get(stream) is not context
            over = self._changed.wait_for(
                lambda: not link.open or self.shutdown_event.is_set(), 0.0 if replaced else GONE_SECONDS
            )
        if not replaced and not over:
            self.reject(link.info.actor, "broken stream")

    def _listen(self, chunks: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """Notes the signs of life of a stream until it ends."""
        if self.shutdown_event.is_set():
            return services_pb2.Empty()
        link = self._attach(context, "heartbeat")
        try:
            for chunk in self._paced(chunks, link, "heartbeat", lambda: link.open):
                if chunk.data == WEIGHTS_AGAIN:
                    self.actors.send_again(link)
        except grpc.RpcError:
            self._note_break(link, "heartbeat", context)
        return services_pb2.Empty()

    def _attach(self, context: grpc.ServicerContext, stream: Stream) -> Link:
        """Gives a connected actor one more call; refuses callers that are not connected."""
        hello = self._introduced(context)
        with self._refusing(context):
            return self.actors.attach(hello, stream, context)

    def _paced(
        self, chunks: Iterator[Any], link: Link, stream: Stream, wanted: Callable[[], bool]
    ) -> Iterator[Any]:
        """The chunks of a stream, no more messages per second than an actor may send; each shows that it lives.

        A message has one chunk that is not full, its last; any further one counts as a message.
        """
        bucket = link.account.buckets[stream]
        for chunk in chunks:
            self.actors.note_life(link)
            pause = bucket.take() if len(chunk.data) < CHUNK_SIZE else 0.0
            if pause:
                self._slow(link.info.actor, pause)
            if not wanted():
                return
            yield chunk

    def _slow(self, actor: int, pause: float) -> None:
        """Has a stream wait, and counts it."""
        with self._changed:
            self._counts["slowed"] += 1
        self._warn(
            f"Slowed actor {actor}: it sends more than {self._limits.messages_per_s:g} messages a second"
        )
        self.shutdown_event.wait(pause)

    def _count(self, messages: str, size: str, number: int) -> None:
        """Counts one message of `number` bytes."""
        with self._changed:
            self._counts[messages] += 1
            self._counts[size] += number

    def _count_rejected(self, reason: str, text: str) -> None:
        """Counts something that was not taken, and logs it."""
        with self._changed:
            self._rejected[reason] += 1
        self._warn(text)

    def _warn(self, text: str) -> None:
        """Logs what a caller did, unless there is so much of it that the log would only grow."""
        with self._changed:
            if not self._warnings.take_now():
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
        logger.warning("%s", f"{text} (and {unsaid} more that the log leaves out)" if unsaid else text)

    def gate(self, access: Access) -> Gate:
        """What lets only calls with the access token through to this service."""
        return Gate(access, self._refuse)

    @contextlib.contextmanager
    def _refusing(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Ends the call where the list of actors refuses it."""
        try:
            yield
        except Refusal as refusal:
            self._refuse(context, refusal.code, refusal.reason, refusal.text)

    def _refuse(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, text: str
    ) -> NoReturn:
        """Ends a call with a clear text; counted."""
        self._count_rejected(reason, f"Refused {context.peer()}: {'; '.join(text.splitlines())}")
        context.abort(code, text)
        raise AssertionError("grpc's abort always raises")


def _shows(context: grpc.ServicerContext, pair: tuple[str, str]) -> bool:
    """Whether a call carries a pair of metadata."""
    return pair in [tuple(each) for each in context.invocation_metadata()]
