"""Many fine-tunings and their evaluations from one file, in one folder; finished runs are not repeated.

A grid is a TOML file. ``[finetune]`` contains the options of every run, each ``[[runs]]`` further options and a name; a list of
values gives one run per combination. A name in braces in a text is replaced by that option of the run, or by the grid's
folder ({out}). ``[[evaluate]]`` tables are the attacks on every run, and ``[frontier]`` is the criterion of the choice.
``gate_samples``, ``local_certificates`` and ``sample_order`` are the options of ``evaluate`` with these names:

    [[runs]]
    name = "clipped-{max_norm}-{logit_scale}"
    max_norm = [1.0, 1.5]
    logit_scale = [10, 30]

Any number of processes may work on one folder at the same time: each takes the next run that no other is working on.
"""

from __future__ import annotations

import fcntl
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..attacking import CHECKS, AttackPlan, check_options, evaluate, images_to_certify, sizes
from ..config import FinetuneConfig, config_of, read_toml
from ..data import FIRST
from ..finetuning import finetune
from ..run_folder import make_folder, read_json, write_json
from .frontier import Frontier, frontier_of, row_of

Say = Callable[[str], None]
_TABLES = {"finetune", "runs", "evaluate", "frontier", "gate_samples", "local_certificates", "sample_order"}


@dataclass(frozen=True)
class Grid:
    """All runs by name, the attacks and images of each, the number certified one by one, and the criterion of the choice."""

    runs: dict[str, FinetuneConfig]
    plans: list[AttackPlan]
    frontier: Frontier | None
    gate_samples: int = 64
    local_certificates: int = 0
    sample_order: str | None = None


def read_grid(path: Path, out: Path) -> Grid:
    """Read a grid from a file, to be run in the folder ``out``.

    Raises:
        ValueError: the file is not TOML, contains an unknown entry, or gives two runs the same name.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    text = read_toml(path)
    if unknown := text.keys() - _TABLES:
        raise ValueError(f"{path}: {', '.join(sorted(unknown))} unknown; expected {', '.join(sorted(_TABLES))}")
    if not text.get("runs") or not text.get("evaluate"):
        raise ValueError(f"{path}: needs at least one [[runs]] and one [[evaluate]]")
    runs: dict[str, FinetuneConfig] = {}
    shared = text.get("finetune", {})
    if not all(isinstance(table, dict) for table in (shared, *text["runs"], *text["evaluate"], text.get("frontier", {}))):
        raise ValueError(f"{path}: expected [finetune], [[runs]], [[evaluate]] and [frontier], in these brackets")
    for options in (single for table in text["runs"] for single in _combinations(shared | table)):
        name, config = _named(options, path, out)
        if name in runs:
            raise ValueError(f"{path}: two runs are named {name!r}; put the differing option into the name, as in {{max_norm}}")
        runs[name] = config
    try:
        plans = [AttackPlan(**{"norm": "l2", "samples": 200} | plan | {"eps": sizes(plan["eps"])}) for plan in text["evaluate"]]
        frontier = Frontier(**text["frontier"]) if "frontier" in text else None
        if frontier:
            frontier = replace(frontier, eps=sizes([frontier.eps])[0], drops=tuple(frontier.drops))
        check_options(plans, "cpu", 1, text.get("gate_samples", 64), (1, 1), sample_order=text.get("sample_order"))
        local = images_to_certify(text.get("local_certificates", 0), plans)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: [[evaluate]] takes attack, norm, eps and samples, [frontier] plain, …: {error}") from error
    if frontier and frontier.plain not in runs:
        raise ValueError(f"{path}: frontier.plain {frontier.plain!r} is no run; runs: {', '.join(runs)}")
    attacked = {(plan.attack, plan.norm, eps) for plan in plans for eps in plan.eps}
    if frontier and (frontier.attack, frontier.norm, frontier.eps) not in attacked:
        raise ValueError(f"{path}: the frontier's {frontier.attack} {frontier.norm} {frontier.eps:g} is under no [[evaluate]]")
    runs = dict(sorted(runs.items(), key=lambda item: item[1].seed))  # all runs of one seed before the next seed
    return Grid(runs, plans, frontier, text.get("gate_samples", 64), local, text.get("sample_order"))


def _combinations(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the listed values, one dictionary of options each."""
    lists = [[(key, choice) for choice in (value if isinstance(value, list) else [value])] for key, value in options.items()]
    return (dict(choice) for choice in itertools.product(*lists))


