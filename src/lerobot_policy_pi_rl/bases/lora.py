"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a stock policy, by peft."""

from collections.abc import Iterator, Sequence
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
        problem = "adapters need peft, which is not installed: pip install 'lerobot_policy_pi_rl[peft]'"
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
