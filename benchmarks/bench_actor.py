"""Environment steps per second of our actor over one environment driven step by step, as LeRobot's stock actor does.

All have the same policy and processors, one torch thread, and take turns of whole episodes. The stock actor
(`lerobot.rl.actor.act_with_policy`) cannot run this policy or environment itself, so its loop is repeated here with the
functions that it calls: preprocess, `select_action` (a new chunk when the last one is used up), postprocess,
`step_env_and_process_transition`, keep the transition. Its waiting for the control rate is left out.

It is measured twice: around MetaWorld's own simulation, which is what there is without this package, and around the
fast one, which leaves only what the actor itself gains.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_environment import make_stock
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import HILSerlRobotEnvConfig
from lerobot.lerobot_types import TransitionKey
from lerobot.rl.gym_manipulator import (
    make_processors,
    reset_and_build_transition,
    step_env_and_process_transition,
)
from lerobot.utils.transition import Transition
from untrained import save_untrained

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.collector import Collector, Group, make_groups
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, Player, make_player

RECIPE = Path(__file__).parent.parent / "recipes/metaworld.json"
TARGET = 5.0
ROUNDS = 10
# Episodes of every environment in a turn; no untrained policy solves one early.
EPISODES = 1


class StockSimulation:
    """MetaWorld's own simulation in the place of the fast one; what it gives is the same to the bit."""

    def __init__(self, task: str) -> None:
        self._env = make_stock(task)
        self.reseed, self.reset, self.step, self.close = (
            self._env.seed,
            self._env.reset,
            self._env.step,
            self._env.close,
        )


class StockActor:
    """One environment, one action at a time, with LeRobot's own functions for a step and its own processors."""

    def __init__(self, player: Player, env_cfg: MetaworldStateEnv, fast: bool) -> None:
        self._player, self._env = player, env_cfg.make_env(env_cfg.tasks[0])
        if not fast:
            self._env._simulation = StockSimulation(env_cfg.tasks[0])
        self._task = [self._env.task_description]
        self._processors = make_processors(self._env, None, HILSerlRobotEnvConfig(name="gym_hil"), "cpu")
        self.policy_seconds = 0.0

    @torch.no_grad()
    def steps_per_second(self, episodes: int) -> float:
        """Plays some episodes."""
        start, steps = time.perf_counter(), 0
        for _ in range(episodes):
            transition = reset_and_build_transition(self._env, *self._processors)
            self._player.policy.reset()
            kept: list[Transition] = []
            while not transition[TransitionKey.DONE] | transition[TransitionKey.TRUNCATED]:
                observation = transition[TransitionKey.OBSERVATION]
                action = self._act(observation)
                transition = step_env_and_process_transition(self._env, transition, action, *self._processors)
                kept.append(
                    Transition(
                        state=observation,
                        action=action,
                        reward=transition[TransitionKey.REWARD],
                        next_state=transition[TransitionKey.OBSERVATION],
                        done=transition[TransitionKey.DONE],
                        truncated=transition[TransitionKey.TRUNCATED],
                        complementary_info={},
                    )
                )
            steps += len(kept)
        return steps / (time.perf_counter() - start)

    def _act(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """The next action, `[1, A]`."""
        start, player = time.perf_counter(), self._player
        action = player.postprocessor(player.policy.select_action(player.preprocess(observation, self._task)))
        self.policy_seconds += time.perf_counter() - start
        return action

    def close(self) -> None:
        """Frees the environment."""
        self._env.close()


class OurActor(Collector):
    """The collector of an actor, with a clock on its thinking."""

    deciding_seconds = 0.0

    def steps_per_second(self, collections: int) -> float:
        """Collects some quotas."""
        start = time.perf_counter()
        steps = sum(self.collect(version=0).statistics.env_steps for _ in range(collections))
        return steps / (time.perf_counter() - start)

    def _decide(self, group: Group):
        start = time.perf_counter()
        decided = super()._decide(group)
        self.deciding_seconds += time.perf_counter() - start
        return decided


@contextlib.contextmanager
def contestants(
    env_cfg: MetaworldStateEnv, collection: CollectionConfig
) -> Iterator[tuple[OurActor, StockActor, StockActor]]:
    """Builds the actors around one policy: ours, and the stock one around MetaWorld's and the fast simulation."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # First of all, because it forks.
        groups = make_groups(env_cfg, collection)
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        path = save_untrained(Path(folder), env_cfg)
        config = PreTrainedConfig.from_pretrained(path)
        config.pretrained_path = path
        player = make_player(
            PIRLTrainConfig(policy=config, env=env_cfg, algorithm=PIRLAlgorithmConfig(), seed=0)
        )
        ours = OurActor(player, groups, collection, seed=0)
        stocks = [StockActor(player, env_cfg, fast) for fast in (False, True)]
        for actor in (ours, *stocks):
            stack.callback(actor.close)
        ours.restart(version=0)
        yield ours, *stocks


def run(quick: bool = False) -> list[dict]:
    """Rows of the benchmark table.

    Args:
        quick: Few rounds.
    """
    env_cfg = MetaworldStateEnv(task=json.loads(RECIPE.read_text(encoding="utf-8"))["env"]["task"])
    collection = CollectionConfig()
    with contestants(env_cfg, collection) as actors:
        ours, stock, stock_on_fast = actors
        actions = stock._player.policy.config.n_action_steps
        # Quotas are no whole number of episodes: two and a half of them make one.
        quotas = -(-EPISODES * env_cfg.episode_length // (actions * collection.decisions))
        turns = [(ours, quotas), (stock, EPISODES), (stock_on_fast, EPISODES)]
        for actor, _ in turns:
            actor.steps_per_second(1)
        ours.deciding_seconds = stock_on_fast.policy_seconds = 0.0
        rounds = 3 if quick else ROUNDS
        speeds = [[actor.steps_per_second(count) for actor, count in turns] for _ in range(rounds)]
        decisions = rounds * quotas * collection.decisions * collection.num_envs
        steps = rounds * EPISODES * env_cfg.episode_length
        deciding = 1e3 * ours.deciding_seconds / decisions
        acting = 1e3 * stock_on_fast.policy_seconds / steps
    medians = [statistics.median(column) for column in zip(*speeds, strict=True)]

    def over(number: int, name: str, target: float | None) -> dict:
        return {
            "name": f"our actor over a stock one, {name}",
            "value": statistics.median(row[0] / row[number] for row in speeds),
            "unit": "x",
            "target": target,
            "detail": (
                f"{medians[0]:,.0f} against {medians[number]:,.0f} steps/s; {collection.num_envs} environments in "
                f"{collection.num_workers} workers against one, {rounds} rounds"
            ),
        }

    return [
        over(1, "with MetaWorld's environment", TARGET),
        over(2, "with our fast environment", None),
        {
            "name": "thinking per environment step, stock over ours",
            "value": acting * actions / deciding,
            "unit": "x",
            "detail": f"{1e3 * deciding / actions:.0f} against {1e3 * acting:.0f} us of processors and policy",
        },
    ]
