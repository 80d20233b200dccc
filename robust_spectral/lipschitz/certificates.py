"""Certified radii: the L2 distance within which a Lipschitz bound proves that an image's predicted class does not change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..user_warnings import warn_user
from .bound import LipschitzBound


def certified_radius(logits: Tensor, labels: Tensor, bound: LipschitzBound) -> Tensor:
    """L2 radius around each input within which the predicted class provably stays the true one.

    With L a Lipschitz bound of the network from L2 to L2, every difference of two logits is √2 L-Lipschitz; where the bound has
    ``pairs``, the constant of the pair of classes is used if it is smaller. The radius is the smallest quotient of the margin
    to another class and the constant of the difference, rounded down.

    Where the bound has ``errors`` for the logits' dtype, the radius is valid for forward passes in this dtype on inputs in the
    bound's box; otherwise for the network in real arithmetic, at the logits given. Float32 rounding may exceed every margin, as
    it does after GroupNorm or LayerNorm, and on a GPU, where it is not bounded: if all radii are 0 for this reason alone, there
    is a warning, and the logits of ``model.double()`` may have positive radii.

    Args:
        logits: Scores before any softmax, (batch, classes), in the dtype that they were computed in: float32 or float64.
        labels: True classes, (batch,).
        bound: A `LipschitzBound`; an estimate is refused.

    Returns:
        Tensor: (batch,) float64 radii in the unit of the network's input; 0 where the prediction is wrong or tied, a logit
        is not finite, rounding exceeds the margin, or the bound is infinite.

    Raises:
        TypeError: ``bound`` is not a proved bound, or the logits are in half precision or were made under autocast.
        ValueError: the shapes do not fit, or TF32 is on for logits in float32 on a GPU.

    Source: Tsuzuku, Sato and Sugiyama (2018), Lipschitz-Margin Training, Proposition 1.
    """
    if not isinstance(bound, LipschitzBound):
        raise TypeError(f"certified_radius(bound={bound!r}): takes the result of lipschitz_bound; an estimate proves nothing")
    _check_precision(logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"certified_radius: logits must be (batch, classes) and labels (batch,), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    scores = logits.detach().double()
    own = labels[:, None].long()
    margins = (scores.gather(1, own) - scores).scatter(1, own, math.inf)
    constants = torch.full_like(margins, math.sqrt(2) * bound.value)
    if bound.pairs is not None and bound.pairs.shape == (scores.shape[1],) * 2:
        constants = torch.minimum(constants, bound.pairs.to(scores)[labels.long()])
    error = 2 * math.sqrt(2) * bound.errors.get(logits.dtype, 0.0) * (1 + 1e-14)  # of a logit difference, at both inputs
    right = torch.isfinite(scores).all(1) & (margins > 0).all(1) & math.isfinite(bound.value)
    margins = torch.where(margins > 0, margins - error, margins)
    sound = right & (margins > 0).all(1)
    if bool(right.any()) and not bool(sound.any()):
        _warn_of_rounding(logits.dtype, error, bound)
    radius = torch.where(constants > 0, margins / constants, math.inf).amin(1)
    rounded = torch.nextafter(radius * (1 - 1e-14), torch.zeros_like(radius))
    return torch.where(sound, rounded, 0.0)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32 in the forward pass whose logits are certified: logits do not show whether either was on."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = False, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _warn_of_rounding(dtype: torch.dtype, error: float, bound: LipschitzBound) -> None:
    """Warn that the rounding error exceeds every margin, with advice."""
    size = "of unknown size" if math.isinf(error) else f"{error:.3g} logits"
    helps = dtype == torch.float32 and math.isfinite(bound.errors[torch.float64])
    advice = "give logits of model.double()" if helps else bound.errors_reason or "nothing is certified"
    warn_user(f"certified_radius: rounding of {str(dtype).removeprefix('torch.')} ({size}) exceeds every margin; {advice}")


def _check_precision(logits: Tensor) -> None:
    """Refuse logits whose rounding error is not bounded: in half precision, under autocast, or with TF32."""
    if logits.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(logits.device.type):
        what = "under autocast" if logits.dtype in (torch.float32, torch.float64) else f"in {logits.dtype}"
        raise TypeError(f"certified_radius: logits {what} prove nothing; run the model in float32 or float64")
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if logits.is_cuda and logits.dtype == torch.float32 and tf32:
        raise ValueError(
            "certified_radius: TF32 is on; set torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 to "
            "False, or certify the model in float64"
        )
