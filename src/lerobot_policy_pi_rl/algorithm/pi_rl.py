"""The `pi_rl` algorithm: PPO on the log-probabilities of denoising steps."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lerobot.rl.algorithms.base import RLAlgorithm
from lerobot.rl.algorithms.configs import TrainingStats
from torch import Tensor, nn

from ..bases.adapter import Context
from ..errors import config_error
from ..flow.density import kl_divergence
from ..flow.sampler import Score, executed_sum
from ..flow.transition import Gaussian
from ..modeling_pi_rl import PIRLPolicy
from .advantages import Targets, advantages, group_advantages, normalise, says_nothing
from .configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from .contexts import Contexts
from .critic import SEPARATE, Critic, SeparateCritic
from .decisions import DecisionBatch
from .losses import approximate_kl, explained_variance, policy_loss, value_loss
from .material import Averages, Batch, CriticBatch, Material
from .optimizer import PreciseAdam
from .storage import Observations, Rollout, minibatches

# Rows of a rollout that are read at once where nothing is trained, unless the micro-batch is smaller.
ROWS_AT_ONCE = 1024

# Most decisions on which the divergence of an epoch is measured.
KL_ROWS = 256
# Rollouts without a signal, one after the other, after which that is said: one alone is normal, above all at the start.
SILENT_ROLLOUTS = 5

logger = logging.getLogger(__name__)

# A batch of demonstrations as the base's supervised loss reads it, or None as long as there are none; how many rows is
# the argument.
Demonstrations = Callable[[int], dict[str, Tensor] | None]


class RatioError(RuntimeError):
    """The policy that scores is not the policy that sampled; the text is one line."""

    def __init__(self, text: str, actors: list[int]) -> None:
        """Takes the text, and the numbers of the actors that sampled."""
        super().__init__(text)
        self.actors = actors


class UpdateStopped(Exception):
    """The run was asked to stop, and an update was left in the middle: what it has changed is to be taken back."""


class PIRLAlgorithm(RLAlgorithm):
    """PPO over decisions, whose log-probability is that of their recorded denoising steps.

    Source: pi_RL, arXiv 2510.25889, section 4.
    """

    config_class = PIRLAlgorithmConfig
    name = "pi_rl"

    def __init__(self, policy: PIRLPolicy, config: PIRLAlgorithmConfig) -> None:
        """Builds the critic.

        Args:
            policy: The policy to improve.
            config: Settings; `policy_config` must be that of the policy.
        """
        self.policy, self.config = policy, config
        self.device = next(policy.parameters()).device
        self.critic = self._make_critic()
        self.reference = self._freeze_copy(policy) if config.kl_coef > 0 else None
        self.optimizers: dict[str, PreciseAdam] = {}
        self.seed = 0
        # Rollouts in a row without a signal.
        self._silent = 0
        # Version up to which the critic learns alone.
        self.warm_up_until = config.critic_warmup
        # Called in every update as soon as the policy is improved; the critic is trained after that.
        self.policy_ready: Callable[[], None] = lambda: None
        # Whether the update is to be left with the gradient step that it is at.
        self.stopping: Callable[[], bool] = lambda: False
        # Where demonstrations come from, if `demonstration_weight` asks for them.
        self.demonstrations: Demonstrations | None = None
        tolerance = 1e-3 if policy.base.is_float32 else 0.1
        self.ratio_tolerance = tolerance if config.ratio_tolerance is None else config.ratio_tolerance

    def _make_critic(self) -> Critic | None:
        if self.config.advantage == "group":
            return None
        source, hidden_dims = self._critic_source, self.config.critic_hidden_dims
        if self.trains_base_for_critic and (
            source == SEPARATE or not self.policy.base.trains_for_critic(source)
        ):
            raise config_error(
                "algorithm.critic_coef",
                f"{self.config.critic_coef} has no effect: nothing of this policy that is trained makes the features "
                f"{source!r}; set it to 0, or algorithm.critic_features to others",
            )
        if source == SEPARATE:
            assert self.policy.config.input_features is not None
            return SeparateCritic(self.policy.config.input_features, hidden_dims).to(self.device)
        return Critic(self.policy.base.critic_dims[source], hidden_dims).to(self.device)

    @property
    def trains_base_for_critic(self) -> bool:
        """Whether the critic's loss trains what the base makes of the observation, too."""
        return self.config.critic_coef > 0

    @property
    def _critic_source(self) -> str:
        sources, chosen = [*self.policy.base.critic_dims, SEPARATE], self.config.critic_features
        if chosen is not None and chosen not in sources:
            raise config_error(
                "algorithm.critic_features",
                f"{chosen!r} is not what this base offers; choose one of {sources}",
            )
        return chosen or sources[0]

    @staticmethod
    def _freeze_copy(policy: PIRLPolicy) -> PIRLPolicy:
        """A copy of what is trained; what is not is shared."""
        shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
        return copy.deepcopy(policy, shared).eval().requires_grad_(False)

    # LeRobot's contract: optimizers, weights, state

    def make_optimizers_and_scheduler(self) -> dict[str, PreciseAdam]:
        """Builds the optimizers of the policy and of the critic, if there is one."""
        where = "cpu" if self.config.offload_optimizer else None
        self.optimizers = {
            "policy": PreciseAdam(
                self._policy_parameters(), self.config.lr, device=where, **self._adam_settings
            )
        }
        if self.critic is not None:
            self.optimizers["critic"] = PreciseAdam(
                self.critic.parameters(), self.config.critic_lr, **self._adam_settings
            )
        return self.optimizers

    @property
    def _adam_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "betas": tuple(config.adam_betas),
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }

    def get_optimizers(self) -> dict[str, PreciseAdam]:
        """The optimizers, by name."""
        return self.optimizers

    def configure_data_iterator(
        self, data_mixer: Any, batch_size: int, *, async_prefetch: bool = True, queue_size: int = 2
    ) -> Iterator[Rollout]:
        """Reads whole rollouts: PPO shuffles its minibatches itself, so nothing is sampled or prefetched."""
        return iter(data_mixer)

    def get_weights(self) -> dict[str, Tensor]:
        """What actors need to act like the current policy: its trainable tensors, by name."""
        return self.policy.trainable_state()

    def load_weights(self, weights: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Copies pushed tensors into the policy, wherever it lives; see `PIRLPolicy.load_trainable_state`."""
        self.policy.load_trainable_state(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The critic and the reference policy, if there are."""
        state: dict[str, Tensor] = {}
        if self.critic is not None:
            state |= {f"critic.{name}": value for name, value in self.critic.state_dict().items()}
        if self.reference is not None:
            state |= {
                f"reference.{name}": value.clone() for name, value in self.reference.state_dict().items()
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Loads what `state_dict` gave."""
        parts: dict[str, dict[str, Tensor]] = {"critic": {}, "reference": {}}
        for name, value in state_dict.items():
            owner, _, rest = name.partition(".")
            parts[owner][rest] = value
        if self.critic is not None:
            # Older checkpoints have no scale of the returns, but a critic that is not cold.
            without = {**dict(self.critic.named_buffers()), "rollouts": torch.ones(())}
            self.critic.load_state_dict({**without, **parts["critic"]})
        if self.reference is not None:
            self.reference.load_state_dict(parts["reference"])

    @property
    def lr(self) -> float:
        """Learning rate of the policy in force."""
        return float(self.optimizers["policy"].param_groups[0]["lr"])

    def set_rates(self, lr: float) -> None:
        """Sets the learning rates after a checkpoint was loaded, whose optimizers bring those they were saved with.

        The optimizers' other constants, too, are those of the settings.

        Args:
            lr: That of the policy, which is held within its range; the critic's is the one of the settings.
        """
        self._set_lr(lr)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.update(self._adam_settings)
        if self.critic is not None:
            for group in self.optimizers["critic"].param_groups:
                group["lr"] = self.config.critic_lr

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizers["policy"].param_groups:
            group["lr"] = min(max(lr, self.config.lr_min), self.config.lr_max)

    # One iteration

    def update(self, batch_iterator: Iterator[Rollout]) -> TrainingStats:
        """One PPO iteration on the next rollout.

        First the policy takes all its epochs, then the critic: neither reads what the other does in the meantime,
        because advantages and value targets are computed once, before. Actors can act with the improved policy
        (`policy_ready`) while the critic is trained. Where the critic's loss trains the base as well (`critic_coef`),
        both take the same steps.

        Args:
            batch_iterator: Yields rollouts.

        Returns:
            Losses, gradient norms and diagnostics, averaged over the minibatches.

        Raises:
            RatioError: If an actor's decisions are not scored as they were sampled; nothing has changed then.
            UpdateStopped: If it was left in the middle (`stopping`).
        """
        rollout = next(batch_iterator)
        self.policy.eval()
        contexts = self._encode(rollout.observations, self.config.context_memory_gb)
        # Before anything is changed, so that the rollout can be given once more without some actors.
        ratio_error = self.check_ratio(rollout, contexts)
        material = self.evaluate(rollout, contexts)
        self._tell_of_silence(material)
        if self.critic is not None and material.critic is not None:
            self.critic.follow(material.critic.target[material.trained.to(self.device)])
        averages, extra = Averages(), self._statistics(material, rollout)
        extra["ratio_first_error"] = ratio_error
        extra |= self._improve_policy(material, averages)
        self.policy_ready()
        extra["skipped_steps"] += self._train_critic(material, averages)
        self._decay_lr()
        self.optimization_step += 1
        return self._stats(averages, extra | {"lr": self.lr})

    def _tell_of_silence(self, material: Material) -> None:
        self._silent = 0 if material.has_signal or material.over_cap else self._silent + 1
        if self._silent == SILENT_ROLLOUTS:
            logger.warning(
                "The rewards of the last %d rollouts tell no decision from another (no success, or always the same): "
                "the policy stays as it is until they do (ppo/signal); only the critic is trained",
                SILENT_ROLLOUTS,
            )

    def _improve_policy(self, material: Material, averages: Averages) -> dict[str, float]:
        """The policy's epochs, none while the critic warms up or where there is nothing to train on."""
        config, generator = self.config, self._generator(0)
        skipped, epochs, last_kl = 0, 0, 0.0
        trains = not self._warming_up and len(material.trained) > 0
        trains = trains and (material.has_signal or config.demonstration_weight > 0)
        while trains and epochs < config.epochs:
            for rows in self._minibatches(material, generator):
                skipped += self._policy_step(material, rows, averages)
            epochs, last_kl = epochs + 1, self.divergence(material)
            if not last_kl <= config.kl_stop * config.target_kl:
                break
        if epochs:
            # An iteration that ran into non-finite gradients was too bold, whatever its other steps measured.
            self._adapt_lr(math.inf if skipped else last_kl, may_rise=material.has_signal)
        found: dict[str, float] = {"epochs": epochs, "skipped_steps": skipped}
        return found | {"last_epoch_kl": last_kl} if epochs else found

    def _train_critic(self, material: Material, averages: Averages) -> int:
        """The critic's epochs, unless it has taken the policy's; returns how many steps were skipped."""
        if self.critic is None or material.critic is None:
            return 0
        if self.trains_base_for_critic and not self._warming_up and material.has_signal:
            return 0
        skipped, generator = 0, self._generator(1)
        for _ in range(self.config.epochs):
            for rows in self._minibatches(material, generator):
                part = material.critic.rows(rows.to(self.device))
                skipped += self._critic_step(self.critic, part, averages)
        return skipped

    def _minibatches(self, material: Material, generator: torch.Generator) -> Iterator[Tensor]:
        """The minibatches of an epoch.

        Raises:
            UpdateStopped: Between two of them, if the update is to be left.
        """
        for rows in minibatches(material.trained, self.config.minibatch_size, generator):
            if self.stopping():
                raise UpdateStopped
            yield rows

    @property
    def _warming_up(self) -> bool:
        """Whether the critic learns alone."""
        return self.critic is not None and self.optimization_step < self.warm_up_until

    def _generator(self, purpose: int) -> torch.Generator:
        """Source of an iteration's minibatches, the same in a resumed run."""
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.optimization_step) * 3 + purpose)
        return generator

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, contexts: Contexts | None = None) -> Material:
        """Contexts, values, advantages and reference steps of a rollout, computed once.

        Args:
            rollout: The decisions.
            contexts: What was seen, if it is encoded already.
        """
        decisions = rollout.decisions
        contexts = contexts or self._encode(rollout.observations, self.config.context_memory_gb)
        recorded = self.reduce(decisions.log_prob.to(self.device), decisions.scored.to(self.device))
        proximal, weight = self._proximal(decisions, contexts, recorded)
        near = (weight <= self.config.importance_cap).cpu()
        features = self._features(rollout.observations, contexts)
        if self.critic is None or features is None:
            groups = group_advantages(decisions, self.config.collection.group_size, self.config.group_bounds)
            advantage, critic = groups.advantage.to(self.device), None
            candidates = groups.informative.nonzero()[:, 0]
            trained = candidates[near[candidates]]
            has_signal = len(trained) > 0
        else:
            candidates = rollout.usable
            trained = candidates[near[candidates]]
            has_signal = not says_nothing(
                decisions.reward[trained], decisions.executed[trained], decisions.terminated[trained]
            )
            advantage, critic = self._valued(rollout, features, self.critic, trained)
        chain, step = decisions.chain.to(self.device), decisions.step.to(self.device)
        batch = Batch(
            chain=chain,
            step=step,
            scored=decisions.scored.to(self.device),
            log_prob=proximal,
            weight=weight,
            advantage=advantage,
            reference=self._reference_steps(contexts, rollout.observations, chain, step),
        )
        return Material(contexts, batch, critic, trained, len(candidates) - len(trained), has_signal)

    def _proximal(
        self, decisions: DecisionBatch, contexts: Contexts, recorded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the current weights, as the ratios want them, and their ratio to those at collection.

        Decisions that the current weights made have theirs recorded; only older ones are scored. Those of single action
        components are not recorded: for them all decisions are scored.

        Args:
            decisions: The rollout.
            contexts: What was seen, encoded.
            recorded: Reduced log-probabilities of whole decisions, `[N]`.

        Returns:
            `[N]` or `[N, T]`, and `[N]`.
        """
        scored, weight = decisions.scored.to(self.device), torch.ones_like(recorded)
        per_step = decisions.log_prob.to(self.device)
        older = decisions.version < self.optimization_step
        if self.config.ratio_level == "token":
            older = torch.ones_like(older)
            proximal = per_step.new_zeros(len(scored), per_step.shape[1] * self.policy.base.real_action_dim)
        else:
            proximal = self._by_level(per_step, None, scored).clone()
        # Split, no rows would be one part of no rows, which pi0's attention does not take.
        rows_to_score = older.nonzero()[:, 0]
        parts = rows_to_score.split(self._rows_at_once) if len(rows_to_score) else ()
        for rows in parts:
            chain, step = decisions.chain[rows].to(self.device), decisions.step[rows].to(self.device)
            score = self.policy.score(contexts.rows(rows), chain, step)
            here = rows.to(self.device)
            proximal[here] = self._by_level(score.log_prob, score.terms, scored[here])
            moved = (self.reduce(score.log_prob, scored[here]) - recorded[here]).exp()
            stale = (decisions.version[rows] < self.optimization_step).to(self.device)
            weight[here] = torch.where(stale, moved, weight[here])
        return proximal, weight

    @torch.no_grad()
    def _encode(self, observations: Observations, memory_gb: float) -> Contexts:
        return Contexts(
            self.policy,
            observations,
            None if self.critic is None or self._critic_source == SEPARATE else self._critic_source,
            self._rows_at_once,
            memory_gb * 1e9,
            torch.device(self.policy.config.storage_device),
        )

    @property
    def _rows_at_once(self) -> int:
        """Most observations that are preprocessed, encoded or scored at a time."""
        return self.config.micro_batch_size or ROWS_AT_ONCE

    def _features(self, observations: Observations, contexts: Contexts | None = None) -> Tensor | None:
        """What the critic reads of observations, `[N, F]`; None without a critic.

        Without contexts the observations are encoded for it alone, and nothing of that is kept.
        """
        if isinstance(self.critic, SeparateCritic):
            parts = torch.arange(len(observations)).split(self._rows_at_once)
            return torch.cat(
                [
                    self.critic.read(observations.rows(rows, self.policy.base.take)).to(self.device)
                    for rows in parts
                ]
            )
        return (contexts or self._encode(observations, 0.0)).critic_features

    def _valued(
        self, rollout: Rollout, features: Tensor, critic: Critic, trained: Tensor
    ) -> tuple[Tensor, CriticBatch]:
        """Advantages `[N]` by a critic, normalised over what is trained on, and what the critic is to fit."""
        config, following = self.config, rollout.next_observations
        next_features = self._features(following) if len(following) else None
        next_features = features[:0] if next_features is None else next_features

        def estimate() -> tuple[Tensor, Targets]:
            value, after = critic.value(features), critic.value(next_features)
            return value, advantages(rollout.decisions, value, after, config.discount, config.gae_lambda)

        value, targets = estimate()
        rows = trained.to(self.device)
        if critic.is_cold:
            critic.follow(targets.value_target[rows])
            value, targets = estimate()
        advantage = torch.zeros_like(value)
        if len(rows):
            advantage[rows] = normalise(targets.advantage[rows], targets.value_target[rows], critic.scale)
        return advantage, CriticBatch(features, value, targets.value_target)

    def reduce(self, per_step: Tensor, scored: Tensor) -> Tensor:
        """Reduces a quantity per chunk step `[B, H]` to one per decision `[B]`, as `log_prob_reduction` says."""
        return executed_sum(per_step, scored) / self._terms(scored)

    def _terms(self, scored: Tensor) -> Tensor:
        """Of how many terms the reduction takes the mean, for each decision, `[B]`; 1 for the sum."""
        terms, reduction = torch.ones_like(scored), self.config.log_prob_reduction
        if reduction != "sum":
            # The initial noise is one term more; it cancels in the ratio.
            terms = terms * (self.policy.recorded_steps() + (reduction == "mean_chain"))
        if reduction == "mean" and self.config.ratio_level != "token":
            terms = terms * self.policy.base.real_action_dim
        if reduction == "mean" and self.config.ratio_level == "chunk":
            terms = terms * scored
        return terms

    def _by_level(self, per_step: Tensor, per_component: Tensor | None, scored: Tensor) -> Tensor:
        """Log-probabilities of what the ratios are of, as `ratio_level` says; zero where nothing was executed.

        Args:
            per_step: `[B, H]`.
            per_component: `[B, H, A]`; needed for single components alone.
            scored: Executed steps of each row, `[B]`.

        Returns:
            `[B]` of whole decisions, `[B, H]` of steps or `[B, H * A]` of components.
        """
        if self.config.ratio_level == "chunk":
            return self.reduce(per_step, scored)
        if self.config.ratio_level == "token":
            assert per_component is not None
            per_step = per_component.flatten(1)
        return torch.where(self._mask(scored), per_step, 0.0) / self._terms(scored)[:, None]

    def _mask(self, scored: Tensor) -> Tensor:
        """Which of the ratios of a decision are of executed steps, `[B, T]`."""
        width = self.policy.base.real_action_dim if self.config.ratio_level == "token" else 1
        steps = torch.arange(self.policy.base.chunk_size, device=scored.device) < scored[:, None]
        return steps.repeat_interleave(width, 1)

    def _whole(self, log_ratio: Tensor, scored: Tensor) -> Tensor:
        """Log-ratios of whole decisions, unreduced, `[B]`."""
        terms = self._terms(scored)
        return log_ratio * terms if log_ratio.dim() == 1 else log_ratio.sum(1) * terms

    @torch.no_grad()
    def check_ratio(self, rollout: Rollout, contexts: Contexts) -> float:
        """Largest distance from 1 of the ratio of decisions that the current weights made; 0 where there are none.

        Args:
            rollout: The decisions; some of each actor are looked at.
            contexts: What was seen, encoded.

        Raises:
            RatioError: If it passes the tolerance: sampling and scoring do not agree, and PPO would be wrong.
        """
        decisions, rows = rollout.decisions, self._rows_to_check(rollout)
        if not len(rows):
            return 0.0
        log_ratio = []
        for micro in self._micro_batches(rows):
            recorded, chain, step, scored = (
                value[micro].to(self.device)
                for value in (decisions.log_prob, decisions.chain, decisions.step, decisions.scored)
            )
            sampled = self.reduce(recorded, scored)
            score = self.policy.score(contexts.rows(micro), chain, step)
            log_ratio.append(self.reduce(score.log_prob, scored) - sampled)
        distance = (torch.cat(log_ratio).exp() - 1).abs().cpu()
        # What is not a number is no less than the tolerance either.
        off = ~(distance <= self.ratio_tolerance)
        if bool(off.any()):
            actors = self._actors(decisions, rows[off]).unique().tolist()
            raise RatioError(
                f"the decisions of actor(s) {actors} are not scored as they were sampled: the probability ratio is off "
                f"by {float(distance.max()):.2e} (tolerance {self.ratio_tolerance:.0e}); check that both run the same "
                "version and config; on hardware of another kind, raise algorithm.ratio_tolerance a little",
                actors,
            )
        return float(distance.max())

    def _rows_to_check(self, rollout: Rollout) -> Tensor:
        """Usable rows that the current weights made: as many of each actor, all together about a minibatch."""
        decisions, rows = rollout.decisions, rollout.usable
        rows = rows[decisions.version[rows] == self.optimization_step]
        rows = rows[torch.randperm(len(rows), generator=self._generator(0))]
        by_actor = self._actors(decisions, rows)
        actors = by_actor.unique()
        share = -(-self.config.minibatch_size // max(1, len(actors)))
        return torch.cat([rows[:0], *(rows[by_actor == actor][:share] for actor in actors)])

    def _actors(self, decisions: DecisionBatch, rows: Tensor) -> Tensor:
        """The actor that made each of some rows."""
        return decisions.env[rows] // self.config.collection.num_envs

    def _parts(self, material: Material, rows: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """Rows and what is known of them, as many at a time as fit into memory."""
        for micro in self._micro_batches(rows):
            yield micro, material.batch.rows(micro)

    @torch.no_grad()
    def divergence(self, material: Material) -> float:
        """How far the present policy is from that before the update, in nats per decision (k3 estimator).

        Measured on some of the rows that are trained on, the same ones throughout an iteration. It is that of whole
        decisions, however their log-probability is reduced: a mean of twenty terms would make a step look four hundred
        times smaller than it is, and the learning rate would follow.
        """
        chosen = torch.randperm(len(material.trained), generator=self._generator(2))[:KL_ROWS]
        rows = material.trained[chosen]
        whole = [
            self._whole(self._log_ratio(part, self._score(material.contexts.rows(micro), part)), part.scored)
            for micro, part in self._parts(material, rows)
        ]
        return float(approximate_kl(torch.cat(whole)))

    def _score(self, context: Context, part: Batch) -> Score:
        return self.policy.score(context, part.chain, part.step)

    def _log_ratio(self, part: Batch, score: Score) -> Tensor:
        return self._by_level(score.log_prob, score.terms, part.scored) - part.log_prob

    def _reference_steps(
        self, contexts: Contexts, observations: Observations, chain: Tensor, step: Tensor
    ) -> Gaussian | None:
        """The steps of the policy before reinforcement learning from the recorded states, `[N, S, H, D]`."""
        if self.reference is None:
            return None
        means, stds = [], []
        for rows in torch.arange(len(chain)).split(self._rows_at_once):
            # What is kept does not depend on what is trained: it is the reference's own, too.
            context = (
                contexts.rows(rows)
                if contexts.kept
                else self.reference.encode(observations.rows(rows, self.reference.base.take))
            )
            here = rows.to(chain.device)
            steps = self.reference.score(context, chain[here], step[here]).steps
            means.append(steps.mean)
            stds.append(steps.std)
        return Gaussian(torch.cat(means), torch.cat(stds))

    def _policy_step(self, material: Material, rows: Tensor, averages: Averages) -> int:
        """One gradient step, in as many parts as fit into memory at a time. Returns how many steps were skipped.

        Where the rewards say nothing, it is one on demonstrations alone, and none without any.
        """
        shares = self.trains_base_for_critic and material.has_signal
        names = ["policy", "critic"] if shares else ["policy"]
        for name in names:
            self.optimizers[name].zero_grad(set_to_none=True)
        for micro, part in self._parts(material, rows) if material.has_signal else ():
            context = material.contexts.rows(micro)
            loss = self._policy_loss(context, part, averages)
            if self.trains_base_for_critic:
                loss = loss + self.config.critic_coef * self._shared_value_loss(
                    material, micro, context, averages
                )
            (loss * (len(micro) / len(rows))).backward()
            for name in names:
                self.optimizers[name].gather()
        supervised = self._supervised_loss() if self.config.demonstration_weight > 0 else None
        if supervised is not None:
            (self.config.demonstration_weight * supervised).backward()
            averages.add(supervised_loss=supervised)
        elif not material.has_signal:
            return 0
        return sum(self._step(name, averages) for name in names)

    def _micro_batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        """A minibatch in slices of nearly equal size, none larger than `micro_batch_size`."""
        size = self.config.micro_batch_size or len(rows)
        return rows.tensor_split(-(-len(rows) // size))

    def _policy_loss(self, context: Context, part: Batch, averages: Averages) -> Tensor:
        config, score = self.config, self._score(context, part)
        log_ratio = self._log_ratio(part, score)
        result = policy_loss(
            log_ratio,
            part.advantage,
            config.clip_ratio,
            config.dual_clip,
            part.weight,
            config.log_ratio_bound,
            config.clip_ratio_high,
            None if config.ratio_level == "chunk" else self._mask(part.scored),
        )
        entropy = self._entropy(score, part.scored)
        loss = result.loss - config.entropy_coef * entropy
        if part.reference is not None:
            kl = self._reference_kl(part, score)
            loss = loss + config.kl_coef * kl
            averages.add(reference_kl=kl)
        averages.add(
            policy_loss=result.loss,
            approx_kl=approximate_kl(self._whole(log_ratio, part.scored).detach()),
            clip_fraction=result.clip_fraction,
            entropy=entropy,
        )
        return loss

    def _entropy(self, score: Score, scored: Tensor) -> Tensor:
        """Mean entropy of an executed action component in a recorded denoising step, in nats."""
        components = scored * (self.policy.recorded_steps() * self.policy.base.real_action_dim)
        return (executed_sum(score.entropy, scored) / components).mean()

    def _reference_kl(self, part: Batch, score: Score) -> Tensor:
        assert part.reference is not None
        dims, correlation = self.policy.base.real_action_dim, self.policy.noise.correlation
        per_step = kl_divergence(score.steps, part.reference, dims, correlation).sum(1)
        return executed_sum(per_step, part.scored).mean()

    def _supervised_loss(self) -> Tensor | None:
        """The base's own loss on a batch of demonstrations; None as long as nobody has shown any."""
        if self.demonstrations is None:
            raise ValueError("algorithm.demonstration_weight is set and no demonstrations were given")
        batch = self.demonstrations(self.config.demonstration_batch_size)
        return None if batch is None else self.policy.base.loss(batch)

    def _shared_value_loss(
        self, material: Material, rows: Tensor, context: Context, averages: Averages
    ) -> Tensor:
        """The critic's loss on features as the base makes them now, with gradients to it."""
        assert self.critic is not None
        assert material.critic is not None
        features = self.policy.base.critic_features(context, self._critic_source)
        return self._value_loss(self.critic(features), material.critic.rows(rows.to(self.device)), averages)

    def _value_loss(self, value: Tensor, part: CriticBatch, averages: Averages) -> Tensor:
        assert self.critic is not None
        scale = self.critic.scale
        loss = value_loss(
            value / scale,
            part.target / scale,
            part.value / scale,
            self.config.value_clip,
            self.config.huber_delta,
        )
        averages.add(value_loss=loss)
        return loss

    def _critic_step(self, critic: Critic, part: CriticBatch, averages: Averages) -> int:
        loss = self._value_loss(critic(part.features), part, averages)
        self.optimizers["critic"].zero_grad(set_to_none=True)
        loss.backward()
        return self._step("critic", averages)

    def _step(self, name: str, averages: Averages) -> int:
        """Takes a gradient step; a non-finite gradient is never applied. Returns how many steps were skipped."""
        optimizer = self.optimizers[name]
        optimizer.gather()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip_norm)
        if not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            return 1
        averages.add(**{f"{name}_grad_norm": norm})
        optimizer.step()
        return 0

    def _adapt_lr(self, kl: float, may_rise: bool = True) -> None:
        """Keeps the divergence of an iteration near its target by moving the learning rate (as rsl_rl does).

        Args:
            kl: Measured after the last step.
            may_rise: Whether these were steps towards what rewards say: a small divergence of others says nothing.
        """
        config = self.config
        if config.lr_schedule != "adaptive":
            return
        if not kl <= config.target_kl * 2:
            self._set_lr(self.lr / config.lr_factor)
        elif may_rise and kl < config.target_kl / 2:
            self._set_lr(self.lr * config.lr_factor)

    def _decay_lr(self) -> None:
        """Lowers the learning rate along a cosine, by the step from this iteration to the next."""
        if self.config.lr_schedule != "cosine":
            return
        end = self.config.lr_decay_iterations
        now, after = (
            1 + math.cos(math.pi * min(step, end) / end)
            for step in (self.optimization_step, self.optimization_step + 1)
        )
        # A factor, so that a run that was rolled back or resumed goes on from the rate that it has.
        self._set_lr(self.lr * after / now if now > 0 else 0.0)

    def _policy_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def _statistics(self, material: Material, rollout: Rollout) -> dict[str, float]:
        count, trained = len(rollout.decisions), material.trained.to(self.device)
        older = {
            "importance_weight": float(material.batch.weight[trained].mean()) if len(trained) else 1.0,
            "over_cap": material.over_cap,
            "signal": float(material.has_signal),
        }
        if material.critic is None:
            return older | {"filtered": 1 - (len(trained) + material.over_cap) / count}
        rows, value, target = rollout.usable.to(self.device), material.critic.value, material.critic.target
        return older | {
            "explained_variance": float(explained_variance(value[rows], target[rows])),
            "value": float(value.mean()),
            "orphaned": count - len(rollout.usable),
        }

    @staticmethod
    def _stats(averages: Averages, extra: dict[str, float]) -> TrainingStats:
        stats = TrainingStats()
        for name, value in averages.means().items():
            group = stats.losses if name.endswith("_loss") else stats.extra
            if name.endswith("_grad_norm"):
                stats.grad_norms[name.removesuffix("_grad_norm")] = value
            else:
                group[name] = value
        stats.extra.update(extra)
        return stats
