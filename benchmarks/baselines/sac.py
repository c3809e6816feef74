"""LeRobot's own SAC with demonstrations in the offline buffer, around the `metaworld_state` environment.

Everything that learns is LeRobot's: `GaussianActorPolicy`, `SACAlgorithm`, `ReplayBuffer`, `OnlineOfflineMixer`,
`RLTrainer`, the processors and `step_env_and_process_transition`. Only the loop around them is ours, in one process:
LeRobot's actor command makes nothing but `gym_hil` and real robots (`make_robot_env`), so it cannot run MetaWorld, and
its learner needs that actor. `docs/baselines.md` lists what follows from this, and where the settings are from.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.configs import HILSerlRobotEnvConfig
from lerobot.lerobot_types import TransitionKey
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.policies.gaussian_actor.configuration_gaussian_actor import GaussianActorConfig, PolicyConfig
from lerobot.rl.algorithms.factory import make_algorithm
from lerobot.rl.algorithms.sac import SACAlgorithmConfig
from lerobot.rl.buffer import ReplayBuffer
from lerobot.rl.data_sources import OnlineOfflineMixer
from lerobot.rl.gym_manipulator import (
    make_processors,
    reset_and_build_transition,
    step_env_and_process_transition,
)
from lerobot.rl.trainer import RLTrainer
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.random_utils import set_seed
from lerobot.utils.transition import Transition

from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.seeds import TRAINING_SEEDS

from .task import Act, Course, Demonstrations, Job, as_arrays

# Narrowest range a state component is scaled by: a quaternion that was constant in the demonstrations must not explode.
MIN_RANGE = 0.1


@dataclass(frozen=True)
class SACSettings:
    """As LeRobot's example for simulation (`rl/gym_hil/train_config.json`), except where a comment says otherwise."""

    batch_size: int = 256
    # Share of every batch that comes from the online buffer; the rest are demonstrations.
    online_ratio: float = 0.5
    online_buffer_capacity: int = 100_000
    offline_buffer_capacity: int = 100_000
    online_step_before_learning: int = 100
    # Critic updates per update of the actor, which comes once per environment step.
    utd_ratio: int = 2
    # SACAlgorithmConfig's default. The example's 0.97 is meant for 10 steps a second; here they are 80, and a success
    # after 100 steps would be worth 0.05 at the start.
    discount: float = 0.99
    temperature_init: float = 0.01
    latent_dim: int = 64
    grad_clip_norm: float = 10.0
    std_max: float = 5.0


