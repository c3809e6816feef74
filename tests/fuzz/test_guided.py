"""The coverage-guided fuzzer: it runs, it is guided, and it finds what there is to find."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
HERE = Path(__file__).parent
# A decoder that takes for granted that the version is there.
BROKEN = """
import guided
from guided import fuzz_messages

def check(data):
    fuzz_messages.decode_interaction(data)["version"]

fuzz_messages.MESSAGES["broken"] = check, fuzz_messages.INTERACTION
guided.main(["broken", "--seconds=100", "--corpus={corpus}"])
"""


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_seconds_of_it_find_nothing(tmp_path: Path) -> None:
    kinds = ["decisions", "demonstrations", "weights", "interaction", "introduction"]
    done = run([str(HERE / "guided.py"), *kinds, "--seconds=4", f"--corpus={tmp_path}"], tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    executed = re.findall(r"number_of_executed_units: (\d+)", said)
    assert len(executed) == len(kinds)
    assert all(int(count) > 500 for count in executed)
    # What reached new branches was kept, beside the valid message, and nothing else was found.
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(kinds)
    assert all(len(list((tmp_path / kind).iterdir())) > 10 for kind in kinds)


def test_it_finds_a_decoder_that_stumbles(tmp_path: Path) -> None:
    done = run(["-c", BROKEN.format(corpus=tmp_path)], tmp_path)
    assert done.returncode != 0
    assert "KeyError: 'version'" in done.stdout + done.stderr
    assert len(list(tmp_path.glob("broken-crash-*"))) == 1
