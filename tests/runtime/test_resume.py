"""In synchronous mode a run, and the same run cut in two, give the same losses: in real processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HALF = 3


def play(run: Any, actors: int, *arguments: str) -> None:
    """One learner and its actors, started by hand, to the end."""
    given = (*arguments, f"--algorithm.collection.num_actors={actors}")
    commands = [run.learner(*given), *(run.actor(number, *given) for number in range(actors))]
    for command in commands:
        assert command.wait(120) == 0, command.shown
        assert command.errors() == []


def reproducible(run: Any) -> list[dict[str, Any]]:
    """What does not depend on the clock, row by row."""
    groups = ("step", "loss", "ppo", "rollout", "gradient", "eval")
    return [
        {name: value for name, value in row.items() if name.split("/")[0] in groups} for row in run.all_rows()
    ]


@pytest.mark.parametrize("actors", [1, 3])
def test_a_resumed_run_gives_the_same_losses(make_run: Callable[..., Any], actors: int) -> None:
    settings = (f"--save_freq={HALF}", f"--env_eval_freq={HALF}", "--eval.n_episodes=3")
    whole, parts = make_run(*settings), make_run(*settings)
    play(whole, actors, f"--steps={2 * HALF}")
    play(parts, actors, f"--steps={HALF}")
    assert parts.checkpoint().resolve().name == f"{HALF:06d}"
    play(parts, actors, f"--steps={2 * HALF}", "--resume=true")

    rows = reproducible(whole)
    assert [row["step"] for row in rows if "loss/value" in row] == list(range(1, 2 * HALF + 1))
    assert rows == reproducible(parts)
    # Episodes run on from one iteration to the next, and there is something to learn: the losses say something.
    assert {row.get("rollout/episodes") for row in rows} >= {0.0, 2.0 * actors}
    assert len({row["loss/policy"] for row in rows if "loss/policy" in row}) == 2 * HALF - 1
    for file in ("pretrained_model/model.safetensors", "algorithm/model.safetensors"):
        one, two = (load_file(run.checkpoint() / file) for run in (whole, parts))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file
