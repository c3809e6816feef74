"""What one GPU needs for pi0, and how fast it is."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import OBS_STATE

from benchmarks.run import Row, judge
from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import Rollout, prepare
from lerobot_policy_pi_rl.bases.adapter import take
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

from .policies import Size, make_policy, observations, plain

# A card with 24 GB is to hold the training of the expert, and kept prefixes are to halve the time of an update.
CARD_GB, WANTED_SPEEDUP = 24, 2


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        envs: Decisions that are collected at a time.
        decisions: Decisions of a rollout.
        minibatch_size: Decisions of a gradient step.
        micro_batch_size: Decisions that are scored at a time where speed is measured; memory is measured with 1, too.
        epochs: Passes over a rollout where speed is measured.
        repeats: Measurements, whose best one counts.
        warm_ups: Updates before them.
    """

    envs: int
    decisions: int
    minibatch_size: int
    micro_batch_size: int
    epochs: int
    repeats: int
    warm_ups: int = 1


SCALES = {
    "real": Scale(envs=16, decisions=64, minibatch_size=32, micro_batch_size=8, epochs=4, repeats=3),
    "tiny": Scale(envs=2, decisions=8, minibatch_size=4, micro_batch_size=2, epochs=2, repeats=1),
    # For the real policy on a CPU, where an observation takes the better part of a minute.
    "few": Scale(envs=1, decisions=2, minibatch_size=2, micro_batch_size=1, epochs=2, repeats=1, warm_ups=0),
}
# Where Linux says how much memory a process has taken, and where that is forgotten.
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """What is measured, and where.

    Attributes:
        size: Of the policy.
        scale: Of the measurements.
        device: `cuda` or `cpu`.
        dtype: `bfloat16` or `float32`.
    """

    size: Size
    scale: Scale
    device: str
    dtype: str

    def policy(self, **settings: Any) -> PIRLPolicy:
        """A new policy; what the last one took is given back first."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        return make_policy(self.size, self.device, self.dtype, **settings)


@dataclass(frozen=True)
class Cost:
    """What some work took.

    Attributes:
        seconds: Wall time.
        gigabytes: Largest memory in use at a time, weights included (10^9 bytes): on the GPU; without one, all of the
            process; None where the system does not say.
        result: What the work returned.
    """

    seconds: float
    gigabytes: float | None
    result: Any


def cost_of(device: str, work: Callable[[], Any]) -> Cost:
    """Measures some work."""
    if device != "cuda":
        if FORGET.exists():
            FORGET.write_text("5", encoding="utf-8")
        start = time.perf_counter()
        result = work()
        return Cost(time.perf_counter() - start, _peak_in_main_memory(), result)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9, result)


def _peak_in_main_memory() -> float | None:
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM:")), None)


def collect(policy: PIRLPolicy, job: Job, batch: dict[str, Any], version: int) -> Rollout:
    """One decision of each environment, all of which end; half of them succeed."""
    count = job.scale.decisions
    parts = torch.arange(count).split(job.scale.envs)
    samples = [policy.explore(take(batch, rows)) for rows in parts]
    joined = {
        name: torch.cat([getattr(sample, name) for sample in samples]).cpu()
        for name in ("x", "chain", "step", "log_prob")
    }
    flags = torch.zeros(count, dtype=torch.bool)
    decisions = DecisionBatch(
        observation={OBS_STATE: batch[OBS_STATE].cpu()},
        task=["task"] * count,
        chain=joined["chain"],
        step=joined["step"],
        log_prob=joined["log_prob"],
        action=joined["x"],
        reward=torch.arange(count).remainder(2).float(),
        delay=torch.zeros(count, dtype=torch.int64),
        executed=torch.full((count,), policy.config.n_action_steps),
        terminated=~flags,
        truncated=flags,
        success=flags,
        version=torch.full((count,), version),
        env=torch.arange(count),
        index=torch.zeros(count, dtype=torch.int64),
        next_row=torch.zeros(0, dtype=torch.int64),
        next_observation={},
    )
    return prepare(decisions, lambda observation, task: batch)


def make_algorithm(policy: PIRLPolicy, scale: Scale, **settings: Any) -> PIRLAlgorithm:
    """PPO without a critic, so that the policy's update alone is measured; it never ends an iteration early."""
    defaults = {
        "advantage": "group",
        "collection": CollectionConfig(num_envs=scale.decisions, group_size=2),
        "minibatch_size": scale.minibatch_size,
        "micro_batch_size": scale.micro_batch_size,
        "epochs": scale.epochs,
        "lr": 1e-6,
        "lr_schedule": "constant",
        "kl_stop": 1e9,
    }
    config = PIRLAlgorithmConfig(**defaults | settings, policy_config=policy.config)
    algorithm = PIRLAlgorithm(policy, config)
    algorithm.make_optimizers_and_scheduler()
    return algorithm


