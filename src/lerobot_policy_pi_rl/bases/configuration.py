"""Which base policies exist: a registry of their configurations."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig
from lerobot.policies.eo1.configuration_eo1 import EO1Config
from lerobot.policies.evo1.configuration_evo1 import Evo1Config
from lerobot.policies.groot.configuration_groot import (
    GrootConfig,
    infer_groot_n1_7_action_execution_horizon,
    infer_groot_n1_7_action_horizon,
)
from lerobot.policies.groot.groot_n1_7 import GR00T_N1_7_DEFAULTS
from lerobot.policies.groot.utils import read_json
from lerobot.policies.molmoact2.configuration_molmoact2 import MolmoAct2Config
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig
from lerobot.policies.xvla.configuration_xvla import XVLAConfig

from ..errors import check, config_error
from .extras import naming_extra, require_transformers

logger = logging.getLogger(__name__)

# Observation key under which the preprocessor puts the hashed task text.
TASK_EMBEDDING = "observation.task_embedding"
DTYPES = ("float32", "bfloat16")


@dataclass
class BaseConfig(draccus.ChoiceRegistry):
    """Registry of flow-matching base policies.

    A registry of its own, because a field typed `PreTrainedConfig` inside a policy configuration makes draccus
    expand every registered policy inside every other one without end.
    """

    @property
    def type(self) -> str:
        """Registered name of this base."""
        return self.get_choice_name(self.__class__)

    @classmethod
    def default_choice_name(cls) -> str:
        """The base that is meant when only its settings are given."""
        return "compact"

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        """Configuration class of a base; an unknown name, or one whose packages are missing, is one clear line."""
        choices = cls.get_known_choices()
        if name not in choices:
            raise config_error(
                "policy.base.type",
                f"{name!r} is not a flow-matching base policy; choose one of {['compact', *sorted(STOCK)]}",
            )
        require_transformers(name)
        return choices[name]


@BaseConfig.register_subclass("compact")
@dataclass
class CompactConfig(BaseConfig):
    """A small flow-matching chunk policy that trains and runs on a CPU, with no downloads."""

    # Width of the hidden layers.
    hidden_dim: int = 192
    # Number of residual blocks of the velocity network.
    num_blocks: int = 3
    # Number of sine and cosine features of the denoising time.
    time_dim: int = 32
    # Width of the hashed task embedding; 0 leaves the task text out (a single-task policy).
    task_dim: int = 64
    # The task embedding also scales and shifts the features of every block (adaptive layer norm), so that training for
    # one task changes what is done for the others less.
    task_modulation: bool = False
    # Width of each camera's features after the convolutional encoder.
    image_dim: int = 128
    # Normalised state components are clipped to this many standard deviations.
    state_clip: float = 8.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        check(
            self.task_dim > 0 or not self.task_modulation,
            "policy.base.task_modulation",
            "is by the task embedding, and policy.base.task_dim=0 leaves that out; give it a width, e.g. 64",
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes that the policy takes over from its base where its own settings are 0.

    Attributes:
        chunk_size: Actions H of a chunk.
        n_action_steps: How many of them are executed.
        num_inference_steps: Denoising steps K.
    """

    chunk_size: int
    n_action_steps: int
    num_inference_steps: int


# Of the compact base.
COMPACT_SIZES = Sizes(chunk_size=5, n_action_steps=5, num_inference_steps=4)


@dataclass(frozen=True)
class StockFields:
    """Where the configuration of a stock policy has what a `pi_rl` policy shares with it.

    Attributes:
        steps: Field with the number of denoising steps K.
        chunk: Field with the number of actions H of a chunk.
        sizes: Reads the sizes, where these fields alone do not say them.
        check: Raises a `ConfigError` for a `pi_rl` configuration with a base that PI-RL cannot train.
        preprocessor: Settings of steps of a checkpoint's preprocessor that follow the configuration.
        optional_cameras: Whether the policy acts on observations that lack some of its cameras.
        dtype: Field with the name of the weights' dtype; None if no single field has it.
    """

    steps: str
    chunk: str
    sizes: Callable[[Any], Sizes] | None
    check: Callable[[Any], None] | None
    preprocessor: Callable[[Any], dict[str, dict[str, Any]]] | None
    optional_cameras: bool
    dtype: str | None


# By the policy's name.
STOCK: dict[str, StockFields] = {}


