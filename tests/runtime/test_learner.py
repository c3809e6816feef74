"""Learner and actor in this process, over loopback: what a run does, and what it writes."""

import errno
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.rl.algorithms.configs import TrainingStats
from lerobot.utils.io_utils import load_json
from safetensors.torch import load_file

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm, RatioError
from lerobot_policy_pi_rl.runtime import actor as actor_module
from lerobot_policy_pi_rl.runtime import checkpoint, snapshot
from lerobot_policy_pi_rl.runtime import learner as learner_module
from lerobot_policy_pi_rl.runtime.actor import Actor, Pace
from lerobot_policy_pi_rl.runtime.checkpoint import CheckpointError, InUse
from lerobot_policy_pi_rl.runtime.client import ActorRefused, LearnerClient
from lerobot_policy_pi_rl.runtime.collector import Collected, Collector, Group
from lerobot_policy_pi_rl.runtime.evaluation import Evaluation
from lerobot_policy_pi_rl.runtime.gather import Gathered, NothingUsable
from lerobot_policy_pi_rl.runtime.guard import RUNAWAY_ITERATIONS
from lerobot_policy_pi_rl.runtime.learner import Learner, Rollouts
from lerobot_policy_pi_rl.runtime.packing import WireError
from lerobot_policy_pi_rl.runtime.pipeline import Player
from lerobot_policy_pi_rl.runtime.progress import Progress
from lerobot_policy_pi_rl.runtime.server import PortUnavailable
from lerobot_policy_pi_rl.runtime.snapshot import NotFinite
from lerobot_policy_pi_rl.runtime.statistics import learning_metrics
from lerobot_policy_pi_rl.runtime.tasks import PER_TASK
from lerobot_policy_pi_rl.runtime.wire import WeightsHeader

from .conftest import SOON, Line, MakeConfig, Train, as_actor, run_actor

pytestmark = pytest.mark.timeout(120)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether something that nobody signals becomes true soon."""
    deadline, never = time.monotonic() + SOON, Event()
    while not condition() and time.monotonic() < deadline:
        never.wait(0.01)
    return condition()


def iterations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "rollout/decisions" in row]


def evaluations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "eval/success" in row]


def reproducible(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that does not depend on the clock."""
    return {
        name: value
        for name, value in row.items()
        if name == "step" or name.split("/")[0] in ("loss", "ppo", "rollout", "gradient", "eval")
    }


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Makes the validations find a given success, one after another; the last one again and again."""

    def find(successes: list[float]) -> None:
        left = list(successes)

        def evaluate(player: Player, groups: list[Group], seeds: np.ndarray, stop: Event) -> Evaluation:
            success = left.pop(0) if len(left) > 1 else left[0]
            solved = np.arange(len(seeds)) < success * len(seeds)
            return Evaluation(solved, np.zeros(len(seeds), dtype=np.int64), ["a task"] * len(seeds))

        monkeypatch.setattr("lerobot_policy_pi_rl.runtime.actor.evaluate", evaluate)

    return find


VALIDATED = ("--env_eval_freq=1", "--eval.n_episodes=10")


def test_a_run_learns_from_every_decision(train: Train) -> None:
    rows = iterations(train("--steps=4"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["rollout/decisions"] for row in rows] == [16] * 4
    assert [row["progress/decisions"] for row in rows] == [16, 32, 48, 64]
    assert all(row["rollout/staleness"] == 0 for row in rows)
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in rows)
    # The first iteration is the critic's alone.
    assert "loss/policy" not in rows[0]
    assert all(math.isfinite(row["loss/policy"]) and math.isfinite(row["loss/value"]) for row in rows[1:])


def test_two_actors_share_the_work(train: Train) -> None:
    rows = iterations(train("--steps=3", "--env_eval_freq=2", "--eval.n_episodes=5", actors=2))
    assert [row["rollout/decisions"] for row in rows] == [32] * 3
    assert all(row["actors/connected"] == 2 for row in rows[:-1])


def test_asynchronous_actors_work_while_the_learner_updates(train: Train) -> None:
    """Every decision is learned from, none is older than allowed, and validation is of the version it is asked for."""
    rows = train(
        "--steps=6",
        "--algorithm.collection.max_staleness=2",
        "--env_eval_freq=2",
        "--eval.n_episodes=4",
        "--save_freq=3",
        actors=2,
    )
    updates = iterations(rows)
    assert [row["rollout/decisions"] for row in updates] == [32] * 6
    ages = [row["rollout/staleness_max"] for row in updates]
    assert 0 < max(ages) <= 2
    assert all(row["rollout/staleness"] <= row["rollout/staleness_max"] for row in updates)
    assert not any(row["dropped/repeated_decisions"] + row["dropped/stale_decisions"] for row in updates)
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in updates)
    assert [row["step"] for row in evaluations(rows)] == [0, 2, 4, 6]
    assert all(row["eval/episodes"] == 4 for row in evaluations(rows))


def test_an_asynchronous_collection_does_not_go_on_in_validation_episodes(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no environments for validation alone, as on a robot."""
    begun: list[list[float]] = []
    evaluated = Event()

    def evaluate(*arguments: Any) -> Evaluation:
        evaluated.set()
        return real_evaluate(*arguments)

    def collect(self: Collector, version: int, part: int = 0) -> Collected:
        if evaluated.is_set():
            evaluated.clear()
            begun.append([step for group in self._groups for step in group.raw["agent_pos"][:, 1].tolist()])
        return real_collect(self, version, part)

    real_evaluate, real_collect = actor_module.evaluate, Collector.collect
    monkeypatch.setattr(actor_module, "evaluate", evaluate)
    monkeypatch.setattr(Collector, "collect", collect)
    train(
        "--steps=4",
        "--env.limit=100",
        "--env_eval_freq=1",
        "--eval.n_episodes=3",
        "--algorithm.collection.eval_envs=0",
        "--algorithm.collection.max_staleness=1",
    )
    assert len(begun) >= 3
    assert begun == [[0.0] * 4] * len(begun)


