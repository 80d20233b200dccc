"""A Lipschitz bound of a whole network, read off its graph: sound, or silent with the node that is to blame.

The model is traced with torch.fx and walked once with an example input. Every node gets a number L such that its value is
L-Lipschitz as a function of the network's input (L2 to L2): along a chain norms multiply, at a sum the branches' numbers
add, at a concatenation they add in squares. Each kind of module or function has one registered rule, found by exact type;
a node without a rule makes the bound infinite and says so. `lipschitz_estimate` is the sampled counterpart from below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import rules as rules
from .affine import evaluating
from .graph import RULES, Walk


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
        nodes: The walk, node by node.
        reason: Why ``value`` is infinite; None otherwise.
        failure_probability: Sum over the layers' probabilistic norm bounds; 0 if all are deterministic.
        local: Valid inside the input box of the example's domain; never above ``value``.
    """

    value: float
    nodes: tuple[NodeBound, ...] = ()
    reason: str | None = None
    failure_probability: float = 0.0
    local: float = math.inf


def lipschitz_bound(model: nn.Module, example_input: Tensor, failure_probability: float = 1e-9) -> LipschitzBound:
    """A proved upper bound of a network's Lipschitz constant, L2 to L2, in eval mode.

    Args:
        model: A model that torch.fx can trace.
        example_input: A batch it takes, (n, ...); only shapes matter.
        failure_probability: Of each layer's norm; their sum is stored in the result. 0 for deterministic bounds only.

    Returns:
        LipschitzBound: with ``value = inf`` and a ``reason`` where an operation has no rule or no global constant, or the
        model cannot be traced.

    Raises:
        ValueError: a weight is not finite, or the model does not take the input.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"lipschitz_bound: '{name}' holds NaN or infinite values")
    if type(model) in RULES:  # a root would be traced into, whatever it is
        model = nn.Sequential(model)
    example = example_input[:1].repeat(
        2, *[1] * (example_input.ndim - 1)
    )  # two inputs, so that no operation drops the batch axis
    with evaluating(model), torch.no_grad():
        try:
            model(example.clone())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = tuple(example_input.shape)
            raise ValueError(
                f"lipschitz_bound: {type(model).__name__} does not take an input of shape {shape}: {error}"
            ) from error
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # noqa: BLE001 - tracing runs the model's own code, which may raise anything
            return LipschitzBound(math.inf, reason=f"torch.fx cannot trace {type(model).__name__}: {error}")
        walk = Walk(fx.GraphModule(model, graph), failure_probability)
        walk.run(example)
    graph = walk.graph
    output = next(node for node in reversed(list(graph.nodes)) if node.op == "output")
    value = walk.bounds.get(output, math.inf)
    names = [node for node in graph.nodes if node in walk.bounds and node.op not in ("placeholder", "output", "get_attr")]
    rows = tuple(NodeBound(str(node.target if node.op == "call_module" else node.name), walk.kinds[node], walk.bounds[node])
                 for node in names)  # fmt: skip
    failed = walk.failure_probability
    return LipschitzBound(value, rows, walk.reason if math.isinf(value) else None, failed, local=value)


def lipschitz_estimate(model: nn.Module, images: Tensor) -> float:
    """The largest Jacobian norm over a batch: a lower bound of the Lipschitz constant, never an upper one.

    Args:
        model: A model whose outputs (n, classes) depend on each image alone; it runs in eval mode.
        images: (n, ...), the points to sample. Costs one backward pass for every class.
    """
    with evaluating(model), torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = model(x)
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0].flatten(1) for column in logits.unbind(1)]
    jacobians = torch.stack(rows, dim=1).double()  # (n, classes, pixels)
    return float(torch.linalg.eigvalsh(jacobians @ jacobians.mT)[:, -1].clamp_min(0).sqrt().max())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES or super().is_leaf_module(m, module_qualified_name)
