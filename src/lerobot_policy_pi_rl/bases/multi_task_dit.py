"""Multi-task DiT: a diffusion transformer modulated by one vector of CLIP features and state (its flow objective)."""

from typing import TYPE_CHECKING, Any

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn

from .adapter import Context
from .stock import StockBase

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig


class MultiTaskDiTBase(StockBase):
    """Adapter of multi-task DiT, for one observation at a time.

    Its flow runs the other way: `x_s = s * action + (1 - (1 - sigma_min) * s) * noise` for `s` from 0 to 1, and it
    predicts `action - (1 - sigma_min) * noise`. With `t = 1 - s` that is `t * noise + (1 - t) * end` with the end
    `action + sigma_min * noise` of the path that its sampler follows, and the prediction is `end - noise`: only the
    sign of the velocity changes.

    The transformer is what other policies call the action expert. It has no VLM: `expert_lora` and `lora` put adapters
    into CLIP's image encoder in its place. CLIP's text encoder is run without gradients; no mode trains it.
    """

    root = ""
    expert_modules = ("noise_predictor",)
    frozen_modules = ("observation_encoder.text_encoder.text_encoder",)
    encoder_source = "observation"
    vlm_lora = r"observation_encoder\.vision_encoders?\..*\.self_attn\.(q|k|v|out)_proj"
    expert_lora = r"noise_predictor\.(input_proj|output_proj|.*\.attn\.(qkv|out)_proj|.*\.mlp\.[02])"
    blocks = r".*\.encoder\.layers\.\d+|noise_predictor\.transformer_blocks\.\d+"
    times: Tensor

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the policy, and the times of its own sampler.

        Args:
            config: The policy's configuration, whose `base` is that of a multi-task DiT.
        """
        super().__init__(config)
        grid = torch.linspace(0, 1, config.num_inference_steps + 1, device=config.device)
        self.register_buffer("times", grid[:-1], persistent=False)
        # Its sampler takes differences of rounded times.
        self.step_lengths = tuple(grid.diff().tolist())

    @property
    def _model(self) -> Any:
        return self.policy

    @property
    def _encoder_dim(self) -> int:
        return self._model.observation_encoder.conditioning_dim

    def _encoded(self, context: Context) -> Tensor:
        return context["condition"]

    @property
    def _head(self) -> nn.Linear:
        return self._model.noise_predictor.output_proj

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs CLIP over images and instruction once; the context is one vector, with the state."""
        return {
            "condition": self._model.observation_encoder.encode(self._model._prepare_batch(_in_time(batch)))
        }

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        times = self.times[self._step(t)]
        return -self._model.noise_predictor(x_t, times, conditioning_vec=context["condition"])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The stock policy's own supervised loss."""
        return super().loss(_in_time(batch))


def _in_time(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the axis of observed steps that the policy asks of its state."""
    state = batch[OBS_STATE]
    return dict(batch) | {OBS_STATE: state[:, None]} if state.ndim == 2 else batch
