"""Metrics survive a resume and read well with and without a terminal."""

import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lerobot_policy_pi_rl.runtime.metrics import (
    EVALUATION,
    POSITION,
    MetricsWriter,
    WandBTracker,
    cut_after,
    make_tracker,
    read,
)

pytestmark = pytest.mark.timeout(60)

SHOWN = {"success": "rollout/success", "steps/s": "speed/env_steps_per_s", "env steps": "rollout/env_steps"}
VALUES = {
    "rollout/success": 0.8333333,
    "speed/env_steps_per_s": 812.4,
    "rollout/env_steps": 12048,
    "loss/policy": -0.1,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def log(self, step: int, values: dict) -> None:
        self.calls.append((step, dict(values)))

    def log_dict(self, values: dict, step: int, mode: str) -> None:
        self.calls.append((mode, step, values))


def writer(directory: Path, **changes: object) -> MetricsWriter:
    """A writer for 10,000 environment steps that says nothing to the test's own console."""
    return MetricsWriter(directory, **{"total_steps": 10_000, "stream": io.StringIO(), **changes})  # type: ignore[arg-type]


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    with writer(tmp_path / "new") as metrics:
        for step in (1, 2):
            metrics.write(step, VALUES)
            assert read(metrics.path)[-1] == {"step": step, **VALUES}
    assert len(read(metrics.path)) == 2


def test_a_full_disk_ends_no_run_and_the_lines_come_later(
    tmp_path: Path, full_disk: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(1, VALUES)
        with full_disk():
            metrics.write(2, VALUES)
            metrics.write(3, VALUES)
        metrics.write(4, VALUES)
        assert [line["step"] for line in read(metrics.path)] == [1, 2, 3, 4]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Metrics from version 2 on are not on the disk yet"
    ]


def test_a_terminal_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with writer(tmp_path, stream=Closed(), every_s=0) as metrics:
        metrics.write(1, VALUES)
    assert len(read(metrics.path)) == 1


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(1, {"a/nan": math.nan, "a/inf": -math.inf, "a/big": 10**20})
    assert json.loads(metrics.path.read_text()) == {"step": 1, "a/nan": None, "a/inf": None, "a/big": 10**20}


def test_a_tracker_that_fails_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told of once, and gets what comes when it works again."""

    class Unreachable:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, step: int, values: Mapping[str, float]) -> None:
            if step in (2, 3, 5):
                raise ConnectionError("no route\nto host")
            self.steps.append(step)

    tracker = Unreachable()
    with MetricsWriter(tmp_path, tracker, total_steps=9, stream=io.StringIO()) as metrics:
        for step in range(1, 7):
            metrics.write(step, {"loss/value": 0.5})
    assert tracker.steps == [1, 4, 6]
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    said = "The tracker does not take metrics from version {} on (ConnectionError: no route to host)".format
    assert [record.message[: len(said(2))] for record in caplog.records] == [said(2), said(5)]


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"rollout/success": step / 10})
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "rollout/suc')
    with writer(tmp_path, resume_step=3) as metrics:
        for step in range(4, 7):
            metrics.write(step, {"rollout/success": step / 100})
    lines = read(metrics.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["rollout/success"] for line in lines] == [0.1, 0.2, 0.3, 0.04, 0.05, 0.06]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_evaluation_of_the_resumed_version_is_made_again(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in (2, 3, 4):
            metrics.write(step, {EVALUATION: 0.5})
            metrics.write(step, {"loss/policy": 1.0})
    cut_after(metrics.path, 3)
    assert read(metrics.path) == [
        {"step": 2, EVALUATION: 0.5},
        {"step": 2, "loss/policy": 1.0},
        {"step": 3, "loss/policy": 1.0},
    ]


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(1, VALUES)
    with writer(tmp_path) as metrics:
        assert read(metrics.path) == []


def test_cutting_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    cut_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
    assert read(tmp_path / "metrics.jsonl") == []


def test_a_terminal_shows_one_bar_of_environment_steps(tmp_path: Path) -> None:
    stream = Terminal()
    with writer(tmp_path, stream=stream, shown=SHOWN) as metrics:
        for step in (1, 2):
            metrics.write(step, {**VALUES, POSITION: 2500 * step})
        metrics.note("actor 1 left")
    text = stream.getvalue()
    assert " 50%|" in text
    assert "5.00k/10.0k" in text
    assert "success 0.833, steps/s 812, env steps 12,048" in text
    assert "actor 1 left\n" in text
    # One bar is redrawn in place: the only new lines are the note's and the one that closes the bar.
    assert text.count("\n") == 2


def test_a_bar_that_passes_its_budget_is_full(tmp_path: Path) -> None:
    stream = Terminal()
    with writer(tmp_path, stream=stream, shown=SHOWN) as metrics:
        metrics.write(1, {**VALUES, POSITION: 10_240})
    assert "100%|" in stream.getvalue()
    assert "10.2k/10.2k" in stream.getvalue()
    assert "/?" not in stream.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    with writer(tmp_path, stream=stream, shown=SHOWN, every_s=1000.0) as metrics:
        for step in range(1, 11):
            metrics.write(step, {**VALUES, POSITION: 1000 * step})
    assert stream.getvalue().splitlines() == [
        f"PI-RL {done} of 10,000 environment steps, success 0.833, steps/s 812, env steps 12,048"
        for done in ("1,000", "10,000")
    ]


def test_the_console_shows_the_newest_of_each_metric_once_there_is_one(tmp_path: Path) -> None:
    stream = io.StringIO()
    with writer(tmp_path, stream=stream, shown=SHOWN, every_s=0.0) as metrics:
        metrics.write(1, {POSITION: 500, "rollout/success": 0.5})
        metrics.write(2, {POSITION: 600, "speed/env_steps_per_s": 70.0})
    assert stream.getvalue().splitlines() == [
        "PI-RL 500 of 10,000 environment steps, success 0.5",
        "PI-RL 600 of 10,000 environment steps, success 0.5, steps/s 70",
    ]


def test_a_tracker_gets_every_iteration(tmp_path: Path) -> None:
    tracker = Recorder()
    with writer(tmp_path, tracker=tracker) as metrics:
        metrics.write(1, VALUES)
    assert tracker.calls == [(1, VALUES)]


def test_wandb_gets_evaluation_apart() -> None:
    logger = Recorder()
    WandBTracker(logger).log(4, {"loss/policy": 1.0, "eval/success": 0.5})
    assert logger.calls == [("train", 4, {"loss/policy": 1.0}), ("eval", 4, {"success": 0.5})]


@pytest.mark.parametrize(("enable", "project"), [(False, "pi-rl"), (True, None)])
def test_no_tracker_unless_asked_for(enable: bool, project: str | None) -> None:
    assert make_tracker(SimpleNamespace(wandb=SimpleNamespace(enable=enable, project=project))) is None
