"""The operator of any affine module, through its own forward pass and vector-Jacobian products.

One function covers every padding mode, stride, hook and weight computed in ``forward``. Since the operator is applied by
gradients, they are compared with the forward pass when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .arguments import misfit
from .base import LinearOperator, Shape
from .module_calls import one_type_pass, ordinary, overriding, plain_pass
from .probes import acts_on_groups, check_affine, check_gradients, check_own_pass, first_line

Pass = Callable[[nn.Module, Tensor], Tensor]


def module_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype, *, checked: bool = True) -> LinearOperator:
    """The operator ``x -> module(x) - module(0)`` of any affine module in eval mode.

    A forward pass that is not affine, or not possible, in the types that the module's code chooses is tried in one type.

    Args:
        module: Any module of one input and one output.
        in_shape: Shape of one input, without the batch axis.
        dtype: Type to compute in.
        checked: Whether to check that the module is affine and that its gradients are derivatives, and to look for its groups.

    Raises:
        ValueError: the module does not take the input or returns values that are not finite.
        NotImplementedError: the module is not affine, or its gradients are not the derivatives of its forward pass.
    """
    try:
        return _operator(module, plain_pass, in_shape, dtype, checked)
    except (ValueError, NotImplementedError):
        return _operator(module, one_type_pass, in_shape, dtype, checked)


def _operator(module: nn.Module, run: Pass, in_shape: Shape, dtype: torch.dtype, checked: bool) -> LinearOperator:
    forward, adjoint = _linear_part(module, run, in_shape)
    out_shape = tuple(_tried(module, run, _zeros(module, in_shape, dtype)).shape[1:])
    groups = _checked_groups(module, run, in_shape, out_shape, dtype) if checked else 1
    return LinearOperator(
        in_shape, out_shape, dtype, device_of(module), forward, adjoint,
        build=lambda other: module_operator(module, in_shape, other), groups=groups, label=type(module).__name__,
    )  # fmt: skip


def _checked_groups(module: nn.Module, run: Pass, in_shape: Shape, out_shape: Shape, dtype: torch.dtype) -> int:
    """The number of groups, after all checks."""
    device = device_of(module)
    call = partial(_tried, module, run)
    check_affine(module, call, in_shape, dtype, device)
    exact_run, exact = _exact_pass(module, run, in_shape, dtype)
    gradients = _linear_part(module, exact_run, in_shape)
    check_gradients(module, partial(_tried, module, exact_run), *gradients, in_shape, out_shape, exact, device)
    check_own_pass(module, plain_pass, in_shape, None, device)
    if run is one_type_pass:
        check_own_pass(module, run, in_shape, dtype, device)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    return groups if acts_on_groups(groups, call, in_shape, out_shape, dtype, device) else 1


def _exact_pass(module: nn.Module, run: Pass, in_shape: Shape, dtype: torch.dtype) -> tuple[Pass, torch.dtype]:
    """A pass in float64, where the module and its device have one; else the pass ``run`` in ``dtype``."""
    for exact_run in (run, one_type_pass):
        try:
            _tried(module, exact_run, _zeros(module, in_shape, torch.float64))
        except (ValueError, NotImplementedError, TypeError):
            continue
        return exact_run, torch.float64
    return run, dtype


def _linear_part(
    module: nn.Module, run: Pass, in_shape: Shape
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The map X -> module(X) - module(0) and its adjoint."""

    def forward(X: Tensor) -> Tensor:
        """Apply the adjoint's adjoint: in module(x) - module(0), rounding would lose a small x next to a large offset."""
        with torch.enable_grad():
            Z = X.new_zeros(len(X), *in_shape, requires_grad=True)
            output = run(module, Z)
            if not output.requires_grad or not len(X):
                return torch.zeros_like(output)
            Y = torch.zeros_like(output, requires_grad=True)
            back = torch.autograd.grad(output, Z, Y, create_graph=True)[0]
            return torch.autograd.grad(back, Y, ordinary(X, X.dtype))[0]

    def adjoint(Y: Tensor) -> Tensor:
        with torch.enable_grad():
            X = Y.new_zeros(len(Y), *in_shape, requires_grad=True)
            output = run(module, X)
            if not output.requires_grad or not len(X):
                return torch.zeros_like(X)
            return torch.autograd.grad(output, X, ordinary(Y, Y.dtype))[0]

    return forward, adjoint


def _tried(module: nn.Module, run: Pass, X: Tensor) -> Tensor:
    """The module's output for a batch, without gradients; an error that says what the module does not take or return."""
    try:
        with torch.no_grad():
            output = run(module, X)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        in_shape = tuple(X.shape[1:])
        why = misfit(module, in_shape) or f"rejects it: {first_line(error)}"
        raise ValueError(f"linear_operator(in_shape={in_shape}): {overriding(module)} {why}") from error
    if not isinstance(output, Tensor) or output.shape[:1] != X.shape[:1]:
        came = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise NotImplementedError(
            f"linear_operator: {overriding(module)} returns {came} for {len(X)} inputs; it must return a row for each"
        )
    if output.dtype != X.dtype:
        raise NotImplementedError(f"linear_operator: {overriding(module)} returns {output.dtype} for inputs of {X.dtype}")
    return output


def _zeros(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, *in_shape, dtype=dtype, device=device_of(module))


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters and buffers; the CPU if it has none."""
    return next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def default_dtype(module: nn.Module) -> torch.dtype:
    """The type of a module's weights, with float32 in place of shorter ones."""
    found = [t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    dtype = found[0] if found else torch.get_default_dtype()
    return dtype if dtype == torch.float64 else torch.float32
