"""Spectral-norm clipping of one layer, until a norm of at most the target is proved.

Each update is the smallest change of the weight that lowers the top singular values found (`TrackedLayer`). Other directions
then become the largest, so updates are repeated from warm vectors. If many values are far above the target, all of them are
first lowered together on a coarse grid of frequencies (`coarse_start`). A rescale removes the excess that remains at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import LinearLayer
from ..norms import NormInterval, spectral_norm
from ..numerics import power_of_two
from ..operators import Shape, checked_shape, full_precision_no_grad, is_overridden, is_plain, is_standard_batchnorm
from .coarse_grid import coarse_start
from .moved_parameters import MoveWeight
from .projection import projected_weight
from .tracked_layer import TOLERANCE, TrackedLayer
from .weight_updates import add_by_groups_

Method = Literal["update", "projection", "paper"]

_MANY_ABOVE = 0.97  # multiple of the norm, below which a target has many singular values above it
_ROUNDS, _PATIENCE = 300, 50  # rounds at most, and rounds without progress, before the final rescale
_PAPER_STEP, _PAPER_POWER_STEPS, _PAPER_ROUNDS = 0.35, 10, 200


@dataclass(frozen=True)
class ClipResult:
    """The result of a clip.

    Attributes:
        before: The norm before the clip.
        after: The norm after the clip.
        distortion: ‖ΔW‖ / ‖W‖ of the parameters that moved, in Frobenius norm.
        steps: Number of updates of the weights; 0 if nothing moved.
    """

    before: NormInterval
    after: NormInterval
    distortion: float
    steps: int

    def then(self, last: ClipResult) -> ClipResult:
        """This clip followed by the clip ``last``, as one result. Its distortion is the sum of both, an upper bound."""
        return ClipResult(self.before, last.after, self.distortion + last.distortion, self.steps + last.steps)


def clip_(
    module: nn.Module, in_shape: Shape, max_norm: float = 1.0, *, method: Method = "update", failure_probability: float = 1e-9,
    vectors: int = 8,
) -> ClipResult:  # fmt: skip
    """Clip the spectral norm of a layer to ``max_norm``, in place, with a small change of its weights.

    Ends with a proved ``after.upper`` of at most 1.001 ``max_norm``: a rescale removes the excess that the updates leave, or
    replaces the updates if it moves the weights less. A layer already below is not touched, and a norm is never raised.

    Args:
        module: A dense or convolutional layer, or ``nn.Sequential(layer, batch normalisation)``, whose first part moves. A
            parametrised weight moves through its parametrisation, the weight of timm's ``ScaledStdConv2d`` through its gain.
        in_shape: Shape of one input, without the batch axis.
        max_norm: The spectral norm allowed.
        method: "update", the updates of this module, mostly within a few percent of the smallest possible change; or
            "projection", the smallest change itself (`projected_weight`), for dense layers and convolutions of stride 1 with
            zero or circular padding; or, for comparison, "paper", the paper's gradient descent with its published step size,
            which proves nothing and stops, with no rescale, when its own estimate is below ``max_norm`` or after 200 rounds.
        failure_probability: Failure probability of the interval ``after``.
        vectors: Number of singular directions clipped together; "paper" follows one.

    Raises:
        ValueError: ``max_norm`` is not positive, the method is unknown, or the weights are not finite.
        TypeError: ``max_norm`` is not a number.
        NotImplementedError: the module has no parameters that its norm follows, or its parametrisation keeps the norm above
            ``max_norm``.

    Source: the gradient descent is Algorithm 2 of Ebrahimpour Boroojeny, Telgarsky and Sundaram (AISTATS 2024).
    """
    check_max_norm("clip_", max_norm)
    if method not in ("update", "projection", "paper"):
        raise ValueError(f"clip_(method={method!r}): expected 'update', 'projection' or 'paper'")
    tracked = TrackedLayer.of(
        _as_layer(module, checked_shape("clip_", in_shape)), vectors=1 if method == "paper" else vectors, composite=True, seed=0
    )
    return clip_until_proved_(tracked, max_norm, failure_probability, method)


@full_precision_no_grad()
def clip_until_proved_(
    tracked: TrackedLayer, max_norm: float, failure_probability: float, method: Method = "update"
) -> ClipResult:
    """Clip until the proved upper end of the norm is at most (1 + TOLERANCE) max_norm (except for the method "paper").

    Raises:
        ValueError: no upper end of the norm is proved at the failure probability given.
        NotImplementedError: the norm does not follow the parameters that move; their values are restored. Also raised if the
            method "projection" does not cover the layer.
    """
    tracked.resolve(bool(tracked.composite))
    before = _deciding_enclosure(tracked, max_norm, failure_probability)
    if before.upper <= (1 + TOLERANCE) * max_norm:
        return ClipResult(before, before, 0.0, 0)
    parameters = tracked.move.parameters(tracked.layer)
    originals = [p.detach().clone() for p in parameters]
    tracked.scale = power_of_two(before.upper)
    rounds = {"update": _update_, "projection": _project_, "paper": _descend_}[method](tracked, max_norm, before.upper)
    if method == "paper":
        return ClipResult(before, tracked.enclosure(failure_probability), _distortion(parameters, originals), rounds)
    after, more = _rescale_(tracked, max_norm, failure_probability)
    by_rescale = 1 - max_norm / before.upper
    scales_all = len(tracked.move.rescaled(tracked.layer)) == len(parameters) and not is_overridden(tracked.layer.module)
    if scales_all and not _distortion(parameters, originals) <= by_rescale + TOLERANCE:
        _put_back_(parameters, originals)
        after, more = _rescale_(tracked, max_norm, failure_probability)
    if after.upper > (1 + TOLERANCE) * max_norm:
        _put_back_(parameters, originals)
        raise NotImplementedError(
            f"clipping '{tracked.layer.name}' ({type(tracked.layer.module).__name__}): changing its "
            f"parameters does not lower its norm to {max_norm:g}; if a parametrisation fixes the norm, remove it first"
        )
    return ClipResult(before, after, _distortion(parameters, originals), rounds + more)


def _update_(tracked: TrackedLayer, max_norm: float, norm: float) -> int:
    """Clip until a search finds no value above ``max_norm``, or makes no progress; return the number of rounds."""
    best, since, done = math.inf, 0, 0
    if isinstance(tracked.move, MoveWeight) and max_norm < _MANY_ABOVE * norm:
        start = coarse_start(tracked.layer, bool(tracked.composite), norm, max_norm)
        if start is not None:
            done = _replace_(tracked, start)
    for rounds in range(done, _ROUNDS):
        largest = tracked.largest(max_norm)
        if largest <= max_norm * (1 + TOLERANCE / 2) or since == _PATIENCE or not math.isfinite(largest):
            return rounds
        best, since = (largest, 0) if largest < best * (1 - TOLERANCE / 100) else (best, since + 1)
        tracked.clip_directions_(max_norm)
    return _ROUNDS


def _project_(tracked: TrackedLayer, max_norm: float, norm: float) -> int:
    """Replace the weight by the nearest one of norm at most ``max_norm``; return the number of rounds, 1."""
    layer = tracked.layer
    if layer.batchnorm is not None or not is_plain(layer.module):
        raise NotImplementedError(
            f"clipping '{layer.name}' ({type(layer.module).__name__}): method='projection' takes only layers of torch.nn "
            "itself, without a batch normalisation"
        )
    return _replace_(tracked, projected_weight(layer.module, layer.in_shape, max_norm))


def _descend_(tracked: TrackedLayer, max_norm: float, norm: float) -> int:
    """Minimise ‖A v - (c / σ) A₀ v‖² by the paper's gradient descent, averaged as in its code; return the number of rounds."""
    parameters = tracked.move.parameters(tracked.layer)
    step = 2 * _PAPER_STEP / math.prod(tracked.operator.out_shape[2:])
    for done in range(_PAPER_ROUNDS):
        largest = [float(tracked.power_step().max()) for _ in range(_PAPER_POWER_STEPS)][-1]
        if not largest > max_norm:
            return done
        excess = (tracked.found.values - max_norm).clamp_min(0)
        add_by_groups_(parameters, (-step * excess[:, None] @ tracked.gradients())[:, 0])
    return _PAPER_ROUNDS


