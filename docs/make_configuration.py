"""Writes `docs/configuration.md` from the comments above the fields of our configuration classes.

`python docs/make_configuration.py` writes the page, and what `--help` shows (`make_settings.py`); tests fail when they
are not what this makes.
"""

import ast
import dataclasses
import inspect
import json
import runpy
import textwrap
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig, PIRLAlgorithmConfig
from lerobot_policy_pi_rl.algorithm.configuration_security import SecurityConfig
from lerobot_policy_pi_rl.bases.configuration import CompactConfig
from lerobot_policy_pi_rl.configuration_pi_rl import ExplorerConfig, PIRLConfig
from lerobot_policy_pi_rl.envs.configuration_metaworld_camera import MetaworldCameraEnv
from lerobot_policy_pi_rl.envs.configuration_metaworld_state import MetaworldStateEnv
from lerobot_policy_pi_rl.runtime.pipeline import PIRLTrainConfig
from lerobot_policy_pi_rl.runtime.settings import UNREAD

PACKAGE = "lerobot_policy_pi_rl"
PAGE = Path(__file__).parent / "configuration.md"


@dataclass(frozen=True)
class Section:
    """One table of the page.

    Attributes:
        title: Heading.
        prefix: What the fields are called on the command line, before their own name.
        config: The class.
        introduction: Text above the table.
    """

    title: str
    prefix: str
    config: type
    introduction: str


SECTIONS = (
    Section(
        "Policy",
        "policy",
        PIRLConfig,
        "`--policy.type=pi_rl`. With `--policy.path=` these come from the checkpoint, and what is given beside it "
        "overrides them. LeRobot's own policy fields are there as well; the ones to know are `policy.device` (`cpu` in "
        "the recipes from state, `cuda` in those of the VLAs) and `policy.push_to_hub` (true by default in LeRobot, "
        "false here).",
    ),
    Section(
        "Explorer",
        "policy.explorer",
        ExplorerConfig,
        "How the policy explores during online training; `lerobot-eval` never reads it. The mathematics is in "
        "[mathematics.md](mathematics.md).",
    ),
    Section(
        "Base: compact",
        "policy.base",
        CompactConfig,
        "`--policy.base.type=compact`, the default.",
    ),
    Section(
        "Algorithm",
        "algorithm",
        PIRLAlgorithmConfig,
        "`--algorithm.type=pi_rl`. The learner reads all of it, an actor collection and security only.",
    ),
    Section(
        "Collection",
        "algorithm.collection",
        CollectionConfig,
        "Actor and learner must agree on `num_actors`, `num_envs`, `eval_envs`, `decisions`, `reward`, `group_size`, "
        "`lookahead_steps` and `max_staleness`; the learner refuses the actor otherwise.",
    ),
    Section(
        "Security",
        "algorithm.security",
        SecurityConfig,
        "Access token and TLS, with commands, are in [security.md](security.md). Nothing here is compared when actors "
        "connect: each side names its own files.",
    ),
    Section(
        "Environment: metaworld_state",
        "env",
        MetaworldStateEnv,
        "`--env.type=metaworld_state`; what it does is in [environments.md](environments.md).",
    ),
    Section(
        "Environment: metaworld_camera",
        "env",
        MetaworldCameraEnv,
        "`--env.type=metaworld_camera`: the same simulation behind a small camera, "
        "[environments.md](environments.md#from-a-small-camera).",
    ),
)

HEAD = """\
# Configuration

<!-- Written by `python docs/make_configuration.py` from the comments in the code: change those, not this page. -->

`lerobot-pi-rl-train`, `lerobot-pi-rl-learner` and `lerobot-pi-rl-actor` read one configuration: LeRobot's own
`TrainRLServerPipelineConfig`, as a JSON file (`--config_path=recipes/metaworld.json`). Every field can be given on the
command line as well, where it wins over the file: `--algorithm.collection.num_envs=16`. Give learner and actors the
same file and the same options; only `algorithm.collection.actor_id` differs between actors. What they must agree on
(seed, environment, policy, normalisation, quota, validation) is compared when they connect. A setting that cannot work
is refused with one line that names it.

`lerobot-train` (supervised training) reads the policy's fields, `lerobot-eval` those of policy and environment.

## The run: LeRobot's fields

What PI-RL reads of LeRobot's training configuration, and what it means here. The defaults are LeRobot's (but for
`env_eval_freq`), and some of them are made for supervised training; `recipe` is `recipes/metaworld.json`.

| field | default | recipe | meaning |
|---|---|---|---|
"""

# Field -> what it means for a PI-RL run. Defaults and the recipe's values are looked up.
RUN_FIELDS = {
    "policy.path": "Checkpoint to start from: a `pretrained_model` folder, usually of supervised training, or a name "
    "on the hub; `pi_rl` or a stock policy. Without it, `policy.base_path` or `policy.base.type=compact` (random "
    "weights, which sparse rewards rarely forgive) must be given.",
    "policy.online_steps": "Environment steps after which training ends.",
    "steps": "Iterations after which training ends, if `policy.online_steps` did not end it before. One iteration "
    "is `num_envs` x `decisions` decisions of every actor, and one version of the weights.",
    "algorithm.stop_success": "Validation success at which training ends early.",
    "save_freq": "Iterations between checkpoints; 0 or less: only the first and the last one. At each of them all "
    "actors begin fresh episodes, which is what makes a resumed run continue exactly.",
    "save_checkpoint": "False: as `save_freq=0`.",
    "env_eval_freq": "Iterations between validations of the policy by the actors, without exploration; 0 is never "
    "(on a robot, which they would occupy). `checkpoints/best` is the best of them.",
    "eval.n_episodes": "Starts of a validation, shared by the actors. The other `eval.*` fields are `lerobot-eval`'s.",
    "seed": "Of the run: new weights, exploration, starts, minibatches. Actor and learner must agree on it.",
    "output_dir": "Checkpoints, `metrics.jsonl` and `logs/`. A folder with checkpoints is refused unless the run is "
    "resumed. Null: a new folder under `outputs/train`.",
    "resume": "True: continue the run in `output_dir` from its last checkpoint, or from the one whose "
    "`train_config.json` `--config_path` names. Weights, optimizers, critic, random state and counters "
    "come from the checkpoint, settings from the file and the command line.",
    "job_name": "Name of the run in wandb.",
    "wandb.enable": "True, with `wandb.project`: the metrics go to wandb as well. All `wandb.*` fields are LeRobot's.",
    "policy.actor_learner_config.learner_host": "Where the learner listens and actors connect. Anything but loopback "
    "needs an access token ([security.md](security.md)).",
    "policy.actor_learner_config.learner_port": "Its port.",
}


