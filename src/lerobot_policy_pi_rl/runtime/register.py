"""Which actors are connected, who else may be, and what counts against each of them."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import grpc

from .handshake import HEARTBEAT_SECONDS, Handshake
from .limits import BURST_SECONDS, Bucket, Limits
from .wire import Rejection

REMEMBERED = 1024
"""Most events that wait, and most sessions and numbers of each kind that are remembered: callers make new ones."""
ACCOUNT_SECONDS = 600.0
"""Whoever comes with a number that left a shorter time ago goes on with its limits: reconnecting resets nothing."""

MISSED_HEARTBEATS = 4
"""After so many in a row that did not come, an actor's number goes to another process that asks for it."""

MAX_REJECTIONS = 16
"""Most rejections that an actor has not been told of; of more it is told the newest."""

Stream = Literal["parameters", "decisions", "interactions", "heartbeat"]


class Refusal(Exception):
    """A call is refused.

    Attributes:
        code: gRPC's.
        reason: A few words, the same for all calls of a kind.
        text: What exactly, for the caller.
    """

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        """Takes what it says."""
        super().__init__(text)
        self.code, self.reason, self.text = code, reason, text


@dataclass(frozen=True)
class ActorInfo:
    """A connected actor.

    Attributes:
        actor: Its number.
        peer: Its address, as gRPC names it.
        joined_at: When it connected, by the learner's monotonic clock.
    """

    actor: int
    peer: str
    joined_at: float


@dataclass(frozen=True)
class ActorEvent:
    """An actor came or went."""

    kind: Literal["joined", "left"]
    info: ActorInfo


@dataclass
class Joined:
    """How often actors came, since the learner started.

    Attributes:
        joined: Times that an actor connected.
        reconnected: Of these, times that its number had been there before.
        replaced: Numbers that were taken over from an actor that gave no sign of life.
    """

    joined: int = 0
    reconnected: int = 0
    replaced: int = 0


