"""Many fine-tunings and their evaluations from one file, in one folder, where what is done stays done.

A grid is a TOML file. ``[finetune]`` has the options of every run, each ``[[runs]]`` those of its own and a name; where it
gives a list, every combination is a run. Braces in a text stand for an option of that run, or for the grid's folder ({out}).
``[[evaluate]]`` tables are the attacks on every run, ``[frontier]`` says among which figures to choose:

    [[runs]]
    name = "clipped-{max_norm}-{logit_scale}"
    max_norm = [1.0, 1.5]
    logit_scale = [10, 30]

Any number of processes may work on one folder at once: each takes the next run that no other is at.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config import FinetuneConfig
from .evaluate import evaluate
from .finetune import finetune
from .recipes import config_of, read_toml
from .runs import read_json, write_json
from .work import AttackPlan, sizes

Say = Callable[[str], None]
_TABLES = {"finetune", "runs", "evaluate", "frontier", "gate_samples"}


@dataclass(frozen=True)
class Frontier:
    """What to choose by: the best attacked accuracy among runs whose clean accuracy is near the plain run's.

    Attributes:
        plain: Name of the run that clean accuracies are compared with.
        attack, norm, eps: The attacked accuracy that counts.
        drops: How far below the plain run's clean accuracy a run may be, in points.
    """

    plain: str
    attack: str = "pgd"
    norm: str = "l2"
    eps: float = 0.5
    drops: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Grid:
    """All runs by name, the attacks on each, and what to choose by."""

    runs: dict[str, FinetuneConfig]
    plans: list[AttackPlan]
    frontier: Frontier | None
    gate_samples: int = 64


def read_grid(path: Path, out: Path) -> Grid:
    """The grid of a file, to be run in the folder ``out``.

    Raises:
        ValueError: it is not TOML, holds something unknown, or two of its runs have one name.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    text = read_toml(path)
    if unknown := text.keys() - _TABLES:
        raise ValueError(f"{path}: {', '.join(sorted(unknown))} unknown; expected {', '.join(sorted(_TABLES))}")
    if not text.get("runs") or not text.get("evaluate"):
        raise ValueError(f"{path}: needs at least one [[runs]] and one [[evaluate]]")
    runs: dict[str, FinetuneConfig] = {}
    for options in (single for table in text["runs"] for single in _combinations(text.get("finetune", {}) | table)):
        name, config = _named(options, path, out)
        if name in runs:
            raise ValueError(f"{path}: two runs are named {name!r}; put what differs into the name, as in {{max_norm}}")
        runs[name] = config
    try:
        plans = [AttackPlan(**{"norm": "l2", "samples": 200} | plan | {"eps": sizes(plan["eps"])}) for plan in text["evaluate"]]
        frontier = Frontier(**text["frontier"]) if "frontier" in text else None
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: [[evaluate]] takes attack, norm, eps and samples, [frontier] plain, …: {error}") from error
    if frontier and frontier.plain not in runs:
        raise ValueError(f"{path}: frontier.plain {frontier.plain!r} is no run; runs: {', '.join(runs)}")
    runs = dict(sorted(runs.items(), key=lambda item: item[1].seed))  # one seed of all before the next
    return Grid(runs, plans, frontier, text.get("gate_samples", 64))


