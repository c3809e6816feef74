"""Gradient checkpointing (arXiv 1604.06174) of a stock policy's blocks, where the libraries' own does not work.

Theirs is on in training mode only, in which a density is not computed, and goes without key/value caches, which the
velocity reads.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_method(owner: nn.Module, name: str = "forward") -> None:
    """Makes a method of one module forget its activations; the backward pass computes them again.

    It is bound to the module, so that a deep copy of the module has its own.

    Args:
        owner: Changed in place; its parameters keep their names.
        name: The method.
    """

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recompute(partial(getattr(type(self), name), self), self.training, *args, **kwargs)

    setattr(owner, name, MethodType(method, owner))


def recompute(function: Callable[..., Any], is_random: bool, *args: Any, **kwargs: Any) -> Any:
    """Calls a function, and once more in the backward pass instead of keeping its activations.

    Args:
        function: It may append to a key/value cache that is given by name, as `past_key_values`.
        is_random: Whether it draws random numbers (dropout), which have to be the same the second time.
        args: Its arguments.
        kwargs: Its arguments by name.

    Returns:
        What it returns.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    cache = kwargs.get("past_key_values")
    found = [] if cache is None else [copy.copy(layer) for layer in cache.layers]

    def run(*args: Any, **kwargs: Any) -> Any:
        if cache is not None:
            # What it appended the first time is not to be there the second time.
            cache.layers[:] = [copy.copy(layer) for layer in found]
        return function(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=is_random, **kwargs)
