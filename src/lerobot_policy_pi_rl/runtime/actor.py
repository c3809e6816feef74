"""The actor: receives weights, collects decisions with them, sends them to the learner."""

import contextlib
import logging
import time
from dataclasses import asdict
from threading import Event

import numpy as np

from .access import read_actor_access
from .client import LearnerClient, LearnerLost
from .collector import Collector, Interrupted, make_eval_groups, make_groups
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
)

logger = logging.getLogger(__name__)

# Seconds after which a wait for weights looks whether it should stop.
POLL_S = 0.5


class Pace:
    """How far an actor may be ahead of its learner.

    The learner takes one quota of it for each version from the first one on. So an actor that has sent no more quotas
    than that, and `max_staleness` more, never sends one that will be too old when its turn comes.

    Attributes:
        version: Of the weights at hand; -1 before the first.
    """

    def __init__(self, max_staleness: int) -> None:
        """Nothing was received yet.

        Args:
            max_staleness: As in the configuration of the collection.
        """
        self.version = -1
        self._max_staleness = max_staleness
        self._first, self._sent, self._part = 0, 0, 0

    def take(self, header: WeightsHeader) -> bool:
        """Notes new weights; true when fresh episodes are to begin with them."""
        restarts = header.restart or self.version < 0
        if restarts:
            self._first, self._sent = header.version, 0
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
        access = read_actor_access(algorithm_cfg.security)
        # Before all that takes long, because it forks: no thread of gRPC or torch may run yet.
        groups = make_groups(env_cfg, self._collection, policy_cfg.device or "cpu", stop)
        own = make_eval_groups(env_cfg, self._collection) if cfg.env_eval_freq > 0 else []
        # Where the policy is validated.
        self._groups, self._eval_groups = groups, own or groups
        self._player = make_player(cfg)
        self._collector = Collector(self._player, groups, self._collection, cfg.seed or 0, stop)
        self._validation = VALIDATION_SEED + np.arange(cfg.eval.n_episodes)
        link = policy_cfg.actor_learner_config
        self._client = LearnerClient(
            link.learner_host,
            link.learner_port,
            self._collection.actor_id,
            agreed_settings(cfg, self._player),
            access=access,
        )

    def run(self) -> None:
        """Collects until the learner says that training is over, or `stop` is set.

        Raises:
            ConnectionError: If the learner cannot be reached, refuses, or does not come back.
        """
        self._client.connect(self._collection.connect_timeout_s, self._stop)
        if not self._stop.is_set():
            logger.info("Actor %d is connected", self._collection.actor_id)
        pace = Pace(self._collection.max_staleness)
        latency = 0.0
        while not self._stop.is_set():
            try:
                weights = self._client.wait_weights(pace.version, 0.0 if pace.may_collect else POLL_S)
            except LearnerLost as error:
                self._reconnect(error)
                pace = Pace(self._collection.max_staleness)
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
        if self._stop.is_set():
            return
        logger.warning("%s; waiting up to %.0f s for it", error, self._collection.connect_timeout_s)
        self._client.reconnect(self._collection.connect_timeout_s, self._stop)
        if not self._stop.is_set():
            logger.info("Actor %d is connected again", self._collection.actor_id)

    def _take(self, weights: Weights, restarts: bool) -> bool:
        """Loads weights and does what their message asks for; true when it is the last."""
        header = weights.header
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
                "successes": int(result.success.sum()),
                "env_steps": result.env_steps,
                "seconds": time.perf_counter() - began,
                **count_by_task(result.tasks, result.success),
            },
            self._stop,
        )

    def _collect(self, version: int, part: int, latency: float) -> None:
        """Collects a quota and sends it."""
        if self._collection.group_size > 1:
            self._collector.restart(version, part)
        collected = self._collector.collect(version, part)
        quota: dict[str, Scalar] = {"version": version, "part": part}
        if collected.control is not None:
            self._client.send_interaction(
                {"kind": "control", **quota, **asdict(collected.control)}, self._stop
            )
        told: dict[str, Scalar] = {"kind": "collection", **quota, "latency": latency}
        self._client.send_interaction(
            {**told, **asdict(collected.statistics), **collected.by_task}, self._stop
        )
        if collected.demonstrations is not None:
            # Before the decisions, so that the learner has them for the same iteration.
            for some in collected.demonstrations.split(MAX_DEMONSTRATION_ROWS):
                self._client.send_decisions(encode_demonstrations(some), self._stop)
        header = RolloutHeader(self._collection.actor_id, version, part)
        self._client.send_decisions(encode_decisions(collected.decisions, header), self._stop)

    def close(self) -> None:
        """Sends what is queued, leaves the learner and ends the environments."""
        self._client.close()
        self._collector.close()
        for group in self._eval_groups:
            group.envs.close()
