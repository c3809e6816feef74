"""The `pi_rl` policy: a base flow policy that acts, and an explorer that makes its denoising steps Gaussian."""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.policies.pretrained import ActionSelectKwargs, PreTrainedPolicy
from safetensors import safe_open
from torch import Tensor, nn

from . import processor_pi_rl  # noqa: F401  registers the processor steps that checkpoints name
from .bases.adapter import Context, FlowBase
from .bases.registry import make_base
from .bases.stock import missing_tensors
from .configuration_pi_rl import ExplorerConfig, PIRLConfig
from .errors import check, config_error
from .flow.sampler import Noise, Sample, Score, sample_hybrid, sample_joint, score
from .flow.transition import FieldOutput


@dataclass(frozen=True)
class NoiseRange:
    """Range of a learned standard deviation, in units of the normalised action."""

    low: float
    high: float


class NoiseNetwork(nn.Module):
    """Standard deviation of a denoising step, learned (Flow-Noise; ReinFlow, arXiv 2505.22094).

    `log std^2 = l_min + (l_max - l_min) * (tanh(net) + 1) / 2` with `l = log(std^2)`, per chunk step and dimension.
    It reads the velocity network's features without sending gradients back into them.
    """

    def __init__(self, base: FlowBase, hidden_dim: int, limits: NoiseRange) -> None:
        """Builds a two-layer network that starts in the middle of the range."""
        super().__init__()
        self.limits = limits
        self.position = nn.Parameter(torch.zeros(base.chunk_size, hidden_dim))
        self.hidden = nn.Linear(base.feature_dim + 1, hidden_dim)
        self.out = nn.Linear(hidden_dim, base.action_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Deviation `[B, H, D]` from features `[B, H, F]` and times `[B]`."""
        time = t[:, None, None].expand(*features.shape[:2], 1)
        hidden = self.hidden(torch.cat([features.detach(), time], -1)) + self.position
        raw = self.out(nn.functional.silu(hidden))
        low, high = (2 * math.log(limit) for limit in (self.limits.low, self.limits.high))
        return torch.exp(0.5 * (low + (high - low) * (torch.tanh(raw) + 1) / 2))


class PIRLPolicy(PreTrainedPolicy):
    """A flow policy that acts by the ODE, explores with Gaussian denoising steps and scores what it recorded.

    Source: pi_RL, arXiv 2510.25889.
    """

    config_class = PIRLConfig
    name = "pi_rl"
    logit_std: Tensor | None

    def __init__(self, config: PIRLConfig, dataset_stats: Any = None, dataset_meta: Any = None) -> None:
        """Builds the base and, for Flow-Noise, the noise network.

        Args:
            config: The policy's configuration, with input and output features.
            dataset_stats: Given by LeRobot; normalisation lives in the processors, so it is not used.
            dataset_meta: Given by LeRobot, not used.
        """
        super().__init__(config)
        config.validate_features()
        self.config: PIRLConfig = config
        self.base = make_base(config)
        explorer = config.explorer
        self.noise = Noise(explorer.kind, explorer.noise_level, explorer.correlation)  # type: ignore[arg-type]
        self.noise_network = self._make_noise_network(explorer)
        self.register_buffer("logit_std", self._make_logit_std(explorer), persistent=False)
        self.reset()

    def _make_noise_network(self, explorer: ExplorerConfig) -> NoiseNetwork | None:
        if explorer.kind != "flow_noise":
            return None
        limits = NoiseRange(explorer.noise_std_min, explorer.noise_std_max)
        return NoiseNetwork(self.base, explorer.noise_hidden_dim, limits)

    def _make_logit_std(self, explorer: ExplorerConfig) -> Tensor | None:
        """Deviation of the dimensions that are logits, `[D]`, zero for the others; None if none are.

        Raises:
            ConfigError: If they would never have noise.
        """
        dims = list(self.base.logit_dims)
        if not dims:
            return None
        check(
            explorer.kind != "flow_cps",
            "policy.explorer.kind",
            "flow_cps has no noise in its last step, the only one whose logits are executed (this base has some, in "
            f"dimensions {dims}); take flow_sde or flow_noise",
        )
        std = torch.zeros(self.base.action_dim)
        std[dims] = explorer.logit_std
        return std

    def reset(self) -> None:
        """Forgets the actions that were predicted and not yet taken."""
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def get_optim_params(self) -> Any:
        """Parameters that supervised training optimises: the base's, as its optimizer takes them."""
        return self.base.optim_params()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Supervised flow-matching loss of the base.

        Args:
            batch: Preprocessed batch with `action` `[B, H, A]` and, optionally, `action_is_pad` `[B, H]`.

        Returns:
            The loss and nothing else to log.
        """
        return self.base.loss(batch), {}

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Encodes a preprocessed observation once, without dropout; the context serves every denoising step."""
        self._leave_training_mode()
        return self.base.encode(batch)

    def _leave_training_mode(self) -> None:
        """A density is that of one network, not of one that dropout or a random crop draws anew at every call."""
        if self.training:
            self.eval()

    def field(self, context: Context, x_t: Tensor, t: Tensor) -> FieldOutput:
        """Velocity, and deviations that are not the step's own, of states `[B, H, D]` at times `[B]`."""
        output = self.base.velocity(context, x_t, t)
        std = self.noise_network(output.features, t) if self.noise_network is not None else None
        return FieldOutput(output.velocity, std, self.logit_std)

    def initial_noise(self, context: Context, generator: torch.Generator | None = None) -> Tensor:
        """Noise at `t = 1` for each row of a context, `[B, H, D]`."""
        some = next(iter(context.values()))
        return self.base.initial_noise(len(some), some.device, generator)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Unpack[ActionSelectKwargs]) -> Tensor:  # type: ignore[misc]
        """Predicts a chunk by the base's own sampler, without exploration.

        Args:
            batch: Preprocessed observation with B rows.
            **kwargs: `noise`, the initial noise `[B, H, D]`; drawn if not given.

        Returns:
            Normalised actions `[B, H, A]`, as the base's postprocessor takes them.
        """
        context = self.encode(batch)
        noise = kwargs.get("noise")
        noise = self.initial_noise(context) if noise is None else noise
        return self.base.actions(self.base.sample(context, noise, self.config.num_inference_steps))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Unpack[ActionSelectKwargs]) -> Tensor:  # type: ignore[misc]
        """Next action `[B, A]`; predicts a new chunk when the last one is used up."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)[:, : self.config.n_action_steps]
            self._queue.extend(chunk.transpose(0, 1))
        return self._queue.popleft()

    @torch.no_grad()
    def explore(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Sample:
        """Samples a chunk with noise and records what scoring needs.

        Args:
            batch: Preprocessed observation with B rows.
            generator: Source of randomness.

        Returns:
            The chunk, its chain and its log-probability.
        """
        context = self.encode(batch)
        sample = sample_hybrid if self.config.explorer.recording == "hybrid" else sample_joint
        return sample(
            lambda x, t: self.field(context, x, t),
            self.initial_noise(context, generator),
            self.config.num_inference_steps,
            self.noise,
            self.base.real_action_dim,
            generator,
            self.base.step_lengths,
        )

    def score(self, context: Context, chain: Tensor, step: Tensor) -> Score:
        """Density of recorded transitions under the current weights, differentiable.

        Args:
            context: Encoded observation with B rows.
            chain: Recorded states `[B, S + 1, H, D]`.
            step: Step indices `[B, S]`.

        Returns:
            Log-probability and entropy `[B, H]`, and the Gaussians.
        """
        self._leave_training_mode()
        return score(
            lambda x, t: self.field(context, x, t),
            chain,
            step,
            self.config.num_inference_steps,
            self.noise,
            self.base.real_action_dim,
            self.base.step_lengths,
        )

    def recorded_steps(self) -> int:
        """Number S of transitions that a recorded chunk holds."""
        joint = self.config.explorer.recording == "joint"
        return self.noise.stochastic_steps(self.config.num_inference_steps) if joint else 1

    def trainable_state(self) -> dict[str, Tensor]:
        """What an actor needs to act like this policy: its trainable tensors by name, on the CPU."""
        return {name: p.detach().cpu() for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, tensors: dict[str, Tensor]) -> None:
        """Copies what `trainable_state` gave into this policy.

        Raises:
            ValueError: If names, shapes or dtypes are not those of this policy's trainable tensors, or a number is not
                finite.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        wrong = sorted(own.keys() ^ tensors.keys()) or [
            n for n, p in own.items() if (p.shape, p.dtype) != (tensors[n].shape, tensors[n].dtype)
        ]
        if wrong:
            raise ValueError(
                f"pushed weights do not fit this policy: {wrong[:3]} differ; start both from one config"
            )
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"pushed weights are not finite: {broken[:3]}; look at the learner's log")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: Any = None, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint of this policy, whatever base it once began with; see `PreTrainedPolicy`."""
        if not isinstance(config, PIRLConfig):
            return super().from_pretrained(pretrained_name_or_path, config=config, **kwargs)
        config.base_path, config.weights_follow = None, True
        try:
            return super().from_pretrained(pretrained_name_or_path, config=config, **kwargs)
        finally:
            config.weights_follow = False

    def load_checkpoint(self, folder: Path) -> None:
        """Takes over the weights of a `pretrained_model` folder, in place."""
        self._load_as_safetensor(self, str(folder / SAFETENSORS_SINGLE_FILE), "cpu", strict=True)

    @classmethod
    def _load_as_safetensor(
        cls, model: "PIRLPolicy", model_file: str, map_location: str, strict: bool
    ) -> "PIRLPolicy":
        """Loads a checkpoint; only a noise network may be missing, or be there without use.

        Raises:
            ConfigError: If the checkpoint is not of this policy.
        """
        own = model.state_dict()
        with safe_open(model_file, framework="pt") as file:
            names = set(file.keys())
        differing = {*(names - own.keys()), *missing_tensors(own, names)}
        wrong = sorted(name for name in differing if not name.startswith("noise_network."))
        if wrong:
            raise config_error(
                "policy.path",
                f"{model_file} does not fit the configured base: {wrong[:3]} are missing or not expected",
            )
        return super()._load_as_safetensor(model, model_file, map_location, strict=False)