class Account:
    """What counts against the limits of an actor's number, over all its connections."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.rejected = 0
        # How fast it may send with each call.
        self.buckets: dict[Stream, Bucket] = {}
        self.seen = time.monotonic()


class Link:
    """One open parameters stream, which is what makes an actor connected."""

    def __init__(
        self,
        info: ActorInfo,
        session: str,
        parameters: grpc.ServicerContext,
        account: Account,
        next_version: int,
    ) -> None:
        """Starts with that one call.

        Args:
            info: Whose it is.
            session: The process behind it.
            parameters: The call.
            account: What counts against the actor's limits.
            next_version: Version whose iteration takes its first quota.
        """
        self.info = info
        self.account = account
        self.session = session
        self.next_version = next_version
        self.open = True
        # Chunks that it sent: any of them shows that it lives.
        self.heard = 0
        # What its process has not been told of its rejected messages.
        self.rejections: deque[Rejection] = deque(maxlen=MAX_REJECTIONS)
        # It asks for the newest weights once more.
        self.again = False
        # Somebody who asks for its number waits for the next one.
        self.questioned = False
        self.calls: dict[Stream, grpc.ServicerContext] = {"parameters": parameters}

    def cut(self) -> None:
        """Ends its calls, also those that wait for a peer who is no longer there."""
        for call in list(self.calls.values()):
            call.cancel()


class Register:
    """The list of connected actors. All of it may be used from any thread."""

    def __init__(
        self,
        max_actors: int,
        limits: Limits,
        ending: threading.Event,
        left: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        """Starts empty.

        Args:
            max_actors: Most actors connected at once.
            limits: What one actor may send.
            ending: Set when the learner ends.
            left: Called when an actor has left.
            warn: Takes a line for the log.
        """
        self.max_actors = max_actors
        self._limits, self._ending, self._left, self._warn = limits, ending, left, warn
        self._events: queue.Queue[ActorEvent] = queue.Queue(REMEMBERED)
        lock = threading.RLock()
        # Told whenever an actor comes or goes; whoever waits for that and for something else may tell it, too.
        self.changed = threading.Condition(lock)
        # For signs of life, of which each would otherwise wake everybody.
        self._heard = threading.Condition(lock)
        self._links: dict[int, Link] = {}
        # By actor; the one that joined last is at the end.
        self._accounts: dict[int, Account] = {}
        # Actor and session of those that may join, and sessions that were cut off.
        self._admitted: deque[tuple[int, str]] = deque(maxlen=REMEMBERED)
        self._cut_off: deque[str] = deque(maxlen=REMEMBERED)
        self._next = 0
        self.counts = Joined()

    def take_next(self, version: int) -> None:
        """Notes which version's iteration takes the first quota of actors that join from now on."""
        with self.changed:
            self._next = version

    def connected(self) -> list[ActorInfo]:
        """The connected actors, by number."""
        with self.changed:
            return [self._links[actor].info for actor in sorted(self._links)]

    def wait_connected(self, count: int, timeout: float | None = None) -> bool:
        """Waits until at least `count` actors are connected; false when `timeout` seconds were not enough."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self._links) >= count, timeout)

    def wait_empty(self, timeout: float) -> bool:
        """Waits until no actor is connected; false when `timeout` seconds were not enough."""
        with self.changed:
            return self.changed.wait_for(lambda: not self._links, timeout)

    def next_event(self, timeout: float = 0.0) -> ActorEvent | None:
        """The next actor that came or went, waiting at most `timeout` seconds."""
        try:
            return self._events.get(timeout > 0, timeout if timeout > 0 else None)
        except queue.Empty:
            return None

    def admit(self, hello: Handshake, peer: str) -> None:
        """Notes an actor that may join.

        Its number may belong to a process that is gone, together with its machine or its network, which nobody has
        heard of: that one is given a few seconds to show that it lives.

        Raises:
            Refusal: There is no place for it.
        """
        while True:
            with self.changed:
                refusal, holder = self._occupied(hello), self._links.get(hello.actor)
                if refusal is None:
                    self._admitted.append((hello.actor, hello.session))
                    return
            taken = refusal.code == grpc.StatusCode.ALREADY_EXISTS
            if not taken or holder is None or self._lives_or_is_questioned(holder):
                raise refusal
            if holder.open:
                with self.changed:
                    self.counts.replaced += 1
                silence = MISSED_HEARTBEATS * HEARTBEAT_SECONDS
                self._warn(
                    f"Actor {hello.actor} at {holder.info.peer} gave no sign of life for {silence:.0f} s; "
                    f"{peer} takes its number"
                )
            self.disconnect(holder)

    def join(self, hello: Handshake, parameters: grpc.ServicerContext) -> Link:
        """Registers an actor's parameters stream, until that ends.

        Raises:
            Refusal: There is no place for it, or it was not admitted.
        """
        info = ActorInfo(hello.actor, parameters.peer(), time.monotonic())
        with self.changed:
            refusal = self._occupied(hello)
            if refusal is not None:
                raise refusal
            if (hello.actor, hello.session) not in self._admitted:
                raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "not admitted", "call Ready first")
            before = self._links.pop(hello.actor, None)
            if before is not None:
                self._close(before)
            account = self._open_account(hello.actor)
            link = Link(info, hello.session, parameters, account, self._next)
            self._links[hello.actor] = link
            self._tell(ActorEvent("joined", link.info))
            self.changed.notify_all()
        if before is not None:
            # The same process, whose old connection may be one that no longer says anything, not even that it ended.
            self.disconnect(before)
        # gRPC calls this however the stream ends, also when the actor's process was killed.
        if not parameters.add_callback(lambda: self.leave(link)):
            self.leave(link)
        return link

    def attach(self, hello: Handshake, stream: Stream, call: grpc.ServicerContext) -> Link:
        """Gives a connected actor one more call, which takes the place of an earlier one of its kind.

        Raises:
            Refusal: It is not connected.
        """
        with self.changed:
            link = self._links.get(hello.actor)
            if link is None or link.session != hello.session:
                raise Refusal(
                    grpc.StatusCode.FAILED_PRECONDITION, "not admitted", "open StreamParameters first"
                )
            before, link.calls[stream] = link.calls.get(stream), call
            link.account.buckets.setdefault(stream, self._make_bucket())
        if before is not None:
            before.cancel()
        return link

    def leave(self, link: Link) -> None:
        """Takes an actor off the list, once."""
        with self.changed:
            if self._links.get(link.info.actor) is link:
                del self._links[link.info.actor]
            if link.open:
                self._close(link)
        self._left()

    def disconnect(self, link: Link) -> None:
        """Takes an actor off the list and ends its calls; what has arrived of a message is dropped."""
        self.leave(link)
        link.cut()

    def note_life(self, link: Link) -> None:
        """Notes that an actor has sent something."""
        with self._heard:
            link.heard += 1
            self._heard.notify_all()

    def note_rejected(self, actor: int) -> int | None:
        """Counts a rejected message against its sender, also when that has left since; too many cut it off.

        Returns:
            How many it were, if it is cut off by this one.
        """
        with self.changed:
            link, account = self._links.get(actor), self._accounts.get(actor)
            if account is not None:
                account.rejected += 1
            if link is None or link.account.rejected < self._limits.rejected_messages:
                return None
            self._cut_off.append(link.session)
        self.disconnect(link)
        return link.account.rejected

    def tell(self, actor: int, rejection: Rejection) -> None:
        """Has an actor told of a message that was not taken, if it is still connected."""
        with self.changed:
            if (link := self._links.get(actor)) is not None:
                link.rejections.append(rejection)
                self.changed.notify_all()

    def send_again(self, link: Link) -> None:
        """Has the newest weights sent to an actor once more."""
        with self.changed:
            link.again = True
            self.changed.notify_all()

    def end(self) -> None:
        """Lets everybody who waits see that the learner ends."""
        with self.changed:
            self.changed.notify_all()
            self._heard.notify_all()

    def _occupied(self, hello: Handshake) -> Refusal | None:
        """Why there is no place for this actor, or None. Needs the lock."""
        if hello.session in self._cut_off:
            text = (
                f"{self._limits.rejected_messages} of its messages were rejected; the learner's log says why"
            )
            return Refusal(grpc.StatusCode.PERMISSION_DENIED, "cut off before", text)
        link = self._links.get(hello.actor)
        if link is not None and link.session != hello.session:
            text = f"actor {hello.actor} is already connected from {link.info.peer}; give each its own number"
            return Refusal(grpc.StatusCode.ALREADY_EXISTS, "number taken", text)
        if link is None and len(self._links) >= self.max_actors:
            text = f"all {self.max_actors} places are taken; raise the learner's number of actors"
            return Refusal(grpc.StatusCode.PERMISSION_DENIED, "no place", text)
        return None

    def _lives_or_is_questioned(self, link: Link) -> bool:
        """As `_lives`; one caller at a time finds out, so that those who ask never take all calls."""
        with self.changed:
            if link.questioned:
                return True
            link.questioned = True
        try:
            return self._lives(link)
        finally:
            with self.changed:
                link.questioned = False

    def _lives(self, link: Link) -> bool:
        """Whether an actor gives a sign of life soon; while the learner ends, all of them live."""
        with self._heard:
            before = link.heard

            def known() -> bool:
                return link.heard > before or not link.open or self._ending.is_set()

            # In parts: a pause of this process must not be taken for one of the actor.
            shown = any(self._heard.wait_for(known, HEARTBEAT_SECONDS) for _ in range(MISSED_HEARTBEATS))
            return self._ending.is_set() or (shown and link.open)

    def _open_account(self, actor: int) -> Account:
        """The account of an actor that joins, which goes on if it was here a short time ago. Needs the lock."""
        account = self._accounts.pop(actor, None)
        self.counts.joined += 1
        self.counts.reconnected += account is not None
        if account is None or time.monotonic() - account.seen > ACCOUNT_SECONDS:
            account = Account()
        self._accounts[actor] = account
        if len(self._accounts) > max(REMEMBERED, 2 * self.max_actors):
            # A connected actor keeps its limits: the account goes that nobody uses.
            gone = (number for number in self._accounts if number not in self._links and number != actor)
            del self._accounts[next(gone)]
        return account

    def _make_bucket(self) -> Bucket:
        rate = self._limits.messages_per_s
        return Bucket(rate, max(1.0, rate * BURST_SECONDS))

    def _close(self, link: Link) -> None:
        """Marks a link closed and tells everybody who waits. Needs the lock."""
        link.open = False
        link.account.seen = time.monotonic()
        self._tell(ActorEvent("left", link.info))
        self.changed.notify_all()
        self._heard.notify_all()

    def _tell(self, event: ActorEvent) -> None:
        """Queues an event; a learner that does not look loses the later ones."""
        with contextlib.suppress(queue.Full):
            self._events.put_nowait(event)
