"""The rate of control: when the next step of a robot is due, and what was late."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from lerobot.utils.robot_utils import precise_sleep

# Part of a period by which a step may be late: sleeping is not exact.
TOLERANCE = 0.1


@dataclass(frozen=True)
class ControlStatistics:
    """How control went, as sums that can be added up over actors.

    Attributes:
        steps: Steps in which the policy acted.
        person_steps: Steps in which a person acted, or had just let go.
        interventions: How often a person took over.
        intervals: Pairs of neighbouring steps; a reset or a pause between collections is none.
        seconds: Time between the steps of these pairs.
        overruns: How many of them were more than a tenth later than `1 / fps`.
        dropped_frames: Whole periods of `1 / fps` in which no step was taken.
        decisions: Chunks that the policy chose.
        thinking_seconds: From an observation to the chunk for it.
        ahead: How many of these chunks were chosen while the one before was executed.
        late: How many of them were not there when their first step was due.
        margin_seconds: By how much they were there before that, summed; what was late counts as negative.
    """

    steps: int = 0
    person_steps: int = 0
    interventions: int = 0
    intervals: int = 0
    seconds: float = 0.0
    overruns: int = 0
    dropped_frames: int = 0
    decisions: int = 0
    thinking_seconds: float = 0.0
    ahead: int = 0
    late: int = 0
    margin_seconds: float = 0.0

    def plus(self, **more: float) -> "ControlStatistics":
        """The same with some sums increased."""
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


class Clock:
    """Keeps steps `1 / fps` seconds apart, and counts those that come later.

    A late step moves all that follow: catching up would send commands faster than the robot is meant to get them.
    """

    def __init__(
        self,
        fps: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = precise_sleep,
    ) -> None:
        """Starts paused.

        Args:
            fps: Steps per second.
            now: Tells the time in seconds.
            sleep: Waits for some seconds.

        Attributes:
            now: Tells the time in seconds.
            statistics: What was counted so far.
        """
        self._period, self._sleep = 1 / fps, sleep
        self.now = now
        self._last: float | None = None
        self.statistics = ControlStatistics()

    def pause(self) -> None:
        """Lets the next step come whenever it comes."""
        self._last = None

    @property
    def due(self) -> float | None:
        """When the next step is due; None while paused."""
        return None if self._last is None else self._last + self._period

    def wait(self) -> None:
        """Waits until the next step is due, and notes when it is too late for that."""
        now, due = self.now(), self.due
        if due is None:
            self._last = now
            return
        late = now - due
        if late < 0:
            self._sleep(-late)
        # From when it was due, so that small errors do not add up.
        start = max(now, due)
        self.statistics = self.statistics.plus(
            intervals=1,
            seconds=start - due + self._period,
            overruns=int(late > TOLERANCE * self._period),
            # A little less than a whole period is one, in floating point.
            dropped_frames=max(0, int(late / self._period + 1e-9)),
        )
        self._last = start

    def take_statistics(self) -> ControlStatistics:
        """What was counted since the last time."""
        taken, self.statistics = self.statistics, ControlStatistics()
        return taken
