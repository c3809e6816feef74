"""What the learner keeps, drops, waits for and does not wait for."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from threading import Event, Timer

import pytest
import torch
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.runtime import gather as gather_module
from lerobot_policy_pi_rl.runtime.collector import Collector
from lerobot_policy_pi_rl.runtime.control import ControlStatistics
from lerobot_policy_pi_rl.runtime.gather import STATISTICS_S, TOLD, Gathered, Gatherer, NothingUsable, Stopped
from lerobot_policy_pi_rl.runtime.inbox import Inbox, Received
from lerobot_policy_pi_rl.runtime.pipeline import wire_spec
from lerobot_policy_pi_rl.runtime.register import ActorEvent, ActorInfo
from lerobot_policy_pi_rl.runtime.wire import (
    RolloutHeader,
    WireSpec,
    encode_decisions,
    encode_interaction,
)

VERSION, QUOTA, SOON = 7, 16, 20.0
PLAIN = {
    "ended": 3,
    "episodes": 2,
    "judged": 2,
    "successes": 1,
    "return_sum": 3.5,
    "length_sum": 40,
    "env_steps": 50,
    "seconds": 0.5,
    "latency": 0.01,
    "process": 1,
    **dict.fromkeys(TOLD, 0),
}

pytestmark = pytest.mark.timeout(60)


class Room:
    """Stands in for the service: the same inboxes, with actors that come and go at a word."""

    def __init__(self) -> None:
        self.decisions, self.interactions = Inbox(64, 2**30), Inbox(64, 2**30)
        self.rejected: list[tuple[int, str, str]] = []
        # It is its own list of actors, too.
        self.actors = self
        self._here: dict[int, ActorInfo] = {}
        self._events: list[ActorEvent] = []

    def join(self, *actors: int) -> None:
        for actor in actors:
            self._here[actor] = ActorInfo(actor, "here", 0.0)
            self._events.append(ActorEvent("joined", self._here[actor]))

    def leave(self, actor: int) -> None:
        self._events.append(ActorEvent("left", self._here.pop(actor)))

    def take_next(self, version: int) -> None:
        self.next_version = version

    def connected(self) -> list[ActorInfo]:
        return [self._here[actor] for actor in sorted(self._here)]

    def wait_connected(self, count: int, timeout: float | None = None) -> bool:
        return len(self._here) >= count

    def next_event(self, timeout: float = 0.0) -> ActorEvent | None:
        return self._events.pop(0) if self._events else None

    def reject(self, actor: int, reason: str, detail: str = "", quota: bool = False) -> None:
        self.rejected.append((actor, reason, detail))


@dataclass
class Scene:
    """A gatherer, the room it looks at, and what an actor would send."""

    room: Room
    gatherer: Gatherer
    stop: Event
    quota: DecisionBatch

    def of(self, actor: int) -> DecisionBatch:
        """An actor's quota."""
        return replace(self.quota, env=self.quota.env + 4 * actor)

    def send(self, sender: int, batch: DecisionBatch | None = None, **header: int) -> None:
        values = {"actor": sender, "version": VERSION, "part": 0, **header}
        payload = encode_decisions(self.of(sender) if batch is None else batch, RolloutHeader(**values))  # type: ignore[arg-type]
        self.send_bytes(sender, payload)

    def send_bytes(self, actor: int, payload: bytes) -> None:
        self.room.decisions.put(Received(actor, payload), lambda: True)

    def tell(self, actor: int, kind: str = "collection", version: int = VERSION, **values: object) -> None:
        told = encode_interaction({"kind": kind, "version": version, "part": 0, **PLAIN, **values})  # type: ignore[dict-item]
        self.room.interactions.put(Received(actor, told), lambda: True)

    def deliver(self, *actors: int) -> None:
        """Statistics and quota, as actors send them."""
        for actor in actors:
            self.tell(actor)
            self.send(actor)