def get_sizes(base: Any) -> Sizes:
    """The sizes that a base's configuration names.

    Raises:
        ConfigError: If nobody has registered this base, or what it needs is not installed.
    """
    if isinstance(base, CompactConfig):
        return COMPACT_SIZES
    require_transformers(base.type)
    if base.type not in STOCK:
        raise config_error("policy.base.type", f"{base.type!r} has no adapter; have {['compact', *STOCK]}")
    fields = STOCK[base.type]
    if fields.sizes is not None:
        with naming_extra(base.type):
            return fields.sizes(base)
    return Sizes(getattr(base, fields.chunk), base.n_action_steps, getattr(base, fields.steps))


def set_sizes(base: Any, sizes: Sizes) -> None:
    """Writes sizes into a stock policy's configuration."""
    if isinstance(base, CompactConfig):
        return
    fields = STOCK[base.type]
    setattr(base, fields.chunk, sizes.chunk_size)
    base.n_action_steps = sizes.n_action_steps
    setattr(base, fields.steps, sizes.num_inference_steps)


def set_dtype(base: Any, dtype: str) -> None:
    """Writes a precision into a stock policy's configuration.

    Raises:
        ConfigError: If it is unknown, or this base has no setting for it.
    """
    check(dtype in DTYPES, "policy.dtype", f"{dtype!r} is unknown; choose one of {list(DTYPES)}")
    field = STOCK[base.type].dtype if base.type in STOCK else None
    if field is None:
        able = sorted(name for name, fields in STOCK.items() if fields.dtype is not None)
        raise config_error(
            "policy.dtype",
            f"{base.type!r} has no setting that it could be written to (those of {able} have); leave it out",
        )
    setattr(base, field, dtype)


def check_base(config: Any) -> None:
    """Checks a `pi_rl` configuration for what its base asks of it.

    Raises:
        ConfigError: If PI-RL cannot train this base, or not in this way.
    """
    fields = STOCK.get(config.base.type)
    if fields is not None and fields.check is not None:
        with naming_extra(config.base.type):
            fields.check(config)


def preprocessor_settings(base: Any) -> dict[str, dict[str, Any]]:
    """Settings, by the name of their step, in which the preprocessor of a stock checkpoint follows what is chosen here.

    Args:
        base: A base's configuration, with the sizes that were set.
    """
    fields = STOCK.get(base.type)
    return {} if fields is None or fields.preprocessor is None else fields.preprocessor(base)


def has_optional_cameras(base: Any) -> bool:
    """Whether a base acts on observations that lack some of its cameras."""
    return base.type in STOCK and STOCK[base.type].optional_cameras


def register_base_config(
    config_class: type,
    steps_field: str = "num_inference_steps",
    chunk_field: str = "chunk_size",
    sizes: Callable[[Any], Sizes] | None = None,
    check: Callable[[Any], None] | None = None,
    preprocessor: Callable[[Any], dict[str, dict[str, Any]]] | None = None,
    optional_cameras: bool = False,
    dtype_field: str | None = None,
) -> None:
    """Makes the configuration of a stock policy one that `policy.base` can hold.

    It stays the class that it is, under the name that it has with LeRobot. Here it counts as a `BaseConfig`, so that
    its name is written along with its settings.

    Args:
        config_class: The configuration, registered with LeRobot; it has `n_action_steps`.
        steps_field: Its field with the number of denoising steps.
        chunk_field: Its field with the number of actions of a chunk.
        sizes: Takes the configuration; reads the sizes that it has where these fields alone do not say them.
        check: Takes the `pi_rl` configuration around such a base; raises `errors.config_error` for what cannot work.
        preprocessor: Takes the configuration; gives settings, by the name of their step, in which a checkpoint's
            preprocessor is to follow it, because the sizes can be changed after it was saved.
        optional_cameras: Whether the policy, and its preprocessor, take observations that lack some of its cameras.
        dtype_field: Its field with the name of the weights' dtype, `float32` or `bfloat16`, which `policy.dtype` sets.
    """
    name = PreTrainedConfig.get_choice_name(config_class)
    BaseConfig.register_subclass(name, config_class)
    BaseConfig.register(config_class)
    STOCK[name] = StockFields(
        steps_field, chunk_field, sizes, check, preprocessor, optional_cameras, dtype_field
    )