def unread() -> str:
    """What a run refuses: fields that the parser takes, with what to do instead."""
    names: dict[str, list[str]] = {}
    for name, reason in UNREAD.items():
        names.setdefault(reason, []).append(f"`{name}`")
    rows = "".join(f"| {', '.join(alike)} | {_escape(reason)} |\n" for reason, alike in names.items())
    return (
        "\n## What has no effect\n\nLeRobot's parser takes these as well. A run does not read them, and refuses one "
        "that is set to another value than\nits default, on the command line or in a configuration file.\n\n"
        f"| field | why, or what to use instead |\n|---|---|\n{rows}"
    )


def page() -> str:
    """The whole page."""
    return HEAD + run_table() + "".join(table(section) for section in SECTIONS) + unread()


def run_table() -> str:
    """Rows of LeRobot's fields, with their defaults and the recipe's values."""
    recipe = json.loads((PAGE.parent.parent / "recipes/metaworld.json").read_text(encoding="utf-8"))
    rows = []
    for name, meaning in RUN_FIELDS.items():
        stated = _look_up(recipe, name)
        given = "" if stated is None else f"`{_value(stated)}`"
        rows.append(f"| `{name}` | {_run_default(name)} | {given} | {meaning} |\n")
    return "".join(rows)


def _look_up(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _run_default(name: str) -> str:
    """Default of a field of the run, found along the dataclasses that hold it."""
    if name == "policy.path":
        return "none"
    first, *rest = name.split(".")
    roots: dict[str, type] = {"policy": PIRLConfig, "algorithm": PIRLAlgorithmConfig}
    if first in roots:
        owner, (field, *inner) = roots[first], rest
    else:
        owner, field, inner = PIRLTrainConfig, first, rest
    value = _default_of({f.name: f for f in dataclasses.fields(owner)}[field])
    for part in inner:
        value = getattr(value, part)
    return _code(_value(value))


def table(section: Section) -> str:
    """A section with one row for each field that the class, or one of ours that it derives from, declares."""
    rows = "".join(
        f"| `{section.prefix}.{row.name}` | {_code(row.type)} | {_default(row.field)} | {_escape(row.meaning)} |\n"
        for row in documented_fields(section.config)
    )
    return (
        f"\n## {section.title} (`--{section.prefix}.*`)\n\n{section.introduction}\n\n"
        f"| field | type | default | meaning |\n|---|---|---|---|\n{rows}"
    )


@dataclass(frozen=True)
class Documented:
    """A field as it stands in the code."""

    name: str
    type: str
    field: Field
    meaning: str


def documented_fields(config: type) -> list[Documented]:
    """Fields of a dataclass that are declared in this package, those of its bases first; LeRobot's are left out."""
    ours = [one for one in reversed(config.__mro__) if one.__module__.startswith(PACKAGE)]
    # A field that is declared again counts where it stands last.
    found = {documented.name: documented for one in ours for documented in declared_fields(one)}
    return list(found.values())


def declared_fields(config: type) -> list[Documented]:
    """Fields that a class declares itself, each with the comment above it.

    A field without a comment of its own belongs to the commented one above it.

    Raises:
        ValueError: If the first field has no comment.
    """
    lines = textwrap.dedent(inspect.getsource(config)).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    known = {field.name: field for field in dataclasses.fields(config)}
    found: list[Documented] = []
    leader = ""
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name, comment = node.target.id, comment_above(lines, node.lineno - 1)
        leader = name if comment else leader
        if not leader:
            raise ValueError(f"{config.__name__}.{name} has no comment above it")
        meaning = comment or f"See `{leader}`."
        found.append(Documented(name, ast.unparse(node.annotation), known[name], meaning))
    return found


def comment_above(lines: list[str], row: int) -> str:
    """The block of comment lines that ends right above a row, as one line of text."""
    block: list[str] = []
    while row > 0 and lines[row - 1].strip().startswith("#"):
        row -= 1
        block.insert(0, lines[row].strip().removeprefix("#").strip())
    return " ".join(block)


def _default(field: Field) -> str:
    value = _default_of(field)
    return "its own defaults" if dataclasses.is_dataclass(value) else _code(_value(value))


def _default_of(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    assert field.default_factory is not MISSING
    return field.default_factory()


def _value(value: Any) -> str:
    """A value as one writes it in the JSON file."""
    return json.dumps(value, default=lambda item: getattr(item, "value", str(item))).strip('"')


def _code(text: str) -> str:
    return f"`{_escape(text)}`"


def _escape(text: str) -> str:
    """A bar would end the table's cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    runpy.run_path(str(PAGE.parent / "make_settings.py"), run_name="__main__")
