"""VLA-JEPA: tokens of a Qwen3-VL prompt, read by a diffusion transformer with cross-attention."""

from typing import TYPE_CHECKING, Any

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from ..lerobot_compat import vla_jepa_inputs
from .adapter import Context
from .stock import StockBase

if TYPE_CHECKING:
    from ..configuration_pi_rl import PIRLConfig


class VLAJEPABase(StockBase):
    """Adapter of VLA-JEPA, without its world model.

    The world model is no part of acting, and its loss reads the frames that follow, which a decision does not have.
    Time runs from 0 (noise) to 1, in buckets, and the policy predicts `action - noise`. It tokenises its prompts
    itself, so a batch needs its `task`.
    """

    expert_modules = ("action_model",)
    vlm_lora = r".*\.language_model\.layers\..*\.self_attn\.[qkvo]_proj"
    expert_lora = (
        r"model\.action_model\.(model\..*\.attn1\.to_(q|k|v|out\.0)|model\..*\.ff\.net\.(0\.proj|2)"
        r"|(action_encoder|state_encoder|action_decoder)\.layer\d)"
    )
    blocks = (
        r".*\.language_model\.layers\.\d+|.*\.visual\.blocks\.\d+"
        r"|model\.action_model\.model\.transformer_blocks\.\d+"
    )
    buckets: Tensor

    def __init__(self, config: "PIRLConfig") -> None:
        """Builds the policy, and the time buckets of its own sampler.

        Args:
            config: The policy's configuration, whose `base` is that of a VLA-JEPA.
        """
        stock: Any = config.base
        stock.enable_world_model = False
        super().__init__(config)
        buckets = [int(k / self.num_steps * stock.action_num_timestep_buckets) for k in range(self.num_steps)]
        self.register_buffer("buckets", torch.tensor(buckets, device=config.device), persistent=False)

    @property
    def _encoder_dim(self) -> int:
        return self._model.qwen.model.config.hidden_size

    @property
    def _head(self) -> nn.Linear:
        return self._model.action_model.action_decoder.layer2

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images and instruction once; the state goes along, because the action head embeds it."""
        policy: Any = self.policy
        seen = {key: value for key, value in batch.items() if key != ACTION}
        inputs = policy._prepare_model_inputs(seen, training=False)
        images, size = inputs["images"], policy.config.resize_images_to
        if size is not None:
            images = [
                [nn.functional.interpolate(view[None], size=tuple(size), mode="area")[0] for view in views]
                for views in images
            ]
        tokens, _ = self._model._encode_qwen(images, inputs["instructions"], need_action_tokens=False)
        tokens = tokens.float()
        context = {"tokens": tokens, "pooled": tokens.mean(1)}
        return context | ({"state": inputs["state"]} if "state" in inputs else {})

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        head, tokens, bucket = self._model.action_model, context["tokens"], self.buckets[self._step(t)]
        hidden = vla_jepa_inputs(head, tokens, x_t, context.get("state"), bucket)
        hidden = head.model(hidden_states=hidden, encoder_hidden_states=tokens, timestep=bucket)
        return -head.action_decoder(hidden[:, -self.chunk_size :])
