"""Calls of a module: in eval mode, uncompiled, in one type, and whether anything but its class decides about their result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .base import full_precision_no_grad

_METHODS = ("forward", "_conv_forward", "_call_impl")  # methods by which a call of a module computes its output
_CASTS = (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)


def is_overridden(module: nn.Module) -> bool:
    """Whether a call of the module may compute something else than its class does.

    The reason may be forward hooks, global ones included, a method replaced on the instance, or a class of torch.nn with a
    replaced method. Backward hooks do not count, as they change gradients only.
    """
    return _hooked(module) or not vars(module).keys().isdisjoint(_METHODS) or _class_replaced(type(module))


def overriding(module: nn.Module) -> str:
    """The name of a module's class and the reason why `is_overridden` is true, if it is, for messages."""
    kind = type(module).__name__
    if _hooked(module):
        return f"{kind} (with forward hooks)"
    return f"{kind} (with a replaced forward)" if is_overridden(module) else kind


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode and restore the mode of every submodule afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Run everything uncompiled, whatever ``torch.compile`` was given, so that hooks fire and gradients are differentiable."""
    compiled = "torch._dynamo" in sys.modules  # where it was never loaded, nothing is compiled
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def forward_pass(module: nn.Module, X: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """module(X) in eval mode, with its tensors in the type of X, or the given ``parameters`` in place of its own.

    If the forward pass mixes types, because it casts or reads other tensors than the module's own, it runs in one type.
    """
    try:
        output = plain_pass(module, X, parameters)
    except RuntimeError:
        return one_type_pass(module, X, parameters)
    return output if output.dtype == X.dtype else one_type_pass(module, X, parameters)


def plain_pass(module: nn.Module, X: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """`forward_pass` with the types that the module's code chooses."""
    state = {name: ordinary(t, X.dtype) for name, t in [*module.named_parameters(), *module.named_buffers()]}
    with evaluating(module), running_eagerly(), torch.autocast(X.device.type, enabled=False):
        output: Tensor = torch.func.functional_call(module, state | dict(parameters or {}), (X,))
    return output


def one_type_pass(module: nn.Module, X: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """`forward_pass` with every floating-point tensor in the type of X, whatever the module's code casts it to."""
    with _OneType(X.dtype):
        return plain_pass(module, X, parameters)


def own_pass(module: nn.Module, X: Tensor) -> Tensor:
    """module(X) in eval mode, uncompiled and without gradients, with the module's own tensors in their own types."""
    with full_precision_no_grad(), evaluating(module), running_eagerly():
        output: Tensor = module(X)
    return output


def ordinary(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor detached and, if floating-point, in another type; copied if a forward pass or autograd could not use it."""
    if tensor.is_floating_point() and not tensor.is_inference():
        return tensor.detach().to(dtype)
    return tensor.detach().clone().to(dtype if tensor.is_floating_point() else tensor.dtype)


class _OneType(TorchFunctionMode):
    """A mode in which every floating-point tensor and type that a function of torch takes or returns becomes one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [*args[:1]] if _writes(func) else [kwargs.get("out")]
        if any(isinstance(t, Tensor) and t.is_floating_point() and t.dtype != self._dtype for t in written):
            raise RuntimeError("it writes into a tensor that is neither its own nor made in the forward pass")
        args, kwargs = tree_map(self._converted, (tuple(args), kwargs))
        return args[0] if func in _CASTS else tree_map(self._converted, func(*args, **kwargs))

    def _converted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        return self._dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its first argument: ``add_``, ``__iadd__``, ``__setitem__``."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _hooked(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _class_replaced(kind: type[nn.Module]) -> bool:
    """Whether a class of torch.nn has a method that is not torch's."""
    return _of_torch(kind) and not all(_of_torch(method) for name in _METHODS if (method := getattr(kind, name, None)))


def _of_torch(value: Any) -> bool:
    return str(value.__module__).startswith("torch.nn.modules.") and not hasattr(value, "__wrapped__")
