"""The runner of grids, with stand-ins for the commands: nothing here trains."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig

from lerobot_policy_pi_rl.configuration_pi_rl import PIRLConfig
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig

ROOT = Path(__file__).parent.parent
# The benchmarks and examples are no installed package.
sys.path.insert(0, str(ROOT))

from benchmarks.grid import execute, picture, plan, report, stages  # noqa: E402
from benchmarks.grid.__main__ import main  # noqa: E402

CONTENT = {
    "name": "small",
    "num_evaluations": 10,
    "seeds": [0, 1],
    "tasks": {"reach-v3": {"demonstrations": 2}, "push-v3": {"demonstrations": 3}},
    "variants": {"default": {}, "joint": {"train": ["--policy.explorer.recording=joint"]}},
}
# Success by stage of what the stand-ins evaluate.
RATES = {"evaluation_10": 0.3, "evaluation_best_10": 0.9, "evaluation_last_10": 0.8}


def changed(**changes: Any) -> dict[str, Any]:
    return {**CONTENT, **changes}


class Commands:
    """Stands in for the commands: writes what they would write, and remembers them."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fails: Callable[[str], bool] = lambda command: False
        self.budget = 100
        self.learn = learn

    def __call__(self, command: Sequence[str], log: Path, keep_open: int) -> int:
        self.calls.append(list(command))
        os.fstat(keep_open)
        if self.fails(" ".join(command)):
            log.write_text("first line\nout of luck\n")
            return 3
        (option,) = [c for c in command if c.startswith(("--output_dir=", "--root="))]
        output = ROOT / option.partition("=")[2]
        if command[0] == "lerobot-eval":
            evaluate(output, [RATES[output.parent.name]])
        elif command[0] == "lerobot-pi-rl-train":
            self.learn(output, self.budget)
        elif command[0] == "lerobot-pi-rl-supervised":
            (output / "checkpoints/000500").mkdir(parents=True)
            for link in ("best", "last"):
                (output / "checkpoints" / link).symlink_to("000500")
        else:
            output.mkdir()
        return 0

    def names(self) -> list[str]:
        return [command[0] for command in self.calls]


def evaluate(output: Path, rates: Sequence[float]) -> None:
    """Writes what `lerobot-eval` writes."""
    output.mkdir(parents=True, exist_ok=True)
    per_task = [
        {"task_id": number, "metrics": {"successes": [n < rate * 10 for n in range(10)]}}
        for number, rate in enumerate(rates)
    ]
    overall = {"pc_success": 100 * sum(rates) / len(rates)}
    (output / "eval_info.json").write_text(json.dumps({"per_task": per_task, "overall": overall}))


def learn(output: Path, env_steps: int, speed: int = 1) -> None:
    """Writes what `lerobot-pi-rl-train` writes."""
    for name in ("000010", "000025"):
        for part in ("pretrained_model", "training_state"):
            (output / "checkpoints" / name / part).mkdir(parents=True, exist_ok=True)
    for link, name in (("best", "000010"), ("last", "000025")):
        (output / "checkpoints" / link).unlink(missing_ok=True)
        (output / "checkpoints" / link).symlink_to(name)
    last = output / "checkpoints/last"
    config = {"algorithm": {"stop_success": None}, "policy": {"online_steps": 100}, "steps": 1000}
    (last / "pretrained_model/train_config.json").write_text(json.dumps(config))
    counters = {
        "env_steps": env_steps,
        "decisions": 20,
        "version": 25,
        "best_success": 0.9,
        "best_version": 0,
    }
    (last / "training_state/counters.json").write_text(json.dumps(counters))
    with (output / "metrics.jsonl").open("w") as file:
        for step in range(26):
            place = {"step": step, "progress/env_steps": 4 * step}
            if step % 10 == 0:
                print(json.dumps({**place, "eval/success": step / 25}), file=file)
            if step:
                row = {**place, "progress/seconds": step / 2, "rollout/success": step / 100, "ppo/lr": 1e-4}
                # The iteration after a validation waits for it.
                wait = 9.0 if step % 10 == 1 else 0.25
                parts = {"wait": wait, "update": 0.2, "critic": 0.05}
                row |= {f"speed/{name}_seconds": seconds for name, seconds in parts.items()}
                print(json.dumps(row | {"rollout/decisions": 10 * speed}), file=file)


