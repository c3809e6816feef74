"""`lerobot-pi-rl-learner`: trains a flow policy from what actors collect."""

import os

import torch
from lerobot.configs import parser

from ..bases.configuration import STOCK
from ..runtime.pipeline import PIRLTrainConfig, parts
from ..runtime.summary import closing_lines
from .arguments import completed
from .console import leave_on_signals, log_to, run_command, stop_on_signals, tell_ready


@parser.wrap()
def learn(cfg: PIRLTrainConfig) -> None:
    """Runs the learner with a parsed configuration."""
    from ..runtime.learner import Learner

    # The actors wait during an update, so a second core is free; small matrices gain nothing from more.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    stop = leave_on_signals()
    cfg.validate()
    assert cfg.output_dir is not None
    log_to(cfg.output_dir / "logs" / "learner.log")
    learner = Learner(cfg, stop)
    stop_on_signals(stop)
    tell_ready()
    learner.run()
    policy, _, env = parts(cfg)
    is_stock = policy.base is not None and policy.base.type in STOCK
    for line in closing_lines(cfg.output_dir, env, int(cfg.eval.n_episodes), is_stock=is_stock):
        print(line, flush=True)


def main() -> None:
    """Entry point."""
    run_command(learn, completed)


if __name__ == "__main__":
    main()
