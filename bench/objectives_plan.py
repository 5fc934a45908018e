"""What `make bench-objectives` runs: tasks, objectives, seeds, in which order, under which settings. No torch.

All runs of a task start from the same model, see the same prompts in the same order (they follow from the seed),
and are evaluated in the same way. The support is always the student's whole top-K, so that objectives of one K have
the same payload.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vopd_client.run_directory import settings_that_matter
from vopd_client.train_config import TrainConfig

ROOT = Path(__file__).parent.parent
DEMO, CHAIN_SUM = ROOT / "examples" / "demo", ROOT / "bench" / "data" / "chain_sum"
EASY_INSTRUCTION = "Begin your reply with 'Answer:'."
HARD_INSTRUCTION = "Reply with 'Answer:' and the name only."  # the student gives the first token half a percent

STEPS, SEEDS, EVAL_EVERY = 20, (1, 2, 3, 4, 5), 5
QUICK_STEPS, QUICK_SEEDS, QUICK_EVAL_EVERY, QUICK_ROWS = 3, (1,), 2, 4

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Prompts, and what follows from their length."""

    name: str
    about: str
    settings: Mapping[str, Any]

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training rows and held-out rows."""
        if self.name == "chain-sum":
            return read_jsonl(CHAIN_SUM / "train.jsonl"), read_jsonl(CHAIN_SUM / "heldout.jsonl")
        train, held_out = (read_jsonl(DEMO / name) for name in ("train.jsonl", "heldout.jsonl"))
        return hard_start(train), hard_start(held_out)


TASKS = (
    Task(
        "capitals",
        "the demo's capitals from its hard start; the teacher sees six solved examples",
        {"prompts_per_step": 6, "rollouts_per_prompt": 2, "max_new_tokens": 12},
    ),
    Task(
        "chain-sum",
        "reasoning-gym's chain_sum, three numbers added in two sums; the teacher sees three solved examples",
        {"prompts_per_step": 6, "rollouts_per_prompt": 2, "max_new_tokens": 20},
    ),
)
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "opd": {"objective": "opd"},
    "vopd": {"objective": "vopd", "top_k": 100, "tail": "renormalise"},  # the paper's setting
    "vopd-bucket-4": {"objective": "vopd", "top_k": 4, "tail": "bucket"},
    "vopd-full": {"objective": "vopd-full"},
    "vopd-rb": {"objective": "vopd-rb", "top_k": 100},
    "topk-kl": {"objective": "topk-kl", "top_k": 100, "tail": "renormalise"},
    "full-kl": {"objective": "full-kl"},
}
COMMON: Mapping[str, Any] = {
    "support_mass": 1.0,
    "learning_rate": 5e-5,
    "schedule": "constant",  # a step's result does not depend on how many were to follow
    "mixed_precision": "bf16",
    "device": "cpu",
    "eval_kl": "vocabulary",
    "sample_count": 1,
    "rollout_batch_size": 32,  # a step's, and all held-out prompts, side by side
    "checkpoint_every": 0,
    "teacher_timeout_s": 120.0,
}


@dataclass(frozen=True)
class RunId:
    task: str
    objective: str  # a key of OBJECTIVES
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.objective}-{self.seed}"


@dataclass(frozen=True)
class Scale:
    """How much is run: the whole benchmark, or a trial of it."""

    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    eval_every: int = EVAL_EVERY
    max_rows: int | None = None  # of each file


QUICK = Scale(QUICK_STEPS, QUICK_SEEDS, QUICK_EVAL_EVERY, QUICK_ROWS)


def runs_in_order(seeds: Sequence[int], only: str | None = None) -> list[RunId]:
    """All runs, seed by seed, so that what is there after an interruption can already be compared.

    Args: only: an objective, a task, or objective/task.
    Raises: ValueError when nothing of that name exists.
    """
    runs = [RunId(task.name, objective, seed) for seed in seeds for task in TASKS for objective in OBJECTIVES]
    if only is None:
        return runs
    kept = [run for run in runs if only in (run.objective, run.task, f"{run.objective}/{run.task}")]
    if not kept:
        names = ", ".join([*OBJECTIVES, *(task.name for task in TASKS)])
        raise ValueError(f"nothing is called {only!r}: there are {names}, and objective/task")
    return kept


def missing_runs(wanted: Sequence[RunId], there: Sequence[RunId]) -> list[RunId]:
    done = set(there)
    return [run for run in wanted if run not in done]


def train_config(
    run: RunId, scale: Scale, *, model: str, teacher_url: str, data: Path, output_dir: Path, eval_teacher: bool
) -> TrainConfig:
    """The run's settings. data: where `write_data` wrote."""
    (task,) = (task for task in TASKS if task.name == run.task)
    return TrainConfig(
        **COMMON,
        **task.settings,
        **OBJECTIVES[run.objective],
        student=model,
        teacher_url=[teacher_url],
        prompts=str(data / run.task / "train.jsonl"),
        eval_prompts=str(data / run.task / "heldout.jsonl"),
        output_dir=output_dir,
        head_cache=output_dir / "heads",
        name=run.name,
        seed=run.seed,
        steps=scale.steps,
        eval_every=scale.eval_every,
        eval_teacher="yes" if eval_teacher else "no",
    )


