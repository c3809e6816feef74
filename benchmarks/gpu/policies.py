"""pi0 at its real size or small, with random weights, and what it sees: nothing is downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from lerobot_policy_pi_rl.bases.adapter import Context
from lerobot_policy_pi_rl.bases.pi0 import PI0Base
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

# As on LIBERO.
CAMERAS = ("observation.images.image", "observation.images.image2")
STATE_DIM, ACTION_DIM = 8, 7
# Widths of the small language model; its action expert has half of it.
SMALL_WIDTH = 32
SMALL_VOCABULARY = 64


@dataclass(frozen=True)
class Size:
    """How large the policy is, and what it sees.

    Attributes:
        pixels: Edge of a square picture.
        tokens: Tokens of an instruction.
        vocabulary: Tokens are drawn below this.
        is_small: LeRobot's pi0 with few and narrow layers, for a CPU.
    """

    pixels: int
    tokens: int
    vocabulary: int
    is_small: bool


SIZES = {
    "real": Size(pixels=224, tokens=48, vocabulary=257_152, is_small=False),
    "tiny": Size(pixels=32, tokens=4, vocabulary=SMALL_VOCABULARY, is_small=True),
}


def make_policy(size: Size, device: str, dtype: str, **settings: Any) -> PIRLPolicy:
    """Builds a policy on its device; the arguments are those of `make_config`."""
    config = make_config(size, device, dtype, **settings)
    with torch.device(device), small_gemma(size.is_small):
        return PIRLPolicy(config).eval()


def make_config(size: Size, device: str, dtype: str, **settings: Any) -> PIRLConfig:
    """Configuration of a policy that sees and does what one on LIBERO does.

    Args:
        size: How large.
        device: Where.
        dtype: `bfloat16` or `float32`, of what pi0 does not keep in float32.
        settings: Of `PIRLConfig`.
    """
    seen = {camera: PolicyFeature(FeatureType.VISUAL, (3, size.pixels, size.pixels)) for camera in CAMERAS}
    stock = PI0Config(
        device=device,
        dtype=dtype,
        image_resolution=(size.pixels, size.pixels),
        input_features=seen | {OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    )
    # The paper's numbers of steps for LIBERO.
    return PIRLConfig(base=stock, device=device, n_action_steps=5, num_inference_steps=4, **settings)


@contextmanager
def small_gemma(is_small: bool) -> Iterator[None]:
    """Makes the language models and the vision tower of a new pi0 small, which it has no settings for."""
    if not is_small:
        yield
        return
    own = modeling_pi0.PaliGemmaForConditionalGenerationWithPiGemma
    known = modeling_pi0.CONFIG_MAPPING

    def variant(name: str) -> Any:
        width = SMALL_WIDTH // 2 if name == "gemma_300m" else SMALL_WIDTH
        return modeling_pi0.GemmaConfig(
            width=width, depth=2, mlp_dim=32, num_heads=8, num_kv_heads=1, head_dim=8
        )

    def paligemma() -> Any:
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
        return known["paligemma"](vision_config={"model_type": "siglip_vision_model", **vision})

    def gemma(**settings: Any) -> Any:
        return known["gemma"](**settings | {"vocab_size": SMALL_VOCABULARY})

    def vlm(config: Any) -> Any:
        config.vision_config.projection_dim = SMALL_WIDTH
        config.text_config.vocab_size = SMALL_VOCABULARY
        return own(config=config)

    with patch.multiple(
        modeling_pi0,
        get_gemma_config=variant,
        CONFIG_MAPPING={"paligemma": paligemma, "gemma": gemma},
        PaliGemmaForConditionalGenerationWithPiGemma=vlm,
    ):
        yield


def observations(size: Size, rows: int, device: str) -> dict[str, Any]:
    """Preprocessed observations of noise, whose prompts have no padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 3, size.pixels, size.pixels)
    tokens = torch.randint(0, size.vocabulary, (rows, size.tokens), generator=generator)
    seen = {camera: torch.rand(shape, generator=generator) for camera in CAMERAS}
    seen |= {
        OBS_STATE: torch.randn(rows, STATE_DIM, generator=generator),
        OBS_LANGUAGE_TOKENS: tokens,
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones_like(tokens, dtype=torch.bool),
    }
    return {name: value.to(device) for name, value in seen.items()}


class PlainPI0Base(PI0Base):
    """pi0 as it is trained elsewhere: every velocity runs VLM and expert together, and nothing is kept.

    The reference implementation of pi_RL (arXiv 2510.25889) scores a denoising step in this way. The numbers are
    those of `PI0Base`. It has no state of its own, so a base can be made one by its class.
    """

    def encode(self, batch: dict[str, Tensor]) -> Context:
        """The observation itself."""
        policy: Any = self.policy
        images, image_masks = policy._preprocess_images(batch)
        context = {f"image_{number}": image for number, image in enumerate(images)}
        context |= {f"image_mask_{number}": mask for number, mask in enumerate(image_masks)}
        tokens = {"tokens": batch[OBS_LANGUAGE_TOKENS], "token_mask": batch[OBS_LANGUAGE_ATTENTION_MASK]}
        return context | tokens | {"state": policy.prepare_state(batch)}

    def _velocity(self, context: Context, x_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        model = self._model
        views = range(sum(name.startswith("image_mask_") for name in context))
        prefix, real, blocks = model.embed_prefix(
            [context[f"image_{number}"] for number in views],
            [context[f"image_mask_{number}"] for number in views],
            context["tokens"],
            context["token_mask"],
        )
        suffix, suffix_real, suffix_blocks, condition = model.embed_suffix(context["state"], x_t, t)
        both = model.paligemma_with_expert
        dtype = both.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype
        real = torch.cat([real, suffix_real], dim=1)
        attention = make_att_2d_masks(real, torch.cat([blocks, suffix_blocks], dim=1))
        (_, hidden), _ = both.forward(
            attention_mask=prepare_attention_masks_4d(attention),
            position_ids=torch.cumsum(real, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[prefix.to(dtype), suffix.to(dtype)],
            use_cache=False,
            adarms_cond=[None, condition],
        )
        return model.action_out_proj(hidden[:, -self.chunk_size :].float())


@contextmanager
def plain(policy: PIRLPolicy) -> Iterator[None]:
    """Lets a policy compute its velocities the plain way, with its own weights."""
    policy.base.__class__ = PlainPI0Base
    try:
        yield
    finally:
        policy.base.__class__ = PI0Base
