"""How far a run has come."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Counters of a run; they are saved with every checkpoint.

    Attributes:
        version: Of the current weights; the number of iterations done.
        env_steps: Environment steps collected for training, those of rolled-back iterations too.
        decisions: Decisions learned from.
        episodes: Episodes that ended.
        seconds: Wall time of the run, pauses between resumes left out.
        best_success: Highest validation success so far; -1 before the first evaluation.
        best_version: Version that reached it.
        validations_since_best: How many evaluations in a row were not better than all before.
        rollbacks: How often the best checkpoint was brought back.
        runaways: Iterations in a row whose update was out of control.
        task_shares: How large a part of the environments each task has since the last restart; empty: all the same.
        warm_up_until: Version up to which the critic learns alone again, after a cold one was brought back; 0: never.
        stopped_by: What ended the run before its budget was used up, in one line.
    """

    version: int = 0
    env_steps: int = 0
    decisions: int = 0
    episodes: int = 0
    seconds: float = 0.0
    best_success: float = -1.0
    best_version: int = 0
    validations_since_best: int = 0
    rollbacks: int = 0
    runaways: int = 0
    task_shares: dict[str, float] = field(default_factory=dict)
    warm_up_until: int = 0
    stopped_by: str | None = None