def load_stock_config(path: str) -> Any:
    """Configuration of the stock policy in a checkpoint.

    Args:
        path: Folder, or name on the hub.

    Raises:
        ConfigError: If there is none, or the policy is no base.
    """
    try:
        config = PreTrainedConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        problem = f"{path!r} cannot be read as a LeRobot checkpoint ({' '.join(str(error).split())[:200]})"
        raise config_error("policy.base_path", problem) from None
    except ImportError as error:
        # Of a base whose configuration needs a package: LeRobot has found the file.
        with naming_extra(_kind(path)):
            raise error from None
    if not isinstance(config, BaseConfig):
        raise config_error(
            "policy.base_path",
            f"{path!r} holds a {config.type!r}, which is no base; the bases are {sorted(STOCK)}, and a "
            "pi_rl checkpoint is given as policy.path",
        )
    return config


def _kind(path: str) -> str:
    """Name of the policy in a stock checkpoint that LeRobot has begun to read."""
    folder = Path(path)
    file = folder / CONFIG_NAME if folder.is_dir() else Path(hf_hub_download(path, CONFIG_NAME))
    return str(json.loads(file.read_text(encoding="utf-8")).get("type"))


def _check_multi_task_dit(config: Any) -> None:
    base = config.base
    check(
        base.is_flow_matching,
        "policy.base.objective",
        f"{base.objective!r} has no flow whose steps could be scored; take a policy that was trained with "
        "objective=flow_matching",
    )
    if base.integration_method != "euler":
        # Only a step of Euler's can be made a Gaussian; the export has what was trained.
        logger.warning(
            "PI-RL acts by Euler steps, in place of integration_method=%s", base.integration_method
        )
        base.integration_method = "euler"
    check(
        base.n_obs_steps == 1,
        "policy.base.n_obs_steps",
        f"a decision has one observation, and this policy reads {base.n_obs_steps}; train it with n_obs_steps=1",
    )


def _check_evo1(config: Any) -> None:
    check(
        config.explorer.kind == "flow_noise",
        "policy.explorer.kind",
        f"'evo1' starts from uniform noise, for which {config.explorer.kind!r} does not hold; set it to 'flow_noise'",
    )


def _groot_sizes(base: Any) -> Sizes:
    """No more actions than are known of its embodiment; as many steps as its model takes where it names none."""
    where = base.base_model_path, base.embodiment_tag
    chunk = infer_groot_n1_7_action_horizon(*where) or base.chunk_size
    executed = infer_groot_n1_7_action_execution_horizon(*where) or base.n_action_steps
    steps = GR00T_N1_7_DEFAULTS | read_json(Path(base.base_model_path) / "config.json")
    return Sizes(
        min(base.chunk_size, chunk),
        min(base.n_action_steps, executed),
        base.num_inference_timesteps or steps["num_inference_timesteps"],
    )


def _check_groot(config: Any) -> None:
    base = config.base
    check(
        not base.use_relative_actions,
        "policy.base.use_relative_actions",
        "is not supported: LeRobot connects the decoder of relative actions with the state only where it loads its own "
        "GR00T; train a policy with use_relative_actions=false",
    )
    known = infer_groot_n1_7_action_horizon(base.base_model_path, base.embodiment_tag)
    check(
        known is None or config.chunk_size <= known,
        "policy.chunk_size",
        f"{config.chunk_size} is more than the {known} actions of the embodiment {base.embodiment_tag!r}; set it to "
        f"{known}, or leave it out",
    )


def _check_pi05(config: Any) -> None:
    # After LeRobot 0.6.1.
    for name in ("use_visual_memory", "use_proprioceptive_memory"):
        check(
            not getattr(config.base, name, False),
            f"policy.base.{name}",
            "reads the observations before, and a decision has one; take a policy that was trained without",
        )


def _molmoact2_model(base: Any) -> dict[str, Any]:
    """Configuration of a MolmoAct2's model in the hub's format; empty if it cannot be read, which its policy says."""
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(base.checkpoint_path, revision=base.checkpoint_revision)[0]
    except OSError:
        return {}


def _molmoact2_sizes(base: Any) -> Sizes:
    """Those of the embodiment that `norm_tag` names, if any; as many steps as its model takes where it names none."""
    from lerobot.policies.molmoact2.modeling_molmoact2 import _apply_norm_tag_metadata

    try:
        _apply_norm_tag_metadata(base)
    except (OSError, ValueError) as error:
        problem = f"{base.norm_tag!r} cannot be looked up: {' '.join(str(error).split())[:160]}"
        raise config_error("policy.base.norm_tag", problem) from None
    steps = base.num_inference_steps or _molmoact2_model(base).get("flow_matching_num_steps", 10)
    return Sizes(base.chunk_size, base.n_action_steps, steps)


