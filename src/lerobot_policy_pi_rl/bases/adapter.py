"""What PI-RL asks of a base flow policy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..flow.sampler import sample_ode
from ..flow.transition import FieldOutput

# What an observation is encoded into: named tensors with B rows each, so that it can be cut, moved and kept.
Context = dict[str, Tensor]


def take(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The given rows (int64) of a preprocessed batch: of its tensors, and of its lists, such as the task texts."""
    return {
        key: value[rows.to(value.device)]
        if isinstance(value, Tensor)
        else [value[row] for row in rows.tolist()]
        for key, value in batch.items()
        if isinstance(value, (Tensor, list))
    }


@dataclass(frozen=True)
class Velocity:
    """One evaluation of the velocity network.

    Attributes:
        velocity: `v(x_t, t) = noise - action`, `[B, H, D]`.
        features: What the velocity was read from, per chunk step, `[B, H, F]`; input of a learned noise network.
    """

    velocity: Tensor
    features: Tensor


class FlowBase(nn.Module, ABC):
    """Adapter of one flow-matching policy.

    The observation is encoded once into a context; the velocity is computed from it for every denoising step.

    Attributes:
        chunk_size: Number of actions H of a chunk.
        action_dim: Width D of the denoised state, padding included.
        real_action_dim: Number of action dimensions A that are not padding.
        logit_dims: Those of its dimensions that are no part of the flow: the network does not see them and gives them
            as logits, and those of the last step are executed. Their velocity is zero before that.
        feature_dim: Width F of the velocity network's features.
        critic_dims: Width of the features that a critic may read, by their source; the first one is the default.
        step_lengths: Lengths of the K denoising steps, if the policy's own sampler rounds them otherwise than `1 / K`.
    """

    chunk_size: int
    action_dim: int
    real_action_dim: int
    logit_dims: tuple[int, ...] = ()
    feature_dim: int
    critic_dims: dict[str, int]
    step_lengths: tuple[float, ...] | None = None

    def rows(self, batch: dict[str, Any]) -> int:
        """Number of observations of a preprocessed batch."""
        return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)

    def take(self, batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The given observations (int64) of a preprocessed batch: rows of its tensors, unless it has another layout."""
        return take(batch, rows)

    @abstractmethod
    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Encodes a preprocessed observation into a context with B rows."""

    @abstractmethod
    def velocity(self, context: Context, x_t: Tensor, t: Tensor) -> Velocity:
        """Velocity of states `x_t` `[B, H, D]` at times `t` `[B]`."""

    @abstractmethod
    def critic_features(self, context: Context, source: str) -> Tensor:
        """Features of an encoded observation for a critic, `[B, F]` float32.

        Args:
            context: The observation.
            source: One of `critic_dims`.
        """

    def trains_for_critic(self, source: str) -> bool:
        """Whether gradients of `critic_features` reach anything that is trained."""
        return not self.context_is_fixed

    def initial_noise(
        self, rows: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """What denoising starts from at `t = 1`, `[rows, H, D]`: standard normal, unless the policy knows another."""
        return torch.randn(rows, self.chunk_size, self.action_dim, device=device, generator=generator)

    @property
    @abstractmethod
    def context_is_fixed(self) -> bool:
        """Whether nothing that `encode` uses is trained, so that a context can be kept while the policy changes."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The base's supervised flow-matching loss, a scalar."""

    @property
    def is_float32(self) -> bool:
        """Whether all of it computes in float32, so that a density is the same wherever it is computed."""
        # Some policies keep a part of their weights in float32, the first ones among them.
        return all(parameter.dtype == torch.float32 for parameter in self.parameters())

    def sample(self, context: Context, noise: Tensor, num_steps: int) -> Tensor:
        """The base's own sampler, without exploration; Euler's steps on the velocity unless it has another.

        Args:
            context: The observation.
            noise: Initial noise `[B, H, D]`.
            num_steps: Number of denoising steps K.

        Returns:
            The denoised state `[B, H, D]`.
        """
        return sample_ode(
            lambda x, t: FieldOutput(self.velocity(context, x, t).velocity),
            noise,
            num_steps,
            self.step_lengths,
        )

    def actions(self, x: Tensor) -> Tensor:
        """Normalised actions of denoised states `[B, H, D]` as the policy's postprocessor takes them: the real ones."""
        return x[..., : self.real_action_dim]

    def optim_params(self) -> Any:
        """What supervised training optimises, as the base's optimizer takes it: the trained parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
