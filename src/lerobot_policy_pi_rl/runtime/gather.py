"""Gathers the decisions of one iteration from all actors, and keeps out what must not be learned from."""

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from threading import Event

import torch

from ..algorithm.configuration_pi_rl_algorithm import CollectionConfig
from ..algorithm.decisions import DecisionBatch
from .control import ControlStatistics
from .inbox import Received
from .limits import NUMBERS_PER_PLACE
from .packing import WireError, short
from .register import ActorEvent
from .service import MALFORMED, PIRLLearnerService
from .tasks import EPISODES, PER_TASK, SUCCESSES, of_tasks
from .wire import (
    Rollout,
    Scalar,
    WireSpec,
    decode_decisions,
    decode_interaction,
    finite_rows,
)

logger = logging.getLogger(__name__)

# Seconds between looks at the connections and at the stop signal while nothing arrives.
POLL_S = 0.2
# Seconds that an actor's statistics may arrive after its decisions: they travel on another stream.
STATISTICS_S = 5.0
# Seconds that every actor gets for its quota after the iteration began, or after it joined.
QUOTA_S = 60.0
# Seconds that actors get for an evaluation that the learner waits for with their decisions at hand.
EVALUATION_S = 600.0

# Numbers of actors whose own counts are remembered: callers make new ones.
REMEMBERED = 1024
# Seconds between reports while the learner waits.
REPORT_S = 1.0

# Why something that arrived is kept from the algorithm.
DROPPED = (
    "non_finite_decisions",
    "stale_decisions",
    "repeated_decisions",
    "rolled_back_decisions",
    "mismatched_decisions",
    "surplus_decisions",
    "statistics",
)
# What an actor counts itself since its process started.
TOLD = ("failed_attempts", "rejected_pushes", "unsent_messages", "unkept_steps", "failed_episodes")
# What the learner reads of an actor's statistics, beside their kind and version.
STATISTICS = {
    "collection": (
        *("ended", "episodes", "judged", "successes"),
        *("return_sum", "length_sum", "env_steps", "seconds", "latency"),
        *("process", *TOLD),
    ),
    "evaluation": ("episodes", "judged", "successes"),
    "control": tuple(field.name for field in fields(ControlStatistics)),
}


MOST_TASKS = 4096
"""Tasks that are told apart; with more texts than that, each episode has its own."""
MOST = 2**40
"""No count, sum or number of seconds of one collection is as large."""
SIGNED = ("return_sum", "margin_seconds")
"""The statistics that may be below 0."""
COUNTED = ("ended", "episodes", "judged", "successes", "length_sum", "env_steps", "process", *TOLD)


class NothingUsable(RuntimeError):
    """Every decision of an iteration had to be dropped; the text is one line."""


class Stopped(Exception):
    """The learner was asked to stop while it waited."""


@dataclass(frozen=True)
class Gathered:
    """One iteration's data.

    Attributes:
        decisions: Of all actors, made by the wanted version or by one that is not too old.
        collections: Statistics of each actor's collection, with its number as `actor`.
        evaluations: Statistics of each actor's share of an evaluation of this version.
        control: Statistics of how each actor's robot was controlled; none in plain simulation.
        seconds: How long the learner waited for all this.
    """

    decisions: DecisionBatch
    collections: list[dict[str, Scalar]]
    evaluations: list[dict[str, Scalar]]
    control: list[dict[str, Scalar]]
    seconds: float


@dataclass(frozen=True)
class _Quota:
    """What identifies a quota, and the statistics that belong to it: actor, version, part."""

    actor: int
    version: int
    part: int = 0


@dataclass
class _Iteration:
    """What has arrived of one iteration."""

    version: int
    evaluating: bool = False
    batches: dict[int, DecisionBatch] = field(default_factory=dict)
    quotas: list[_Quota] = field(default_factory=list)
    # When it began, by the monotonic clock, and how long its first quota took.
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    @property
    def delivered(self) -> set[int]:
        """The actors whose quota is there."""
        return {quota.actor for quota in self.quotas}

    def decisions(self) -> DecisionBatch:
        """Everything, by actor: in the order of arrival, sums would round in another way every time."""
        return DecisionBatch.concatenate([self.batches[actor] for actor in sorted(self.batches)])


