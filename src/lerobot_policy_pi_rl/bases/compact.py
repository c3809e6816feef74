"""The compact base: a flow-matching chunk policy small enough for a CPU."""

import math
from typing import TYPE_CHECKING

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from .adapter import Context, FlowBase, Velocity
from .configuration import TASK_EMBEDDING, CompactConfig

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig


class TimeFeatures(nn.Module):
    """Sine and cosine features of the denoising time, `[B] -> [B, dim]`."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        """Spaces the periods geometrically from 4e-3 to 4, as pi0 does."""
        super().__init__()
        periods = 4e-3 * (4 / 4e-3) ** torch.linspace(0, 1, dim // 2)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Evaluates the features."""
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Layer norm and a two-layer network around a skip connection, `[B, dim] -> [B, dim]`."""

    def __init__(self, dim: int) -> None:
        """Builds the layers."""
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Adds the network's output to its input.

        Args:
            x: Hidden features.
            modulation: Scale minus 1 and shift of the normalised features, `[B, 2, dim]` (adaptive layer norm, DiT,
                arXiv 2212.09748).
        """
        norm, *rest = self.layers
        hidden = norm(x)
        if modulation is not None:
            hidden = torch.addcmul(modulation[:, 1] + hidden, modulation[:, 0], hidden)
        for layer in rest:
            hidden = layer(hidden)
        return x + hidden


IMAGE_SIZE = 64
"""Height and width to which `ImageEncoder` reduces its pictures."""


class ImageEncoder(nn.Sequential):
    """A small convolutional encoder of one camera, `[B, C, height, width] -> [B, dim]`.

    Images of any size are first reduced to 64 x 64; the last feature map is pooled to 4 x 4.
    """

    def __init__(self, channels: int, dim: int) -> None:
        """Builds the layers."""
        super().__init__(
            nn.AdaptiveAvgPool2d(IMAGE_SIZE),
            nn.Conv2d(channels, 32, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, dim),
            nn.SiLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images."""
        # With the channels last in memory, convolutions on a CPU take three fifths of the time.
        return super().forward(images.contiguous(memory_format=torch.channels_last))


class CompactBase(FlowBase):
    """A flow-matching chunk policy on state vectors, camera images and the task text."""

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the networks for the features named in the configuration.

        Args:
            config: The policy's configuration, with `input_features` and `output_features` filled in.
        """
        super().__init__()
        assert isinstance(config.base, CompactConfig)
        assert config.action_feature is not None
        assert config.input_features is not None
        self.settings = config.base
        self.chunk_size = config.chunk_size
        self.action_dim = self.real_action_dim = config.action_feature.shape[0]
        self.images = sorted(config.image_features)
        self.vectors = sorted(set(config.input_features) - set(config.image_features) - {TASK_EMBEDDING})
        self.sizes = [math.prod(config.input_features[key].shape) for key in self.vectors]
        self.encoders = nn.ModuleList(
            ImageEncoder(config.image_features[key].shape[0], self.settings.image_dim) for key in self.images
        )
        observed = sum(self.sizes) + self.settings.task_dim + len(self.images) * self.settings.image_dim
        self.critic_dims = {"observation": observed}
        self.feature_dim = hidden = self.settings.hidden_dim
        self.time = TimeFeatures(self.settings.time_dim)
        self.observe = nn.Linear(observed, hidden)
        self.enter = nn.Linear(self.chunk_size * self.action_dim + self.settings.time_dim, hidden)
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(self.settings.num_blocks))
        if self.settings.task_modulation:
            # Begins as none: every task starts from what all have in common.
            self.modulate = nn.Linear(self.settings.task_dim, self.settings.num_blocks * 2 * hidden)
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)
        self.leave = nn.Linear(hidden, self.chunk_size * self.action_dim)

    def observation_features(self, batch: dict[str, Tensor]) -> Tensor:
        """Concatenates clipped vectors, the task embedding and image features, `[B, F]`."""
        clip = self.settings.state_clip
        # LeRobot's data sets give a feature of one number without an axis of its own.
        vectors = zip(self.vectors, self.sizes, strict=True)
        parts = [batch[key].float().reshape(-1, size).clamp(-clip, clip) for key, size in vectors]
        if self.settings.task_dim:
            parts.append(batch[TASK_EMBEDDING])
        parts += [
            encoder(batch[key].float()) for key, encoder in zip(self.images, self.encoders, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Encodes a preprocessed observation, `[B, hidden]`, beside its own features."""
        features = self.observation_features(batch)
        context = {"observation": self.observe(features), "features": features}
        if self.settings.task_modulation:
            context["modulation"] = self.modulate(batch[TASK_EMBEDDING]).unflatten(
                1, (len(self.blocks), 2, -1)
            )
        return context

    def critic_features(self, context: Context, source: str = "observation") -> Tensor:
        """The observation's own features, `[B, F]`."""
        return context["features"]

    def trains_for_critic(self, source: str) -> bool:
        """Only pictures are encoded."""
        return bool(self.images)

    @property
    def context_is_fixed(self) -> bool:
        """The encoder is trained with the rest."""
        return False

    def velocity(self, context: Context, x_t: Tensor, t: Tensor) -> Velocity:
        """Velocity of the states `[B, H, D]` at the times `[B]`."""
        hidden = self.enter(torch.cat([x_t.flatten(1), self.time(t)], dim=1)) + context["observation"]
        modulation = (
            context["modulation"].unbind(1) if self.settings.task_modulation else [None] * len(self.blocks)
        )
        for block, moved in zip(self.blocks, modulation, strict=True):
            hidden = block(hidden, moved)
        hidden = nn.functional.silu(hidden)
        features = hidden[:, None].expand(-1, self.chunk_size, -1)
        return Velocity(self.leave(hidden).view_as(x_t), features)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Flow matching: mean squared error of the velocity over the real steps of the chunks.

        Source: Lipman et al., arXiv 2210.02747, with pi0's Beta(1.5, 1) distribution of the time.
        """
        action = batch[ACTION].float().reshape(-1, self.chunk_size, self.action_dim)
        noise = torch.randn_like(action)
        beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))
        t = (beta.sample((action.shape[0],)) * 0.999 + 0.001).to(action)
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * action
        error = (self.velocity(self.encode(batch), x_t, t).velocity - (noise - action)) ** 2
        real = (
            ~batch["action_is_pad"].view(error.shape[:2])
            if "action_is_pad" in batch
            else torch.ones_like(error[..., 0], dtype=torch.bool)
        )
        return (error.mean(-1) * real).sum() / real.sum().clamp(min=1)
