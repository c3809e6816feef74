"""Token and certificates with the real commands: who trains, who is refused, and where the token is afterwards."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lerobot_policy_pi_rl.algorithm.configuration_security import TOKEN_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOKEN, WRONG = "c0ffee" * 6, "decaf0" * 6
LOADED = 150
"""Seconds for what takes some ten on a machine with nothing else to do."""
OPEN = "--policy.actor_learner_config.learner_host=0.0.0.0"
SECURITY = "--algorithm.security"

MakeRun = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Any:
    """Without a token of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(TOKEN_VARIABLE, raising=False)
        yield patch


def files(certificates: Path, name: str) -> list[str]:
    """Options for the certificate of one side."""
    return [
        f"{SECURITY}.certificate={certificates / name}.pem",
        f"{SECURITY}.key={certificates / name}.key",
        f"{SECURITY}.authority={certificates / 'authority.pem'}",
        f"{SECURITY}.mutual=true",
    ]


def holding(folder: Path, text: str) -> list[Path]:
    """Files below a folder that have a text in them."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if text.encode() in path.read_bytes()]


# What ends with one line


@pytest.fixture(scope="module")
def hopeless(make_run: MakeRun, certificates: Path) -> Any:
    """Learners and an actor that cannot begin, started together."""
    run = make_run()
    nowhere = certificates / "nowhere.pem"
    return {
        "open": run.learner(OPEN),
        "file": run.learner(f"{SECURITY}.token_file={nowhere}"),
        "certificate": run.learner(f"{SECURITY}.certificate={nowhere}", f"{SECURITY}.key={nowhere}"),
        "authority": run.actor(0, f"{SECURITY}.authority={nowhere}"),
    }


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        (
            "open",
            ["0.0.0.0 is open to other machines", TOKEN_VARIABLE, f"{SECURITY[2:]}.token_file", "127.0.0.1"],
        ),
        ("file", ["security.token_file", "nowhere.pem cannot be read"]),
        ("certificate", ["security.certificate", "nowhere.pem cannot be read"]),
        ("authority", ["security.authority", "nowhere.pem cannot be read"]),
    ],
)
def test_it_ends_with_one_line(hopeless: Any, case: str, texts: list[str]) -> None:
    error = hopeless[case].failure(LOADED)
    for text in texts:
        assert text in error


# A learner that demands all there is


@pytest.fixture(scope="module")
def guarded(make_run: MakeRun, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A learner with token and mutual TLS that is open to other machines, three actors that it refuses, and its own."""
    folder = tmp_path_factory.mktemp("tokens")
    for name, text in (("right", TOKEN), ("wrong", WRONG)):
        (folder / name).write_text(f"{text}\n")
        (folder / name).chmod(0o600)
    right, wrong = (f"{SECURITY}.token_file={folder / name}" for name in ("right", "wrong"))
    run = make_run("--steps=2", "--save_freq=1")
    actor, authority = files(certificates, "actor"), f"{SECURITY}.authority={certificates / 'authority.pem'}"
    run.commands = {
        "learner": run.learner(OPEN, right, *files(certificates, "learner")),
        "wrong token": run.actor(1, wrong, *actor),
        "no token": run.actor(2, *actor),
        "no certificate": run.actor(3, right, authority),
    }
    for name in ("wrong token", "no token", "no certificate"):
        run.commands[name].wait(LOADED)
    run.commands["actor"] = run.actor(0, right, *actor)
    return run


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("wrong token", "has another access token; put the learner's into"),
        ("no token", "wants an access token, and this actor has none; put the learner's into"),
        ("no certificate", "it does not accept this actor's certificate"),
    ],
)
def test_the_wrong_actor_ends_with_one_line(guarded: Any, case: str, text: str) -> None:
    assert text in guarded.commands[case].failure(LOADED)


def test_the_right_actor_trains_and_the_others_left_no_trace(guarded: Any) -> None:
    assert guarded.commands["learner"].wait(LOADED) == 0, guarded.commands["learner"].shown
    assert guarded.commands["actor"].wait(LOADED) == 0, guarded.commands["actor"].shown
    assert [row["step"] for row in guarded.rows()] == [1, 2]
    assert all(row["rollout/decisions"] == 16 for row in guarded.rows())
    # Their tokens were looked at; the one without a certificate did not even get so far.
    assert guarded.rows()[-1]["actors/refused"] == 2
    log = guarded.log("learner")
    assert log.count("Refused") == 2
    assert "Actor 0 joined" in log
    assert not any(f"Actor {number} joined" in log for number in (1, 2, 3))


def test_secrets_are_in_no_log_checkpoint_or_configuration(guarded: Any, certificates: Path) -> None:
    """What is searched holds the consoles of all commands, logs, checkpoints and metrics."""
    folder = guarded.output_dir.parent
    config = guarded.checkpoint() / "pretrained_model" / "train_config.json"
    security = json.loads(config.read_text())["algorithm"]["security"]
    assert security["token_file"].endswith("/right")
    assert holding(folder, "Listening on")
    for secret in (TOKEN, WRONG, (certificates / "learner.key").read_text().splitlines()[1]):
        assert holding(folder, secret) == []


def test_a_token_in_the_environment_is_enough_on_one_machine(make_run: MakeRun, environment: Any) -> None:
    environment.setenv(TOKEN_VARIABLE, TOKEN)
    run = make_run("--steps=1")
    command = run.train(OPEN)
    environment.delenv(TOKEN_VARIABLE)
    assert command.wait(LOADED) == 0, command.shown
    assert command.errors() == []
    assert [row["step"] for row in run.rows()] == [1]
    assert run.rows()[0]["actors/refused"] == 0
    assert holding(run.output_dir.parent, TOKEN) == []


def test_tls_without_certificates_of_actors_trains(make_run: MakeRun, certificates: Path) -> None:
    run = make_run("--steps=1")
    commands = [side(*files(certificates, "learner")[:-1]) for side in (run.learner, partial(run.actor, 0))]
    for command in commands:
        assert command.wait(LOADED) == 0, command.shown
    assert [row["step"] for row in run.rows()] == [1]
