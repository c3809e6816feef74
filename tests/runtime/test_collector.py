"""The collector, on an environment that is stepped again by hand."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.envs import EnvConfig
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_policy_pi_rl.algorithm.advantages import has_successor, time_order
from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import prepare
from lerobot_policy_pi_rl.runtime import environments
from lerobot_policy_pi_rl.runtime.check import first_ratio_error
from lerobot_policy_pi_rl.runtime.collector import Collector, SuccessReports
from lerobot_policy_pi_rl.runtime.pipeline import wire_spec
from lerobot_policy_pi_rl.runtime.pool import ChunkStep
from lerobot_policy_pi_rl.runtime.seeds import stream
from lerobot_policy_pi_rl.runtime.wire import (
    RolloutHeader,
    decode_decisions,
    encode_decisions,
    encode_interaction,
    finite_rows,
)
from lerobot_policy_pi_rl.runtime.workers import EnvironmentFailed

from .conftest import Line, LineConfig

MakeCollector = Callable[..., Collector]
Simulate = Callable[..., dict[str, Any]]

# Enough decisions for several episodes of each kind.
LONG = "--algorithm.collection.decisions=12"


def columns(batch: DecisionBatch, *without: str) -> dict[str, Any]:
    """All columns by name, but some; dicts flattened."""
    flat: dict[str, Any] = {}
    for entry in fields(batch):
        value = getattr(batch, entry.name)
        flat.update(
            {f"{entry.name}.{key}": inner for key, inner in value.items()}
            if isinstance(value, dict)
            else {entry.name: value}
        )
    return {name: value for name, value in flat.items() if name not in without}


def assert_same(one: DecisionBatch, two: DecisionBatch, *without: str) -> None:
    """Equal to the bit."""
    ours, theirs = columns(one, *without), columns(two, *without)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        assert same, name


def test_the_same_seed_actor_and_version_give_the_same_decisions(make_collector: MakeCollector) -> None:
    batches = []
    for _ in range(2):
        collector = make_collector(LONG)
        collector.restart(5)
        batches.append(collector.collect(5).decisions)
    assert_same(*batches)


@pytest.mark.parametrize(
    "changes", [("--seed=4", 5), ("--algorithm.collection.actor_id=1", 5), ("--seed=3", 6)]
)
def test_another_seed_actor_or_version_gives_others(
    make_collector: MakeCollector, changes: tuple[str, int]
) -> None:
    plain, other = make_collector(), make_collector(changes[0])
    # One set of weights: only what is random in the collection may differ.
    other._player.policy.load_state_dict(plain._player.policy.state_dict())
    batches = []
    for collector, version in ((plain, 5), (other, changes[1])):
        collector.restart(version)
        batches.append(collector.collect(version).decisions)
    one, two = batches
    # The first step of four environments: where the episodes start, and the first noise.
    assert not torch.equal(one.observation[OBS_STATE][:4], two.observation[OBS_STATE][:4])
    assert not torch.equal(one.chain[:4, 0], two.chain[:4, 0])


def test_it_does_not_matter_which_group_is_ready_first(
    make_collector: MakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    for pick in (lambda vectors: 0, lambda vectors: len(vectors) - 1):
        monkeypatch.setattr("lerobot_policy_pi_rl.runtime.collector.first_ready", pick)
        collector = make_collector(LONG, "--algorithm.collection.num_workers=2")
        assert len(collector._groups) == 2
        collector.restart(5)
        batches.append(DecisionBatch.concatenate([collector.collect(v).decisions for v in (5, 6)]))
    assert_same(*batches)


def test_environments_of_a_group_begin_their_episodes_from_the_same_starts(
    make_collector: MakeCollector,
) -> None:
    collector = make_collector(
        LONG, "--algorithm.collection.group_size=2", "--algorithm.advantage=group", "--env.fate=true"
    )
    collector.restart(5)
    batch = collector.collect(5).decisions
    starts = {env: [] for env in range(4)}
    ended = dict.fromkeys(starts, True)
    for row in range(len(batch)):
        env = int(batch.env[row])
        if ended[env]:
            starts[env].append(batch.observation[OBS_STATE][row].tolist())
        ended[env] = bool(batch.terminated[row] | batch.truncated[row])
    assert all(len(seen) > 1 for seen in starts.values())
    for one, two in ((0, 1), (2, 3)):
        assert all(a == b for a, b in zip(starts[one], starts[two], strict=False))
    assert starts[0][0] != starts[2][0]


def test_a_restart_forgets_all_that_was_before(make_collector: MakeCollector) -> None:
    used, fresh = make_collector(LONG), make_collector(LONG)
    used.restart(0)
    for version in range(3):
        used.collect(version)
    batches = []
    for collector in (used, fresh):
        collector.restart(3)
        batches.append((collector.collect(3).decisions, collector.collect(4).decisions))
    for one, two in zip(*batches, strict=True):
        # A decision's number goes on counting; what it is and did is the same.
        assert_same(one, two, "index")
        assert (one.index - two.index).unique().tolist() == [36]


def test_without_a_restart_episodes_go_on(make_collector: MakeCollector) -> None:
    collector = make_collector("--env.limit=1000")
    collector.restart(0)
    first, second = collector.collect(0).decisions, collector.collect(1).decisions
    after = {
        int(first.env[row]): observation
        for row, observation in zip(first.next_row.tolist(), first.next_observation[OBS_STATE], strict=True)
    }
    for row in range(4):
        env = int(second.env[row])
        if env in after:
            assert torch.equal(second.observation[OBS_STATE][row], after[env])
    assert len(after) > 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_decision_is_what_the_environment_did(
    make_collector: MakeCollector, simulate: Simulate, workers: int
) -> None:
    collector = make_collector(LONG, f"--algorithm.collection.num_workers={workers}")
    collector.restart(0)
    batch = collector.collect(0).decisions
    state, next_state = batch.observation[OBS_STATE].numpy(), batch.next_observation[OBS_STATE].numpy()
    own = {row: next_state[place] for place, row in enumerate(batch.next_row.tolist())}
    place = {
        (int(env), int(index)): row
        for row, (env, index) in enumerate(zip(batch.env, batch.index, strict=True))
    }
    for row in range(len(batch)):
        expected = simulate(state[row], batch.action[row].numpy())
        for name in ("executed", "terminated", "truncated", "success"):
            assert getattr(batch, name)[row].item() == expected[name], name
        assert batch.reward[row].item() == pytest.approx(expected["reward"], rel=1e-6)
        successor = place.get((int(batch.env[row]), int(batch.index[row]) + 1))
        # A success has no next value; a truncation carries its true last observation, not the next episode's first.
        assert (row in own) == (expected["truncated"] or (successor is None and not expected["terminated"]))
        if row in own:
            np.testing.assert_array_equal(own[row], expected["next"])
        elif successor is not None and not expected["terminated"]:
            np.testing.assert_array_equal(state[successor], expected["next"])
        if successor is not None and (expected["terminated"] or expected["truncated"]):
            assert state[successor][1] == 0
    # Otherwise the loop above has shown less than it says.
    assert batch.terminated.any()
    assert batch.truncated.any()
    assert not batch.truncated[len(batch) - 4 :].all()


AHEAD = [
    LONG,
    "--policy.chunk_size=5",
    "--policy.n_action_steps=3",
    "--algorithm.collection.lookahead_steps=2",
]


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_lookahead_chunks_continue_where_the_one_before_has_ended(
    make_collector: MakeCollector, simulate: Simulate, workers: int
) -> None:
    """Each decision has seen what was there two steps before its first one, and its chunk begins with its third action.

    Only the first one of an episode sees where it begins.
    """
    collector = make_collector(*AHEAD, f"--algorithm.collection.num_workers={workers}")
    collector.restart(0)
    batch = collector.collect(0).decisions
    state, next_state = batch.observation[OBS_STATE].numpy(), batch.next_observation[OBS_STATE].numpy()
    own = {row: next_state[place] for place, row in enumerate(batch.next_row.tolist())}
    for env in range(4):
        passed: list[np.ndarray] = []
        for row in (batch.env == env).nonzero()[:, 0].tolist():
            delay = int(batch.delay[row])
            assert delay == (2 if passed else 0)
            passed = passed or [state[row]]
            np.testing.assert_array_equal(state[row], passed[-1 - delay])
            chunk, begin = batch.action[row, delay : delay + 3].numpy(), passed[-1]
            expected = simulate(begin, chunk)
            for name in ("executed", "terminated", "truncated", "success"):
                assert getattr(batch, name)[row].item() == expected[name] or is_cut(batch, row, name), name
            assert batch.reward[row].item() == pytest.approx(expected["reward"], rel=1e-6)
            passed += [simulate(begin, chunk[:count])["next"] for count in range(1, expected["executed"] + 1)]
            if row in own:
                np.testing.assert_array_equal(own[row], passed[max(len(passed) - 3, 0)])
            if batch.terminated[row] or batch.truncated[row]:
                passed = []
    # Otherwise the loop above has shown less than it says.
    assert batch.terminated.any()
    assert batch.truncated.any()
    # A quota ends and the simulation stands still: the next one goes on as if nothing was.
    after = collector.collect(1).decisions
    for last, first in zip(at(batch, 11), at(after, 12), strict=True):
        goes_on = not (batch.terminated | batch.truncated)[last]
        assert after.delay[first] == (2 if goes_on else 0)
        if goes_on:
            np.testing.assert_array_equal(after.observation[OBS_STATE][first].numpy(), own[last])


def at(batch: DecisionBatch, index: int) -> list[int]:
    """Rows of the decision of a number, environment by environment."""
    return (batch.index == index).nonzero()[:, 0].tolist()


def is_cut(batch: DecisionBatch, row: int, name: str) -> bool:
    """Whether it is an environment's first episode, which ends on demand so that they are not all in step."""
    return name == "truncated" and bool(batch.truncated[row]) and int(batch.index[row]) < 4


