"""What goes wrong between processes: each case with the real commands."""

import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.runtime.client import LearnerClient
from lerobot_policy_pi_rl.runtime.collector import Collector, make_groups
from lerobot_policy_pi_rl.runtime.pipeline import agreed_settings, make_player, parts
from lerobot_policy_pi_rl.runtime.wire import RolloutHeader, encode_decisions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUOTA = 16
LOADED = 150
"""Seconds for what takes some ten on a machine with nothing else to do."""

MakeRun = Callable[..., Any]


# Beginnings of arguments that another policy, algorithm or environment does not have.
POLICY = ("--policy.type", "--policy.base")
ALGORITHM = ("--algorithm.c", "--algorithm.e", "--algorithm.m")
ENVIRONMENT = ("--env.task", "--env.episode_length", "--env.reward")

# What ends with one line


@pytest.fixture(scope="module")
def hopeless(make_run: MakeRun) -> Any:
    """Commands that cannot work; two are started as a user does."""
    run = make_run()
    nowhere = run.output_dir.parent / "nowhere"
    path, stray = f"--policy.path={nowhere}/pretrained_model", f"--output_dir={nowhere}"
    return {
        "resume": run.start("lerobot-pi-rl-learner", "--resume=true", stray),
        "path": run.learner(path, stray, without=POLICY),
        "sac": run.learner("--algorithm.type=sac", stray, without=ALGORITHM),
        "simulator": run.learner("--env.type=aloha", stray, without=ENVIRONMENT),
        # Its actor starts four times; the last test looks at it. MetaWorld finds out in the worker.
        "train": make_run(
            "--steps=3",
            "--algorithm.collection.num_workers=1",
            "--env.type=metaworld",
            "--env.task=nowhere-v3",
        ).train(without=("--env.reward",)),
        "alone": run.start("lerobot-pi-rl-actor", "--algorithm.collection.connect_timeout_s=2", stray),
    }


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("resume", "no checkpoint at "),
        ("path", "holds no policy (no config.json); name a pretrained_model folder"),
        ("sac", "'sac' is trained by lerobot.rl.learner; this command trains pi_rl"),
        (
            "simulator",
            "env.type`: 'aloha' needs the package 'gym_aloha', which is not installed: pip install 'lerobot[aloha]'",
        ),
        ("alone", "no learner answers at 127.0.0.1:"),
    ],
)
def test_it_ends_with_one_line(hopeless: Any, case: str, text: str) -> None:
    assert text in hopeless[case].failure()


def test_an_actor_says_that_it_waits(hopeless: Any) -> None:
    assert any("Waiting for the learner at 127.0.0.1:" in line for line in hopeless["alone"].shown)


# A learner that goes on whatever its actors do


@pytest.fixture(scope="module")
def alive(make_run: MakeRun) -> Any:
    """A learner and an actor that would train for ever, and two commands that collide with them."""
    run = make_run("--steps=1000000", "--save_freq=20")
    run.commands = {
        "learner": run.learner(),
        "actor": run.actor(),
        "other": run.actor(1, "--policy.num_inference_steps=5", "--env.episode_length=31"),
    }
    # It must be there before the learner tells it what is wrong.
    run.commands["other"].expected_to_fail = True
    run.await_rows(lambda rows: len(rows) >= 2, "the first iterations are done", LOADED)
    run.commands["second"] = run.learner(f"--output_dir={run.output_dir.parent / 'second'}")
    run.commands["second"].expected_to_fail = True
    return run


def goes_on(run: Any, what: str, decisions: int = QUOTA) -> None:
    """The learner finishes iterations from now on, of this many decisions each."""
    done = len(run.rows())
    run.await_rows(
        lambda rows: [row["rollout/decisions"] for row in rows[done:]].count(decisions) >= 2, what, LOADED
    )


@pytest.fixture
def intruder(alive: Any, make_cfg: Callable[..., Any]) -> Iterator[tuple[LearnerClient, DecisionBatch]]:
    """Actor 5 in this process, which may send what it likes, and decisions of the right form."""
    number = "--algorithm.collection.actor_id=5"
    cfg = make_cfg(*alive.arguments, number, validate=False)
    cfg.is_actor = True
    cfg.validate()
    _, algorithm, env = parts(cfg)
    player = make_player(cfg)
    collector = Collector(player, make_groups(env, algorithm.collection), algorithm.collection, 3)
    collector.restart(0)
    decisions = collector.collect(0).decisions
    collector.close()
    client = LearnerClient("127.0.0.1", alive.port, 5, agreed_settings(cfg, player))
    try:
        client.connect(30)
        yield client, decisions
    finally:
        client.close()


def newest(run: Any) -> dict[str, Any]:
    return run.rows()[-1]


def test_decisions_with_nan_are_dropped_and_counted(
    alive: Any, intruder: tuple[LearnerClient, DecisionBatch]
) -> None:
    client, decisions = intruder
    before = newest(alive)["dropped/non_finite_decisions"]
    version = -1
    # The learner may be done with the version it had when this actor joined; for the next one it waits.
    for _ in range(2):
        weights = client.wait_weights(version, 30)
        assert weights is not None
        version = weights.header.version
        ruined = replace(
            decisions,
            reward=torch.full_like(decisions.reward, torch.nan),
            version=torch.full_like(decisions.version, version),
        )
        client.send_decisions(encode_decisions(ruined, RolloutHeader(5, version, 0)))
    # It does not come before the quotas of all who are there.
    assert client.wait_weights(version, 30) is not None
    client.close()
    alive.await_rows(
        lambda rows: rows[-1]["dropped/non_finite_decisions"] >= before + QUOTA, "they are counted", 60
    )
    assert f"Dropped {QUOTA} of {QUOTA} decisions" in alive.log("learner")
    goes_on(alive, "training goes on after decisions with NaN")


