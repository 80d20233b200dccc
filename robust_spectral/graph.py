"""The walk over a network's graph that carries a Lipschitz bound from node to node, and the register of rules it obeys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Size, Tensor, fx, nn

from .norms import NormInterval, spectral_norm
from .operators import LinearOperator, Shape


class Walk(fx.Interpreter):
    """Runs the graph on the example and keeps, for every node, the Lipschitz bound from the network's input."""

    def __init__(self, module: fx.GraphModule, failure_probability: float) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.bounds: dict[fx.Node, float] = {}
        self.kinds: dict[fx.Node, str] = {}
        self.changed: set[fx.Node] = set()  # nodes whose values were changed in place later on
        self.reason: str | None = None
        self.failure_probability = 0.0
        self._each = failure_probability
        self._norms: dict[tuple[Any, ...], NormInterval] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, then bound it, and with it every earlier value that it changed in place."""
        before = {node: value._version for node, value in self.env.items() if isinstance(value, Tensor)}
        result = super().run_node(n)
        self.kinds[n] = n.op
        self.bounds[n] = self._bound(n, result)
        changed = {node for node, version in before.items() if self.env[node]._version != version}
        self.changed |= changed
        for node in changed:
            self.bounds[node] = max(self.bounds[node], self.bounds[n])
        return result

    def bound(self, value: Any) -> float:
        """Bound of an argument: of a node's value, 0 of a constant."""
        return self.bounds[value] if isinstance(value, fx.Node) else 0.0

    def shape(self, node: Any) -> Shape:
        """Shape of a node's value, without the batch axis."""
        return tuple(self.env[node].shape[1:])

    def operator_norm(self, key: tuple[Any, ...], build: Callable[[], LinearOperator]) -> float:
        """Proved norm of an operator, computed once for each key; its failure probability is added up."""
        if key not in self._norms:
            interval = spectral_norm(build(), self._each)
            self.failure_probability += interval.failure_probability
            self._norms[key] = interval
        return self._norms[key].upper

    def called(self, node: Any) -> nn.Module | None:
        """The module a node calls, if it calls one."""
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.submodules[node.target] if called else None

    def _bound(self, n: fx.Node, result: Any) -> float:
        if n.op == "placeholder":
            return 1.0
        depends = any(self.bound(a) != 0 for a in n.all_input_nodes)
        if n.op == "output" and isinstance(result, tuple | list | dict):
            return self._unknown(n, "a model with several outputs")
        if depends and not isinstance(result, Tensor) and not _is_shape(n):
            return self._unknown(n, str(n.target))
        if n.op == "get_attr" or not isinstance(result, Tensor) or all(self.bound(a) == 0 for a in n.all_input_nodes):
            return 0.0 if isinstance(result, Tensor | int | float | bool | tuple | Size) else self._unknown(n, "its result")
        if n.op == "output":
            return self.bound(n.args[0])
        module = self.called(n)
        target = type(module) if module is not None else n.target
        self.kinds[n] = getattr(target, "__name__", str(target))
        rule = RULES.get(target)
        if rule is None:
            return self._unknown(n, self.kinds[n])
        try:
            value = rule(self, n)
        except Exception as error:  # noqa: BLE001 - a call the rule does not understand is no claim, whatever it trips over
            return self._unknown(n, f"{self.kinds[n]} as it is called here ({error or type(error).__name__})")
        return value if value < math.inf else self._unknown(n, self.kinds[n])

    def _unknown(self, n: fx.Node, what: str) -> float:
        if self.reason is None:
            module = self.called(n)
            host = type(module).__module__.split(".")[0] if module is not None else ""
            hint = "; import robust_spectral.plugins.timm for its layers" if host == "timm" else ""
            self.reason = (
                f"no Lipschitz constant is known of {what} (at '{n.target if n.op == 'call_module' else n.name}'){hint}"
            )
        return math.inf


def _is_shape(n: fx.Node) -> bool:
    """Whether a node reads only shapes and types off its arguments."""
    if n.op == "call_function" and n.target is getattr:
        return n.args[1] in ("shape", "ndim", "dtype", "device")
    return n.op == "call_method" and n.target in ("size", "dim", "numel")


Rule = Callable[[Walk, fx.Node], float]
RULES: dict[Any, Rule] = {}  # module type, function or method name -> rule


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for module types, functions and method names; it returns the bound of the node's value."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def times(*factors: float) -> float:
    """Product of non-negative numbers, rounded up; 0 times anything is 0."""
    if 0 in factors:
        return 0.0
    product = 1.0
    for factor in factors:
        product = math.nextafter(product * factor, math.inf)
    return product
