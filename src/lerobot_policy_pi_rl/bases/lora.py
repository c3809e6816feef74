"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a stock policy, by peft."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import config_error


def insert_adapters(model: nn.Module, targets: Sequence[str], rank: int, alpha: int) -> None:
    """Puts an adapter beside each linear layer that is named; it adds nothing at first.

    Args:
        model: Changed in place; the names of its other parameters stay.
        targets: Regular expressions for whole names of layers.
        rank: Rank of the adapters.
        alpha: Their output is scaled by `alpha / rank`.

    Raises:
        ConfigError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        problem = "adapters need peft: pip install 'lerobot_policy_pi_rl[peft]'"
        raise config_error("policy.trainable", problem) from None

    pattern = "|".join(f"(?:{target})" for target in targets)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern), model
    )
    # As peft does itself, but for a model without memory.
    for _, _, layer in _adapted(model):
        for adapters in (layer.lora_A, layer.lora_B):
            adapters.to(layer.get_base_layer().weight.dtype)


def is_adapter(parameter: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_" in parameter


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to its layer and takes it out; the model is then an ordinary one."""
    for parent, name, layer in list(_adapted(model)):
        layer.merge()
        setattr(parent, name, layer.get_base_layer())


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Layers with an adapter: parent, name and layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in model.modules():
        if not isinstance(parent, BaseTunerLayer):
            for name, child in parent.named_children():
                if isinstance(child, BaseTunerLayer):
                    yield parent, name, child


def adapted_path(path: str) -> str:
    """The checkpoint that LeRobot's adapters were trained on.

    Args:
        path: Checkpoint of adapters, a folder or a name on the hub.

    Raises:
        ConfigError: If peft is not installed, or that checkpoint is not named, or not there.
    """
    try:
        from peft import PeftConfig
    except ImportError:
        problem = f"{path} holds adapters, which need peft: pip install 'lerobot_policy_pi_rl[peft]'"
        raise config_error("policy.base_path", problem) from None
    adapters = PeftConfig.from_pretrained(path)
    if getattr(adapters, "megatron_config", None):
        # peft would import the module that the file names.
        raise config_error("policy.base_path", f"{path} holds adapters for megatron, which are not supported")
    adapted = adapters.base_model_name_or_path
    # A name on the hub has at most two parts.
    if not adapted or (len(Path(adapted).parts) > 2 and not Path(adapted).is_dir()):
        raise config_error(
            "policy.base_path",
            f"{path} holds adapters of {adapted or 'a policy that is not named'}, which is not there; put it there, or "
            f"name it in {path}/adapter_config.json (base_model_name_or_path)",
        )
    return str(adapted)


def merge_checkpoint(policy: Any, path: str) -> Any:
    """Merges LeRobot's adapters into the policy that they were trained on; it is then an ordinary one.

    Args:
        policy: That policy, with its weights.
        path: Checkpoint of the adapters, a folder or a name on the hub.

    Raises:
        ConfigError: If the checkpoint lacks some of them.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft would go on with adapters that do nothing.
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(policy, path).merge_and_unload()
    except UserWarning:
        problem = f"{path} lacks some of its adapters' weights; copy the checkpoint once more"
        raise config_error("policy.base_path", problem) from None