def _replace_(tracked: TrackedLayer, weight: Tensor) -> int:
    tracked.move.parameters(tracked.layer)[0].copy_(weight)
    return 1


def _put_back_(parameters: list[nn.Parameter], originals: list[Tensor]) -> None:
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.copy_(original)


def _deciding_enclosure(tracked: TrackedLayer, max_norm: float, failure_probability: float) -> NormInterval:
    """The enclosure of the norm, narrow enough to decide whether the norm is above ``max_norm``."""
    norm = tracked.enclosure(failure_probability)
    if norm.lower <= max_norm and norm.upper > (1 + TOLERANCE) * max_norm:  # undecided: narrow the interval
        norm = spectral_norm(tracked.operator, failure_probability, rtol=TOLERANCE / 4, max_steps=400)
    if math.isinf(norm.upper):
        raise ValueError(
            f"clipping '{tracked.layer.name}': no upper bound of its norm is proved with failure_probability 0; allow one"
        )
    return norm


def _rescale_(tracked: TrackedLayer, max_norm: float, failure_probability: float, most: int = 20) -> tuple[NormInterval, int]:
    """Scale the parameters until the norm is at most (1 + TOLERANCE) max_norm; return that norm and the number of rescales."""
    parameters = tracked.move.rescaled(tracked.layer)
    smallest = 1 - max(torch.finfo(p.dtype).eps for p in parameters)  # a factor nearer to 1 may be rounded away
    after = tracked.enclosure(failure_probability)
    for times in range(most):
        if after.upper <= (1 + TOLERANCE) * max_norm:
            return after, times
        factor = min(max_norm * (1 + 0.9 * TOLERANCE) / after.upper, smallest)
        for parameter in parameters:
            parameter.mul_(factor)
        after = tracked.enclosure(failure_probability)
    return after, most


def _as_layer(module: nn.Module, in_shape: Shape) -> LinearLayer:
    if isinstance(module, nn.Sequential) and len(module) == 2 and is_standard_batchnorm(module[1]):
        return LinearLayer("0", module[0], in_shape, module[1], "1")
    return LinearLayer(type(module).__name__, module, in_shape)


def _distortion(parameters: list[nn.Parameter], originals: list[Tensor]) -> float:
    """‖Δp‖ / ‖p‖ over all parameters together, computed without overflow or underflow."""
    size = power_of_two(max(float(original.abs().max()) for original in originals))
    moved = [(p.detach().double() - o.double()) / size for p, o in zip(parameters, originals, strict=True)]
    return math.hypot(*(float(m.norm()) for m in moved)) / math.hypot(*(float((o.double() / size).norm()) for o in originals))


def check_max_norm(call: str, max_norm: float, argument: str = "max_norm") -> None:
    """Raise ValueError unless ``max_norm`` is positive, TypeError unless it is a number."""
    if not hasattr(max_norm, "__float__"):
        raise TypeError(f"{call}({argument}={max_norm!r}): must be a number")
    if not max_norm > 0:
        raise ValueError(f"{call}({argument}={max_norm}): must be positive")
