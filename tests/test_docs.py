"""The pages: the configuration page is what the code says, every metric is explained, and no link leads nowhere."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.decisions import DecisionBatch
from lerobot_policy_pi_rl.algorithm.pi_rl import PIRLAlgorithm
from lerobot_policy_pi_rl.algorithm.storage import prepare
from lerobot_policy_pi_rl.bases.configuration import CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.modeling_pi_rl import PIRLPolicy
from lerobot_policy_pi_rl.runtime.findings import first_impression
from lerobot_policy_pi_rl.runtime.statistics import learning_metrics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUNTIME = ROOT / "src/lerobot_policy_pi_rl/runtime"
LAUNCHER = ROOT / "src/lerobot_pi_rl_launcher.py"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
STATE, ROWS = "observation.state", 8
GROUPS = "rollout|eval|ppo|loss|gradient|progress|control|speed|checkpoint|push|actors|dropped"


def test_the_configuration_page_is_what_the_generator_makes() -> None:
    made = runpy.run_path(str(DOCS / "make_configuration.py"))["page"]()
    assert (DOCS / "configuration.md").read_text() == made, "run python docs/make_configuration.py"


def policy_config() -> PIRLConfig:
    """A small policy with every part that has metrics of its own."""
    return PIRLConfig(
        device="cpu",
        push_to_hub=False,
        base=CompactConfig(hidden_dim=16, num_blocks=1, time_dim=4, task_dim=0),
        explorer=ExplorerConfig(kind="flow_noise"),
        input_features={STATE: PolicyFeature(FeatureType.STATE, (3,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )


def decisions_of(policy: PIRLPolicy) -> DecisionBatch:
    """One decision of each of a few environments, which all end."""
    observation = {STATE: torch.randn(ROWS, 3)}
    sample = policy.explore(observation)
    none = torch.zeros(ROWS, dtype=torch.int64)
    return DecisionBatch(
        observation=observation,
        task=[""] * ROWS,
        chain=sample.chain,
        step=sample.step,
        log_prob=sample.log_prob,
        action=sample.x,
        reward=torch.randn(ROWS),
        delay=none,
        executed=torch.full((ROWS,), policy.config.n_action_steps),
        terminated=torch.ones(ROWS, dtype=torch.bool),
        truncated=none.bool(),
        success=none.bool(),
        version=none,
        env=torch.arange(ROWS),
        index=none,
        next_row=none[:0],
        next_observation={STATE: torch.zeros(0, 3)},
    )


def algorithm_metrics() -> set[str]:
    """Names that the update writes, from updates with everything on: with a critic, and with groups."""
    return update_metrics(kl_coef=0.1, demonstration_weight=0.1) | update_metrics(
        advantage="group", collection=CollectionConfig(num_envs=4, group_size=2)
    )


def update_metrics(**settings: Any) -> set[str]:
    config = policy_config()
    algorithm = PIRLAlgorithm(
        PIRLPolicy(config).eval(),
        PIRLAlgorithmConfig(**settings, critic_warmup=0, epochs=1, policy_config=config),
    )
    algorithm.make_optimizers_and_scheduler()
    decisions = decisions_of(algorithm.policy)
    chunks = {STATE: decisions.observation[STATE], "action": decisions.action}
    algorithm.demonstrations = lambda count: chunks
    rollout = prepare(decisions, lambda observation, task: observation)
    return set(learning_metrics(algorithm.update(iter([rollout]))))


def runtime_metrics() -> set[str]:
    """Names that the learner, its statistics and the gatherer write out in their code."""
    learner, told, gatherer = (
        (RUNTIME / name).read_text() for name in ("learner.py", "statistics.py", "gather.py")
    )
    stated = re.findall(rf'"((?:{GROUPS})/\w+)"', learner + told)
    counted = re.findall(r'\.dropped\["(\w+)"\]', gatherer + learner)
    assert stated
    assert counted
    return {*stated, *(f"dropped/{name}" for name in counted)}


def test_every_metric_is_explained_and_no_other() -> None:
    page = (DOCS / "metrics.md").read_text()
    explained = re.findall(
        rf"^\| `((?:{GROUPS})/\w+)` \|", page.partition("## Every metric")[2], re.MULTILINE
    )
    assert len(explained) == len(set(explained))
    assert set(explained) == algorithm_metrics() | runtime_metrics()


def prose(page: Path) -> str:
    """A page without its code, in which brackets mean something else."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page))
    links += re.findall(r"""(?:src|href)=["']([^"']+)["']""", prose(page))
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# Lines at which nobody need do anything, or that another one explains.
UNEXPLAINED = {
    "starting one learner and": "news: what was started, and where its logs are",
    "stopping the learner; it saves what it has trained": "news: what a Ctrl-C has begun",
}


def written_parts(text: ast.expr) -> list[str]:
    """The constant parts of a text in the code: around `%` fields, or around those of an f-string."""
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        return re.split(r"%[-.0-9]*[a-z]", text.value)
    if isinstance(text, ast.JoinedStr):
        return [part.value for part in text.values if isinstance(part, ast.Constant)]
    return []


def warnings_of(file: Path) -> Iterator[list[str]]:
    """The constant parts of every line with which a file warns, that of `Note` included."""
    names = {"warning", "error", "_warn", "_count_rejected", "say"}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        place = {"_count_rejected": 1}.get(name, 0)
        if name in names and len(node.args) > place:
            yield [part for part in map(str.strip, written_parts(node.args[place])) if part]


def is_row_of(row: str, parts: list[str]) -> bool:
    """Whether a row shows a line: its parts are there in their order."""
    return re.search(".*".join(map(re.escape, parts)), row) is not None


def test_every_warning_is_explained() -> None:
    table = (
        (DOCS / "operations.md").read_text().partition("## What the warnings mean")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    lines = [line for file in (*sorted(RUNTIME.glob("*.py")), LAUNCHER) for line in warnings_of(file)]
    # Of what the first episodes say, which is put together elsewhere.
    for solved, ode in ((0, None), (10, (90, 100))):
        lines.append([first_impression(solved, 100, ode).text.rpartition(": ")[2]])
    # A text that is only handed on has no part of its own.
    lines = [line for line in lines if line]
    assert len(lines) > 25
    missing = [
        line
        for line in lines
        if not any(is_row_of(row, line) for row in rows)
        and not any(line[0].startswith(one) for one in UNEXPLAINED)
    ]
    assert not missing
