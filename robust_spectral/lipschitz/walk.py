"""The walk over a network's graph that computes the Lipschitz bound of each node from those of its arguments.

A node's bound is a Lipschitz constant of its value as a function of the network's input, all samples of a batch taken together.
Consecutive affine nodes (an affine stretch) are one operator, whose norm is computed only when a non-affine node needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..norms import NormInterval, spectral_norm
from ..numerics import product_up
from ..operators import LinearOperator, Shape, compose, has_forward_hooks
from .boxes import Box, box_intersection, of_each_part, rounded_outward, widened
from .registry import INTERVALS, JOINERS, RULES

_LARGEST_STRETCH = 3e5  # most elements in a step's argument for which a stretch of several layers is bounded as a whole
Key = tuple[Any, ...]


Build = Callable[[], LinearOperator]


@dataclass(frozen=True)
class Affine:
    """A node's value as an affine function of another node's value.

    Attributes:
        source: The other node.
        key: Identifies the operator, so that its norm is computed once.
        build: Makes the operator at the node's full shape, without the batch axis.
        norm: The operator's norm, rounded up, if it is known; or a key and a builder of a smaller operator of the same norm.
        module: The layer, so that the batch normalisation that follows it can be joined with it.
    """

    source: fx.Node
    key: Key
    build: Build
    norm: float | tuple[Key, Build] | None = None
    module: nn.Module | None = None


class LipschitzWalk(fx.Interpreter):
    """An interpreter that runs the graph on the example and computes every node's Lipschitz bound from the network's input.

    With a ``box`` of inputs the walk is local: the example is the centre of the box, ``radius`` is half its diagonal, and every
    node has a box that contains its values, so that rules may use their size.
    """

    def __init__(
        self, module: fx.GraphModule, failure_probability: float, norms: dict[Key, NormInterval] | None = None,
        box: Box | None = None, radius: float = math.inf,
    ) -> None:  # fmt: skip
        super().__init__(module, garbage_collect_values=False)
        self.bounds: dict[fx.Node, float] = {}
        self.affine: dict[fx.Node, Affine] = {}
        self.kinds: dict[fx.Node, str] = {}
        self.boxes: dict[fx.Node, Box] = {}
        self.changed: dict[fx.Node, list[fx.Node]] = {}  # nodes changed in place later on -> the nodes that did so
        self.reason: str | None = None
        self.norms = {} if norms is None else norms
        self.local = box is not None
        self.each = failure_probability  # of each norm
        self._input_box, self._radius = box, radius

    @property
    def failure_probability(self) -> float:
        """A bound of the probability that any of the norms used is wrong."""
        return sum(interval.failure_probability for interval in self.norms.values())

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, bound it, and record every earlier value that it changed in place."""
        before = {node: value._version for node, value in self.env.items() if isinstance(value, Tensor)}
        result = self.env[n] = super().run_node(n)
        self.kinds[n] = n.op
        found = self._bound(n, result)
        if isinstance(found, Affine):
            self.affine[n] = found
        else:
            self.bounds[n] = found
        if self.local and self.depends(n) and _all_tensors(result):
            self.boxes[n] = self._box(n, result)
        for node, version in before.items():
            if self.env[node]._version != version:
                self.changed.setdefault(node, []).append(n)
                if self.local and self.depends(node):
                    self.boxes[node] = widened(self.boxes.get(node, (self.env[node],) * 2), self.boxes[n])
        return result

    def depends(self, value: Any) -> bool:
        """Whether an argument depends on the network's input."""
        if isinstance(value, tuple | list):
            return any(self.depends(part) for part in value)
        if not isinstance(value, fx.Node):
            return False
        return value in self.affine or self.bounds[value] != 0 or any(self.depends(n) for n in self.changed.get(value, ()))

    def bound(self, value: Any) -> float:
        """Bound of an argument: its node's bound, or 0 for a constant."""
        if not isinstance(value, fx.Node):
            return 0.0
        if value not in self.bounds:
            try:
                self.bounds[value] = self.bound_at(value)
            except (NotImplementedError, ValueError, RuntimeError) as error:
                self.bounds[value] = self._unknown(value, f"this call of {self.kinds[value]} ({error})")
        return max(self.bounds[value], *(self.bound(n) for n in self.changed.get(value, ())), 0.0)

    def bound_at(self, node: fx.Node) -> float:
        """Compute the bound of an affine node."""
        return self.bound_of(self.affine[node])

    @property
    def value(self) -> float:
        """Bound of the network's output; inf where the walk did not reach it."""
        output = next(node for node in reversed(list(self.graph.nodes)) if node.op == "output")
        return self.bounds.get(output, math.inf)

    def shape(self, node: Any) -> Shape:
        """Shape of a node's value, without the batch axis."""
        return tuple(self.env[node].shape[1:])

    def box(self, value: Any) -> Box:
        """Lowest and highest values of an argument's elements; only in a local walk."""
        if isinstance(value, fx.Node):
            return self.boxes[value] if value in self.boxes else (self.env[value], self.env[value])
        return value, value

    def size(self, value: Any) -> Tensor:
        """Largest absolute values of an argument's elements; only in a local walk."""
        low, high = self.box(value)
        return torch.maximum(torch.as_tensor(low).abs(), torch.as_tensor(high).abs()).double()

    def operator_norm(self, key: Key, build: Build) -> float:
        """A proved upper bound of an operator's norm, computed once for each key."""
        if key not in self.norms:
            self.norms[key] = spectral_norm(build(), self.each)
        return self.norms[key].upper

    def rerun(self, n: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Compute a node's value for other values of its arguments."""
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), value_of)
        return getattr(self, n.op)(n.target, args, kwargs)

    def called(self, node: Any) -> nn.Module | None:
        """The module that a node calls; None if it calls none."""
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.submodules[node.target] if called else None

    def stretch(self, last: Affine) -> tuple[fx.Node, list[Affine]]:
        """The input node of the affine stretch that ends with a step, and all steps of the stretch."""
        steps = [last]
        while steps[0].source in self.affine and steps[0].source not in self.changed:
            steps.insert(0, self.affine[steps[0].source])
        return steps[0].source, _joined(steps)

    def bound_of(self, last: float | Affine) -> float:
        """Bound of the stretch's input times the smaller of the whole stretch's norm and the product of its steps' norms."""
        if not isinstance(last, Affine):
            return last
        root, steps = self.stretch(last)
        alone = product_up(self.bound(root), self.product(steps))
        layers = [step for step in steps if not isinstance(step.norm, float)]
        if len(layers) < 2 or max(prod(self.shape(step.source)) for step in steps) > _LARGEST_STRETCH:
            return alone
        whole = self.operator_norm(tuple(step.key for step in steps), lambda: composed(steps))
        return min(alone, product_up(self.bound(root), whole))

    def product(self, steps: list[Affine]) -> float:
        """Product of the norms of steps; a layer and the batch normalisation that follows it are one step."""
        return product_up(*(self._norm(step) for step in _joined(steps)))

    def _norm(self, step: Affine) -> float:
        return step.norm if isinstance(step.norm, float) else self.operator_norm(*(step.norm or (step.key, step.build)))

    def _bound(self, n: fx.Node, result: Any) -> float | Affine:
        if n.op == "placeholder":
            return 1.0
        depends = any(self.depends(a) for a in n.all_input_nodes)
        if n.op == "output":
            return self.bound(n.args[0]) if isinstance(result, Tensor) else self._unknown(n, "a model with several outputs")
        if not depends or n.op == "get_attr" or _is_shape(n):
            return 0.0
        module = self.called(n)
        target = type(module) if module is not None else n.target
        self.kinds[n] = getattr(target, "__name__", str(target))
        rule = RULES.get(target)
        if not _all_tensors(result):
            return self._unknown(n, str(n.target))
        if not all(part.dtype in (torch.float32, torch.float64) for part in _parts(result)):
            return self._unknown(n, f"{self.kinds[n]} to {_parts(result)[-1].dtype}")
        if rule is None:
            return self._unknown(n, self.kinds[n])
        if module is not None and is_overridden(module) and rule is not RULES.get(nn.Linear):
            return self._unknown(n, f"{self.kinds[n]} with hooks or an overridden forward")
        try:
            value = rule(self, n)
        except Exception as error:  # noqa: BLE001 - an unsupported call has no bound, whatever error it raises
            return self._unknown(n, f"this call of {self.kinds[n]} ({error or type(error).__name__})")
        return value if isinstance(value, Affine) or value < math.inf else self._unknown(n, self.kinds[n])

    def _box(self, n: fx.Node, result: Any) -> Box:
        """The box of a node's values, from its interval rule and from its Lipschitz bound around its value at the centre."""
        if n.op == "placeholder":
            assert self._input_box is not None
            return self._input_box
        module = self.called(n)
        rule = INTERVALS.get(type(module) if module is not None else n.target)
        found = None
        if rule is not None and n.op != "output":
            try:
                found = rule(self, n)
            except Exception:  # noqa: BLE001 - an unsupported call has the box of its Lipschitz bound
                found = None
        if found is not None and (n in self.affine or not isinstance(result, Tensor)):
            return rounded_outward(found)
        reach = product_up(self.bound(n), self._radius)
        around = of_each_part(lambda value: (value - reach, value + reach), result)
        return rounded_outward(around if found is None else box_intersection(found, around))

    def _unknown(self, n: fx.Node, what: str) -> float:
        if self.reason is None:
            module = self.called(n)
            host = type(module).__module__.split(".")[0] if module is not None else ""
            hint = "; import robust_spectral.plugins.timm for its layers" if host == "timm" else ""
            hint = "; use model.float()" if what.endswith(("torch.float16", "torch.bfloat16")) else hint
            self.reason = f"no Lipschitz constant is known for {what} (at '{where(n)}'){hint}"
        return math.inf


