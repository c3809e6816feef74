"""LeRobot's own policies at small size: the real classes, small configurations, random weights, no download."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.policies.eo1.configuration_eo1 import EO1Config
from lerobot.policies.evo1.configuration_evo1 import Evo1Config
from lerobot.policies.factory import get_policy_class
from lerobot.policies.groot import groot_n1_7, processor_groot
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.molmoact2.configuration_molmoact2 import MolmoAct2Config
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.utils import populate_queues
from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

# `toy` is the third party's of docs/bases.md.
BASES = (
    "smolvla",
    "pi0",
    "pi05",
    "xvla",
    "multi_task_dit",
    "eo1",
    "evo1",
    "vla_jepa",
    "groot",
    "molmoact2",
    "toy",
)
# Those that LeRobot runs in bfloat16, or a part of them. Multi-task DiT has no setting for it, and its own sampler and
# loss fail with weights that are put into it (`test_multi_task_dit_itself_does_not_run_in_bfloat16`); the toy has none.
BFLOAT16 = ("smolvla", "pi0", "pi05", "xvla", "eo1", "evo1", "vla_jepa", "groot", "molmoact2")
DTYPES = [(name, "float32") for name in BASES] + [(name, "bfloat16") for name in BFLOAT16]
# Of these the stock policy's own loss fails in bfloat16 on a CPU, where it turns its autocast off.
WITHOUT_LOSS_IN_BFLOAT16 = ("vla_jepa",)
# They draw their noise in bfloat16, so that a seed gives other noise; what they make of the same noise is compared.
DRAW_IN_BFLOAT16 = ("xvla", "molmoact2")
# Their preprocessors pack prompt and pictures.
PACKED = ("eo1", "groot", "molmoact2")
# What these stock policies make of a prompt depends on those that it is padded with.
READ_PADDING = ("groot", "molmoact2")
# Words of a small PaliGemma, whose own 257,152 take a second to draw.
VOCABULARY = 512
ROOT = Path(__file__).parents[2]
CAMERA = "observation.images.top"
STATE_DIM, ACTION_DIM, CHUNK, PIXELS, CROP = 5, 4, 6, 32, 24
SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "img_context_token": "<IMG_CONTEXT>",
    "img_start_token": "<img>",
    "img_end_token": "</img>",
    "video_token": "<video>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
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
# Sizes of a small GR00T: two of its blocks read text, two images.
DIT = {
    "positional_embeddings": None,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "dropout": 0.2,
    "final_dropout": True,
}
SMALL_GROOT = {
    "backbone_embedding_dim": 16,
    "select_layer": 2,
    "hidden_size": 16,
    "input_embedding_dim": 16,
    "max_state_dim": 8,
    "max_action_dim": 8,
    "action_horizon": CHUNK,
    "max_num_embodiments": 12,
    "max_seq_len": 16,
    "diffusion_model_cfg": DIT
    | {"num_layers": 4, "norm_type": "ada_norm", "output_dim": 16, "interleave_self_attention": True},
    "vl_self_attention_cfg": DIT | {"num_layers": 1},
}
# Tokens that MolmoAct2's processors write, and what of its prompt would be bytes otherwise.
MOLMO_SPECIAL = {
    "image_start_token_id": "<im_start>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_end_token_id": "<im_end>",
    "image_low_res_id": "<im_low>",
    "image_patch_id": "<im_patch>",
    "image_col_id": "<im_col>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
    "action_output_token_id": "<action_output>",
    "action_start_token_id": "<action_start>",
    "action_end_token_id": "<action_end>",
}
MOLMO_WORDS = (
    "The task is to ",
    ". The setup is ",
    "The current state of the robot is ",
    "The expected control mode is ",
    "Given these, what action should the robot take to complete the task?",
    *("pick", "the", "cube", "up"),
)
MOLMO_BINS = 16
# Sizes of a small MolmoAct2, whose pictures of 32 pixels become five crops of 16.
HEADS = {"num_attention_heads": 2, "head_dim": 8, "hidden_size": 16}
SMALL_MOLMOACT2 = {
    "vit_config": HEADS
    | {"num_key_value_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"image_default_input_size": [16, 16], "image_patch_size": 4, "image_num_pos": 16},
    "adapter_config": HEADS
    | {"num_key_value_heads": 2, "intermediate_size": 32, "text_hidden_size": 16, "vit_layers": [-1, -2]},
    "action_expert_config": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_multiple_of": 8,
        "timestep_embed_dim": 8,
        "dropout": 0.2,
        "attn_dropout": 0.2,
    },
    "max_action_horizon": 8,
    "flow_matching_num_steps": 3,
    "initializer_range": 0.2,
}
# How Qwen's processors write pictures and words.
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")

Batch = dict[str, Any]
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
        chat_template=CHAT,
    )


@pytest.fixture(scope="session")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with configuration and processor of a small SmolVLM, as SmolVLA reads them from the hub, by dtype."""
    return {
        dtype: save_smolvlm(tmp_path_factory.mktemp("smolvlm"), dtype) for dtype in ("float32", "bfloat16")
    }