@pytest.fixture
def scene(make_cfg: Callable, make_collector: Callable[..., Collector]) -> Scene:
    collector = make_collector()
    cfg = make_cfg()
    spec: WireSpec = wire_spec(cfg, collector._player)
    collector.restart(VERSION)
    room, stop = Room(), Event()
    gatherer = Gatherer(room, spec, CollectionConfig(num_envs=4, decisions=4, idle_warning_s=0.3), stop)  # type: ignore[arg-type]
    return Scene(room, gatherer, stop, collector.collect(VERSION).decisions)


@pytest.fixture
def background() -> Iterator[Callable[..., Future]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def gather(scene: Scene, evaluating: bool = False) -> Gathered:
    return scene.gatherer.gather(VERSION, evaluating)


def test_all_actors_quotas_are_gathered(scene: Scene) -> None:
    scene.room.join(0, 1)
    scene.deliver(0, 1)
    gathered = gather(scene)
    assert sorted(set(gathered.decisions.env.tolist())) == list(range(8))
    assert len(gathered.decisions) == 2 * QUOTA
    assert [row["return_sum"] for row in gathered.collections] == [3.5, 3.5]
    assert gathered.evaluations == []
    assert not any(scene.gatherer.dropped.values())


def test_decisions_that_are_not_finite_are_dropped_and_counted(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.room.join(0)
    scene.tell(0)
    reward, state = scene.quota.reward.clone(), scene.quota.observation[OBS_STATE].clone()
    reward[3], state[5, 0] = torch.nan, torch.inf
    scene.send(0, replace(scene.quota, reward=reward, observation={OBS_STATE: state}))
    gathered = gather(scene)
    kept = [row for row in range(QUOTA) if row not in (3, 5)]
    assert torch.equal(gathered.decisions.reward, reward[kept])
    assert torch.equal(gathered.decisions.chain, scene.quota.chain[kept])
    assert scene.gatherer.dropped["non_finite_decisions"] == 2
    assert (
        "Dropped 2 of 16 decisions: 2 with values that are not finite, 0 made by other weights than version 7"
        in caplog.text
    )


def test_when_nothing_is_left_the_error_says_so(scene: Scene) -> None:
    scene.room.join(0)
    scene.tell(0)
    scene.send(0, replace(scene.quota, log_prob=torch.full_like(scene.quota.log_prob, torch.nan)))
    with pytest.raises(
        NothingUsable, match=r"every decision of version 7.*non_finite_decisions': 16"
    ) as error:
        gather(scene)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["garbage", "empty", "other actor", "foreign environments", "other shape"])
def test_a_malformed_message_is_rejected_and_counted(scene: Scene, case: str) -> None:
    scene.room.join(0, 1)
    if case == "garbage":
        scene.send_bytes(1, b"\x00garbage" * 100)
    elif case == "empty":
        scene.send_bytes(1, b"")
    elif case == "other actor":
        scene.send(1, actor=0)
    elif case == "foreign environments":
        scene.send(1, scene.of(0))
    else:
        scene.send(1, replace(scene.of(1), log_prob=scene.quota.log_prob[:, :-1]))
    scene.deliver(0, 1)
    gathered = gather(scene)
    assert len(gathered.decisions) == 2 * QUOTA
    ((actor, reason, detail),) = scene.room.rejected
    assert (actor, reason) == (1, "malformed")
    assert detail
    assert "\n" not in detail


def test_statistics_of_versions_that_nobody_asked_for_are_not_kept(scene: Scene) -> None:
    scene.room.join(0)
    for version in range(60):
        scene.tell(0, version=VERSION + version)
    scene.deliver(0)
    assert len(gather(scene).collections) == 1
    assert scene.gatherer._statistics == {}
    assert scene.gatherer.dropped["statistics"] == 59


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_decisions_of_other_weights_are_dropped_and_counted(scene: Scene, version: int) -> None:
    scene.room.join(0)
    scene.send(0, version=version)
    scene.deliver(0)
    assert len(gather(scene).decisions) == QUOTA
    assert scene.gatherer.dropped["stale_decisions"] == QUOTA


def test_a_single_decision_of_other_weights_is_dropped_and_counted(scene: Scene) -> None:
    scene.room.join(0)
    scene.tell(0)
    version = scene.quota.version.clone()
    version[2] = VERSION - 1
    scene.send(0, replace(scene.quota, version=version))
    assert gather(scene).decisions.version.tolist() == [VERSION] * (QUOTA - 1)
    assert scene.gatherer.dropped["stale_decisions"] == 1


def test_a_quota_that_is_collected_twice_counts_once(scene: Scene) -> None:
    """An actor that dies after its quota and comes back before the others are done is asked again."""
    scene.room.join(0, 1)
    scene.deliver(0)
    scene.room.leave(0)
    scene.room.join(0)
    scene.deliver(0, 1)
    gathered = gather(scene)
    pairs = list(zip(gathered.decisions.env.tolist(), gathered.decisions.index.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == 2 * QUOTA
    assert scene.gatherer.dropped["repeated_decisions"] == QUOTA


def test_an_actor_that_leaves_is_not_waited_for(
    scene: Scene, background: Callable[..., Future], caplog: pytest.LogCaptureFixture
) -> None:
    scene.room.join(0, 1)
    scene.deliver(0)
    waiting = background(gather, scene)
    with pytest.raises(TimeoutError):
        waiting.result(0.6)
    scene.room.leave(1)
    assert len(waiting.result(SOON).decisions) == QUOTA
    assert scene.gatherer.actors_left == 1
    assert "Actor 1 left before it delivered its quota; going on with actor(s) [0]" in caplog.text


def test_an_actor_that_joins_is_waited_for(scene: Scene, background: Callable[..., Future]) -> None:
    scene.room.join(0, 1)
    scene.deliver(0)
    waiting = background(gather, scene)
    with pytest.raises(TimeoutError):
        waiting.result(0.6)
    scene.deliver(1)
    assert len(waiting.result(SOON).decisions) == 2 * QUOTA


def test_whoever_joins_is_told_which_iteration_takes_its_first_quota(
    scene: Scene, background: Callable[..., Future]
) -> None:
    scene.room.join(0)
    waiting = background(gather, scene)
    with pytest.raises(TimeoutError):
        waiting.result(0.3)
    assert scene.room.next_version == VERSION
    scene.deliver(0)
    waiting.result(SOON)
    # While the learner trains.
    assert scene.room.next_version == VERSION + 1


def test_without_any_actor_it_waits_for_the_next(
    scene: Scene, background: Callable[..., Future], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scene.room.join(0)
    waiting = background(gather, scene)
    scene.room.leave(0)
    with pytest.raises(TimeoutError):
        waiting.result(1.0)
    assert "going on with none until one connects" in caplog.text
    assert re.search(r"Nothing arrived for \d+ s; waiting for an actor to connect", caplog.text)
    scene.room.join(3)
    scene.deliver(3)
    assert waiting.result(SOON).decisions.env.min() == 12
    assert "Actor 3 joined from here" in caplog.text


def test_a_silent_actor_is_named(
    scene: Scene, background: Callable[..., Future], caplog: pytest.LogCaptureFixture
) -> None:
    scene.room.join(0, 1)
    scene.deliver(0)
    waiting = background(gather, scene)
    with pytest.raises(TimeoutError):
        waiting.result(1.0)
    assert "waiting for actor(s) [1]" in caplog.text
    scene.deliver(1)
    waiting.result(SOON)


def test_an_actor_that_never_sends_is_not_waited_for_until_it_does(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gather_module, "QUOTA_S", 0.3)
    scene.room.join(0, 1)
    scene.deliver(0)
    began = time.monotonic()
    assert [row["actor"] for row in gather(scene).collections] == [0]
    assert time.monotonic() - began > 0.3
    assert "Going on without actor 1 at here: it has sent no decisions for" in caplog.text
    assert scene.gatherer.late_quotas == 1
    # The next iteration does not wait for it at all, and neither does an evaluation.
    scene.tell(0, version=VERSION + 1)
    scene.send(0, replace(scene.of(0), version=scene.quota.version + 1), version=VERSION + 1)
    scene.tell(0, "evaluation", VERSION + 1)
    monkeypatch.setattr(gather_module, "QUOTA_S", 1e9)
    assert len(scene.gatherer.gather(VERSION + 1, True).evaluations) == 1
    assert scene.gatherer.late_quotas == 1
    # A quota of it, however late, has it waited for.
    scene.send(1)
    for actor in (0, 1):
        scene.tell(actor, version=VERSION + 2)
        scene.send(actor, replace(scene.of(actor), version=scene.quota.version + 2), version=VERSION + 2)
    assert [row["actor"] for row in scene.gatherer.gather(VERSION + 2, False).collections] == [0, 1]


def test_with_nobody_to_go_on_with_a_silent_actor_is_waited_for(
    scene: Scene, background: Callable[..., Future], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_module, "QUOTA_S", 0.1)
    scene.room.join(0)
    waiting = background(gather, scene)
    with pytest.raises(TimeoutError):
        waiting.result(1.0)
    assert scene.gatherer.late_quotas == 0
    scene.deliver(0)
    waiting.result(SOON)


def test_how_long_quotas_take_decides_how_long_is_waited(
    scene: Scene, background: Callable[..., Future], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slowest actor of the iteration before took 1,000 s: ten times that is far away."""
    monkeypatch.setattr(gather_module, "QUOTA_S", 0.1)
    scene.room.join(0)
    scene.tell(0, seconds=1000.0)
    scene.send(0)
    gather(scene)
    scene.room.join(1)
    scene.tell(0, version=VERSION + 1)
    scene.send(0, replace(scene.of(0), version=scene.quota.version + 1), version=VERSION + 1)
    waiting = background(scene.gatherer.gather, VERSION + 1, False)
    with pytest.raises(TimeoutError):
        waiting.result(1.0)
    scene.stop.set()
    with pytest.raises(Stopped):
        waiting.result(SOON)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "gossip"},
        {"version": 1.5},
        {"version": True},
        {"part": "first"},
        {"episodes": "two"},
        {"seconds": True},
        {"return_sum": 10**80},
    ],
)
def test_statistics_that_no_metric_can_be_made_of_are_rejected(scene: Scene, values: dict) -> None:
    scene.room.join(0)
    scene.tell(0, **values)
    scene.deliver(0)
    assert [row["episodes"] for row in gather(scene).collections] == [2]
    assert [reason for _, reason, _ in scene.room.rejected] == ["malformed"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"successes": 3}, "3 of 2 episodes were solved"),
        ({"successes": 10**18, "episodes": 10**18}, "not a number of a usable size"),
        ({"successes": -1}, "successes: -1 is below 0"),
        ({"episodes": 2.5}, "episodes: 2.5 is not a whole number"),
        ({"seconds": -0.5}, "seconds: -0.5 is below 0"),
        ({"unkept_steps": -3}, "unkept_steps: -3 is below 0"),
        ({"episodes/a": 2, "successes/a": 3}, "3 of 2 episodes of the task 'a' were solved"),
        ({"episodes/a": 1, "successes/a": 1}, "not those of all tasks together"),
        ({"episodes/a": 2, "successes/b": 1}, "not those that have successes"),
        ({"episodes/a": 2}, "not those that have successes"),
        ({"episodes/a": -2, "successes/a": 1}, "episodes/a: -2 is below 0"),
    ],
)
def test_statistics_that_cannot_be_are_rejected_by_name(scene: Scene, values: dict, said: str) -> None:
    scene.room.join(0)
    scene.tell(0, **values)
    scene.deliver(0)
    assert [row["successes"] for row in gather(scene).collections] == [1]
    [(actor, reason, detail)] = scene.room.rejected
    assert (actor, reason) == (0, "malformed")
    assert said in detail


def test_statistics_of_tasks_that_nobody_has_are_rejected_by_name(scene: Scene) -> None:
    [task] = set(scene.quota.task)
    invented = {f"episodes/{number}": 1 for number in range(800)}
    invented |= {f"successes/{number}": 0 for number in range(800)}
    scene.room.join(0, 1)
    scene.tell(0, episodes=800, successes=0, **invented)
    scene.tell(1, **{f"episodes/{task}": 2, f"successes/{task}": 1})
    scene.tell(1, "evaluation", episodes=800, successes=0, **invented)
    for actor in (0, 1):
        scene.send(actor)
    gathered = gather(scene)
    [row] = gathered.collections
    assert (row["actor"], row[f"episodes/{task}"]) == (1, 2)
    assert scene.room.rejected == [
        (0, "malformed", "interaction: 800 tasks that no decision has, such as '0'")
    ]
    # An evaluation counts, but for the names.
    [evaluation] = gathered.evaluations
    assert evaluation["episodes"] == 800
    assert not [name for name in evaluation if name.startswith("episodes/")]


def test_a_missing_statistic_is_rejected(scene: Scene) -> None:
    scene.room.join(0)
    told = encode_interaction({"kind": "collection", "version": VERSION, "part": 0})
    scene.room.interactions.put(Received(0, told), lambda: True)
    scene.deliver(0)
    assert len(gather(scene).collections) == 1
    assert "ended" in scene.room.rejected[0][2]


def test_evaluations_come_with_the_iteration_they_were_asked_for(scene: Scene) -> None:
    scene.room.join(0, 1)
    for actor in (0, 1):
        scene.tell(actor, "evaluation", successes=actor)
        scene.tell(actor, "evaluation", VERSION - 1, successes=9)
    scene.deliver(0, 1)
    assert [row["successes"] for row in gather(scene, evaluating=True).evaluations] == [0, 1]


def test_statistics_of_an_actor_that_left_are_not_waited_for(scene: Scene) -> None:
    scene.room.join(0, 1)
    scene.send(1)
    scene.room.leave(1)
    scene.deliver(0)
    began = time.monotonic()
    assert len(gather(scene).collections) == 1
    assert time.monotonic() - began < STATISTICS_S


def test_statistics_that_came_before_their_actor_left_are_used(scene: Scene) -> None:
    scene.room.join(0, 1)
    scene.deliver(0, 1)
    scene.room.leave(1)
    gathered = gather(scene)
    assert len(gathered.collections) == 2
    assert len(gathered.decisions) == 2 * QUOTA


def test_the_last_evaluation_is_waited_for(scene: Scene, background: Callable[..., Future]) -> None:
    scene.room.join(0, 1)
    scene.tell(0, "evaluation")
    waiting = background(scene.gatherer.gather_evaluation, VERSION, SOON)
    with pytest.raises(TimeoutError):
        waiting.result(0.6)
    scene.tell(1, "evaluation")
    assert len(waiting.result(SOON)) == 2


def test_the_last_evaluation_of_an_actor_that_left_is_not_waited_for(scene: Scene) -> None:
    scene.room.join(0, 1)
    scene.tell(0, "evaluation")
    scene.room.leave(0)
    scene.room.leave(1)
    assert len(scene.gatherer.gather_evaluation(VERSION, SOON)) == 1


@pytest.mark.parametrize("what", ["gather", "gather_evaluation", "wait_for_actors"])
def test_every_wait_can_be_stopped(scene: Scene, background: Callable[..., Future], what: str) -> None:
    if what != "wait_for_actors":
        scene.room.join(0)
    arguments = {"gather": (VERSION, False), "gather_evaluation": (VERSION, SOON), "wait_for_actors": ()}[
        what
    ]
    waiting = background(getattr(scene.gatherer, what), *arguments)
    with pytest.raises(TimeoutError):
        waiting.result(0.5)
    scene.stop.set()
    with pytest.raises(Stopped):
        waiting.result(SOON)


def test_what_actors_have_counted_is_added_up_over_their_processes(scene: Scene) -> None:
    scene.room.join(0, 1)
    # What one process says grows; another one begins anew, however much it says.
    for actor, process, attempts in ((0, 5, 2), (1, 6, 1), (0, 5, 3), (0, 7, 4), (0, 7, 4)):
        scene.tell(actor, process=process, failed_attempts=attempts, unkept_steps=attempts)
    scene.deliver(0, 1)
    gather(scene)
    assert scene.gatherer.told["failed_attempts"] == 3 + 4 + 1
    assert scene.gatherer.told["unkept_steps"] == 8
    assert scene.gatherer.told["rejected_pushes"] == 0


def test_a_wait_is_reported_about_once_a_second(scene: Scene, background: Callable[..., Future]) -> None:
    reported: list[int] = []
    gatherer = scene.gatherer
    gatherer._report_on = lambda: reported.append(gatherer.newest[0][0] if gatherer.newest else -1)
    scene.room.join(0, 1)
    scene.deliver(0)
    waiting = background(gather, scene)
    with pytest.raises(TimeoutError):
        waiting.result(2.6)
    assert 2 <= len(reported) <= 3
    assert reported[-1] == VERSION
    scene.deliver(1)
    waiting.result(SOON)


def test_ever_new_numbers_deliver_no_more_than_actors_have_places(scene: Scene) -> None:
    collection = replace(scene.gatherer._collection, max_actors=2)
    gatherer = Gatherer(scene.room, scene.gatherer._spec, collection, scene.stop)  # type: ignore[arg-type]
    scene.room.join(0)
    for number in range(1, 31):
        scene.tell(number, "evaluation")
        scene.tell(number)
        scene.send(number)
    scene.send(0)
    # Full without the connected one, which must not be waited for, then.
    assert len(gatherer.gather(VERSION, False).decisions) == 4 * QUOTA
    assert gatherer.dropped["surplus_decisions"] == 27 * QUOTA
    assert len(gatherer._seen) == len(gatherer.newest) == 4
    assert len(gatherer._statistics) <= 3 * 4
    assert gatherer.dropped["statistics"] == 60 - 3 * 4
    batch = replace(scene.of(0), version=scene.quota.version + 2)
    scene.send(0, batch, version=VERSION + 2)
    scene.tell(0, version=VERSION + 2)
    gatherer.gather(VERSION + 2, False)
    assert set(gatherer.newest) == {0}
    assert not gatherer._statistics


# Actors that are ahead of the learner


@pytest.fixture
def ahead(scene: Scene) -> Scene:
    """The scene of a run whose decisions may be one version old."""
    collection = replace(scene.gatherer._collection, max_staleness=1)
    gatherer = Gatherer(scene.room, scene.gatherer._spec, collection, scene.stop)  # type: ignore[arg-type]
    return replace(scene, gatherer=gatherer)


def made_by(scene: Scene, actor: int, version: int) -> DecisionBatch:
    batch = scene.of(actor)
    return replace(batch, version=torch.full_like(batch.version, version))


def send_quota(scene: Scene, actor: int, version: int, part: int = 0) -> None:
    scene.tell(actor, version=version, part=part, return_sum=float(10 * version + part))
    scene.send(actor, made_by(scene, actor, version), version=version, part=part)


def test_decisions_may_be_as_old_as_allowed_and_no_older(ahead: Scene) -> None:
    ahead.room.join(0, 1)
    send_quota(ahead, 0, VERSION - 2)
    send_quota(ahead, 0, VERSION - 1)
    send_quota(ahead, 1, VERSION)
    gathered = gather(ahead)
    assert sorted(set(gathered.decisions.version.tolist())) == [VERSION - 1, VERSION]
    assert ahead.gatherer.dropped["stale_decisions"] == QUOTA
    assert [row["return_sum"] for row in gathered.collections] == [10 * VERSION - 10, 10 * VERSION]


def test_a_quota_that_is_ahead_waits_for_its_iteration(ahead: Scene) -> None:
    ahead.room.join(0, 1)
    for part in (0, 1):
        send_quota(ahead, 0, VERSION, part)
    send_quota(ahead, 1, VERSION)
    assert [row["return_sum"] for row in gather(ahead).collections] == [10 * VERSION, 10 * VERSION]
    send_quota(ahead, 1, VERSION + 1)
    gathered = ahead.gatherer.gather(VERSION + 1, evaluating=False)
    assert [row["return_sum"] for row in gathered.collections] == [10 * VERSION + 1, 10 * VERSION + 10]
    ahead.room.leave(0)
    send_quota(ahead, 1, VERSION + 2)
    ahead.gatherer.gather(VERSION + 2, evaluating=False)
    assert not ahead.gatherer._waiting
    assert not any(ahead.gatherer.dropped.values())


def test_a_quota_that_waited_too_long_is_dropped(ahead: Scene) -> None:
    ahead.room.join(0)
    for part in (0, 1):
        send_quota(ahead, 0, VERSION, part)
    gather(ahead)
    send_quota(ahead, 0, VERSION + 2)
    gathered = ahead.gatherer.gather(VERSION + 2, evaluating=False)
    assert set(gathered.decisions.version.tolist()) == {VERSION + 2}
    assert ahead.gatherer.dropped["stale_decisions"] == QUOTA


def test_nothing_is_taken_twice_and_no_actor_runs_away(ahead: Scene) -> None:
    ahead.room.join(0)
    for part in (0, 0, 1, 1, 2):
        send_quota(ahead, 0, VERSION, part)
    assert len(gather(ahead).decisions) == QUOTA
    assert ahead.gatherer.dropped["repeated_decisions"] == 3 * QUOTA


def test_what_a_collapsed_policy_collected_is_dropped(ahead: Scene) -> None:
    ahead.room.join(0)
    for part in (0, 1):
        send_quota(ahead, 0, VERSION, part)
    gather(ahead)
    ahead.gatherer.discard_before(VERSION + 1)
    assert ahead.gatherer.dropped["stale_decisions"] == QUOTA
    send_quota(ahead, 0, VERSION + 1)
    assert set(ahead.gatherer.gather(VERSION + 1, False).decisions.version.tolist()) == {VERSION + 1}


def test_an_evaluation_is_waited_for_with_the_decisions_at_hand(
    ahead: Scene, background: Callable[..., Future]
) -> None:
    ahead.room.join(0)
    send_quota(ahead, 0, VERSION - 1)
    waiting = background(gather, ahead, True)
    with pytest.raises(TimeoutError):
        waiting.result(STATISTICS_S + 1)
    ahead.tell(0, "evaluation", successes=2)
    assert [row["successes"] for row in waiting.result(SOON).evaluations] == [2]


def test_statistics_of_other_runs_take_no_room(scene: Scene) -> None:
    """Those of a learner that this actor knew before."""
    scene.room.join(0)
    for version in (0, 10**6):
        scene.tell(0, version=version)
    scene.deliver(0)
    gather(scene)
    assert not scene.gatherer._statistics


# Robots


def test_how_robots_were_controlled_comes_beside_decisions(scene: Scene) -> None:
    scene.room.join(0)
    scene.tell(0, "control", **asdict(ControlStatistics(steps=80)))
    scene.deliver(0)
    gathered = gather(scene)
    assert [values["steps"] for values in gathered.control] == [80]
    assert len(gathered.decisions) == QUOTA


def test_actors_that_leave_are_waited_for_and_not_beyond_the_limit(scene: Scene) -> None:
    """Decisions that they still send come too late, and must not keep them from leaving."""
    scene.gatherer.wait_for_leaving(SOON)
    scene.room.join(0, 1)
    scene.deliver(0)
    began = time.monotonic()
    scene.gatherer.wait_for_leaving(0.3)
    assert 0.3 <= time.monotonic() - began < SOON
    assert len(scene.room.decisions) == 0

    def leave() -> None:
        scene.room.leave(0)
        scene.room.leave(1)

    leaving = Timer(0.1, leave)
    leaving.start()
    began = time.monotonic()
    scene.gatherer.wait_for_leaving(10 * SOON)
    assert 0.1 <= time.monotonic() - began < SOON
    leaving.join()


def test_statistics_of_control_are_numbers(scene: Scene) -> None:
    scene.room.join(0)
    scene.tell(0, "control", **asdict(ControlStatistics()) | {"overruns": "many"})
    scene.deliver(0)
    assert gather(scene).control == []
    assert scene.room.rejected[0][1] == "malformed"
