"""A Lipschitz bound of a whole network, computed from its graph: proved, or infinite with the name of the unbounded node.

`torch.export` gives the graph of the operations that the model runs on an example. Each node gets a number L such that its
value is L-Lipschitz as a function of the network's input (L2 to L2): norms multiply along a chain, the branches' constants
add at a sum, and their squares add at a concatenation. Each operation has a row in one table; one without a row makes the bound
infinite and is named in its ``reason``. `lipschitz_estimate` is the sampled lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers import uncompiled
from ..operators import full_precision_no_grad
from ..user_warnings import warn_user
from . import rules as rules
from .agreement import alike_in_double, difference
from .graph import Graph, InputError, graph_of, module_of, pair_of, preserved
from .precision import full_precision
from .rounding_walk import forward_errors
from .table import NoClaim
from .walk import LipschitzWalk, composed, named

_NO_WALK = "rounding errors are bounded only for a network with a Lipschitz bound for all inputs"
_OTHER_IN_DOUBLE = "a copy of the model in float64 computes something else: a cast or a constant in it is in float32"
_MOST_IN_HEAD = 1e8  # most elements in the matrix of the last affine stretch for which pairs of classes are bounded


@dataclass(frozen=True)
class NodeBound:
    """A node by its module or name, its operation, and its Lipschitz bound as a function of the network's input."""

    name: str
    kind: str
    bound: float