def save_smolvlm(folder: Path, dtype: str) -> Path:
    """Saves them; SmolVLA's own weights get the dtype of the language model."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer = small_tokenizer()
    text = {
        "model_type": "llama",
        "dtype": dtype,
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


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small CLIP, as multi-task DiT reads it from the hub."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(small_tokenizer()), "max_position_embeddings": 16, "eos_token_id": 3}
    config = CLIPConfig(
        text_config=common | text,
        vision_config=common | {"image_size": CROP, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small InternVL3 and its tokenizer, as EVO1 reads them from the hub."""
    from transformers import InternVLConfig, InternVLModel

    folder, tokenizer = tmp_path_factory.mktemp("internvl"), small_tokenizer()
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    vision = {"image_size": [PIXELS, PIXELS], "patch_size": [8, 8]}
    config = InternVLConfig(
        text_config=common | text,
        vision_config=common | vision,
        image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    torch.manual_seed(0)
    InternVLModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small Qwen3-VL and its processor, as VLA-JEPA reads them from the hub."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    folder, tokenizer = tmp_path_factory.mktemp("qwen"), small_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer)}
    text |= {"rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True}}
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    pixels = {"shortest_edge": PIXELS**2, "longest_edge": PIXELS**2}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=8),
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small Qwen2.5-VL and its processor, as EO1 reads them from the hub."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    folder, tokenizer = tmp_path_factory.mktemp("qwen25"), small_tokenizer()
    common = {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.2}
    text = common | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    # Its tokenizer learns seven words of EO1's.
    text |= {"vocab_size": len(tokenizer) + 7, "attention_dropout": 0.2, "max_position_embeddings": 256}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    # Of its two blocks one looks through windows.
    vision = common | {"depth": 2, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(SPECIAL[name]) for name in names},
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=8),
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gr00t(tmp_path_factory: pytest.TempPathFactory, qwen: Path) -> Path:
    """Folder with a small GR00T in NVIDIA's layout, the base model of LeRobot's policy."""
    folder = tmp_path_factory.mktemp("gr00t")
    config = groot_n1_7.GR00TN17Config(model_name=str(qwen), **SMALL_GROOT)
    torch.manual_seed(0)
    model = groot_n1_7.GR00TN17(config)
    awaken(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def molmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small MolmoAct2 in the hub's format, which LeRobot's policy builds its own from."""
    from lerobot.policies.molmoact2.molmoact2_hf_model import configuration_molmoact2, modeling_molmoact2

    folder, tokenizer = tmp_path_factory.mktemp("molmo"), molmo_tokenizer()
    text = HEADS | {"num_key_value_heads": 1, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"vocab_size": len(tokenizer), "additional_vocab_size": 4, "max_position_embeddings": 512}
    text |= {"use_qk_norm": True, "qk_norm_type": "qwen3", "initializer_range": 0.2}
    config = configuration_molmoact2.MolmoAct2Config(
        **SMALL_MOLMOACT2,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in MOLMO_SPECIAL.items()},
        text_config=text | {"residual_dropout": 0.1, "attention_dropout": 0.1},
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    modeling_molmoact2.MolmoAct2ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = {
        "size": {"height": 16, "width": 16},
        "patch_size": 4,
        "max_crops": 4,
        "overlap_margins": [1, 1],
    }
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": pictures}))
    return folder


def molmo_tokenizer() -> Any:
    """A Qwen2 tokenizer of bytes and a few words, which pads on the left."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    special = [*MOLMO_SPECIAL.values(), "<|im_start|>", "<|im_end|>", "<state_start>", "<state_end>"]
    bins = [f"<{kind}_{number}>" for kind in ("state", "action") for number in range(MOLMO_BINS)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        padding_side="left",
        extra_special_tokens=special + bins,
    )
    tokenizer.add_tokens(list(MOLMO_WORDS))
    return tokenizer


@pytest.fixture
def groot_packages(monkeypatch: pytest.MonkeyPatch, qwen: Path) -> None:
    """Lets GR00T's processor find a small Qwen3-VL."""
    monkeypatch.setattr(processor_groot, "GROOT_N1_7_BACKBONE_MODEL", str(qwen))


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

    def gemma(**settings: Any) -> Any:
        return CONFIG_MAPPING["gemma"](**settings | {"vocab_size": VOCABULARY})

    def projecting(build: Callable[..., Any]) -> Callable[..., Any]:
        """Knows few words, and projects images to the language model's width, where pi0 asks for PaliGemma's."""

        def make(config: Any) -> Any:
            config.vision_config.projection_dim = width
            config.text_config.vocab_size = VOCABULARY
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
        monkeypatch.setattr(module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": gemma})


@pytest.fixture(scope="session")
def toy() -> type:
    """Runs the example of docs/bases.md; returns its policy's configuration."""
    page = (ROOT / "docs/bases.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    sys.path.insert(0, str(Path(__file__).parent / "third_party"))
    made: dict[str, Any] = {}
    exec(compile(example, "docs/bases.md", "exec"), made)
    return made["ToyConfig"]


@pytest.fixture
def make_stock(
    smolvlm: dict[str, Path],
    clip: Path,
    internvl: Path,
    qwen: Path,
    qwen25: Path,
    gr00t: Path,
    groot_packages: None,
    molmo: Path,
    small_gemma: None,
    toy: type,
) -> MakeStock:
    """Makes the configuration of a small stock policy by its name."""
    chunk = {"device": "cpu", "chunk_size": CHUNK, "n_action_steps": 3, **features()}
    padded = chunk | {"max_action_dim": 8, "max_state_dim": 8}
    pi = padded | {"image_resolution": (PIXELS, PIXELS), "num_inference_steps": 3}

    def make(name: str, **settings: Any) -> Any:
        if name == "multi_task_dit":
            own = {key: value for key, value in chunk.items() if key != "chunk_size"}
            own |= {"horizon": CHUNK, "n_obs_steps": 1, "num_integration_steps": 3}
            own |= {"objective": "flow_matching", "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
            own |= {"timestep_embed_dim": 8, "image_crop_shape": (CROP, CROP), "tokenizer_max_length": 8}
            own |= {"vision_encoder_name": str(clip), "text_encoder_name": str(clip)}
            return MultiTaskDiTConfig(**own | settings)
        if name == "eo1":
            own = {"vlm_base": str(qwen25), "dtype": "float32", "num_denoise_steps": 3}
            own |= {"image_min_pixels": PIXELS**2, "image_max_pixels": PIXELS**2}
            return EO1Config(**padded | own | settings)
        if name == "evo1":
            own = {"vlm_model_name": str(internvl), "vlm_num_layers": 2, "vlm_dtype": "float32"}
            own |= {"image_resolution": (PIXELS, PIXELS), "max_views": 2, "num_inference_timesteps": 3}
            own |= {
                "embed_dim": 16,
                "hidden_dim": 24,
                "state_hidden_dim": 24,
                "num_heads": 2,
                "num_layers": 2,
            }
            return Evo1Config(**padded | own | {"dropout": 0.2} | settings)
        if name == "vla_jepa":
            own = {"qwen_model_name": str(qwen), "torch_dtype": "float32", "num_inference_timesteps": 3}
            own |= {"action_model_type": "DiT-test", "action_hidden_size": 16, "action_num_layers": 2}
            own |= {"num_embodied_action_tokens_per_instruction": 4, "num_action_tokens_per_timestep": 2}
            return VLAJEPAConfig(**chunk | own | {"enable_world_model": False} | settings)
        if name == "groot":
            own = {"base_model_path": str(gr00t), "num_inference_timesteps": 3, "use_bf16": False}
            return GrootConfig(**padded | own | settings)
        if name == "molmoact2":
            own = {"checkpoint_path": str(molmo), "num_inference_steps": 3, "model_dtype": "float32"}
            own |= {"action_mode": "continuous", "inference_action_mode": "continuous"}
            own |= {"num_state_tokens": MOLMO_BINS, "num_flow_timesteps": 2}
            return MolmoAct2Config(**chunk | own | settings)
        if name == "toy":
            return toy(**chunk | settings)
        if name == "smolvla":
            # It has no setting for its precision.
            vlm = smolvlm[settings.pop("dtype", "float32")]
            own = {"vlm_model_name": str(vlm), "load_vlm_weights": False, "num_vlm_layers": 2}
            own |= {"resize_imgs_with_padding": (PIXELS, PIXELS), "num_steps": 3}
            return SmolVLAConfig(**padded | own | settings)
        others = {"pi0": (PI0Config, pi), "pi05": (PI05Config, pi), "xvla": (XVLAConfig, padded | SMALL_XVLA)}
        config_class, own = others[name]
        return config_class(**own | settings)

    return make


def stock_chunk_from(stock: Any, batch: Batch, noise: Tensor) -> Tensor:
    """A stock policy's own chunk from given noise, which X-VLA takes from nowhere but `torch.randn`."""
    with patch.object(torch, "randn", lambda *_, dtype=None, **__: noise.to(dtype, copy=True)):
        return stock.predict_action_chunk(dict(batch), noise=noise.clone())


def precision(name: str, dtype: str) -> dict[str, Any]:
    """The setting of a stock policy that gives it a dtype, or a part of it; nothing if it has none."""
    if name == "groot":
        # Its weights are in float32 either way.
        return {"use_bf16": dtype == "bfloat16"}
    same = dict.fromkeys(("smolvla", "pi0", "pi05", "xvla", "eo1"), "dtype")
    field = (same | {"evo1": "vlm_dtype", "vla_jepa": "torch_dtype", "molmoact2": "model_dtype"}).get(name)
    return {} if field is None else {field: dtype}


def counted(policy: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """How often each of a policy's layers is called in a run; layers are modules that have weights of their own."""
    calls: Counter[str] = Counter()
    layers = [(key, m) for key, m in policy.named_modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_pre_hook(lambda *_, key=key: calls.update([key])) for key, m in layers]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def explorer(name: str) -> ExplorerConfig:
    """An explorer that a base can do with."""
    return ExplorerConfig("flow_noise" if name == "evo1" else "flow_sde")


def awaken(policy: nn.Module) -> None:
    """Gives random weights to the layers that are zero in a new policy, and would hide what they modulate."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in policy.named_parameters():
        if "adaLN_modulation" in name and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        if name.endswith((".W", ".b")):
            # GR00T's weights for each embodiment begin close to zero.
            nn.init.normal_(parameter, std=0.3, generator=generator)


def equal(name: str, one: Tensor, two: Tensor) -> bool:
    """Whether chunks are the same to the bit, of policies that do not train the same weights.

    EVO1 has torch's `MultiheadAttention`, which rounds otherwise where its weights are frozen.
    """
    return torch.allclose(one, two, rtol=1e-5, atol=1e-5) if name == "evo1" else torch.equal(one, two)


def stock_loss(policy: Any, batch: Batch, seed: int = 3) -> Tensor:
    """The supervised loss of a stock policy, on a batch as its own data set gives it."""
    if policy.name == "multi_task_dit":
        # With an axis of observed steps.
        batch = {key: v[:, None] if key in (CAMERA, OBS_STATE) else v for key, v in batch.items()}
    torch.manual_seed(seed)
    loss, _ = policy.forward(dict(batch))
    return loss


def stock_chunk(policy: Any, batch: Batch, seed: int = 7) -> Tensor:
    """The chunk of a stock policy, whose initial noise is drawn from a seed."""
    batch = {key: value for key, value in batch.items() if key != ACTION}
    if policy.name == "multi_task_dit":
        # It predicts from its queues of observations, which `select_action` fills.
        policy.reset()
        batch = policy._prepare_batch(batch)
        policy._queues = populate_queues(policy._queues, batch)
    torch.manual_seed(seed)
    return policy.predict_action_chunk(batch)


def own_chunk(policy: PIRLPolicy, batch: Batch, seed: int = 7) -> Tensor:
    """The chunk of a `pi_rl` policy, from the same initial noise; as much of it as the stock policy gives."""
    torch.manual_seed(seed)
    chunk = policy.predict_action_chunk(dict(batch))
    gives_all = policy.config.base.type not in ("multi_task_dit", "groot", "molmoact2")
    given = None if gives_all else policy.config.n_action_steps
    return chunk[:, :given]


def statistics(stock: Any) -> dict[str, dict[str, Tensor]]:
    """Those of a data set, at random."""
    return {
        key: {stat: torch.rand(*feature.shape) + 0.5 for stat in STATISTICS}
        for key, feature in {**stock.input_features, **stock.output_features}.items()
        if feature.type is not FeatureType.VISUAL
    }


def packed(stock: Any, batch: Batch) -> Batch:
    """What the own preprocessor of one of `PACKED` makes of a batch that the other bases can read as it is."""
    preprocessor, _ = make_pre_post_processors(stock, dataset_stats=statistics(stock))
    if stock.type != "eo1":
        return preprocessor(batch)
    # Prompts that are padded on the left, which EO1 acts on, are written where no actions are given.
    shown = {key: batch[key] for key in (ACTION, "action_is_pad") if key in batch}
    return preprocessor({key: value for key, value in batch.items() if key not in shown}) | shown


@pytest.fixture
def name() -> str:
    """The base of a test without parameters."""
    return "pi0"


@pytest.fixture
def batch(name: str, make_stock: MakeStock) -> Batch:
    """Preprocessed observations of two rows, whose prompts are not equally long, and their demonstrated chunks.

    Those of `READ_PADDING` are: their stock policies read the padding, or count it.
    """
    generator = torch.Generator().manual_seed(0)
    rows = {
        CAMERA: torch.rand(2, 3, PIXELS, PIXELS, generator=generator),
        OBS_STATE: torch.randn(2, STATE_DIM, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.tensor([[4, 5, 6, 7], [4, 6, 0, 0]]),
        OBS_LANGUAGE_ATTENTION_MASK: torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(),
        # Which robot it is; only X-VLA reads it.
        "domain_id": torch.tensor([0, 1]),
        ACTION: torch.randn(2, CHUNK, ACTION_DIM, generator=generator),
        "action_is_pad": torch.zeros(2, CHUNK, dtype=torch.bool),
        # What of it EVO1 reads, the others have in their tokens.
        "task": ["pick the cube up", "pick up the cube" if name in READ_PADDING else "pick the"],
    }
    return packed(make_stock(name), rows) if name in PACKED else rows


@pytest.fixture
def make_config(make_stock: MakeStock) -> Callable[..., PIRLConfig]:
    """Makes the configuration of a `pi_rl` policy around a small stock one."""

    def make(name: str, stock: dict[str, Any] | None = None, **settings: Any) -> PIRLConfig:
        settings = {"device": "cpu", "explorer": explorer(name)} | settings
        return PIRLConfig(base=make_stock(name, **(stock or {})), **settings)

    return make


@pytest.fixture
def make_policy(make_config: Callable[..., PIRLConfig], name: str) -> Callable[..., PIRLPolicy]:
    """Makes a policy with seeded weights, in evaluation mode; what is given by `stock` are settings of its base."""

    def make(stock: dict[str, Any] | None = None, **settings: Any) -> PIRLPolicy:
        torch.manual_seed(0)
        return PIRLPolicy(make_config(name, stock, **settings)).eval()

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
        policy = get_policy_class(name)(config)
        awaken(policy)
        policy.save_pretrained(folder)
        for processor in make_pre_post_processors(config, dataset_stats=statistics(config)):
            processor.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def save_adapters(save_stock: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Saves LeRobot's adapters, with random weights, on a small stock policy, as `lerobot-train --peft` does."""

    def save(name: str, **peft: Any) -> Path:
        base, folder = save_stock(name), tmp_path / "adapters"
        policy = get_policy_class(name).from_pretrained(base)
        policy.config.pretrained_path = base
        adapted = policy.wrap_with_peft(peft_cli_overrides={"r": 2, **peft})
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(key))
                nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder)
        adapted.config.save_pretrained(folder)
        for entry in base.iterdir():
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name)
            elif entry.name.startswith("policy_p"):
                shutil.copy2(entry, folder)
        return folder

    return save
