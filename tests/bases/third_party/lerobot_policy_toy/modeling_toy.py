"""The toy policy, whose time runs from 0 (noise) to 1 (action)."""

from collections import deque
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from .configuration_toy import ToyConfig


class ToyPolicy(PreTrainedPolicy):
    """An encoder, a trunk and a head, with dropout between them."""

    config_class = ToyConfig
    name = "toy"

    def __init__(self, config: ToyConfig, **_: Any) -> None:
        super().__init__(config)
        width, self.action_dim = config.hidden_dim, config.action_feature.shape[0]
        seen = config.robot_state_feature.shape[0] + 3 * len(config.image_features)
        self.encoder = nn.Sequential(nn.Linear(seen, width), nn.SiLU(), nn.Linear(width, width))
        self.trunk = nn.Sequential(
            nn.Linear(self.action_dim + width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.Dropout(0.3)
        )
        self.head = nn.Linear(width, self.action_dim)
        self.reset()

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        colours = [batch[key].mean((-2, -1)) for key in self.config.image_features]
        return self.encoder(torch.cat([batch[OBS_STATE], *colours], -1))

    def velocity(self, observation: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """Predicts `action - noise` at times `s`."""
        known = torch.cat([observation, s[:, None]], -1)
        return self.head(self.trunk(torch.cat([x, known[:, None].expand(-1, x.shape[1], -1)], -1)))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        action = batch[ACTION]
        noise, s = torch.randn_like(action), torch.rand(len(action))
        x = s[:, None, None] * action + (1 - s[:, None, None]) * noise
        error = self.velocity(self.encode(batch), x, s) - (action - noise)
        return (error**2).mean(), {}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        self.eval()
        observation, steps = self.encode(batch), self.config.num_inference_steps
        x = torch.randn(len(observation), self.config.chunk_size, self.action_dim)
        for k in range(steps):
            x = x + self.velocity(observation, x, torch.full((len(x),), k / steps)) / steps
        return x

    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        if not self._queue:
            chunk = self.predict_action_chunk(batch)[:, : self.config.n_action_steps]
            self._queue.extend(chunk.transpose(0, 1))
        return self._queue.popleft()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    def get_optim_params(self) -> Any:
        return self.parameters()
