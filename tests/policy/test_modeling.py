"""The policy: acting is the ODE, exploring and scoring agree, and a checkpoint is the same policy."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.common.flow_matching import euler_integrate
from torch import Tensor

from lerobot_policy_pi_rl.bases.configuration import TASK_EMBEDDING, CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy

MakePolicy = Callable[..., PIRLPolicy]
Batch = dict[str, Tensor]

EXPLORERS = [
    (kind, recording) for kind in ("flow_sde", "flow_cps", "flow_noise") for recording in ("hybrid", "joint")
]


def euler(policy: PIRLPolicy, batch: Batch, noise: Tensor) -> Tensor:
    """K Euler steps of the base's velocity from noise to action, as LeRobot's policies take them."""
    with torch.no_grad():
        context = policy.base.encode(batch)
        return euler_integrate(
            lambda x, t: policy.base.velocity(context, x, t).velocity,
            noise,
            policy.config.num_inference_steps,
        )


def randomise_noise_network(policy: PIRLPolicy, scale: float) -> None:
    """Moves the noise network away from its start."""
    with torch.no_grad():
        for parameter in policy.noise_network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))


@pytest.mark.parametrize("num_steps", [1, 3, 4])
@pytest.mark.parametrize("kind", ["flow_sde", "flow_noise"])
def test_acting_is_the_base_s_own_euler_loop_to_the_bit(
    make_policy: MakePolicy, batch: Batch, kind: str, num_steps: int
) -> None:
    policy = make_policy({"num_inference_steps": num_steps}, kind=kind)
    noise = torch.randn(16, 5, 3)
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), euler(policy, batch, noise))


def test_acting_draws_its_own_noise_and_leaves_training_mode(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy().train()
    torch.manual_seed(7)
    chunk = policy.predict_action_chunk(batch)
    torch.manual_seed(7)
    assert torch.equal(chunk, euler(policy, batch, torch.randn(16, 5, 3)))
    assert not policy.training
    assert not chunk.requires_grad


def test_select_action_works_off_a_chunk_and_then_asks_for_the_next(
    make_policy: MakePolicy, batch: Batch
) -> None:
    policy = make_policy({"n_action_steps": 3})
    torch.manual_seed(7)
    taken = torch.stack([policy.select_action(batch) for _ in range(7)], 1)
    torch.manual_seed(7)
    chunks = [policy.predict_action_chunk(batch) for _ in range(3)]
    assert torch.equal(taken, torch.cat([chunks[0][:, :3], chunks[1][:, :3], chunks[2][:, :1]], 1))


def test_reset_forgets_the_rest_of_the_chunk(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy()
    policy.select_action(batch)
    policy.reset()
    noise = torch.randn(16, 5, 3)
    assert torch.equal(policy.select_action(batch, noise=noise), euler(policy, batch, noise)[:, 0])


@pytest.mark.parametrize(("kind", "recording"), EXPLORERS)
def test_the_ratio_is_1_when_the_same_weights_score(
    make_policy: MakePolicy, batch: Batch, kind: str, recording: str
) -> None:
    policy = make_policy(kind=kind, recording=recording)
    sample = policy.explore(batch, torch.Generator().manual_seed(2))
    scored = policy.score(policy.encode(batch), sample.chain, sample.step)
    assert sample.step.shape == (16, policy.recorded_steps())
    assert sample.chain.shape == (16, policy.recorded_steps() + 1, 5, 3)
    assert ((scored.log_prob - sample.log_prob).sum(1).exp() - 1).abs().max() < 1e-4


def test_scoring_does_not_depend_on_the_other_rows(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy()
    sample = policy.explore(batch)
    rows = torch.tensor([3, 9])
    context = policy.encode({key: value[rows] for key, value in batch.items()})
    part = policy.score(context, sample.chain[rows], sample.step[rows])
    torch.testing.assert_close(part.log_prob, sample.log_prob[rows], rtol=0, atol=1e-4)


def test_exploring_is_repeatable_and_leaves_no_gradient(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy()
    one, two = (policy.explore(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.x, two.x)
    assert not one.log_prob.requires_grad


def test_learned_deviation_starts_in_the_middle_of_its_range(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy(kind="flow_noise", noise_std_min=0.04, noise_std_max=0.16)
    std = policy.field(policy.encode(batch), torch.randn(16, 5, 3), torch.ones(16)).std
    torch.testing.assert_close(std, torch.full((16, 5, 3), 0.08))


def test_learned_deviation_never_leaves_its_range(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy(kind="flow_noise")
    randomise_noise_network(policy, 10.0)
    std = policy.field(policy.encode(batch), 10 * torch.randn(16, 5, 3), torch.ones(16)).std
    torch.testing.assert_close(std.min(), torch.tensor(0.15))
    torch.testing.assert_close(std.max(), torch.tensor(0.6))


def test_learned_deviation_becomes_different_for_every_row_chunk_step_and_dimension(
    make_policy: MakePolicy, batch: Batch
) -> None:
    policy = make_policy(kind="flow_noise")
    sample = policy.explore(batch)
    optimizer = torch.optim.Adam(policy.noise_network.parameters(), lr=1e-2)
    weight = torch.randn(16, 5)
    # The layers start at zero one behind the other, so the chunk steps part at the second gradient step.
    for _ in range(3):
        optimizer.zero_grad()
        (weight * policy.score(policy.encode(batch), sample.chain, sample.step).log_prob).sum().backward()
        optimizer.step()
    std = policy.field(policy.encode(batch), sample.chain[:, 0], torch.ones(16)).std
    assert all(std.std(axis).min() > 0 for axis in range(3))


def test_learned_deviation_sends_no_gradient_into_the_base(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy(kind="flow_noise")
    randomise_noise_network(policy, 0.3)
    sample = policy.explore(batch)
    policy.score(policy.encode(batch), sample.chain, sample.step).entropy.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in policy.noise_network.parameters())


def test_log_probability_sends_gradients_into_base_and_noise_network(
    make_policy: MakePolicy, batch: Batch
) -> None:
    policy = make_policy(kind="flow_noise")
    randomise_noise_network(policy, 0.3)
    sample = policy.explore(batch)
    policy.score(policy.encode(batch), sample.chain, sample.step).log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_only_flow_noise_has_parameters_of_its_own(make_policy: MakePolicy) -> None:
    assert make_policy(kind="flow_sde").noise_network is None
    assert make_policy(kind="flow_cps").noise_network is None
    policy = make_policy(kind="flow_noise")
    supervised = {id(p) for p in policy.get_optim_params()}
    assert supervised == {id(p) for p in policy.base.parameters()}


@pytest.mark.parametrize("kind", ["flow_sde", "flow_noise"])
def test_a_checkpoint_is_the_same_policy(
    make_policy: MakePolicy, batch: Batch, tmp_path: Path, kind: str
) -> None:
    policy = make_policy(
        {"num_inference_steps": 3, "chunk_size": 6, "n_action_steps": 4},
        kind=kind,
        noise_level=0.3,
        noise_correlation=0.25,
        noise_std_max=0.2,
    )
    policy.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    loaded = PIRLPolicy.from_pretrained(tmp_path)
    assert isinstance(config, PIRLConfig)
    for read in (config, loaded.config):
        read.pretrained_path = policy.config.pretrained_path
        assert read == policy.config
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in policy.state_dict().items())
    noise = torch.randn(16, 6, 3)
    assert torch.equal(
        loaded.predict_action_chunk(batch, noise=noise), policy.predict_action_chunk(batch, noise=noise)
    )


def test_a_supervised_checkpoint_refuses_to_load_into_another_size(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    make_policy().save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.base = CompactConfig(hidden_dim=16, num_blocks=1, time_dim=8, task_dim=8)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PIRLPolicy.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("size", [(96, 96), (48, 80), (240, 320)])
def test_images_of_any_size_go_through_the_convolutional_encoder(
    make_policy: MakePolicy, batch: Batch, size: tuple[int, int]
) -> None:
    cameras = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *size))
        for name in ("top", "wrist")
    }
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (6,))}
    policy = make_policy({"input_features": cameras | state})
    images = {name: torch.rand(16, 3, *size) for name in cameras}
    seen = batch | images | {"action": torch.randn(16, 5, 3)}
    loss, _ = policy.forward(seen)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.base.parameters())
    features = policy.base.critic_features(policy.encode(seen))
    assert features.shape == (16, policy.base.critic_dims["observation"]) == (16, 6 + 8 + 2 * 16)
    assert features.requires_grad
    noise = torch.randn(16, 5, 3)
    other = seen | {"observation.images.wrist": torch.rand(16, 3, *size)}
    one, two = (policy.predict_action_chunk(x, noise=noise) for x in (seen, other))
    assert not torch.equal(one, two)


def test_the_task_embedding_changes_the_actions(make_policy: MakePolicy, batch: Batch) -> None:
    policy, noise = make_policy(), torch.randn(16, 5, 3)
    other = batch | {TASK_EMBEDDING: batch[TASK_EMBEDDING].flip(0)}
    one, two = (policy.predict_action_chunk(x, noise=noise) for x in (batch, other))
    assert not torch.equal(one, two)


def test_far_out_states_are_clipped(make_policy: MakePolicy, batch: Batch) -> None:
    policy = make_policy()
    far, further = (batch | {"observation.state": torch.full((16, 6), value)} for value in (8.0, 800.0))
    assert torch.equal(
        policy.base.critic_features(policy.encode(far)), policy.base.critic_features(policy.encode(further))
    )


def test_padded_chunk_steps_carry_no_supervised_error(make_policy: MakePolicy, batch: Batch) -> None:
    """The last layer's bias of a padded step gets no gradient, that of a real one does."""
    policy = make_policy()
    padded = torch.zeros(16, 5, dtype=torch.bool)
    padded[:, 3:] = True
    loss, _ = policy.forward(batch | {"action": torch.randn(16, 5, 3), "action_is_pad": padded})
    loss.backward()
    gradient = policy.base.leave.bias.grad.view(5, 3)
    assert gradient[:3].all()
    assert not gradient[3:].any()


def test_supervised_training_learns_a_conditional_distribution(make_policy: MakePolicy) -> None:
    """Actions `tanh` of the state with deviation .1: the chunk's error falls near it, from about the spread of x_1."""
    policy = make_policy({"base": CompactConfig(hidden_dim=64, num_blocks=1, task_dim=0)})
    optimizer = torch.optim.Adam(policy.get_optim_params(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> tuple[Batch, Tensor]:
        state = torch.randn(rows, 6, generator=generator)
        return {"observation.state": state}, state[:, None, :3].tanh().expand(-1, 5, -1)

    def error() -> float:
        seen, wanted = draw(500)
        return float((policy.predict_action_chunk(seen) - wanted).square().mean().sqrt())

    before, losses = error(), []
    for _ in range(300):
        seen, wanted = draw(128)
        policy.train()
        loss, _ = policy.forward(
            seen | {"action": wanted + 0.1 * torch.randn(wanted.shape, generator=generator)}
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert error() < 0.35 < 0.8 < before
