"""How many bytes a push of weights takes, for VLAs at their real size, by what is trained.

    python benchmarks/push_sizes.py

Nothing is allocated: the policies are built without memory, and their tensors are counted.
"""

import argparse

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.eo1.configuration_eo1 import EO1Config
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_pi_rl.configuration_pi_rl import TRAINABLE, PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

BASES = {"pi0": PI0Config, "pi05": PI05Config, "xvla": XVLAConfig, "eo1": EO1Config}
# X-VLA takes the sizes of its VLM, Florence-2-large, from its checkpoint.
FLORENCE = {
    "vision_config": {
        "embed_dim": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "projection_dim": 1024,
    },
    "text_config": {"model_type": "bart", "vocab_size": 51289, "d_model": 1024},
}
# EO1 reads those of Qwen2.5-VL-3B from the hub.
QWEN = {
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "tie_word_embeddings": True,
}
SETTINGS = {
    "xvla": {"florence_config": FLORENCE, "action_mode": "auto"},
    "eo1": {"vlm_config": QWEN},
}
FEATURES = {
    "input_features": {
        "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
        "observation.images.image2": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
        OBS_STATE: PolicyFeature(FeatureType.STATE, (8,)),
    },
    "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (7,))},
}


def build(base: str, trainable: str) -> PIRLPolicy:
    """A policy at its real size, in bfloat16, without memory."""
    stock = BASES[base](device="cpu", dtype="bfloat16", **FEATURES, **SETTINGS.get(base, {}))
    config = PIRLConfig(base=stock, device="cpu", trainable=trainable)
    config.place_on("meta")
    # No weights are read.
    config.weights_follow = True
    with torch.device("meta"):
        return PIRLPolicy(config)


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| base | trained | tensors | MB per push | share of the full state dict |")
    print("|---|---|---|---|---|")
    for base in BASES:
        for trainable in TRAINABLE:
            policy = build(base, trainable)
            pushed = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            # A tensor with two names is one.
            whole = {id(tensor): tensor for tensor in policy.state_dict(keep_vars=True).values()}
            share = size(pushed) / size(list(whole.values()))
            print(f"| `{base}` | `{trainable}` | {len(pushed)} | {size(pushed) / 1e6:,.1f} | {share:.1%} |")


if __name__ == "__main__":
    main()
