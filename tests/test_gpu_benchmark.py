"""The benchmark for a GPU, on a small policy and a CPU."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
# The benchmarks are no installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.measure import SCALES, Job, collect, cost_of, make_algorithm
from benchmarks.gpu.policies import SIZES, make_config, observations, plain
from benchmarks.run import Row
from lerobot_policy_pi_rl.configuration_pi_rl import TRAINABLE
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy


@pytest.fixture
def job() -> Job:
    """The small one, in float32."""
    return Job(SIZES["tiny"], SCALES["tiny"], "cpu", "float32")


def test_it_measures_everything_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "folder" / "tiny.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--no_compile", "--output", str(file)]
    assert main(arguments) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    speeds = [row for row in rows.values() if row["benchmark"] == "speed"]
    assert len(speeds) == 5
    assert all(row["value"] > 0 for row in speeds)
    for trainable in TRAINABLE:
        assert f"collection: {trainable}" in rows
        assert f"update: {trainable}, checkpointing, micro-batch 2" in rows
        assert f"update: {trainable}, checkpointing, offloaded optimizer, micro-batch 1" in rows
    expert = rows["update: expert, micro-batch 1"]
    # On a CPU it is the memory of the whole process.
    assert expert["value"] > 0.1
    assert (expert["target"], expert["verdict"]) == ("<= 24", "pass")
    exact = rows["chunk against the stock policy's"]
    assert (exact["value"], exact["verdict"]) == (0, "pass")
    said = capsys.readouterr()
    assert "prefix kept over plain" in said.out
    assert "update: all, micro-batch 1" in said.err


def test_what_is_measured_before_an_interruption_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a CPU takes long."""

    def interrupted(job: Job) -> Iterator[Row]:
        raise KeyboardInterrupt
        yield

    row = Row("exactness", "chunk", 0.0, "", None, "", "")
    monkeypatch.setattr(command, "exactness", lambda job: iter([row]))
    monkeypatch.setattr(command, "update_speed", interrupted)
    file = tmp_path / "some.json"
    assert main(["--size", "tiny", "--device", "cpu", "--output", str(file)]) == 0
    assert json.loads(file.read_text())["rows"] == [asdict(row)]


def test_the_plain_way_gives_the_same_numbers(job: Job) -> None:
    """What it is compared with computes the same, only in another way."""
    policy = job.policy()
    batch = observations(job.size, 4, job.device)
    sample = policy.explore(dict(batch), torch.Generator().manual_seed(0))
    own = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    with plain(policy):
        theirs = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    torch.testing.assert_close(theirs, own, rtol=0, atol=1e-4)
    assert theirs.requires_grad
    again = policy.score(policy.encode(dict(batch)), sample.chain, sample.step).log_prob
    assert torch.equal(again, own)


def test_an_update_trains_on_every_decision_in_every_epoch(job: Job) -> None:
    policy = job.policy()
    algorithm = make_algorithm(policy, job.scale)
    rollout = collect(policy, job, observations(job.size, job.scale.decisions, job.device), version=0)
    assert len(algorithm.evaluate(rollout).trained) == job.scale.decisions
    stats = algorithm.update(iter([rollout]))
    assert stats.extra["epochs"] == job.scale.epochs
    assert stats.extra["ratio_first_error"] <= 1e-4


def test_the_real_policy_is_built_from_lerobot_s_configuration() -> None:
    """Here without memory, and without the hub, as everywhere in these tests."""
    config = make_config(SIZES["real"], "cpu", "bfloat16")
    config.place_on("meta")
    with torch.device("meta"):
        policy = PIRLPolicy(config)
    # Its 3.5 billion, and the output layer of PaliGemma, which nobody uses.
    assert round(sum(parameter.numel() for parameter in policy.parameters()) / 1e9, 1) == 4.0


def test_a_cost_is_that_of_the_work() -> None:
    small = cost_of("cpu", lambda: "done")
    large = cost_of("cpu", lambda: torch.ones(10**8).sum().item())
    after = cost_of("cpu", lambda: "done")
    assert (small.result, large.result) == ("done", 1e8)
    assert small.seconds < large.seconds
    assert small.gigabytes + 0.3 < large.gigabytes
    assert after.gigabytes < large.gigabytes - 0.3


def test_a_missing_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: there is no GPU; try --size tiny --device cpu\n"
