"""Looks for numbers that are not finite in tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a number that is not finite; None if all are.

    On a GPU it waits for the device once, unless there is one.
    """
    named = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point()]
    finite = [tensor.isfinite().all() for _, tensor in named]
    if not finite or bool(torch.stack([one.to(finite[0].device) for one in finite]).all()):
        return None
    return next(name for (name, _), one in zip(named, finite, strict=True) if not bool(one))
