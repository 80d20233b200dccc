"""A Lipschitz bound of a whole network, read off its graph: sound, or silent with the node that is to blame.

The model is traced with torch.fx and walked once with an example input. Every node gets a number L such that its value is
L-Lipschitz as a function of the network's input (L2 to L2): along a chain norms multiply, at a sum the branches' numbers
add, at a concatenation they add in squares. Each kind of module or function has one registered rule, found by exact type;
a node without a rule makes the bound infinite and says so. `lipschitz_estimate` is the sampled counterpart from below.
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

_NO_WALK = "the network has no bound for all inputs, which that of rounding is made from"
_MOST_IN_HEAD = 1e8  # numbers in the matrix of the last affine stretch, up to which pairs of classes are told apart


@dataclass(frozen=True)
class NodeBound:
    """One row of the walk: a node, what it is, and the Lipschitz bound from the network's input to its output."""

    name: str
    kind: str
    bound: float


@dataclass(frozen=True)
class LipschitzBound:
    """A proved Lipschitz constant of a network from L2 to L2, in output units per input unit.

    Attributes:
        value: Valid for all inputs; inf where nothing is proved.
        nodes: The walk, node by node; affine nodes that are part of a longer affine stretch have no row of their own.
        reason: Why ``value`` is infinite, and why ``local`` is if it is; None otherwise.
        failure_probability: Sum over the layers' probabilistic norm bounds; 0 if all are deterministic.
        local: Valid between any two inputs in the box; never above ``value``, and inf where nothing is proved.
        pairs: (classes, classes), of the difference of each two outputs, for all inputs; None where the network does not end
            in a linear layer.
        errors: By dtype, how far the output for one input of the box can be from that in real arithmetic, in L2, if computed in
            that dtype; inf where it is not known how an operation rounds. Empty where rounding is not accounted for.
        errors_reason: Why errors are infinite, or empty as ``value`` is infinite; None otherwise.
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
        """Without the walk and the constants of all pairs, of which the smallest stands for all."""
        pairs = ""
        if self.pairs is not None and len(self.pairs) > 1:
            pairs = f", smallest pair={float(self.pairs[~torch.eye(len(self.pairs), dtype=torch.bool)].min())}"
        return f"LipschitzBound(value={self.value}, local={self.local}{pairs}, reason={self.reason!r})"

    def behind(self, constant: float, errors: Mapping[torch.dtype, float] | None = None) -> LipschitzBound:
        """The bound of the network behind a function that is Lipschitz with a constant, rounded up.

        Args:
            constant: The function's Lipschitz constant. It must take the inputs meant into the box this bound was made for.
            errors: By dtype, how far the function's values are from those in real arithmetic, in L2; default not at all.
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
        model: A model that torch.fx can trace, whose output for an image does not depend on the others of its batch.
        example_input: A batch it takes, (n, ...); only shapes matter, but there is a warning where its values leave the box.
        failure_probability: Of each layer's norm; their sum is stored in the result. 0 for deterministic bounds only.
        box: Least and largest value of an input's elements, for ``local`` and ``errors``; None for inputs without limits.

    Returns:
        LipschitzBound: with ``value = inf`` and a ``reason`` where an operation has no rule or no global constant, or the
        model cannot be traced. Gates and attention have a constant on inputs in the box only, in ``local``.

    Raises:
        ValueError: a weight is not finite, the model does not take the input, or the box is empty.
    """
    if box is not None and not -math.inf < box[0] < box[1] < math.inf:
        raise ValueError(f"lipschitz_bound(box={box}): give a least and a larger value, both finite")
    model = uncompiled(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"lipschitz_bound: '{name}' holds NaN or infinite values")
    example = pair_of(example_input)
    with evaluating(model), full_precision_no_grad():
        try:
            model(example.clone())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = tuple(example_input.shape)
            raise ValueError(
                f"lipschitz_bound: {type(model).__name__} does not take a batch (n, ...) of shape {shape}, of which it was "
                f"given the first input twice: {error}"
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
            mixed = f"the output of {type(model).__name__} for an input depends on the others of its batch"
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
    """Warn where inputs do not look as if they stayed in their box; indices are not measured by it."""
    least, largest = (float(end) for end in example_input.aminmax()) if example_input.is_floating_point() else (low, high)
    if not low <= least <= largest <= high:
        warn_user(
            f"lipschitz_bound(box=({low:g}, {high:g})): the example has values from {least:g} to {largest:g}, and `local` and "
            "`errors`, which radii depend on, are about inputs in the box; give a box that all inputs stay in, or None"
        )


def _mixes_the_batch(model: nn.Module, example: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(example[1:].shape, generator=generator).to(example)
    alone, beside = model(example.clone())[0], model(torch.cat([example[:1], noise]))[0]
    return not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def _local_bound(
    traced: fx.GraphModule, example: Tensor, walk: LipschitzWalk, lowest: float, highest: float
) -> tuple[float, str | None]:
    """The bound between inputs in a box, in float64, and why there is none; known norms serve again."""
    exact = copy.deepcopy(traced).double()
    low, high = (torch.full_like(example, end, dtype=torch.float64) for end in (lowest, highest))
    radius = math.sqrt(example.numel()) * (highest - lowest) / 2 * (1 + 1e-14)
    local = LipschitzWalk(exact, walk.each, walk.norms, (low, high), radius)
    try:
        local.run((low + high) / 2)
    except (RuntimeError, ValueError, TypeError) as error:
        return math.inf, f"it does not run in float64 ({error})"
    return local.value, local.reason if math.isinf(local.value) else None


def _errors(
    traced: fx.GraphModule, example: Tensor, walk: LipschitzWalk, low: float, high: float
) -> tuple[dict[torch.dtype, float], str | None]:
    """What a forward pass in float32 or float64 errs by, and why nothing is known of that."""
    exact = copy.deepcopy(traced).double()
    errors, reason = {}, None
    for dtype in (torch.float32, torch.float64):
        errors[dtype], reason = forward_error(walk, exact, dtype, low, high, example.shape)
    if example.device.type != "cpu":  # whose convolutions may be Winograd's
        errors[torch.float32] = math.inf
    return errors, reason


def _pairs(walk: LipschitzWalk, last: Any) -> Tensor | None:
    """‖Aᵀ(e_i - e_j)‖ times the bound of what the last affine stretch A is given, for each two outputs i, j; rounded up."""
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
