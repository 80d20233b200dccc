"""The tables and pictures of the page on experiments, from the figures of grids.

    python evaluations/benchmarks/experiments.py --grid runs/fashion-grid --finalists runs/fashion-finalists

Copies the figures of the grids that are given. Then reads ``evaluations/results/fashion-mnist/grid.json`` (all methods,
held-out images) and ``finalists.json`` (the runs chosen there, test images, several seeds), and writes the tables between the
marks of ``docs/experiments.md`` and of ``README.md``, and the pictures into ``docs``.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from robust_spectral.evaluations import wording
from robust_spectral.evaluations.grids import Frontier, frontier_of
from robust_spectral.evaluations.reporting import accuracies
from robust_spectral.evaluations.run_folder import read_json, write_json, write_text

ROOT = Path(__file__).parents[2]
RESULTS, PAGE, README = ROOT / "evaluations" / "results" / "fashion-mnist", ROOT / "docs" / "experiments.md", ROOT / "README.md"
CHOSEN, PROVED = "pgd l2 0.5", "l2 0.5"
Row = dict[str, Any]
FAMILIES = {
    "FastClip, no batch normalisation": ("nobn-fastclip",),
    "FastClip, frozen or folded statistics": ("tuned-frozen", "tuned-folded"),
    "FastClip, statistics of the batch": ("bn-gamma", "bn-weight-gamma", "bn-convs-alone", "bn-paper", "tuned-gamma"),
    "FastClip, a network made for it": ("shift-certified",),
    "other defences": (
        "nobn-gouk", "nobn-delattre", "nobn-senderovich", "tuned-folded-miyato",
        "bn-miyato", "bn-gouk", "bn-delattre", "bn-senderovich",
    ),
    "adversarial training": ("nobn-adversarial", "bn-adversarial"),
    "adversarial training with FastClip": ("nobn-adversarial-fastclip", "tuned-adversarial-fastclip"),
}  # fmt: skip
MAIN = {
    "bn-none": "no defence",
    "bn-convs-alone-1.0": "convolutions clipped without their batch normalisations",
    "bn-gouk-1.0": "Gouk's projection",
    "tuned-frozen-2.0": "FastClip on composites, target 2",
    "bn-adversarial-e0.1": "adversarial training, eps 0.1",
    "tuned-adversarial-fastclip-3.0-e0.1": "the same with FastClip on composites, target 3",
    "nobn-none-adamw": "no normalisation, no defence",
    "nobn-gouk-1.0": "no normalisation, Gouk's projection",
    "nobn-fastclip-1.2": "no normalisation, FastClip, target 1.2",
    "nobn-fastclip-1.0": "no normalisation, FastClip, target 1",
    "shift-none": "network designed for certificates, no defence",
    "shift-certified-0.25": "the same, trained for certificates at 0.25",
}


def group(name: str) -> str:
    """The method of a run: its name up to the first number."""
    return re.split(r"-[se]?\d", name)[0]


def percent(share: float | None) -> str:
    """A share as on all pages; a dash if it is not valid."""
    return "–" if share is None else wording.percent(share)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, with numbers aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """A number with three digits; a dash if it is not known."""
    return "–" if value is None else f"{value:.3g}"


def heading(attack: str) -> str:
    """The column heading of an attack, such as PGD L∞ 8/255."""
    name, norm, eps = attack.split()
    written = {"pgd": "PGD", "autoattack": "AutoAttack"}[name]
    return f"{written} {wording.NORM_NAMES[norm]} {wording.size(float(eps), norm)}"


def grid_table(rows: list[Row]) -> str:
    """The table of the grid, with a line for each run."""
    attacks = list(dict.fromkeys(key for row in rows for key in row["robust"]))
    plain, start = (next(row["seconds"] for row in rows if row["name"] == name) for name in ("bn-none", "start"))
    lines = []
    for row in rows:
        shares = [percent(share) for share in (row["clean"], *(row["robust"].get(key) for key in attacks))]
        values = [number(row[key]) for key in ("largest_norm", "lipschitz", "estimate")]
        before = start if group(row["name"]).startswith("tuned") else 0.0
        lines.append([row["name"], *shares, *values, f"{(before + row['seconds']) / plain:.2f}"])
    return table(["run", "clean", *map(heading, attacks), "largest norm", "Lipschitz bound", "estimate", "time"], lines)


def frontier_table(rows: list[Row], choice: Frontier) -> str:
    """The best run of each family of methods within each drop of clean accuracy below the run trained without the defence."""
    plain = next(row for row in rows if row["name"] == choice.plain)
    lines = []
    for family, groups in FAMILIES.items():
        members = [row for row in rows if group(row["name"]) in groups]
        best = frontier_of([{**plain, "robust": {}}, *members], choice)
        if members:
            lines.append([family, *(f"{percent(b['robust'])} ({b['name']})" if b["name"] else "–" for b in best)])
    return table([f"below {choice.plain}, {percent(plain['clean'])}", *(f"−{drop:g}" for drop in choice.drops)], lines)


def without_batchnorm(rows: list[Row]) -> list[Row]:
    """The runs whose networks have no batch normalisation left when they are used."""
    return [row for row in rows if group(row["name"]).startswith(("nobn", "tuned-folded", "shift"))]


def finalists_rows() -> list[Row]:
    """The finalists with the seeds that most of them have finished, so that all runs are compared on the same seeds."""
    rows = read_json(RESULTS / "finalists.json")["rows"]
    counts = Counter(row["seed"] for row in rows)
    most = max(counts.values())
    return [row for row in rows if counts[row["seed"]] == most]


def by_run(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of all seeds, by run."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(re.sub(r"-seed\d+$", "", row["name"]), []).append(row)
    return together


def over_seeds(rows: list[Row]) -> list[Row]:
    """One row for all seeds of a run: mean accuracies, None if one of them is not valid, and the largest bound."""
    return [
        {"name": name, "clean": mean(row["clean"] for row in seeds), "lipschitz": max(row["lipschitz"] for row in seeds),
         "certified": middle([row["certified"].get(PROVED) for row in seeds]),
         "robust": {key: middle([row["robust"].get(key) for row in seeds]) for key in seeds[0]["robust"]}}
        for name, seeds in by_run(rows).items()
    ]  # fmt: skip


def middle(shares: list[float | None]) -> float | None:
    """The mean, if all values are known."""
    known = [share for share in shares if share is not None]
    return mean(known) if len(known) == len(shares) else None


def finalists_table(rows: list[Row]) -> str:
    """Means over seeds, with the smallest and the largest value; bounds and norms are the largest over the seeds."""
    attacks = list(dict.fromkeys(key for row in rows for key in row["robust"]))
    lines = []
    for name, seeds in by_run(rows).items():
        cells = [[row["clean"] for row in seeds], *([row["robust"].get(key) for row in seeds] for key in attacks)]
        cells.append([row["certified"].get(PROVED) for row in seeds])
        worst = [number(max(row[key] for row in seeds)) for key in ("largest_norm", "lipschitz")]
        lines.append([name, str(len(seeds)), *map(spread, cells), *worst])
    columns = [*map(heading, attacks), "certified L2 0.5", "largest norm", "Lipschitz bound"]
    return table(["run", "seeds", "clean", *columns], lines)


def main_table(rows: list[Row]) -> str:
    """The finalists in the README."""
    together = {row["name"]: row for row in over_seeds(rows)}
    columns = {"PGD-40": CHOSEN, "AutoAttack": "autoattack l2 0.5"}
    lines = []
    for label, row in ((label, together[name]) for name, label in MAIN.items() if name in together):
        shares = [row["clean"], *(row["robust"][key] for key in columns.values()), row["certified"]]
        lines.append([label, *map(percent, shares), number(row["lipschitz"])])
    return table(["", "clean", *columns, "certified", "Lipschitz bound"], lines)


def spread(shares: list[float | None]) -> str:
    """The mean, with the smallest and the largest value."""
    known = [share for share in shares if share is not None]
    between = f" ({percent(min(known))}–{percent(max(known))})" if len(known) > 1 else ""
    return percent(middle(shares)) + (between if len(known) == len(shares) else "")


def pictures(rows: list[Row]) -> dict[str, str]:
    """Attacked accuracy against clean accuracy, and against the proved bound, with a point for each run."""
    kept = [row for row in rows if row["robust"].get(CHOSEN) is not None and row["name"] != "start"]
    groups = list(dict.fromkeys(group(row["name"]) for row in kept))
    points = {name: [row for row in kept if group(row["name"]) == name] for name in groups}
    y = "accuracy under PGD-40, L2 0.5, %"
    clean = {name: [(100 * r["clean"], 100 * r["robust"][CHOSEN]) for r in found] for name, found in points.items()}
    bounds = {
        name: [(r["lipschitz"], 100 * r["robust"][CHOSEN]) for r in found if r["lipschitz"] is not None]
        for name, found in points.items()
    }
    return {"experiments-frontier.svg": accuracies(clean, "clean accuracy, %", y),
            "experiments-bounds.svg": accuracies(bounds, "proved Lipschitz bound", y, logarithmic=True)}  # fmt: skip


def page(text: str) -> tuple[str, dict[str, str]]:
    """The page with its tables made again, and the pictures by file name."""
    rows = read_json(RESULTS / "grid.json")["rows"]
    once, twice = ([row for row in rows if row["name"].endswith("-12ep") == long] for long in (False, True))
    found = {
        "grid": grid_table(rows),
        "frontier": frontier_table(once, Frontier("bn-none")),
        "frontier-nobn": frontier_table(without_batchnorm(once), Frontier("nobn-none-adamw")),
        "frontier-twice": frontier_table(twice, Frontier("bn-none-12ep")),
    }
    finalists = finalists_rows()
    found["finalists"] = finalists_table(finalists)
    for mark, plain, kept in (("", "bn-none", list), ("-nobn", "nobn-none-adamw", without_batchnorm)):
        found[f"finalists-frontier{mark}"] = frontier_table(kept(over_seeds(finalists)), Frontier(plain, attack="autoattack"))
    return filled(text, found), pictures(rows)


def readme(text: str) -> str:
    """The README with its table made again."""
    return filled(text, {"main table": main_table(finalists_rows())})


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with each table between its marks.

    Raises:
        ValueError: the marks are missing or repeated.
    """
    for name, found in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, found=found: f"{match[1]}{found}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"expected the marks <!-- {name} --> and <!-- end --> once")
    return text


def main() -> None:
    """Write the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, help="folder of a grid, whose figures are copied")
    parser.add_argument("--finalists", type=Path, help="folder of the grid of the chosen runs, whose figures are copied")
    options = parser.parse_args()
    for name in ("grid", "finalists"):
        if folder := getattr(options, name):
            write_json(RESULTS / f"{name}.json", read_json(folder / "grid.json"))
    for report in options.finalists.glob("*/report.json") if options.finalists else ():
        write_json(RESULTS / "finalists" / report.parent.name / "report.json", read_json(report))
    text, drawn = page(PAGE.read_text())
    write_text(PAGE, text)
    write_text(README, readme(README.read_text()))
    for name, picture in drawn.items():
        write_text(PAGE.with_name(name), picture)


if __name__ == "__main__":
    main()
