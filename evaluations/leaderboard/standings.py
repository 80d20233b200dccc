"""The ranking: for every level (data, norm and size of the perturbation), the models attacked at that level, best first.

A model is ranked by its worst case, the share of images that survive every attack run on it. Models attacked by AutoAttack
rank above models attacked by other attacks only, and those above models attacked by controls only (random noise, a single
step) or with untested checks. A model whose figure is not valid comes last and has no rank. Equal models share a rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..wording import NORM_NAMES, size
from .entries import Entry

CONTROLS = ("noise", "fgsm")
Row = dict[str, Any]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Board:
    """The models of one level, with footnotes; ``marks`` maps a row and a column to the number of its footnote."""

    id: str
    data: str
    norm: str
    eps: float
    rows: list[Row]
    notes: list[str]
    marks: dict[tuple[str, str], int]

    @property
    def level(self) -> str:
        """The level in words."""
        return f"{self.data} · {NORM_NAMES.get(self.norm, self.norm)} · {size(self.eps, self.norm)}"


def boards(entries: list[Entry]) -> list[Board]:
    """All boards, ordered by data, norm and size."""
    levels: dict[tuple[str, str, str], float] = {}
    for entry in entries:
        for seen in entry.figures["robust"]:
            levels.setdefault((entry.figures["data"], seen["norm"], size(seen["eps"], seen["norm"])), seen["eps"])
    ordered = sorted(levels, key=lambda level: (level[0], level[1], levels[level]))
    return [
        _board(name, *level, eps=levels[level], entries=entries)
        for name, level in zip(_anchors(ordered), ordered, strict=True)
    ]  # fmt: skip


def displayable(cell: Cell | None) -> bool:
    """Whether a figure may be shown as a number: it exists, and it is not invalid."""
    return cell is not None and cell["valid"] is not False


def _board(name: str, data: str, norm: str, label: str, *, eps: float, entries: list[Entry]) -> Board:
    rows = [row for entry in entries if entry.figures["data"] == data and (row := _row(entry, norm, label))]
    rows.sort(key=lambda row: (*(-part for part in _standing(row)), row["id"]))
    standings = [_standing(row) for row in rows]
    ranked = [{"rank": 1 + standings.index(standing) if displayable(row["worst_case"]) else None, **row}
              for row, standing in zip(rows, standings, strict=True)]  # fmt: skip
    noted = list(_notes(ranked))
    marks = {(row, column): number for number, (row, columns, _) in enumerate(noted, start=1) for column in columns}
    notes = [text for _, _, text in noted]
    if len({row["data_sha256"] for row in ranked} - {None}) > 1:
        notes.append("The models of this board were not all tested on the same images: their data have different hashes")
    if len({row["sample_order"] for row in ranked}) > 1:
        notes.append(
            "The models of this board may not all have been evaluated on the same images: some are on the first test images, "
            "some on a draw in proportion to the classes"
        )
    if len({row["worst_case"]["n"] for row in ranked if displayable(row["worst_case"])}) > 1:
        notes.append("The worst cases of this board are over different numbers of images: see their intervals")
    if len({_standing(row)[0] for row in ranked if displayable(row["worst_case"])}) > 1:
        notes.append(
            "Not all models of this board were attacked by AutoAttack, or by more than controls; stronger attacks rank first"
        )
    return Board(name, data, norm, eps, ranked, notes, marks)


def _row(entry: Entry, norm: str, label: str) -> Row | None:
    """The row of a model at one level; None if it was not attacked there."""
    figures = entry.figures
    here = [e for e in figures["robust"] if (e["norm"], size(e["eps"], norm)) == (norm, label)]
    if not here:
        return None
    attacks = {e["attack"]: e for e in here if e["attack"] != "worst case"}
    proved, around = (next((e for e in figures[key] if (e["norm"], size(e["eps"], norm)) == (norm, label)), None)
                      for key in ("certified", "certified_local"))  # fmt: skip
    if displayable(around) and around and proved and around["n"] == proved["n"]:
        proved = around
    kept = ("seed", "lipschitz", "gates", "parameters", "training_seconds", "attack_seconds", "model_sha256", "data_sha256",
            "sample_order")  # fmt: skip
    return {
        "id": entry.id, "page": f"models/{entry.id}.html", "run": entry.run, "model": figures["model"],
        "defence": figures["defence"], "data": figures["data"], "norm": norm, "eps": here[0]["eps"],
        "clean": figures["clean"], "worst_case": _worst_case(here, attacks), "attacks": attacks,
        "certified": proved, **({"certified_local": around} if around else {}), "bound": _bound(figures["lipschitz"]),
        **{key: figures[key] for key in kept},
    }  # fmt: skip


def _standing(row: Row) -> tuple[float, float]:
    """The order of a row: the strength of its attacks, then its worst case; rows whose worst case is not valid come last."""
    worst = row["worst_case"]
    if not displayable(worst):
        return -1.0, -1.0
    strongest = max((2 if name == "autoattack" else 0 if name in CONTROLS else 1) for name in row["attacks"])
    untested = worst["valid"] is None and worst["reason"]  # ranked like a model attacked by controls only
    return 0.0 if untested else float(strongest), float(worst["accuracy"])


def _worst_case(here: list[Cell], attacks: dict[str, Cell]) -> Cell:
    """The recorded worst case; if its validity was not recorded, it is invalid where one of its attacks is."""
    worst = next((e for e in here if e["attack"] == "worst case"), None)
    if worst is None:
        return {**here[0], "attack": "worst case", "accuracy": None, "ci": None, "n": None, "valid": False,
                "reason": "no worst case over the attacks was recorded"}  # fmt: skip
    broken = "; ".join(f"{name}: {e['reason']}" for name, e in attacks.items() if e["valid"] is False)
    return {**worst, "valid": False, "reason": broken} if worst["valid"] is None and broken else worst


def _notes(rows: list[Row]) -> Iterator[tuple[str, list[str], str]]:
    """The footnotes on the figures of a board, in the order of its rows: the row, the columns and the text."""
    for row in rows:
        cells = {"worst case": row["worst_case"], "clean": row["clean"], **row["attacks"], "certified": row["certified"]}
        said: dict[str, list[str]] = {}
        for column, cell in cells.items():
            if cell and cell["valid"] is False:
                said.setdefault(cell["reason"], []).append(column)
            elif cell and column == "worst case" and cell["valid"] is None:
                said.setdefault(cell["reason"] or "whether the attacks were valid was not recorded", []).append(column)
        for reason, columns in said.items():
            yield row["id"], columns, f"{row['model']} ({row['run']}), {', '.join(columns)}: {reason}"


def _anchors(levels: list[tuple[str, str, str]]) -> list[str]:
    """A name for the address bar for every level, all different."""
    plain = [re.sub(r"[^a-z0-9.]+", "-", "-".join(level).lower()).strip("-") for level in levels]
    seen = Counter(plain)
    return [name if seen[name] == 1 else f"{name}-{place}" for place, name in enumerate(plain, start=1)]


def _bound(lipschitz: dict[str, Any]) -> float | None:
    """The global bound; if it is infinite or unknown, the bound between images with pixels in [0, 1], if that is known."""
    bound, local = lipschitz["bound"], lipschitz["bound_in_pixel_box"]
    return local if local is not None and (bound is None or math.isinf(bound)) else bound