class Gatherer:
    """Reads the service's inboxes for the learner.

    An iteration is complete when every connected actor has delivered a quota, and at least one has: an actor that
    dies is not waited for, nor one that takes far longer than the others; one that joins is. It is complete, too, when
    as many have delivered as may, under whatever numbers. Quotas may be `max_staleness` versions old; an actor that is
    ahead of the others has its next ones wait for the next iterations.
    """

    def __init__(
        self,
        service: PIRLLearnerService,
        spec: WireSpec,
        collection: CollectionConfig,
        stop: Event,
        report: Callable[[], None] | None = None,
    ) -> None:
        """Prepares the gathering.

        Args:
            service: Where actors connect.
            spec: The decisions that are accepted.
            collection: The quota.
            stop: Set from outside to stop waiting.
            report: Called about once a second while the learner waits.
        """
        self._report_on, self._reported_at = report, 0.0
        self._service, self._spec, self._collection, self._stop = service, spec, collection, stop
        self._statistics: dict[tuple[str, _Quota], dict[str, Scalar]] = {}
        # Quotas that have been taken, so that none is taken twice.
        self._seen: set[_Quota] = set()
        # Quotas for the iterations to come, by actor, in the order in which they came.
        self._waiting: defaultdict[int, deque[tuple[_Quota, DecisionBatch]]] = defaultdict(deque)
        # Range of the versions that are of use.
        self._oldest = self._newest = 0
        self._last_arrival = time.monotonic()
        # Most actors whose quotas one iteration takes, and most statistics that are kept for them.
        self._most_actors = NUMBERS_PER_PLACE * collection.max_actors
        self._most_statistics = len(STATISTICS) * self._most_actors * (collection.max_staleness + 1) ** 2
        self.dropped = Counter(dict.fromkeys(DROPPED, 0))
        # What all actors have counted, and what the newest process of each has said last.
        self.told = Counter(dict.fromkeys(TOLD, 0))
        self._last_told: dict[int, dict[str, int]] = {}
        # The newest quota of each actor: its version, and when it came, by the monotonic clock.
        self.newest: dict[int, tuple[int, float]] = {}
        # Texts of the tasks that decisions had.
        self._tasks: set[str] = set()
        self.actors_left = 0
        # Actors whose quota did not come in time, and that have sent none since; how often that was.
        self._late: set[int] = set()
        self.late_quotas = 0
        # How long the slowest collection of the iteration before took, as its actor says.
        self._collection_s = 0.0

    def wait_for_actors(self) -> None:
        """Waits until the configured number of actors is connected.

        Raises:
            Stopped: If the learner was asked to stop.
        """
        wanted = self._collection.num_actors
        if not self._service.actors.wait_connected(wanted, timeout=0.0):
            logger.info(
                "Waiting for %d actor(s); start them with lerobot-pi-rl-actor and the same config", wanted
            )
        while not self._service.actors.wait_connected(wanted, POLL_S):
            self._look_around()

    def gather(self, version: int, evaluating: bool) -> Gathered:
        """Waits for one iteration.

        Args:
            version: Version whose decisions are wanted.
            evaluating: Whether the actors were asked for an evaluation of it.

        Returns:
            At least one decision.

        Raises:
            Stopped: If the learner was asked to stop.
            NothingUsable: If every actor has delivered and nothing of it could be kept.
        """
        began = self._last_arrival = time.monotonic()
        iteration = _Iteration(version, evaluating)
        self._oldest = max(self._oldest, version - self._collection.max_staleness)
        self._newest = version
        self._service.actors.take_next(version)
        self._forget_quotas()
        self._take_waiting(iteration)
        while True:
            complete = self._complete(iteration)
            # What has arrived is taken, also from an actor that has left since.
            message = self._service.decisions.get(0.0 if complete else POLL_S)
            if message is not None:
                self._last_arrival = time.monotonic()
                self._take(message, iteration)
            elif complete:
                break
            self._look_around(iteration)
            self._leave_behind(iteration)
            self._check_any(iteration)
        self._service.actors.take_next(version + 1)
        self._wait_for_statistics("collection", iteration.quotas, STATISTICS_S)
        if evaluating:
            # A synchronous actor evaluates before it collects, another one may have collected long before.
            patience = EVALUATION_S if self._collection.max_staleness else STATISTICS_S
            self._wait_for_statistics("evaluation", self._everybody(version), patience)
        collections = self._with_known_tasks(self._pop_statistics("collection", iteration.quotas))
        self._collection_s = max((float(row["seconds"]) for row in collections), default=0.0)
        # Sent before those of the collection, so they are there by now.
        control = self._pop_statistics("control", iteration.quotas)
        evaluations = self._pop_evaluations(version)
        self._forget_statistics()
        seconds = time.monotonic() - began
        return Gathered(iteration.decisions(), collections, evaluations, control, seconds)

    def gather_evaluation(self, version: int, timeout_s: float) -> list[dict[str, Scalar]]:
        """Waits for the evaluations of a version alone, while actors are connected, at most `timeout_s` seconds.

        Raises:
            Stopped: If the learner was asked to stop.
        """
        self._newest = version
        self._wait_for_statistics("evaluation", self._everybody(version), timeout_s)
        return self._pop_evaluations(version)

    def wait_for_leaving(self, timeout_s: float) -> None:
        """Waits for actors that were told to leave: what they still send of people is kept, decisions come too late.

        Args:
            timeout_s: Longest wait.
        """
        deadline = time.monotonic() + timeout_s
        while self._service.actors.connected() and time.monotonic() < deadline:
            self._service.decisions.get(POLL_S)

    def discard_before(self, version: int) -> None:
        """Drops what older weights collected, now and when it arrives."""
        self._oldest = version
        for waiting in self._waiting.values():
            self.dropped["stale_decisions"] += sum(len(decisions) for _, decisions in waiting)
            waiting.clear()

    def _forget_quotas(self) -> None:
        """Forgets the quotas that cannot come again, and actors that have been gone for as long."""
        here = {info.actor for info in self._service.actors.connected()}
        self._seen = {quota for quota in self._seen if quota.version >= self._oldest}
        self._late &= here
        self.newest = {
            actor: newest
            for actor, newest in self.newest.items()
            if actor in here or newest[0] >= self._oldest
        }

    def _complete(self, iteration: _Iteration) -> bool:
        return bool(iteration.batches) and self._all_delivered(iteration)

    def _all_delivered(self, iteration: _Iteration) -> bool:
        """Whether every actor that is waited for has delivered, or as many as may."""
        connected = {info.actor for info in self._service.actors.connected()}
        return self._is_full(iteration) or connected - self._late <= iteration.delivered

    def _is_full(self, iteration: _Iteration) -> bool:
        return len(iteration.delivered) >= self._most_actors

    def _leave_behind(self, iteration: _Iteration) -> None:
        """Waits no longer for actors whose quota takes far longer than the first one did."""
        patience = self._collection.quota_patience
        if not patience or iteration.first_s is None:
            return
        least = EVALUATION_S if iteration.evaluating else QUOTA_S
        limit = max(least, patience * max(iteration.first_s, self._collection_s))
        for info in self._service.actors.connected():
            waited = time.monotonic() - max(iteration.began, info.joined_at)
            if info.actor in iteration.delivered or info.actor in self._late or waited < limit:
                continue
            self._late.add(info.actor)
            self.late_quotas += 1
            logger.warning(
                "Going on without actor %d at %s: it has sent no decisions for %.0f s "
                "(algorithm.collection.quota_patience); it is waited for again once it does",
                info.actor,
                info.peer,
                waited,
            )

    def _check_any(self, iteration: _Iteration) -> None:
        """Raises when every actor has delivered and nothing of it could be kept."""
        if not self._service.actors.connected() or not iteration.delivered or iteration.batches:
            return
        if self._all_delivered(iteration):
            raise NothingUsable(
                f"every decision of version {iteration.version} from actor(s) {sorted(iteration.delivered)} was "
                f"dropped ({dict(+self.dropped)}); the policy or the environment gives numbers that are not finite"
            )

    def _look_around(self, iteration: _Iteration | None = None) -> None:
        """Reads what came beside decisions; raises when asked to stop, says when nothing comes."""
        if self._stop.is_set():
            raise Stopped
        self._read_interactions()
        while (event := self._service.actors.next_event()) is not None:
            self._report(event, iteration)
        idle = time.monotonic() - self._last_arrival
        if idle > self._collection.idle_warning_s:
            self._last_arrival = time.monotonic()
            connected = {info.actor for info in self._service.actors.connected()}
            missing = sorted(connected - (iteration.delivered if iteration else set()))
            who = f"actor(s) {missing}" if connected else "an actor to connect"
            logger.warning("Nothing arrived for %.0f s; waiting for %s", idle, who)
        if self._report_on is not None and time.monotonic() - self._reported_at > REPORT_S:
            self._reported_at = time.monotonic()
            self._report_on()

    def _report(self, event: ActorEvent, iteration: _Iteration | None) -> None:
        self._late.discard(event.info.actor)
        if event.kind == "joined":
            logger.info("Actor %d joined from %s", event.info.actor, event.info.peer)
            return
        self.actors_left += 1
        delivered = iteration is not None and event.info.actor in iteration.delivered
        others = [info.actor for info in self._service.actors.connected()]
        logger.warning(
            "Actor %d left %s; going on with %s",
            event.info.actor,
            "after its quota" if delivered else "before it delivered its quota",
            f"actor(s) {others}" if others else "none until one connects",
        )

    def _take(self, message: Received, iteration: _Iteration) -> None:
        """Decodes a message of decisions, and keeps what can be learned from."""
        try:
            rollout = decode_decisions(message.payload, self._spec)
            self._check_sender(message, rollout.header.actor, rollout.decisions)
        except WireError as error:
            self._reject(message.actor, error, quota=True)
            return
        if len(self._tasks) < MOST_TASKS:
            self._tasks.update(rollout.decisions.task)
        self._take_quota(message, rollout, iteration)

    def _reject(self, actor: int, error: WireError, quota: bool = False) -> None:
        """Has the service count a message that is not what it should be, and tell its sender."""
        self._service.reject(actor, MALFORMED, str(error), quota)

    def _take_quota(self, message: Received, rollout: Rollout, iteration: _Iteration) -> None:
        """Keeps a quota for this iteration or a later one, unless it is too old or was there before."""
        self._late.discard(message.actor)
        quota = _Quota(message.actor, rollout.header.version, rollout.header.part)
        if not self._oldest <= quota.version <= iteration.version:
            self.dropped["stale_decisions"] += len(rollout.decisions)
            return
        if quota in self._seen or quota.part > self._collection.max_staleness:
            # It came back after a crash and collected its quota a second time: the same environments, twice.
            self.dropped["repeated_decisions"] += len(rollout.decisions)
            return
        if self._is_full(iteration) and quota.actor not in iteration.delivered:
            # Whoever comes under ever new numbers must not fill the memory.
            self.dropped["surplus_decisions"] += len(rollout.decisions)
            return
        self._seen.add(quota)
        self.newest[quota.actor] = (quota.version, time.monotonic())
        decisions = self._keep(rollout.decisions, quota.version)
        if message.actor in iteration.delivered:
            self._waiting[message.actor].append((quota, decisions))
        else:
            self._add(iteration, quota, decisions)

    def _take_waiting(self, iteration: _Iteration) -> None:
        """Takes one quota of each actor that is ahead; those that have become too old are dropped."""
        for waiting in self._waiting.values():
            while waiting and waiting[0][0].version < self._oldest:
                self.dropped["stale_decisions"] += len(waiting.popleft()[1])
            if waiting:
                self._add(iteration, *waiting.popleft())
        for actor in [actor for actor, waiting in self._waiting.items() if not waiting]:
            del self._waiting[actor]

    def _add(self, iteration: _Iteration, quota: _Quota, decisions: DecisionBatch) -> None:
        iteration.quotas.append(quota)
        if iteration.first_s is None:
            iteration.first_s = time.monotonic() - iteration.began
        if len(decisions):
            iteration.batches[quota.actor] = decisions

    def _check_sender(self, message: Received, actor: int, decisions: DecisionBatch) -> None:
        """An actor speaks for itself and for its own environments only."""
        if actor != message.actor:
            raise WireError(f"says it is of actor {actor}")
        if len(decisions) and bool((decisions.env // self._collection.num_envs != actor).any()):
            raise WireError("has decisions of another actor's environments")

    def _keep(self, decisions: DecisionBatch, version: int) -> DecisionBatch:
        finite = finite_rows(decisions)
        current = decisions.version == version
        broken, stale = int((~finite).sum()), int((~current).sum())
        self.dropped["non_finite_decisions"] += broken
        self.dropped["stale_decisions"] += stale
        keep = finite & current
        if bool(keep.all()):
            return decisions
        logger.warning(
            "Dropped %d of %d decisions: %d with values that are not finite, %d made by other weights than version %d",
            int((~keep).sum()),
            len(decisions),
            broken,
            stale,
            version,
        )
        return decisions.select(torch.nonzero(keep)[:, 0])

    def _everybody(self, version: int) -> list[_Quota]:
        """A quota of each actor that is waited for."""
        connected = {info.actor for info in self._service.actors.connected()}
        return [_Quota(actor, version) for actor in sorted(connected - self._late)]

    def _wait_for_statistics(self, kind: str, wanted: list[_Quota], timeout_s: float) -> None:
        """Waits for statistics of actors that are there to send them.

        Raises:
            Stopped: If the learner was asked to stop.
        """
        deadline = time.monotonic() + timeout_s
        self._read_interactions()
        while self._misses_statistics(kind, wanted) and time.monotonic() < deadline:
            self._look_around()
            message = self._service.interactions.get(POLL_S)
            if message is not None:
                self._read(message)

    def _misses_statistics(self, kind: str, wanted: list[_Quota]) -> bool:
        here = {info.actor for info in self._service.actors.connected()}
        return any((kind, quota) not in self._statistics for quota in wanted if quota.actor in here)

    def _read_interactions(self) -> None:
        while (message := self._service.interactions.get(0.0)) is not None:
            self._read(message)

    def _read(self, message: Received) -> None:
        try:
            values = decode_interaction(message.payload)
            kind, version, part = values.get("kind"), values.get("version"), values.get("part")
            if kind not in STATISTICS or type(version) is not int or type(part) is not int:
                raise WireError(
                    f"an interaction needs a kind (one of {list(STATISTICS)}), a version and a part"
                )
            by_task = [name for name in values if name.startswith(PER_TASK)]
            for name in (*STATISTICS[str(kind)], *by_task):
                _check_statistic(name, values.get(name))
            _check_consistent(str(kind), values)
        except WireError as error:
            self._reject(message.actor, error)
            return
        if kind == "collection":
            self._add_told(message.actor, values)
        # Of other versions nobody asks, and whoever sends can make up as many as it likes, under ever new numbers.
        asked = self._oldest <= version <= self._newest and 0 <= part <= self._collection.max_staleness
        if not asked or len(self._statistics) >= self._most_statistics:
            self.dropped["statistics"] += 1
            return
        self._statistics[str(kind), _Quota(message.actor, version, part)] = values

    def _add_told(self, actor: int, values: Mapping[str, Scalar]) -> None:
        """Adds what an actor has counted since it told last; its counts begin anew with its process."""
        now = {name: max(0, int(values[name])) for name in ("process", *TOLD)}
        before = self._last_told.pop(actor, {})
        goes_on = before.get("process") == now["process"]
        for name in TOLD:
            self.told[name] += max(0, now[name] - before[name]) if goes_on else now[name]
        self._last_told[actor] = now
        if len(self._last_told) > REMEMBERED:
            del self._last_told[next(iter(self._last_told))]

    def _pop_statistics(self, kind: str, wanted: Iterable[_Quota]) -> list[dict[str, Scalar]]:
        """Takes what is there of some quotas, by actor."""
        keys = [(kind, quota) for quota in sorted(wanted, key=lambda quota: quota.actor)]
        return [
            self._statistics.pop(key) | {"actor": key[1].actor} for key in keys if key in self._statistics
        ]

    def _with_known_tasks(self, rows: list[dict[str, Scalar]]) -> list[dict[str, Scalar]]:
        """Those statistics that name no task but those of decisions; the others are rejected."""
        known = []
        for row in rows:
            strange = sorted(of_tasks(row, EPISODES).keys() - self._tasks)
            if strange and len(self._tasks) < MOST_TASKS:
                problem = (
                    f"interaction: {len(strange)} tasks that no decision has, such as {short(strange[0])!r}"
                )
                self._reject(int(row["actor"]), WireError(problem))
            else:
                known.append(row)
        return known

    def _pop_evaluations(self, version: int) -> list[dict[str, Scalar]]:
        """Takes every evaluation of a version, also of actors that have left."""
        found = [
            quota for kind, quota in self._statistics if kind == "evaluation" and quota.version == version
        ]
        rows = self._pop_statistics("evaluation", found)
        # An episode of an evaluation may have a text of its own; what is said of it by name is then left out.
        strange = {
            EPISODES + task for row in rows for task in of_tasks(row, EPISODES) if task not in self._tasks
        }
        strange |= {SUCCESSES + name.removeprefix(EPISODES) for name in strange}
        return [{name: value for name, value in row.items() if name not in strange} for row in rows]

    def _forget_statistics(self) -> None:
        """Forgets those that nobody will ask for any more."""
        old = [key for key in self._statistics if key[1].version < self._oldest]
        self.dropped["statistics"] += len(old)
        for key in old:
            del self._statistics[key]


def _check_statistic(name: str, value: Scalar | None) -> None:
    """A statistic is a number that a metric can be made of: a count, or a sum, or how long something took."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= MOST:
        raise WireError(f"interaction {short(name)}: {ascii(value)[:80]} is not a number of a usable size")
    if value < 0 and name not in SIGNED:
        raise WireError(f"interaction {short(name)}: {value} is below 0")
    if not isinstance(value, int) and (name in COUNTED or name.startswith(PER_TASK)):
        raise WireError(f"interaction {short(name)}: {value} is not a whole number")


def _check_consistent(kind: str, values: Mapping[str, Scalar]) -> None:
    """No more episodes were solved than there were, of no task either; the tasks' episodes are all episodes.

    Raises:
        WireError: If not.
    """
    if kind == "control":
        return
    episodes, solved = of_tasks(values, EPISODES), of_tasks(values, SUCCESSES)
    _check_solved("", values["successes"], values["episodes"])
    if episodes.keys() != solved.keys():
        raise WireError("interaction: the tasks that have episodes are not those that have successes")
    for task, count in episodes.items():
        _check_solved(f" of the task {short(task)!r}", solved[task], count)
    if episodes and (sum(episodes.values()), sum(solved.values())) != (
        values["episodes"],
        values["successes"],
    ):
        raise WireError("interaction: the episodes of the tasks are not those of all tasks together")


def _check_solved(what: str, solved: Scalar, episodes: Scalar) -> None:
    if solved > episodes:  # type: ignore[operator]
        raise WireError(f"interaction: {solved} of {episodes} episodes{what} were solved")
