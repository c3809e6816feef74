"""The actor: receives weights, collects decisions with them, sends them to the learner."""

import contextlib
import logging
import time
from dataclasses import asdict
from threading import Event

import numpy as np

from .access import read_actor_access
from .client import LearnerClient, LearnerLost
from .collector import Collector, make_eval_groups, make_groups
from .evaluation import evaluate
from .pipeline import PIRLTrainConfig, agreed_settings, make_player, parts
from .seeds import VALIDATION_SEED
from .wire import RolloutHeader, Weights, encode_decisions

logger = logging.getLogger(__name__)

# Seconds after which a wait for weights looks whether it should stop.
POLL_S = 0.5


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
        groups = make_groups(env_cfg, self._collection)
        own = make_eval_groups(env_cfg, self._collection) if cfg.env_eval_freq > 0 else []
        # Where the policy is validated.
        self._eval_groups = own or groups
        self._player = make_player(cfg)
        self._collector = Collector(self._player, groups, self._collection, cfg.seed or 0)
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
        version, fresh = -1, True
        while not self._stop.is_set():
            try:
                weights = self._client.wait_weights(version, POLL_S)
            except LearnerLost as error:
                self._reconnect(error)
                version, fresh = -1, True
                continue
            if weights is None:
                continue
            # Lost while it collected: the next wait says so, or has the final weights that came before the end.
            with contextlib.suppress(LearnerLost):
                if self._serve(weights, fresh):
                    return
            version, fresh = weights.header.version, False

    def _reconnect(self, error: LearnerLost) -> None:
        """Waits for a learner that was there, unless this actor is asked to leave."""
        if self._stop.is_set():
            return
        logger.warning("%s; waiting up to %.0f s for it", error, self._collection.connect_timeout_s)
        self._client.reconnect(self._collection.connect_timeout_s, self._stop)
        if not self._stop.is_set():
            logger.info("Actor %d is connected again", self._collection.actor_id)

    def _serve(self, weights: Weights, fresh: bool) -> bool:
        """Does what one message of weights asks for; true when it is the last."""
        header = weights.header
        self._player.policy.load_trainable_state(weights.tensors)
        latency = max(0.0, time.time() - header.sent_at)
        if header.evaluate:
            self._evaluate(header.version)
        if header.final:
            return True
        if header.restart or fresh or self._collection.group_size > 1:
            self._collector.restart(header.version)
        self._collect(header.version, latency)
        return False

    def _evaluate(self, version: int) -> None:
        """Runs this actor's share of the validation starts and reports it."""
        mine, actors = self._collection.actor_id, self._collection.num_actors
        # An actor beyond the configured number would run somebody else's starts a second time.
        share = self._validation[mine::actors] if mine < actors else self._validation[:0]
        began = time.perf_counter()
        result = evaluate(self._player, self._eval_groups, share)
        self._client.send_interaction(
            {
                "kind": "evaluation",
                "version": version,
                "episodes": len(share),
                "successes": int(result.success.sum()),
                "env_steps": result.env_steps,
                "seconds": time.perf_counter() - began,
            }
        )

    def _collect(self, version: int, latency: float) -> None:
        """Collects the quota of a version and sends it."""
        collected = self._collector.collect(version)
        self._client.send_interaction(
            {"kind": "collection", "version": version, "latency": latency, **asdict(collected.statistics)}
        )
        header = RolloutHeader(self._collection.actor_id, version, iteration_part=0, last=True)
        self._client.send_decisions(encode_decisions(collected.decisions, header))

    def close(self) -> None:
        """Sends what is queued, leaves the learner and ends the environments."""
        self._client.close()
        self._collector.close()
        for group in self._eval_groups:
            group.envs.close()
