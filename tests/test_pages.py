"""Every command of README and docs is run as it stands there, at small settings where the page says so.

A block of commands may follow a marker, a comment that a reader of the page does not see:

    <!-- small settings -->                each command gets the arguments of `SMALL` at its end
    <!-- not run here, because ... -->     nothing is run

The first one may go on: `, side by side` where the commands are those of several terminals, and `, A for B` where A is
written in place of B. The blocks of a page run one after the other, in a folder in which README's demonstrations and
supervised training have run. One that begins a run does so in an empty output folder.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lerobot_pi_rl_cli.commands import COMMANDS, own_options
from lerobot_pi_rl_cli.preflight import pairs
from lerobot_pi_rl_cli.settings import look_up

ROOT = Path(__file__).parent.parent
OWN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent
SMALL_SETTINGS, SIDE_BY_SIDE, NOT_RUN = "small settings", ", side by side", "not run here, because "
# What a page's commands begin with, made by the blocks of README that make these folders.
PREPARED = ("outputs/metaworld/demonstrations", "outputs/metaworld/supervised")
# Seconds for the blocks of a page.
LIMIT_S = 600
# A policy that was trained for two steps solves nothing within ten steps: what is seen is that the commands work. The
# pages have up to ten tasks, each of which needs an environment.
RUN = (
    "--env.episode_length=10 --steps=2 --env_eval_freq=1 --save_freq=1 --eval.n_episodes=2 "
    "--algorithm.collection.num_envs=10 --algorithm.collection.decisions=2 --algorithm.minibatch_size=8 "
    "--policy.actor_learner_config.learner_port={port}"
)
SMALL = {
    "lerobot-pi-rl-demos": "--num_episodes=1",
    "lerobot-pi-rl-supervised": (
        "--env.episode_length=10 --steps=2 --env_eval_freq=1 --save_freq=1 --eval.n_episodes=1 --eval.batch_size=1 "
        "--batch_size=8"
    ),
    "lerobot-train": "--env_eval_freq=0 --steps=2 --save_freq=1 --batch_size=8",
    "lerobot-pi-rl-check": "--env.episode_length=10 --eval.n_episodes=2 --algorithm.collection.num_envs=10",
    "lerobot-pi-rl-train": RUN,
    "lerobot-pi-rl-learner": RUN,
    "lerobot-pi-rl-actor": RUN,
    "lerobot-eval": "--env.episode_length=10 --eval.n_episodes=1 --eval.batch_size=1",
}
# The check ends with 2 where it finds nothing to learn from, as it does in ten steps.
ACCEPTED = {"lerobot-pi-rl-check": (0, 2)}


@dataclass(frozen=True)
class Block:
    """A block of commands.

    Attributes:
        page: Its page.
        line: Its first line there.
        marker: What stands before it; empty without a marker.
        text: The commands.
    """

    page: Path
    line: int
    marker: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether its commands are run."""
        return not self.marker.startswith(NOT_RUN)

    @property
    def replacements(self) -> list[tuple[str, str]]:
        """Pairs of a text and what is run in its place."""
        return [(old, new) for new, old in re.findall(r", (\S+) for (\S+)", self.marker)]

    @property
    def run_text(self) -> str:
        """The commands that are run."""
        text = self.text
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text

    @property
    def begins_a_run(self) -> bool:
        """Whether it starts a learner that does not go on with a run before."""
        words = [
            command
            for command in self.commands()
            if command[0] in ("lerobot-pi-rl-train", "lerobot-pi-rl-learner")
        ]
        return bool(words) and not words[0][-1].startswith("--resume")

    def commands(self) -> list[list[str]]:
        """Its command lines, split into words."""
        joined = self.run_text.replace("\\\n", " ")
        if not self.runs:
            # What a reader is to fill in.
            joined = re.sub(r"<[^<>\n]*>", "X", joined)
        lines = [line for line in joined.splitlines() if line.strip()]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of commands of a page."""
    text = page.read_text(encoding="utf-8")
    pattern = r"(?:<!-- ([^>]*?) -->\n+)?^([ ]*)```bash\n(.*?)^[ ]*```$"
    for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        indent = found[2]
        lines = [line.removeprefix(indent) for line in found[3].splitlines()]
        place = text.count("\n", 0, found.start(3)) + 1
        yield Block(page, place, (found[1] or "").strip(), "\n".join(lines) + "\n")


ALL = [block for page in PAGES for block in blocks(page)]
RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.page.name}:{block.line}")
def test_a_marker_is_one_of_those_there_are(block: Block) -> None:
    known = rf"{SMALL_SETTINGS}({SIDE_BY_SIDE})?(, \S+ for \S+)*|{NOT_RUN}.+|"
    assert re.fullmatch(known, block.marker)
    assert block.commands()
    for old, _ in block.replacements:
        assert old in block.text


def write_wrappers(folder: Path, port: int, *, small: bool) -> None:
    """Programs with the names of the commands, which add the small settings and run the real ones."""
    folder.mkdir(exist_ok=True)
    for name, entry in {**dict.fromkeys(SMALL, ""), **OWN}.items():
        more = SMALL.get(name, "").format(port=port) if small else ""
        codes = "|".join(map(str, ACCEPTED.get(name, (0,))))
        module, _, function = entry.partition(":")
        # What the installed program does, with these sources.
        start = f"import sys; from {module} import {function}; sys.argv[0] = '{name}'; sys.exit({function}())"
        program = f'{sys.executable} -c "{start}"' if entry else str(BIN / name)
        script = f'#!/bin/sh\n{program} "$@" {more}\ncode=$?\ncase $code in {codes}) exit 0;; *) exit $code;; esac\n'
        (folder / name).write_text(script, encoding="utf-8")
        (folder / name).chmod(0o755)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def script_of(block: Block) -> str:
    """A block as a script that ends with the first command that fails."""
    if SIDE_BY_SIDE not in block.marker:
        return f"set -eu\n{block.run_text}"
    lines = ["set -eu", "jobs=''"]
    for words in block.commands():
        lines += [f"{shlex.join(words)} &", 'jobs="$jobs $!"']
    return "\n".join([*lines, "for job in $jobs; do wait $job; done", ""])


def run(block: Block, folder: Path) -> None:
    """Runs the commands of a block in `folder/work`."""
    work, home = folder / "work", folder / "home"
    for place in (work, home):
        place.mkdir(exist_ok=True)
    if block.begins_a_run:
        for output in work.glob("outputs/*/pi_rl"):
            shutil.rmtree(output)
    write_wrappers(folder / "bin", free_port(), small=block.marker != "")
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{folder / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        ["bash", "-c", script_of(block)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LIMIT_S,
        check=False,
    )
    tail = "\n".join((process.stdout + process.stderr).splitlines()[-30:])
    assert process.returncode == 0, (
        f"{block.page.name}, line {block.line}: exit code {process.returncode}\n{tail}"
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's demonstrations and supervised training have run."""
    folder = tmp_path_factory.mktemp("pages")
    for command in ("lerobot-pi-rl-demos", "lerobot-pi-rl-supervised"):
        (block,) = (b for b in blocks(PAGES[0]) if b.runs and b.commands()[0][0] == command)
        run(block, folder)
    for place in PREPARED:
        assert (folder / "work" / place).is_dir()
    return folder / "work"


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "work", symlinks=True)
    makers = ("lerobot-pi-rl-demos", "lerobot-pi-rl-supervised")
    for block in blocks(page):
        done = page == PAGES[0] and block.commands()[0][0] in makers
        if block.runs and not done:
            run(block, tmp_path)