def test_with_a_lookahead_the_density_covers_all_that_was_executed(make_collector: MakeCollector) -> None:
    """It differs where a recorded number of a step up to the last executed one does, and nowhere else."""
    collector = make_collector(*AHEAD)
    collector.restart(0)
    collected = collector.collect(0)
    batch = collected.decisions
    config = PIRLAlgorithmConfig(minibatch_size=8, policy_config=collector._player.policy.config)
    algorithm = PIRLAlgorithm(collector._player.policy, config)

    def error(rows: Tensor, step: int) -> float:
        changed = batch.log_prob.clone()
        changed[rows, step] += 1.0
        return first_ratio_error(
            collector._player,
            algorithm,
            replace(collected, decisions=replace(batch, log_prob=changed)),
        )

    fresh, whole = batch.delay == 0, batch.executed == 3
    assert error(fresh & ~fresh, 0) <= algorithm.ratio_tolerance
    assert error(fresh & whole, 2) > 0.5
    assert error(fresh, 3) <= algorithm.ratio_tolerance
    assert error(~fresh & whole, 4) > 0.5
    assert error(~fresh & (batch.executed < 2), 3) <= algorithm.ratio_tolerance


def test_two_groups_give_the_rows_of_one(make_collector: MakeCollector) -> None:
    batches = []
    for workers in (1, 2):
        collector = make_collector(LONG, f"--algorithm.collection.num_workers={workers}")
        assert len(collector._groups) == workers
        collector.restart(0)
        batches.append(collector.collect(0).decisions)
    one, two = batches
    layouts = [
        {
            name: value.shape[1:] if isinstance(value, Tensor) else None
            for name, value in columns(batch).items()
        }
        for batch in batches
    ]
    assert layouts[0] == layouts[1]
    assert len(one) == len(two) == 48
    for batch in batches:
        pairs = sorted(zip(batch.env.tolist(), batch.index.tolist(), strict=True))
        assert pairs == [(env, index) for env in range(4) for index in range(12)]


