"""What X-VLA alone has: a clean action instead of a velocity, a sampler of its own, and grippers that are logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import LiberoEnv
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lerobot_policy_pi_rl.algorithm.losses import policy_loss
from lerobot_policy_pi_rl.bases.adapter import Context
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.flow.grid import time_grid
from lerobot_policy_pi_rl.flow.sampler import sample_ode
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.runtime.pipeline import check_features

from .conftest import CAMERA, CHUNK, PIXELS, STATE_DIM, stock_chunk_from

pytest.importorskip("transformers")

# Width of the state in each of LeRobot's action spaces, how many of its dimensions are executed, and its logits.
SPACES = {
    "ee6d": (20, 20, (9, 19)),
    "joint": (14, 14, (6, 13)),
    "so101_bimanual": (20, 12, (5, 11)),
    "agibot_ee6d": (20, 20, ()),
    "franka_joint7": (20, 7, ()),
    "auto": (8, 4, ()),
}
WITH_LOGITS = [name for name, (_, _, logits) in SPACES.items() if logits]
STEPS = 4

Batch = dict[str, Tensor]
MakeConfig = Callable[..., PIRLConfig]
MakePolicy = Callable[..., PIRLPolicy]


def in_space(space: str, **stock: Any) -> dict[str, Any]:
    """Settings of the stock policy for an action space, whose proprioception is as wide as its state."""
    width, real, _ = SPACES[space]
    action = {ACTION: PolicyFeature(FeatureType.ACTION, (real,))}
    return {"action_mode": space, "max_state_dim": width, "output_features": action, **stock}


@pytest.fixture
def make_policy(make_config: MakeConfig) -> MakePolicy:
    """Makes a policy in an action space, with random weights."""

    def make(space: str = "auto", stock: dict[str, Any] | None = None, **settings: Any) -> PIRLPolicy:
        torch.manual_seed(0)
        defaults = {"num_inference_steps": STEPS}
        config = make_config("xvla", in_space(space, **(stock or {})), **defaults | settings)
        policy = PIRLPolicy(config).eval()
        # Biases of a new head are zero.
        nn.init.normal_(policy.base._head.bias.weight)
        return policy

    return make


@pytest.fixture
def observation(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key not in (ACTION, "action_is_pad")}


def prediction(policy: PIRLPolicy, context: Context, x: Tensor, t: Tensor) -> Tensor:
    """What the stock network says, clean actions and logits."""
    return policy.base._predict(context, x, t)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("space", SPACES)
def test_the_chunk_is_what_the_stock_policy_executes(
    make_policy: MakePolicy, observation: Batch, space: str, steps: int
) -> None:
    width, real, _ = SPACES[space]
    policy, noise = make_policy(space, num_inference_steps=steps), torch.randn(2, CHUNK, width)
    chunk = policy.predict_action_chunk(dict(observation), noise=noise)
    assert chunk.shape == (2, CHUNK, real)
    assert torch.equal(chunk, stock_chunk_from(policy.base.policy, observation, noise))


def test_the_chunk_is_close_to_the_stock_policy_s_in_bfloat16(
    make_policy: MakePolicy, observation: Batch
) -> None:
    policy, noise = make_policy("ee6d", {"dtype": "bfloat16"}), torch.randn(2, CHUNK, 20)
    expected = stock_chunk_from(policy.base.policy, observation, noise)
    assert expected.dtype == torch.bfloat16
    chunk = policy.predict_action_chunk(dict(observation), noise=noise)
    # The sigmoid is taken in float32; everything else is the same.
    grippers = torch.tensor([9, 19])
    others = torch.tensor([dim for dim in range(20) if dim not in (9, 19)])
    assert torch.equal(chunk[..., others], expected[..., others].float())
    torch.testing.assert_close(chunk[..., grippers], expected[..., grippers].float(), rtol=0, atol=4e-3)


@pytest.mark.parametrize("stock", [{"empty_cameras": 1}, {"num_image_views": 3}])
def test_cameras_beyond_the_first_reach_every_step(
    make_policy: MakePolicy, observation: Batch, stock: dict[str, Any]
) -> None:
    second = "observation.images.wrist"
    pictures = {key: PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS)) for key in (CAMERA, second)}
    inputs = {**pictures, OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))}
    policy = make_policy("auto", {**stock, "input_features": inputs})
    seen = observation | {second: torch.rand(2, 3, PIXELS, PIXELS)}
    noise = torch.randn(2, CHUNK, 8)
    chunk = policy.predict_action_chunk(dict(seen), noise=noise)
    assert torch.equal(chunk, stock_chunk_from(policy.base.policy, seen, noise))
    other = seen | {second: torch.rand(2, 3, PIXELS, PIXELS)}
    for source in ("vlm", "expert"):
        one, two = (policy.base.critic_features(policy.encode(dict(o)), source) for o in (seen, other))
        assert not torch.equal(one, two)


def test_the_velocity_has_the_prediction_at_its_action_end(
    make_policy: MakePolicy, observation: Batch
) -> None:
    policy = make_policy("agibot_ee6d", num_inference_steps=10)
    with torch.no_grad():
        context, x = policy.encode(dict(observation)), torch.randn(2, CHUNK, 20)
        for t in time_grid(10)[:-1]:
            times = t.expand(2)
            velocity = policy.field(context, x, times).velocity
            assert velocity.isfinite().all()
            expected = prediction(policy, context, x, times)
            torch.testing.assert_close(x - t * velocity, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_exploration_ends_at_the_last_prediction(
    make_policy: MakePolicy, observation: Batch, space: str
) -> None:
    """Without noise, for every dimension, logits among them."""
    policy = make_policy(space)
    seen: list[tuple[Tensor, Tensor]] = []

    def field(x: Tensor, t: Tensor) -> Any:
        seen.append((x, t))
        return policy.field(context, x, t)

    with torch.no_grad():
        context = policy.encode(dict(observation))
        end = sample_ode(field, torch.randn(2, CHUNK, SPACES[space][0]), STEPS)
        torch.testing.assert_close(end, prediction(policy, context, *seen[-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("space", ["joint", "auto"])
def test_with_one_or_two_steps_euler_and_the_stock_sampler_are_one(
    make_policy: MakePolicy, observation: Batch, space: str, steps: int
) -> None:
    policy, noise = make_policy(space, num_inference_steps=steps), torch.randn(2, CHUNK, SPACES[space][0])
    with torch.no_grad():
        context = policy.encode(dict(observation))
        end = sample_ode(lambda x, t: policy.field(context, x, t), noise, steps)
    expected = stock_chunk_from(policy.base.policy, observation, noise)
    torch.testing.assert_close(policy.base.actions(end), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "deviation", "euler", "own"),
    [
        (2, 0.1, 0.099, 0.099),
        (4, 0.1, 0.281, 0.283),
        (10, 0.1, 0.617, 0.666),
        (2, 0.4, 0.345, 0.345),
        (4, 0.4, 0.649, 0.706),
        (10, 0.4, 0.848, 1.177),
    ],
)
def test_how_far_the_samplers_are_apart(
    make_policy: MakePolicy,
    observation: Batch,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    deviation: float,
    euler: float,
    own: float,
) -> None:
    """For actions from `N(0, s^2)` whatever is predicted is a multiple of the initial noise: the deviation."""
    policy, noise = make_policy("auto", num_inference_steps=steps), torch.ones(2, CHUNK, 8)

    def best(context: Context, x_t: Tensor, t: Tensor) -> Tensor:
        t, variance = t[:, None, None], deviation**2
        return (1 - t) * variance / (t**2 + (1 - t) ** 2 * variance) * x_t

    with torch.no_grad():
        # The features of this step, which nobody reads here, are still the network's.
        predict = policy.base._predict
        monkeypatch.setattr(policy.base, "_predict", lambda *given: predict(*given) * 0 + best(*given))
        context = policy.encode(dict(observation))
        end = sample_ode(lambda x, t: policy.field(context, x, t), noise, steps)
        shares = [float(x.mean()) / deviation for x in (end, policy.base.sample(context, noise, steps))]
    assert shares == pytest.approx([euler, own], abs=1e-3)


def test_both_samplers_find_an_action_that_does_not_depend_on_the_noise(
    make_policy: MakePolicy, observation: Batch
) -> None:
    policy, noise = make_policy("ee6d"), torch.randn(2, CHUNK, 20)
    nn.init.zeros_(policy.base._head.fc.weight)
    with torch.no_grad():
        context = policy.encode(dict(observation))
        end = sample_ode(lambda x, t: policy.field(context, x, t), noise, STEPS)
    chunk = policy.predict_action_chunk(dict(observation), noise=noise)
    torch.testing.assert_close(policy.base.actions(end), chunk, rtol=0, atol=1e-5)


def test_an_observation_is_encoded_once(
    make_policy: MakePolicy, observation: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, encoded = make_policy("ee6d", explorer=ExplorerConfig(recording="joint")), []
    vlm = policy.base.policy.model.forward_vlm
    monkeypatch.setattr(
        policy.base.policy.model, "forward_vlm", lambda *given: encoded.append(1) or vlm(*given)
    )
    policy.predict_action_chunk(dict(observation))
    assert len(encoded) == 1
    sample = policy.explore(dict(observation))
    assert len(encoded) == 2
    context = policy.encode(dict(observation))
    policy.score(context, sample.chain, sample.step)
    policy.base.critic_features(context, "expert")
    assert len(encoded) == 3


# Grippers that are logits


@pytest.mark.parametrize("space", SPACES)
def test_what_the_action_space_hides_from_the_network_is_a_logit(make_policy: MakePolicy, space: str) -> None:
    base = make_policy(space).base
    assert (base.action_dim, base.real_action_dim, base.logit_dims) == SPACES[space]


@pytest.mark.parametrize("kind", ["flow_sde", "flow_noise"])
@pytest.mark.parametrize("space", WITH_LOGITS)
def test_logits_score_as_they_were_sampled(
    make_policy: MakePolicy, observation: Batch, space: str, kind: str
) -> None:
    policy = make_policy(space, explorer=ExplorerConfig(kind))
    sample = policy.explore(dict(observation), torch.Generator().manual_seed(1))
    with torch.no_grad():
        scored = policy.score(policy.encode(dict(observation)), sample.chain, sample.step)
    torch.testing.assert_close(scored.log_prob, sample.log_prob, rtol=0, atol=1e-4)


def drawn(policy: PIRLPolicy, observation: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decisions whose noise was in the given step: their chunks, and the recorded states before and after it."""
    for seed in range(50):
        sample = policy.explore(dict(observation), torch.Generator().manual_seed(seed))
        if (sample.step == step).all():
            return sample.x, sample.chain[:, 0], sample.chain[:, 1]
    raise AssertionError("no seed draws this step for both rows")


