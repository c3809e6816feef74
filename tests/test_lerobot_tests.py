"""What is called a difference between two runs of LeRobot's tests."""

import sys
from pathlib import Path

import pytest

# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.lerobot_tests import compare, main, read_outcomes

REPORT = """<testsuites><testsuite>
<testcase classname="tests.rl.test_queue" name="test_get"/>
<testcase classname="tests.rl.test_queue" name="test_put"><failure message="two
lines">a trace</failure></testcase>
<testcase classname="tests.rl.test_actor" name="test_run"><error message="no fixture">a trace</error></testcase>
<testcase classname="tests.rl.test_actor" name="test_far"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_compared_test_by_test(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    outcomes = read_outcomes(report)
    assert outcomes == {
        "tests.rl.test_queue::test_get": ("passed", ""),
        "tests.rl.test_queue::test_put": ("failed", "two lines"),
        "tests.rl.test_actor::test_run": ("failed", "no fixture"),
        "tests.rl.test_actor::test_far": ("skipped", "needs a GPU"),
    }
    same = compare(outcomes, outcomes)
    assert same["with"] == same["without"] == {"passed": 1, "skipped": 1, "failed": 2}
    assert same["different"] == {}
    assert same["skipped"] == {"tests.rl.test_actor::test_far": "needs a GPU"}
    # The counts alone would not show it.
    other = {
        "tests.rl.test_queue::test_get": ("failed", "broken"),
        "tests.rl.test_queue::test_put": ("passed", ""),
        "tests.rl.test_actor::test_run": ("failed", "no fixture"),
        "tests.rl.test_actor::test_new": ("skipped", ""),
    }
    assert compare(outcomes, other)["different"] == {
        "tests.rl.test_queue::test_get": ("passed", "failed"),
        "tests.rl.test_queue::test_put": ("failed", "passed"),
        "tests.rl.test_actor::test_far": ("skipped", "not run"),
        "tests.rl.test_actor::test_new": ("not run", "skipped"),
    }


def test_a_folder_that_is_no_checkout_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path} has no tests/rl: check out the tag v0.6.1 of LeRobot there" in capsys.readouterr().err