def _combinations(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options with every choice of one element from each list."""
    lists = [[(key, choice) for choice in (value if isinstance(value, list) else [value])] for key, value in options.items()]
    return (dict(choice) for choice in itertools.product(*lists))


def _named(options: dict[str, Any], path: Path, out: Path) -> tuple[str, FinetuneConfig]:
    try:
        told = {key: value.format(out=out, **options) if isinstance(value, str) else value for key, value in options.items()}
        name = told.pop("name")
    except KeyError as error:
        raise ValueError(f"{path}: a run needs a name, and options for what stands in braces: {error} is missing") from error
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"{path}: the name {name!r} is not one of a folder")
    return name, config_of(told, f"{path}, run {name!r}")


def run_grid(grid: Grid, out: Path, *, device: str = "cpu", say: Say = print) -> dict[str, str]:
    """Do all runs that are not done and that no other process is at.

    Args:
        grid: The runs.
        out: Their folder.
        device: Where they run.
        say: Told what is begun and found.

    Returns:
        dict: What failed, and why, by the name of the run.
    """
    failed = {}
    for index, (name, config) in enumerate(grid.runs.items(), 1):
        folder = out / name
        if _done(folder, grid):
            continue
        with _alone(folder) as alone:
            if not alone or _done(folder, grid):
                continue
            say(f"[{index}/{len(grid.runs)}] {name}")
            try:
                finetune(replace(config, device=device), folder, resume=True)
                evaluate(folder, grid.plans, device=device, gate_samples=grid.gate_samples, say=say)
            except ValueError as error:
                failed[name] = str(error)
                say(f"{name}: failed: {error}")
    return failed


def _done(folder: Path, grid: Grid) -> bool:
    """Whether there is a report with all attacks of the grid."""
    if not (folder / "report.json").is_file():
        return False
    planned = read_json(folder / "report.json").get("planned", {"plans": []})["plans"]
    return all(json.loads(json.dumps(asdict(plan))) in planned for plan in grid.plans)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process is at a run; the lock ends with the process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def rows_of(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """The figures of all runs that are done, in the order of the grid."""
    return [_row(name, out / name) for name in grid.runs if _done(out / name, grid)]


def _row(name: str, folder: Path) -> dict[str, Any]:
    run, report = read_json(folder / "run.json"), read_json(folder / "report.json")
    attacked = {
        f"{entry['attack']} {entry['norm']} {entry['eps']:g}": None if entry["valid"] is False else entry["accuracy"]
        for entry in report["robust"]
        if entry["attack"] != "worst case"
    }
    sizes_seen = {(entry["norm"], entry["eps"]) for entry in report["robust"]}
    proved = {
        f"{entry['norm']} {entry['eps']:g}": entry["accuracy"]
        for entry in report["certified"]
        if (entry["norm"], entry["eps"]) in sizes_seen and entry["valid"]
    }
    return {
        "name": name, "defence": run["defence"], "max_norm": run["config"]["max_norm"],
        "logit_scale": run["config"]["logit_scale"], "seed": run["seed"], "clean": report["accuracy"]["clean"],
        "robust": attacked, "certified": proved, "lipschitz": report["lipschitz"]["bound"],
        "estimate": report["lipschitz"]["estimate"], "largest_norm": max((row["upper"] for row in run["layers"]), default=None),
        "seconds": run["seconds"], "gates_failed": [gate["name"] for gate in report["gates"] if gate["status"] == "fail"],
    }  # fmt: skip


def frontier_of(rows: list[dict[str, Any]], frontier: Frontier) -> list[dict[str, Any]]:
    """For each drop the run that stands best: {"drop", "name", "clean", "robust"}; None where no run is near enough."""
    key = f"{frontier.attack} {frontier.norm} {frontier.eps:g}"
    plain = next((row["clean"] for row in rows if row["name"] == frontier.plain), None)
    if plain is None:
        return []
    found = []
    for drop in frontier.drops:
        near = [row for row in rows if row["clean"] >= plain - drop / 100 and row["robust"].get(key) is not None]
        best = max(near, key=lambda row: row["robust"][key], default=None)
        told = {"name": None, "clean": None, "robust": None}
        if best is not None:
            told = {"name": best["name"], "clean": best["clean"], "robust": best["robust"][key]}
        found.append({"drop": drop, **told})
    return found


def write_rows(grid: Grid, out: Path) -> dict[str, Any]:
    """Write grid.json, the figures of all runs that are done and the frontier among them."""
    rows = rows_of(grid, out)
    told = {"runs": len(grid.runs), "done": len(rows), "rows": rows,
            "frontier": frontier_of(rows, grid.frontier) if grid.frontier else []}  # fmt: skip
    write_json(out / "grid.json", told)
    return told