@pytest.fixture
def commands() -> Commands:
    return Commands()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(commands: Commands, said: list[str], tmp_path: Path) -> Callable[..., list[plan.Cell]]:
    """Runs cells with the stand-ins; gives those that failed."""

    def run(cells: Sequence[plan.Cell], **options: Any) -> list[plan.Cell]:
        runner = execute.Runner(
            commands, execute.Stop(), output=tmp_path / "stages", say=said.append, **options
        )
        return runner.run(cells)

    return run


Run = Callable[..., list[plan.Cell]]


# Grid files


def test_a_grid_has_a_cell_per_task_seed_and_variant_and_one_seed_comes_first() -> None:
    cells = plan.parse(CONTENT).cells
    assert len(cells) == 8
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4
    assert {(c.task, c.demonstrations) for c in cells} == {("reach-v3", 2), ("push-v3", 3)}
    assert len({cell.label for cell in cells}) == 8


def test_every_seed_may_have_its_own_number_of_demonstrations() -> None:
    content = changed(seeds=[0, 4], tasks={"reach-v3": {"demonstrations": [3, 1]}})
    assert {cell.seed: cell.demonstrations for cell in plan.parse(content).cells} == {0: 3, 4: 1}
    with pytest.raises(plan.GridError, match="one for each of the seeds"):
        plan.parse(changed(seeds=[0, 4], tasks={"reach-v3": {"demonstrations": [3]}}))


def test_a_task_may_have_another_recipe(tmp_path: Path) -> None:
    tasks = {
        "reach-v3": {"demonstrations": 1},
        "MT10": {"demonstrations": 1, "recipe": "metaworld_mt10"},
    }
    default, other = (
        stages.stages(cell, tmp_path).train for cell in plan.parse(changed(tasks=tasks)).cells[:2]
    )
    assert "--config_path=recipes/metaworld.json" in default.command
    assert "--config_path=recipes/metaworld_mt10.json" in other.command
    assert (default.folder.name, other.folder.name) == ("pi_rl", "pi_rl_metaworld_mt10")


def test_all_stages_are_in_the_environment_of_the_recipe(tmp_path: Path) -> None:
    tasks = {
        "reach-v3": {"demonstrations": 1},
        "push-v3": {"demonstrations": 1, "recipe": "metaworld_camera"},
    }
    state, camera = (stages.stages(cell, tmp_path) for cell in plan.parse(changed(tasks=tasks)).cells[:2])
    for made, kind in ((state, "metaworld_state"), (camera, "metaworld_camera")):
        for stage in (made.demonstrations, made.before, made.best, made.last):
            given = [argument for argument in stage.command if argument.startswith("--env.type")]
            assert given == [f"--env.type={kind}"]
    recipe = json.loads((ROOT / "recipes/metaworld_camera.json").read_text())
    limit = f"--env.episode_length={recipe['env']['episode_length']}"
    assert limit in camera.demonstrations.command
    assert limit in camera.best.command
    # What is recorded in one environment is not taken for a recording in the other.
    assert state.demonstrations.folder.parent.name == "seed_0"
    assert camera.demonstrations.folder.parent.parent.name == "seed_0"
    assert "metaworld_camera" in camera.demonstrations.folder.parent.name


def test_a_grid_in_another_packages_environment_records_and_runs_there(tmp_path: Path) -> None:
    content = changed(environment="small", tasks={"Arm-v0": {"demonstrations": 2}})
    made = stages.stages(plan.parse(content).cells[0], tmp_path)
    recorder, *rest = made.demonstrations.command[:3], *made.demonstrations.command[3:]
    assert recorder == ("python", "-m", "lerobot_env_small.record")
    assert {"--task=Arm-v0", "--num_episodes=2"} <= set(rest)
    for stage in (made.supervised, made.before, made.train, made.best, made.last):
        given = [argument for argument in stage.command if argument.startswith("--env.")]
        assert sorted(given) == [
            "--env.discover_packages_path=lerobot_env_small",
            "--env.task=Arm-v0",
            "--env.type=small",
        ]
    assert made.last.twin is not None
    assert made.last.twin.command == made.best.command
    # The 200 steps of 0.1.0 validate nowhere.
    before = stages.stages(plan.parse({**content, "start": "steps_200"}).cells[0], tmp_path)
    assert not any(argument.startswith("--env.") for argument in before.supervised.command)


