"""LeRobot's own tests of what this package builds on, with the package loaded and without it.

    git clone --branch v0.6.1 --depth 1 https://github.com/huggingface/lerobot /tmp/lerobot
    python -m benchmarks.lerobot_tests /tmp/lerobot

The tests come from the checkout, what they test is the installed LeRobot. Outcomes are compared test by test and go to
`benchmarks/results/lerobot_tests.json`, and a difference is exit code 1. Nothing is fetched from the hub.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.run import FOLDER, RESULTS

TESTS = (
    "tests/rl",
    "tests/transport",
    "tests/policies/test_gaussian_actor_config.py",
    "tests/policies/test_gaussian_actor_policy.py",
)
PLUGIN = "benchmarks.with_pi_rl"
PACKAGES = ("lerobot", "lerobot_policy_pi_rl", "torch", "grpcio", "pytest")
REASON_CHARACTERS = 200

# Outcome of each test by name, with the reason why it did not pass.
Outcomes = dict[str, tuple[str, str]]


def run_tests(checkout: Path, arguments: Sequence[str]) -> Outcomes:
    """Runs the tests in a process of their own.

    Raises:
        RuntimeError: They could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*pytest_command(arguments), "-p", "no:cacheprovider", f"--junitxml={report}"]
        path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        ended = subprocess.run(command, cwd=checkout, env=environment)
        # 1: some have failed, which is an outcome.
        if ended.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with exit code {ended.returncode}: {' '.join(command)}")
        return read_outcomes(report)


def pytest_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", *arguments, *TESTS]


def read_outcomes(report: Path) -> Outcomes:
    """Reads a report in JUnit's format."""
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if found is None else {"skipped": "skipped"}.get(found.tag, "failed")
        reason = "" if found is None else " ".join((found.get("message") or "").split())
        outcomes[name] = (kind, reason[:REASON_CHARACTERS])
    return outcomes


def compare(without: Outcomes, loaded: Outcomes) -> dict[str, Any]:
    """Counts of both, what did not pass and why, and every test whose outcome is not the same.

    Args:
        without: Outcomes without the package.
        loaded: Outcomes with it.
    """
    missing = ("not run", "")
    kinds = {
        name: (without.get(name, missing)[0], loaded.get(name, missing)[0])
        for name in sorted(without.keys() | loaded.keys())
    }
    return {
        "without": counts(without),
        "with": counts(loaded),
        "different": {name: both for name, both in kinds.items() if both[0] != both[1]},
        **{
            kind: {name: reason for name, (found, reason) in sorted(loaded.items()) if found == kind}
            for kind in ("failed", "skipped")
        },
    }


def counts(outcomes: Outcomes) -> Mapping[str, int]:
    found = Counter(kind for kind, _ in outcomes.values())
    return {kind: found[kind] for kind in ("passed", "skipped", "failed")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lerobot_tests", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkout", type=Path, help="of LeRobot, at the tag of the installed version")
    parser.add_argument("--results", type=Path, default=RESULTS / "lerobot_tests.json")
    options = parser.parse_args(arguments)
    absent = [test for test in TESTS if not (options.checkout / test).exists()]
    if absent:
        parser.error(
            f"{options.checkout} has no {absent[0]}: check out the tag v{version('lerobot')} of LeRobot there"
        )
    found = compare(run_tests(options.checkout, []), run_tests(options.checkout, ["-p", PLUGIN]))
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    command = " ".join(["python", *pytest_command([])[1:]])
    report = {"command": command, "with_also": f"-p {PLUGIN}", "versions": versions, **found}
    options.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: found[name] for name in ("without", "with", "different")}, indent=1))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
