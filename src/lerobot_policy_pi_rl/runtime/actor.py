"""The actor: receives weights, collects decisions with them, sends them to the learner."""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from threading import Event, Timer

import numpy as np

from ..algorithm.demonstrations import DemonstrationBatch
from .access import read_actor_access
from .client import LearnerClient, LearnerLost
from .collector import Collector, Group, Interrupted, make_eval_groups, make_groups
from .evaluation import evaluate
from .pipeline import PIRLTrainConfig, agreed_settings, make_player, parts
from .seeds import VALIDATION_SEED
from .tasks import count_by_task
from .wire import (
    MAX_DEMONSTRATION_ROWS,
    RolloutHeader,
    Scalar,
    Weights,
    WeightsHeader,
    encode_decisions,
    encode_demonstrations,
    max_weights_bytes,
)

logger = logging.getLogger(__name__)

# Seconds after which a wait for weights looks whether it should stop.
POLL_S = 0.5
# Seconds that an actor takes at most to send what is left before it disconnects a robot.
LEAVING_S = 3.0


class Pace:
    """How far an actor may be ahead of its learner.

    The learner takes one quota of it for each version from the first one on. So an actor that has sent no more quotas
    than that, and `max_staleness` more, never sends one that will be too old when its turn comes.

    Attributes:
        version: Of the weights at hand; -1 before the first.
    """

    def __init__(self, max_staleness: int, next_version: int = 0) -> None:
        """Nothing was received yet.

        Args:
            max_staleness: As in the configuration of the collection.
            next_version: The version whose iteration takes the first quota: while the learner trains, that is not
                the version of its newest weights but the one that comes of this training.
        """
        self.version = -1
        self._next = next_version
        self._max_staleness = max_staleness
        self._first, self._sent, self._part = 0, 0, 0

    def take(self, header: WeightsHeader) -> bool:
        """Notes new weights; true when fresh episodes are to begin with them."""
        restarts = header.restart or self.version < 0
        if restarts:
            self._first, self._sent = max(header.version, self._next), 0
        self.version, self._part = header.version, 0
        return restarts

    @property
    def may_collect(self) -> bool:
        """Whether the next quota can be collected now."""
        return self.version >= 0 and self._sent <= self.version - self._first + self._max_staleness

    def next_part(self) -> int:
        """Counts a quota; its number among those of the weights at hand."""
        self._sent, self._part = self._sent + 1, self._part + 1
        return self._part - 1


@dataclass
class _Message:
    """What people have shown, as it is sent.

    Attributes:
        payload: Of `wire.encode_demonstrations`.
        steps: How many steps it has.
        sent: The version at hand when it was sent on the present connection; None if it was not.
    """

    payload: bytes
    steps: int
    sent: int | None = None


class Shown:
    """What people have shown, kept until the learner surely has it: a connection may break before it has arrived.

    gRPC does not say what has arrived, but weights do. An iteration is over when every connected actor has delivered a
    quota that is at most `max_staleness` versions old. So that of version `v + max_staleness + 1` takes one that was
    collected with newer weights than v, and with it all that this actor had sent with v on the same connection.
    What is sent again although it had arrived the learner knows by its content.
    """

    def __init__(self, max_staleness: int, capacity: int, max_bytes: int) -> None:
        """Nothing was shown yet.

        Args:
            max_staleness: As in the configuration of the collection.
            capacity: Steps to keep, the newest: the learner would not keep more either.
            max_bytes: Most bytes of them.
        """
        self._versions, self._capacity, self._max_bytes = max_staleness + 2, capacity, max_bytes
        self._version = -1
        self._kept: list[_Message] = []
        # Steps that made way for newer ones.
        self.given_up = 0

    def __len__(self) -> int:
        """Steps that the learner may not have."""
        return sum(message.steps for message in self._kept)

    @property
    def unsent(self) -> int:
        """Of these, the steps that were not sent on the present connection."""
        return sum(message.steps for message in self._kept if message.sent is None)

    def add(self, batch: DemonstrationBatch | None) -> None:
        """Keeps what people did; None if they did nothing."""
        for some in batch.split(MAX_DEMONSTRATION_ROWS) if batch is not None else ():
            self._kept.append(_Message(encode_demonstrations(some), len(some)))
        while self._is_beyond_limits() and len(self._kept) > 1:
            steps = self._kept.pop(0).steps
            self.given_up += steps
            logger.warning("%d steps of a person are given up for newer ones", steps)

    def _is_beyond_limits(self) -> bool:
        size = sum(len(message.payload) for message in self._kept)
        return len(self) > self._capacity or size > self._max_bytes

    def take(self, version: int) -> None:
        """Notes weights that have come on the present connection, and what the learner must have by now."""
        self._version = version
        self._kept = [
            message
            for message in self._kept
            if message.sent is None or version < message.sent + self._versions
        ]

    def lose(self) -> None:
        """Notes that the connection is gone: what was sent on it may not have arrived."""
        for message in self._kept:
            message.sent = None

    def send(self, send: Callable[[bytes], None]) -> None:
        """Sends what was not sent on the present connection."""
        for message in self._kept:
            if message.sent is None:
                send(message.payload)
                message.sent = self._version