def test_co_training_gets_the_demonstrations_of_its_cell(tmp_path: Path) -> None:
    content = changed(
        tasks={"reach-v3": {"demonstrations": 1}},
        variants={"plain": {}, "co": {"train": ["--algorithm.demonstration_weight=0.1"]}},
    )
    plain, co = (stages.stages(cell, tmp_path) for cell in plan.parse(content).cells[:2])
    assert not any(argument.startswith("--dataset") for argument in plain.train.command)
    given = {argument for argument in co.supervised.command if argument.startswith("--dataset")}
    assert len(given) == 2
    assert given <= set(co.train.command)


def test_the_start_is_the_best_checkpoint_of_a_converged_training_or_that_of_0_1_0(tmp_path: Path) -> None:
    now, before = (
        stages.stages(plan.parse(changed(start=start)).cells[0], tmp_path)
        for start in ("converged", "steps_200")
    )
    assert "--patience=3" in now.supervised.command
    assert "--env.task=reach-v3" in now.supervised.command
    assert not any(a.startswith(("--patience=", "--env.")) for a in before.supervised.command)
    assert before.supervised.command[-3:] == ("--steps=200", "--save_freq=200", "--env_eval_freq=0")
    for made, folder, link in ((now, "converged", "best"), (before, "supervised", "last")):
        assert made.supervised.folder.name == folder
        assert made.before.checkpoint == made.supervised.output / f"checkpoints/{link}/pretrained_model"
        (start,) = (a for a in made.train.command if a.startswith("--policy.path="))
        assert start.endswith(f"{folder}/output/checkpoints/{link}/pretrained_model")


CONTROLS = changed(
    tasks={"reach-v3": {"demonstrations": 1}},
    seeds=[0],
    variants={
        "default": {"train": ["--policy.online_steps=7"]},
        "imitation": {"method": "self_imitation", "train": ["--policy.online_steps=5"]},
        "more": {"method": "supervised"},
    },
)


def test_controls_begin_where_pi_rl_begins(tmp_path: Path) -> None:
    default, imitation, more = (stages.stages(cell, tmp_path) for cell in plan.parse(CONTROLS).cells)
    assert default.supervised == imitation.supervised == more.supervised
    starts = [
        {a for a in made.train.command if a.startswith("--policy.path=")}
        for made in (default, imitation, more)
    ]
    assert starts[0] == starts[1] == starts[2] != set()
    assert imitation.train.command[:3] == ("python", "-m", "benchmarks.self_imitation")
    assert "--policy.online_steps=5" in imitation.train.command
    assert more.train.command[0] == "lerobot-pi-rl-supervised"
    data = {a for a in more.supervised.command if a.startswith("--dataset")}
    assert data < set(more.train.command)
    assert data < set(imitation.train.command)
    assert not data & set(default.train.command)


def test_supervised_training_alone_gets_the_minutes_of_pi_rl(
    run: Run, commands: Commands, tmp_path: Path
) -> None:
    cell = plan.parse(CONTROLS).cells[2]
    made = stages.stages(cell, tmp_path / "stages")
    assert made.train.minutes_of is not None
    # PI-RL without the default variant's overrides is made first.
    assert run([cell]) == []
    assert commands.names() == [
        "lerobot-pi-rl-demos",
        "lerobot-pi-rl-supervised",
        "lerobot-eval",
        "lerobot-pi-rl-train",
        "lerobot-pi-rl-supervised",
        "lerobot-eval",
    ]
    made.train.minutes_of.finish({"seconds": 150.0})
    assert made.train.full_command[-2:] == ("--max_minutes=2.50", "--steps=7500")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (changed(start="fresh"), "start: 'fresh' is none of converged, steps_200"),
        (
            changed(variants={"x": {"method": "luck"}}),
            "variants.x.method: 'luck' is none of pi_rl, self_imitation, supervised",
        ),
    ],
)
def test_an_unknown_start_or_method_is_refused(content: Any, text: str) -> None:
    with pytest.raises(plan.GridError, match=re.escape(text)):
        plan.parse(content)


