"""The test images of an evaluation: their order, its record, and the check that no class is missing among them.

Attacks, checks and certificates each take the first images of one order, so that they share as many as can be. Units of work
and reports record the order. Evaluations without a record are in the data set's own order, which earlier versions took, and
continue in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import FIRST, PROPORTIONAL, ImageData, order_record
from ..records import recorded_orders
from ..run_folder import Run
from .gates import Gate

ORDERS = (PROPORTIONAL, FIRST)
COVERAGE = 1  # version of the check of the classes, raised when its results may change
_NAMED = 5  # number of missing classes that are named


def order_to_take(runs: Iterable[Run], asked: str | None) -> str:
    """The order to evaluate runs in, the same for all: the one asked for, else that of their earlier evaluations.

    Args:
        runs: The runs that are evaluated together.
        asked: "proportional", "first" (the data set's own order), or None.

    Raises:
        ValueError: a record of a run is not readable.
    """
    earlier = {name for run in runs for name in _earlier_orders(run)}
    return asked or (FIRST if earlier == {FIRST} else PROPORTIONAL)


def _earlier_orders(run: Run) -> set[str]:
    """The orders of a run's report, or of the records of an evaluation that was not finished."""
    planned = run.report().get("planned") if run.evaluated else None
    return {planned.get("sample_order", {}).get("name", FIRST)} if planned else recorded_orders(run.folder, FIRST)


def record_of(name: str, data: ImageData) -> dict[str, dict[str, str | int]]:
    """The entry ``sample_order`` of a plan, which binds units to an order; none for the data set's own order."""
    return {} if name == FIRST else {"sample_order": order_record(data.proportional_order)}


def ordered(data: ImageData, recorded: dict[str, Any] | None) -> Tensor:
    """The indices of all test images in a recorded order, (images,).

    Raises:
        ValueError: this version of the package would take the images in another order.
    """
    if recorded is None:
        return torch.arange(data.tests)
    if recorded != (here := order_record(data.proportional_order)):
        raise ValueError(f"{data.name}: the images of this evaluation are recorded as {recorded}, but here they are {here}")
    return data.proportional_order


def class_gate(data: ImageData, order: Tensor, attacked: Mapping[tuple[str, str], int]) -> Gate:
    """Check that every class of the test set is among the images of every attack.

    Args:
        data: The data set.
        order: The order of its test images, (images,).
        attacked: The number of images by attack and norm; each attack has the first ones of the order.
    """
    labels = data.digest_and_labels[1][order]
    (attack, norm), images = min(attacked.items(), key=lambda item: item[1])
    classes = labels.unique()
    missing = classes[~torch.isin(classes, labels[:images])].tolist()
    name = "every class attacked"
    if not missing:
        return Gate(name, "pass", f"each of the {len(classes)} classes of the test images is among those of every attack")
    enough = 1 + max(int((labels == c).nonzero()[0]) for c in missing)
    told = ", ".join(map(data.class_name, missing[:_NAMED])) + (", …" if len(missing) > _NAMED else "")
    advice = f"give at least {enough} to every attack (--samples, --autoattack-samples)"
    return Gate(name, "fail", f"{len(missing)} of {len(classes)} classes are not among the {images} images of {attack} {norm}: "
                f"{told}; {advice}{'' if _is_dealt(labels) else ', or take --sample-order proportional'}")  # fmt: skip


def _is_dealt(labels: Tensor) -> bool:
    """Whether an order begins with an image of each class, so that no other has them all sooner."""
    count = len(labels.unique())
    return len(labels[:count].unique()) == count
