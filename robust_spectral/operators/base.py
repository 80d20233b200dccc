"""Linear maps given by functions that apply the map and its adjoint to a batch. No matrix is formed.

The attribute ``groups`` counts the equal, contiguous slices of the channel axis on which an operator acts separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor

Shape = tuple[int, ...]

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")  # device types that may be under autocast


@dataclass(frozen=True)
class Kernel:
    """The kernel of a convolution, from which upper bounds of its spectral norm are computed.

    Neither the dilation nor the amount of zero or circular padding is recorded, because those bounds hold for all of them.
    A stride is expressed by additional input channels.

    Attributes:
        weight: (out channels, in channels / groups, *window). A stride s on an axis multiplies the input channels by s and
            divides the window's length on that axis by s (polyphase form).
        groups: Number of channel groups.
        gain: Norm of the padding before the convolution where it repeats inputs (reflect, replicate, wide circular); else 1.
        grid: Size of the output where the convolution is circular, so that the Fourier transform makes it block diagonal with
            the symbols at the frequencies of this grid as blocks; else None.
    """

    weight: Tensor
    groups: int
    gain: float = 1.0
    grid: Shape | None = None

    @property
    def H(self) -> Kernel:
        """The kernel of the adjoint, with input and output channels exchanged.

        The window keeps its order, which no bound depends on.
        """
        out, per_in, *window = self.weight.shape
        exchanged = self.weight.reshape(self.groups, out // self.groups, per_in, *window).transpose(1, 2)
        return replace(self, weight=exchanged.reshape(self.groups * per_in, out // self.groups, *window))


@dataclass(frozen=True)
class LinearOperator:
    """A linear map between spaces of shape ``in_shape`` and ``out_shape``, given by its action on batches.

    Attributes:
        in_shape: Shape of one input, without the batch axis.
        out_shape: Shape of one output.
        dtype: Type of inputs and outputs.
        device: Device of inputs and outputs.
        forward: The map, (k, *in_shape) -> (k, *out_shape). Call `matmat` instead, which checks its argument.
        adjoint: The adjoint map, (k, *out_shape) -> (k, *in_shape). Call `rmatmat` instead.
        build: Returns the same operator for another dtype; None where no such function is known.
        groups: Number of equal, contiguous slices of the channel axis (the first one) of both spaces over which the map is
            block diagonal.
        kernel: Kernel for norm bounds, where the map is a convolution, or one followed by a factor for each channel; else None.
        label: Name for messages.
        diagonal: Whether the map multiplies each element by a number.
        parts: The maps of a composition in which products may cancel, so that rounding errors are of the size of the product
            of their norms. Empty where at most one of the maps is not ``diagonal``, as nothing cancels then.
    """

    in_shape: Shape
    out_shape: Shape
    dtype: torch.dtype
    device: torch.device
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    build: Callable[[torch.dtype], LinearOperator] | None = None
    groups: int = 1
    kernel: Kernel | None = None
    label: str = "LinearOperator"
    diagonal: bool = False
    parts: tuple[LinearOperator, ...] = ()

    def matmat(self, X: Tensor) -> Tensor:
        """Apply the operator to k inputs X: (k, *in_shape) -> (k, *out_shape). Costs k applications.

        Raises:
            ValueError: X has another shape or dtype.
        """
        self._check("matmat", X, self.in_shape)
        return self._in_full_precision(self.forward, X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Apply the adjoint to k outputs Y: (k, *out_shape) -> (k, *in_shape). Costs k applications.

        Raises:
            ValueError: Y has another shape or dtype.
        """
        self._check("rmatmat", Y, self.out_shape)
        return self._in_full_precision(self.adjoint, Y)

    @property
    def H(self) -> LinearOperator:
        """The adjoint operator."""
        build = self.build
        return replace(
            self,
            in_shape=self.out_shape,
            out_shape=self.in_shape,
            forward=self.adjoint,
            adjoint=self.forward,
            build=None if build is None else lambda dtype: build(dtype).H,
            kernel=None if self.kernel is None else self.kernel.H,
        )

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """The operator rebuilt from the current weights, computing in the floating-point type ``dtype``.

        Raises:
            TypeError: the operator has another dtype and no ``build`` function.
        """
        if self.build is None and dtype == self.dtype:
            return self
        if self.build is None:
            raise TypeError(f"{self!r}.to({dtype}): this operator has no `build` function for other dtypes")
        with full_precision_no_grad():
            return self.build(dtype)

    def divided_by(self, size: float) -> LinearOperator:
        """The operator divided by ``size``, exactly, as ``size`` is a power of two; without a ``kernel``.

        With a size close to the norm, squares of the quotient's values neither underflow nor overflow.
        """
        forward, adjoint, build = self.forward, self.adjoint, self.build
        return replace(
            self,
            forward=lambda X: forward(X) / size,
            adjoint=lambda Y: adjoint(Y) / size,
            build=None if build is None else lambda dtype: build(dtype).divided_by(size),
            kernel=None,
            parts=(self.parts[0].divided_by(size), *self.parts[1:]) if self.parts else (),
        )

    def split(self, parts: int, axis: int = 0) -> tuple[LinearOperator, ...]:
        """Split the outputs into equal parts along an axis, each an operator: a fused qkv projection gives three.

        Args:
            parts: Number of parts.
            axis: Axis of ``out_shape`` to split; the last one, -1, for a dense layer.

        Raises:
            ValueError: ``parts`` does not divide the length of the axis.
        """
        axis %= len(self.out_shape)
        if parts < 1 or self.out_shape[axis] % parts:
            raise ValueError(f"{self!r}.split: axis {axis} of the output has {self.out_shape[axis]} entries, not {parts} parts")
        return tuple(self._part(index, parts, axis) for index in range(parts))

    def _part(self, index: int, parts: int, axis: int) -> LinearOperator:
        size = self.out_shape[axis] // parts
        forward, adjoint, build, kernel = self.forward, self.adjoint, self.build, self.kernel
        cuttable = axis == 0 and kernel is not None and kernel.groups == 1 and len(kernel.weight) == self.out_shape[0]

        def pad(Y: Tensor) -> Tensor:
            full = Y.new_zeros(len(Y), *self.out_shape)
            full.narrow(axis + 1, index * size, size).copy_(Y)
            return adjoint(full)

        return replace(
            self,
            out_shape=(*self.out_shape[:axis], size, *self.out_shape[axis + 1 :]),
            forward=lambda X: forward(X).narrow(axis + 1, index * size, size),
            adjoint=pad,
            build=None if build is None else lambda dtype: build(dtype)._part(index, parts, axis),
            groups=1,
            kernel=replace(kernel, weight=kernel.weight[index * size :][:size]) if kernel and cuttable else None,
            label=f"{self.label}, part {index + 1} of {parts}",
        )

    def to_dense(self) -> Tensor:
        """The matrix, (out elements, in elements). Costs one application per input element."""
        n = prod(self.in_shape)
        eye = torch.eye(n, dtype=self.dtype, device=self.device).reshape(n, *self.in_shape)
        return torch.cat([self.matmat(chunk).flatten(1) for chunk in eye.split(1024)]).T

    def _in_full_precision(self, function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """Call a function on X without gradients, autocast and inference mode; enter the contexts only where one is enabled."""
        changes_results = torch.is_autocast_enabled(self.device.type) or torch.is_inference_mode_enabled()
        if not torch.is_grad_enabled() and not changes_results:
            return function(X)
        with full_precision_no_grad():
            return function(X)

    def _check(self, call: str, X: Tensor, shape: Shape) -> None:
        if tuple(X.shape[1:]) != shape or X.dtype != self.dtype:
            raise ValueError(
                f"{self!r}.{call} takes a batch of shape (k, {', '.join(map(str, shape))}) and {self.dtype}, "
                f"got {tuple(X.shape)} and {X.dtype}"
            )

    def __repr__(self) -> str:
        return f"<{self.label}: {self.in_shape} -> {self.out_shape}, {self.dtype}>"


@contextmanager
def full_precision_no_grad() -> Iterator[None]:
    """Disable gradients, autocast and inference mode, in a ``with`` block or a function decorated by it, called.

    Outside of inference mode the results may take part in gradients later, and the operators' own gradients can be computed.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # enables gradients
        stack.enter_context(torch.no_grad())
        for kind in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def check_operator(call: str, A: object) -> None:
    """Raise TypeError unless A is a `LinearOperator`."""
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"{call}({type(A).__name__}): takes an operator, as from linear_operator(layer, in_shape); for a model use "
            "spectral_norms(model, images)"
        )


def compose(first: LinearOperator, second: LinearOperator) -> LinearOperator:
    """The operator ``x -> second(first(x))``.

    Raises:
        ValueError: ``first.out_shape`` differs from ``second.in_shape``.
    """
    if first.out_shape != second.in_shape:
        raise ValueError(f"compose: {first!r} does not feed {second!r}")
    build_first, build_second = first.build, second.build
    parts = (*(first.parts or (first,)), *(second.parts or (second,)))
    return LinearOperator(
        first.in_shape, second.out_shape, second.dtype, second.device,
        forward=lambda X: second.forward(first.forward(X)),
        adjoint=lambda Y: first.adjoint(second.adjoint(Y)),
        build=(lambda dtype: compose(build_first(dtype), build_second(dtype))) if build_first and build_second else None,
        groups=gcd(first.groups, second.groups),
        diagonal=first.diagonal and second.diagonal,
        parts=parts if sum(not part.diagonal for part in parts) > 1 else (),
        label=f"{first.label} -> {second.label}",
    )  # fmt: skip


def direct_sum(operators: Sequence[LinearOperator]) -> LinearOperator:
    """The direct sum of operators of equal shapes and groups, each acting on its own slice of the channel axis.

    One application of the direct sum applies all of them.

    Raises:
        ValueError: the operators differ in shape or groups.
    """
    first, many = operators[0], len(operators)
    if any((A.in_shape, A.out_shape, A.groups) != (first.in_shape, first.out_shape, first.groups) for A in operators):
        raise ValueError(f"direct_sum: {list(operators)} differ in shape or groups")

    def on_slices(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda X: torch.cat([f(x) for f, x in zip(functions, X.chunk(many, dim=1), strict=True)], dim=1)

    return LinearOperator(
        (many * first.in_shape[0], *first.in_shape[1:]), (many * first.out_shape[0], *first.out_shape[1:]),
        first.dtype, first.device, on_slices([A.forward for A in operators]), on_slices([A.adjoint for A in operators]),
        groups=many * first.groups, label=f"{many} x {first.label}",
    )  # fmt: skip