def test_a_task_may_have_its_own_seeds() -> None:
    tasks = {
        "reach-v3": {"demonstrations": [3, 1, 2], "seeds": [7, 0, 9]},
        "push-v3": {"demonstrations": 4},
    }
    cells = plan.parse(changed(seeds=[0], tasks=tasks, variants={"default": {}})).cells
    assert [(cell.task, cell.seed, cell.demonstrations) for cell in cells] == [
        ("reach-v3", 7, 3),
        ("push-v3", 0, 4),
        ("reach-v3", 0, 1),
        ("reach-v3", 9, 2),
    ]


def test_overrides_of_the_variant_come_after_those_of_the_task() -> None:
    task = {"demonstrations": 1, "overrides": {"train": ["--steps=1"], "supervised": ["--steps=2"]}}
    content = changed(tasks={"reach-v3": task}, variants={"more": {"train": ["--steps=3"]}})
    overrides = plan.parse(content).cells[0].overrides
    assert overrides.train == ("--steps=1", "--steps=3")
    assert overrides.supervised == ("--steps=2",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (changed(sedes=[1]), "unknown key 'sedes'; did you mean 'seeds'"),
        (changed(seeds=[]), "seeds: needs a list"),
        (changed(seeds=[50]), "seeds: 50 is no whole number from 0 to 49"),
        (changed(seeds=[1, 1]), "names one twice"),
        (changed(tasks={}), "tasks: needs at least one"),
        (changed(tasks={"reach-v3": {}}), "'demonstrations' is missing"),
        (
            changed(tasks={"reach-v3": {"demonstrations": 0}}),
            "tasks.reach-v3.demonstrations: must be at least 1",
        ),
        (
            changed(tasks={"reach-v3": {"demonstrations": 1, "recipe": "none"}}),
            "tasks.reach-v3.recipe: there is no recipe 'none'; there are: metaworld",
        ),
        (changed(variants={}), "variants: needs at least one"),
        (changed(variants={"a": {"rain": []}}), "variants.a: unknown key 'rain'; did you mean 'train'"),
        (changed(variants={"a": {"train": "--x=1"}}), "must be a list"),
        (changed(variants={"a": {"train": ["x=1"]}}), "'x=1' is not of the form --name=value"),
        (changed(variants={"a": {"train": ["--seed=1"]}}), "--seed is set by the runner"),
        (changed(num_evaluations=0), "num_evaluations: must be"),
        (changed(name="a/b"), "is no name for a folder"),
        ([], "must be an object"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(content: Any, text: str) -> None:
    with pytest.raises(plan.GridError) as error:
        plan.parse(content)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_grid_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    assert "single_task" in capsys.readouterr().err


def test_a_selection_takes_either_value_of_a_name_and_all_names_together() -> None:
    cells = plan.parse(CONTENT).cells
    chosen = plan.select(cells, ["task=push-v3,variant=joint", "variant=default"])
    assert {(c.task, c.variant) for c in chosen} == {("push-v3", "joint"), ("push-v3", "default")}
    assert {c.seed for c in plan.select(cells, ["seed=1"])} == {1}
    several = plan.parse(changed(tasks={"reach-v3,push-v3": {"demonstrations": 1}})).cells
    assert len(plan.select(several, ["task=reach-v3,push-v3,seed=0"])) == 2
    for wrong, text in (("task=pull-v3", "there is no task 'pull-v3'"), ("tasks=a", "is not task=")):
        with pytest.raises(plan.GridError, match=text):
            plan.select(cells, [wrong])


# Stages


def test_different_overrides_never_share_a_folder_and_equal_ones_do() -> None:
    one, other = plan.slug(["--a.x=1"]), plan.slug(["--b.x=1"])
    assert one != other
    assert one == plan.slug(["--a.x=1"])
    assert one.startswith("x-1_")
    assert plan.slug(["reach-v3"]) == "reach-v3"
    assert plan.slug(["reach-v3,push-v3"]) != plan.slug(["reach-v3-push-v3"])


def test_commands_name_no_absolute_path() -> None:
    for cell in plan.parse(CONTENT).cells:
        for stage in stages.stages(cell).all():
            assert not any("=/" in argument for argument in stage.command)
            assert any(str(stage.folder.relative_to(ROOT)) in argument for argument in stage.command)


def test_variants_share_what_they_have_in_common(run: Run, commands: Commands) -> None:
    cells = plan.select(plan.parse(CONTENT).cells, ["seed=0,task=reach-v3"])
    assert run(cells) == []
    once = ["lerobot-pi-rl-demos", "lerobot-pi-rl-supervised", "lerobot-eval"]
    twice = ["lerobot-pi-rl-train", "lerobot-eval", "lerobot-eval"]
    assert commands.names() == once + 2 * twice
    ports = [c for call in commands.calls for c in call if c.startswith(stages.PORT)]
    assert len(set(ports)) == 2


def test_a_second_run_does_only_what_is_missing(run: Run, commands: Commands, said: list[str]) -> None:
    cells = plan.parse(CONTENT).cells
    assert run(cells[:3]) == []
    done = len(commands.calls)
    assert run(cells[:3]) == []
    assert len(commands.calls) == done
    assert len(said) == done
    assert any("evaluation of the best" in line and "success 0.90" in line for line in said)


def test_the_same_checkpoint_is_not_evaluated_twice(run: Run, commands: Commands, tmp_path: Path) -> None:
    cell = plan.parse(CONTENT).cells[0]
    made = stages.stages(cell, tmp_path / "stages")

    def learn_to_the_end(output: Path, env_steps: int) -> None:
        learn(output, env_steps)
        (output / "checkpoints/best").unlink()
        (output / "checkpoints/best").symlink_to("000025")

    commands.learn = learn_to_the_end
    assert run([cell]) == []
    assert commands.names().count("lerobot-eval") == 2
    assert stages.success(made.last) == stages.success(made.best) == RATES[made.best.folder.name]
    assert made.last.result() == made.best.result()


def test_a_stage_that_was_cut_off_begins_anew(run: Run, commands: Commands, tmp_path: Path) -> None:
    cell = plan.parse(CONTENT).cells[0]
    made = stages.stages(cell, tmp_path / "stages")
    made.supervised.output.mkdir(parents=True)
    (made.supervised.output / "half").touch()
    assert run([cell]) == []
    assert not (made.supervised.output / "half").exists()


def test_learning_that_was_cut_off_goes_on_from_its_checkpoint(
    run: Run, commands: Commands, said: list[str], tmp_path: Path
) -> None:
    cell = plan.parse(CONTENT).cells[0]
    made = stages.stages(cell, tmp_path / "stages")
    commands.budget = 60
    # Exit code 0, but not its whole budget: somebody stopped it.
    assert run([cell]) == [cell]
    assert "ended before its budget was used" in said[-1]
    assert not made.train.done
    commands.budget = 100
    assert run([cell]) == []
    (first, second) = [call for call in commands.calls if call[0] == "lerobot-pi-rl-train"]
    assert "--resume=true" not in first
    assert second[-1] == "--resume=true"
    assert "resume" not in made.train.result()["command"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failure_shows_its_log_and_stops_no_other_cell(
    run: Run, commands: Commands, said: list[str], jobs: int
) -> None:
    cells = plan.select(plan.parse(CONTENT).cells, ["seed=0"])
    commands.fails = lambda command: "lerobot-pi-rl-supervised" in command and "push-v3" in command
    assert [cell.task for cell in run(cells, jobs=jobs)] == ["push-v3", "push-v3"]
    assert commands.names().count("lerobot-pi-rl-train") == 2
    # Both variants of the task need the stage, and one try is enough.
    assert sum("lerobot-pi-rl-supervised" in c[0] and "push-v3" in " ".join(c) for c in commands.calls) == 1
    assert sum("out of luck" in line and "exit code 3" in line for line in said) == 1
    commands.fails = lambda command: False
    assert run(cells, jobs=jobs) == []


def test_an_unexpected_error_stops_no_other_cell(run: Run, commands: Commands, said: list[str]) -> None:
    cells = plan.select(plan.parse(CONTENT).cells, ["seed=0,variant=default"])

    def fails(command: str) -> bool:
        if "lerobot-pi-rl-demos" in command and "reach" in command:
            raise OSError("disk full")
        return False

    commands.fails = fails
    assert [cell.task for cell in run(cells)] == ["reach-v3"]
    assert any("OSError: disk full" in line for line in said)


def test_a_stage_that_another_runner_holds_is_waited_for_and_not_made_twice(
    run: Run, commands: Commands, tmp_path: Path
) -> None:
    cell = plan.parse(CONTENT).cells[0]
    first = stages.stages(cell, tmp_path / "stages").demonstrations
    with execute.locked(first, execute.Stop(), print):
        thread = threading.Thread(target=run, args=([cell],))
        thread.start()
        time.sleep(0.3)
        assert commands.calls == []
        first.output.mkdir(parents=True)
        first.finish({"command": "", "seconds": 1.0, "source": "x-y"})
    thread.join(20)
    assert commands.names()[0] == "lerobot-pi-rl-supervised"


def test_only_the_supervised_policy_can_be_asked_for(run: Run, commands: Commands, tmp_path: Path) -> None:
    cells = plan.parse(CONTENT).cells[:1]
    assert run(cells, supervised_only=True) == []
    assert commands.names() == ["lerobot-pi-rl-demos", "lerobot-pi-rl-supervised", "lerobot-eval"]
    row = report.row_of(cells[0], tmp_path / "stages")
    assert row is not None
    assert (row.supervised, row.best) == (0.3, None)


# Processes


def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, jobs: int = 1) -> Any:
    """Real processes that run a shell script instead of a command; gives the runner of it and its wish to stop."""
    file = tmp_path / "bin" / "command"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(execute, "BIN", file.parent)
    stop = execute.Stop()
    return execute.Processes(stop, jobs), stop


@pytest.mark.parametrize(("jobs", "threads"), [(1, "7"), (2, "1")])
def test_output_goes_to_the_log_and_parallel_jobs_have_one_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: int, threads: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_command, _ = processes(monkeypatch, tmp_path, 'echo "$1 $OMP_NUM_THREADS"; exit 4', jobs)
    assert run_command(["command", "hello"], tmp_path / "log.txt", 0) == 4
    assert (tmp_path / "log.txt").read_text() == f"hello {threads}\n"


@pytest.mark.timeout(60)
def test_stopping_ends_the_whole_process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_command, stop = processes(monkeypatch, tmp_path, "sleep 60 & echo $!; wait")
    threading.Timer(0.7, stop.wanted.set).start()
    with pytest.raises(execute.Stopped):
        run_command(["command"], tmp_path / "log.txt", 0)
    child = int((tmp_path / "log.txt").read_text())
    ended = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True, check=False
    )
    assert ended.stdout.strip()[:1] in ("", "Z")


@pytest.mark.timeout(60)
def test_ctrl_c_says_how_to_go_on_and_starts_nothing_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(CONTENT))
    processes(monkeypatch, tmp_path, "sleep 60")
    (tmp_path / "bin/command").rename(tmp_path / "bin/lerobot-pi-rl-demos")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        folders = [f"--output_dir={tmp_path / 'stages'}", f"--results_dir={tmp_path / 'results'}"]
        assert main([str(file), "--jobs=2", *folders]) == 130
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    printed = capsys.readouterr().out
    assert "the same command goes on" in printed
    assert "8 of 8 cells are missing" in printed