@pytest.mark.parametrize("space", WITH_LOGITS)
def test_the_last_step_draws_logits_around_the_network_s(
    make_policy: MakePolicy, observation: Batch, space: str
) -> None:
    _, real, logits = SPACES[space]
    dims = list(logits)
    # Independent noise, so that each dimension's density can be written down.
    explorer = ExplorerConfig(noise_correlation=0.0, logit_std=0.9)
    policy = make_policy(space, explorer=explorer)
    x, before, after = drawn(policy, observation, STEPS - 1)
    times, step = torch.full((2,), 1 / STEPS), torch.full((2, 1), STEPS - 1)
    with torch.no_grad():
        context = policy.encode(dict(observation))
        scored = policy.score(context, torch.stack([before, after], 1), step)
        expected = torch.distributions.Normal(prediction(policy, context, before, times)[..., dims], 0.9)
    torch.testing.assert_close(scored.steps.mean[:, 0][..., dims], expected.mean, rtol=0, atol=1e-5)
    # What was drawn is what was scored and, through the stock sigmoid, what is executed.
    executed = policy.base.actions(x)
    assert torch.equal(executed[..., dims], after[..., dims].sigmoid())
    assert torch.equal(x, after)
    others = [dim for dim in range(real) if dim not in logits]
    mean, std = scored.steps.mean[:, 0], scored.steps.std[:, 0]
    rest = torch.distributions.Normal(mean[..., others], std[..., others]).log_prob(after[..., others])
    total = rest.sum(-1) + expected.log_prob(after[..., dims]).sum(-1)
    torch.testing.assert_close(scored.log_prob, total, rtol=0, atol=1e-3)