def test_environments_are_numbered_over_all_actors(make_collector: MakeCollector) -> None:
    collector = make_collector("--algorithm.collection.actor_id=2")
    collector.restart(0)
    first, second = collector.collect(7).decisions, collector.collect(8).decisions
    assert first.env.tolist() == [8, 9, 10, 11] * 4
    assert first.index.tolist() == [step for step in range(4) for _ in range(4)]
    assert second.index.tolist() == [step for step in range(4, 8) for _ in range(4)]
    assert first.version.tolist() == [7] * 16
    assert first.task == ["move right"] * 16


def test_every_end_and_every_step_is_told(make_collector: MakeCollector) -> None:
    collector = make_collector(LONG)
    collector.restart(0)
    collected = [collector.collect(version) for version in range(2)]
    batch = DecisionBatch.concatenate([part.decisions for part in collected])
    statistics = [part.statistics for part in collected]
    assert sum(part.ended for part in statistics) == int((batch.terminated | batch.truncated).sum())
    assert sum(part.env_steps for part in statistics) == int(batch.executed.sum())


class Coin(Line):
    """Solved at its first step from an odd start, never from an even one: half of the starts."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.lucky = bool(seed % 2)
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        return super().step(action)[0], float(self.lucky), self.lucky, False, {"is_success": self.lucky}


@EnvConfig.register_subclass("test_coin")
@dataclass
class CoinConfig(LineConfig):
    episode_length: int = 8

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"coin": {0: gym.vector.SyncVectorEnv([lambda: Coin(self.limit)] * n_envs)}}


COIN = ("--env.type=test_coin", "--policy.n_action_steps=1", "--algorithm.collection.num_envs=32")


def test_success_is_that_of_all_episodes_that_began_early_enough(make_collector: MakeCollector) -> None:
    """Solved episodes end at once and failed ones after 8 decisions: of those that have ended, too many are solved."""
    collector = make_collector(*COIN)
    collector.restart(0)
    collected = [collector.collect(version) for version in range(8)]
    statistics = [part.statistics for part in collected]
    # Nothing that has begun must have ended in the first quota of four decisions.
    assert statistics[0].episodes == 0
    assert statistics[0].ended > 16
    batch = DecisionBatch.concatenate([part.decisions for part in collected])
    began, solved = [], []
    for env in range(32):
        rows = (batch.env == env).nonzero()[:, 0]
        done = (batch.terminated | batch.truncated)[rows]
        # Where an episode begins; the first one of an environment may be cut and does not count where it would be.
        starts = [int(row) + 1 for row in done.nonzero()[:, 0]]
        cut_after = int(env * (1 + 5**0.5) / 2 % 1 * 8)
        began += [0] * (cut_after == 0) + starts
        firsts = [0] * (cut_after == 0) + starts
        solved += [bool(batch.success[rows[first]]) if first < len(rows) else None for first in firsts]
    for quota in range(8):
        due = [row for row, first in enumerate(began) if 4 * quota < first + 8 <= 4 * quota + 4]
        assert statistics[quota].episodes == statistics[quota].judged == len(due)
        assert statistics[quota].successes == sum(bool(solved[row]) for row in due)
        # A solved one has one step and a return of 1, another one 8 steps and none.
        assert statistics[quota].length_sum == 8 * len(due) - 7 * statistics[quota].successes
        assert statistics[quota].return_sum == statistics[quota].successes
    counted = sum(part.episodes for part in statistics)
    assert counted > 100
    assert sum(part.successes for part in statistics) / counted == pytest.approx(0.5, abs=0.1)
    assert collected[-1].by_task == {"episodes/move right": 0, "successes/move right": 0} | {
        "episodes/move right": statistics[-1].episodes,
        "successes/move right": statistics[-1].successes,
    }


def test_a_restart_forgets_episodes_that_do_not_count_yet(make_collector: MakeCollector) -> None:
    collector = make_collector(*COIN)
    for version in (0, 1):
        collector.restart(version)
        assert collector.collect(version).statistics.episodes == 0


class Faulty(Line):
    """Fails at the third step of an episode whose start is divisible by three."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.faulty = seed % 3 == 0
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, _, over, _ = super().step(np.zeros(2, np.float32))
        if self.faulty and observation["agent_pos"][1] == 3:
            raise OSError("the simulator has crashed")
        return observation, reward, False, over, {"is_success": over}