# Summary


def test_the_summary_has_rows_curves_a_table_and_a_picture(run: Run, tmp_path: Path) -> None:
    grid = plan.parse(CONTENT)
    assert run(plan.select(grid.cells, ["variant=default"])) == []
    text = report.summarise(grid, tmp_path / "stages", tmp_path / "results")
    folder = tmp_path / "results/small"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["cells"], summary["complete"]) == (8, 4)
    assert "4 of 8 cells are missing" in text
    row = summary["rows"][0]
    assert (row["supervised"], row["best"], row["last"]) == (0.3, 0.9, 0.8)
    # Wilson's interval of 9 in 10, from the closed form.
    assert row["best_interval"] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert (row["env_steps"], row["iterations"], row["best_iteration"]) == (100, 25, 10)
    assert len(row["commands"]) == 6
    assert set(row["made_with"]) == {"date", "source", "jobs", "cores", "packages"}
    assert "| reach-v3 | default | 2 | 2 | 0.30 (0.30 to 0.30) | 0.90 (0.90 to 0.90) |" in text
    assert (folder / "table.md").read_text() == text
    assert (folder / "curves.png").stat().st_size < 150_000
    assert len(list((folder / "curves").iterdir())) == 4


def test_a_picture_is_drawn_anew_from_the_results_alone(run: Run, tmp_path: Path) -> None:
    grid = plan.parse(CONTENT)
    assert run(grid.cells) == []
    report.summarise(grid, tmp_path / "stages", tmp_path / "results")
    folder = tmp_path / "results/small"
    lines = picture.read(folder)
    assert [(line.task, line.seed, line.variant) for line in lines] == [
        (cell.task, cell.seed, cell.variant) for cell in grid.cells
    ]
    # Steps of 10 iterations with 4 environment steps each; success as the stand-in of the learner writes it.
    assert lines[0].points == [(0, 0.0), (40, 0.4), (80, 0.8)]
    assert lines[0].before == 0.3
    before = (folder / "curves.png").read_bytes()
    (folder / "curves.png").unlink()
    picture.draw(lines, folder / "curves.png")
    assert (folder / "curves.png").read_bytes() == before


