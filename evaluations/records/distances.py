"""Smallest distances at which images fall: from one attack or all, at any size, and as curves of accuracy against size.

A distance in a row of samples.parquet is that of a perturbation which was verified to fool the model, 0 for an image that is
misclassified as it is, and inf where the attack found none. An attack that minimises the perturbation has one row for an
image, with eps null, and decides about every size by its distance.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
_POINTS = 200  # largest number of points of a curve


def falls_at(row: Row) -> float:
    """The smallest size at which a row's attack is known to succeed; inf if there is none."""
    if row["robust"]:
        return math.inf
    return row["distance"] if row["eps"] is None else min(row["distance"], row["eps"])


def at_sizes(attacked: Sequence[Row], given: Mapping[str, Iterable[float]]) -> list[Row]:
    """The rows of attacks with a size: those without one are repeated for every size in their norm, with the verdict there.

    Args:
        attacked: The rows of the attacks.
        given: Sizes for each norm, in addition to those of the rows.
    """
    sizes: dict[str, set[float]] = defaultdict(set)
    for norm, chosen in given.items():
        sizes[norm].update(chosen)
    for row in attacked:
        if row["eps"] is not None:
            sizes[row["norm"]].add(row["eps"])
    return [
        sized for row in attacked
        for sized in ([row] if row["eps"] is not None else
                      [row | {"eps": eps, "robust": falls_at(row) > eps} for eps in sorted(sizes[row["norm"]])])
    ]  # fmt: skip


def smallest(attacked: Iterable[Row], norm: str) -> dict[int, float]:
    """The smallest size at which any of the attacks in a norm succeeds, by sample."""
    found: dict[int, float] = defaultdict(lambda: math.inf)
    for row in attacked:
        if row["norm"] == norm:
            found[row["sample"]] = min(found[row["sample"]], falls_at(row))
    return dict(found)


def curves(attacked: Sequence[Row]) -> list[Row]:
    """Accuracy at every size: for each attack that minimises the perturbation, and for all attacks of its norm together.

    Returns:
        list: attack, norm, eps (null), n, the median distance (null if infinite), and lists of sizes with the accuracy from
            each size to the next; thinned to 200 sizes. The worst case is over the images that all attacks were run on.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for attack, norm in sorted({(row["attack"], row["norm"]) for row in attacked if row["eps"] is None}):
        found[attack, norm] = smallest((row for row in attacked if row["attack"] == attack), norm)
    for norm in sorted({norm for _, norm in found}):
        seen: dict[str, set[int]] = defaultdict(set)
        for row in (row for row in attacked if row["norm"] == norm):
            seen[row["attack"]].add(row["sample"])
        common = set.intersection(*seen.values())
        found["worst case", norm] = {i: size for i, size in smallest(attacked, norm).items() if i in common}
    return [_curve(attack, norm, sorted(distances.values())) for (attack, norm), distances in found.items() if distances]


def _curve(attack: str, norm: str, distances: list[float]) -> Row:
    count = len(distances)
    left = [(0.0, 1.0), *((size, 1 - (i + 1) / count) for i, size in enumerate(distances) if size < math.inf)]
    steps = sorted(dict(left).items())  # of equal sizes the last, from which the accuracy continues
    thin = sorted({round(i * (len(steps) - 1) / (_POINTS - 1)) for i in range(_POINTS)}) if len(steps) > _POINTS else None
    kept = steps if thin is None else [steps[i] for i in thin]
    median = distances[count // 2]
    return {"attack": attack, "norm": norm, "eps": None, "n": count, "median": median if median < math.inf else None,
            "sizes": [size for size, _ in kept], "accuracies": [accuracy for _, accuracy in kept]}  # fmt: skip


def l2_radius(norm: str, pixels: int) -> float:
    """Radius of the smallest L2 ball that contains the unit ball of a norm, in images of so many values."""
    return math.sqrt(pixels) if norm == "linf" else 1.0