def state_ranges(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of every state component, moved apart where they are nearly equal.

    Args:
        state: Demonstrated states, `[T, S]`.

    Returns:
        Two arrays `[S]`, at least `MIN_RANGE` apart.
    """
    low, high = state.min(axis=0), state.max(axis=0)
    missing = np.maximum(MIN_RANGE - (high - low), 0) / 2
    return low - missing, high + missing


def policy_config(settings: SACSettings, demonstrations: Demonstrations) -> GaussianActorConfig:
    """The policy's configuration; states are scaled to [-1, 1] by their range in the demonstrations."""
    low, high = state_ranges(demonstrations.state)
    size = demonstrations.action.shape[1]
    return GaussianActorConfig(
        device="cpu",
        push_to_hub=False,
        dataset_stats={
            OBS_STATE: {"min": low.tolist(), "max": high.tolist()},
            ACTION: {"min": [-1.0] * size, "max": [1.0] * size},
        },
        latent_dim=settings.latent_dim,
        online_buffer_capacity=settings.online_buffer_capacity,
        offline_buffer_capacity=settings.offline_buffer_capacity,
        online_step_before_learning=settings.online_step_before_learning,
        policy_kwargs=PolicyConfig(std_max=settings.std_max),
    )


def algorithm_config(settings: SACSettings, policy: GaussianActorConfig) -> SACAlgorithmConfig:
    """The algorithm's configuration."""
    return SACAlgorithmConfig(
        policy_config=policy,
        discount=settings.discount,
        temperature_init=settings.temperature_init,
        utd_ratio=settings.utd_ratio,
        grad_clip_norm=settings.grad_clip_norm,
    )


class Agent:
    """LeRobot's learner without its server: policy, buffers and trainer.

    Args:
        settings: Hyperparameters.
        env_cfg: The environment.
        dataset: The demonstrations.
    """

    def __init__(self, settings: SACSettings, env_cfg: MetaworldStateEnv, dataset: LeRobotDataset) -> None:
        config = policy_config(settings, as_arrays(dataset))
        self.policy = make_policy(config, env_cfg=env_cfg).train()
        self.preprocessor, self.postprocessor = make_pre_post_processors(
            config, dataset_stats=config.dataset_stats
        )
        keys = list(config.input_features)
        self.online = ReplayBuffer(
            config.online_buffer_capacity, device="cpu", state_keys=keys, optimize_memory=True
        )
        offline = ReplayBuffer.from_lerobot_dataset(
            dataset,
            device="cpu",
            state_keys=keys,
            capacity=config.offline_buffer_capacity,
            optimize_memory=True,
        )
        self._trainer = RLTrainer(
            algorithm=make_algorithm(algorithm_config(settings, config), self.policy),
            data_mixer=OnlineOfflineMixer(self.online, offline, settings.online_ratio),
            batch_size=settings.batch_size,
            preprocessor=self.preprocessor,
        )
        self._before_learning = config.online_step_before_learning

    def learn(self, transition: Transition) -> None:
        """Stores one transition and makes one training step, once there are enough."""
        self.online.add(**transition)
        if len(self.online) >= self._before_learning:
            self._trainer.training_step()

    @torch.no_grad()
    def explore(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """A sampled action, `[1, A]`, in the environment's units."""
        action = self.policy.select_action(self.preprocessor.process_observation(observation))
        return self.postprocessor.process_action(action)

    @torch.no_grad()
    def act(self, state: np.ndarray) -> np.ndarray:
        """The mode of the policy: the squashed mean, which LeRobot's `select_action` does not offer."""
        observation = self.preprocessor.process_observation({OBS_STATE: torch.from_numpy(state)})
        mean = self.policy(observation)["action_mean"]
        return self.postprocessor.process_action(torch.tanh(mean)).numpy()

    def save(self) -> dict[str, torch.Tensor]:
        """A copy of the policy's weights."""
        return {name: value.clone() for name, value in self.policy.state_dict().items()}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes such a copy."""
        self.policy.load_state_dict(weights)


class Player:
    """One environment, stepped as LeRobot's actor steps it, with the processors of `gym_hil`.

    Args:
        env_cfg: The environment.
        seed: Of its starts.
    """

    def __init__(self, env_cfg: MetaworldStateEnv, seed: int) -> None:
        self._env = env_cfg.make_env(env_cfg.tasks[0])
        # Later resets continue this stream of starts.
        self._env.reset(seed=TRAINING_SEEDS[0] + seed)
        self._processors = make_processors(self._env, None, HILSerlRobotEnvConfig(name="gym_hil"), "cpu")
        self._now = reset_and_build_transition(self._env, *self._processors)

    def step(self, agent: Agent) -> Transition:
        """One environment step; a new episode begins where one ends."""
        state = self._now[TransitionKey.OBSERVATION]
        after = step_env_and_process_transition(self._env, self._now, agent.explore(state), *self._processors)
        done, truncated = after[TransitionKey.DONE], after[TransitionKey.TRUNCATED]
        transition = Transition(
            state=state,
            action=after[TransitionKey.COMPLEMENTARY_DATA]["teleop_action"],
            reward=after[TransitionKey.REWARD],
            next_state=after[TransitionKey.OBSERVATION],
            done=done,
            truncated=truncated,
            complementary_info=None,
        )
        ended = bool(done) or bool(truncated)
        self._now = reset_and_build_transition(self._env, *self._processors) if ended else after
        return transition

    def close(self) -> None:
        """Frees the environment."""
        self._env.close()


def describe() -> dict[str, Any]:
    """The settings, for the record."""
    return asdict(SACSettings())


def train(job: Job) -> None:
    """Trains one policy and records its curve."""
    set_seed(job.seed)
    agent, player = Agent(SACSettings(), job.env_cfg, job.dataset), Player(job.env_cfg, job.seed)
    course = Course(job.writer, job.envs, job.budget, agent.save, agent.load)
    act: Act = agent.act
    steps = 0
    course.visit(steps, act)
    while not course.over(steps):
        agent.learn(player.step(agent))
        steps += 1
        course.visit(steps, act)
    course.finish(steps, act)
    player.close()