def test_speed_is_compared_within_a_seed_and_validations_are_left_out(
    run: Run, commands: Commands, tmp_path: Path
) -> None:
    def learn_at_a_speed(output: Path, budget: int) -> None:
        # Machines and seeds differ; the other variant does 1.5 and 2 times as much as the first one beside it.
        first, other = {0: (2, 3), 1: (4, 8)}[int(output.parents[2].name.removeprefix("seed_"))]
        learn(output, budget, other if "joint" in output.parent.name else first)

    commands.learn = learn_at_a_speed
    cells = plan.select(plan.parse(CONTENT).cells, ["task=reach-v3"])
    assert run(cells) == []
    rows = {
        (row.variant, row.seed): row for cell in cells if (row := report.row_of(cell, tmp_path / "stages"))
    }
    # Ten decisions in half a second, times the speed; with the waits for validations it would be 8.4.
    assert rows["default", 0].decisions_per_s == pytest.approx(40)
    assert rows["joint", 1].decisions_per_s == pytest.approx(160)
    assert rows["joint", 1].decisions == 20
    lines = report.table(list(rows.values()))
    assert lines[2].endswith("| 60 | 1.00 (1.00 to 1.00) |")
    assert lines[3].endswith("| 110 | 1.75 (1.50 to 2.00) |")


