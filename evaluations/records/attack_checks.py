"""The checks of attacks against certificates and against each other (called gates in report.json), from verdicts per sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .distances import falls_at, l2_radius, smallest

Row = dict[str, Any]
_MUCH_MORE = 0.1  # share of the images that other attacks may break and PGD does not, unflagged
_FEWEST = 2  # least number of images that must show a sign


def certificate_gate(attacked: Sequence[Row], pixels: int) -> Row:
    """Check for every image that its certified radius is below its smallest adversarial distance over all attacks.

    Args:
        attacked: The rows of the attacks.
        pixels: Number of values of an image; a distance in L-inf is at most this number's root as large in L2.
    """
    nearest: dict[int, float] = {}
    radius = {row["sample"]: row["certified_radius"] for row in attacked}
    for norm in {row["norm"] for row in attacked}:
        for sample, distance in _distances(attacked, norm):
            nearest[sample] = min(nearest.get(sample, math.inf), distance * l2_radius(norm, pixels))
    ratios = [nearest[sample] / proved for sample, proved in radius.items() if proved > 0 and sample in nearest]
    broken, closest = sum(ratio <= 1 for ratio in ratios), min(ratios, default=math.inf)
    detail = f"{broken} of {len(radius)} images are misclassified inside"
    if closest < math.inf:
        detail += f"; the nearest adversarial image is at {closest:.3g} times the certified radius"
    return {"name": "no attack inside a certified radius", "status": "fail" if broken else "pass", "detail": detail}


def _distances(attacked: Sequence[Row], norm: str) -> Iterator[tuple[int, float]]:
    return ((row["sample"], row["distance"]) for row in attacked if row["norm"] == norm and row["predicted"] != row["label"])


def autoattack_gate(attacked: Sequence[Row]) -> list[Row]:
    """Count images that other attacks break and AutoAttack does not: it was then hindered, rather than the model robust."""
    missed = sorted(_missed(attacked, "autoattack"))
    if not missed:
        return []
    count = sum(broken for _, _, broken, _ in missed)
    detail = f"{count} images broken by other attacks but not by AutoAttack{_where(missed) if count else ''}"
    return [{"name": "AutoAttack breaks what other attacks break", "status": "flag" if count else "pass", "detail": detail}]


def pgd_gate(attacked: Sequence[Row]) -> list[Row]:
    """Compare PGD with all other attacks at its sizes: where they break many more images, accuracy under PGD flatters."""
    missed = sorted(_missed(attacked, "pgd"))
    if not missed:
        return []
    flagged = [level for level in missed if level[2] >= _FEWEST and level[2] > _MUCH_MORE * level[3]]
    count = max(broken for _, _, broken, _ in missed)
    detail = f"at most {count} images survive PGD but fall to another attack{_where(missed) if count else ''}"
    return [{"name": "PGD breaks most of what other attacks break", "status": "flag" if flagged else "pass", "detail": detail}]


def _missed(attacked: Sequence[Row], name: str) -> Iterator[tuple[str, float, int, int]]:
    """For each level of an attack, how many images survive it but fall to another attack, and how many images both attacked."""
    mine = [row for row in attacked if row["attack"] == name]
    others = [row for row in attacked if row["attack"] != name]
    for norm, eps in {(row["norm"], row["eps"]) for row in mine}:
        sizes = smallest(others, norm)
        here = [row for row in mine if (row["norm"], row["eps"]) == (norm, eps) and row["sample"] in sizes]
        if here:
            yield norm, eps, sum(falls_at(row) > eps >= sizes[row["sample"]] for row in here), len(here)


def _where(missed: Sequence[tuple[str, float, int, int]]) -> str:
    return " (" + ", ".join(f"{broken} of {count} at {norm} {eps:g}" for norm, eps, broken, count in missed if broken) + ")"
