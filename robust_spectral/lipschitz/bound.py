"""A Lipschitz bound of a whole network, computed from its graph: proved, or infinite with the name of the unbounded node.

The model is traced with torch.fx, and its graph is run once on an example input. Each node gets a number L such that its value
is L-Lipschitz as a function of the network's input (L2 to L2): norms multiply along a chain, the branches' constants add at a
sum, and their squares add at a concatenation. Each type of module or function has one registered rule, found by exact type; a
node without a rule makes the bound infinite and is named in its ``reason``. `lipschitz_estimate` is the sampled lower bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers import uncompiled
from ..numerics import product_up
from ..operators import evaluating, full_precision_no_grad
from ..user_warnings import warn_user
from . import rules as rules
from .rounding_walk import forward_error
from .tracing import pair_of, traced_at
from .walk import LipschitzWalk, composed, where

_NO_WALK = "rounding errors are bounded only for a network with a Lipschitz bound for all inputs"
_MOST_IN_HEAD = 1e8  # most elements in the matrix of the last affine stretch for which pairs of classes are bounded


@dataclass(frozen=True)
class NodeBound:
    """A node, the kind of its module or function, and its Lipschitz bound as a function of the network's input."""

    name: str
    kind: str
    bound: float


@dataclass(frozen=True)
class LipschitzBound:
    """A proved Lipschitz constant of a network from L2 to L2, in output units per input unit.

    Attributes:
        value: Valid for all inputs; inf where nothing is proved.
        nodes: The bounds of single nodes; an affine node inside a longer affine stretch has no row of its own.
        reason: Why ``value`` is infinite, and why ``local`` is, if so; None otherwise.
        failure_probability: Sum over the layers' probabilistic norm bounds; 0 if all are deterministic.
        local: Valid between any two inputs in the box; never above ``value``, and inf where nothing is proved.
        pairs: (classes, classes), the Lipschitz constants of the differences of two outputs, for all inputs; None where
            ``value`` is infinite, or the network does not end in a linear layer or ends in one that is too large.
        errors: By dtype, a bound of the L2 distance between an output computed in that dtype and in real arithmetic, for any
            input in the box; inf where no rounding rule covers an operation, and for float32 on a GPU. Empty without a box and
            where ``value`` is infinite.
        errors_reason: Why errors are infinite, or missing because ``value`` is infinite; None otherwise.
    """

    value: float
    nodes: tuple[NodeBound, ...] = ()
    reason: str | None = None
    failure_probability: float = 0.0
    local: float = math.inf
    pairs: Tensor | None = None
    errors: Mapping[torch.dtype, float] = field(default_factory=dict, hash=False)
    errors_reason: str | None = None

    def __repr__(self) -> str:
        """The bounds without ``nodes``, and only the smallest constant of ``pairs``."""
        pairs = ""
        if self.pairs is not None and len(self.pairs) > 1:
            pairs = f", smallest pair={float(self.pairs[~torch.eye(len(self.pairs), dtype=torch.bool)].min())}"
        return f"LipschitzBound(value={self.value}, local={self.local}{pairs}, reason={self.reason!r})"

    def behind(self, constant: float, errors: Mapping[torch.dtype, float] | None = None) -> LipschitzBound:
        """The bound of the composition x -> network(f(x)) for a function f with a known Lipschitz constant, rounded up.

        Args:
            constant: The Lipschitz constant of f, which must map the intended inputs into the box of this bound.
            errors: By dtype, a bound of the L2 distance between f's values computed and in real arithmetic; default 0.
        """
        up = math.nextafter(constant, math.inf)
        pairs = None if self.pairs is None else self.pairs * up * (1 + 1e-15)
        both = {
            dtype: (e + product_up(self.value, (errors or {}).get(dtype, 0.0))) * (1 + 1e-15)
            for dtype, e in self.errors.items()
        }
        return replace(
            self, value=product_up(self.value, constant), local=product_up(self.local, constant), pairs=pairs, errors=both
        )