def bench_settings(scale: Scale, *, model: str, data: Path) -> dict[str, Any]:
    """Everything that the results depend on, flat: what all runs share, then `task NAME: KEY`, `objective NAME: KEY`.

    The files of prompts are named by what is in them.
    """
    example = RunId(TASKS[0].name, next(iter(OBJECTIVES)), seed=0)
    config = train_config(
        example, scale, model=model, teacher_url="-", data=data, output_dir=Path(), eval_teacher=False
    ).model_dump(mode="json")
    shown = {**settings_that_matter(config), "steps": scale.steps, "eval_every": scale.eval_every}
    own = {"prompts", "eval_prompts", "head_cache", "seed"}
    own |= {key for part in (*OBJECTIVES.values(), *(task.settings for task in TASKS)) for key in part}
    settings = {key: value for key, value in shown.items() if key not in own}
    for task in TASKS:
        files = {name: digest(data / task.name / f"{name}.jsonl") for name in ("train", "heldout")}
        settings |= {f"task {task.name}: {key}": value for key, value in {**task.settings, **files}.items()}
    for name, part in OBJECTIVES.items():
        settings |= {f"objective {name}: {key}": value for key, value in part.items()}
    return settings


def check_same_bench(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    """Raises: ValueError when results in `where` were made under other settings, naming them.

    Tasks and objectives that only one side has say nothing about the runs of the other.
    """
    shared = _groups(old) & _groups(new)
    before, now = (
        {key: value for key, value in settings.items() if key.partition(": ")[0] in shared or ": " not in key}
        for settings in (old, new)
    )
    differing = [
        f"  {key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        lines = "\n".join(differing)
        raise ValueError(f"{where} holds runs made under other settings:\n{lines}\nmove it away, or give another --out")


def _groups(settings: Mapping[str, Any]) -> set[str]:
    """`task NAME` and `objective NAME` of every key that belongs to one."""
    return {key.partition(": ")[0] for key in settings if ": " in key}


def hard_start(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The demo's capitals with an instruction that says less about how the teacher begins."""
    made = []
    for row in rows:
        if row["kind"] == "capital":
            (message,) = row["messages"]
            content = message["content"].replace(EASY_INSTRUCTION, HARD_INSTRUCTION)
            assert content != message["content"], f"no {EASY_INSTRUCTION!r} in {message['content']!r}"
            made.append({**row, "messages": [{**message, "content": content}]})
    return made


def write_data(directory: Path, max_rows: int | None) -> None:
    """TASK/train.jsonl and TASK/heldout.jsonl of every task."""
    for task in TASKS:
        (directory / task.name).mkdir(parents=True, exist_ok=True)
        for name, rows in zip(("train", "heldout"), task.rows(), strict=True):
            lines = "".join(json.dumps(row) + "\n" for row in rows[:max_rows])
            (directory / task.name / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
