"""Where received messages go, as bytes: bounded, so that a slow learner slows its actors down."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Received:
    """A message as it came: not decoded, not checked.

    Attributes:
        actor: The actor that sent it.
        payload: Its bytes.
    """

    actor: int
    payload: bytes


class _Place:
    """Where senders wait until their message is taken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False

    def wake(self) -> None:
        """Lets waiting senders look again whether they are still wanted."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Lets nobody wait from now on; what has been taken can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Inbox(_Place):
    """A queue of received messages, bounded for each actor; one whose part is full blocks, and no other."""

    def __init__(self, messages: int, size: int, actors: int | None = None) -> None:
        """Makes an empty inbox.

        Args:
            messages: Most messages of an actor that wait at once.
            size: Most bytes of them; one message may always wait.
            actors: Most actors whose messages wait at once, the others block; None for any number.
        """
        super().__init__()
        self._limits, self._actors = (messages, size), actors
        # Messages and bytes that wait, by actor.
        self._waiting: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()
        self._items: deque[Received] = deque()

    def put(self, item: Received, wanted: Callable[[], bool]) -> bool:
        """Adds a message, waiting for room.

        Args:
            item: The message.
            wanted: Whether the sender is still there; looked at again after each `wake`.

        Returns:
            False when the inbox closed or the sender left first.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not wanted() or self._has_room(item))
            if self._closed or not wanted():
                return False
            self._items.append(item)
            self._waiting[item.actor] += 1
            self._bytes[item.actor] += len(item.payload)
            self._changed.notify_all()
            return True

    def get(self, timeout: float | None = None) -> Received | None:
        """Takes the oldest message.

        Args:
            timeout: Seconds to wait for one; None waits until the inbox closes.

        Returns:
            The message, or None when there was none in time or the inbox is closed and empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items), timeout)
            if not self._items:
                return None
            return self._take()

    def drain(self) -> list[Received]:
        """Takes all that is there, without waiting."""
        with self._changed:
            return [self._take() for _ in range(len(self._items))]

    def __len__(self) -> int:
        """How many messages wait."""
        with self._changed:
            return len(self._items)

    def _has_room(self, item: Received) -> bool:
        """Whether an actor's part has room for one more. Needs the lock."""
        messages, size = self._limits
        waiting, taken = self._waiting[item.actor], self._bytes[item.actor]
        if waiting == 0:
            return self._actors is None or len(self._waiting) < self._actors
        return waiting < messages and taken + len(item.payload) <= size

    def _take(self) -> Received:
        """Removes the oldest message. Needs the lock."""
        item = self._items.popleft()
        self._waiting[item.actor] -= 1
        self._bytes[item.actor] -= len(item.payload)
        if not self._waiting[item.actor]:
            del self._waiting[item.actor], self._bytes[item.actor]
        self._changed.notify_all()
        return item


class Handover(_Place):
    """Gives each message to whoever keeps it, one at a time, while its sender waits.

    For what must not be lost: its sender hears that it has arrived when it is kept, and not before.
    """

    def __init__(self) -> None:
        """Nobody keeps anything yet: senders wait."""
        super().__init__()
        self._keep: Callable[[bytes], None] | None = None

    @contextmanager
    def to(self, keep: Callable[[bytes], None]) -> Iterator[None]:
        """While this lasts, `keep` takes the messages; afterwards it is neither at work nor called again."""
        with self._changed:
            self._keep = keep
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._keep = None

    def put(self, item: Received, wanted: Callable[[], bool]) -> bool:
        """Has a message kept.

        Args:
            item: The message.
            wanted: Whether the sender is still there; looked at again after each `wake`.

        Returns:
            False when nobody has kept it before the sender left, or before the end.

        Raises:
            WireError: It is not what it should be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not wanted() or self._keep is not None)
            if self._keep is None:
                return False
            self._keep(item.payload)
            return True