def lipschitz_bound(
    model: nn.Module, example_input: Tensor, failure_probability: float = 1e-9, box: tuple[float, float] | None = (0.0, 1.0)
) -> LipschitzBound:
    """A proved upper bound of a network's Lipschitz constant, L2 to L2, in eval mode.

    Args:
        model: A model that torch.fx can trace, whose output for an image does not depend on the other images of its batch.
        example_input: A batch for the model, (n, ...). Only its shape matters; values outside the box cause a warning.
        failure_probability: Allowed for each layer's norm bound; the result has the sum. 0 for deterministic bounds only.
        box: Least and largest value of an input's elements, for ``local`` and ``errors``; None for unlimited inputs.

    Returns:
        LipschitzBound: with ``value = inf`` and a ``reason`` where an operation has no rule or no global constant, the model
        cannot be traced, or images of a batch interact. Products of two functions of the input (gating, attention) have a
        constant only on inputs in the box, in ``local``.

    Raises:
        ValueError: a weight is not finite, the model does not take the input, or the box is empty.
    """
    if box is not None and not -math.inf < box[0] < box[1] < math.inf:
        raise ValueError(f"lipschitz_bound(box={box}): give a least and a larger value, both finite")
    model = uncompiled(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"lipschitz_bound: '{name}' contains NaN or infinite values")
    example = pair_of(example_input)
    with evaluating(model), full_precision_no_grad():
        try:
            model(example.clone())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = tuple(example_input.shape)
            raise ValueError(
                f"lipschitz_bound: {type(model).__name__} does not take a batch (n, ...) of shape {shape}, tested with "
                f"the first input twice: {error}"
            ) from error
        try:
            traced = traced_at(model, example)
        except ValueError as error:
            return LipschitzBound(math.inf, reason=str(error), errors_reason=_NO_WALK)
        walk = LipschitzWalk(traced, failure_probability)
        walk.run(example)
        output = next(node for node in reversed(list(traced.graph.nodes)) if node.op == "output")
        value = local = walk.value
        reason = walk.reason if math.isinf(value) else None
        if math.isfinite(value) and _mixes_the_batch(model, example):
            mixed = f"the output of {type(model).__name__} for an input depends on the other inputs of its batch"
            return LipschitzBound(math.inf, reason=mixed, errors_reason=_NO_WALK)
        errors: dict[torch.dtype, float] = {}
        errors_reason = _NO_WALK if math.isinf(value) else None
        if box is not None and math.isinf(value) and isinstance(walk.env.get(output), Tensor):
            local, locally = _local_bound(traced, example, walk, *box)
            reason = f"{reason}; on inputs in [{box[0]:g}, {box[1]:g}]: {locally}" if locally is not None else reason
        if box is not None and math.isfinite(value):
            errors, errors_reason = _errors(traced, example, walk, *box)
        if box is not None and math.isfinite(local):
            _warn_if_outside(example_input, *box)
        pairs = None if math.isinf(value) else _pairs(walk, output.args[0])
    rows = tuple(
        NodeBound(where(node), walk.kinds[node], walk.bounds[node])
        for node in traced.graph.nodes
        if node in walk.bounds and node.op not in ("placeholder", "output", "get_attr")
    )
    return LipschitzBound(value, rows, reason, walk.failure_probability, local, pairs, errors, errors_reason)


def _warn_if_outside(example_input: Tensor, low: float, high: float) -> None:
    """Warn if values of the example lie outside the box. Integer inputs (indices) are not checked."""
    least, largest = (float(end) for end in example_input.aminmax()) if example_input.is_floating_point() else (low, high)
    if not low <= least <= largest <= high:
        warn_user(
            f"lipschitz_bound(box=({low:g}, {high:g})): the example has values from {least:g} to {largest:g}, and `local` and "
            "`errors`, which radii depend on, are valid only for inputs in the box; give a box of all inputs, or None"
        )


def _mixes_the_batch(model: nn.Module, example: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(example[1:].shape, generator=generator).to(example)
    alone, beside = model(example.clone())[0], model(torch.cat([example[:1], noise]))[0]
    return not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def _local_bound(
    traced: fx.GraphModule, example: Tensor, walk: LipschitzWalk, lowest: float, highest: float
) -> tuple[float, str | None]:
    """The Lipschitz bound between inputs in a box, in float64 with the norms already known, and why it is infinite."""
    exact = copy.deepcopy(traced).double()
    low, high = (torch.full_like(example, end, dtype=torch.float64) for end in (lowest, highest))
    radius = math.sqrt(example.numel()) * (highest - lowest) / 2 * (1 + 1e-14)
    local = LipschitzWalk(exact, walk.each, walk.norms, (low, high), radius)
    try:
        local.run((low + high) / 2)
    except (RuntimeError, ValueError, TypeError) as error:
        return math.inf, f"the network does not run in float64 ({error})"
    return local.value, local.reason if math.isinf(local.value) else None


def _errors(
    traced: fx.GraphModule, example: Tensor, walk: LipschitzWalk, low: float, high: float
) -> tuple[dict[torch.dtype, float], str | None]:
    """Bounds of the forward pass's rounding error in float32 and float64, and why they are infinite."""
    exact = copy.deepcopy(traced).double()
    errors, reason = {}, None
    for dtype in (torch.float32, torch.float64):
        errors[dtype], reason = forward_error(walk, exact, dtype, low, high, example.shape)
    if example.device.type != "cpu":  # convolutions may be Winograd's, which no rule covers
        errors[torch.float32] = math.inf
    return errors, reason


def _pairs(walk: LipschitzWalk, last: Any) -> Tensor | None:
    """‖Aᵀ(e_i - e_j)‖ times the bound of the input of the last affine stretch A, for all outputs i, j; rounded up."""
    step = walk.affine.get(last)
    if step is None or last in walk.changed or len(walk.shape(last)) != 1:
        return None
    root, steps = walk.stretch(step)
    classes, size = walk.shape(last)[0], math.prod(walk.shape(root))
    if classes * size > _MOST_IN_HEAD:
        return None
    A = composed(steps).to(torch.float64)
    rows = A.rmatmat(torch.eye(classes, dtype=torch.float64, device=A.device)).flatten(1)
    gram = rows @ rows.mT
    squares = gram.diagonal()
    both = squares[:, None] + squares
    distances = (both - 2 * gram + 8 * size * torch.finfo(torch.float64).eps * both).clamp_min(0).sqrt()
    return (distances.fill_diagonal_(0.0) * (walk.bound(root) * (1 + 1e-13))).cpu()
