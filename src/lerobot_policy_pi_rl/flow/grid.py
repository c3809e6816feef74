"""The time grid of the denoising steps."""

import torch
from torch import Tensor


def time_grid(
    num_steps: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Times of the K denoising steps and of the action end.

    Args:
        num_steps: Number of denoising steps K, at least 1.
        device: Where the grid lives.
        dtype: Floating-point type of the grid.

    Returns:
        `t_k = 1 - k / K` for `k = 0..K`, shape `[K + 1]`.
    """
    steps = torch.arange(num_steps + 1, device=device, dtype=torch.float64)
    # Rounded in the same order as LeRobot's `euler_integrate`, so that both see the same times to the bit.
    grid = 1 + steps * (-1 / num_steps)
    grid[-1] = 0
    return grid.to(dtype)