def settings_commands(page: Path) -> Iterator[str]:
    """Command lines of ours on a page that take settings: in blocks, whether they are run or not, and in sentences."""
    text = page.read_text(encoding="utf-8")
    lines = [shlex.join(words) for block in blocks(page) for words in block.commands()]
    lines += [" ".join(code.split()) for code in re.findall(r"`(lerobot-pi-rl-[^`]*)`", text)]
    taking = tuple(f"lerobot-pi-rl-{name} " for name, command in COMMANDS.items() if command.takes_settings)
    yield from (line for line in lines if line.startswith(taking) and "--" in line)


SETTINGS = sorted({(page, line) for page in PAGES for line in settings_commands(page)})


@pytest.mark.parametrize(
    ("page", "line"), SETTINGS, ids=[f"{page.name}: {line[:80]}" for page, line in SETTINGS]
)
def test_a_command_names_settings_that_there_are(page: Path, line: str) -> None:
    program, *words = (word for word in shlex.split(line, comments=True) if word != "...")
    command = program.removeprefix("lerobot-pi-rl-")
    given = dict(pairs(words, command))
    recipe = ROOT / given.get("config_path", "")
    content = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    chosen = {
        section: given.get(f"{section}.type", content.get(section, {}).get("type"))
        for section in ("env", "policy")
    }
    for name in given:
        assert name in own_options(command) or look_up(name, chosen).node is not None, name


def mentioned(page: Path) -> Iterator[str]:
    """Commands with arguments in the text of a page, outside of blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from re.findall(r"`((?:make|python) [^`]*)`", text)


MENTIONED = sorted({(page, command) for page in PAGES for command in mentioned(page)})


@pytest.mark.parametrize(
    ("page", "command"), MENTIONED, ids=[f"{page.name}: {command}" for page, command in MENTIONED]
)
def test_a_command_in_a_sentence_names_what_is_there(page: Path, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        for name, value in (word.split("=", 1) for word in words[2:]):
            assert name == "GRID" or name in (ROOT / "Makefile").read_text(encoding="utf-8")
            assert name != "GRID" or (ROOT / f"benchmarks/grids/{value}.json").is_file()
    elif words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    elif words[2].startswith("benchmarks"):
        place = ROOT / words[2].replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
