"""Spectral-norm clipping of one layer, until a norm no larger than asked is proved.

The change of a weight that lowers the top singular values followed is the smallest there is (`TrackedLayer`), but other
directions then take over, so it is repeated from warm vectors. Where many values are far above, all of them are brought down
together on a coarse grid of frequencies first (`coarse_start`). What is left above at the end is closed by a rescale.
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
from ..operators import Shape, full_precision_no_grad, is_batchnorm, is_plain
from .coarse_grid import coarse_start
from .moved_parameters import MoveWeight
from .projection import projected_weight
from .tracked_layer import TOLERANCE, TrackedLayer
from .weight_updates import add_by_groups_

Method = Literal["update", "projection", "paper"]

_MANY = 0.97  # of its norm, below which a target has many singular values above it
_ROUNDS, _PATIENCE = 300, 50  # at most, and without progress, after which a rescale has to do
_PAPER_STEP, _PAPER_POWER_STEPS, _PAPER_ROUNDS = 0.35, 10, 200


@dataclass(frozen=True)
class ClipResult:
    """What a clip did.

    Attributes:
        before: The norm it found.
        after: The norm it left.
        distortion: ‖ΔW‖ / ‖W‖ of what moved, in Frobenius norm.
        steps: Updates of the weights; 0 where nothing moved.
    """

    before: NormInterval
    after: NormInterval
    distortion: float
    steps: int

    def then(self, last: ClipResult) -> ClipResult:
        """This clip and the ``last`` behind it as one; what moved is at most the sum."""
        return ClipResult(self.before, last.after, self.distortion + last.distortion, self.steps + last.steps)


def clip_(
    module: nn.Module, in_shape: Shape, max_norm: float = 1.0, *, method: Method = "update", failure_probability: float = 1e-9,
    vectors: int = 8,
) -> ClipResult:  # fmt: skip
    """Clip the spectral norm of a layer to ``max_norm``, in place and near to the weights it has.

    Ends with a proved ``after.upper`` of at most 1.001 ``max_norm``: what the updates leave above is closed by a rescale, which
    replaces them where it moves less. A layer already below is not touched, and a norm is never raised.

    Args:
        module: A dense or convolutional layer, or ``nn.Sequential(layer, batch normalisation)``, whose first part moves. A
            parametrised weight moves through its parametrisation, that of timm's ``ScaledStdConv2d`` through its gain.
        in_shape: Shape of one input, without the batch axis.
        max_norm: The spectral norm allowed.
        method: "update", this module's, mostly within a few percent of the smallest change there is; or "projection", that
            one itself (`projected_weight`), for dense layers and convolutions of stride 1 with zero or circular padding; or,
            for comparison, "paper", the paper's gradient descent with its published step size, which proves nothing and stops,
            with no rescale, when its own estimate is below ``max_norm`` or after 200 rounds.
        failure_probability: Of the interval ``after``.
        vectors: How many singular directions are clipped together; "paper" follows one.

    Raises:
        ValueError: ``max_norm`` is not positive, the method is unknown, or the weights are not finite.
        TypeError: ``max_norm`` is not a number.
        NotImplementedError: the module has nothing that its norm follows, or its parametrisation holds it above.

    Source: the gradient descent is Algorithm 2 of Ebrahimpour Boroojeny, Telgarsky and Sundaram (AISTATS 2024).
    """
    check_max_norm("clip_", max_norm)
    if method not in ("update", "projection", "paper"):
        raise ValueError(f"clip_(method={method!r}): expected 'update', 'projection' or 'paper'")
    tracked = TrackedLayer.of(
        _as_layer(module, tuple(in_shape)), vectors=1 if method == "paper" else vectors, composite=True, seed=0
    )
    return clip_until_proved_(tracked, max_norm, failure_probability, method)


@full_precision_no_grad()
def clip_until_proved_(
    tracked: TrackedLayer, max_norm: float, failure_probability: float, method: Method = "update"
) -> ClipResult:
    """Clip until the enclosure is at most (1 + TOLERANCE) max_norm (but for "paper").

    Raises:
        ValueError: nothing is proved of the norm at the failure probability given.
        NotImplementedError: the norm does not follow what moves; everything is as it was then.
    """
    tracked.resolve(bool(tracked.composite))
    before = _decided(tracked, max_norm, failure_probability)
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
    scales_all = len(tracked.move.rescaled(tracked.layer)) == len(parameters)
    if scales_all and not _distortion(parameters, originals) <= by_rescale + TOLERANCE:
        _put_back_(parameters, originals)
        after, more = _rescale_(tracked, max_norm, failure_probability)
    if after.upper > (1 + TOLERANCE) * max_norm:
        _put_back_(parameters, originals)
        raise NotImplementedError(
            f"clipping '{tracked.layer.name}' ({type(tracked.layer.module).__name__}): its norm does not follow its "
            f"parameters down to {max_norm:g}; a parametrisation holds it, remove that first"
        )
    return ClipResult(before, after, _distortion(parameters, originals), rounds + more)


def _update_(tracked: TrackedLayer, max_norm: float, norm: float) -> int:
    """Clip until the search finds nothing above, or makes no progress; rounds taken."""
    best, since, done = math.inf, 0, 0
    if isinstance(tracked.move, MoveWeight) and max_norm < _MANY * norm:
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
    """Replace the weight by the nearest one of no larger norm."""
    layer = tracked.layer
    if layer.batchnorm is not None or not is_plain(layer.module):
        raise NotImplementedError(
            f"clipping '{layer.name}' ({type(layer.module).__name__}): only plain layers alone have a projection"
        )
    return _replace_(tracked, projected_weight(layer.module, layer.in_shape, max_norm))


def _descend_(tracked: TrackedLayer, max_norm: float, norm: float) -> int:
    """The paper's gradient descent on ‖A v - (c / σ) A₀ v‖², averaged as its code does; rounds taken."""
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


