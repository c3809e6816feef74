"""Gathers the decisions of one iteration from all actors, and keeps out what must not be learned from."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from threading import Event

import torch

from ..algorithm.configuration_pi_rl_algorithm import CollectionConfig
from ..algorithm.decisions import DecisionBatch
from .service import ActorEvent, PIRLLearnerService, Received
from .wire import Rollout, Scalar, WireError, WireSpec, decode_decisions, decode_interaction, finite_rows

logger = logging.getLogger(__name__)

# Seconds between looks at the connections and at the stop signal while nothing arrives.
POLL_S = 0.2
# Seconds that an actor's statistics may arrive after its decisions: they travel on another stream.
STATISTICS_S = 5.0


# Why something that arrived is kept from the algorithm.
DROPPED = ("non_finite_decisions", "stale_decisions", "repeated_decisions", "malformed_messages")
# What the learner reads of an actor's statistics, beside their kind and version.
STATISTICS = {
    "collection": ("episodes", "successes", "return_sum", "length_sum", "seconds", "latency"),
    "evaluation": ("episodes", "successes"),
}


class NothingUsable(RuntimeError):
    """Every decision of an iteration had to be dropped; the text is one line."""


class Stopped(Exception):
    """The learner was asked to stop while it waited."""


@dataclass(frozen=True)
class Gathered:
    """One iteration's data.

    Attributes:
        decisions: Of all actors, all made by the wanted version.
        collections: Statistics of each actor's collection.
        evaluations: Statistics of each actor's share of an evaluation of this version.
        seconds: How long the learner waited for all this.
    """

    decisions: DecisionBatch
    collections: list[dict[str, Scalar]]
    evaluations: list[dict[str, Scalar]]
    seconds: float


@dataclass
class _Iteration:
    """What has arrived of one iteration."""

    version: int
    batches: list[DecisionBatch] = field(default_factory=list)
    delivered: set[int] = field(default_factory=set)
    rows: Counter[int] = field(default_factory=Counter)


class Gatherer:
    """Reads the service's inboxes for the learner.

    An iteration is complete when every connected actor has delivered its quota, and at least one has: an actor that
    dies is not waited for, one that joins is.
    """

    def __init__(
        self, service: PIRLLearnerService, spec: WireSpec, collection: CollectionConfig, stop: Event
    ) -> None:
        """Prepares the gathering.

        Args:
            service: Where actors connect.
            spec: The decisions that are accepted.
            collection: The quota.
            stop: Set from outside to stop waiting.
        """
        self._service, self._spec, self._collection, self._stop = service, spec, collection, stop
        self._statistics: dict[tuple[str, int, int], dict[str, Scalar]] = {}
        # The version whose statistics are kept.
        self._version = -1
        self._last_arrival = time.monotonic()
        self.dropped = Counter(dict.fromkeys(DROPPED, 0))
        self.actors_left = 0

    def wait_for_actors(self) -> None:
        """Waits until the configured number of actors is connected.

        Raises:
            Stopped: If the learner was asked to stop.
        """
        wanted = self._collection.num_actors
        if not self._service.wait_connected(wanted, timeout=0.0):
            logger.info(
                "Waiting for %d actor(s); start them with lerobot-pi-rl-actor and the same config", wanted
            )
        while not self._service.wait_connected(wanted, POLL_S):
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
        iteration, self._version = _Iteration(version), version
        while not self._complete(iteration):
            self._check_any(iteration)
            message = self._service.decisions.get(POLL_S)
            if message is not None:
                self._last_arrival = time.monotonic()
                self._take(message, iteration)
            self._look_around(iteration)
        kinds = ("collection", "evaluation") if evaluating else ("collection",)
        self._wait_for_statistics(iteration, kinds)
        found = {kind: self._pop_statistics(kind, version) for kind in ("collection", "evaluation")}
        decisions = DecisionBatch.concatenate(iteration.batches)
        return Gathered(decisions, found["collection"], found["evaluation"], time.monotonic() - began)

    def gather_evaluation(self, version: int, timeout_s: float) -> list[dict[str, Scalar]]:
        """Waits for the evaluations of a version alone, while actors are connected, at most `timeout_s` seconds.

        Raises:
            Stopped: If the learner was asked to stop.
        """
        self._version = version
        deadline = time.monotonic() + timeout_s
        expected = {info.actor for info in self._service.connected()}
        while time.monotonic() < deadline:
            self._look_around()
            here = {actor for kind, actor, of in self._statistics if kind == "evaluation" and of == version}
            if expected & {info.actor for info in self._service.connected()} <= here:
                break
            time.sleep(POLL_S)
        self._read_interactions()
        return self._pop_statistics("evaluation", version)

    def _complete(self, iteration: _Iteration) -> bool:
        connected = {info.actor for info in self._service.connected()}
        return bool(iteration.batches) and connected <= iteration.delivered

    def _check_any(self, iteration: _Iteration) -> None:
        """Raises when every actor has delivered and nothing of it could be kept."""
        connected = {info.actor for info in self._service.connected()}
        if connected and connected <= iteration.delivered and not iteration.batches:
            raise NothingUsable(
                f"every decision of version {iteration.version} was dropped ({dict(+self.dropped)}); "
                "the policy or the environment gives numbers that are not finite"
            )

    def _look_around(self, iteration: _Iteration | None = None) -> None:
        """Reads what came beside decisions; raises when asked to stop, says when nothing comes."""
        if self._stop.is_set():
            raise Stopped
        self._read_interactions()
        while (event := self._service.next_event()) is not None:
            self._report(event, iteration)
        idle = time.monotonic() - self._last_arrival
        if idle > self._collection.idle_warning_s:
            self._last_arrival = time.monotonic()
            connected = {info.actor for info in self._service.connected()}
            missing = sorted(connected - (iteration.delivered if iteration else set()))
            who = f"actor(s) {missing}" if connected else "an actor to connect"
            logger.warning("Nothing arrived for %.0f s; waiting for %s", idle, who)

    def _report(self, event: ActorEvent, iteration: _Iteration | None) -> None:
        if event.kind == "joined":
            logger.info("Actor %d joined from %s", event.info.actor, event.info.peer)
            return
        self.actors_left += 1
        delivered = iteration is not None and event.info.actor in iteration.delivered
        others = [info.actor for info in self._service.connected()]
        logger.warning(
            "Actor %d left %s; going on with %s",
            event.info.actor,
            "after its quota" if delivered else "before it delivered its quota",
            f"actor(s) {others}" if others else "none until one connects",
        )

    def _take(self, message: Received, iteration: _Iteration) -> None:
        """Decodes a message of decisions and keeps what can be learned from."""
        try:
            rollout = decode_decisions(message.payload, self._spec)
            self._check_sender(message, rollout.header.actor, rollout.decisions)
            self._check_quota(rollout, iteration)
        except WireError as error:
            self._service.reject(message.actor, "malformed", str(error))
            self.dropped["malformed_messages"] += 1
            return
        if rollout.header.version != iteration.version:
            self.dropped["stale_decisions"] += len(rollout.decisions)
            return
        if message.actor in iteration.delivered:
            # It came back after a crash and collected its quota a second time: the same environments, twice.
            self.dropped["repeated_decisions"] += len(rollout.decisions)
            return
        decisions = self._keep(rollout.decisions, iteration.version)
        if len(decisions):
            iteration.batches.append(decisions)
        if rollout.header.last:
            iteration.delivered.add(message.actor)

    def _check_sender(self, message: Received, actor: int, decisions: DecisionBatch) -> None:
        """An actor speaks for itself and for its own environments only."""
        if actor != message.actor:
            raise WireError(f"says it is of actor {actor}")
        if len(decisions) and bool((decisions.env // self._collection.num_envs != actor).any()):
            raise WireError("has decisions of another actor's environments")

    def _check_quota(self, rollout: Rollout, iteration: _Iteration) -> None:
        """An actor sends its quota of a version and no more, in however many parts."""
        header = rollout.header
        if header.version != iteration.version or header.actor in iteration.delivered:
            return
        rows = iteration.rows[header.actor] + len(rollout.decisions)
        if rows > self._spec.max_rows:
            raise WireError(f"has more decisions than the quota of {self._spec.max_rows}")
        iteration.rows[header.actor] = rows

    def _keep(self, decisions: DecisionBatch, version: int) -> DecisionBatch:
        finite = finite_rows(decisions)
        current = decisions.version == version
        self.dropped["non_finite_decisions"] += int((~finite).sum())
        self.dropped["stale_decisions"] += int((~current).sum())
        keep = finite & current
        if bool(keep.all()):
            return decisions
        logger.warning("Dropped %d of %d decisions", int((~keep).sum()), len(decisions))
        return decisions.select(torch.nonzero(keep)[:, 0])

    def _wait_for_statistics(self, iteration: _Iteration, kinds: tuple[str, ...]) -> None:
        deadline = time.monotonic() + STATISTICS_S
        self._read_interactions()
        while self._misses_statistics(iteration, kinds) and time.monotonic() < deadline:
            message = self._service.interactions.get(POLL_S)
            if message is not None:
                self._read(message)

    def _misses_statistics(self, iteration: _Iteration, kinds: tuple[str, ...]) -> bool:
        """Whether something is still to come from an actor that delivered and is there to send it."""
        here = iteration.delivered & {info.actor for info in self._service.connected()}
        wanted = {(kind, actor, iteration.version) for kind in kinds for actor in here}
        return not wanted <= self._statistics.keys()

    def _read_interactions(self) -> None:
        while (message := self._service.interactions.get(0.0)) is not None:
            self._read(message)

    def _read(self, message: Received) -> None:
        try:
            values = decode_interaction(message.payload)
            kind, version = values.get("kind"), values.get("version")
            if kind not in STATISTICS or type(version) is not int:
                raise WireError(f"an interaction needs a kind (one of {list(STATISTICS)}) and a version")
            for name in STATISTICS[str(kind)]:
                _check_statistic(name, values.get(name))
        except WireError as error:
            self._service.reject(message.actor, "malformed", str(error))
            self.dropped["malformed_messages"] += 1
            return
        # Of any other version nobody asks, and whoever sends can make up as many as it likes.
        if version == self._version:
            self._statistics[str(kind), message.actor, version] = values

    def _pop_statistics(self, kind: str, version: int) -> list[dict[str, Scalar]]:
        """Takes what is there of a version, by actor."""
        keys = sorted(key for key in self._statistics if key[0] == kind and key[2] <= version)
        found = {key: self._statistics.pop(key) for key in keys}
        return [values for key, values in found.items() if key[2] == version]


def _check_statistic(name: str, value: Scalar | None) -> None:
    """A statistic is a number that a metric can be made of."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**63:
        raise WireError(f"interaction {name}: {ascii(value)[:80]} is not a number of a usable size")
