"""The value function: one function of the observation, at collection and in the update."""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from lerobot.configs import FeatureType
from torch import Tensor, nn

from ..bases.compact import IMAGE_SIZE, ImageEncoder
from ..errors import config_error

if TYPE_CHECKING:
    from lerobot.configs import PolicyFeature

SEPARATE = "separate"
"""The source of critic features that is none of the base's: the observation itself."""
IMAGE_DIM = 128
STATE_CLIP = 8.0
# Weight of a rollout in the running moments of the returns.
RETURN_RATE = 0.1


class Critic(nn.Module):
    """A multi-layer perceptron on features of the observation, `[B, F] -> [B]`.

    Its output is in units of the returns: `value = offset + scale * output`. Returns of at most about 1, as those of a
    sparse reward, are left as they are (offset 0, scale 1). Larger ones are centred and divided by their running
    deviation, so that the steps of the critic, its value clip and its Huber loss mean the same for every reward.
    """

    # Most rows that are valued at once.
    rows_at_once = 4096
    offset: Tensor
    scale: Tensor
    mean: Tensor
    variance: Tensor
    rollouts: Tensor

    def __init__(self, features: int, hidden_dims: list[int]) -> None:
        """Builds the layers; the last one starts near zero, so that a cold critic predicts no reward.

        Args:
            features: Width of the input.
            hidden_dims: Width of each hidden layer.
        """
        super().__init__()
        widths = [features, *hidden_dims]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.LayerNorm(next_width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for name, start in (
            ("offset", 0.0),
            ("scale", 1.0),
            ("mean", 0.0),
            ("variance", 0.0),
            ("rollouts", 0.0),
        ):
            self.register_buffer(name, torch.tensor(start))

    def forward(self, features: Tensor) -> Tensor:
        """Value of each row."""
        return self.offset + self.scale * self.head(self.body(features)).squeeze(-1)

    @torch.no_grad()
    def value(self, features: Tensor) -> Tensor:
        """Value of many rows without gradients, in slices that bound memory."""
        return (
            torch.cat([self(part) for part in features.split(self.rows_at_once)])
            if len(features)
            else features[:, 0]
        )

    @property
    def is_cold(self) -> bool:
        """Whether it knows no scale of returns yet."""
        return not bool(self.rollouts > 0)

    @torch.no_grad()
    def follow(self, target: Tensor) -> None:
        """Follows the scale of the returns; every value stays what it is (PopArt, arXiv 1602.07714).

        Only the first scale of all changes the values: those of a cold critic become the mean return.

        Args:
            target: Returns of a rollout that the critic is to fit, `[N]`.
        """
        if not len(target) or not bool(torch.isfinite(target).all()):
            return
        was_cold = self.is_cold
        self.rollouts += 1
        rate = (1 / self.rollouts).clamp(min=RETURN_RATE)
        change = target.mean() - self.mean
        self.mean += rate * change
        own = target.var(unbiased=False)
        self.variance.copy_((1 - rate) * (self.variance + rate * change**2) + rate * own)
        large = self.mean**2 + self.variance > 1
        offset = torch.where(large, self.mean, torch.zeros_like(self.mean))
        scale = torch.where(large, self.variance.sqrt().clamp(min=1), torch.ones_like(self.scale))
        if not was_cold:
            self.head.weight *= self.scale / scale
            self.head.bias.copy_((self.scale * self.head.bias + (self.offset - offset)) / scale)
        self.offset.copy_(offset)
        self.scale.copy_(scale)


class SeparateCritic(Critic):
    """A critic that shares nothing with the policy: it encodes the pictures of the observation by itself.

    What it reads of an observation, `read`, has no weights, so that it is read once and serves every epoch.
    """

    rows_at_once = 512

    def __init__(self, features: "dict[str, PolicyFeature]", hidden_dims: list[int]) -> None:
        """Builds the layers.

        Args:
            features: The policy's input features.
            hidden_dims: Width of each hidden layer.
        """
        images = {key: f for key, f in sorted(features.items()) if f.type is FeatureType.VISUAL}
        vectors = {key: f for key, f in sorted(features.items()) if f.type is FeatureType.STATE}
        super().__init__(
            sum(f.shape[0] for f in vectors.values()) + IMAGE_DIM * len(images),
            hidden_dims,
        )
        self.images, self.vectors = list(images), list(vectors)
        self.channels = [f.shape[0] for f in images.values()]
        self.encoders = nn.ModuleList(ImageEncoder(channels, IMAGE_DIM) for channels in self.channels)

    def read(self, batch: dict[str, Any]) -> Tensor:
        """What it reads of a preprocessed observation: small pictures and clipped vectors, `[B, F]` float32.

        Raises:
            ConfigError: If the base's preprocessor has left one of them out.
        """
        missing = [key for key in (*self.images, *self.vectors) if not isinstance(batch.get(key), Tensor)]
        if missing:
            raise config_error(
                "algorithm.critic_features",
                f"{SEPARATE!r} needs {missing}, which this base's preprocessor packs away; choose another one",
            )
        small = nn.functional.adaptive_avg_pool2d
        parts = [small(batch[key].float(), IMAGE_SIZE).flatten(1) for key in self.images]
        parts += [batch[key].float().clamp(-STATE_CLIP, STATE_CLIP) for key in self.vectors]
        return torch.cat(parts, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Value of each row of what was read."""
        sizes = [channels * IMAGE_SIZE**2 for channels in self.channels]
        *pictures, vectors = features.split([*sizes, features.shape[1] - sum(sizes)], dim=1)
        seen = [
            encoder(picture.unflatten(1, (-1, IMAGE_SIZE, IMAGE_SIZE)))
            for encoder, picture in zip(self.encoders, pictures, strict=True)
        ]
        return super().forward(torch.cat([*seen, vectors], 1))
