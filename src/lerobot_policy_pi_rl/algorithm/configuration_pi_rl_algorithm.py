"""Configuration of the `pi_rl` algorithm: collection, objective and stability."""

from dataclasses import dataclass, field

from lerobot.rl.algorithms.configs import RLAlgorithmConfig

from ..configuration_pi_rl import PIRLConfig
from ..errors import check, refuse_stock_command
from .configuration_security import SecurityConfig

LR_SCHEDULES = ("adaptive", "constant", "cosine")
ADVANTAGES = ("gae", "group")
REWARDS = ("environment", "success")
LOG_PROB_REDUCTIONS = ("sum", "mean_steps", "mean_chain", "mean")
RATIO_LEVELS = ("chunk", "action", "token")
# Of a decision, where no time limit asks for a smaller one.
LARGEST_DISCOUNT = 0.99


def discount_within(decisions: float) -> float:
    """The discount per decision whose horizon is a time limit of so many decisions.

    An episode that the limit cuts is bootstrapped: it is worth what would have come after it. With a discount near 1 a
    success after the limit is then worth as much as one before it, and the policy has no reason to be in time.

    Args:
        decisions: Decisions until an episode is cut.
    """
    return min(LARGEST_DISCOUNT, max(0.0, 1 - 1 / decisions))


@dataclass
class CollectionConfig:
    """How actors collect decisions."""

    # Number of environments an actor steps at once.
    num_envs: int = 64
    # Number of worker processes that step them; 0 steps them inside the actor.
    num_workers: int = 2
    # Device on which actors (and `lerobot-pi-rl-check`) run the policy, such as `cpu` beside a learner on `cuda`; None
    # is that of the learner, policy.device.
    device: str | None = None
    # Decisions per environment and iteration.
    decisions: int = 16
    # What a step is worth: `environment` (its own reward) or `success` (1 for a step that reports success, else 0), for
    # environments whose own reward is shaped, such as LeRobot's `metaworld`.
    reward: str = "environment"
    # Environments that begin their episodes from the same starts, so that their returns can be compared; 1 is off.
    # Every iteration then begins with fresh episodes.
    group_size: int = 1
    # How much the environments go to the tasks that fail, where one policy learns several: 0 deals them evenly, 1 in
    # proportion to the failures. They are dealt anew at every checkpoint (`save_freq`), at least one to each task.
    task_focus: float = 0.0
    # Control steps by which the observation of a decision is older than its first executed action: a robot's next chunk
    # is computed while it executes the last of these steps. The policy has `lookahead_steps + 1` periods of `env.fps`
    # to think; 0 thinks between two chunks, in one period. At most policy.n_action_steps, and needs a
    # policy.chunk_size of at least policy.n_action_steps + lookahead_steps.
    lookahead_steps: int = 0
    # Environments that an actor keeps for validation alone; 0 validates in those of the collection (a robot), all of
    # whose episodes then begin anew.
    eval_envs: int = 32
    # Versions by which decisions may be older than the weights that learn from them. 0: actors wait while the learner
    # updates. Above 0 they go on collecting, at most this many quotas ahead, and the objective is decoupled.
    max_staleness: int = 0
    # Number of actors the learner waits for before the first iteration.
    num_actors: int = 1
    # Most actors that may be connected at once.
    max_actors: int = 32
    # Number of this actor among all; set it on the command line of every further actor.
    actor_id: int = 0
    # Seconds an actor waits for the learner (at the start, and again after losing it) before it gives up.
    connect_timeout_s: float = 120.0
    # Seconds without any decision after which the learner says that it is waiting, and for whom.
    idle_warning_s: float = 30.0
    # The learner waits for an actor's quota this many times as long as the first one of the iteration took; at least a
    # minute, or ten where actors validate first. It then goes on without actors that have sent none, and waits for each
    # of them again once it sends one. 0 waits for as long as they are connected.
    quota_patience: float = 10.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        name = "algorithm.collection"
        for key, least in (
            ("num_envs", 1),
            ("num_workers", 0),
            ("decisions", 1),
            ("group_size", 1),
            ("lookahead_steps", 0),
            ("eval_envs", 0),
            ("max_staleness", 0),
            ("num_actors", 1),
            ("actor_id", 0),
        ):
            value = getattr(self, key)
            check(value >= least, f"{name}.{key}", f"must be at least {least}, got {value}")
        check(
            self.reward in REWARDS,
            f"{name}.reward",
            f"{self.reward!r} is unknown; choose one of {list(REWARDS)}",
        )
        check(
            self.quota_patience == 0 or self.quota_patience >= 1,
            f"{name}.quota_patience",
            f"must be 0 or at least 1, got {self.quota_patience}",
        )
        check(0 <= self.task_focus <= 1, f"{name}.task_focus", f"must be 0 to 1, got {self.task_focus}")
        check(
            self.task_focus == 0 or self.max_staleness == 0,
            f"{name}.task_focus",
            f"deals environments when all episodes begin anew, which asynchronous actors never do; set it or "
            f"{name}.max_staleness={self.max_staleness} to 0",
        )
        check(
            self.num_envs % self.group_size == 0,
            f"{name}.group_size",
            f"must divide num_envs={self.num_envs}, got {self.group_size}",
        )
        check(
            self.num_actors <= self.max_actors,
            f"{name}.num_actors",
            f"must be at most max_actors={self.max_actors}, got {self.num_actors}",
        )