@dataclass(frozen=True)
class LipschitzBound:
    """A proved Lipschitz constant of a network from L2 to L2, in output units per input unit.

    Attributes:
        value: Valid for all inputs; inf where nothing is proved.
        nodes: The bounds of single nodes; an affine node inside a longer affine stretch has no row of its own.
        reason: Why ``value`` or ``local`` is infinite, or why `refined_bound` did not refine it; None otherwise.
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


def lipschitz_bound(
    model: nn.Module, example_input: Tensor, failure_probability: float = 1e-9, box: tuple[float, float] | None = (0.0, 1.0)
) -> LipschitzBound:
    """A proved upper bound of a network's Lipschitz constant, L2 to L2, in eval mode.

    The bound is of the operations that `torch.export` records on two copies of the example. It holds for a model whose forward
    pass is a function of its input alone. A model that is seen to be none, on samples of other batch sizes and in both gradient
    modes, gets no bound; so does one that changes its own state.

    Args:
        model: A model whose output for an image does not depend on the other images of its batch; unchanged afterwards.
        example_input: A batch for the model, (n, ...). Only its shape matters; values outside the box cause a warning.
        failure_probability: Allowed for each layer's norm bound; the result has the sum. 0 for deterministic bounds only.
        box: Least and largest value of an input's elements, for ``local`` and ``errors``; None for unlimited inputs.

    Returns:
        LipschitzBound: with ``value = inf`` and a ``reason`` where an operation has no row or no global constant, or
        `torch.export` cannot follow the model. Products of two functions of the input (gating, attention) have a constant only
        on inputs in the box, in ``local``. Of several outputs all are bounded together.

    Raises:
        ValueError: a weight is not finite or has no value, the model does not take the input, or the box is empty.
        TypeError: the example is not a tensor.
    """
    if box is not None and (len(box) != 2 or not -math.inf < box[0] < box[1] < math.inf):
        raise ValueError(f"lipschitz_bound(box={box}): give a least and a larger value, both finite")
    model = uncompiled(model)
    _check(model, example_input)
    with torch.inference_mode(False), preserved(model), full_precision_no_grad():
        example = pair_of(example_input.detach()).clone()
        try:
            found = _bounded(model, graph_of(model, example), example, failure_probability, box)
        except NoClaim as refused:
            return LipschitzBound(math.inf, reason=str(refused), errors_reason=_NO_WALK)
        except InputError as error:
            shape = tuple(example_input.shape)
            raise ValueError(
                f"lipschitz_bound: {type(model).__name__} does not take a batch (n, ...) of shape {shape}, tested with the "
                f"first input twice: {error}"
            ) from error.__cause__
    if box is not None and math.isfinite(found.local):
        _warn_if_outside(example_input, *box)
    return found


@torch.no_grad()
def _check(model: nn.Module, example_input: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"lipschitz_bound: takes a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(
            f"lipschitz_bound: example_input must be a batch that the model takes, a tensor; got {type(example_input).__name__}"
        )
    if example_input.layout != torch.strided or example_input.is_quantized:
        raise ValueError("lipschitz_bound: example_input must be a dense batch; got a sparse or quantised tensor")
    if example_input.ndim == 0 or example_input.numel() == 0:
        raise ValueError(
            f"lipschitz_bound: the example has shape {tuple(example_input.shape)}; give a batch (n, ...) of inputs"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"lipschitz_bound: '{name}' has no values (meta device or lazy); load or initialise the weights first"
            )
        if tensor.is_inference():
            raise ValueError(f"lipschitz_bound: '{name}' was made inside torch.inference_mode(); make the model outside")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"lipschitz_bound: '{name}' contains NaN or infinite values")


def _bounded(
    model: nn.Module, graph: Graph, example: Tensor, failure_probability: float, box: tuple[float, float] | None
) -> LipschitzBound:
    """The bound of a graph, and where it is finite the comparison of the graph with the model."""
    low, high = box or (0.0, 0.0)
    values = graph.values(torch.full_like(example, (low + high) / 2) if example.is_floating_point() else example)
    walk = LipschitzWalk(graph, values, failure_probability)
    walk.run()
    value = walk.value
    if math.isfinite(value):
        local, reason, pairs = value, None, _pairs(walk)
        errors, errors_reason = ({}, None) if box is None else forward_errors(walk, values, *box)
    else:
        local, reason = _local_bound(walk, values, box)
        errors, errors_reason, pairs = {}, _NO_WALK, None
    if math.isfinite(local):
        inputs = _sampled(example, box)
        with full_precision(example.device):
            differs = difference(model, graph, inputs, 2 * errors.get(example.dtype, math.inf))
        if differs is not None:
            raise NoClaim(differs)
        if example.dtype == torch.float32 and not alike_in_double(model, graph, inputs, errors.get(torch.float64, math.inf)):
            errors[torch.float64], errors_reason = math.inf, _OTHER_IN_DOUBLE
    return LipschitzBound(value, _rows(walk), reason, walk.failure_probability, local, pairs, errors, errors_reason)


def _sampled(example: Tensor, box: tuple[float, float] | None) -> Tensor:
    """Inputs to compare the model with its graph on: in the box, some at its corners; without a box of several sizes."""
    if not example.is_floating_point():
        return example
    drawn = torch.rand(7, *example.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if box is None:
        drawn = (2 * drawn - 1) * 4.0 ** (torch.arange(7) - 3).reshape(-1, *[1] * (example.ndim - 1))
    else:
        drawn[::3] = drawn[::3].round()
        drawn = box[0] + drawn * (box[1] - box[0])
    return drawn.to(example)


def _rows(walk: LipschitzWalk) -> tuple[NodeBound, ...]:
    """The bounds of operations, without affine ones inside a longer stretch."""
    return tuple(
        NodeBound(module_of(node)[0] or node.name, named(node, ""), walk.bounds[node])
        for node in walk.graph.nodes
        if node in walk.graph.moving and node in walk.bounds and node is not walk.graph.input
    )


def _warn_if_outside(example_input: Tensor, low: float, high: float) -> None:
    """Warn if values of the example lie outside the box. Integer inputs (indices) are not checked."""
    values = example_input.detach()
    least, largest = (float(end) for end in values.aminmax()) if values.is_floating_point() else (low, high)
    if not low <= least <= largest <= high:
        warn_user(
            f"lipschitz_bound(box=({low:g}, {high:g})): the example has values from {least:g} to {largest:g}, and `local` and "
            "`errors`, which radii depend on, are valid only for inputs in the box; give a box of all inputs, or None"
        )


def _local_bound(
    walk: LipschitzWalk, values: Mapping[fx.Node, Any], box: tuple[float, float] | None
) -> tuple[float, str | None]:
    """The Lipschitz bound between inputs in a box, with the norms already known, and why there is none for all inputs."""
    reason = walk.reason or "the output is not made of floating-point numbers"
    if box is None:
        return math.inf, reason
    centre = values[walk.graph.input]
    low, high = (torch.full_like(centre, end) for end in box)
    radius = math.sqrt(centre.numel()) * (box[1] - box[0]) / 2 * (1 + 1e-14)
    local = LipschitzWalk(walk.graph, values, walk.each, walk.norms, (low, high), radius)
    local.run()
    if math.isinf(local.value) and local.reason not in (None, reason):
        reason = f"{reason}; on inputs in [{box[0]:g}, {box[1]:g}]: {local.reason}"
    return local.value, reason


def _pairs(walk: LipschitzWalk) -> Tensor | None:
    """‖Aᵀ(e_i - e_j)‖ times the bound of the input of the last affine stretch A, for all outputs i, j; rounded up."""
    last = walk.graph.outputs[0]
    step = walk.affine.get(last)
    if step is None or len(walk.graph.outputs) > 1 or len(walk.shape(last)) != 1:
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
