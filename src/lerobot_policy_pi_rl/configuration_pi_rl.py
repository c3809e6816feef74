"""Configuration of the `pi_rl` policy: a base flow policy and an explorer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.optim.optimizers import OptimizerConfig
from lerobot.optim.schedulers import CosineAnnealingWithWarmupSchedulerConfig, LRSchedulerConfig
from lerobot.policies.gaussian_actor.configuration_gaussian_actor import ActorLearnerConfig, ConcurrencyConfig
from lerobot.utils.constants import ACTION

from .bases.configuration import (
    BaseConfig,
    CompactConfig,
    Sizes,
    check_base,
    get_sizes,
    has_optional_cameras,
    load_stock_config,
    set_dtype,
    set_sizes,
)
from .errors import check, config_error, refuse_stock_command

logger = logging.getLogger(__name__)

EXPLORERS = ("flow_sde", "flow_cps", "flow_noise")
RECORDINGS = ("hybrid", "joint")
# Part of the names that stock policies give to cameras that are not there.
EMPTY_CAMERA = ".empty_camera_"
# Kinds of a data set's columns that the compact base reads. LeRobot rounds the statistics of integers and booleans.
READABLE = ("image", "video", "float16", "float32", "float64")
TRAINABLE = ("expert", "expert_lora", "lora", "all")


@dataclass
class ExplorerConfig:
    """How denoising steps become Gaussians while the policy explores. Evaluation is always the ODE."""

    # `flow_sde` (no parameters), `flow_cps` (no parameters) or `flow_noise` (a small network learns the deviation).
    kind: str = "flow_sde"
    # `hybrid`: one stochastic step per decision, drawn per environment; `joint`: every step. Null takes the kind's
    # default: hybrid for flow_sde and flow_cps, joint for flow_noise.
    recording: str | None = None
    # Scale of the noise of flow_sde and flow_cps. The first flow_sde step has exactly this standard deviation, in
    # units of the normalised action.
    noise_level: float = 1.0
    # Correlation of the noise between neighbouring steps of a chunk, 0 to below 1 (flow_sde only).
    noise_correlation: float = 0.0
    # Range of the standard deviation that flow_noise learns, in units of the normalised action.
    noise_std_min: float = 0.15
    noise_std_max: float = 0.6
    # Width of the flow_noise network's hidden layer.
    noise_hidden_dim: int = 64
    # Standard deviation of the noise on dimensions that a base gives as logits (X-VLA's grippers), in logits. With 1.7
    # a gripper that closes above 1/2 does so about as often as its sigmoid says (within 0.01).
    logit_std: float = 1.7

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        name = "policy.explorer"
        check(
            self.kind in EXPLORERS,
            f"{name}.kind",
            f"{self.kind!r} is unknown; choose one of {list(EXPLORERS)}",
        )
        if self.recording is None:
            self.recording = "joint" if self.kind == "flow_noise" else "hybrid"
        check(
            self.recording in RECORDINGS,
            f"{name}.recording",
            f"{self.recording!r} is unknown; choose one of {list(RECORDINGS)}",
        )
        check(
            self.noise_level > 0, f"{name}.noise_level", f"must be above 0 to explore, got {self.noise_level}"
        )
        check(
            self.kind != "flow_cps" or self.noise_level <= 1,
            f"{name}.noise_level",
            f"flow_cps takes a level of at most 1, got {self.noise_level}",
        )
        check(
            0 <= self.noise_correlation < 1,
            f"{name}.noise_correlation",
            f"must be at least 0 and below 1, got {self.noise_correlation}",
        )
        check(
            0 < self.noise_std_min <= self.noise_std_max,
            f"{name}.noise_std_min",
            f"the range [{self.noise_std_min}, {self.noise_std_max}] is upside down or not positive; "
            "noise_std_min must be above 0 and at most noise_std_max",
        )
        check(self.logit_std > 0, f"{name}.logit_std", f"must be above 0 to explore, got {self.logit_std}")

    @property
    def correlation(self) -> float:
        """Correlation in force: flow_noise learns its deviation, and flow_cps preserves marginals, for white noise."""
        return self.noise_correlation if self.kind == "flow_sde" else 0.0


@PreTrainedConfig.register_subclass("pi_rl")
@dataclass
class PIRLConfig(PreTrainedConfig):
    """A flow policy that can be improved by online reinforcement learning (pi_RL, arXiv 2510.25889).

    Command line: `--policy.type=pi_rl`.
    """

    # Set while a checkpoint of this policy is loaded: its base needs no weights of its own before that. Not annotated,
    # so it is no setting and is not saved.
    weights_follow = False
    # The device that was asked for where this machine does not have it, and LeRobot has taken another one. Evaluation
    # and export go on there; training refuses it (`PIRLTrainConfig`). Not annotated, as above.
    missing_device = ""

    # Push the policy to the hub as `repo_id` after supervised training. LeRobot's default is true, and asks for a name.
    push_to_hub: bool = False

    # The flow policy that acts. Null means that of `base_path` or, without one, the compact base with its defaults.
    base: BaseConfig | None = None
    # Checkpoint of a stock LeRobot policy to start from, a folder or a name on the hub: its configuration, its weights
    # and its processors are taken from it.
    base_path: str | None = None
    # Precision of a stock base's weights, `float32` or `bfloat16`; null takes that of its own configuration. For pi0,
    # pi05, xvla, eo1, evo1, vla_jepa and molmoact2; what these keep in float32 always stays so.
    dtype: str | None = None
    # What of a stock base is trained: `expert` (the action expert; the VLM stays as it is, and each observation is
    # encoded once), `expert_lora` (the expert, and low-rank adapters in the VLM), `lora` (adapters in both) or `all`.
    # The compact base is always trained whole.
    trainable: str = "expert"
    # Rank of the adapters, and the factor by which their output is scaled, times the rank.
    lora_rank: int = 16
    lora_alpha: int = 32
    # A stock base does not keep the activations inside its blocks for the backward pass, but computes them again there:
    # less memory, more time, the same numbers.
    gradient_checkpointing: bool = False
    # A stock base's velocity, which every denoising step computes, is compiled by `torch.compile` when it is first used
    # (again for another batch size). Set it alike for learner and actors: compiled numbers are rounded otherwise.
    compile: bool = False
    # Exploration during online training.
    explorer: ExplorerConfig = field(default_factory=ExplorerConfig)

    # Number of actions H the policy predicts at a time; 0 takes the base's own (compact: 5).
    chunk_size: int = 0
    # Number of actions of a chunk that are executed before the next observation is looked at, at most chunk_size; 0
    # takes the base's own (compact: 5).
    n_action_steps: int = 0
    # Number of denoising steps K from noise to a chunk; 0 takes the base's own (compact: 4).
    num_inference_steps: int = 0

    # How each kind of feature is normalised.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    # Supervised training (lerobot-train).
    optimizer_lr: float = 1e-3
    optimizer_weight_decay: float = 1e-4
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 50

    # Fields that LeRobot's reinforcement-learning runtime reads.
    # Where the learner keeps rollouts between updates.
    storage_device: str = "cpu"
    # Environment steps of online training after which the learner stops.
    online_steps: int = 1_000_000
    # Where the learner listens and actors connect.
    actor_learner_config: ActorLearnerConfig = field(default_factory=ActorLearnerConfig)
    # Read by LeRobot's own learner and actor only; PI-RL's always use threads.
    concurrency: ConcurrencyConfig = field(default_factory=ConcurrencyConfig)

    def __post_init__(self) -> None:
        """Resolves the base and checks the fields against each other."""
        refuse_stock_command()
        asked: str | None = self.device
        super().__post_init__()
        if asked and asked != self.device:
            self.missing_device = asked
        self._resolve_base()
        check(
            self.num_inference_steps >= 1,
            "policy.num_inference_steps",
            f"needs at least 1 denoising step, got {self.num_inference_steps}",
        )
        check(
            self.trainable in TRAINABLE,
            "policy.trainable",
            f"{self.trainable!r} is unknown; choose one of {list(TRAINABLE)}",
        )
        check(self.lora_rank >= 1, "policy.lora_rank", f"must be at least 1, got {self.lora_rank}")
        self._check_stock_options()
        check(self.chunk_size >= 1, "policy.chunk_size", f"must be at least 1, got {self.chunk_size}")
        check(
            1 <= self.n_action_steps <= self.chunk_size,
            "policy.n_action_steps",
            f"must be between 1 and chunk_size={self.chunk_size}, got {self.n_action_steps}",
        )
        check(
            self.explorer.kind != "flow_cps" or self.num_inference_steps >= 2,
            "policy.num_inference_steps",
            "flow_cps needs at least 2 denoising steps, because its last one has no noise",
        )
        check_base(self)

    def _check_stock_options(self) -> None:
        check(
            self.stock is not None or self.trainable in ("expert", "all"),
            "policy.trainable",
            f"{self.trainable!r} is for bases that are policies of LeRobot's, such as pi0; the compact base is always "
            "trained whole, leave it out",
        )
        for name in ("gradient_checkpointing", "compile"):
            check(
                self.stock is not None or not getattr(self, name),
                f"policy.{name}",
                "is for bases that are policies of LeRobot's, such as pi0; set it to false",
            )
        check(
            not (self.gradient_checkpointing and self.compile),
            "policy.compile",
            "compiled blocks are not computed again; set it or policy.gradient_checkpointing to false",
        )

    def _resolve_base(self) -> None:
        """Finds the base, and agrees with it on what both have a setting for; this policy's own wins."""
        if self.base is None:
            self.base = CompactConfig() if self.base_path is None else load_stock_config(self.base_path)
        own: Any = self.base
        base = get_sizes(own)
        self.chunk_size = self.chunk_size or base.chunk_size
        self.n_action_steps = self.n_action_steps or min(base.n_action_steps, self.chunk_size)
        self.num_inference_steps = self.num_inference_steps or base.num_inference_steps
        set_sizes(own, Sizes(self.chunk_size, self.n_action_steps, self.num_inference_steps))
        if self.dtype is not None:
            set_dtype(own, self.dtype)
        if not isinstance(own, CompactConfig):
            own.device = self.device
            # Cameras that a stock policy only pads its input with are not to be looked for.
            seen = {k: v for k, v in (own.input_features or {}).items() if EMPTY_CAMERA not in k}
            # LeRobot's classes are not typed for mypy.
            self.input_features = self.input_features or seen  # type: ignore[has-type]
            self.output_features = self.output_features or own.output_features  # type: ignore[has-type]
            self.normalization_mapping = own.normalization_mapping
            self._check_left_out(seen)

    def _check_left_out(self, seen: Mapping[str, PolicyFeature]) -> None:
        """Checks that a base is not asked to do without what it reads."""
        needed = {
            key
            for key, feature in seen.items()
            if feature.type is not FeatureType.VISUAL or not has_optional_cameras(self.base)
        }
        left_out = sorted(needed - (self.input_features or {}).keys())
        check(
            not left_out,
            "policy.input_features",
            f"leaves out {left_out}, which this base reads and cannot do without; add what is missing, or take a "
            "checkpoint that was trained without",
        )

    def place_on(self, device: str) -> None:
        """Moves the policy that is built from this configuration, and its processors, to another device.

        Args:
            device: As torch names it.
        """
        self.device = device
        if self.stock is not None:
            self.stock.device = device

    def _save_pretrained(self, save_directory: Path) -> None:
        """Saves all but where the base came from: a checkpoint has its own weights and processors."""
        base_path, self.base_path = self.base_path, None
        try:
            super()._save_pretrained(save_directory)
        finally:
            self.base_path = base_path

    @property
    def stock(self) -> PreTrainedConfig | None:
        """Configuration of the stock policy, if the base is one."""
        return self.base if isinstance(self.base, PreTrainedConfig) else None

    @property
    def observation_delta_indices(self) -> None:
        """The policy looks at the current observation only."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The actions of one chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """Supervised training does not read rewards."""
        return None

    def get_optimizer_preset(self) -> OptimizerConfig:
        """Optimizer of supervised training: the base's own."""
        if self.stock is not None:
            return self.stock.get_optimizer_preset()
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        """Learning-rate schedule of supervised training: the base's own; compact: warm-up, then cosine to zero."""
        if self.stock is not None:
            return self.stock.get_scheduler_preset()
        return CosineAnnealingWithWarmupSchedulerConfig(num_warmup_steps=self.scheduler_warmup_steps)

    def set_dataset_feature_metadata(self, features: Mapping[str, Mapping[str, Any]]) -> None:
        """Leaves out what the compact base cannot read; LeRobot calls it with what a data set says of its columns.

        Args:
            features: By name, with their `dtype`.
        """
        if self.stock is not None or not self.input_features:
            return
        action = features.get(ACTION, {}).get("dtype", "float32")
        check(
            action in READABLE,
            "policy.output_features",
            f"{ACTION!r} is stored as {action}; store it as float32",
        )
        unread = sorted(
            name
            for name in self.input_features
            if name in features and features[name]["dtype"] not in READABLE
        )
        if unread:
            logger.warning(
                "The compact base reads floats and pictures; it leaves out %s (store numbers as float32)",
                ", ".join(f"{name} ({features[name]['dtype']})" for name in unread),
            )
            self.input_features = {k: v for k, v in self.input_features.items() if k not in unread}

    def validate_features(self) -> None:
        """Checks that there is something to see and something to do.

        Raises:
            ConfigError: If no observation or no action feature is there.
        """
        if not self.input_features:
            raise config_error(
                "policy.input_features", "is empty; the data set or environment must give observations"
            )
        if self.action_feature is None:
            raise config_error(
                "policy.output_features", f"has no {ACTION!r}; the data set or environment must give it"
            )
        check(
            len(self.action_feature.shape) == 1,
            "policy.output_features",
            f"{ACTION!r} has the shape {tuple(self.action_feature.shape)}; actions are vectors: store it with one axis",
        )
