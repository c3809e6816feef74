"""The clock of a robot, with a time that the test tells."""

import pytest

from lerobot_policy_pi_rl.runtime.control import Clock


class Time:
    """Time passes when somebody sleeps, or when the test says so."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def clocked(fps: float = 10) -> tuple[Clock, Time]:
    time = Time()
    return Clock(fps, lambda: time.now, time.sleep), time


def test_steps_are_kept_a_period_apart() -> None:
    clock, time = clocked()
    for work in (0.0, 0.03, 0.08, 0.0):
        time.now += work
        clock.wait()
    assert time.slept == pytest.approx([0.07, 0.02, 0.1])
    assert clock.statistics.intervals == 3
    assert clock.statistics.seconds == pytest.approx(0.3)
    assert clock.statistics.overruns == clock.statistics.dropped_frames == 0


@pytest.mark.parametrize(
    ("work", "overruns", "dropped"), [(0.105, 0, 0), (0.15, 1, 0), (0.2, 1, 1), (0.45, 1, 3)]
)
def test_a_late_step_is_counted_with_the_frames_it_missed(work: float, overruns: int, dropped: int) -> None:
    clock, time = clocked()
    clock.wait()
    time.now += work
    clock.wait()
    assert time.slept == []
    assert clock.statistics.overruns == overruns
    assert clock.statistics.dropped_frames == dropped
    assert clock.statistics.seconds == pytest.approx(work)


def test_it_tells_when_the_next_step_is_due() -> None:
    clock, time = clocked()
    assert clock.due is None
    clock.wait()
    assert clock.due == pytest.approx(100.1)
    time.now += 0.35
    clock.wait()
    assert clock.due == pytest.approx(100.45)
    clock.pause()
    assert clock.due is None


def test_nothing_is_caught_up_after_a_late_step() -> None:
    clock, time = clocked()
    clock.wait()
    time.now += 0.35
    clock.wait()
    clock.wait()
    assert time.slept == pytest.approx([0.1])


def test_a_pause_is_no_overrun() -> None:
    clock, time = clocked()
    clock.wait()
    clock.pause()
    time.now += 60
    clock.wait()
    assert clock.statistics.intervals == 0
    clock.wait()
    assert clock.take_statistics().intervals == 1
    assert clock.take_statistics().intervals == 0