def where(n: fx.Node) -> str:
    """The name of a node in the model."""
    return str(n.target) if n.op == "call_module" else n.name


def composed(steps: list[Affine]) -> LinearOperator:
    """The operator of a stretch: the composition of its steps."""
    return reduce(compose, [step.build() for step in steps])


def _joined(steps: list[Affine]) -> list[Affine]:
    """The steps, with each batch normalisation joined to the layer before it where possible."""
    joined: list[Affine] = []
    for step in steps:
        both = JOINERS.get(type(step.module), lambda *_: None)(joined[-1], step) if joined else None
        joined[-1:] = [both] if both is not None else [*joined[-1:], step]
    return joined


def _all_tensors(result: Any) -> bool:
    return isinstance(result, Tensor) or (
        isinstance(result, tuple | list) and len(result) > 0 and all(isinstance(part, Tensor) for part in result)
    )


def _parts(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def is_overridden(module: nn.Module) -> bool:
    """Whether hooks or an instance's own ``forward`` may change what a module of its type computes."""
    return has_forward_hooks(module) or "forward" in vars(module)


def _is_shape(n: fx.Node) -> bool:
    """Whether a node reads only the shape, dtype or device of its argument."""
    if n.op == "call_function" and n.target is getattr:
        return n.args[1] in ("shape", "ndim", "dtype", "device")
    return n.op == "call_method" and n.target in ("size", "dim", "numel")
