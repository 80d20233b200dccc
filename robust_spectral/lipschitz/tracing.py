"""Tracing of a model at the shape of one example: sizes are known numbers, and branches on them are taken.

Ordinary torch.fx tracing fails where a model needs a size as a number. Here every proxy carries its value on the example, so
that sizes are numbers. Operations that need the values themselves as numbers, such as a branch on them, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from .registry import RULES

_KNOWN = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "requires_grad", "is_nested")
_ASKED = ("size", "dim", "numel", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex", "get_device")


class Tracer(fx.Tracer):
    """A tracer that runs the model on an example; each module for which ``is_leaf`` is true becomes one node."""

    def __init__(self, example: Tensor, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.example, self.is_leaf, self._on_values = example, is_leaf, False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module becomes one node."""
        return self.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call as one node or several, or just run it while example values are computed."""
        return forward(*args, **kwargs) if self._on_values else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A proxy of a parameter, or the parameter itself while example values are computed."""
        return attr_val if self._on_values else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> Any:
        """A placeholder for the model's first argument; all others keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that can carry its value on the example."""
        return _Proxy(node, self)

    @torch.no_grad()
    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> fx.Proxy:
        """Record a node, and compute its value on the example."""
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        values = fx.node.map_aggregate((args, kwargs), lambda a: a.value if isinstance(a, _Proxy) else a)
        self._on_values = True
        try:
            proxy.value = self._value(kind, target, *values)  # type: ignore
        finally:
            self._on_values = False
        return proxy

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.example.clone()
        if kind == "get_attr":
            return reduce(getattr, target.split("."), self.root)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        return target(*args, **kwargs) if kind == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a value that has a length."""
        parts: Any = obj
        return iter([parts[index] for index in range(len(parts.value))])


class _Proxy(fx.Proxy):
    """A proxy that carries its value on the example."""

    value: Any = None

    def __getattr__(self, k: str) -> Any:
        if k in _KNOWN and isinstance(self.value, Tensor):
            return getattr(self.value, k)
        if k in _ASKED and isinstance(self.value, Tensor):
            return getattr(self.value, k)
        return super().__getattr__(k)

    def __len__(self) -> int:
        return len(self.value)

    def __index__(self) -> int:
        return self._number().__index__()

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def _number(self) -> Any:
        if isinstance(self.value, Tensor):
            raise fx.proxy.TraceError("the value of a tensor is read as a number")
        return self.value


def pair_of(example_input: Tensor) -> Tensor:
    """The first input of a batch twice, so that no operation drops the batch axis."""
    return example_input[:1].repeat(2, *[1] * (example_input.ndim - 1))


def traced_at(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The model's graph at the shape of an example, in which each module that has a rule is one node.

    Raises:
        ValueError: the model cannot be traced.
    """
    if type(model) in RULES:  # torch.fx always traces into the root
        model = nn.Sequential(model)
    try:
        return fx.GraphModule(model, Tracer(example, lambda module: type(module) in RULES).trace(model))
    except Exception as error:
        raise ValueError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
