"""Pre- and post-processing: the task embedding, bounded deviations, and the round trip through files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lerobot.policies.factory import make_pre_post_processors

from lerobot_policy_pi_rl.bases.configuration import TASK_EMBEDDING, CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.envs.tasks import all_tasks, task_text
from lerobot_policy_pi_rl.processor_pi_rl import embed_text, floor_deviations

MakeConfig = Callable[..., PIRLConfig]
STATS = {
    "observation.state": {"mean": torch.arange(6.0), "std": torch.tensor([2.0, 1.0, 0.5, 1e-9, 0.0, 1.0])},
    "action": {"mean": torch.tensor([1.0, 0.0, -1.0]), "std": torch.tensor([2.0, 1.0, 1e-4])},
}


def test_embedding_is_the_published_hash_so_it_is_the_same_on_every_machine() -> None:
    """CRC-32 of "123456789" is 0xCBF43926 by definition: place 0x26 of 64, top bit set."""
    vector = embed_text("123456789", 64)
    assert vector.nonzero().tolist() == [[0x26]]
    assert vector[0x26] == 1


def test_embedding_tells_the_texts_of_the_metaworld_tasks_apart() -> None:
    texts = sorted({task_text(task) for task in all_tasks()})
    assert len(texts) == 50
    vectors = torch.stack([embed_text(text, CompactConfig().task_dim) for text in texts])
    closest = (vectors @ vectors.T - 2 * torch.eye(len(texts))).max()
    assert closest < 0.95


@given(st.text(max_size=40))
def test_embedding_has_unit_length_or_is_zero(text: str) -> None:
    norm = float(embed_text(text, 16).norm())
    assert norm == pytest.approx(1.0, abs=1e-5) or norm == 0.0


def test_embedding_depends_on_word_order_and_not_on_case() -> None:
    assert torch.equal(embed_text("Open the Door", 64), embed_text("open the door", 64))
    assert not torch.equal(embed_text("puck on shelf", 64), embed_text("shelf on puck", 64))


def test_preprocessing_normalises_and_embeds(make_config: MakeConfig) -> None:
    pre, post = make_pre_post_processors(make_config(), dataset_stats=STATS)
    seen = pre({"observation.state": torch.arange(6.0)[None] + 1, "task": ["push the puck"]})
    # Deviations below 1 % of the largest one (2) count as .02.
    torch.testing.assert_close(seen["observation.state"], torch.tensor([[0.5, 1.0, 2.0, 50.0, 50.0, 1.0]]))
    assert torch.equal(seen[TASK_EMBEDDING], embed_text("push the puck", 8)[None])
    # Actions are not bounded: their deviation is what the policy has to be able to reach.
    torch.testing.assert_close(post(torch.ones(1, 5, 3)), torch.tensor([3.0, 1.0, -0.9999]).expand(1, 5, 3))


def test_processors_survive_a_round_trip_through_files(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    fresh = make_pre_post_processors(config, dataset_stats=STATS)
    for pipeline in fresh:
        pipeline.save_pretrained(tmp_path)
    loaded = make_pre_post_processors(config, pretrained_path=str(tmp_path))
    observation = {"observation.state": torch.randn(4, 6), "task": ["a", "b c", "", "a"]}
    one, two = fresh[0](dict(observation)), loaded[0](dict(observation))
    for key in ("observation.state", TASK_EMBEDDING):
        assert torch.equal(one[key], two[key])
    chunk = torch.randn(4, 5, 3)
    assert torch.equal(fresh[1](chunk), loaded[1](chunk))


def test_missing_task_text_is_one_clear_line(make_config: MakeConfig) -> None:
    pre, _ = make_pre_post_processors(make_config(), dataset_stats=STATS)
    with pytest.raises(ValueError, match=r"no 'task' text.*train with --policy\.base\.task_dim=0") as caught:
        pre({"observation.state": torch.zeros(1, 6)})
    assert "\n" not in str(caught.value)


def test_a_single_task_policy_needs_no_text(make_config: MakeConfig) -> None:
    config = make_config({"base": CompactConfig(task_dim=0)})
    pre, _ = make_pre_post_processors(config, dataset_stats=STATS)
    assert TASK_EMBEDDING not in pre({"observation.state": torch.zeros(1, 6)})


def test_components_of_other_units_do_not_flatten_each_other() -> None:
    """Positions in metres beside currents in milliamperes: both have unit deviation after normalisation."""
    mean = torch.tensor([0.5, 0.0, -400.0])
    std = torch.tensor([0.014, 0.014, 300.0])
    floored = floor_deviations({"observation.state": {"mean": mean, "std": std}})["observation.state"]
    assert torch.equal(floored["std"], std)


@given(st.lists(st.sampled_from([1e-3, 1.0, 1e3, 1e6]), min_size=4, max_size=4))
def test_bounds_follow_the_units_of_each_component(units: list[float]) -> None:
    scale = torch.tensor(units)
    mean, std = torch.tensor([0.0, 1.0, -2.0, 0.3]), torch.tensor([1.0, 0.05, 0.04, 0.3])
    before = floor_deviations({"observation.state": {"mean": mean, "std": std}})
    after = floor_deviations({"observation.state": {"mean": mean * scale, "std": std * scale}})
    torch.testing.assert_close(after["observation.state"]["std"], before["observation.state"]["std"] * scale)


def test_components_that_hardly_vary_stay_small_when_they_move() -> None:
    """By hand: the largest deviation is .3, of which 1 % is .003."""
    stats = {
        # A position; a constant number; rounding around zero; one that varies by a thousandth of its magnitude, .1.
        "mean": torch.tensor([0.5, 1.0, 6e-7, 0.1]),
        "std": torch.tensor([0.3, 0.0, 1e-6, 1e-4]),
    }
    floored = floor_deviations({"observation.state": stats})["observation.state"]
    torch.testing.assert_close(floored["std"], torch.tensor([0.3, 0.003, 0.003, 0.001]), rtol=1e-4, atol=0)


def test_bounded_deviations_leave_the_original_alone() -> None:
    floored = floor_deviations(STATS)
    torch.testing.assert_close(
        floored["observation.state"]["std"], torch.tensor([2.0, 1.0, 0.5, 0.02, 0.02, 1.0])
    )
    assert torch.equal(floored["observation.state"]["mean"], STATS["observation.state"]["mean"])
    assert torch.equal(floored["action"]["std"], STATS["action"]["std"])
    assert STATS["observation.state"]["std"][3] == 1e-9
    assert floor_deviations(None) is None