class Actor:
    """One actor process: environments, policy, and a connection to the learner."""

    def __init__(self, cfg: PIRLTrainConfig, stop: Event) -> None:
        """Starts the environments and loads the policy.

        Args:
            cfg: Validated configuration.
            stop: Set from outside to leave at the next opportunity.

        Raises:
            ConfigError: If the token or a certificate cannot be used.
        """
        policy_cfg, algorithm_cfg, env_cfg = parts(cfg)
        self._stop, self._collection = stop, algorithm_cfg.collection
        link = policy_cfg.actor_learner_config
        access = read_actor_access(algorithm_cfg.security, link.learner_host, link.learner_port)
        with contextlib.ExitStack() as made:
            # Before all that takes long, because it forks: no thread of gRPC or torch may run yet.
            groups = make_groups(env_cfg, self._collection, policy_cfg.device or "cpu", stop)
            made.callback(_close, groups)
            reports = groups[0].reports
            own = make_eval_groups(env_cfg, self._collection, reports) if cfg.env_eval_freq > 0 else []
            made.callback(_close, own)
            # Where the policy is validated.
            self._groups, self._eval_groups = groups, own or groups
            self._player = make_player(cfg)
            self._collector = Collector(self._player, groups, self._collection, cfg.seed or 0, stop)
            self._shown = Shown(
                self._collection.max_staleness,
                algorithm_cfg.intervention_capacity,
                algorithm_cfg.intervention_megabytes * 10**6,
            )
            # Tells the learner which counts go on and which begin anew.
            self._process = uuid.uuid4().int % 2**31
            self._validation = VALIDATION_SEED + np.arange(cfg.eval.n_episodes)
            self._client = LearnerClient(
                link.learner_host,
                link.learner_port,
                self._collection.actor_id,
                agreed_settings(cfg, self._player),
                access=access,
                max_weights_bytes=max_weights_bytes(self._player.policy.trainable_state()),
            )
            # From now on `close` ends them.
            made.pop_all()

    def run(self) -> None:
        """Collects until the learner says that training is over, or `stop` is set.

        Raises:
            ConnectionError: If the learner cannot be reached, refuses, or does not come back.
        """
        self._client.connect(self._collection.connect_timeout_s, self._stop)
        if not self._stop.is_set():
            logger.info("Actor %d is connected", self._collection.actor_id)
        pace = Pace(self._collection.max_staleness, self._client.next_version)
        latency = 0.0
        while not self._stop.is_set():
            try:
                weights = self._client.wait_weights(pace.version, 0.0 if pace.may_collect else POLL_S)
            except LearnerLost as error:
                self._reconnect(error)
                pace = Pace(self._collection.max_staleness, self._client.next_version)
                continue
            # Lost while it works: the next wait says so, or has the final weights that came before the end.
            # Interrupted when asked to leave, which the loop sees.
            with contextlib.suppress(LearnerLost, Interrupted):
                if weights is not None:
                    latency = max(0.0, time.time() - weights.header.sent_at)
                    restarts = pace.take(weights.header)
                    if self._take(weights, restarts):
                        return
                if pace.may_collect:
                    self._collect(pace.version, pace.next_part(), latency)

    def _reconnect(self, error: LearnerLost) -> None:
        """Waits for a learner that was there, unless this actor is asked to leave."""
        self._shown.lose()
        if self._stop.is_set():
            return
        logger.warning("%s; waiting up to %.0f s for it", error, self._collection.connect_timeout_s)
        self._client.reconnect(self._collection.connect_timeout_s, self._stop)
        if not self._stop.is_set():
            logger.info("Actor %d is connected again", self._collection.actor_id)

    def _take(self, weights: Weights, restarts: bool) -> bool:
        """Loads weights and does what their message asks for; true when it is the last."""
        header = weights.header
        self._shown.take(header.version)
        if not header.final:
            # What was shown before the connection was lost comes first.
            self._shown.send(self._send_message)
        self._player.policy.load_trainable_state(weights.tensors)
        if header.evaluate:
            self._evaluate(header.version)
            # The collection's own environments are in the middle of validation episodes, which nobody may learn from.
            restarts = restarts or self._eval_groups is self._groups
        if restarts and not header.final:
            if weights.task_shares:
                self._collector.focus(weights.task_shares)
            self._collector.restart(header.version)
        return header.final

    def _evaluate(self, version: int) -> None:
        """Runs this actor's share of the validation starts and reports it."""
        mine, actors = self._collection.actor_id, self._collection.num_actors
        # An actor beyond the configured number would run somebody else's starts a second time.
        share = self._validation[mine::actors] if mine < actors else self._validation[:0]
        began = time.perf_counter()
        result = evaluate(self._player, self._eval_groups, share, self._stop)
        self._client.send_interaction(
            {
                "kind": "evaluation",
                "version": version,
                "part": 0,
                "episodes": len(share),
                "judged": len(share) if result.known else 0,
                "successes": int(result.success.sum()),
                "env_steps": result.env_steps,
                "seconds": time.perf_counter() - began,
                **(count_by_task(result.tasks, result.success) if result.known else {}),
            },
            self._stop,
        )

    def _collect(self, version: int, part: int, latency: float) -> None:
        """Collects a quota and sends it."""
        if self._collection.group_size > 1:
            self._collector.restart(version, part)
        collected = self._collector.collect(version, part)
        self._shown.add(collected.demonstrations)
        quota: dict[str, Scalar] = {"version": version, "part": part}
        if collected.control is not None:
            self._client.send_interaction(
                {"kind": "control", **quota, **asdict(collected.control)}, self._stop
            )
        told: dict[str, Scalar] = {"kind": "collection", **quota, "latency": latency, **self._counted()}
        self._client.send_interaction(
            {**told, **asdict(collected.statistics), **collected.by_task}, self._stop
        )
        # Before the decisions, so that the learner has them for the same iteration.
        self._shown.send(self._send_message)
        header = RolloutHeader(self._collection.actor_id, version, part)
        self._send_message(encode_decisions(collected.decisions, header))

    def _counted(self) -> dict[str, Scalar]:
        """What this process has dropped and tried again since it started."""
        unkept = self._shown.given_up + self._collector.unkept_steps
        own = 0 if self._eval_groups is self._groups else sum(g.envs.failures for g in self._eval_groups)
        failed = self._collector.failures + own
        return {
            "process": self._process,
            **self._client.counts,
            "unkept_steps": unkept,
            "failed_episodes": failed,
        }

    def _send_message(self, payload: bytes) -> None:
        self._client.send_decisions(payload, self._stop)

    def close(self) -> None:
        """Sends what is queued and what was shown, leaves the learner and ends the environments."""
        deadline = time.monotonic() + LEAVING_S
        try:
            self._send_rest()
        finally:
            taken = self._client.close(max(0.0, deadline - time.monotonic()))
            if lost := self._shown.unsent if taken else len(self._shown):
                logger.warning("%d steps of a person may be lost: no learner has said that it has them", lost)
            self._collector.close()
            _close(self._eval_groups)

    def _send_rest(self) -> None:
        """Queues what people have shown in a quota that was not finished, if the learner is still there."""
        self._shown.add(self._collector.take_demonstrations())
        if not self._shown.unsent:
            return
        late = Event()
        timer = Timer(LEAVING_S, late.set)
        timer.start()
        try:
            with contextlib.suppress(LearnerLost):
                self._shown.send(partial(self._client.send_decisions, stop=late))
        finally:
            timer.cancel()


def _close(groups: list[Group]) -> None:
    """Ends environments."""
    for group in groups:
        group.envs.close()