@EnvConfig.register_subclass("test_faulty")
@dataclass
class FaultyConfig(LineConfig):
    episode_length: int = 5

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"faulty": {0: gym.vector.SyncVectorEnv([lambda: Faulty(5)] * n_envs)}}


FAULTY = ("--env.type=test_faulty", "--policy.n_action_steps=1", "--algorithm.collection.decisions=9")


@pytest.mark.parametrize("envs", [1, 3])
def test_what_an_environment_failed_in_is_not_collected(
    make_collector: MakeCollector, monkeypatch: pytest.MonkeyPatch, envs: int
) -> None:
    monkeypatch.setattr(environments, "MAX_FAILURES", 1000)
    collector = make_collector(*FAULTY, f"--algorithm.collection.num_envs={envs}")
    collector.restart(0)
    quotas = 20 if envs == 1 else 6
    collected = [collector.collect(version) for version in range(quotas)]
    batch = DecisionBatch.concatenate([part.decisions for part in collected])
    assert collector.failures > 2
    # Where every environment has failed in a decision, one more is made.
    assert len(batch) == quotas * 9 if envs == 1 else len(batch) == quotas * 9 * envs - collector.failures
    assert (batch.executed == 1).all()
    # After two steps of a faulty start the third is missing, and its number with it: what came before has lost it.
    ordered = batch.select(time_order(batch.env, batch.index))
    steps = ordered.observation[OBS_STATE][:, 1].tolist()
    follows = has_successor(ordered).tolist()
    lost = [
        row
        for row in range(len(ordered) - 1)
        if steps[row] == 1 and steps[row + 1] == 0 and ordered.env[row] == ordered.env[row + 1]
    ]
    assert len(lost) > 1
    assert not any(follows[row] for row in lost)
    # Only whole episodes count, and those are solved.
    statistics = [part.statistics for part in collected]
    assert sum(part.ended for part in statistics) == int(batch.terminated.sum() + batch.success.sum())
    assert sum(part.successes for part in statistics) == sum(part.episodes for part in statistics) > 0
    assert sum(part.length_sum for part in statistics) == 5 * sum(part.episodes for part in statistics)


