"""LeRobot's own policies at small size: the real classes, small configurations, random weights, no download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig

CAMERA = "observation.images.top"
STATE_DIM, ACTION_DIM, CHUNK, PIXELS = 5, 4, 6, 32
SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}

# Sizes of a small Florence-2, whose pictures of 32 pixels become two tokens.
FLORENCE = {
    "vision_config": {
        "model_type": "florence_vision",
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "window_size": 4,
        "projection_dim": 32,
        "max_position_embeddings": 8,
        "max_temporal_embeddings": 4,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}
SMALL_XVLA = {
    "florence_config": FLORENCE,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_domains": 2,
    "len_soft_prompts": 2,
    "dim_time": 8,
    "max_len_seq": 128,
    "action_mode": "auto",
    "num_denoising_steps": 3,
    "tokenizer_max_length": 16,
}
# Layers that give the velocity or, with X-VLA, the clean action.
HEADS = dict.fromkeys(("smolvla", "pi0", "pi05"), "action_out_proj") | {"xvla": "action_decoder"}

STATISTICS = ("mean", "std", "min", "max", "q01", "q99")

Batch = dict[str, Tensor]
MakeStock = Callable[..., Any]


def features() -> dict[str, Any]:
    """One camera, a state and an action."""
    return {
        "input_features": {
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
    }


def small_tokenizer() -> Any:
    """A tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<bos>", "<eos>", "pick", "the", "cube", "up", *SPECIAL.values()]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=SPECIAL,
    )


@pytest.fixture(scope="session")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the configuration and the processor of a small SmolVLM, as SmolVLA reads them from the hub."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    folder, tokenizer = tmp_path_factory.mktemp("smolvlm"), small_tokenizer()
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": PIXELS,
        "patch_size": 8,
    }
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=image_token)
    config.architectures = ["SmolVLMForConditionalGeneration"]
    config.save_pretrained(folder)
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        chat_template="-",
        image_seq_len=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def small_gemma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pi0's and pi0.5's Gemma variants and their vision tower small."""
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05
    from transformers import CONFIG_MAPPING

    width = 32

    def paligemma() -> Any:
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
        return CONFIG_MAPPING["paligemma"](vision_config={"model_type": "siglip_vision_model", **vision})

    def projecting(build: Callable[..., Any]) -> Callable[..., Any]:
        """Projects images to the language model's width, where pi0 asks for PaliGemma's."""

        def make(config: Any) -> Any:
            config.vision_config.projection_dim = width
            return build(config=config)

        return make

    def variant(name: str) -> Any:
        # The attention of these policies has 8 heads, whatever the configuration says.
        own_width = 16 if name == "gemma_300m" else width
        return modeling_pi0.GemmaConfig(
            width=own_width, depth=2, mlp_dim=32, num_heads=8, num_kv_heads=1, head_dim=8
        )

    vlm = "PaliGemmaForConditionalGenerationWithPiGemma"
    for module in (modeling_pi0, modeling_pi05):
        monkeypatch.setattr(module, vlm, projecting(getattr(module, vlm)))
        monkeypatch.setattr(module, "get_gemma_config", variant)
        monkeypatch.setattr(
            module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": CONFIG_MAPPING["gemma"]}
        )


@pytest.fixture
def make_stock(smolvlm: Path, small_gemma: None) -> MakeStock:
    """Makes the configuration of a small stock policy by its name."""

    def make(name: str, **settings: Any) -> Any:
        common = {
            "device": "cpu",
            "chunk_size": CHUNK,
            "n_action_steps": 3,
            "max_action_dim": 8,
            "max_state_dim": 8,
            **features(),
        }
        if name == "smolvla":
            own = {"vlm_model_name": str(smolvlm), "load_vlm_weights": False, "num_vlm_layers": 2}
            own |= {"resize_imgs_with_padding": (PIXELS, PIXELS), "num_steps": 3}
            return SmolVLAConfig(**{**common, **own, **settings})
        if name == "xvla":
            return XVLAConfig(**{**common, **SMALL_XVLA, **settings})
        own = {"image_resolution": (PIXELS, PIXELS), "num_inference_steps": 3}
        return {"pi0": PI0Config, "pi05": PI05Config}[name](**{**common, **own, **settings})

    return make


def stock_chunk(stock: Any, batch: Batch, noise: Tensor) -> Tensor:
    """A stock policy's own chunk from given noise, which X-VLA takes from nowhere but `torch.randn`."""
    with patch.object(torch, "randn", lambda *_, dtype=None, **__: noise.to(dtype, copy=True)):
        return stock.predict_action_chunk(dict(batch), noise=noise.clone())


@pytest.fixture
def batch() -> Batch:
    """Preprocessed observations of two rows, whose prompts are not equally long, and their demonstrated chunks."""
    generator = torch.Generator().manual_seed(0)
    return {
        CAMERA: torch.rand(2, 3, PIXELS, PIXELS, generator=generator),
        OBS_STATE: torch.randn(2, STATE_DIM, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.tensor([[4, 5, 6, 7], [4, 6, 0, 0]]),
        OBS_LANGUAGE_ATTENTION_MASK: torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(),
        # Which robot it is; only X-VLA reads it.
        "domain_id": torch.tensor([0, 1]),
        ACTION: torch.randn(2, CHUNK, ACTION_DIM, generator=generator),
        "action_is_pad": torch.zeros(2, CHUNK, dtype=torch.bool),
    }


@pytest.fixture
def make_config(make_stock: MakeStock) -> Callable[..., PIRLConfig]:
    """Makes the configuration of a `pi_rl` policy around a small stock one."""

    def make(name: str, stock: dict[str, Any] | None = None, **settings: Any) -> PIRLConfig:
        return PIRLConfig(base=make_stock(name, **(stock or {})), device="cpu", **settings)

    return make


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tokenizer wherever one is asked for by the name that it has on the hub."""
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: small_tokenizer())


@pytest.fixture
def save_stock(make_stock: MakeStock, tmp_path: Path, tokenizer: None) -> Callable[..., Path]:
    """Saves a small stock policy with its processors, as `lerobot-train` does."""

    def save(name: str, **settings: Any) -> Path:
        torch.manual_seed(0)
        config, folder = make_stock(name, **settings), tmp_path / name
        get_policy_class(name)(config).save_pretrained(folder)
        stats = {
            key: {stat: torch.rand(*feature.shape) + 0.5 for stat in STATISTICS}
            for key, feature in {**config.input_features, **config.output_features}.items()
            if feature.type is not FeatureType.VISUAL
        }
        for processor in make_pre_post_processors(config, dataset_stats=stats):
            processor.save_pretrained(folder)
        return folder

    return save
