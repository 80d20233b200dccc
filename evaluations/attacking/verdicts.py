"""Verdicts: the rows of samples.parquet, from the records of all units.

An image that falls at one size of perturbation counts as fallen at every larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..records import Record, Unit, falls_at, read_record
from ..wording import percent
from .work import Work

Say = Callable[[str], None]
Fallen = tuple[Tensor, Tensor]
Errors = dict[tuple[str, str, float | None], str]
Columns = dict[str, list[Any]]


def verdicts(folder: Path, work: Work, proved: Columns, say: Say) -> tuple[list[dict[str, Any]], Errors]:
    """The rows of all attacks, and the error of each failed attack.

    Args:
        folder: The run folder.
        work: All units, or the finished part of them.
        proved: Columns of the images that all rows have: their indices, ``sample``, and what is certified of them.
        say: Called with the result of each attack.
    """
    rows: list[dict[str, Any]] = []
    errors: Errors = {}
    fallen: dict[tuple[str, str], Fallen] = {}
    for (attack, norm, eps), units in work.attacks.items():
        blocks = [recorded(folder, unit) for unit in units]
        found = {key: torch.cat([block.tensors[key] for block in blocks]) for key in ("predicted", "distance", "labels")}
        labels = found["labels"]
        guess, far = _after(fallen.get((attack, norm)), found["predicted"], found["distance"], labels)
        fallen[attack, norm] = guess, far
        failed = [block.told["error"] for block in blocks if block.told["error"]]
        if failed:
            errors[attack, norm, eps] = f"the attack failed on {len(failed)} of {len(blocks)} blocks: {failed[0]}"
        rows += table_rows(attack, norm, eps, labels, guess, far, proved, "invalid" if failed else "ok")
        invalid = f"; invalid, {errors[attack, norm, eps]}" if failed else ""
        say(f"{attack} {norm}{_in_words(rows[-len(labels) :], [eps] if eps else work.sizes[norm])}{invalid}")
    return rows, errors


def _in_words(rows: list[dict[str, Any]], levels: list[float]) -> str:
    """The shares of images that survive an attack at its sizes."""
    shares = (percent(sum(falls_at(row) > eps for row in rows) / len(rows)) for eps in levels)
    told = ", ".join(f"{share} % at eps {eps:g}" for share, eps in zip(shares, levels, strict=True))
    return f": {told} of {len(rows)} images survive"


def _after(before: Fallen | None, predicted: Tensor, distance: Tensor, labels: Tensor) -> Fallen:
    """Predictions and distances at a size; an image that fell at a smaller size keeps its values from there."""
    if before is None:
        return predicted, distance
    fell = before[0] != labels
    return torch.where(fell, before[0], predicted), torch.where(fell, before[1], distance)


def table_rows(
    attack: str, norm: str, eps: float | None, labels: Tensor, predicted: Tensor, distance: Tensor, proved: Columns,
    status: str = "ok",
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of samples.parquet; records of the first schema have a distance for perturbations that fool nothing, too."""
    robust = predicted == labels
    distance = torch.where(robust, torch.inf, distance)
    columns = (column.tolist() for column in (labels, predicted, robust, distance))
    return [
        {"sample": proved["sample"][i], "label": label, "attack": attack, "norm": norm, "eps": eps, "predicted": guess,
         "robust": ok, "distance": far, **{name: column[i] for name, column in proved.items() if name != "sample"},
         "status": status}
        for i, (label, guess, ok, far) in enumerate(zip(*columns, strict=True))
    ]  # fmt: skip


def recorded(folder: Path, unit: Unit) -> Record:
    """The record of a finished unit in a run folder."""
    record = read_record(folder, unit)
    assert record is not None
    return record
