"""What waits to be sent on a stream, bounded."""

import threading
from collections import deque
from collections.abc import Iterator

STOP_POLL_SECONDS = 0.5
"""How often a wait for room looks whether it should end."""


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

    def end(self) -> int:
        """Drops what is left, frees everybody who waits, and says how many payloads that were."""
        with self._changed:
            self._ended, left = True, len(self._items)
            self._items.clear()
            self._changed.notify_all()
            return left

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
