"""pi0 and pi0.5: a PaliGemma prefix with a key/value cache, read by a Gemma action expert."""

from typing import Any, ClassVar

from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from .adapter import Context
from .stock import StockBase


class PI05Base(StockBase):
    """Adapter of pi0.5, whose state is part of the prompt."""

    expert_modules: ClassVar[tuple[str, ...]] = (
        "paligemma_with_expert.gemma_expert",
        "action_in_proj",
        "action_out_proj",
        "time_mlp_in",
        "time_mlp_out",
    )
    # Words and pooled pictures are not what acts. The expert's head alone is nearly half of what would be pushed.
    frozen_modules = (
        "paligemma_with_expert.gemma_expert.lm_head",
        "paligemma_with_expert.paligemma.lm_head",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.head",
    )
    vlm_lora = r".*\.paligemma\.model\.language_model\..*\.self_attn\.[qkvo]_proj"
    expert_lora = (
        r".*\.gemma_expert\..*\.self_attn\.[qkvo]_proj|model\.(action|time|state).*(proj|mlp_in|mlp_out)"
    )
    blocks = r".*\.layers\.\d+"

    @property
    def _encoder_dim(self) -> int:
        return self._model.paligemma_with_expert.paligemma.config.text_config.hidden_size

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images and prompt once; the context is its cache."""
        model: Any = self._model
        policy: Any = self.policy
        images, image_masks = policy._preprocess_images(batch)
        tokens, token_masks = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        embeddings, real, blocks = model.embed_prefix(images, image_masks, tokens, token_masks)
        language = model.paligemma_with_expert.paligemma.model.language_model
        language.config._attn_implementation = "eager"
        attention = prepare_attention_masks_4d(make_att_2d_masks(real, blocks))
        return self._encode_prefix(model.paligemma_with_expert, embeddings, real, attention)


class PI0Base(PI05Base):
    """Adapter of pi0, whose action expert reads the state in every step."""

    expert_modules = (
        "paligemma_with_expert.gemma_expert",
        "state_proj",
        "action_in_proj",
        "action_out_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    )

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """Runs the VLM over images and instruction once; the state goes along."""
        policy: Any = self.policy
        return super().encode(batch) | {"state": policy.prepare_state(batch)}

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        return super()._velocity(context, x_t, t, state=context["state"], **more)
