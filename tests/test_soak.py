"""The soak: what it calls flat, and that it runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.soak import GROWTH_MB, main, verdicts


def make_samples(rss_mb_per_s: float = 0.0, **changes: Any) -> list[dict[str, Any]]:
    """100 seconds, of which 20 are warm-up."""
    return [
        {
            "seconds": second,
            # Whatever happens in the warm-up does not count.
            "rss": {"learner": 1e6 * (500 + rss_mb_per_s * second if second >= 20 else 5 * second)},
            "threads": {"learner": 9},
            "waiting": {"decisions": 1, "interactions": 0},
            "version": second,
            "decisions": 16 * second,
            "staleness": 0,
            "dropped": 0,
            "refused": 0,
            **changes,
        }
        for second in range(1, 101)
    ]


def failed(mode: str, samples: list[dict[str, Any]]) -> list[str]:
    return [row.name for row in verdicts(mode, samples) if row.verdict == "short"]


def test_what_is_flat_passes_and_the_figures_are_those_of_the_line() -> None:
    rows = verdicts("synchronous", make_samples(rss_mb_per_s=0.1))
    assert [row.verdict for row in rows] == ["pass"] * 5
    # 80 seconds of a tenth of a megabyte.
    assert rows[0].value == pytest.approx(8.0)
    assert rows[0].detail == "+360.0 MB/h; 502.0 to 510.0 MB in 80 s, 9 to 9 threads"
    assert rows[1].detail == "80 iterations, 16 decisions/s"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rss_mb_per_s": 1.1 * GROWTH_MB / 80}, "growth of the learner"),
        ({"waiting": {"decisions": 2, "interactions": 0}}, "decisions waiting, most"),
        ({"waiting": {"decisions": 1, "interactions": 7}}, "interactions waiting, most"),
        ({"staleness": 1}, "age of decisions, oldest"),
        ({"dropped": 1}, "dropped and refused"),
        ({"refused": 1}, "dropped and refused"),
    ],
)
def test_what_grows_is_told(changes: dict[str, Any], name: str) -> None:
    assert failed("synchronous", make_samples(**changes)) == [f"synchronous: {name}"]


def test_asynchronous_collection_may_be_ahead() -> None:
    samples = make_samples(waiting={"decisions": 3, "interactions": 3}, staleness=2)
    assert failed("asynchronous", samples) == []


def test_a_soak_without_samples_to_judge_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--minutes=0.1"])
    assert "10 samples are needed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_runs_both_modes_and_writes_what_it_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # So short a time is all warm-up: whether memory is flat then is not asked.
    main(["--minutes=0.4", "--every=1", f"--results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    for mode in ("synchronous", "asynchronous"):
        lines = [json.loads(line) for line in (tmp_path / f"{mode}.jsonl").read_text().splitlines()]
        assert len(lines) >= 5
        assert lines[-1]["decisions"] > lines[0]["decisions"]
        assert {"learner", "actor", "actor child 1"} <= lines[-1]["rss"].keys()
        assert f"{mode}: growth of the learner" in printed
