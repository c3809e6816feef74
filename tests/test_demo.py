"""The demo's own parts; `make demo` itself is run by hand, and its curve kept."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Examples are no installed package.
sys.path.insert(0, str(ROOT))

from examples import metaworld_demo as demo  # noqa: E402


def test_without_a_terminal_a_stage_is_one_plain_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; [print(f'| {n}/9 [', end='\\r') for n in range(9)]; print('naïve')"
    stage = demo.Stage("2/5 training", ["python", "-X", "utf8", "-c", script], tmp_path / "logs/training.log")
    demo.run(stage, 9, demo.training_step)
    error = capfd.readouterr().err
    assert error.splitlines() == ["2/5 training: 0 s"]
    assert "naïve" in stage.log.read_text(encoding="utf-8")


def test_a_stage_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    stage = demo.Stage("1/5", ["python", "-c", "print('out of luck'); raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(SystemExit, match=r"1/5 failed \(exit code 3\)[\s\S]*out of luck"):
        demo.run(stage)


@pytest.mark.parametrize(
    ("line", "step"), [("Training: 4%|x  | 120/3000 [00:01<00:30]", 120), ("no bar", None)]
)
def test_the_bar_of_training_is_read(line: str, step: int | None) -> None:
    assert demo.training_step(line) == step


def test_a_curve_without_an_ended_episode_or_a_validation_is_drawn(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    summary = demo.Summary("reach-v3", 0, 10, 0.5, 0.5, 100, 0.1, "checkpoint")
    demo.draw_curve([{"progress/env_steps": 100.0}], summary, tmp_path / "curve.png")
    drawn = [line.get_label() for line in plt.gcf().axes[0].lines]
    assert drawn == ["supervised, held-out starts", "PI-RL, held-out starts"]
