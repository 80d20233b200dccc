"""The checks of a network's Lipschitz bound, on which every certified figure depends (called gates in report.json).

A proof can be wrong where its program is. Two quantities that are computed without the proof refute a wrong one: the largest
Jacobian norm at the evaluated images, which no Lipschitz constant is below, and the logits of the model itself, with which the
graph that was bounded must agree. If either check fails, nothing is certified and no bound is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from robust_spectral.lipschitz import ESTIMATE_ROUNDING

NETWORK_CHECKS = 1  # version of these checks, raised when their results may change
_SLOPE, _GRAPH = "sampled slopes <= certified bound", "certified graph = model"
Row = dict[str, Any]


def bound_gate(bound: float, local: float, estimate: float) -> Row:
    """Check that no sampled Jacobian norm exceeds the bound.

    Args:
        bound: The proved bound for all images; inf if there is none.
        local: The proved bound for images with pixels in [0, 1]; inf if there is none, or if an image has other pixels.
        estimate: The largest Jacobian norm at the images; NaN if no gradient reaches their pixels.
    """
    proved = min(bound, local)
    if math.isinf(proved):
        return _row(_SLOPE, "pass", "no bound is claimed")
    if math.isnan(estimate):
        return _row(_SLOPE, "flag", "not compared, because no gradient reaches the pixels")
    detail = (
        f"the largest Jacobian norm is {estimate:.4g}, the bound {proved:.4g}; {ESTIMATE_ROUNDING:.1%} are allowed for rounding"
    )
    return _row(_SLOPE, "pass" if estimate <= (1 + ESTIMATE_ROUNDING) * proved else "fail", detail)


def graph_gate(claimed: bool, differs: str | None) -> Row:
    """Check that the graph that was bounded is the model.

    Args:
        claimed: Whether there is a bound.
        differs: The sentence of `robust_spectral.lipschitz.disagreement`; None if graph and model agree.
    """
    detail = differs or ("both give the same logits, at several batch sizes" if claimed else "no bound is claimed")
    return _row(_GRAPH, "fail" if differs else "pass", detail)


def failed_proofs(gates: Sequence[Row]) -> list[Row]:
    """The failed checks that no certified figure survives: of the bound, and by attacks inside certified radii."""
    return [gate for gate in gates if gate["status"] == "fail" and "certified" in gate["name"]]


def _row(name: str, status: str, detail: str) -> Row:
    return {"name": name, "status": status, "detail": detail}