@pytest.mark.parametrize("step", range(STEPS))
def test_only_the_last_step_s_density_depends_on_logits(
    make_policy: MakePolicy, observation: Batch, step: int
) -> None:
    policy = make_policy("ee6d")
    _, before, after = drawn(policy, observation, step)
    chain, index = torch.stack([before, after], 1), torch.full((2, 1), step)
    with torch.no_grad():
        context = policy.encode(dict(observation))
        one = policy.score(context, chain, index).log_prob
        policy.base._head.bias.weight[:, [9, 19]] += 1.0
        two = policy.score(context, chain, index).log_prob
    assert torch.equal(one, two) is (step < STEPS - 1)


def test_noise_of_an_earlier_step_leaves_the_executed_logit_to_the_network(
    make_policy: MakePolicy, observation: Batch
) -> None:
    """Whatever the logits' dimensions hold before the last step, they are not seen and not executed."""
    policy = make_policy("ee6d")
    with torch.no_grad():
        context, state = policy.encode(dict(observation)), torch.randn(2, CHUNK, 20)
        moved = state.clone()
        moved[..., [9, 19]] += 3.0
        ends = [sample_ode(lambda x, t: policy.field(context, x, t), x, STEPS) for x in (state, moved)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


def test_a_thresholded_gripper_closes_about_as_often_as_its_sigmoid_says() -> None:
    logit = torch.linspace(-8, 8, 1001)
    closes = torch.distributions.Normal(0.0, ExplorerConfig().logit_std).cdf(logit)
    assert float((closes - logit.sigmoid()).abs().max()) < 0.01


@pytest.mark.slow
def test_what_is_explored_is_learnt_by_the_stock_policy(make_policy: MakePolicy) -> None:
    """Clipped policy gradients of Euler's path move X-VLA's own: grippers close, and joints find their place."""
    count, grippers = 64, [6, 13]
    policy = make_policy("joint", explorer=ExplorerConfig(recording="joint", noise_level=0.5))
    nn.init.zeros_(policy.base._head.bias.weight)
    nn.init.constant_(policy.base._head.bias.weight[:, grippers], -1.5)
    seen = {
        CAMERA: torch.rand(count, 3, PIXELS, PIXELS),
        OBS_STATE: torch.randn(count, STATE_DIM),
        OBS_LANGUAGE_TOKENS: torch.tensor([[4, 5, 6, 7]]).expand(count, 4),
    }

    def closed(action: Tensor) -> Tensor:
        return (action[..., grippers] > 0.5).float().mean((1, 2))

    def distance(action: Tensor) -> Tensor:
        return ((action[..., :6] - 0.5) ** 2).mean((1, 2))

    noise = torch.randn(count, CHUNK, 14)
    before = policy.predict_action_chunk(dict(seen), noise=noise)
    optimizer = torch.optim.Adam(policy.get_optim_params().values(), 1e-3)
    with torch.no_grad():
        context = policy.encode(dict(seen))
    for seed in range(40):
        sample = policy.explore(dict(seen), torch.Generator().manual_seed(seed))
        action = policy.base.actions(sample.x)
        reward = closed(action) - distance(action)
        advantage = (reward - reward.mean()) / reward.std()
        for _ in range(2):
            score = policy.score(context, sample.chain, sample.step)
            log_ratio = (score.log_prob - sample.log_prob).sum(1)
            optimizer.zero_grad()
            policy_loss(log_ratio, advantage, 0.2).loss.backward()
            optimizer.step()
    after = policy.predict_action_chunk(dict(seen), noise=noise)
    assert float(closed(before).mean()) < 0.2
    assert float(closed(after).mean()) > 0.9
    assert float(distance(after).mean()) < 0.5 * float(distance(before).mean())


# What cannot work, in one line


@pytest.mark.parametrize(
    ("space", "stock", "settings", "line"),
    [
        (
            "ee6d",
            {},
            {"explorer": ExplorerConfig("flow_cps")},
            r"explorer.kind.*flow_cps has no noise in its last",
        ),
        ("auto", {"florence_config": {}}, {}, "base.florence_config.*is empty.*policy.base_path"),
        ("auto", {"action_mode": "ee7d"}, {}, "base.action_mode.*'ee7d' is unknown; choose one of .*'ee6d'"),
        (
            "franka_joint7",
            {"output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (9,))}},
            {},
            "output_features.*9 actions, but X-VLA's action space 'franka_joint7' has 7",
        ),
    ],
)
def test_settings_that_cannot_work(
    make_policy: MakePolicy, space: str, stock: dict[str, Any], settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        make_policy(space, stock, **settings)
    assert "\n" not in str(error.value)


def test_flow_cps_explores_where_there_are_no_logits(make_policy: MakePolicy, observation: Batch) -> None:
    policy = make_policy("auto", explorer=ExplorerConfig("flow_cps"))
    sample = policy.explore(dict(observation))
    with torch.no_grad():
        scored = policy.score(policy.encode(dict(observation)), sample.chain, sample.step)
    torch.testing.assert_close(scored.log_prob, sample.log_prob, rtol=0, atol=1e-4)


def test_libero_is_refused(make_policy: MakePolicy) -> None:
    """LeRobot chooses LIBERO's processors by the class of the policy's configuration, which is ours."""
    with pytest.raises(ConfigError, match=r"env.type.*between LIBERO and X-VLA") as error:
        check_features(make_policy().config, LiberoEnv(), {})
    assert "\n" not in str(error.value)


# Checkpoints


def test_a_checkpoint_in_the_older_layout_is_taken_over(
    save_stock: Callable[[str], Path], observation: Batch
) -> None:
    """As those on the hub are: names and shapes of Microsoft's Florence-2."""
    folder = save_stock("xvla")
    noise = torch.randn(2, CHUNK, 8)
    expected = PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu")).predict_action_chunk(
        dict(observation), noise=noise
    )
    file = folder / "model.safetensors"
    older = {}
    for name, value in load_file(file).items():
        if name.endswith("image_projection.weight"):
            older["model.vlm.image_projection"] = value.T.contiguous()
        else:
            older[name.replace(".language_model.", ".language_model.model.")] = value
    save_file(older, file)
    policy = PIRLPolicy(PIRLConfig(base_path=str(folder), device="cpu"))
    assert torch.equal(policy.predict_action_chunk(dict(observation), noise=noise), expected)
