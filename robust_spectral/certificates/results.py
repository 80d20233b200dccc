"""Margins in balls around images, and radii, that are proved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Certificates:
    """Proved lower bounds of margins in L2 balls around images.

    Attributes:
        margins: (n,) float64, at most the smallest difference of the true class's logit and any other one in the ball; -inf
            where nothing is proved.
        certified: (n,) whether the margin is positive: no image of the ball has another predicted class.
        local: (n,) whether the margin is from the bounds around the image, and not from the global Lipschitz bound.
        failure_probability: Of each image; the sum over all probabilistic bounds that its margin rests on.
        reason: Why there are no bounds around the images, or None.
        dtype: Of the forward pass whose classes are certified; None: in real arithmetic only, as its rounding has no bound.
    """

    margins: Tensor
    certified: Tensor
    local: Tensor
    failure_probability: float
    reason: str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Radii:
    """Proved L2 radii around images.

    Attributes:
        radii: (n,) float64, never below those of the global Lipschitz bound; 0 where nothing is proved.
        local: (n,) whether the radius is from the bounds around the image, and not from the global Lipschitz bound.
        failure_probability: Of each image; the sum over all probabilistic bounds that its radius rests on.
        reason: Why there are no bounds around the images, or none around some of them, or None.
        dtype: Of the forward pass whose classes are certified; None: in real arithmetic only, as its rounding has no bound.
    """

    radii: Tensor
    local: Tensor
    failure_probability: float
    reason: str | None = None
    dtype: torch.dtype | None = None