def exactness(job: Job) -> Iterator[Row]:
    """The policy's chunk against the stock policy's, from the same noise."""
    policy, batch = job.policy(), observations(job.size, 1, job.device)
    noise = policy.initial_noise(policy.encode(dict(batch)))
    chunk = policy.predict_action_chunk(dict(batch), noise=noise.clone())
    with torch.no_grad():
        stock = policy.base.policy.predict_action_chunk(dict(batch), noise=noise.clone())
    off = float((chunk - stock).abs().max())
    yield Row("exactness", "chunk against the stock policy's", off, "", "<= 0", judge(off, "<= 0"), "")


def memory(job: Job, trained: Sequence[str]) -> Iterator[Row]:
    """Peak memory of collection and update, by what is trained."""
    for trainable in trained:
        for checkpointing in (False, True):
            # A scope of its own: nothing of the last policy is there any more.
            yield from _memory_of(job, trainable, checkpointing)


def _memory_of(job: Job, trainable: str, checkpointing: bool) -> Iterator[Row]:
    policy = job.policy(trainable=trainable, gradient_checkpointing=checkpointing)
    batch = observations(job.size, job.scale.decisions, job.device)
    if not checkpointing:
        some = take(batch, torch.arange(job.scale.envs))
        yield _memory_row(f"collection: {trainable}", job, partial(policy.explore, some), None)
    setting = f"{trainable}, checkpointing" if checkpointing else trainable
    for rows in sorted({1, job.scale.micro_batch_size}):
        wanted = f"<= {CARD_GB}" if (trainable, rows) == ("expert", 1) else None
        name = f"update: {setting}, micro-batch {rows}"
        yield _memory_row(name, job, updating(policy, job, batch, micro_batch_size=rows), wanted)
    if checkpointing:
        work = updating(policy, job, batch, micro_batch_size=1, offload_optimizer=True)
        yield _memory_row(f"update: {setting}, offloaded optimizer, micro-batch 1", job, work, None)


def updating(policy: PIRLPolicy, job: Job, batch: dict[str, Any], **settings: Any) -> Callable[[], Any]:
    """An update of one epoch; the optimizer, whose state it needs as well, is new."""

    def work() -> None:
        algorithm = make_algorithm(policy, job.scale, epochs=1, **settings)
        algorithm.update(iter([collect(policy, job, batch, 0)]))

    return work


def _memory_row(name: str, job: Job, work: Callable[[], Any], wanted: str | None) -> Row:
    gc.collect()
    try:
        peak = cost_of(job.device, work).gigabytes
    except torch.OutOfMemoryError:
        return Row("memory", name, None, "GB", wanted, "short", "out of memory")
    return Row("memory", name, peak, "GB", wanted, judge(peak, wanted) if peak is not None else "", "")


def collection_speed(job: Job, compiled: bool) -> Iterator[Row]:
    """Decisions per second of the policy alone; the environments are not there."""
    for compiles in (False, True) if compiled else (False,):
        policy = job.policy(compile=compiles)
        work = partial(policy.explore, observations(job.size, job.scale.envs, job.device))
        first = cost_of(job.device, work).seconds
        best = min(cost_of(job.device, work).seconds for _ in range(job.scale.repeats))
        name = "collection, compiled" if compiles else "collection"
        detail = f"{job.scale.envs} at a time; the first took {first:.1f} s"
        yield Row("speed", name, job.scale.envs / best, "decisions/s", None, "", detail)


def update_speed(job: Job) -> Iterator[Row]:
    """Samples per second of an update that trains the expert, by what becomes of the prefix."""
    policy = job.policy()
    batch = observations(job.size, job.scale.decisions, job.device)
    rates = []
    for name, kept_gb, way in (
        ("prefix kept", 1e6, nullcontext()),
        ("prefix computed again", 0.0, nullcontext()),
        ("plain: prefix and suffix together", 0.0, plain(policy)),
    ):
        with way:
            seconds, error = _updates(policy, job, batch, kept_gb)
        rates.append(job.scale.decisions * job.scale.epochs / seconds)
        detail = f"{job.scale.epochs} epochs of {job.scale.decisions}; first ratio off by {error:.1e}"
        yield Row("speed", f"update, {name}", rates[-1], "samples/s", None, "", detail)
    speedup, wanted = rates[0] / rates[-1], f">= {WANTED_SPEEDUP}"
    yield Row("speed", "prefix kept over plain", speedup, "", wanted, judge(speedup, wanted), "")


def _updates(policy: PIRLPolicy, job: Job, batch: dict[str, Any], kept_gb: float) -> tuple[float, float]:
    """Seconds of the fastest update, and the largest distance from 1 of their first ratios."""
    algorithm = make_algorithm(policy, job.scale, context_memory_gb=kept_gb)
    seconds, errors = [], []
    for number in range(job.scale.warm_ups + job.scale.repeats):
        rollout = collect(policy, job, batch, version=number)
        cost = cost_of(job.device, partial(algorithm.update, iter([rollout])))
        seconds.append(cost.seconds)
        errors.append(cost.result.extra["ratio_first_error"])
    return min(seconds[job.scale.warm_ups :]), max(errors)