def test_an_asynchronous_run_is_resumed(train: Train, tmp_path: Path) -> None:
    asynchronous = "--algorithm.collection.max_staleness=1"
    train("--steps=3", asynchronous)
    last = tmp_path / "run/checkpoints/last/pretrained_model/train_config.json"
    rows = iterations(train(f"--config_path={last}", "--resume=true", "--steps=6", asynchronous))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["progress/decisions"] for row in rows] == [16 * step for step in range(1, 7)]
    assert not any(row["dropped/repeated_decisions"] for row in rows)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_an_actor_is_never_too_far_ahead(max_staleness: int) -> None:
    """Whenever the learner publishes: quotas are taken in order, one per version, none too old, none missing."""
    generator = np.random.default_rng(0)
    pace, sent, taken, ages = Pace(max_staleness), [], 0, []
    while taken < 200:
        version = 5 + taken
        if pace.version < version and generator.random() < 0.4:
            pace.take(WeightsHeader(version, restart=taken == 0, evaluate=False, final=False, sent_at=0.0))
        while pace.may_collect and generator.random() < 0.9:
            part = pace.next_part()
            assert 0 <= part <= max_staleness
            sent.append(pace.version)
        if len(sent) > taken:
            ages.append(version - sent[taken])
            taken += 1
    assert min(ages) >= 0
    assert max(ages) == max_staleness


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_an_actor_that_joins_wastes_no_quota(max_staleness: int, training: bool) -> None:
    """The learner has published version 7 and either waits for its decisions or already trains on others'."""
    first = 8 if training else 7
    pace, sent = Pace(max_staleness, next_version=first), []
    for version in range(7, 20):
        pace.take(WeightsHeader(version, restart=False, evaluate=False, final=False, sent_at=0.0))
        while pace.may_collect:
            pace.next_part()
            sent.append(version)
        ages = [taken - made for taken, made in enumerate(sent, first)]
        assert all(0 <= age <= max_staleness for age in ages)
        # Where it may be ahead it is, by as much as it may.
        assert len(sent) == max(0, version - first + max_staleness + 1)