def _check_molmoact2(config: Any) -> None:
    base = config.base
    for name in ("action_mode", "inference_action_mode"):
        check(
            getattr(base, name) != "discrete",
            f"policy.base.{name}",
            "'discrete' decodes actions from tokens, and there is no flow whose steps could be scored; set it to "
            "'continuous', with a policy that was trained so",
        )
    check(
        not base.enable_lora_vlm,
        "policy.base.enable_lora_vlm",
        "puts LeRobot's adapters into the policy, beside which there is no place for those of PI-RL; merge them, set "
        "it to false, and take policy.trainable=expert_lora or lora",
    )
    check(
        config.trainable == "expert" or not base.enable_knowledge_insulation,
        "policy.base.enable_knowledge_insulation",
        f"keeps the loss of actions from the VLM, which policy.trainable={config.trainable} trains by it; set it to "
        "false, or take policy.trainable=expert",
    )
    check(
        base.model_dtype != "float16",
        "policy.base.model_dtype",
        "'float16' has too small a range for gradients; set it to 'bfloat16' or 'float32'",
    )
    model = _molmoact2_model(base)
    check(
        not model.get("action_expert_depth_gate"),
        "policy.base.checkpoint_path",
        f"{base.checkpoint_path!r} has an action expert that weighs depth tokens, of which LeRobot writes none; take a "
        "checkpoint without depth reasoning",
    )
    longest = model.get("max_action_horizon", config.chunk_size)
    check(
        config.chunk_size <= longest,
        "policy.chunk_size",
        f"{config.chunk_size} is more than the {longest} actions of this MolmoAct2's model; set it to {longest}",
    )


def _eo1_preprocessor(base: Any) -> dict[str, dict[str, Any]]:
    """Its prompts have a token for each action."""
    return {"eo1_conversation_template_processor": {"chunk_size": base.chunk_size}}


register_base_config(EO1Config, "num_denoise_steps", preprocessor=_eo1_preprocessor, dtype_field="dtype")
register_base_config(Evo1Config, "num_inference_timesteps", check=_check_evo1, dtype_field="vlm_dtype")
register_base_config(GrootConfig, "num_inference_timesteps", sizes=_groot_sizes, check=_check_groot)
register_base_config(
    MultiTaskDiTConfig, "num_integration_steps", chunk_field="horizon", check=_check_multi_task_dit
)
if hasattr(MolmoAct2Config, "model_dtype"):
    register_base_config(
        MolmoAct2Config, sizes=_molmoact2_sizes, check=_check_molmoact2, dtype_field="model_dtype"
    )
register_base_config(PI0Config, optional_cameras=True, dtype_field="dtype")
register_base_config(PI05Config, check=_check_pi05, optional_cameras=True, dtype_field="dtype")
register_base_config(SmolVLAConfig, "num_steps", optional_cameras=True)
register_base_config(XVLAConfig, "num_denoising_steps", optional_cameras=True, dtype_field="dtype")
register_base_config(VLAJEPAConfig, "num_inference_timesteps", dtype_field="torch_dtype")

# LeRobot's own policies that are no base here. They are registered so that naming one is answered in one line, where
# the parser alone would print its whole usage first.
NOT_FLOW_MATCHING = ("act", "diffusion", "gaussian_actor", "pi0_fast", "tdmpc", "vqbet")
WITHOUT_ADAPTER = ("fastwam", "lingbot_va", "wall_x")


def _register_refusal(name: str, reason: str) -> None:
    """Registers a base whose configuration cannot be made."""

    @dataclass
    class RefusedConfig(BaseConfig):
        """A policy of LeRobot's that cannot be a base."""

        def __post_init__(self) -> None:
            """Says why not."""
            raise config_error("policy.base.type", f"{name!r} {reason}; use 'compact'")

    BaseConfig.register_subclass(name, RefusedConfig)


if "molmoact2" not in STOCK:
    _register_refusal(
        "molmoact2", "is another network after LeRobot 0.6.1, without an adapter; install lerobot==0.6.1"
    )
for _name in NOT_FLOW_MATCHING:
    _register_refusal(_name, "is not a flow-matching policy, so its steps have no Gaussian to score")
for _name in WITHOUT_ADAPTER:
    _register_refusal(_name, "has no adapter in this release, docs/bases.md says why")
