"""How much of the learner one actor can take up."""

import time
from dataclasses import dataclass

BURST_SECONDS = 2.0
"""An actor may send at once what it may send in this time."""

NUMBERS_PER_PLACE = 2
"""For each place, messages of so many actors wait, and so many deliver in an iteration: one may return as another."""


@dataclass(frozen=True)
class Limits:
    """What one actor may send; with the number of actors this bounds the learner's memory.

    Attributes:
        message_bytes: Most bytes of one message of decisions.
        waiting_messages: Most of its messages that wait in an inbox; it is read no further until there is room.
        waiting_bytes: Most bytes of them; one message may always wait.
        messages_per_s: Most messages per second on each stream; a faster one is read more slowly.
        rejected_messages: The actor is cut off with this many messages that had to be rejected.
    """

    message_bytes: int
    waiting_messages: int
    waiting_bytes: int
    messages_per_s: float
    rejected_messages: int


class Bucket:
    """A token bucket: so many per second over a long time, and `burst` at once. Belongs to one thread."""

    def __init__(self, rate: float, burst: float) -> None:
        """Starts full.

        Args:
            rate: Per second.
            burst: Most at once, at least 1.
        """
        self._rate, self._burst = rate, burst
        self._level, self._at = burst, time.monotonic()

    def take(self) -> float:
        """Takes one and returns the seconds to wait before it may be used: 0 unless that was too fast."""
        self._fill()
        self._level -= 1
        return max(0.0, -self._level / self._rate)

    def take_now(self) -> bool:
        """Takes one if there is one."""
        self._fill()
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
