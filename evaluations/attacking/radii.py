"""Certified radii of the evaluated images: from the global Lipschitz bound, and from bounds around single images.

The radius of an image is the larger of the two. Radii around images are for a copy of the model in float64, whose rounding is
small enough for deep networks; a radius for the forward pass in float32 holds for the one in float64 as well.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_spectral import LipschitzBound, certified_radius
from robust_spectral.certificates import largest_radii
from robust_spectral.lipschitz import disagreement

from ..records import Record

PIXELS = (0.0, 1.0)
BLOCK = 8  # images whose radii are one unit of work
SETTINGS = {"rounds": 4, "steps": 20, "failure_probability": 1e-9, "version": 2}  # version: raised when results may change
_MOST_OF_IT = 0.99  # share of each certified radius that rounding in float32 must leave; else float64 is certified


@dataclass(frozen=True)
class LocalRadii:
    """Radii proved around the first images of an evaluation.

    Attributes:
        radii: (n,) float64, 0 where nothing is proved around the image beyond the global bound.
        failure_probability: Of each image.
        reason: Why nothing is proved around some or all images, or None.
        differs: How the graph that the proofs are of differs from the model, or None.
    """

    radii: Tensor
    failure_probability: float
    reason: str | None
    differs: str | None

    def withdrawn(self, reason: str) -> LocalRadii:
        """The same with nothing proved, for this reason."""
        return replace(self, radii=torch.zeros_like(self.radii), reason=reason)

    def figures(self, radii: Tensor) -> dict[str, Any]:
        """The entry of a report, with the number of images whose radius is above the global one, ``radii``."""
        better = int((self.radii > radii[: len(self.radii)]).sum())
        return {"images": len(self.radii), "local": better, "dtype": "float64",
                "failure_probability": self.failure_probability, "reason": self.reason}  # fmt: skip


def prove_around(model: nn.Module, images: Tensor, labels: Tensor, settings: dict[str, Any]) -> Record:
    """The record of a unit: the largest radii proved around images, or the reason why there are none."""
    options = {key: settings[key] for key in ("rounds", "steps", "failure_probability")}
    try:
        exact, x = copy.deepcopy(model).cpu().double(), images.cpu().double()
        with _without_advice_on_rounding():
            found = largest_radii(exact, x, labels.cpu(), PIXELS, **options)
        differs = disagreement(exact, x) if bool(found.local.any()) else None
    except (RuntimeError, TypeError, ValueError) as error:
        none = torch.zeros(len(labels), dtype=torch.float64)
        return Record({"radii": none, "local": none > 0}, {"reason": str(error), "differs": None, "failure_probability": 0.0})
    told = {"reason": found.reason, "differs": differs, "failure_probability": found.failure_probability}
    return Record({"radii": found.radii, "local": found.local}, told)


def local_radii(records: Sequence[Record]) -> LocalRadii | None:
    """The radii of all units, in the order of the images; None without units."""
    if not records:
        return None
    radii = torch.cat([torch.where(record.tensors["local"], record.tensors["radii"], 0.0) for record in records])
    reason, differs = (next((r.told[key] for r in records if r.told[key]), None) for key in ("reason", "differs"))
    return LocalRadii(radii, max(r.told["failure_probability"] for r in records), reason, differs)


def radius_columns(radii: Tensor, local: LocalRadii | None) -> dict[str, list[Any]]:
    """The columns of samples.parquet on certified radii.

    Args:
        radii: The radii of the global bound, (n,).
        local: The radii around the first images, if they were computed. There are then columns for both radii and for the
            bound that the larger one rests on, ``global`` or ``local``; null where there is none.
    """
    if local is None:
        return {"certified_radius": radii.tolist()}
    rest = len(radii) - len(local.radii)
    larger = torch.maximum(radii, torch.cat([local.radii, radii.new_zeros(rest)]))
    source = ["local" if both > alone else "global" if both > 0 else None for both, alone in zip(larger, radii, strict=True)]
    return {"certified_radius": larger.tolist(), "global_radius": radii.tolist(),
            "local_radius": [*local.radii.tolist(), *[None] * rest], "certified_by": source}  # fmt: skip


def certified_radii(logits: Tensor, exact: Tensor, labels: Tensor, bound: LipschitzBound) -> tuple[Tensor, torch.dtype]:
    """Certified radii and the dtype of the certified forward pass: float64 where rounding in float32 costs much.

    Args:
        logits: The logits of the images in float32, (n, classes).
        exact: The logits in float64, (n, classes).
        labels: (n,).
        bound: The Lipschitz bound of the network.
    """
    with _without_advice_on_rounding():
        single, double = certified_radius(logits, labels, bound), certified_radius(exact, labels, bound)
    kept = double > 0
    if bool(kept.any()) and bool((single[kept] >= _MOST_OF_IT * double[kept]).all()):
        return single, torch.float32
    return double, torch.float64


@contextmanager
def _without_advice_on_rounding() -> Iterator[None]:
    """Ignore the warning of `certified_radius` that rounding exceeds every margin: float64 is certified as well."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "certified_radius: rounding")
        yield