def _named(options: dict[str, Any], path: Path, out: Path) -> tuple[str, FinetuneConfig]:
    try:
        told = {key: value.format(out=out, **options) if isinstance(value, str) else value for key, value in options.items()}
        name = told.pop("name")
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: a run needs a name, and each option named in braces: {error} is missing") from error
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{path}: the name {name!r} is not a valid folder name")
    return name, config_of(told, f"{path}, run {name!r}")


def run_grid(grid: Grid, out: Path, *, device: str = "cpu", say: Say = print) -> dict[str, str]:
    """Do all runs that are not finished and that no other process is working on.

    Args:
        grid: The runs.
        out: Their folder.
        device: Device of the runs.
        say: Called with each message on progress and results.

    Returns:
        dict: The errors of failed runs, by the name of the run.
    """
    left = dict(grid.runs)
    while left:
        failed = _one_pass(grid, left, out, device, say)
        if len(failed) == len(left):
            return failed
        left = {name: grid.runs[name] for name in failed}  # the runs that they start from may be finished by now
    return {}


def _one_pass(grid: Grid, left: dict[str, FinetuneConfig], out: Path, device: str, say: Say) -> dict[str, str]:
    """Do the runs that are left and free; return the errors of those that failed."""
    failed = {}
    places = {name: f"[{place}/{len(grid.runs)}]" for place, name in enumerate(grid.runs, 1)}
    for name, config in left.items():
        folder = out / name
        if _done(folder, grid, config):
            continue
        with _alone(folder) as alone:
            if not alone or _done(folder, grid, config):
                continue
            say(f"{places[name]} {name}")
            try:
                finetune(replace(config, device=device), folder, resume=True)
                evaluate(folder, grid.plans, device=device, gate_samples=grid.gate_samples,
                         local_certificates=grid.local_certificates, sample_order=grid.sample_order, say=say)  # fmt: skip
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except (ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
                failed[name] = str(error)
                say(f"{name}: failed: {error}")
    return failed


def _done(folder: Path, grid: Grid, config: FinetuneConfig) -> bool:
    """Whether a run has a report for this configuration, with all attacks of the grid and the present checks."""
    if not (folder / "report.json").is_file() or not config.is_that_of(read_json(folder / "config.json")):
        return False
    report = read_json(folder / "report.json")
    planned = report.get("planned", {"plans": [], "gate_samples": None})
    seen = {(plan["attack"], plan["norm"], plan["samples"]): set(plan["eps"]) for plan in planned["plans"]}
    covered = all(set(plan.eps) <= seen.get((plan.attack, plan.norm, plan.samples), set()) for plan in grid.plans)
    certified = planned.get("local_certificates", 0) >= grid.local_certificates
    alike = grid.sample_order in (None, planned.get("sample_order", {}).get("name", FIRST))
    return covered and certified and alike and planned["gate_samples"] == grid.gate_samples and report.get("checks") == CHECKS


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lock a run, and yield whether no other process is working on it; the lock ends with the process, however that ends."""
    make_folder(folder.parent)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_rows(grid: Grid, out: Path) -> dict[str, Any]:
    """Write grid.json, with the figures of all finished runs and the frontier among them, and return its content."""
    rows = [row_of(name, out / name) for name in grid.runs if _done(out / name, grid, grid.runs[name])]
    told = {"runs": len(grid.runs), "done": len(rows), "rows": rows,
            "frontier": frontier_of(rows, grid.frontier) if grid.frontier else []}  # fmt: skip
    write_json(out / "grid.json", told)
    return told
