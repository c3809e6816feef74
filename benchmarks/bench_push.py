"""What one push of weights costs: its bytes over those of a full float32 `state_dict`, and its latency.

A full push is `lerobot.transport.utils.state_to_bytes` of a `state_dict`: how LeRobot's own learner sends weights.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lerobot.configs import FeatureType
from lerobot.envs import env_to_policy_features
from lerobot.transport.utils import bytes_to_state_dict, state_to_bytes

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.runtime.wire import WeightsHeader, decode_weights, encode_weights

RECIPE = Path(__file__).parent.parent / "recipes/metaworld.json"
HEADER = WeightsHeader(version=1, restart=False, evaluate=False, final=False, sent_at=0.0)
ROUNDS = 40


def make_algorithm() -> PIRLAlgorithm:
    """The algorithm around a compact policy with the recipe's environment."""
    features = env_to_policy_features(
        MetaworldStateEnv(task=json.loads(RECIPE.read_text(encoding="utf-8"))["env"]["task"])
    )
    outputs = {key: value for key, value in features.items() if value.type is FeatureType.ACTION}
    inputs = {key: value for key, value in features.items() if key not in outputs}
    config = PIRLConfig(device="cpu", push_to_hub=False, input_features=inputs, output_features=outputs)
    return PIRLAlgorithm(PIRLPolicy(config), PIRLAlgorithmConfig(policy_config=config))


def freeze_but_the_last_block(policy: PIRLPolicy) -> None:
    """Trains the last residual block and the output layer only, as one would an expert on a frozen trunk."""
    policy.base.requires_grad_(False)
    for part in (policy.base.blocks[-1], policy.base.leave):
        part.requires_grad_(True)


def milliseconds(rounds: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Median time of each task; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def latency(algorithm: PIRLAlgorithm, rounds: int) -> dict:
    """Encoding at the learner, and decoding and loading at the actor, together; without the network."""
    policy = algorithm.policy
    # As actors do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, full = encode_weights(algorithm.get_weights(), HEADER), state_to_bytes(policy.state_dict())
    taken = milliseconds(
        rounds,
        encode=lambda: encode_weights(algorithm.get_weights(), HEADER),
        stock_encode=lambda: state_to_bytes(policy.state_dict()),
        decode=lambda: policy.load_trainable_state(decode_weights(ours).tensors),
        stock_decode=lambda: policy.load_state_dict(bytes_to_state_dict(full)),
    )
    torch.set_num_threads(threads)
    return {
        "name": "latency of a push, all tensors trained",
        "value": taken["encode"] + taken["decode"],
        "unit": "ms",
        "target": None,
        "detail": f"encode {taken['encode']:.2f}, decode and load {taken['decode']:.2f}; "
        f"LeRobot's {taken['stock_encode']:.2f} and {taken['stock_decode']:.2f}; medians of {rounds}",
    }


def run(quick: bool = False) -> list[dict]:
    """Rows of the benchmark table.

    Args:
        quick: Few rounds.
    """
    torch.manual_seed(0)
    algorithm = make_algorithm()
    policy_bytes = len(state_to_bytes(algorithm.policy.state_dict()))
    everything = len(state_to_bytes({**algorithm.policy.state_dict(), **algorithm.state_dict()}))
    pushed = len(encode_weights(algorithm.get_weights(), HEADER))
    timing = latency(algorithm, ROUNDS // 4 if quick else ROUNDS)
    freeze_but_the_last_block(algorithm.policy)
    partly = len(encode_weights(algorithm.get_weights(), HEADER))
    shares = [
        ("push over the policy, all tensors trained", pushed, policy_bytes),
        ("push over policy and critic, all tensors trained", pushed, everything),
        ("push over the policy, all but the last block frozen", partly, policy_bytes),
    ]
    return [
        {
            "name": name,
            "value": ours / full,
            "unit": "x",
            "target": None,
            "detail": f"{ours:,} against {full:,} bytes",
        }
        for name, ours, full in shares
    ] + [timing]