def test_every_validation_start_runs_once_however_many_actors_there_are(train: Train) -> None:
    arguments = ("--steps=2", "--env_eval_freq=1", "--eval.n_episodes=7", "--env.fate=true")
    one = evaluations(train(*arguments, folder="one"))
    two = evaluations(train(*arguments, actors=2, folder="two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [0, 1, 2]
    # Starts 500000 to 500006: three of the seven seeds are odd.
    assert all(row["eval/episodes"] == 7 for row in one + two)
    assert all(row["eval/success"] == pytest.approx(3 / 7) for row in one + two)


def test_the_best_checkpoint_is_the_last_of_the_best(
    train: Train, validations: Callable[[list[float]], None], tmp_path: Path
) -> None:
    validations([0.5, 0.7, 0.7, 0.9, 0.9, 0.8])
    rows = evaluations(train("--steps=5", "--save_freq=2", *VALIDATED))
    assert [row["eval/best_version"] for row in rows] == [0, 1, 2, 3, 4, 4]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "best").readlink() == Path("000004")
    assert (checkpoints / "last").readlink() == Path("000005")
    # Those that were written for being the best are gone since others are.
    assert sorted(path.name for path in checkpoints.glob("0*")) == ["000000", "000002", "000004", "000005"]


def test_validation_leaves_the_episodes_alone(train: Train) -> None:
    without = train("--steps=5", folder="without")
    rows = train("--steps=5", "--env_eval_freq=1", "--eval.n_episodes=5", folder="beside")
    assert list(map(reproducible, iterations(rows))) == list(map(reproducible, without))
    within = train(
        "--steps=5",
        "--env_eval_freq=1",
        "--eval.n_episodes=5",
        "--algorithm.collection.eval_envs=0",
        folder="within",
    )
    assert reproducible(iterations(within)[-1]) != reproducible(without[-1])


def test_a_run_ends_when_its_steps_are_used_up(train: Train) -> None:
    # 4 environments, 4 decisions, 5 steps each: 80 an iteration while no episode ends inside a chunk.
    rows = iterations(train("--steps=100", "--policy.online_steps=200", "--env.limit=20", "--env.fate=false"))
    assert rows[-1]["progress/env_steps"] >= 200
    assert rows[-2]["progress/env_steps"] < 200


def test_a_run_ends_when_the_policy_is_good_enough(train: Train) -> None:
    rows = train(
        "--steps=100",
        "--env_eval_freq=3",
        "--eval.n_episodes=7",
        "--env.fate=true",
        "--algorithm.stop_success=0.4",
    )
    # Known after the first evaluation, which comes with the first iteration.
    assert [row["step"] for row in iterations(rows)] == [1]


def test_a_collapsed_policy_makes_way_for_the_best_one(
    train: Train, validations: Callable[[list[float]], None], tmp_path: Path
) -> None:
    validations([0.5, 0.6, 0.9, 0.3, 0.8])
    rows = train("--steps=6", "--save_freq=1", *VALIDATED)
    assert [row["eval/success"] for row in evaluations(rows)] == [0.5, 0.6, 0.9, 0.3, 0.8, 0.8, 0.8]
    assert [row["eval/rollbacks"] for row in evaluations(rows)] == [0, 0, 0, 0, 1, 1, 1]
    # Nothing is learned from the decisions of the collapsed version 3.
    assert [row["rollout/decisions"] for row in iterations(rows)] == [16, 16, 16, 0, 16, 16]
    best, restored = (
        load_file(tmp_path / "run" / "checkpoints" / name / "pretrained_model" / "model.safetensors")
        for name in ("000002", "000004")
    )
    assert all(torch.equal(best[name], restored[name]) for name in best)
    rates = [row["ppo/lr"] for row in iterations(rows)]
    assert rates[3] < rates[1]
    assert (tmp_path / "run" / "checkpoints" / "best").readlink() == Path("000002")


def test_what_a_collapsed_policy_collected_ahead_is_not_learned_from(
    train: Train, validations: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    roll_back = Learner._roll_back

    def roll_back_late(learner: Learner, gathered: Gathered, before: Progress) -> None:
        """When the actor, which may be a quota ahead, has sent the next one of the same version."""
        assert eventually(lambda: bool(len(learner._service.decisions) or learner._gatherer._waiting))
        roll_back(learner, gathered, before)

    monkeypatch.setattr(Learner, "_roll_back", roll_back_late)
    validations([0.9, 0.9, 0.9, 0.2, 0.8])
    rows = iterations(train("--steps=6", "--algorithm.collection.max_staleness=1", *VALIDATED))
    steps = {row["step"]: row for row in rows}
    assert (steps[4]["rollout/decisions"], "loss/policy" in steps[4]) == (0, False)
    assert (steps[5]["dropped/rolled_back_decisions"], steps[5]["dropped/stale_decisions"]) == (16, 16)
    assert steps[5]["rollout/staleness_max"] == 0


def test_with_groups_every_quota_is_of_fresh_episodes(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """An episode of twelve steps takes three decisions of five steps; the fourth begins one that is left behind."""
    begun: list[list[float]] = []
    collect = Collector.collect

    def spy(self: Collector, version: int, part: int = 0) -> Collected:
        begun.append([step for group in self._groups for step in group.raw["agent_pos"][:, 1].tolist()])
        return collect(self, version, part)

    monkeypatch.setattr(Collector, "collect", spy)
    train("--steps=3", "--algorithm.advantage=group", "--algorithm.collection.group_size=2")
    assert begun == [[0.0] * 4] * 3


def test_what_is_brought_back_takes_smaller_steps_and_warms_a_cold_critic(
    train: Train, validations: Callable[[list[float]], None]
) -> None:
    validations([0.9, 0.9, 0.9, 0.2, 0.8])
    # The schedule lowers the rate in every iteration; the best is one whose critic has learned nothing.
    rows = iterations(
        train("--steps=8", "--algorithm.target_kl=1e-6", "--algorithm.critic_warmup=4", *VALIDATED)
    )
    steps = {row["step"]: row for row in rows}
    assert steps[4].keys() & {"loss/value", "ppo/epochs", "gradient/critic_norm"} == set()
    assert steps[4]["ppo/lr"] < steps[3]["ppo/lr"]
    assert steps[4]["dropped/rolled_back_decisions"] == 16
    assert (steps[4]["rollout/decisions"], steps[4]["progress/decisions"]) == (0, 3 * 16)
    assert steps[8]["progress/decisions"] == 7 * 16
    assert [step for step in steps if "loss/policy" not in steps[step]] == list(range(1, 9))


def test_a_rolled_back_run_never_learns_faster_than_before(
    train: Train, validations: Callable[[list[float]], None]
) -> None:
    validations([0.9, 0.8, 0.8, 0.8, 0.8, 0.2, 0.8])
    rows = iterations(
        train("--steps=8", "--algorithm.target_kl=1e-6", "--algorithm.critic_warmup=0", *VALIDATED)
    )
    rates = {row["step"]: row["ppo/lr"] for row in rows}
    assert rates[7] < rates[5] < rates[1]


def test_a_validation_of_few_starts_decides_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, send = [4, 0, 0], LearnerClient.send_interaction

    def send_a_share(client: LearnerClient, values: dict[str, Any], *rest: Any) -> None:
        """As the one actor of three that is left, which has four of the ten starts."""
        if values["kind"] == "evaluation":
            values = {name: value for name, value in values.items() if not name.startswith(PER_TASK)}
            values |= {"episodes": 4, "judged": 4, "successes": found.pop(0) if found else 0}
        send(client, values, *rest)

    monkeypatch.setattr(LearnerClient, "send_interaction", send_a_share)
    rows = train("--steps=3", *VALIDATED)
    assert {row["eval/rollbacks"] for row in evaluations(rows)} == {0}
    assert [row["eval/success"] for row in evaluations(rows)] == [1.0, 0.0, 0.0, 0.0]
    assert {row["eval/best_success"] for row in evaluations(rows)} == {-1.0}
    assert "has 4 of 10 starts" in caplog.text


def test_a_run_that_collapses_again_and_again_is_ended(
    train: Train,
    validations: Callable[[list[float]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    validations([0.9, 0.2])
    rows = train("--steps=50", "--algorithm.max_rollbacks=2", *VALIDATED)
    assert evaluations(rows)[-1]["eval/best_success"] == 0.9
    assert len(evaluations(rows)) < 8
    assert "fell far below the best one (0.90) for the 3. time" in caplog.text


def test_a_run_whose_success_stops_rising_is_ended(
    train: Train, validations: Callable[[list[float]], None], caplog: pytest.LogCaptureFixture
) -> None:
    validations([0.5, 0.6, 0.6])
    rows = train("--steps=50", "--algorithm.stop_patience=3", *VALIDATED)
    assert [row["eval/success"] for row in evaluations(rows)][:5] == [0.5, 0.6, 0.6, 0.6, 0.6]
    assert len(iterations(rows)) == 5
    assert "did not rise in 3 validations" in caplog.text


def test_a_run_that_cannot_be_held_back_is_ended(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    rows = iterations(
        train(
            "--steps=50",
            "--algorithm.lr=0.05",
            "--algorithm.lr_max=0.05",
            "--algorithm.lr_schedule=constant",
            "--algorithm.target_kl=1e-4",
        )
    )
    assert len(rows) < 20
    assert "nats in an iteration" in caplog.text


def test_an_iteration_under_control_between_others_begins_the_count_anew(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[dict[str, float]] = []

    def cause(statistics: dict[str, float], config: PIRLAlgorithmConfig) -> str | None:
        told.append(statistics)
        return None if len(told) in (1, 4) else f"wild in iteration {len(told)}"

    monkeypatch.setattr(learner_module, "runaway_cause", cause)
    rows = iterations(train("--steps=50"))
    assert len(rows) == 4 + RUNAWAY_ITERATIONS
    assert "Training ends early: wild in iteration 9" in caplog.text
    # All that the guard reads; the first iteration is the critic's alone.
    assert {"last_epoch_kl", "lr", "epochs", "skipped_steps", "policy_grad_norm"} <= told[1].keys()


@pytest.mark.parametrize("explorer", ["flow_sde", "flow_noise"])
def test_a_resumed_run_is_the_run(
    train: Train, explorer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = (
        f"--policy.explorer.kind={explorer}",
        "--save_freq=2",
        "--env_eval_freq=1",
        "--eval.n_episodes=6",
    )
    whole = train(*plain, "--steps=6", folder="whole")
    train(*plain, "--steps=4", folder="parts")
    assert "Settings have changed" not in caplog.text
    parts = train(*plain, "--steps=6", "--resume=true", folder="parts")
    assert "Settings have changed since then: steps: 4 -> 6\n" in caplog.text
    assert [reproducible(row) for row in whole] == [reproducible(row) for row in parts]
    one, two = (
        load_file(tmp_path / folder / "checkpoints" / "last" / "pretrained_model" / "model.safetensors")
        for folder in ("whole", "parts")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


# How a run ends


TENSORS = (
    "pretrained_model/model.safetensors",
    "algorithm/model.safetensors",
    "training_state/rng_state.safetensors",
    "training_state/policy/optimizer_state.safetensors",
    "training_state/critic/optimizer_state.safetensors",
)


def same_state(one: Path, two: Path) -> bool:
    """Whether two checkpoints have the same weights, optimizers, random state and counters but for the clock's."""
    counters = [load_json(place / "training_state/counters.json") for place in (one, two)]
    for found in counters:
        found.pop("seconds")
    rates = [load_json(place / "training_state/policy/optimizer_param_groups.json") for place in (one, two)]
    pairs = [(load_file(one / name), load_file(two / name)) for name in TENSORS]
    return (
        counters[0] == counters[1]
        and rates[0] == rates[1]
        and all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
    )


@pytest.fixture
def in_update(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has something happen in the update of a version, when the policy or the critic has taken its first steps."""

    def plan(
        version: int, happens: Callable[[PIRLAlgorithm], None], part: str = "policy", after: int = 1
    ) -> None:
        name = {"policy": "_policy_step", "critic": "_critic_step"}[part]
        step, taken = getattr(PIRLAlgorithm, name), itertools.count(1)

        def spy(algorithm: PIRLAlgorithm, *arguments: Any) -> int:
            skipped = step(algorithm, *arguments)
            if algorithm.optimization_step == version and next(taken) == after:
                happens(algorithm)
            return skipped

        monkeypatch.setattr(PIRLAlgorithm, name, spy)

    return plan


def ask_to_stop(algorithm: PIRLAlgorithm) -> None:
    algorithm.stopping._stop.set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_an_update_that_is_stopped_is_not_counted(
    train: Train, in_update: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    """Neither as learned from nor in the weights: what is saved is what the iteration before had made, to the bit."""
    train("--steps=2", "--save_freq=3", folder="before")
    monkeypatch.setattr(learner_module, "FINISH_UPDATE_S", 0.0)
    in_update(2, ask_to_stop, part)
    rows = train("--steps=4", "--save_freq=3", folder="stopped")
    assert [row["step"] for row in iterations(rows)] == [1, 2]
    before, stopped = (tmp_path / folder / "checkpoints/last" for folder in ("before", "stopped"))
    assert stopped.readlink() == Path("000002")
    assert same_state(before, stopped)


@pytest.mark.parametrize(("patience_s", "saved"), [(0.0, "000002"), (60.0, "000003")])
def test_a_run_that_was_stopped_in_an_update_is_resumed_to_the_bit(
    train: Train,
    in_update: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    patience_s: float,
    saved: str,
) -> None:
    """Whether the update was taken back or had the time to end: that version is a milestone, like each here."""
    settings = ("--steps=5", "--save_freq=1")
    whole = train(*settings, folder="whole")
    with monkeypatch.context() as patch:
        patch.setattr(learner_module, "FINISH_UPDATE_S", patience_s)
        in_update(2, ask_to_stop)
        train(*settings, folder="parts")
    last = tmp_path / "parts/checkpoints/last"
    assert last.readlink() == Path(saved)
    monkeypatch.undo()
    parts = train(*settings, "--resume=true", folder="parts")
    assert list(map(reproducible, parts)) == list(map(reproducible, whole))
    assert same_state(last, tmp_path / "whole/checkpoints/last")


def test_without_memory_for_a_copy_half_an_update_is_not_saved(
    train: Train,
    in_update: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(snapshot, "SMALL", 0)
    monkeypatch.setattr(snapshot, "free_memory", lambda: 1000.0)
    monkeypatch.setattr(learner_module, "FINISH_UPDATE_S", 0.0)
    in_update(3, ask_to_stop)
    train("--steps=5", "--save_freq=2")
    assert (tmp_path / "run/checkpoints/last").readlink() == Path("000002")
    assert "there was no memory for a copy of what it began from; a resume begins at version 2" in caplog.text


def break_a_weight(algorithm: PIRLAlgorithm) -> None:
    with torch.no_grad():
        next(algorithm.policy.parameters()).view(-1)[0] = torch.inf


def run_out_of_memory(algorithm: PIRLAlgorithm) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def refuse_a_setting(algorithm: PIRLAlgorithm) -> None:
    """As `config_error` does in a command."""
    raise SystemExit("error: it cannot work")


@pytest.mark.parametrize(
    ("happens", "error", "said"),
    [
        (break_a_weight, NotFinite, r"the update made policy\.\S+ not finite; lower algorithm.lr and"),
        (run_out_of_memory, torch.OutOfMemoryError, "CUDA out of memory"),
        (refuse_a_setting, SystemExit, "it cannot work"),
    ],
)
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_an_error_in_an_update_saves_what_was_learned_before(
    train: Train,
    in_update: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    happens: Callable[[PIRLAlgorithm], None],
    error: type[BaseException],
    said: str,
    part: str,
) -> None:
    train("--steps=2", folder="before")
    in_update(2, happens, part)
    with pytest.raises(error, match=said):
        train("--steps=4", folder="broken")
    before, broken = (tmp_path / folder / "checkpoints/last" for folder in ("before", "broken"))
    assert broken.readlink() == Path("000002")
    assert same_state(before, broken)
    assert "ends with an error; version 2 is saved, and --resume=true goes on from it" in caplog.text


@pytest.mark.parametrize("name", ["_log", "_watch", "_publish_next", "_consider_best"])
def test_an_error_between_two_updates_saves_what_was_learned(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    step = getattr(Learner, name)

    def fail(learner: Learner, *arguments: Any, **named: Any) -> Any:
        if learner._progress.version == 3:
            raise RuntimeError("it broke")
        return step(learner, *arguments, **named)

    monkeypatch.setattr(Learner, name, fail)
    with pytest.raises(RuntimeError, match="it broke"):
        train("--steps=5", "--algorithm.collection.max_staleness=1")
    last = tmp_path / "run/checkpoints/last"
    # What an update publishes early is a part of it.
    assert last.readlink() == Path("000002" if name == "_publish_next" else "000003")
    assert load_json(last / "training_state/counters.json")["version"] == int(last.readlink().name)


def test_weights_that_are_not_finite_are_never_saved(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(learner: Learner, *arguments: Any, **named: Any) -> None:
        break_a_weight(learner._algorithm)
        raise RuntimeError("it broke")

    monkeypatch.setattr(Learner, "_log", fail)
    with pytest.raises(RuntimeError, match="it broke"):
        train("--steps=5")
    assert (tmp_path / "run/checkpoints/last").readlink() == Path("000000")
    assert re.search(
        r"version 1 is not saved \(it has policy\.\S+ not finite; .*resume begins at version 0", caplog.text
    )


@pytest.fixture
def killed(train: Train, validations: Callable[[list[float]], None], tmp_path: Path) -> Path:
    """Folder of a run that was killed after version 3 was found to be the best one; `last` is version 2."""
    validations([0.5, 0.6, 0.7, 0.9])
    train("--steps=3", "--save_freq=2", *VALIDATED)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("000002")
    return checkpoints


def test_a_resumed_run_keeps_a_better_checkpoint_and_counts_it_from_its_version_on(
    train: Train, validations: Callable[[list[float]], None], killed: Path
) -> None:
    best = (killed / "best/pretrained_model/model.safetensors").read_bytes()
    validations([0.7, 0.8, 0.6])
    rows = evaluations(train("--steps=4", "--save_freq=2", "--resume=true", *VALIDATED))
    assert [row["eval/best_success"] for row in rows] == [0.5, 0.6, 0.7, 0.9, 0.9]
    assert [row["eval/best_version"] for row in rows] == [0, 1, 2, 3, 3]
    assert (killed / "best").readlink() == Path("000003")
    assert (killed / "best/pretrained_model/model.safetensors").read_bytes() == best


def test_a_resumed_run_that_comes_to_the_best_version_again_is_the_run(
    train: Train, validations: Callable[[list[float]], None], killed: Path
) -> None:
    successes = [0.5, 0.6, 0.7, 0.9, 0.8, 0.8]
    validations(successes)
    whole = train("--steps=5", "--save_freq=2", *VALIDATED, folder="whole")
    validations(successes[2:])
    rows = train("--steps=5", "--save_freq=2", "--resume=true", *VALIDATED)
    assert [reproducible(row) for row in rows] == [reproducible(row) for row in whole]
    assert (killed / "best").readlink() == Path("000003")


def test_a_resumed_run_whose_success_is_as_good_has_a_new_best_checkpoint(
    train: Train, validations: Callable[[list[float]], None], killed: Path
) -> None:
    validations([0.9, 0.5])
    rows = evaluations(train("--steps=3", "--save_freq=2", "--resume=true", *VALIDATED))
    assert [row["eval/best_version"] for row in rows] == [0, 1, 2, 2]
    assert (killed / "best").readlink() == Path("000002")


def test_what_a_resumed_run_brings_back_is_the_best_one_on_the_disk(
    train: Train, validations: Callable[[list[float]], None], killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validations([0.2, 0.8])
    rows = evaluations(train("--steps=4", "--save_freq=2", "--resume=true", *VALIDATED))
    assert [row["eval/rollbacks"] for row in rows] == [0, 0, 0, 1, 1]
    assert [row["eval/best_version"] for row in rows] == [0, 1, 1, 3, 3]
    assert "far below the best (0.90): going on from its checkpoint" in caplog.text


def test_another_checkpoint_of_its_version_leaves_the_best_one_alone(
    train: Train, validations: Callable[[list[float]], None], killed: Path
) -> None:
    """The resumed run is not the same one again: its policy is not trained."""
    best = (killed / "best/pretrained_model/model.safetensors").read_bytes()
    validations([0.7, 0.7])
    train("--steps=3", "--save_freq=2", "--resume=true", "--algorithm.critic_warmup=9", *VALIDATED)
    assert (killed / "last").readlink() == Path("000003")
    assert (killed / "last/pretrained_model/model.safetensors").read_bytes() != best
    assert (killed / "best/pretrained_model/model.safetensors").read_bytes() == best
    # It is removed like any other when it is surpassed, here by version 3 and then by version 4.
    validations([1.0])
    train("--steps=4", "--save_freq=2", "--resume=true", *VALIDATED)
    assert sorted(path.name for path in killed.glob("0*")) == ["000000", "000002", "000004"]


def test_a_learning_rate_is_changed_when_resuming(make_cfg: MakeConfig, train: Train) -> None:
    """One that is not keeps what the schedule has made of it."""
    lowered = ("--algorithm.target_kl=1e-6", "--algorithm.critic_warmup=0")
    rates = [row["ppo/lr"] for row in iterations(train("--steps=2", *lowered))]

    def resumed(*arguments: str) -> tuple[float, float]:
        algorithm = Learner(make_cfg("--resume=true", *lowered, *arguments), Event())._algorithm
        return algorithm.lr, algorithm.optimizers["critic"].param_groups[0]["lr"]

    assert rates[-1] < PIRLAlgorithmConfig().lr
    assert resumed() == (rates[-1], PIRLAlgorithmConfig().critic_lr)
    assert resumed("--algorithm.critic_lr=0.0002") == (rates[-1], 0.0002)
    assert resumed("--algorithm.lr=0.0002") == (0.0002, PIRLAlgorithmConfig().critic_lr)


def test_a_changed_rate_of_the_critic_outlives_a_roll_back(
    train: Train, validations: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    roll_back = Learner._roll_back

    def spy(learner: Learner, gathered: Gathered, before: Progress) -> None:
        roll_back(learner, gathered, before)
        found.append(learner._algorithm.optimizers["critic"].param_groups[0]["lr"])

    monkeypatch.setattr(Learner, "_roll_back", spy)
    validations([0.5, 0.9])
    train("--steps=1", *VALIDATED)
    validations([0.9, 0.2, 0.9])
    train("--steps=3", "--resume=true", "--algorithm.critic_lr=0.0002", *VALIDATED)
    assert found == [0.0002]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ((), ("--algorithm.kl_coef=0.1",), "algorithm.kl_coef: 0.0 -> 0.1"),
        ((), ("--algorithm.critic_hidden_dims=[64]",), "algorithm.critic_hidden_dims: [32] -> [64]"),
        (
            ("--algorithm.collection.group_size=2", "--algorithm.advantage=group"),
            ("--algorithm.collection.group_size=1", "--algorithm.advantage=gae"),
            "algorithm.advantage: group -> gae",
        ),
    ],
)
def test_a_setting_that_does_not_fit_the_checkpoint_is_named(
    make_cfg: MakeConfig, before: tuple[str, ...], now: tuple[str, ...], said: str
) -> None:
    Learner(make_cfg(*before), Event())._save()
    with pytest.raises(
        CheckpointError, match=re.escape(f"have changed since ({said}): put them back")
    ) as error:
        Learner(make_cfg("--resume=true", *before, *now), Event())
    assert "\n" not in str(error.value)


def test_a_run_is_the_same_again(train: Train) -> None:
    first, second = (train("--steps=3", folder=folder) for folder in ("one", "two"))
    assert [reproducible(row) for row in first] == [reproducible(row) for row in second]
    other = train("--steps=3", "--seed=4", folder="other")
    assert reproducible(first[-1]) != reproducible(other[-1])


def test_where_nobody_can_take_over_demonstrations_are_refused(make_cfg: MakeConfig) -> None:
    learner = Learner(make_cfg(), Event())
    with pytest.raises(WireError, match="nobody can take over in this environment"):
        learner._keep_shown(b"whatever it is")


def test_a_stopped_run_has_a_checkpoint_and_sends_its_actors_home(
    make_cfg: MakeConfig, free_port: int, tmp_path: Path
) -> None:
    """Also an actor that waits for weights, having delivered: the last ones repeat its version."""
    port = f"--policy.actor_learner_config.learner_port={free_port}"
    cfg = make_cfg(port, "--steps=1000000")
    learner_stop, actor_stop = Event(), Event()
    learner = Learner(cfg, learner_stop)
    # A second actor that never delivers keeps the first one waiting.
    silent = LearnerClient("127.0.0.1", free_port, 1, learner._service._settings)
    actor = Actor(as_actor(make_cfg(port, validate=False)), actor_stop)
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(learner.run)
        try:
            # Before the first one, whose quota alone would otherwise complete an iteration.
            silent.connect(SOON)
            acting = pool.submit(run_actor, actor)
            first = silent.wait_weights(-1, SOON)
            # Statistics and quota of the actor: it has delivered.
            assert eventually(lambda: learner._service.traffic().messages == 2)
            # Who asks is told while the learner waits for the second one.
            assert eventually(lambda: learner._service.status()["actors"][0]["version"] == 0)
            assert learner._service.status()["state"] == "training"
            learner_stop.set()
            training.result(SOON)
            acting.result(SOON)
            last = silent.wait_weights(first.header.version, SOON) if first else None
        finally:
            learner_stop.set()
            actor_stop.set()
            silent.close()
    assert last is not None
    assert last.header.final
    assert int((tmp_path / "run" / "checkpoints" / "last").resolve().name) == last.header.version


def test_an_actor_that_waits_for_a_learner_can_be_stopped(make_cfg: MakeConfig, free_port: int) -> None:
    cfg = make_cfg(f"--policy.actor_learner_config.learner_port={free_port}", validate=False)
    stop = Event()
    actor = Actor(as_actor(cfg), stop)
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(run_actor, actor)
        with pytest.raises(TimeoutError):
            acting.result(1.0)
        stop.set()
        acting.result(SOON)


def test_a_second_learner_leaves_the_files_of_the_first_alone(
    make_cfg: MakeConfig, free_port: int, tmp_path: Path, train: Train
) -> None:
    train("--steps=3", "--save_freq=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_bytes()
    (tmp_path / "run" / "checkpoints" / "last").unlink()
    (tmp_path / "run" / "checkpoints" / "last").symlink_to("000002")
    port = f"--policy.actor_learner_config.learner_port={free_port}"
    running = Learner(make_cfg(port, f"--output_dir={tmp_path / 'first'}"), Event())
    with running._server, pytest.raises(PortUnavailable):
        Learner(make_cfg(port, "--resume=true"), Event()).run()
    assert metrics.read_bytes() == before


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file and folder, links as what they name."""
    return {
        path: bytes(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.parent.name != "logs"
    }


def test_only_the_learner_that_owns_the_folder_changes_it(
    make_cfg: MakeConfig, free_port: int, tmp_path: Path, train: Train
) -> None:
    """Neither a second one at another port, nor an actor: the first one may be writing a checkpoint."""
    train("--steps=2", "--save_freq=1")
    folder = tmp_path / "run"
    (folder / "checkpoints/.writing-000009").mkdir()
    before = contents(folder)
    given = (f"--policy.actor_learner_config.learner_port={free_port}", "--resume=true")
    with checkpoint.owning(folder):
        with pytest.raises(InUse, match="another learner is training in"):
            Learner(make_cfg(*given), Event()).run()
        actor = Actor(as_actor(make_cfg(*given, validate=False)), Event())
        actor.close()
    assert contents(folder) == before
    stopped = Event()
    stopped.set()
    Learner(make_cfg(*given), stopped).run()
    assert not (folder / "checkpoints/.writing-000009").exists()


def test_counters_that_this_version_does_not_know_are_one_line(
    make_cfg: MakeConfig, train: Train, tmp_path: Path
) -> None:
    train("--steps=1")
    counters = tmp_path / "run/checkpoints/last/training_state/counters.json"
    counters.write_text(counters.read_text().replace('"runaways"', '"runabout"'))
    checkpoint.write_checksums(counters.parents[1])
    with pytest.raises(
        CheckpointError, match=r"has other counters than this version reads.*runabout"
    ) as error:
        Learner(make_cfg("--resume=true"), Event())
    assert "\n" not in str(error.value)


def test_checkpoints_that_could_not_be_written_are_counted(
    train: Train, validations: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._write

    def write_some(aside: Path, state: checkpoint.TrainingState) -> None:
        if state.step in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(aside, state)

    monkeypatch.setattr(checkpoint, "_write", write_some)
    # Version 2 is a milestone and, when it was validated, the best one; version 3 is the best one alone.
    validations([0.1, 0.2, 0.3, 0.4, 0.5])
    rows = iterations(train("--steps=4", "--save_freq=2", *VALIDATED))
    assert [row["checkpoint/failed"] for row in rows] == [0, 1, 2, 3]


def test_a_policy_that_does_not_score_what_it_sampled_ends_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce = PIRLAlgorithm.reduce
    calls = threading.local()

    def off(self: PIRLAlgorithm, per_step: torch.Tensor, executed: torch.Tensor) -> torch.Tensor:
        # The first reduction of an iteration is that of what was sampled.
        calls.count = getattr(calls, "count", 0) + 1
        return reduce(self, per_step, executed) + (0.1 if calls.count == 1 else 0.0)

    monkeypatch.setattr(PIRLAlgorithm, "reduce", off)
    with pytest.raises(RatioError, match=r"actor\(s\) \[0\] .* ratio is off by") as error:
        train("--steps=2")
    assert "\n" not in str(error.value)


def test_an_actor_that_is_off_is_refused_by_name_and_the_others_go_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collect = Collector.collect

    def off(self: Collector, version: int, part: int = 0) -> Collected:
        found = collect(self, version, part)
        second = (found.decisions.env >= 4)[:, None]
        return replace(
            found, decisions=replace(found.decisions, log_prob=found.decisions.log_prob + 0.005 * second)
        )

    monkeypatch.setattr(Collector, "collect", off)
    with pytest.raises(
        ActorRefused, match=r"actor 1 ends: the learner rejected its decisions: other log-prob"
    ):
        train("--steps=3", actors=2)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/decisions"] for row in rows] == [16, 16, 16]
    assert [row["progress/decisions"] for row in rows] == [16, 32, 48]
    assert rows[0]["dropped/mismatched_decisions"] == 16
    assert all(row["ppo/ratio_first_error"] <= 1e-3 for row in rows)
    assert (tmp_path / "run/checkpoints/last").readlink() == Path("000003")
    said = [record.getMessage() for record in caplog.records if "Rejected a message" in record.getMessage()]
    assert said
    assert all(line.startswith("Rejected a message of actor 1: other log-probabilities") for line in said)


def test_actors_that_are_all_off_are_named_together(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = Collector.collect

    def off(self: Collector, version: int, part: int = 0) -> Collected:
        found = collect(self, version, part)
        return replace(found, decisions=replace(found.decisions, log_prob=found.decisions.log_prob + 0.005))

    monkeypatch.setattr(Collector, "collect", off)
    with pytest.raises(RatioError, match=r"actor\(s\) \[0, 1\]"):
        train("--steps=2", actors=2)


def test_a_run_of_which_nothing_is_usable_names_the_actor_and_saves(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    collect = Collector.collect

    def ruin(self: Collector, version: int, part: int = 0) -> Collected:
        found = collect(self, version, part)
        if version < 3:
            return found
        rewards = torch.full_like(found.decisions.reward, torch.nan)
        return replace(found, decisions=replace(found.decisions, reward=rewards))

    monkeypatch.setattr(Collector, "collect", ruin)
    with pytest.raises(NothingUsable, match=r"every decision of version 3 from actor\(s\) \[0\] was dropped"):
        train("--steps=5")
    assert (tmp_path / "run/checkpoints/last").readlink() == Path("000003")


def test_rollouts_are_read_once() -> None:
    rollouts = Rollouts()
    rollouts.put("rollout")  # type: ignore[arg-type]
    assert list(rollouts) == ["rollout"]
    assert list(rollouts) == []


def test_metrics_have_the_names_of_their_page() -> None:
    stats = TrainingStats(losses={"value_loss": 1.0}, grad_norms={"policy": 2.0}, extra={"approx_kl": 3.0})
    assert learning_metrics(stats) == {"loss/value": 1.0, "gradient/policy_norm": 2.0, "ppo/approx_kl": 3.0}


def test_a_run_without_success_has_no_success_in_its_metrics(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Absent, not 0; nothing is the best, and a wanted success ends the run."""
    step = Line.step
    monkeypatch.setattr(Line, "step", lambda self, action: (*step(self, action)[:4], {"speed": 1.0}))
    rows = train("--steps=4", "--algorithm.collection.num_workers=0", *VALIDATED)
    assert len(iterations(rows)) == 4
    assert iterations(rows)[-1]["progress/episodes"] > 0
    assert not any(name.startswith(("rollout/success", "eval/")) for row in rows for name in row)
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    assert caplog.text.count("none said whether its task was solved") == 1
    caplog.clear()
    rows = train("--steps=4", "--algorithm.stop_success=0.9", *VALIDATED, folder="wanted")
    assert len(iterations(rows)) == 1
    assert (
        "Training ends early: the environments do not say which validation starts were solved" in caplog.text
    )