class Silent(Line):
    """Says nothing of success."""

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, _, over, _ = super().step(action)
        return observation, reward, False, over, {"speed": 1.0, "height": 2.0}


@EnvConfig.register_subclass("test_silent")
@dataclass
class SilentConfig(LineConfig):
    episode_length: int = 5

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"silent": {0: gym.vector.SyncVectorEnv([lambda: Silent(5)] * n_envs)}}


def test_an_environment_that_does_not_tell_success_is_named_once(
    make_collector: MakeCollector, caplog: pytest.LogCaptureFixture
) -> None:
    collector = make_collector("--env.type=test_silent", LONG)
    collector.restart(0)
    collected = [collector.collect(version) for version in range(2)]
    assert [part.statistics.judged for part in collected] == [0, 0]
    assert collected[0].statistics.episodes > 0
    assert [part.by_task for part in collected] == [{}, {}]
    (line,) = [record.message for record in caplog.records if record.name.endswith("collector")]
    assert "none said whether its task was solved" in line
    assert "the last info had: height, speed; training goes on by the environment's reward" in line


@pytest.mark.parametrize(
    "setting",
    [("--algorithm.collection.reward=success",), ("--algorithm.collection.task_focus=0.5", "--save_freq=1")],
)
def test_where_success_is_needed_an_environment_without_it_is_refused(
    make_collector: MakeCollector, setting: tuple[str, ...]
) -> None:
    collector = make_collector("--env.type=test_silent", LONG, *setting)
    collector.restart(0)
    name = setting[0].removeprefix("--")
    with pytest.raises(EnvironmentFailed, match=f"had: height, speed; {name} cannot work without") as caught:
        collector.collect(0)
    assert "\n" not in str(caught.value)


def test_a_report_of_success_alone_makes_silence_a_failure() -> None:
    none, both = np.zeros(2, dtype=bool), np.ones(2, dtype=bool)
    plain = ChunkStep(
        np.zeros(2), np.ones(2), none, both, none, {}, {}, none, np.zeros(2), *[np.array(["", ""])] * 3
    )
    reports = SuccessReports(CollectionConfig(num_envs=4, reward="success"))
    silent = replace(plain, unjudged=np.array(["x", ""]), success=np.array([False, False]), truncated=~both)
    for _ in range(3):
        reports.take(silent)
        assert not reports.known
    reports.take(replace(plain, success=np.array([False, True]), truncated=none))
    assert reports.known
    for _ in range(9):
        reports.take(silent)


def test_the_text_of_each_episode_travels_with_its_decisions(
    make_collector: MakeCollector, make_cfg: Callable
) -> None:
    collector = make_collector("--env.type=test_named", LONG, "--algorithm.collection.num_workers=2")
    collector.restart(0)
    batch = collector.collect(0).decisions
    # The start tells the seed, which the text names.
    for row, text in enumerate(batch.task):
        assert text == f"start {int(batch.observation[OBS_STATE][row, 0])}"
    assert len(set(batch.task)) > 8
    sent = decode_decisions(
        encode_decisions(batch, RolloutHeader(0, 0, 0)),
        wire_spec(make_cfg("--env.type=test_named", LONG), collector._player),
    )
    assert sent.decisions.task == batch.task
    seen: list[list[str]] = []

    def preprocess(observation: dict[str, Tensor], task: list[str]) -> dict[str, Any]:
        seen.append(task)
        return dict(observation)

    rollout = prepare(batch, preprocess)
    assert seen[0] == rollout.decisions.task
    # What follows is read with the text of its own episode.
    for place, row in enumerate(rollout.decisions.next_row.tolist()):
        assert seen[1][place] == rollout.decisions.task[row]
        final = rollout.decisions.next_observation[OBS_STATE][place]
        assert seen[1][place] == f"start {int(final[0])}"
    # Statistics are by the name that stays.
    assert collector._groups[0].envs.names == ["count"] * 2