def test_a_partial_summary_has_the_supervised_policy_and_forgets_no_cell(run: Run, tmp_path: Path) -> None:
    grid = plan.parse(CONTENT)
    assert "8 of 8 cells are missing" in report.summarise(grid, tmp_path / "stages", tmp_path / "results")
    assert run(grid.cells[:1], supervised_only=True) == []
    text = report.summarise(grid, tmp_path / "stages", tmp_path / "results")
    # Both variants begin with this supervised policy.
    assert "| reach-v3 | default | 2 | 1, 0 done | 0.30 (0.30 to 0.30) | - |" in text
    assert "| reach-v3 | joint | 2 | 1, 0 done |" in text


def test_results_are_not_replaced_by_fewer(run: Run, tmp_path: Path) -> None:
    grid = plan.parse(CONTENT)
    assert run(grid.cells[:2]) == []
    report.summarise(grid, tmp_path / "stages", tmp_path / "results")
    files = {file: file.read_bytes() for file in (tmp_path / "results").rglob("*") if file.is_file()}
    text = report.summarise(grid, tmp_path / "elsewhere", tmp_path / "results")
    assert "Nothing was written: small holds 2 complete cells" in text
    assert files == {file: file.read_bytes() for file in (tmp_path / "results").rglob("*") if file.is_file()}