def _decided(tracked: TrackedLayer, max_norm: float, failure_probability: float) -> NormInterval:
    """The norm, as close as it takes to tell whether it is above ``max_norm``."""
    norm = tracked.enclosure(failure_probability)
    if norm.lower <= max_norm and norm.upper > (1 + TOLERANCE) * max_norm:  # undecided: look closer first
        norm = spectral_norm(tracked.operator, failure_probability, rtol=TOLERANCE / 4, max_steps=400)
    if math.isinf(norm.upper):
        raise ValueError(
            f"clipping '{tracked.layer.name}': nothing is proved of its norm with failure_probability 0; allow one"
        )
    return norm


def _rescale_(tracked: TrackedLayer, max_norm: float, failure_probability: float, most: int = 20) -> tuple[NormInterval, int]:
    """Scale down what is still above (1 + TOLERANCE) max_norm; the norm after that, and how many times it took."""
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
    if isinstance(module, nn.Sequential) and len(module) == 2 and is_batchnorm(module[1]):
        return LinearLayer("0", module[0], in_shape, module[1], "1")
    return LinearLayer(type(module).__name__, module, in_shape)


def _distortion(parameters: list[nn.Parameter], originals: list[Tensor]) -> float:
    """‖Δp‖ / ‖p‖ over all parameters together, whatever their size."""
    size = power_of_two(max(float(original.abs().max()) for original in originals))
    moved = [(p.detach().double() - o.double()) / size for p, o in zip(parameters, originals, strict=True)]
    return math.hypot(*(float(m.norm()) for m in moved)) / math.hypot(*(float((o.double() / size).norm()) for o in originals))


def check_max_norm(call: str, max_norm: float, argument: str = "max_norm") -> None:
    """Raise ValueError unless a norm is positive, TypeError unless it is a number."""
    if not hasattr(max_norm, "__float__"):
        raise TypeError(f"{call}({argument}={max_norm!r}): must be a number")
    if not max_norm > 0:
        raise ValueError(f"{call}({argument}={max_norm}): must be positive")
