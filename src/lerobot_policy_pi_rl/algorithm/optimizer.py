"""AdamW that loses no small step in weights of few bits, and that can keep what it needs off the GPU."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

# In a state dict: the float32 copy of a weight, beside its moments.
COPY = "weight"


class PreciseAdam(AdamW):
    """AdamW on float32 copies of the weights that have fewer bits, or that lie on another device.

    A weight in bfloat16 has 8 significant bits: a step below about 1/500 of it would be rounded away, each time. The
    copy adds the steps up, and the weight is the copy, rounded. Weights in float32 are trained as they are, exactly as
    by `AdamW`, which without weight decay is Adam. The decay acts on the copy.

    On another device than the weights lie copies, summed gradients and moments, and steps are taken there: of 18 bytes
    for a weight in bfloat16 its own device keeps the 2 of the gradient of one part of a minibatch. The numbers are the
    same, but for how that device rounds.

    Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        """Copies what needs a copy.

        Args:
            parameters: What is trained; must not be changed by anybody else.
            lr: Learning rate.
            betas: Decay rates of the first and the second moment.
            eps: Added to the root of the second moment.
            weight_decay: Share of a weight, times `lr`, that each step takes off it.
            device: Where steps are taken; None: where each weight is.
        """
        self._weights = list(parameters)
        self._trained = [_trained(weight, torch.device(device or weight.device)) for weight in self._weights]
        super().__init__(self._trained, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @property
    def _pairs(self) -> list[tuple[int, nn.Parameter, nn.Parameter]]:
        """Number, weight and copy of every weight that has one."""
        both = enumerate(zip(self._weights, self._trained, strict=True))
        return [(number, weight, copy) for number, (weight, copy) in both if weight is not copy]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        super().zero_grad(set_to_none)
        for _, weight, _ in self._pairs:
            weight.grad = None

    @torch.no_grad()
    def gather(self) -> None:
        """Adds the gradients of the weights to those of their copies.

        To be called after each part of a minibatch: a sum of many parts in few bits stops growing. Afterwards the
        gradients are those of the parameters in `param_groups`.
        """
        for _, weight, copy in self._pairs:
            if weight.grad is None:
                continue
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
            copy.grad += weight.grad.to(copy.device)
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step and rounds the copies into their weights."""
        self.gather()
        loss = super().step(closure)
        for _, weight, copy in self._pairs:
            weight.copy_(copy)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Adam's, and the copies: the weights in a checkpoint are rounded."""
        packed = super().state_dict()
        for number, _, copy in self._pairs:
            packed["state"][number] = {**packed["state"].get(number, {}), COPY: copy.detach()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; load the weights before."""
        state = {number: dict(own) for number, own in state_dict["state"].items()}
        copies = {number: own.pop(COPY) for number, own in state.items() if COPY in own}
        for number, weight, copy in self._pairs:
            copy.copy_(copies.get(number, weight))
        # Adam begins its moments where there is no state at all.
        state = {number: own for number, own in state.items() if own}
        super().load_state_dict({**state_dict, "state": state})


def _trained(weight: nn.Parameter, device: torch.device) -> nn.Parameter:
    """What is trained for a weight: itself, or a copy that has enough bits and lies where it should."""
    is_precise = weight.dtype in (torch.float32, torch.float64)
    if is_precise and not _is_elsewhere(weight, device):
        return weight
    return nn.Parameter(weight.detach().to(device, weight.dtype if is_precise else torch.float32, copy=True))


def _is_elsewhere(weight: nn.Parameter, device: torch.device) -> bool:
    return weight.device != device