def test_a_raw_curve_keeps_every_validation_and_means_of_the_rest(tmp_path: Path) -> None:
    learn(tmp_path, 100)
    curve = report.curve_of(tmp_path)
    validations = [line for line in curve if "eval/success" in line]
    assert [line["step"] for line in validations] == [0, 10, 20]
    means = [line for line in curve if "rollout/success" in line]
    assert [line["step"] for line in means] == [10, 20, 25]
    # The mean of 1 to 10 hundredths, and of 21 to 25.
    assert means[0]["rollout/success"] == pytest.approx(0.055)
    assert means[-1]["rollout/success"] == pytest.approx(0.23)
    assert [line["seconds"] for line in means] == [5.0, 10.0, 12.5]


def test_a_policy_for_several_tasks_is_reported_by_task(run: Run, tmp_path: Path) -> None:
    (cell,) = plan.parse(
        changed(tasks={"reach-v3,push-v3": {"demonstrations": 1}}, seeds=[0], variants={"default": {}})
    ).cells
    assert run([cell]) == []
    made = stages.stages(cell, tmp_path / "stages")
    for stage, rates in ((made.before, [0.1, 0.5]), (made.best, [1.0, 0.6]), (made.last, [0.9, 0.7])):
        evaluate(stage.output, rates)
    row = report.row_of(cell, tmp_path / "stages")
    assert row is not None
    assert row.n_eval == 20
    assert row.best == 0.8
    assert row.per_task == {
        "reach-v3": {"supervised": 0.1, "best": 1.0, "last": 0.9},
        "push-v3": {"supervised": 0.5, "best": 0.6, "last": 0.7},
    }


# The grid files of the repository


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint's configuration; nothing loads its weights."""
    PIRLConfig(device="cpu", push_to_hub=False).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


CONFIGS = {
    "lerobot-pi-rl-supervised": TrainPipelineConfig,
    "lerobot-eval": EvalPipelineConfig,
    "lerobot-pi-rl-train": PIRLTrainConfig,
}


def parsed(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that a command would run with, by LeRobot's own parser."""

    def read(cfg: Any) -> Any:
        return cfg

    read.__annotations__["cfg"] = CONFIGS[command[0]]
    # Of this package's own command; LeRobot's parser does not know them.
    own = ("--patience=", "--max_minutes=")
    monkeypatch.setattr(sys, "argv", [argument for argument in command if not argument.startswith(own)])
    for name in ("_config_path_args", "_config_yaml_overrides"):
        monkeypatch.setattr(parser, name, {})
    cfg = parser.wrap()(read)()
    if isinstance(cfg, PIRLTrainConfig):
        cfg.validate()
    return cfg


def given_overrides() -> list[Any]:
    """Each set of overrides in the repository's grid files, once."""
    found = {}
    for file in sorted(plan.FOLDER.glob("*.json")):
        for cell in plan.load(file.stem).cells:
            for name in ("supervised", "train", "evaluation"):
                arguments = getattr(cell.overrides, name)
                if arguments:
                    found.setdefault((name, arguments), cell)
    return [pytest.param(*key, id=f"{key[0]} {' '.join(key[1])}") for key in found]


@pytest.mark.parametrize("file", sorted(plan.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_every_grid_file_is_well_formed_and_called_as_its_file(file: Path) -> None:
    assert plan.load(file.stem).name == file.stem


@pytest.mark.parametrize(("name", "arguments"), given_overrides())
def test_every_override_is_one_that_the_command_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: Path, name: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(ROOT)
    cell = plan.parse(
        changed(variants={"tried": {name: list(arguments)}}, tasks={"reach-v3": {"demonstrations": 1}})
    ).cells[0]
    made = stages.stages(cell, tmp_path / "stages")
    stage = {"supervised": made.supervised, "train": made.train, "evaluation": made.best}[name]
    command = [f"--policy.path={trained}" if c.startswith("--policy.path=") else c for c in stage.command]
    # Nothing has been recorded here.
    cfg = parsed([c for c in command if not c.startswith("--dataset.root=")], monkeypatch)
    # Where two name the same setting, the last one wins: the variant's.
    for path, value in dict(argument.removeprefix("--").split("=", 1) for argument in arguments).items():
        setting = cfg
        for key in path.split("."):
            setting = getattr(setting, key)
        assert str(setting).lower() == value.lower().replace("null", "none")