@RLAlgorithmConfig.register_subclass("pi_rl")
@dataclass
class PIRLAlgorithmConfig(RLAlgorithmConfig):
    """PPO over the denoising steps of a flow policy (pi_RL, arXiv 2510.25889).

    Command line: `--algorithm.type=pi_rl`.
    """

    # How decisions are collected.
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    # Who may use the learner's port.
    security: SecurityConfig = field(default_factory=SecurityConfig)

    # What an episode is compared with: `gae` (a critic's value) or `group` (other episodes from the same start; GRPO).
    # `group` has no critic, needs collection.group_size above 1 and collection.decisions for at least a whole episode.
    advantage: str = "gae"
    # Of `group`: groups whose mean return lies outside of these two bounds are left out, as those are that are all
    # alike; null is off.
    group_bounds: tuple[float, float] | None = None
    # Discount per decision (not per environment step). Null: 1 - 1 / L for a time limit of L decisions
    # (env.episode_length), at most 0.99, so that what comes after the limit counts little; 0.99 without a limit.
    gamma: float | None = None
    # Exponential weight of generalised advantage estimation.
    gae_lambda: float = 0.95

    # Passes over each rollout.
    epochs: int = 6
    # Decisions per gradient step.
    minibatch_size: int = 512
    # Decisions that are encoded or scored at a time; a gradient step adds up the gradients of its parts, which gives
    # the same result with less memory. 0: the whole minibatch.
    micro_batch_size: int = 0
    # Keep Adam's moments, summed gradients and float32 copies of the policy's weights in main memory, and take its
    # steps there: beside a trained weight in bfloat16 a GPU then holds its gradient's 2 bytes instead of 18. Slower.
    offload_optimizer: bool = False
    # Encoded observations of a rollout are kept for all its epochs up to this size, on policy.storage_device, if what
    # encodes them is not trained (a frozen VLM's cache); larger ones are computed again for every minibatch.
    context_memory_gb: float = 8.0
    # Clip range of the probability ratio, `1 - clip_ratio` to `1 + clip_ratio`.
    clip_ratio: float = 0.4
    # Upper half of the clip range where it differs: up to `1 + clip_ratio_high`; null is clip_ratio.
    clip_ratio_high: float | None = None
    # What one probability ratio is of, and is clipped: `chunk` (the whole decision), `action` (each executed step) or
    # `token` (each component of each step). The objective is the mean over the ratios of a decision.
    ratio_level: str = "chunk"
    # Largest weight of a decision that older weights made (`collection.max_staleness`): its probability under the
    # weights before the update over the one at collection. Decisions above it are not trained on.
    importance_cap: float = 5.0
    # Lower bound of the objective for negative advantages, as a multiple of the advantage (dual clip); null is off.
    dual_clip: float | None = None
    # Largest absolute log-ratio of a decision in the objective; null is off. A decision beyond it has no gradient.
    log_ratio_bound: float | None = 5.0
    # How the log-probability of a ratio is reduced: `sum` (over all that it covers), `mean_steps` (over the recorded
    # denoising steps), `mean_chain` (over these and the initial noise, K + 1 terms, as the reference does where it
    # records the whole chain) or `mean` (over every executed action component as well).
    log_prob_reduction: str = "sum"
    # Weight of the entropy bonus, in nats per action component and denoising step; only a learned deviation
    # (flow_noise) has a gradient.
    entropy_coef: float = 0.0
    # Weight of the divergence from the policy before reinforcement learning; 0 is off.
    kl_coef: float = 0.0
    # Weight of the supervised loss on demonstrations (`dataset.repo_id`, and what people do on a robot during the run)
    # in every step of the policy; 0 is off.
    demonstration_weight: float = 0.0
    # Demonstrated chunks per gradient step.
    demonstration_batch_size: int = 64
    # Steps by people on a robot that are kept, on the disk and in memory; the oldest go first.
    intervention_capacity: int = 20_000
    # Megabytes (10^6 bytes) of them that are kept, mostly pictures; the limit that is reached first counts.
    intervention_megabytes: int = 4000

    # Learning rate of the policy at the start.
    lr: float = 1e-4
    # Learning rate of the critic.
    critic_lr: float = 1e-3
    # Largest norm of the policy's and of the critic's gradient.
    grad_clip_norm: float = 1.0
    # Adam's decay rates of the mean gradient and of its mean square; of the policy and of the critic.
    adam_betas: tuple[float, float] = (0.9, 0.999)
    # Added to the root of Adam's mean square.
    adam_eps: float = 1e-8
    # Decoupled weight decay (AdamW) of the policy and of the critic, as a multiple of the learning rate.
    weight_decay: float = 0.0
    # `adaptive`: divide or multiply lr by lr_factor when the measured KL leaves [target_kl / 2, target_kl * 2];
    # `cosine`: from lr to lr_min in lr_decay_iterations; `constant`.
    lr_schedule: str = "adaptive"
    # Iterations in which `cosine` lowers the learning rate of the policy.
    lr_decay_iterations: int = 1000
    # Factor by which the adaptive schedule changes the learning rate after an iteration.
    lr_factor: float = 1.5
    # Smallest learning rate that a schedule sets.
    lr_min: float = 1e-6
    # Largest learning rate that the adaptive schedule sets.
    lr_max: float = 1e-3
    # Wanted divergence between the policies before and after an iteration, in nats per decision; measured after the
    # last gradient step of each epoch.
    target_kl: float = 0.1
    # The remaining epochs of an iteration are skipped once its divergence passes this multiple of target_kl.
    kl_stop: float = 3.0

    # What the critic reads: `expert` (the action expert's features) or `vlm` (the VLM's) of a stock base, `observation`
    # of the compact one, `separate` (the observation itself, by an encoder of its own); null takes the first one that
    # the base offers.
    critic_features: str | None = None
    # Weight of the critic's loss in what trains the base, through the features that the critic reads. 0: they are
    # detached, and the base learns from the policy's objective alone.
    critic_coef: float = 0.0
    # Hidden layers of the critic.
    critic_hidden_dims: list[int] = field(default_factory=lambda: [256, 256])
    # Iterations at the start in which only the critic learns.
    critic_warmup: int = 2
    # Range within which the value may move in one iteration (value clip), in units of the returns' scale; null is off.
    # The scale is 1 for returns of at most about 1, and the running deviation of larger ones.
    value_clip: float | None = 0.2
    # Residual at which the value loss turns from quadratic to linear (Huber), in the same units.
    huber_delta: float = 1.0

    # Training ends early once the validation success (every env_eval_freq iterations) reaches this; null is never.
    stop_success: float | None = None
    # Training ends early after this many validations in a row without a new best one; null is never.
    stop_patience: int | None = None
    # A validation this far below the best one (half of it is enough below a weak one) brings the best checkpoint
    # back, at half the smaller of its learning rate and the present one; null never.
    rollback_drop: float | None = 0.25
    # Training ends when the best checkpoint would have to be brought back more often than this.
    max_rollbacks: int = 3

    # Largest distance from 1 of the probability ratio of an actor's fresh decisions; null takes 1e-3, and 0.1 where a
    # part of the policy is in bfloat16, or all of it runs in bfloat16 autocast.
    ratio_tolerance: float | None = None

    # Filled in by LeRobot with the policy's configuration.
    policy_config: PIRLConfig | None = None

    def __post_init__(self) -> None:
        """Checks the fields, and that the command is one that can run this algorithm."""
        refuse_stock_command()
        self._check_ranges()
        check(
            self.lr_schedule in LR_SCHEDULES,
            "algorithm.lr_schedule",
            f"{self.lr_schedule!r} is unknown; choose one of {list(LR_SCHEDULES)}",
        )
        check(
            self.log_prob_reduction in LOG_PROB_REDUCTIONS,
            "algorithm.log_prob_reduction",
            f"{self.log_prob_reduction!r} is unknown; choose one of {list(LOG_PROB_REDUCTIONS)}",
        )
        check(
            self.ratio_level in RATIO_LEVELS,
            "algorithm.ratio_level",
            f"{self.ratio_level!r} is unknown; choose one of {list(RATIO_LEVELS)}",
        )
        check(
            self.clip_ratio_high is None or self.clip_ratio_high > 0,
            "algorithm.clip_ratio_high",
            f"must be above 0 or null, got {self.clip_ratio_high}",
        )
        bounds = self.group_bounds
        check(
            bounds is None or (self.advantage == "group" and len(bounds) == 2 and bounds[0] <= bounds[1]),
            "algorithm.group_bounds",
            f"must be a lower and an upper bound and needs algorithm.advantage='group', got {bounds}",
        )
        check(
            self.advantage in ADVANTAGES,
            "algorithm.advantage",
            f"{self.advantage!r} is unknown; choose one of {list(ADVANTAGES)}",
        )
        check(
            self.critic_coef == 0 or self.advantage == "gae",
            "algorithm.critic_coef",
            f"must be 0 with algorithm.advantage={self.advantage!r}, which has no critic; got {self.critic_coef}",
        )
        grouped = self.collection.group_size > 1
        check(
            grouped == (self.advantage == "group"),
            "algorithm.collection.group_size",
            f"{self.collection.group_size} does not fit algorithm.advantage={self.advantage!r}: "
            "'group' needs at least 2, 'gae' needs 1",
        )
        check(
            self.dual_clip is None or self.dual_clip > 1,
            "algorithm.dual_clip",
            f"must be above 1 or null, got {self.dual_clip}",
        )
        check(
            self.log_ratio_bound is None or self.log_ratio_bound > 0,
            "algorithm.log_ratio_bound",
            f"must be above 0 or null, got {self.log_ratio_bound}",
        )
        check(
            len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas),
            "algorithm.adam_betas",
            f"must be two numbers, each at least 0 and below 1, got {list(self.adam_betas)}",
        )
        check(
            self.stop_patience is None or self.stop_patience >= 1,
            "algorithm.stop_patience",
            f"must be at least 1 or null, got {self.stop_patience}",
        )
        check(
            self.rollback_drop is None or 0 < self.rollback_drop <= 1,
            "algorithm.rollback_drop",
            f"must be above 0 and at most 1, or null, got {self.rollback_drop}",
        )
        check(
            self.lr_min <= self.lr <= self.lr_max,
            "algorithm.lr",
            f"must be between lr_min={self.lr_min} and lr_max={self.lr_max}, got {self.lr}",
        )

    def _check_ranges(self) -> None:
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            check(
                value is None or 0 <= value <= 1, f"algorithm.{name}", f"must be between 0 and 1, got {value}"
            )
        for name in (
            "epochs",
            "minibatch_size",
            "lr_decay_iterations",
            "demonstration_batch_size",
            "intervention_capacity",
            "intervention_megabytes",
        ):
            value = getattr(self, name)
            check(value >= 1, f"algorithm.{name}", f"must be at least 1, got {value}")
        for name in (
            "clip_ratio",
            "lr",
            "critic_lr",
            "grad_clip_norm",
            "adam_eps",
            "target_kl",
            "kl_stop",
            "huber_delta",
        ):
            value = getattr(self, name)
            check(value > 0, f"algorithm.{name}", f"must be above 0, got {value}")
        for name in (
            "kl_coef",
            "critic_coef",
            "weight_decay",
            "demonstration_weight",
            "micro_batch_size",
            "context_memory_gb",
        ):
            value = getattr(self, name)
            check(value >= 0, f"algorithm.{name}", f"must be 0 or above, got {value}")
        check(self.lr_factor > 1, "algorithm.lr_factor", f"must be above 1, got {self.lr_factor}")

    @property
    def discount(self) -> float:
        """The discount per decision: the setting, or the one of an environment without a time limit."""
        return LARGEST_DISCOUNT if self.gamma is None else self.gamma

    @classmethod
    def from_policy_config(cls, policy_cfg: PIRLConfig) -> "PIRLAlgorithmConfig":
        """Default algorithm for a policy."""
        return cls(policy_config=policy_cfg)
