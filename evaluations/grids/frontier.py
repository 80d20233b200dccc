"""The figures of many runs, and the choice among them: the best attacked accuracy at a clean accuracy near the plain run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run_folder import open_run


@dataclass(frozen=True)
class Frontier:
    """The criterion of the choice: the best attacked accuracy among runs whose clean accuracy is near that of the plain run.

    Attributes:
        plain: Name of the run trained without the defence, with which clean accuracies are compared.
        attack, norm, eps: The attacked accuracy that counts.
        drops: How far below the plain run's clean accuracy a run may be, in percentage points.
    """

    plain: str
    attack: str = "pgd"
    norm: str = "l2"
    eps: float = 0.5
    drops: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)


def row_of(name: str, folder: Path) -> dict[str, Any]:
    """The figures of one evaluated run; an attacked accuracy is None if it is not valid or its checks were not tested."""
    opened = open_run(folder)
    run, report = opened.record, opened.report()
    attacked = {
        f"{entry['attack']} {entry['norm']} {entry['eps']:g}": entry["accuracy"] if entry["valid"] else None
        for entry in report["robust"]
        if entry["attack"] != "worst case"
    }
    sizes_seen = {(entry["norm"], entry["eps"]) for entry in report["robust"]}
    proved: dict[str, Any] = {
        kind: {f"{entry['norm']} {entry['eps']:g}": entry["accuracy"] for entry in report[kind]
               if (entry["norm"], entry["eps"]) in sizes_seen and entry["valid"]}
        for kind in ("certified", "certified_local") if kind in report
    }  # fmt: skip
    return {
        "name": name, "defence": run["defence"], "max_norm": run["config"]["max_norm"],
        "logit_scale": run["config"]["logit_scale"], "seed": run["seed"], "clean": report["accuracy"]["clean"],
        "robust": attacked, **proved, "lipschitz": report["lipschitz"]["bound"],
        "estimate": report["lipschitz"]["estimate"], "largest_norm": max((row["upper"] for row in run["layers"]), default=None),
        "seconds": run["seconds"], **{f"gates_{told}": [gate["name"] for gate in report["gates"] if gate["status"] == told]
                                      for told in ("fail", "skip")},
    }  # fmt: skip


def frontier_of(rows: list[dict[str, Any]], frontier: Frontier) -> list[dict[str, Any]]:
    """The best run for each drop: {"drop", "name", "clean", "robust"}; all but the drop are None if no run is near enough."""
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
