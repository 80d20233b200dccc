"""The positions of points in a board's picture: worst-case accuracy upwards, the Lipschitz bound to the right, logarithmic.

Models without a finite bound are in a column of their own at the right end. Defences differ in shape first and in colour
second, so that the picture can be read, and printed, without colour. A template draws the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .standings import Board, Row, displayable

WIDTH, HEIGHT = 460.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 406.0, 12.0, 252.0
ENDLESS = 434.0  # the column of the models without a finite bound
SHAPES = (
    "M-6,0A6,6 0 1 0 6,0A6,6 0 1 0 -6,0Z", "M-5.5,-5.5H5.5V5.5H-5.5Z", "M0,-7L6.5,5H-6.5Z", "M0,-7.5L6.5,0L0,7.5L-6.5,0Z",
    "M0,7L6.5,-5H-6.5Z", "M-2,-6.5H2V-2H6.5V2H2V6.5H-2V2H-6.5V-2H-2Z",
    "M-6,-4L-4,-6L0,-2L4,-6L6,-4L2,0L6,4L4,6L0,2L-4,6L-6,4L-2,0Z", "M-7,0L-3.5,-6H3.5L7,0L3.5,6H-3.5Z",
)  # fmt: skip
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Point:
    """A model in the picture: its position, and the ends of its 95 % interval."""

    row: Row
    x: float
    y: float
    low: float
    high: float


def picture(board: Board) -> dict[str, Any] | None:
    """The values for the template: points, marks of both axes, number of models left out; None if no point can be drawn."""
    drawn = [row for row in board.rows if displayable(row["worst_case"]) and row["bound"] is not None]
    if not drawn:
        return None
    bounds = [bound for row in drawn if 0 < (bound := row["bound"] or 0) < math.inf]
    first, last = _decades(bounds)
    return {
        "points": [_point(row, first, last) for row in reversed(drawn)],
        "x_marks": [(_across(e, first, last), _power(e)) for e in _exponents(first, last)] if bounds else [],
        "y_marks": [(_up(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "endless": ENDLESS if any(row["bound"] == math.inf for row in drawn) else None,
        "left_out": len(board.rows) - len(drawn),
        "box": (LEFT, RIGHT, TOP, BOTTOM), "size": (WIDTH, HEIGHT),
    }  # fmt: skip


def markers(defences: list[str]) -> dict[str, tuple[str, str]]:
    """Path and class of each defence's marker; markers become hollow once all shapes are used."""
    ordered = enumerate(sorted(set(defences)))
    return {name: (SHAPES[i % len(SHAPES)], f"hue{i % 4}{' hollow' if i // len(SHAPES) % 2 else ''}") for i, name in ordered}


def _point(row: Row, first: int, last: int) -> Point:
    cell, bound = row["worst_case"], row["bound"] or 0.0
    low, high = cell["ci"] or (cell["accuracy"], cell["accuracy"])
    x = ENDLESS if bound == math.inf else _across(math.log10(bound) if bound > 0 else first, first, last)
    return Point(row, x, _up(cell["accuracy"]), _up(low), _up(high))


def _across(exponent: float, first: int, last: int) -> float:
    return round(LEFT + 10 + (RIGHT - LEFT - 20) * (exponent - first) / (last - first), 2)


def _up(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * share, 2)


def _decades(bounds: list[float]) -> tuple[int, int]:
    """Exponents of the powers of ten around all bounds, at least one apart."""
    if not bounds:
        return 0, 1
    first, last = math.floor(math.log10(min(bounds))), math.ceil(math.log10(max(bounds)))
    return first, max(last, first + 1)


def _exponents(first: int, last: int) -> list[int]:
    """At most five marks, evenly spaced."""
    step = math.ceil((last - first) / 4)
    return list(range(first, last + 1, step))


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -2 <= exponent <= 3 else f"10{str(exponent).translate(SUPERSCRIPTS)}"
