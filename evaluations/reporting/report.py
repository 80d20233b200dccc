"""The report of a run: tables on the terminal and one self-contained page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..records import certified_at, judged_proof
from ..run_folder import Run, open_run, write_json, write_text
from ..wording import NORM_NAMES, images_in_words, interval, local_in_words, not_tested, number, percent, verdict
from . import charts
from .pages import render

Figures = dict[str, Any]
_PROVED = {"certified": "certified", "certified_local": "certified around each image"}  # the label of each list of figures


def write_report(folder: Path) -> dict[str, Figures]:
    """Write report.html and return the figures by name; for a run with twins also a report.json that contains theirs.

    Raises:
        ValueError: the folder is no run, or was not evaluated.
    """
    run = open_run(folder)
    runs = run.models
    models = {name: one.report() for name, one in runs.items()}
    _certify_alike(models, runs)
    if run.has_twins:
        write_json(folder / "report.json", {"models": models})
    training = {name: _read_log(one.folder / "training.jsonl") for name, one in runs.items()}
    write_text(folder / "report.html", _render(models, training))
    return models


def print_report(models: dict[str, Figures], console: Console) -> None:
    """Print the figures as tables on the terminal."""
    table = Table(title="accuracy, % (95 % interval)", title_justify="left")
    for column in ("", *models):
        table.add_column(column, justify="left" if not column else "right")
    for label, cells in accuracy_rows(models):
        table.add_row(label, *cells)
    console.print(table)
    for words, names in _by_images(models).items():
        console.print(f"{', '.join(names)}: {words}", highlight=False, markup=False)
    for name, figures in models.items():
        lipschitz = figures["lipschitz"]
        largest = max((math.inf if layer["upper"] is None else layer["upper"] for layer in figures["layers"]), default=math.inf)
        console.print(
            f"{name}: Lipschitz bound {number(lipschitz['bound'])}, estimate {number(lipschitz['estimate'])}, "
            f"largest layer norm {number(largest)}; certified: the forward pass in {lipschitz['certified_dtype']}",
            highlight=False,
        )  # fmt: skip
        if local := figures.get("local_certificates"):
            console.print(f"  {local_in_words(local)}", highlight=False, markup=False)
        noted = [gate for gate in figures["gates"] if gate["status"] != "pass"]
        console.print(f"  {len(figures['gates']) - len(noted)} of {len(figures['gates'])} checks pass", highlight=False)
        if untested := not_tested(noted):
            console.print(f"  [yellow]{escape(untested)}[/yellow]", highlight=False)
        for gate in (gate for gate in noted if gate["status"] != "skip"):
            colour = "yellow" if gate["status"] == "flag" else "bold red"
            console.print(
                f"  [{colour}]{verdict(gate['status'])}[/{colour}] {escape(gate['name'])}: {escape(gate['detail'])}",
                highlight=False,
            )


def _by_images(models: dict[str, Figures]) -> dict[str, list[str]]:
    """The names of the models on the same images, by what the images are."""
    found: dict[str, list[str]] = {}
    for name, figures in models.items():
        found.setdefault(images_in_words(figures), []).append(name)
    return found


def accuracy_rows(models: dict[str, Figures]) -> list[tuple[str, list[str]]]:
    """Rows of the main table: clean, each attack and size, certified, certified around each image; a cell for each model."""
    labels: dict[tuple[str, ...], dict[str, str]] = {("clean",): {}}
    for name, figures in models.items():
        accuracy = figures["accuracy"]
        labels[("clean",)][name] = _cell({"accuracy": accuracy["clean"], "ci": accuracy["ci"]})
        for entry in figures["robust"]:
            if entry["attack"] != "worst case":
                key = (entry["attack"], f"{NORM_NAMES[entry['norm']]} {entry['eps']:g}", f"{entry['n']} images")
                labels.setdefault(key, {})[name] = _cell(entry)
    for kind, label in _PROVED.items():
        found = {name: figures.get(kind, []) for name, figures in models.items()}
        positive = {(e["norm"], e["eps"]) for entries in found.values() for e in entries if e["accuracy"]}
        for name, entry in ((name, entry) for name, entries in found.items() for entry in entries):
            if (entry["norm"], entry["eps"]) in positive:
                key = (label, f"{NORM_NAMES[entry['norm']]} {entry['eps']:g}", f"{entry['n']} images")
                labels.setdefault(key, {})[name] = _cell(entry)
    return [(" · ".join(key), [cells.get(name, "–") for name in models]) for key, cells in labels.items()]


def _cell(entry: Figures) -> str:
    """A figure with its interval, unless it is not valid; marked if its checks were not tested."""
    if (valid := entry.get("valid", True)) is False:
        return "invalid"
    return f"{percent(entry['accuracy'])} ({interval(entry['ci'])}){', not tested' if valid is None else ''}"


def _certify_alike(models: dict[str, Figures], runs: dict[str, Run]) -> None:
    """Recompute certified accuracy on a common grid of sizes for all models, from their verdicts per sample."""
    import pyarrow.parquet as pq  # the leaderboard, which imports the charts of this package, does without

    grids: dict[str, dict[str, list[float]]] = {}
    for kind in _PROVED:
        found = {(e["norm"], e["eps"]) for figures in models.values() for e in figures.get(kind, [])}
        grids[kind] = {norm: sorted(eps for own, eps in found if own == norm) for norm in sorted({norm for norm, _ in found})}
    for name, figures in models.items():
        run = runs[name].record
        rows = pq.read_table(runs[name].folder / "samples.parquet").to_pylist()
        clean = [row for row in rows if row["attack"] == "none"]
        pixels = run["channels"] * run["image_size"] ** 2
        for kind in (kind for kind in _PROVED if figures.get(kind)):
            refuted = next((e["reason"] for e in figures[kind] if e.get("valid") is False), "")
            figures[kind] = [
                judged_proof(entry, refuted) for norm, grid in grids[kind].items()
                for entry in certified_at(clean, norm, grid, pixels, around=kind == "certified_local")
            ]  # fmt: skip


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _render(models: dict[str, Figures], training: dict[str, list[dict[str, Any]]]) -> str:
    first = next(iter(models.values()))
    norms = sorted({entry["norm"] for figures in models.values() for entry in figures["robust"]})
    plots = {
        "robustness": [charts.robustness(models, norm) for norm in norms],
        "layers": charts.layer_norms(models),
        "training": charts.training_norms(training) if any(training.values()) else "",
    }
    around = any(figures.get("local_certificates") for figures in models.values())
    return render("report.html", models=models, first=first, rows=accuracy_rows(models), plots=plots, around_images=around)
