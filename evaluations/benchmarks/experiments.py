"""The tables and pictures of the experiments' page, from the figures that grids have left.

    python evaluations/benchmarks/experiments.py --grid runs/fashion-grid

Takes over the figures of a grid where one is given. Then reads ``evaluations/results/fashion-mnist/grid.json`` (all methods,
held-out images) and ``finalists.json`` (those chosen there, test images, several seeds), and writes what stands between the
marks of ``docs/experiments.md`` and the pictures beside it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from statistics import mean
from typing import Any

from robust_spectral.evaluations import pages
from robust_spectral.evaluations.charts import accuracies
from robust_spectral.evaluations.frontier import Frontier, frontier_of
from robust_spectral.evaluations.runs import read_json, write_atomically, write_json

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "evaluations" / "results" / "fashion-mnist", ROOT / "docs" / "experiments.md"
CHOSEN = "pgd l2 0.5"
Row = dict[str, Any]


def group(name: str) -> str:
    """The method of a run: its name up to the first number."""
    return re.split(r"-s?\d", name)[0]


def percent(share: float | None) -> str:
    """As on all pages; a dash for nothing valid."""
    return "–" if share is None else pages.percent(share)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.3g}"


def grid_table(rows: list[Row]) -> str:
    """A line for each run."""
    attacks = list(dict.fromkeys(key for row in rows for key in row["robust"]))
    plain, start = (next(row["seconds"] for row in rows if row["name"] == name) for name in ("bn-none", "start"))
    lines = []
    for row in rows:
        shares = [percent(share) for share in (row["clean"], *(row["robust"].get(key) for key in attacks))]
        values = [number(row[key]) for key in ("largest_norm", "lipschitz", "estimate")]
        before = start if group(row["name"]).startswith("tuned") else 0.0
        lines.append([row["name"], *shares, *values, f"{(before + row['seconds']) / plain:.2f}"])
    return table(["run", "clean", *attacks, "largest norm", "Lipschitz bound", "estimate", "time"], lines)


def frontier_table(rows: list[Row]) -> str:
    """The best run of each family of methods within each drop from the plain network."""
    drops = Frontier("bn-none").drops
    trained = [row for row in rows if row["name"] != "start"]
    families = {
        "FastClip, no batch normalisation": [r for r in trained if group(r["name"]) == "nobn-fastclip"],
        "FastClip, frozen or folded statistics": [r for r in trained if group(r["name"]) in ("tuned-frozen", "tuned-folded")],
        "FastClip, statistics of the batch": [
            r for r in trained if group(r["name"]) in ("bn-gamma", "bn-weight-gamma", "bn-convs-alone", "tuned-gamma")
        ],
        "other defences": [
            r for r in trained if r["defence"] in ("miyato", "gouk", "delattre", "senderovich") and r["name"][0] in "nb"
        ],
        "adversarial training": [r for r in trained if group(r["name"]) in ("nobn-adversarial", "bn-adversarial")],
        "adversarial training with FastClip": [r for r in trained if group(r["name"]) == "nobn-adversarial-fastclip"],
    }  # fmt: skip
    plain = next(row for row in rows if row["name"] == "bn-none")
    lines = []
    for name, members in families.items():
        best = frontier_of([{**plain, "robust": {}}, *members], Frontier("bn-none", drops=drops))
        lines.append([name, *(f"{percent(b['robust'])} ({b['name']})" if b["name"] else "–" for b in best)])
    return table(["", *(f"−{drop:g}" for drop in drops)], lines)


def finalists_table(rows: list[Row]) -> str:
    """Means over seeds, with the smallest and the largest."""
    names = list(dict.fromkeys(re.sub(r"-seed\d+$", "", row["name"]) for row in rows))
    attacks = list(dict.fromkeys(key for row in rows for key in row["robust"]))
    lines = []
    for name in names:
        seeds = [row for row in rows if re.sub(r"-seed\d+$", "", row["name"]) == name]
        cells = [[row["clean"] for row in seeds], *([row["robust"].get(key) for row in seeds] for key in attacks)]
        lines.append([name, str(len(seeds)), *map(spread, cells)])
    return table(["run", "seeds", "clean", *attacks], lines)


def spread(shares: list[float | None]) -> str:
    """Mean, and between which values."""
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return "–"
    between = f" ({percent(min(known))}–{percent(max(known))})" if len(known) > 1 else ""
    return percent(mean(known)) + between


def pictures(rows: list[Row]) -> dict[str, str]:
    """Attacked accuracy against clean accuracy, and against the proved bound, a point a run."""
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
    """The page with its tables made anew, and the pictures by file name."""
    rows = read_json(RESULTS / "grid.json")["rows"]
    made = {"grid": grid_table(rows), "frontier": frontier_table(rows)}
    if (RESULTS / "finalists.json").is_file():
        made["finalists"] = finalists_table(read_json(RESULTS / "finalists.json")["rows"])
    for name, found in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, found=found: f"{match[1]}{found}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{PAGE}: expected the marks <!-- {name} --> and <!-- end --> once")
    return text, pictures(rows)


def main() -> None:
    """Write the page's tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, help="the folder of a grid whose figures are to be taken over")
    parser.add_argument("--finalists", type=Path, help="the same for the grid of those chosen")
    options = parser.parse_args()
    for name in ("grid", "finalists"):
        if folder := getattr(options, name):
            write_json(RESULTS / f"{name}.json", read_json(folder / "grid.json"))
    text, drawn = page(PAGE.read_text())
    write_atomically(PAGE, lambda scratch: scratch.write_text(text))
    for name, picture in drawn.items():
        write_atomically(PAGE.with_name(name), lambda scratch, picture=picture: scratch.write_text(picture))


if __name__ == "__main__":
    main()
