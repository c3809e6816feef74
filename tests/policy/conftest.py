"""A small policy, and observations for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from lerobot_policy_pi_rl.bases.configuration import TASK_EMBEDDING, CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

STATE_DIM, ACTION_DIM, TASK_DIM = 6, 3, 8


@pytest.fixture
def make_config() -> Callable[..., PIRLConfig]:
    """Makes a configuration: explorer settings by keyword, those of the policy in `policy`."""

    def make(policy: dict[str, Any] | None = None, **explorer: Any) -> PIRLConfig:
        settings: dict[str, Any] = {
            "device": "cpu",
            "push_to_hub": False,
            "base": CompactConfig(hidden_dim=32, num_blocks=1, time_dim=8, task_dim=TASK_DIM, image_dim=16),
            "explorer": ExplorerConfig(**explorer),
            "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        }
        return PIRLConfig(**settings | (policy or {}))

    return make


@pytest.fixture
def make_policy(make_config: Callable[..., PIRLConfig]) -> Callable[..., PIRLPolicy]:
    """Makes a policy with seeded weights; arguments as for `make_config`."""

    def make(policy: dict[str, Any] | None = None, **explorer: Any) -> PIRLPolicy:
        torch.manual_seed(1)
        return PIRLPolicy(make_config(policy, **explorer)).eval()

    return make


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Preprocessed observations, 16 rows."""
    generator = torch.Generator().manual_seed(0)
    return {
        "observation.state": torch.randn(16, STATE_DIM, generator=generator),
        TASK_EMBEDDING: torch.randn(16, TASK_DIM, generator=generator),
    }