def test_malformed_messages_are_rejected_and_counted(
    alive: Any, intruder: tuple[LearnerClient, DecisionBatch]
) -> None:
    client, decisions = intruder
    before = newest(alive)["dropped/malformed_messages"]
    weights = client.wait_weights(-1, 30)
    assert weights is not None
    header = RolloutHeader(5, weights.header.version, 0)
    client.send_decisions(b"\x80\x04no safetensors")
    client.send_decisions(encode_decisions(replace(decisions, env=decisions.env - 20), header))
    client.send_decisions(encode_decisions(replace(decisions, chain=decisions.chain[:, :1]), header))
    client.send_interaction({"kind": "collection", "version": weights.header.version})
    client.close()
    alive.await_rows(
        lambda rows: rows[-1]["dropped/malformed_messages"] == before + 4, "they are counted", LOADED
    )
    log = alive.log("learner")
    assert "Rejected a message of actor 5: malformed: has decisions of another actor's environments" in log
    assert log.count("Rejected a message of actor 5: malformed") == 4
    goes_on(alive, "training goes on after malformed messages")


def test_an_actor_with_other_settings_is_refused_and_the_learner_goes_on(alive: Any) -> None:
    error = alive.commands["other"].failure()
    assert "env.episode_length: learner 30, actor 31" in error
    assert "policy.num_inference_steps: learner 4, actor 5" in error
    goes_on(alive, "training goes on after a wrong actor")


def test_a_second_learner_finds_the_port_in_use(alive: Any) -> None:
    error = alive.commands["second"].failure()
    assert f"cannot listen on 127.0.0.1:{alive.port}: " in error
    assert "--policy.actor_learner_config.learner_port" in error
    goes_on(alive, "training goes on beside a second learner")


def test_two_actors_work_together_and_one_may_die_and_come_back(alive: Any) -> None:
    second = alive.actor(1)
    # An iteration of two quotas: both had its version, because decisions of any other are dropped.
    goes_on(alive, "both actors deliver", 2 * QUOTA)
    assert newest(alive)["rollout/staleness"] == 0
    second.kill()
    goes_on(alive, "the learner goes on with the actor that is left")
    assert "Actor 1 left" in alive.log("learner")
    assert "going on with actor(s) [0]" in alive.log("learner")
    left = newest(alive)["actors/left"]
    alive.commands["impatient"] = alive.actor(1, "--algorithm.collection.connect_timeout_s=3")
    goes_on(alive, "the actor that came back delivers", 2 * QUOTA)
    assert newest(alive)["actors/left"] == left


def test_a_command_tells_how_the_learner_stands(alive: Any) -> None:
    """The two actors of the test before are at work."""
    asked = alive.start("lerobot-pi-rl-status", f"--learner=127.0.0.1:{alive.port}", alone=True)
    assert asked.wait() == 0, asked.shown
    shown = "\n".join(asked.shown)
    assert re.search(r"^training, version \d+ of ", shown, re.MULTILINE), shown
    assert "actors             2 of at most 32" in shown
    assert len(re.findall(r"joined .* ago, last sent \d+ s ago with version \d+, [\d,]+ steps/s", shown)) == 2


def test_actors_find_a_resumed_learner_or_give_up(alive: Any) -> None:
    """Of the two actors of the test before, one waits three seconds for a learner and one for two minutes."""
    alive.await_rows(lambda rows: rows[-1]["step"] > 20, "there is a checkpoint", LOADED)
    alive.commands["learner"].kill()
    assert "no learner answers at 127.0.0.1:" in alive.commands["impatient"].failure()
    assert alive.commands["actor"].running

    saved = int(alive.checkpoint().resolve().name)
    alive.commands["learner"] = alive.learner("--resume=true")
    resumes = f"Resuming at version {saved} "
    alive.await_rows(lambda rows: resumes in alive.log("learner"), "it resumes", LOADED)
    goes_on(alive, "training goes on with the actor that found the new learner")
    rows = alive.rows()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert "Actor 0 is connected again" in alive.log("actor_0")


def test_both_leave_when_they_are_asked(alive: Any) -> None:
    """First the actor, so that the learner waits for one; the learner saves what it has."""
    learner, actor = alive.commands["learner"], alive.commands["actor"]
    actor.signal(signal.SIGTERM)
    assert actor.wait(30) == 0
    alive.await_rows(
        lambda rows: "going on with none until one connects" in alive.log("learner"), "it waits", 30
    )
    learner.signal(signal.SIGTERM)
    assert learner.wait(30) == 0
    assert learner.errors() == actor.errors() == []
    assert int(alive.checkpoint().resolve().name) == newest(alive)["step"]


def test_a_run_whose_actor_cannot_start_ends_with_an_error(hopeless: Any) -> None:
    command = hopeless["train"]
    assert command.wait(LOADED) == 1
    assert any("actor 0 ended with exit code 1; ending the run" in line for line in command.shown)
    errors = command.errors()
    assert len(errors) == 1, command.shown
    assert errors[0].startswith("error: environment worker for environments 0 to 3")
