"""How the parser's mistakes are shown, and how a learner says that it is ready."""

import argparse
import os
import sys
from pathlib import Path

import pytest
from draccus.utils import DecodingError, ParsingError
from draccus.wrappers import docstring

from lerobot_policy_pi_rl.scripts.console import READY, one_line, run_command, tell_ready
from lerobot_policy_pi_rl.scripts.learner import learn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nonsense=1"], "error: unrecognized arguments: --nonsense=1\n"),
        (["--seed=abc"], "error: `seed`: Could not decode the value into any of the given types: int: "),
        (["--env.type=nothing"], "error: argument --env.type: invalid choice: 'nothing' (choose from "),
        (["--discover_packages_path=no.such.package"], "error: Failed to load plugin 'no.such.package'."),
    ],
)
def test_a_mistake_that_only_the_parser_knows_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    before = argparse.ArgumentParser.error, DecodingError.__str__, docstring.get_attribute_docstring
    monkeypatch.setattr(sys, "argv", ["lerobot-pi-rl-learner", "--policy.type=pi_rl", *arguments])
    with pytest.raises(SystemExit) as left:
        run_command(learn)
    shown = capsys.readouterr()
    assert left.value.code == 1
    assert shown.out == ""
    assert shown.err.startswith(said)
    assert shown.err.count("\n") == 1
    assert (argparse.ArgumentParser.error, DecodingError.__str__, docstring.get_attribute_docstring) == before


def test_a_class_that_cannot_be_made_is_named_with_the_cause() -> None:
    error = ParsingError("Couldn't instantiate class A using the given arguments.")
    error.__cause__ = ValueError("b must be\nabove 0")
    assert one_line(error) == "Couldn't instantiate class A using the given arguments. b must be; above 0"


def test_a_learner_tells_once_that_it_is_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    monkeypatch.setenv(READY, str(writing))
    tell_ready()
    tell_ready()
    # The end of the file: the descriptor is closed, so that nobody inherits it.
    assert [os.read(reading, 9), os.read(reading, 9)] == [b"\n", b""]
    os.close(reading)
