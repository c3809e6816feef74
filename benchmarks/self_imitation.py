"""Filtered self-imitation, the control of the learning grids: act, keep the successes, train on them.

    python -m benchmarks.self_imitation --config_path=recipes/metaworld.json --policy.path=... \
        --dataset.repo_id=... --dataset.root=... --output_dir=...

It takes the command line of `lerobot-pi-rl-train`, the same environments, starts, validation and budget of
environment steps. There is no critic and no exploration noise: the policy acts by its ODE, whose initial noise is
drawn anew for every decision. It writes `metrics.jsonl` and the checkpoints `best` and `last`.
"""

import contextlib
import json
import time
from collections import deque
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import parser
from lerobot.utils.constants import ACTION, CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR
from torch import Tensor

from lerobot_policy_pi_rl.errors import config_error
from lerobot_policy_pi_rl.runtime.collector import Group, make_eval_groups, make_groups
from lerobot_policy_pi_rl.runtime.demonstrations import DemonstrationSource, for_loss
from lerobot_policy_pi_rl.runtime.evaluation import Turn, by_ode, evaluate, play
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig, Player, make_player, parts
from lerobot_policy_pi_rl.runtime.seeds import TRAINING_SEEDS, VALIDATION_SEED, stream
from lerobot_policy_pi_rl.scripts.console import run_command

# Gradient steps for each decision, rows of each step (half of them demonstrations), and the learning rate.
UPDATES_PER_DECISION, BATCH_SIZE, LR = 1.0, 256, 3e-4
# Environment steps between validations.
VALIDATE_EVERY = 15_000

# Columns of some decisions: tensors `[N, ...]`, and texts as lists.
Rows = dict[str, Any]


