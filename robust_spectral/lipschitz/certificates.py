"""Certified radii: the L2 distance within which a Lipschitz bound proves that an image's predicted class does not change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..user_warnings import warn_user
from .bound import LipschitzBound


def certified_radius(logits: Tensor, labels: Tensor, bound: LipschitzBound) -> Tensor:
    """L2 radius around each input within which the predicted class provably stays the true one.

    With L a Lipschitz bound of the network from L2 to L2, every difference of two logits is √2 L-Lipschitz; where the bound has
    ``pairs``, the constant of the pair of classes is used if it is smaller. The radius is the smallest quotient of the margin
    to another class and the constant of the difference, rounded down.

    A network with one logit z for each image predicts class 1 where z > 0 and class 0 where z < 0; the radius is |z| / L,
    rounded down. A probability in place of the logit (after a sigmoid) has another decision boundary and no valid radius here.

    Where the bound has ``errors`` for the logits' dtype, the radius is valid for forward passes in this dtype on inputs in the
    bound's box; otherwise for the network in real arithmetic, at the logits given. Float32 rounding may exceed every margin, as
    it does after GroupNorm or LayerNorm, and on a GPU, where it is not bounded: if all radii are 0 for this reason alone, there
    is a warning, and the logits of ``model.double()`` may have positive radii.

    Args:
        logits: Scores before any softmax, (batch, classes), in the dtype that they were computed in: float32 or float64; or
            (batch, 1), the scores before any sigmoid.
        labels: True classes, (batch,), whole numbers from 0 to classes - 1; 0 or 1 for one logit.
        bound: A `LipschitzBound`; an estimate is refused.

    Returns:
        Tensor: (batch,) float64 radii in the unit of the network's input; 0 where the prediction is wrong or tied, a logit
        is not finite, rounding exceeds the margin, or the bound is infinite.

    Raises:
        TypeError: ``bound`` is not a proved bound, logits or labels are no tensors, or the logits are in another dtype than
            float32 and float64 or were made under autocast.
        ValueError: the shapes do not fit, a label is no class, or TF32 is on for logits in float32 on a GPU.

    Source: Tsuzuku, Sato and Sugiyama (2018), Lipschitz-Margin Training, Proposition 1.
    """
    _check_arguments(logits, labels, bound)
    scores = logits.detach().double()
    own = labels.detach().to(scores.device).long()[:, None]
    if scores.shape[1] == 1:
        spread, margins = 1.0, torch.where(own == 1, scores, -scores)
    else:
        spread, margins = math.sqrt(2), (scores.gather(1, own) - scores).scatter(1, own, math.inf)
    constants = torch.full_like(margins, spread * bound.value)
    if scores.shape[1] > 1 and bound.pairs is not None and bound.pairs.shape == (scores.shape[1],) * 2:
        constants = torch.minimum(constants, bound.pairs.to(scores)[own[:, 0]])
    error = 2 * spread * bound.errors.get(logits.dtype, 0.0) * (1 + 1e-14)  # of a logit difference, at both inputs
    right = torch.isfinite(scores).all(1) & (margins > 0).all(1) & math.isfinite(bound.value)
    margins = torch.where(margins > 0, margins - error, margins)
    sound = right & (margins > 0).all(1)
    if bool(right.any()) and not bool(sound.any()):
        _warn_of_rounding(logits.dtype, error, bound)
    radius = torch.where(constants > 0, margins / constants, math.inf).amin(1)
    rounded = torch.nextafter(radius * (1 - 1e-14), torch.zeros_like(radius))
    return torch.where(sound, rounded, 0.0)


def _warn_of_rounding(dtype: torch.dtype, error: float, bound: LipschitzBound) -> None:
    """Warn that the rounding error exceeds every margin, with advice."""
    size = "of unknown size" if math.isinf(error) else f"{error:.3g} logits"
    helps = dtype == torch.float32 and math.isfinite(bound.errors.get(torch.float64, math.inf))
    advice = "give logits of model.double()" if helps else bound.errors_reason or "nothing is certified"
    warn_user(f"certified_radius: rounding of {str(dtype).removeprefix('torch.')} ({size}) exceeds every margin; {advice}")


def _check_arguments(logits: Any, labels: Any, bound: Any) -> None:
    """Refuse arguments from which no valid radius follows."""
    if not isinstance(bound, LipschitzBound):
        raise TypeError(f"certified_radius(bound={bound!r}): takes the result of lipschitz_bound; an estimate proves nothing")
    for name, given in (("logits", logits), ("labels", labels)):
        if not isinstance(given, Tensor):
            kind = f"{type(given).__module__}.{type(given).__name__}".removeprefix("builtins.")
            raise TypeError(f"certified_radius({name}): takes a torch tensor, got {kind}; {_to_tensor(name, given)}")
    _check_precision(logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] == 0:
        raise ValueError(
            f"certified_radius: logits must be (batch, classes) and labels (batch,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}{_to_shape(logits, labels)}"
        )
    _check_labels(labels.detach().double(), logits.shape[1])


def _check_labels(labels: Tensor, logits: int) -> None:
    """Refuse labels that are no classes of a network with so many logits."""
    classes = max(2, logits)
    wrong = ~((labels == labels.round()) & (labels >= 0) & (labels < classes))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        known = "with one logit for each image, labels are 0 or 1" if logits == 1 else f"the classes are 0 to {classes - 1}"
        raise ValueError(
            f"certified_radius(labels): the label at index {first} is {float(labels[first]):g}; {known}: leave out images "
            "without a class, or give the indices of their classes"
        )


def _to_tensor(name: str, value: Any) -> str:
    """Advice on how to make a tensor of an argument."""
    if isinstance(value, np.ndarray):
        return f"give torch.from_numpy({name})" + (", in the dtype that the model computed in" if name == "logits" else "")
    if name == "labels":
        return "give torch.tensor of the classes, (batch,)"
    return "give the logits alone, as the model computed them, (batch, classes)"


def _to_shape(logits: Tensor, labels: Tensor) -> str:
    """Advice on shapes that are often given; empty for others."""
    if logits.ndim == 1:
        one_image = "for one image give logits[None] and labels.reshape(1)"
        return f"; {one_image}" if labels.numel() == 1 else f"; {one_image}, for one logit an image logits[:, None]"
    if logits.ndim == 2 and labels.shape == (len(logits), 1):
        return "; give labels[:, 0]"
    return "; give labels.argmax(1)" if labels.shape == logits.shape else ""


def _check_precision(logits: Tensor) -> None:
    """Refuse logits whose rounding error is not bounded: in another dtype, under autocast, or with TF32."""
    known = logits.dtype in (torch.float32, torch.float64)
    if not known or torch.is_autocast_enabled(logits.device.type):
        what = "made under autocast" if known else f"in {str(logits.dtype).removeprefix('torch.')}"
        advice = "give the model's own output, in float32 or float64, not a prediction or a rounded copy"
        if known or logits.dtype in (torch.float16, torch.bfloat16):
            advice = "run the model in float32 or float64, without autocast"
        raise TypeError(f"certified_radius: logits {what} prove nothing; {advice}")
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if logits.is_cuda and logits.dtype == torch.float32 and tf32:
        raise ValueError(
            "certified_radius: TF32 is on; set torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 to "
            "False, or certify the model in float64"
        )
