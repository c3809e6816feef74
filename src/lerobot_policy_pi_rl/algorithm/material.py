"""What one update reads, and the averages that it tells."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow.transition import Gaussian
from .contexts import Contexts


@dataclass(frozen=True)
class CriticBatch:
    """What the critic is trained on; N rows.

    Attributes:
        features: `[N, F]`.
        value: Value at collection, `[N]`.
        target: Return to fit, `[N]`.
    """

    features: Tensor
    value: Tensor
    target: Tensor

    def rows(self, rows: Tensor) -> "CriticBatch":
        """The given rows."""
        return CriticBatch(self.features[rows], self.value[rows], self.target[rows])


@dataclass(frozen=True)
class Batch:
    """A rollout on the policy's device, as the update reads it; N rows.

    Attributes:
        chain: `[N, S + 1, H, D]`.
        step: `[N, S]`.
        scored: Steps of each chunk that its log-probability covers, `[N]`.
        log_prob: Reduced log-probability under the proximal policy, that before the update, `[N]`; `[N, T]` where each
            decision has T ratios.
        weight: Probability under the proximal policy over that under the one that collected, `[N]`.
        advantage: Normalised, `[N]`.
        reference: The steps of the policy before reinforcement learning, if a divergence from it is penalised.
    """

    chain: Tensor
    step: Tensor
    scored: Tensor
    log_prob: Tensor
    weight: Tensor
    advantage: Tensor
    reference: Gaussian | None

    def rows(self, rows: Tensor) -> "Batch":
        """The given rows."""
        rows = rows.to(self.chain.device)
        tensors = {name: value[rows] for name, value in vars(self).items() if name != "reference"}
        reference = self.reference and Gaussian(self.reference.mean[rows], self.reference.std[rows])
        return Batch(reference=reference, **tensors)


@dataclass(frozen=True)
class Material:
    """All that one update reads.

    Attributes:
        contexts: What was seen, encoded.
        batch: For the policy.
        critic: For the critic, if there is one.
        trained: Rows that are trained on, `[U]` int64 on the CPU.
        over_cap: How many were left out because the policy has moved too far since they were collected.
        has_signal: Whether the rewards tell decisions apart; if not, the policy does not learn from them.
    """

    contexts: Contexts
    batch: Batch
    critic: CriticBatch | None
    trained: Tensor
    over_cap: int
    has_signal: bool


class Averages:
    """Sums of scalars that stay on the device until they are read once."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Adds one observation of each named value."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def mean(self, name: str) -> float:
        """Mean of a value; 0 if it was never added."""
        return float(self._sums[name]) / self._counts[name] if name in self._sums else 0.0

    def means(self) -> dict[str, float]:
        """Mean of every value."""
        return {name: self.mean(name) for name in self._sums}