class Episodes:
    """Records decisions, and keeps those of solved episodes."""

    def __init__(self, player: Player) -> None:
        """Has no successes yet.

        Args:
            player: The policy.
        """
        self._player, self._act = player, by_ode(player)
        # Decisions whose outcome is not known yet, in the order in which they were made.
        self._pending: deque[tuple[torch.Generator, Rows]] = deque()
        self._running: dict[tuple[int, int], list[Rows]] = {}
        self._solved: set[tuple[int, int]] = set()
        self.successes: Rows | None = None

    def choose(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Acts by the ODE and notes the decision."""
        chunk = self._act(batch, generator)
        self._pending.append((generator, for_loss({**batch, ACTION: chunk})))
        return chunk

    def watch(self, turn: Turn) -> None:
        """Takes in one decision of every environment of a group."""
        generator, rows = self._pending.popleft()
        for env in turn.counted.nonzero()[0].tolist():
            key = id(generator), env
            one = self._player.policy.base.take(rows, torch.tensor([env]))
            self._running.setdefault(key, []).append(one)
            if turn.outcome.success[env]:
                self._solved.add(key)
            if turn.outcome.done[env]:
                self._end(key)

    def _end(self, key: tuple[int, int]) -> None:
        episode = self._running.pop(key)
        if key in self._solved:
            self._solved.remove(key)
            self.successes = join([self.successes, *episode] if self.successes else episode)


def join(parts_of_rows: list[Rows]) -> Rows:
    """Concatenates rows of the same columns."""
    joined = {}
    for key, first in parts_of_rows[0].items():
        columns = [part[key] for part in parts_of_rows]
        joined[key] = torch.cat(columns) if isinstance(first, Tensor) else list(chain(*columns))
    return joined


class Run:
    """A run of self-imitation: rounds of episodes, each followed by its gradient steps."""

    def __init__(self, cfg: PIRLTrainConfig, player: Player, output: Path) -> None:
        """Makes the optimizer.

        Args:
            cfg: Validated configuration, with a data set.
            player: The policy.
            output: Folder of metrics and checkpoints.
        """
        self._cfg, self._player, self._output = cfg, player, output
        self._demonstrations = DemonstrationSource(cfg, player)
        self._episodes = Episodes(player)
        self._parameters = [p for p in player.policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, LR, weight_decay=0.0)
        self._random = stream(cfg.seed or 0, 77)
        self._rounds = self.env_steps = self.decisions = 0
        self.best_success, self.best_round, self._validated_at = -1.0, 0, 0
        self._began = time.monotonic()

    def validate(self, groups: list[Group]) -> float:
        """Success on the validation starts, written to the metrics; keeps the best checkpoint."""
        starts = VALIDATION_SEED + np.arange(int(self._cfg.eval.n_episodes))
        success = float(evaluate(self._player, groups, starts).success.mean())
        self._validated_at = self.env_steps
        self._log({"eval/success": success})
        if success > self.best_success:
            self.best_success, self.best_round = success, self._rounds
            self.save("best")
        return success

    def round(self, groups: list[Group]) -> None:
        """One episode of every environment, then the gradient steps that its decisions are worth."""
        self._rounds += 1
        count = sum(group.envs.num_envs for group in groups)
        starts = self._random.integers(*TRAINING_SEEDS, size=count)
        before = len(self._episodes.successes[ACTION]) if self._episodes.successes else 0
        with torch.no_grad():
            found = play(
                self._player,
                groups,
                starts,
                self._episodes.choose,
                noise=(self._rounds,),
                watch=self._episodes.watch,
            )
        executed = self._player.policy.config.n_action_steps
        decisions = int(np.ceil(found.length / executed).sum())
        self.env_steps += found.env_steps
        self.decisions += decisions
        losses = [self._step() for _ in range(round(UPDATES_PER_DECISION * decisions))]
        kept = len(self._episodes.successes[ACTION]) if self._episodes.successes else 0
        self._log(
            {
                "rollout/success": float(found.success.mean()),
                "rollout/kept_decisions": kept - before,
                "self_imitation/loss": float(np.mean(losses)),
            }
        )

    def _step(self) -> float:
        demonstrations = self._demonstrations(BATCH_SIZE // 2)
        loss = self._player.policy.base.loss(demonstrations)
        if self._episodes.successes is not None:
            rows = torch.randint(len(self._episodes.successes[ACTION]), (BATCH_SIZE // 2,))
            own = self._player.policy.base.loss(self._player.policy.base.take(self._episodes.successes, rows))
            loss = (loss + own) / 2
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return float(loss.detach())

    @property
    def due(self) -> bool:
        """Whether it is time to validate."""
        return self.env_steps - self._validated_at >= VALIDATE_EVERY

    def _log(self, values: dict[str, float]) -> None:
        place = {
            "step": self._rounds,
            "progress/env_steps": self.env_steps,
            "progress/seconds": round(time.monotonic() - self._began, 1),
        }
        with (self._output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(place | values) + "\n")

    def save(self, link: str) -> None:
        """Writes a checkpoint that `lerobot-eval` loads, and points a link at it."""
        place = self._output / CHECKPOINTS_DIR / f"{self._rounds:06d}"
        for part in (self._player.policy, self._player.preprocessor, self._player.postprocessor):
            part.save_pretrained(place / PRETRAINED_MODEL_DIR)
        counters = {
            "env_steps": self.env_steps,
            "decisions": self.decisions,
            "version": self._rounds,
            "best_success": self.best_success,
            "best_version": self.best_round,
        }
        (place / "training_state").mkdir(exist_ok=True)
        (place / "training_state/counters.json").write_text(json.dumps(counters) + "\n", encoding="utf-8")
        name = self._output / CHECKPOINTS_DIR / link
        name.unlink(missing_ok=True)
        name.symlink_to(place.name)


@parser.wrap()
def imitate(cfg: PIRLTrainConfig) -> None:
    """Runs with a parsed configuration until the budget is used, or validation is as good as `stop_success`."""
    torch.set_num_threads(1)
    # Like an actor, it needs no algorithm of its own.
    cfg.is_actor = True
    output = Path(cfg.output_dir or "outputs/self_imitation")
    cfg.validate()
    if cfg.dataset is None:
        raise config_error("dataset.repo_id", "is missing; self-imitation trains on demonstrations, too")
    policy_cfg, algorithm, env = parts(cfg)
    with contextlib.ExitStack() as stack:
        # First of all, because it forks.
        groups = make_groups(env, algorithm.collection)
        eval_groups = make_eval_groups(env, algorithm.collection)
        for group in (*groups, *eval_groups):
            stack.callback(group.envs.close)
        output.mkdir(parents=True, exist_ok=True)
        run = Run(cfg, make_player(cfg), output)
        success, wanted = run.validate(eval_groups or groups), algorithm.stop_success
        while run.env_steps < policy_cfg.online_steps and not (wanted is not None and success >= wanted):
            run.round(groups)
            if run.due or run.env_steps >= policy_cfg.online_steps:
                success = run.validate(eval_groups or groups)
        run.save("last")


if __name__ == "__main__":
    run_command(imitate)
