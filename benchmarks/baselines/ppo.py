"""PPO of stable-baselines3 with a Gaussian policy, cloned from the demonstrations first.

The policy sees the same normalised states as PI-RL's (mean and deviation of the demonstrations, clipped). The clone is
a plain regression of the Gaussian's mean; the deviation starts small, so that exploring does not undo it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from lerobot.utils.constants import OBS_STATE
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from lerobot_policy_pi_rl.envs.configuration_metaworld import ACTION_SIZE
from lerobot_policy_pi_rl.processor_pi_rl import floor_deviations
from lerobot_policy_pi_rl.runtime.environments import ChunkedVectorEnv
from lerobot_policy_pi_rl.runtime.seeds import TRAINING_SEEDS, stream

from .task import Course, Job, as_arrays


@dataclass(frozen=True)
class PPOSettings:
    """Defaults of stable-baselines3 2.9, except where a comment says otherwise.

    The three that decide (rollout, batch, learning rate) were chosen by hand on one seed: with the defaults the clone's
    success fell from 0.20 to 0.02 within 16,000 steps and stayed there.
    """

    # As many as PI-RL's actor has, in as many processes.
    num_envs: int = 32
    num_workers: int = 2
    # Steps per environment and rollout, together 8,192; by default 2,048 in all.
    n_steps: int = 256
    # By default 64.
    batch_size: int = 512
    n_epochs: int = 10
    # By default 3e-4.
    learning_rate: float = 1e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    # The default network has 64 and 64 units.
    hidden_dims: tuple[int, ...] = (256, 256)
    # Logarithm of the deviation of an action component at the start; by default 0, which would bury the clone in noise.
    log_std_init: float = -1.6
    # Rollouts at the start in which only the critic learns, as in PI-RL: a random one would undo the clone.
    critic_warmup: int = 2
    # States are clipped to this many deviations, as in PI-RL.
    state_clip: float = 8.0
    # Gradient steps, batch size and learning rate of the clone, as in PI-RL's supervised stage. Five times as many made
    # it worse.
    clone_steps: int = 200
    clone_batch_size: int = 256
    clone_learning_rate: float = 1e-3


class Normalizer:
    """Scales states by the mean and the deviation of the demonstrations.

    Args:
        state: Demonstrated states, `[T, S]`.
        clip: Largest absolute value of the result.
    """

    def __init__(self, state: np.ndarray, clip: float) -> None:
        stats = {OBS_STATE: {"mean": state.mean(axis=0), "std": state.std(axis=0)}}
        floored = floor_deviations(stats)
        assert floored is not None
        self._mean = np.asarray(floored[OBS_STATE]["mean"], dtype=np.float32)
        self._std = np.asarray(floored[OBS_STATE]["std"], dtype=np.float32)
        self._clip = clip

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """States `[N, S]`, scaled and clipped."""
        return np.clip((state - self._mean) / self._std, -self._clip, self._clip)


class MetaworldVecEnv(VecEnv):
    """Our vector of environments in the words of stable-baselines3.

    Args:
        envs: The environments.
        normalize: Scales their states.
        state_size: Length of a state.
        seed: Of their starts.
    """

    def __init__(self, envs: ChunkedVectorEnv, normalize: Normalizer, state_size: int, seed: int) -> None:
        self._envs, self._normalize = envs, normalize
        self._starts = stream(seed)
        super().__init__(
            envs.num_envs,
            spaces.Box(-np.inf, np.inf, (state_size,), dtype=np.float32),
            spaces.Box(-1.0, 1.0, (ACTION_SIZE,), dtype=np.float32),
        )

    def reset(self) -> np.ndarray:
        """Starts all episodes."""
        return self._normalize(self._envs.reset(self._seeds_of_starts())["agent_pos"])

    def step_async(self, actions: np.ndarray) -> None:
        """First half of a step."""
        self._envs.send(actions[:, None], self._seeds_of_starts())

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Second half of a step; ended episodes have been reset."""
        step = self._envs.receive()
        final = self._normalize(step.final_observation["agent_pos"])
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for number in np.flatnonzero(step.done):
            infos[number] = {
                "terminal_observation": final[number],
                "TimeLimit.truncated": bool(step.truncated[number]),
                "is_success": bool(step.success[number]),
            }
        return self._normalize(step.observation["agent_pos"]), step.reward, step.done, infos

    def close(self) -> None:
        """Ends the workers."""
        self._envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Environments in other processes have no attributes to show."""
        return [None] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not supported."""
        raise NotImplementedError("environments in other processes take no attributes")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Not supported."""
        raise NotImplementedError("environments in other processes take no calls")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """None is."""
        return [False] * self._count(indices)

    def _count(self, indices: Any) -> int:
        if indices is None:
            return self.num_envs
        return len(indices) if isinstance(indices, Sequence) else 1

    def _seeds_of_starts(self) -> np.ndarray:
        return np.asarray(self._starts.integers(*TRAINING_SEEDS, size=self.num_envs))


def make_model(env: MetaworldVecEnv, settings: PPOSettings, seed: int) -> PPO:
    """A PPO with a new network."""
    return PPO(
        "MlpPolicy",
        env,
        n_steps=settings.n_steps,
        batch_size=settings.batch_size,
        n_epochs=settings.n_epochs,
        learning_rate=settings.learning_rate,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        policy_kwargs={
            "net_arch": list(settings.hidden_dims),
            "activation_fn": nn.Tanh,
            "log_std_init": settings.log_std_init,
        },
        device="cpu",
        seed=seed,
    )


def actor_parameters(model: PPO) -> list[nn.Parameter]:
    """What the actor alone is made of: its layers, the output and the deviation."""
    policy = model.policy
    layers = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    return [*layers, policy.log_std]


def clone(model: PPO, state: Tensor, action: Tensor, settings: PPOSettings, seed: int) -> float:
    """Regresses the mean action on the demonstrations.

    Args:
        model: Its actor is trained.
        state: Normalised states, `[T, S]`.
        action: The expert's actions, `[T, A]`.
        settings: Steps, batch size and learning rate.
        seed: Of the batches.

    Returns:
        The loss of the last step.
    """
    optimizer = torch.optim.Adam(actor_parameters(model)[:-1], lr=settings.clone_learning_rate)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(settings.clone_steps):
        rows = torch.randint(len(state), (settings.clone_batch_size,), generator=generator)
        mean = model.policy.get_distribution(state[rows]).mode()
        loss = nn.functional.mse_loss(mean, action[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def describe() -> dict[str, Any]:
    """The settings, for the record."""
    return asdict(PPOSettings())


def train(job: Job) -> None:
    """Trains one policy and records its curve."""
    settings, demonstrations = PPOSettings(), as_arrays(job.dataset)
    normalize = Normalizer(demonstrations.state, settings.state_clip)
    with ChunkedVectorEnv(job.env_cfg, settings.num_envs, settings.num_workers) as workers:
        model = make_model(
            MetaworldVecEnv(workers, normalize, job.env_cfg.state_size, job.seed), settings, job.seed
        )
        began = time.perf_counter()
        state, action = (
            torch.from_numpy(normalize(demonstrations.state)),
            torch.from_numpy(demonstrations.action),
        )
        loss = clone(model, state, action, settings, job.seed)
        minutes = (time.perf_counter() - began) / 60
        print(f"clone: mean squared error {loss:.4f} after {60 * minutes:.1f} s", flush=True)
        course = Course(job.writer, job.envs, job.budget, *_keeper(model))
        improve(model, normalize, settings, course, round(minutes, 3))


def _keeper(model: PPO) -> tuple[Any, Any]:
    def save() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.policy.state_dict().items()}

    return save, model.policy.load_state_dict


def improve(
    model: PPO, normalize: Normalizer, settings: PPOSettings, course: Course, imitation_minutes: float
) -> None:
    """Runs PPO until the budget is used up."""

    def act(state: np.ndarray) -> np.ndarray:
        return model.predict(normalize(state), deterministic=True)[0]

    rollout = settings.n_steps * settings.num_envs
    course.visit(0, act)
    while not course.over(model.num_timesteps):
        warming_up = model.num_timesteps < settings.critic_warmup * rollout
        for parameter in actor_parameters(model):
            parameter.requires_grad_(not warming_up)
        # One rollout and one update.
        model.learn(rollout, reset_num_timesteps=False)
        course.visit(model.num_timesteps, act)
    course.finish(model.num_timesteps, act, imitation_minutes)
