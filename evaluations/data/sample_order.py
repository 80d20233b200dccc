"""The order in which test images are evaluated: of every first part, each class has its share.

The first images of a folder sorted by class are of one class, so that they say nothing on the others. Here images are dealt
one by one, each from the class that is furthest below its share of the images so far, classes without an image before all
others. Any first n images are thus in proportion to the classes, up to about one image of each, with at least one image of
each class where n is at least their number, and a larger n adds images to those of a smaller one.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

PROPORTIONAL, FIRST = "proportional", "first"
_SEED = 0  # of this order alone, so that no other option changes which images are evaluated


def proportional_order(labels: Tensor) -> Tensor:
    """Order images so that every first part is in proportion to their classes.

    With s_c images of class c among N, and t_c among the first n - 1 of the order, the n-th image is of the class with the
    largest n s_c - N t_c, of those with t_c = 0 if there are any. The images of a class are in a random order, and so are
    classes that tie; both are drawn from a fixed seed. The cost is N comparisons of all classes.

    Args:
        labels: Class indices of all images, (N,).

    Returns:
        Tensor: (N,) int64, the index of the image at each place.
    """
    known, random = labels.numpy(), np.random.RandomState(_SEED)  # a generator whose numbers NumPy does not change
    members = [random.permutation(np.flatnonzero(known == c)) for c in random.permutation(np.unique(known))]
    size, taken = np.array([len(m) for m in members], dtype=np.int64), np.zeros(len(members), dtype=np.int64)
    order, total = np.zeros(len(known), dtype=np.int64), len(known)
    for place in range(total):
        lacking = (place + 1) * size - total * taken
        lacking[taken == 0] += total * total
        chosen = int(lacking.argmax())
        order[place] = members[chosen][taken[chosen]]
        taken[chosen] += 1
    return torch.from_numpy(order)


def order_record(order: Tensor) -> dict[str, str | int]:
    """The record of a proportional order: its name and seed, which make it again, and the sha256 of its indices as int64."""
    return {"name": PROPORTIONAL, "seed": _SEED, "sha256": hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest()}
