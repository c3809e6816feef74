"""`lerobot-pi-rl-actor`: collects decisions for a learner."""

import torch
from lerobot.configs import parser

from ..runtime.pipeline import PIRLTrainConfig, parts
from .console import log_to, run_command, stop_on_signals


@parser.wrap()
def act(cfg: PIRLTrainConfig) -> None:
    """Runs the actor with a parsed configuration."""
    from ..runtime.actor import Actor

    # The environments' workers are where the cores are needed.
    torch.set_num_threads(1)
    stop = stop_on_signals()
    cfg.is_actor = True
    cfg.validate()
    assert cfg.output_dir is not None
    log_to(cfg.output_dir / "logs" / f"actor_{parts(cfg)[1].collection.actor_id}.log")
    actor = Actor(cfg, stop)
    try:
        actor.run()
    finally:
        actor.close()


def main() -> None:
    """Entry point."""
    run_command(act)


if __name__ == "__main__":
    main()
