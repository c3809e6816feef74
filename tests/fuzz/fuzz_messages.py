"""One valid message of each kind that crosses the wire, and what must hold of whatever its decoder lets through."""

from collections.abc import Callable
from typing import Any

import torch

from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.demonstrations import DemonstrationBatch
from lerobot_policy_pi_rl.runtime.gather import STATISTICS as GATHERED
from lerobot_policy_pi_rl.runtime.handshake import Handshake, settings_differences
from lerobot_policy_pi_rl.runtime.packing import WireError
from lerobot_policy_pi_rl.runtime.wire import (
    RolloutHeader,
    TensorField,
    WeightsHeader,
    WireSpec,
    decode_decisions,
    decode_demonstrations,
    decode_interaction,
    decode_weights,
    encode_decisions,
    encode_demonstrations,
    encode_interaction,
    encode_weights,
    finite_rows,
)

VERSION, ROWS, RECORDED, HORIZON, PADDED, REAL, STEPS = 7, 4, 1, 3, 4, 2, 4


def make_batch() -> DecisionBatch:
    """What actor 0 sends: four decisions of one environment, the last with its next observation."""
    torch.manual_seed(0)
    count = torch.arange(ROWS)
    return DecisionBatch(
        observation={
            "observation.state": torch.randn(ROWS, 3),
            "observation.image": torch.zeros(ROWS, 3, 2, 2).byte(),
        },
        task=["reach", "push", "reach", "push"],
        chain=torch.randn(ROWS, RECORDED + 1, HORIZON, PADDED),
        step=torch.randint(0, STEPS, (ROWS, RECORDED)),
        log_prob=torch.randn(ROWS, HORIZON),
        action=torch.randn(ROWS, HORIZON, REAL),
        reward=torch.randn(ROWS),
        delay=count * 0,
        executed=torch.full((ROWS,), HORIZON),
        terminated=count < 0,
        truncated=count < 0,
        success=count < 0,
        version=torch.full((ROWS,), VERSION),
        env=count * 0,
        index=count,
        next_row=torch.tensor([ROWS - 1]),
        next_observation={
            "observation.state": torch.randn(1, 3),
            "observation.image": torch.zeros(1, 3, 2, 2).byte(),
        },
    )


SPEC = WireSpec(
    observation={
        "observation.state": TensorField(torch.float32, (3,)),
        "observation.image": TensorField(torch.uint8, (3, 2, 2)),
    },
    chain=(RECORDED + 1, HORIZON, PADDED),
    action=(HORIZON, REAL),
    denoising_steps=STEPS,
    max_rows=ROWS,
)
HEADER = RolloutHeader(actor=0, version=VERSION, part=0)
DECISIONS = encode_decisions(make_batch(), HEADER)
DEMONSTRATIONS = encode_demonstrations(
    DemonstrationBatch(
        observation=make_batch().observation,
        task=["reach", "push", "reach", "push"],
        action=torch.randn(ROWS, REAL),
        last=torch.tensor([False, True, False, True]),
    )
)
WEIGHTS = encode_weights(
    {"head": torch.ones(3), "body": torch.zeros(2, 2).bfloat16()}, WeightsHeader(3, True, False, False, 12.5)
)
STATISTICS: dict[str, Any] = {
    "kind": "collection",
    "version": VERSION,
    "part": 0,
    **dict.fromkeys(GATHERED["collection"], 2),
}
INTERACTION = encode_interaction(STATISTICS)
SETTINGS = {"policy": {"steps": 4, "shape": [1, 2]}, "seed": 3}
HELLO = Handshake(0, "session", SETTINGS)
INTRODUCTION = dict(HELLO.to_metadata())["pi-rl-settings-bin"]


def check_decisions(data: bytes) -> None:
    rollout = decode_decisions(data, SPEC)
    decisions = rollout.decisions
    encoded = decode_decisions(encode_decisions(decisions, rollout.header), SPEC)
    assert encoded.header == rollout.header
    assert len(decisions) <= ROWS
    assert len(decisions.task) == len(decisions)
    # What the learner does first with every row that it keeps.
    kept = decisions.select(finite_rows(decisions).nonzero()[:, 0])
    assert kept.reward.isfinite().all()
    assert kept.chain.isfinite().all()
    for task in kept.task:
        task.encode()


def check_demonstrations(data: bytes) -> None:
    shown = decode_demonstrations(data, SPEC)
    again = decode_demonstrations(encode_demonstrations(shown), SPEC)
    assert again.task == shown.task
    assert len(shown) == len(shown.task) == len(again) > 0
    assert shown.last[-1]
    assert shown.action.isfinite().all()
    for task in shown.task:
        task.encode()


def check_weights(data: bytes) -> None:
    assert sum(tensor.nbytes for tensor in decode_weights(data).tensors.values()) <= len(data)


def check_interaction(data: bytes) -> None:
    values = decode_interaction(data)
    assert decode_interaction(encode_interaction(values)) == values


def check_introduction(data: bytes) -> None:
    metadata = [*Handshake(0, "session").to_metadata(), ("pi-rl-settings-bin", data)]
    hello = Handshake.from_metadata(metadata)
    assert hello.settings is not None
    for line in settings_differences(SETTINGS, hello.settings):
        assert line.isprintable()
        assert len(line) < 500


MESSAGES: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "decisions": (check_decisions, DECISIONS),
    "demonstrations": (check_demonstrations, DEMONSTRATIONS),
    "weights": (check_weights, WEIGHTS),
    "interaction": (check_interaction, INTERACTION),
    "introduction": (check_introduction, INTRODUCTION),
}
"""Each kind's check, which raises `WireError` or holds, and a valid message."""


def refused(check: Callable[[bytes], None], data: bytes) -> bool:
    """Whether a message is refused, in one printable line; anything but a `WireError` is a fault of the decoder."""
    problem = None
    try:
        check(data)
    except WireError as error:
        problem = str(error)
    assert problem is None or (problem.isprintable() and len(problem) < 1000)
    return problem is not None
