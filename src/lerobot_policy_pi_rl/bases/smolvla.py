"""SmolVLA: a SmolVLM prefix with a key/value cache, read by an action expert beside its layers."""

from typing import Any

from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from .adapter import Context
from .checkpointing import checkpoint_method
from .stock import StockBase


class SmolVLABase(StockBase):
    """Adapter of SmolVLA, whose state is the last token of the prefix."""

    # Not `state_proj`: the state is a token of the prefix.
    expert_modules = (
        "vlm_with_expert.lm_expert",
        "action_in_proj",
        "action_out_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    )
    # Words are not what acts.
    frozen_modules = ("vlm_with_expert.vlm.lm_head",)
    vlm_lora = r".*\.text_model\.layers\..*\.self_attn\.[qkvo]_proj"
    expert_lora = r".*\.lm_expert\..*\.self_attn\.[qkvo]_proj|model\.(action|state).*(proj|mlp_in|mlp_out)"
    # It takes the layers of VLM and expert apart; what is large in them are attention and MLP.
    blocks = r".*\.vision_model\..*\.layers\.\d+|.*\.(text_model|lm_expert)\.layers\.\d+\.mlp"

    def _checkpoint_blocks(self) -> None:
        super()._checkpoint_blocks()
        for attention in ("forward_attn_layer", "forward_cross_attn_layer"):
            checkpoint_method(self._model.vlm_with_expert, attention)

    @property
    def _encoder_dim(self) -> int:
        return self._model.vlm_with_expert.config.text_config.hidden_size

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images, instruction and state once; the context is its cache."""
        policy: Any = self.policy
        model = self._model
        batch = policy._prepare_batch(dict(batch))
        images, image_masks = policy.prepare_images(batch)
        tokens, token_masks = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        embeddings, real, blocks = model.embed_prefix(
            images, image_masks, tokens, token_masks, state=policy.prepare_state(batch)
        )
        return self._encode_prefix(model.vlm_with_expert, embeddings, real, make_att_2d_masks(real, blocks))
