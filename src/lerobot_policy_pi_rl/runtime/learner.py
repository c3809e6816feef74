"""The learner: a runner around the algorithm. Receive, update, publish, checkpoint, log."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version as package_version
from pathlib import Path
from threading import Event
from typing import Any

import torch
from lerobot.rl.algorithms.configs import TrainingStats
from lerobot.rl.algorithms.factory import make_algorithm
from lerobot.rl.trainer import RLTrainer
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK
from lerobot.utils.random_utils import set_seed
from torch import Tensor

from ..algorithm.decisions import DecisionBatch
from ..algorithm.pi_rl import Demonstrations, PIRLAlgorithm, RatioError, UpdateStopped
from ..algorithm.storage import Rollout, prepare
from . import checkpoint
from .access import read_learner_access
from .best import BestCheckpoint
from .demonstrations import DemonstrationSource, for_loss
from .findings import FirstLook
from .gather import Gathered, Gatherer, Stopped
from .guard import RUNAWAY_ITERATIONS, has_collapsed, is_conclusive, runaway_cause
from .interventions import InterventionStore, either
from .limits import Limits
from .metrics import MetricsWriter, make_tracker
from .packing import WireError
from .pipeline import PIRLTrainConfig, agreed_settings, make_player, parts, wire_spec
from .progress import Progress
from .robots import is_robot
from .server import LearnerServer
from .service import MALFORMED, PIRLLearnerService
from .snapshot import NotFinite, check_trained, take_snapshot
from .statistics import control_metrics, learning_metrics, rollout_metrics, total
from .tasks import success_by_task, task_shares
from .wire import Scalar, WeightsHeader, WireSpec, encode_weights

logger = logging.getLogger(__name__)

# Messages of an actor that may wait in each inbox, if they are small; it sends one or two per iteration.
WAITING_MESSAGES = 64
# An actor with so many messages that had to be rejected is cut off: nothing that it sends can be used.
REJECTED_MESSAGES = 100
# Seconds that actors get for the evaluation of the final policy.
FINAL_EVALUATION_S = 600.0
# Seconds that an update gets to end by itself when the run is asked to stop; after that it is taken back.
FINISH_UPDATE_S = 3.0
# Seconds that actors get, when the run is over, for what people have shown since.
FINAL_DEMONSTRATIONS_S = 3.0


# Why weights are not saved when a run ends.
HALF_AN_UPDATE = "an update was left in the middle, and there was no memory for a copy of what it began from"
# What is said of an update whose weights are not finite, and what helps.
OVERFLOW = ("the update made", "lower algorithm.lr and algorithm.lr_max, or algorithm.critic_lr")

# Why a quota is refused that the learner scores otherwise than its actor.
MISMATCHED = "other log-probabilities"

# What the console shows beside the environment steps.
SHOWN = {
    "success exploring": "rollout/success",
    "validation": "eval/success",
    "best": "eval/best_success",
    "steps/s": "speed/env_steps_per_s",
}


class Rollouts:
    """The stream of rollouts that the algorithm reads: one is put in, one is taken out."""

    def __init__(self) -> None:
        """Starts empty."""
        self._next: Rollout | None = None

    def put(self, rollout: Rollout) -> None:
        """Gives the rollout of the next iteration."""
        self._next = rollout

    def __iter__(self) -> Iterator[Rollout]:
        """Yields each rollout once."""
        while self._next is not None:
            rollout, self._next = self._next, None
            yield rollout


class Deadline:
    """Whether a run was asked to stop, and an update in progress has had its time to end since."""

    def __init__(self, stop: Event, patience_s: float) -> None:
        """Takes the event that asks, and the time."""
        self._stop, self._patience_s = stop, patience_s
        self._asked_at: float | None = None

    def __call__(self) -> bool:
        """To be asked again and again: the time begins when it is asked first."""
        if not self._stop.is_set():
            return False
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        return time.monotonic() - self._asked_at >= self._patience_s


class Learner:
    """One learner process: algorithm, gRPC server, checkpoints and metrics."""

    def __init__(self, cfg: PIRLTrainConfig, stop: Event) -> None:
        """Builds or resumes the run; opens nothing yet.

        Args:
            cfg: Validated configuration.
            stop: Set from outside to stop at the next opportunity, with a checkpoint.

        Raises:
            ConfigError: If the token or a certificate cannot be used, or the port would be open without a token.
        """
        policy_cfg, algorithm_cfg, env_cfg = parts(cfg)
        link = policy_cfg.actor_learner_config
        access = read_learner_access(algorithm_cfg.security, link.learner_host)
        set_seed(cfg.seed or 0)
        self._threads = torch.get_num_threads()
        self._asynchronous = algorithm_cfg.collection.max_staleness > 0
        self._cfg, self._stop, self._config = cfg, stop, algorithm_cfg
        self._online_steps = policy_cfg.online_steps
        self._output_dir = Path(cfg.output_dir or ".")
        self._player = make_player(cfg)
        algorithm = make_algorithm(algorithm_cfg, self._player.policy)
        assert isinstance(algorithm, PIRLAlgorithm)
        self._algorithm = algorithm
        self._algorithm.seed = cfg.seed or 0
        self._algorithm.stopping = Deadline(stop, FINISH_UPDATE_S)
        self._logged_at = time.perf_counter()
        spec = wire_spec(cfg, self._player)
        self._interventions = self._open_interventions(spec) if is_robot(env_cfg) else None
        if algorithm_cfg.demonstration_weight > 0:
            self._algorithm.demonstrations = self._sources()
        self._rollouts = Rollouts()
        # Version of the newest checkpoint that a resume would begin from, and how many could not be written.
        self._saved_version: int | None = None
        self._checkpoints_failed = 0
        # Whether weights, critic and optimizers are those of the current version.
        self._whole = True
        self._best = BestCheckpoint(self._output_dir, self._is_milestone)
        self._trainer = RLTrainer(algorithm, self._rollouts, batch_size=algorithm_cfg.minibatch_size)
        self._progress = self._resume() if cfg.resume else Progress()
        self._algorithm.optimization_step = self._progress.version
        if self._progress.warm_up_until:
            self._algorithm.warm_up_until = self._progress.warm_up_until
        self._service = self._make_service(spec)
        self._server = LearnerServer(self._service, link.learner_host, link.learner_port, access)
        self._gatherer = Gatherer(self._service, spec, algorithm_cfg.collection, stop, self._report)
        self._pushed_bytes = 0
        # Read once: it is looked up in a file.
        self._package = package_version(checkpoint.PACKAGE)
        self._started_at = time.monotonic()
        # When each of the newest versions was sent, by the same clock.
        self._published_at: dict[int, float] = {}
        # What the newest iteration and evaluation said, for `lerobot-pi-rl-status`.
        self._rates: dict[int, float] = {}
        # What the actors told of their episodes since these began anew.
        self._since_restart: list[dict[str, Scalar]] = []
        self._validation: float | None = None
        self._newest_row: Mapping[str, Any] = {}
        self._began, self._report_failed = False, False
        self._first_look = FirstLook(algorithm_cfg.collection, resumed=cfg.resume)
        # What makes the run end early, in one line; none yet.
        self._stopped_by: str | None = None

    def _make_service(self, spec: WireSpec) -> PIRLLearnerService:
        """What actors call; none may take up more of the learner than a quota needs."""
        limits = Limits(
            message_bytes=spec.max_message_bytes(),
            waiting_messages=WAITING_MESSAGES,
            waiting_bytes=spec.max_message_bytes(),
            messages_per_s=self._config.security.max_messages_per_s,
            rejected_messages=REJECTED_MESSAGES,
        )
        settings = agreed_settings(self._cfg, self._player)
        return PIRLLearnerService(settings, self._config.collection.max_actors, limits)

    def _open_interventions(self, spec: WireSpec) -> InterventionStore:
        """What people do on the robots."""
        player = self._player

        def prepare(
            observation: dict[str, Tensor], task: list[str], actions: dict[str, Tensor]
        ) -> dict[str, Any]:
            return for_loss(player.preprocessor({**player.path.unpack(observation), **actions, "task": task}))

        return InterventionStore(self._output_dir, spec, prepare)

    def _sources(self) -> Demonstrations:
        """Where demonstrations come from: the data set and what people do, each as often where both are there."""
        dataset = DemonstrationSource(self._cfg, self._player) if self._cfg.dataset is not None else None
        return either([source for source in (dataset, self._interventions) if source is not None])

    def run(self) -> None:
        """Trains until the step budget is used up, the policy is good enough, or `stop` is set.

        Raises:
            CheckpointNotWritten: If there is no room for the first checkpoint or for the last one.
            InUse: If another learner trains in the same folder.
            PortUnavailable: If the learner cannot listen where it should.
            RatioError: If sampling and scoring do not agree for any actor that has delivered.
        """
        # Files are changed after the port is open and the folder is owned: another learner may be running.
        with (
            self._server,
            checkpoint.owning(self._output_dir),
            self._open_metrics() as self._metrics,
        ):
            logger.info("Listening on %s:%d", self._server.host, self._server.port)
            checkpoint.remove_unfinished(self._output_dir)
            checkpoint.mend_links(self._output_dir)
            if self._interventions is not None:
                self._interventions.trim()
            self._report()
            with self._service.demonstrations.to(self._keep_shown):
                self._train_or_stop()
                if self._interventions is not None:
                    self._gatherer.wait_for_leaving(FINAL_DEMONSTRATIONS_S)

    def _keep_shown(self, payload: bytes) -> None:
        """Keeps what a person did, whatever the learner is at: it must not be lost with this process."""
        if self._interventions is None:
            raise WireError("has demonstrations, but nobody can take over in this environment")
        self._interventions.receive(payload)

    def _open_metrics(self) -> MetricsWriter:
        return MetricsWriter(
            self._output_dir,
            make_tracker(self._cfg),
            total_steps=self._online_steps,
            resume_step=self._progress.version,
            shown=SHOWN,
        )

    def _train_or_stop(self) -> None:
        """Trains to the end, or saves where it is asked to stop; the actors are told to leave.

        An error ends the run as well, but not before what was learned is saved. Actors then wait for it to be resumed.
        """
        try:
            self._train()
        except (Stopped, UpdateStopped):
            logger.info("Stopping at version %d", self._progress.version)
            if not self._whole:
                logger.warning("%s; a resume begins at version %s", HALF_AN_UPDATE, self._saved_version)
            elif self._saved_version != self._progress.version:
                self._save()
            self._publish(restart=False, evaluate=False, final=True)
        except (Exception, SystemExit) as error:
            self._save_after(error)
            raise

    def _save_after(self, error: BaseException) -> None:
        """Saves what was learned before an error, unless that is what is broken, and says so."""
        version = self._progress.version
        saved, why = self._saved_version == version, ""
        try:
            if not self._whole:
                why = HALF_AN_UPDATE
            elif not saved and not isinstance(error, checkpoint.CheckpointNotWritten):
                check_trained(self._algorithm, "it has", "they are not saved")
                self._save()
                saved = True
        except (checkpoint.CheckpointNotWritten, NotFinite) as failed:
            why = str(failed)
        if saved:
            logger.error(
                "The run ends with an error; version %d is saved, and --resume=true goes on from it", version
            )
        else:
            logger.error(
                "The run ends with an error, and version %d is not saved (%s); a resume begins at version %s",
                version,
                why or error,
                self._saved_version,
            )

    def _train(self) -> None:
        self._logged_at = time.perf_counter()
        self._gatherer.wait_for_actors()
        self._began = True
        if self._progress.version == 0:
            self._save()
        self._publish_next(restart=True)
        while not self._finished():
            self._iterate()
        self._finish()

    def _iterate(self) -> None:
        """One iteration: gather, update, checkpoint, publish, log.

        Actors get the new weights as soon as the policy is improved, and collect while the critic is trained; at a
        milestone they wait for the checkpoint.
        """
        began, version = time.perf_counter(), self._progress.version
        before = replace(self._progress)
        gathered = self._gatherer.gather(version, self._evaluates(version))
        if self._consider_best(version, gathered.evaluations):
            self._roll_back(gathered, before)
            return
        updating = time.perf_counter()
        if self._config.collection.task_focus > 0:
            self._since_restart += gathered.collections
        if (note := self._first_look.add(gathered.evaluations, gathered.collections)) is not None:
            logger.log(note.level, "%s", note.text)
        ready_at: list[float] = []
        with self._whole_or_not_at_all(before):
            self._account(gathered)
            milestone, finished = self._is_milestone(version + 1), self._finished()
            early = not finished and (self._asynchronous or not milestone)

            def policy_ready() -> None:
                check_trained(self._algorithm, *OVERFLOW)
                if early:
                    self._publish_next(restart=False)
                    # From now on the actors use the other cores.
                    torch.set_num_threads(1)
                ready_at.append(time.perf_counter())

            self._algorithm.policy_ready = policy_ready
            # Asynchronous actors use the other cores all the time.
            torch.set_num_threads(1 if self._asynchronous else self._threads)
            stats, learned = self._update(gathered.decisions)
            check_trained(self._algorithm, *OVERFLOW)
        updated = time.perf_counter()
        self._progress.seconds += updated - began
        if milestone:
            self._focus()
            self._save_milestone()
        if not early and not finished:
            self._publish_next(restart=True)
        self._watch(stats)
        self._log(gathered, stats, learned, ready_at[0] - updating, updated - ready_at[0])

    @contextlib.contextmanager
    def _whole_or_not_at_all(self, before: Progress) -> Iterator[None]:
        """Takes an update back that does not end, so that what is saved then is what it began from, to the bit.

        Without the memory for a copy the weights stay as they are then, and are not saved.

        Args:
            before: The counters to go back to.
        """
        snapshot, self._whole = take_snapshot(self._algorithm), False
        try:
            yield
        except BaseException:
            self._progress, self._algorithm.optimization_step = before, before.version
            if snapshot is not None:
                snapshot.restore()
                self._whole = True
            raise
        self._whole = True

    def _focus(self) -> None:
        """Decides how the environments are dealt to the tasks from the next restart on."""
        if success := success_by_task(self._since_restart):
            self._progress.task_shares = task_shares(success, self._config.collection.task_focus)

    def _roll_back(self, gathered: Gathered, before: Progress) -> None:
        """Brings the best checkpoint back with smaller steps; the decisions of the collapsed policy are dropped.

        When that has happened too often the run ends, with the best policy as its last one, too.

        Args:
            gathered: Those decisions.
            before: The counters before this iteration.
        """
        with self._whole_or_not_at_all(before):
            self._account(gathered, learned=False)
            self._progress.seconds += gathered.seconds
            self._load_best()
        progress = self._progress
        logger.warning(
            "Validation success fell far below the best (%.2f): going on from its checkpoint at learning rate %.1e",
            progress.best_success,
            self._algorithm.lr,
        )
        if progress.rollbacks > self._config.max_rollbacks:
            self._stopped_by = (
                f"validation success fell far below the best one ({progress.best_success:.2f}) for the "
                f"{progress.rollbacks}. time; lower algorithm.target_kl or collect more decisions per iteration"
            )
        self._gatherer.discard_before(progress.version)
        if self._is_milestone(progress.version):
            self._save_milestone()
        if not self._finished():
            self._publish_next(restart=True)
        # Nothing was learned, but everything else is known.
        unlearned = TrainingStats(losses={}, grad_norms={}, extra={"lr": self._algorithm.lr})
        self._log(gathered, unlearned, 0, update_seconds=0.0, critic_seconds=0.0)

    def _load_best(self) -> None:
        """Takes over the best checkpoint's weights, critic and optimizers, at half the learning rate."""
        progress, best = self._progress, checkpoint.find_best(self._output_dir)
        self._best.count(progress)
        progress.rollbacks += 1
        lr = self._algorithm.lr
        self._player.policy.load_checkpoint(checkpoint.pretrained_dir(best))
        restored = checkpoint.load(best, self._algorithm, self._algorithm.get_optimizers())
        check_trained(self._algorithm, f"the best checkpoint {best} has", "resume from an earlier one")
        self._algorithm.optimization_step = progress.version
        # The schedule may have lowered it far below what the best checkpoint was trained with.
        self._algorithm.set_rates(min(lr, self._algorithm.lr) / 2)
        if restored.step < self._config.critic_warmup:
            # Its critic is cold as well.
            progress.warm_up_until = progress.version + self._config.critic_warmup
            self._algorithm.warm_up_until = progress.warm_up_until

    def _watch(self, stats: TrainingStats) -> None:
        """Notes an update that was out of control; too many in a row end the run."""
        found = {**stats.extra, **{f"{name}_grad_norm": norm for name, norm in stats.grad_norms.items()}}
        cause = runaway_cause(found, self._config)
        self._progress.runaways = self._progress.runaways + 1 if cause else 0
        if cause and self._progress.runaways >= RUNAWAY_ITERATIONS:
            self._stopped_by = cause

    def _update(self, decisions: DecisionBatch) -> tuple[TrainingStats, int]:
        """One update, without the decisions of actors that the learner does not score as they sampled.

        Returns:
            What it tells, and of how many decisions it learned.

        Raises:
            RatioError: If no decision is left.
        """
        while True:
            self._rollouts.put(prepare(decisions, self._player.preprocess_packed))
            self._trainer.reset_data_iterator()
            try:
                return self._trainer.training_step(), len(decisions)
            except RatioError as error:
                decisions = self._without_refused(decisions, error)

    def _without_refused(self, decisions: DecisionBatch, error: RatioError) -> DecisionBatch:
        """Refuses the quotas of the actors that an error names, as long as others have delivered.

        Their own collection, its environment steps and episodes stay counted.
        """
        actor = decisions.env // self._config.collection.num_envs
        rows = torch.nonzero(~torch.isin(actor, torch.tensor(error.actors)))[:, 0]
        if not len(rows):
            raise error
        for number in error.actors:
            self._service.reject(number, MISMATCHED, str(error), quota=True)
        refused = len(decisions) - len(rows)
        self._gatherer.dropped["mismatched_decisions"] += refused
        self._progress.decisions -= refused
        return decisions.select(rows)

    def _account(self, gathered: Gathered, learned: bool = True) -> None:
        progress = self._progress
        progress.version += 1
        progress.env_steps += gathered.decisions.steps
        if learned:
            progress.decisions += len(gathered.decisions)
        else:
            self._gatherer.dropped["rolled_back_decisions"] += len(gathered.decisions)
        progress.episodes += int(total(gathered.collections, "ended"))

    def _finished(self) -> bool:
        progress, config = self._progress, self._config
        if config.stop_success is not None and progress.best_success >= config.stop_success:
            self._stopped_by = f"validation success reached {progress.best_success:.2f}"
        if config.stop_patience is not None and progress.validations_since_best >= config.stop_patience:
            self._stopped_by = (
                f"validation success did not rise in {progress.validations_since_best} validations"
            )
        used_up = progress.version >= self._cfg.steps or progress.env_steps >= self._online_steps
        return used_up or self._stopped_by is not None

    def _finish(self) -> None:
        """Saves the last version, has it evaluated, and sends the actors home."""
        if self._stopped_by is not None:
            logger.warning("Training ends early: %s", self._stopped_by)
        self._progress.stopped_by = self._stopped_by
        self._save()
        evaluate = self._cfg.env_eval_freq > 0
        self._publish(restart=False, evaluate=evaluate, final=True)
        if evaluate:
            found = self._gatherer.gather_evaluation(self._progress.version, FINAL_EVALUATION_S)
            if self._consider_best(self._progress.version, found):
                logger.warning(
                    "The last checkpoint has collapsed (validation success %.2f, best %.2f): use checkpoints/best, and "
                    "validate more often (env_eval_freq), so that the best one is brought back in time",
                    self._validation,
                    self._progress.best_success,
                )

    def _evaluates(self, version: int) -> bool:
        return self._cfg.env_eval_freq > 0 and version % self._cfg.env_eval_freq == 0

    def _is_milestone(self, version: int) -> bool:
        """Whether a checkpoint is due; at each of them all actors begin fresh episodes, so that it can be resumed.

        They do that, too, when their environments were used for an evaluation. Asynchronous actors go on: what they
        have sent by the time of a checkpoint cannot be collected again anyway.
        """
        saves = self._cfg.save_checkpoint and self._cfg.save_freq > 0 and version % self._cfg.save_freq == 0
        return saves or (self._evaluates(version) and not self._config.collection.eval_envs)

    def _consider_best(self, version: int, evaluations: list[dict[str, Scalar]]) -> bool:
        """Reads and logs an evaluation of the current version and, if none was better, makes it the best checkpoint.

        Of equals the later one is taken: it has learned more, and a validation does not see everything.

        Returns:
            Whether the version is so bad that the best one should be brought back.
        """
        episodes = total(evaluations, "judged")
        if not episodes:
            if total(evaluations, "episodes") and self._config.stop_success is not None:
                self._stopped_by = (
                    "the environments do not say which validation starts were solved, so algorithm.stop_success="
                    f"{self._config.stop_success:g} cannot be reached; add info['is_success'] in a wrapper"
                )
            return False
        progress, success = self._progress, total(evaluations, "successes") / episodes
        conclusive = is_conclusive(int(episodes), self._cfg.eval.n_episodes)
        if conclusive:
            progress.validations_since_best = (
                0 if success > progress.best_success else progress.validations_since_best + 1
            )
            if success >= progress.best_success:
                self._mark_best(version, success)
            self._best.reach(progress)
        else:
            logger.warning(
                "Validation of version %d has %d of %d starts, because actors have left: nothing is decided by it",
                version,
                episodes,
                self._cfg.eval.n_episodes,
            )
        row = {
            "eval/success": success,
            "eval/episodes": episodes,
            "eval/best_success": progress.best_success,
            "eval/best_version": progress.best_version,
            "eval/rollbacks": progress.rollbacks,
            "progress/env_steps": progress.env_steps,
        }
        row |= {f"eval/success/{task}": share for task, share in success_by_task(evaluations).items()}
        self._metrics.write(version, row)
        self._validation = success
        drop = self._config.rollback_drop
        return conclusive and has_collapsed(success, progress.best_success, drop, int(episodes))

    def _mark_best(self, version: int, success: float) -> None:
        """Makes the current version the best checkpoint; without room for it the one before stays the best."""
        progress, before = self._progress, (self._progress.best_success, self._progress.best_version)
        progress.best_success, progress.best_version = success, version
        try:
            self._best.mark(progress, self._training_state)
        except checkpoint.CheckpointNotWritten as error:
            progress.best_success, progress.best_version = before
            self._checkpoints_failed += 1
            logger.error("%s; it would be the best one (validation success %.2f)", error, success)

    def _publish_next(self, restart: bool) -> None:
        """Sends the weights of the current version and asks for its decisions."""
        if restart:
            self._since_restart = []
        self._publish(restart, evaluate=self._evaluates(self._progress.version))

    def _publish(self, restart: bool, evaluate: bool, final: bool = False) -> None:
        """Sends the current weights to every actor."""
        header = WeightsHeader(self._progress.version, restart, evaluate, final, sent_at=time.time())
        payload = encode_weights(self._algorithm.get_weights(), header, self._progress.task_shares)
        self._pushed_bytes = len(payload)
        self._published_at[header.version] = time.monotonic()
        while len(self._published_at) > self._config.collection.max_staleness + 2:
            del self._published_at[min(self._published_at)]
        self._service.publish(self._progress.version, payload)

    def _save(self) -> None:
        checkpoint.save(self._output_dir, self._training_state())
        self._saved_version = self._progress.version

    def _save_milestone(self) -> None:
        """Saves in the middle of the run; without room for it training goes on, and the next milestone tries again."""
        try:
            self._save()
        except checkpoint.CheckpointNotWritten as error:
            self._checkpoints_failed += 1
            logger.error("%s; training goes on, a resume begins at version %s", error, self._saved_version)

    def _training_state(self) -> checkpoint.TrainingState:
        return checkpoint.TrainingState(
            step=self._progress.version,
            total_steps=self._cfg.steps,
            config=self._cfg,
            policy=self._player.policy,
            preprocessor=self._player.preprocessor,
            postprocessor=self._player.postprocessor,
            algorithm=self._algorithm,
            optimizers=self._algorithm.get_optimizers(),
            counters=asdict(self._progress),
        )

    def _resume(self) -> Progress:
        """Loads everything but the policy, which `make_player` loaded."""
        place = self._cfg.checkpoint_path
        assert place is not None
        changed = checkpoint.changed_settings(place, self._cfg)
        try:
            resumed = checkpoint.load(place, self._algorithm, self._algorithm.get_optimizers())
        except checkpoint.DoesNotLoad as error:
            raise checkpoint.blame_settings(error, changed, place) from error
        # What the schedule has made of the rate goes on, unless another one is asked for.
        self._algorithm.set_rates(self._config.lr if "algorithm.lr" in changed else self._algorithm.lr)
        self._saved_version = resumed.step
        logger.info("Resuming at version %d from %s", resumed.step, place)
        if changed:
            logger.warning("Settings have changed since then: %s", "; ".join(changed.values()))
        try:
            progress = replace(Progress(**resumed.counters), stopped_by=None)
        except TypeError as error:
            raise checkpoint.CheckpointError(
                f"checkpoint {place} has other counters than this version reads ({error}): "
                "resume with the version of the package that wrote it"
            ) from error
        self._best.resume(progress)
        return progress

    def _log(
        self,
        gathered: Gathered,
        stats: TrainingStats,
        learned: int,
        update_seconds: float,
        critic_seconds: float,
    ) -> None:
        progress, decisions, traffic = self._progress, gathered.decisions, self._service.traffic()
        self._rates = {
            int(c["actor"]): float(c["env_steps"]) / max(float(c["seconds"]), 1e-9)
            for c in gathered.collections
        }
        # From row to row: what was collected during a checkpoint or a validation took that time, too.
        now = time.perf_counter()
        seconds, self._logged_at = now - self._logged_at, now
        collect = max((float(c["seconds"]) for c in gathered.collections), default=gathered.seconds)
        row = {
            **rollout_metrics(gathered, progress.version - 1),
            "rollout/decisions": learned,
            **control_metrics(gathered.control),
            **learning_metrics(stats),
            "progress/env_steps": progress.env_steps,
            "progress/decisions": progress.decisions,
            "progress/episodes": progress.episodes,
            "progress/seconds": progress.seconds,
            "speed/env_steps_per_s": decisions.steps / max(seconds, 1e-9),
            "speed/collection_steps_per_s": decisions.steps / max(collect, 1e-9),
            "speed/update_decisions_per_s": learned / max(update_seconds + critic_seconds, 1e-9),
            "speed/collect_seconds": collect,
            "speed/wait_seconds": gathered.seconds,
            "speed/update_seconds": update_seconds,
            "speed/critic_seconds": critic_seconds,
            "checkpoint/failed": self._checkpoints_failed,
            "push/bytes": self._pushed_bytes,
            "push/latency_s": max(map(self._latency, gathered.collections), default=0.0),
            "actors/connected": len(self._service.actors.connected()),
            "actors/joined": traffic.joined,
            "actors/reconnected": traffic.reconnected,
            "actors/replaced": traffic.replaced,
            "actors/left": self._gatherer.actors_left,
            "actors/late_quotas": self._gatherer.late_quotas,
            "actors/slowed": traffic.slowed,
            "actors/refused": sum(traffic.rejected.values()),
            "actors/failed_attempts": self._gatherer.told["failed_attempts"],
            "actors/rejected_pushes": self._gatherer.told["rejected_pushes"],
            **self._dropped(),
        }
        if self._interventions is not None:
            row["control/demonstrations"] = len(self._interventions)
            row["control/forgotten"] = self._interventions.forgotten
        self._metrics.write(progress.version, row)
        self._newest_row = row
        self._report()

    def _dropped(self) -> dict[str, int]:
        """What was thrown away so far: here, by the connections, and by the actors."""
        gatherer, traffic = self._gatherer, self._service.traffic()
        return {
            **{f"dropped/{name}": count for name, count in gatherer.dropped.items()},
            "dropped/malformed_messages": traffic.rejected.get(MALFORMED, 0),
            "dropped/unfinished_messages": traffic.unfinished,
            "dropped/unsent_messages": gatherer.told["unsent_messages"],
            "dropped/demonstration_steps": gatherer.told["unkept_steps"],
            "dropped/failed_episodes": gatherer.told["failed_episodes"],
        }

    def _latency(self, collection: Mapping[str, Scalar]) -> float:
        """Seconds that weights took to an actor.

        It compares two wall clocks, which may differ or be set; no push took longer than it is ago by our own clock.
        """
        ago = time.monotonic() - self._published_at.get(int(collection["version"]), self._started_at)
        return min(max(float(collection["latency"]), 0.0), ago)

    def _report(self) -> None:
        """Tells the service how the run stands, for whoever asks; also while an iteration is waited for.

        A machine that has run out of something must not lose the run over it: the service then keeps the report before.
        """
        try:
            self._service.report(self._status())
        except Exception as error:
            if not self._report_failed:
                logger.warning("The status of the run cannot be told: %r; training goes on", error)
            self._report_failed = True
        else:
            self._report_failed = False

    def _status(self) -> dict[str, Any]:
        """How the run stands, as JSON can hold it."""
        row, progress = self._newest_row, self._progress
        last = checkpoint.pointed_at(self._output_dir / CHECKPOINTS_DIR / LAST_CHECKPOINT_LINK)
        rates = {actor: rate for actor, rate in self._rates.items() if actor in self._gatherer.newest}
        sent = {
            str(actor): {"version": version, "sent_at": at, "env_steps_per_s": rates.get(actor, 0.0)}
            for actor, (version, at) in self._gatherer.newest.items()
        }
        return {
            "package": self._package,
            "state": "training" if self._began and self._service.actors.connected() else "waiting for actors",
            "started_at": self._started_at,
            "progress": {
                **{
                    name: getattr(progress, name)
                    for name in ("version", "env_steps", "decisions", "episodes")
                },
                "steps": self._cfg.steps,
                "online_steps": self._online_steps,
                "env_steps_per_s": row.get("speed/env_steps_per_s", 0.0),
            },
            "success": {
                "exploring": row.get("rollout/success"),
                "validation": self._validation,
                "best": progress.best_success,
                "best_version": progress.best_version,
            },
            "staleness": {
                "mean": row.get("rollout/staleness", 0.0),
                "max": row.get("rollout/staleness_max", 0.0),
            },
            "last_checkpoint": str(last) if last.is_dir() else None,
            "sent": sent,
            "actors_left": self._gatherer.actors_left,
            "dropped": {name.partition("/")[2]: count for name, count in self._dropped().items()},
        }