class NamedStart(Line):
    """Names its task at each reset; its state says which start it has."""

    task, task_description = "count", ""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.state = np.array([seed % 1000, 0], np.float32)
        self.task_description = f"start {seed % 1000}"
        return {"agent_pos": self.state}, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, _, _, over, _ = super().step(np.zeros(2, np.float32))
        return observation, 0.0, False, over, {"is_success": False}


@EnvConfig.register_subclass("test_named")
@dataclass
class NamedConfig(LineConfig):
    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        return {"named": {0: gym.vector.SyncVectorEnv([lambda: NamedStart(5)] * n_envs)}}


def test_a_reward_that_is_no_number_is_in_no_sum(
    make_collector: MakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor goes on; the learner drops and counts the decision."""
    plain, taken = Coin.step, []

    def step(self: Any, action: np.ndarray) -> tuple:
        observation, reward, *others = plain(self, action)
        taken.append(reward)
        # Every environment's third step, which is no first one of each.
        return observation, float("nan") if 64 <= len(taken) < 96 else reward, *others

    monkeypatch.setattr(Coin, "step", step)
    collector = make_collector(*COIN, "--algorithm.collection.num_workers=0", LONG)
    collector.restart(0)
    collected = collector.collect(0)
    assert int((~finite_rows(collected.decisions)).sum()) == 32
    assert np.isfinite(collected.statistics.return_sum)
    assert collected.statistics.return_sum > 0
    assert encode_interaction(asdict(collected.statistics))


# A time limit of 8 decisions, named in the configuration, in which an untrained policy solves nothing.
TIMED = (
    "--env.type=metaworld_state",
    "--env.task=peg-insert-side-v3",
    "--env.episode_length=16",
    "--policy.n_action_steps=2",
    "--policy.chunk_size=2",
)


def test_first_episodes_are_cut_at_different_times(make_collector: MakeCollector) -> None:
    collector = make_collector(*TIMED, "--algorithm.collection.decisions=16")
    collector.restart(0)
    collected = collector.collect(0)
    batch = collected.decisions
    lengths = [
        np.diff(np.flatnonzero(batch.truncated[batch.env == env].numpy()), prepend=-1) for env in range(4)
    ]
    # Environments 0 to 3 at the fractions 0, .62, .24 and .85 of 8 decisions; 0 of them is no cut.
    assert [part.tolist() for part in lengths] == [[8, 8], [4, 8], [1, 8], [6, 8]]
    # A cut episode is no failure, and its last decision is valued by what came after it.
    assert collected.statistics.episodes == 5
    assert collected.statistics.length_sum == 5 * 16
    assert set(batch.truncated.nonzero()[:, 0].tolist()) <= set(batch.next_row.tolist())


def test_episodes_that_are_compared_are_not_cut(make_collector: MakeCollector) -> None:
    grouped = ("--algorithm.advantage=group", "--algorithm.collection.group_size=2")
    collector = make_collector(*TIMED, "--algorithm.collection.decisions=8", *grouped)
    collector.restart(0)
    batch = collector.collect(0).decisions
    assert batch.index[batch.truncated].tolist() == [7] * 4


@pytest.mark.parametrize("explorer", ["flow_sde", "flow_cps", "flow_noise"])
def test_the_learner_scores_what_the_actor_sampled(make_collector: MakeCollector, explorer: str) -> None:
    collector = make_collector(f"--policy.explorer.kind={explorer}")
    collector.restart(0)
    batch, player = collector.collect(0).decisions, collector._player
    with torch.no_grad():
        context = player.policy.encode(player.preprocess_packed(batch.observation, batch.task))
        score = player.policy.score(context, batch.chain, batch.step)
    torch.testing.assert_close(score.log_prob, batch.log_prob, atol=1e-4, rtol=1e-4)


def test_a_short_horizon_executes_the_head_of_a_chunk(make_collector: MakeCollector) -> None:
    collector = make_collector("--policy.n_action_steps=2", "--env.limit=1000")
    collector.restart(0)
    batch = collector.collect(0).decisions
    assert batch.action.shape[1] == 5
    assert int(batch.executed.max()) == 2


def test_streams_of_different_purposes_differ() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({int(stream(*key).integers(2**62)) for key in keys}) == len(keys)
