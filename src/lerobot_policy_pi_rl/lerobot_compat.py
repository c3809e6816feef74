"""LeRobot's releases: what differs between them, and the private names of theirs that this package uses.

It imports nothing of LeRobot that is not in all of them.
"""

import inspect
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lerobot.optim.optimizers import load_optimizer_state
from lerobot.utils.constants import TRAINING_STATE_DIR, TRAINING_STEP
from lerobot.utils.io_utils import load_json
from lerobot.utils.random_utils import load_rng_state
from packaging.version import Version
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

NEWEST_TESTED = Version("0.6.2")
"""The tests of this package have run against no newer LeRobot."""

PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "lerobot.configs.train": ("_resolve_pretrained_from_cli",),
    "lerobot.envs.libero": ("_init_states",),
    "lerobot.policies.evo1.flow_matching": ("_prepare_context", "_project_actions"),
    "lerobot.policies.evo1.modeling_evo1": (
        "_collect_image_batches",
        "_compute_dtype",
        "_get_embodiment_ids",
        "_maybe_autocast",
        "_normalize_task_batch",
        "_prepare_state",
    ),
    "lerobot.policies.groot.modeling_groot": (
        "_cast_model_parameters_to_fp32",
        "_create_groot_model",
        "_groot_model",
    ),
    "lerobot.policies.molmoact2.modeling_molmoact2": ("_apply_norm_tag_metadata", "_model_inputs"),
    "lerobot.policies.molmoact2.molmoact2_hf_model.modeling_molmoact2": (
        "_cache_to_sequence",
        "_get_encoder_attention_mask",
        "_mask_action_dim_tensor",
        "_modulation_cache_key",
    ),
    "lerobot.policies.multi_task_dit.modeling_multi_task_dit": ("_prepare_batch",),
    "lerobot.policies.pi0.modeling_pi0": ("_fix_pytorch_state_dict_keys", "_preprocess_images"),
    "lerobot.policies.pi05.modeling_pi05": ("_fix_pytorch_state_dict_keys", "_preprocess_images"),
    "lerobot.policies.pretrained": ("_load_as_safetensor", "_save_pretrained"),
    "lerobot.policies.smolvla.modeling_smolvla": ("_prepare_batch",),
    "lerobot.policies.vla_jepa.action_head": ("_build_inputs",),
    "lerobot.policies.vla_jepa.modeling_vla_jepa": ("_encode_qwen", "_prepare_model_inputs"),
    "lerobot.policies.xvla.modeling_xvla": ("_build_model_inputs", "_get_target_dtype"),
}
"""Private names of LeRobot that this package uses, by the module that has them; a test looks for each of them."""


def warn_if_untested(found: str | None = None) -> None:
    """Says in one line that the installed LeRobot is newer than any that was tested.

    Args:
        found: Its version; by default that of the installed one.
    """
    found = found or version("lerobot")
    if Version(found) > NEWEST_TESTED:
        logger.warning(
            "LeRobot %s is newer than %s, the newest that this package was tested with", found, NEWEST_TESTED
        )


def load_training_state(checkpoint_dir: Path, optimizers: Mapping[str, Optimizer]) -> int:
    """Loads random state and optimizers of a checkpoint.

    LeRobot's own function of this name is gone after 0.6.1; its parts are there before and after.

    Args:
        checkpoint_dir: The checkpoint, with a `training_state` folder.
        optimizers: Loaded in place, by name.

    Returns:
        The step that the checkpoint was taken after.
    """
    folder = checkpoint_dir / TRAINING_STATE_DIR
    load_rng_state(folder)
    load_optimizer_state(dict(optimizers), folder)
    return int(load_json(folder / TRAINING_STEP)["step"])


def vla_jepa_inputs(head: Any, tokens: Tensor, x_t: Tensor, state: Tensor | None, bucket: Tensor) -> Tensor:
    """The sequence that VLA-JEPA's action head reads; after 0.6.1 its builder is not given the VLM's tokens.

    Args:
        head: The stock action head.
        tokens: Of the VLM, `[B, L, W]`.
        x_t: Noisy actions, `[B, H, D]`.
        state: The robot's, if the policy reads it.
        bucket: Time bucket, `[B]`.
    """
    build = head._build_inputs
    conditioning = (tokens,) if "conditioning_tokens" in inspect.signature(build).parameters else ()
    return build(*conditioning, x_t, state, bucket)
