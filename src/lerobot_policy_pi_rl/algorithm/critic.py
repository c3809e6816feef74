"""The value function: one function of the observation, at collection and in the update."""

import itertools

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """A multi-layer perceptron on the base's critic features, `[B, F] -> [B]`."""

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

    def forward(self, features: Tensor) -> Tensor:
        """Value of each row."""
        return self.head(self.body(features)).squeeze(-1)

    @torch.no_grad()
    def value(self, features: Tensor, rows_at_once: int = 4096) -> Tensor:
        """Value of many rows without gradients, in slices that bound memory."""
        return (
            torch.cat([self(part) for part in features.split(rows_at_once)])
            if len(features)
            else features[:, 0]
        )
