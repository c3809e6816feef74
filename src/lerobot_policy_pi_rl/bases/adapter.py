"""What PI-RL asks of a base flow policy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


# What an observation is encoded into: named tensors with B rows each, so that it can be cut, moved and kept.
Context = dict[str, Tensor]


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
        feature_dim: Width F of the velocity network's features.
        critic_dim: Width of the features a critic may read.
    """

    chunk_size: int
    action_dim: int
    real_action_dim: int
    feature_dim: int
    critic_dim: int

    @abstractmethod
    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Encodes a preprocessed observation into a context with B rows."""

    @abstractmethod
    def velocity(self, context: Context, x_t: Tensor, t: Tensor) -> Velocity:
        """Velocity of states `x_t` `[B, H, D]` at times `t` `[B]`."""

    @abstractmethod
    def critic_features(self, batch: dict[str, Tensor]) -> Tensor:
        """Features of a preprocessed observation for a critic, `[B, critic_dim]`, without gradients to the base."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The base's supervised flow-matching loss, a scalar."""
