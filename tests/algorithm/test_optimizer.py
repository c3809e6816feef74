"""AdamW on float32 copies of weights in bfloat16."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from torch import Tensor, nn
from torch.optim import AdamW

from lerobot_policy_pi_rl.algorithm import optimizer as optimizers
from lerobot_policy_pi_rl.algorithm import pi_rl
from lerobot_policy_pi_rl.algorithm.optimizer import PreciseAdam

from .conftest import MakeAlgorithm

# Far below the rounding of a weight near 1 in bfloat16, 1/256.
SMALL = 1e-4


def weights(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((1 + torch.rand(size, generator=generator)).to(dtype)) for size in (7, 3)]


def gradients(count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [[torch.randn(7, generator=generator), torch.randn(3, generator=generator)] for _ in range(count)]


def follow(optimizer: AdamW, trained: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for step in steps:
        optimizer.zero_grad()
        for weight, gradient in zip(trained, step, strict=True):
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()


def test_in_float32_it_is_adam_to_the_bit() -> None:
    ours, plain = weights(torch.float32), weights(torch.float32)
    optimizer = PreciseAdam(ours, lr=1e-2)
    follow(optimizer, ours, gradients(5))
    follow(AdamW(plain, lr=1e-2, fused=True, weight_decay=0.0), plain, gradients(5))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_small_steps_add_up_in_bfloat16() -> None:
    ours, plain, exact = weights(torch.bfloat16), weights(torch.bfloat16), weights(torch.bfloat16)
    exact = [nn.Parameter(weight.detach().float()) for weight in exact]
    downhill = [[torch.ones(7), torch.ones(3)]] * 100
    follow(PreciseAdam(ours, lr=SMALL), ours, downhill)
    follow(AdamW(plain, lr=SMALL, fused=True, weight_decay=0.0), plain, downhill)
    follow(AdamW(exact, lr=SMALL, fused=True, weight_decay=0.0), exact, downhill)
    for start, a, b, c in zip(weights(torch.bfloat16), ours, plain, exact, strict=True):
        # Nothing has happened without the copies: that is what they are for.
        assert torch.equal(b, start)
        assert torch.equal(a, c.to(torch.bfloat16))
        assert (a < start).all()


def test_parts_of_a_minibatch_add_up_in_bfloat16() -> None:
    (weight,) = trained = [nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]
    optimizer = PreciseAdam(trained, lr=SMALL)
    for _ in range(1000):
        (weight * 1.0).sum().backward()
        optimizer.gather()
    (copy,) = optimizer.param_groups[0]["params"]
    assert copy.grad.item() == 1000
    assert weight.grad is None
    optimizer.zero_grad()
    assert copy.grad is None


def test_a_weight_without_a_gradient_stays() -> None:
    first, second = trained = weights(torch.bfloat16)
    before = second.detach().clone()
    optimizer = PreciseAdam(trained, lr=0.1)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before)
    assert not torch.equal(first, weights(torch.bfloat16)[0])


@pytest.mark.parametrize("done", [0, 3])
def test_lerobot_saves_and_loads_the_copies(tmp_path: Path, done: int) -> None:
    trained, steps = weights(torch.bfloat16), gradients(6)
    optimizer = PreciseAdam(trained, lr=SMALL)
    follow(optimizer, trained, steps[:done])
    save_optimizer_state({"policy": optimizer}, tmp_path)
    resumed = [nn.Parameter(weight.detach().clone()) for weight in trained]
    follow(optimizer, trained, steps[done:])
    again = PreciseAdam(resumed, lr=1.0)
    load_optimizer_state({"policy": again}, tmp_path)
    follow(again, resumed, steps[done:])
    ours, theirs = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert all(torch.equal(ours[n][key], theirs[n][key]) for n in ours for key in ours[n])
    assert all(torch.equal(a, b) for a, b in zip(trained, resumed, strict=True))


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[nn.Parameter]], PreciseAdam]:
    """An optimizer whose copies lie elsewhere; there is one device here, so that they only are other tensors."""

    def make(trained: list[nn.Parameter]) -> PreciseAdam:
        with monkeypatch.context() as changed:
            changed.setattr(optimizers, "_is_elsewhere", lambda weight, device: True)
            return PreciseAdam(trained, lr=1e-2, device="cpu")

    return make


def test_offloaded_it_is_adam_to_the_bit(offloaded: Callable[[list[nn.Parameter]], PreciseAdam]) -> None:
    ours, plain, steps = weights(torch.float32), weights(torch.float32), gradients(5)
    made = offloaded(ours)
    follow(made, ours, steps)
    assert all(weight not in set(made.param_groups[0]["params"]) for weight in ours)
    # Nothing of a gradient stays with the weights.
    assert all(weight.grad is None for weight in ours)
    follow(AdamW(plain, lr=1e-2, fused=True, weight_decay=0.0), plain, steps)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False], ids=["to the device", "from the device"])
def test_a_run_may_go_on_with_or_without_offloading(
    tmp_path: Path,
    offloaded: Callable[[list[nn.Parameter]], PreciseAdam],
    dtype: torch.dtype,
    first: bool,
) -> None:
    def make(trained: list[nn.Parameter], elsewhere: bool) -> PreciseAdam:
        return offloaded(trained) if elsewhere else PreciseAdam(trained, lr=1e-2)

    trained, steps = weights(dtype), gradients(6)
    before = make(trained, first)
    follow(before, trained, steps[:3])
    save_optimizer_state({"policy": before}, tmp_path)
    resumed = [nn.Parameter(weight.detach().clone()) for weight in trained]
    after = make(resumed, not first)
    load_optimizer_state({"policy": after}, tmp_path)
    follow(before, trained, steps[3:])
    follow(after, resumed, steps[3:])
    assert all(torch.equal(a, b) for a, b in zip(trained, resumed, strict=True))
    # A copy that nobody needs is not carried along.
    if dtype == torch.float32:
        assert ("weight" in after.state_dict()["state"][0]) == (not first)


def test_the_policy_s_optimizer_is_offloaded_if_it_is_to_be(make_algorithm: MakeAlgorithm) -> None:
    with patch.object(pi_rl, "PreciseAdam", wraps=PreciseAdam) as made:
        for offload, device in ((False, None), (True, "cpu")):
            make_algorithm(offload_optimizer=offload)
            policy, _ = made.call_args_list[-2:]
            assert policy.kwargs["device"] == device


# Adam's constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_and_constants_are_those_of_adamw_to_the_bit(dtype: torch.dtype) -> None:
    """In bfloat16 on the copies: a decay of 1e-4 of a weight near 1 would be rounded away there."""
    ours = weights(dtype)
    plain = [nn.Parameter(weight.detach().float()) for weight in ours]
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.01}
    # Gradients that bfloat16 can hold, so that both see the same ones.
    steps = [[gradient.to(torch.bfloat16).float() for gradient in step] for step in gradients(20)]
    follow(PreciseAdam(ours, **settings), ours, steps)
    follow(AdamW(plain, **settings, fused=True), plain, steps)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(ours, plain, strict=True))


def test_both_optimizers_have_the_constants_of_the_settings(make_algorithm: MakeAlgorithm) -> None:
    constants = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    algorithm = make_algorithm(adam_betas=(0.8, 0.9), adam_eps=1e-3, weight_decay=0.1)
    default = make_algorithm()
    for name, optimizer in algorithm.optimizers.items():
        assert {key: optimizer.defaults[key] for key in constants} == constants
        plain = default.optimizers[name].defaults
        assert (plain["betas"], plain["eps"], plain["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)


def test_a_checkpoint_s_constants_give_way_to_those_of_the_settings(
    make_algorithm: MakeAlgorithm, tmp_path: Path
) -> None:
    saved, resumed = make_algorithm(adam_eps=1e-5), make_algorithm(weight_decay=0.1)
    save_optimizer_state(saved.optimizers, tmp_path)
    load_optimizer_state(resumed.optimizers, tmp_path)
    resumed.set_rates(1e-4)
    for optimizer in resumed.optimizers.values():
        (group,) = optimizer.param_groups
        assert (group["eps"], group["weight_decay"]) == (1e-8, 0.1)
