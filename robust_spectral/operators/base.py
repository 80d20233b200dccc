"""A linear map given by what it does to a batch, and its adjoint. No matrix is formed.

An operator that acts separately on equal, contiguous slices of the channel axis says so in ``groups``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor

Shape = tuple[int, ...]

_KINDS = ("cpu", "cuda", "mps", "xpu")  # of devices that may be under autocast


@dataclass(frozen=True)
class Kernel:
    """The kernel of a convolution: what bounds of convolutions are made from.

    Neither dilation nor the amount of zero or circular padding appears, because the bounds that use a kernel hold for all of
    them; a stride has become channels.

    Attributes:
        weight: (out channels, in channels / groups, *window); of a stride s, s times as many input channels an axis.
        groups: Groups of channels.
        gain: Norm of the padding in front of it where that repeats inputs (reflect, replicate, wide circular); else 1.
        grid: Where the convolution is circular, the size of its output, on whose frequencies its symbols are the whole of it.
    """

    weight: Tensor
    groups: int
    gain: float = 1.0
    grid: Shape | None = None

    @property
    def H(self) -> Kernel:
        """That of the adjoint as far as bounds go, with the channels exchanged: no bound asks for the order of the window."""
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
        device: Where they live.
        forward: The map, (k, *in_shape) -> (k, *out_shape); call `matmat`, which checks what it is given.
        adjoint: Its adjoint, the other way; call `rmatmat`.
        build: Makes the same operator in another type; None where there is no way to.
        groups: More than 1 where the map is block diagonal over so many equal, contiguous slices of the channel axis (the
            first one) of both spaces.
        kernel: Where the map is a convolution or a channel-wise scaled one, what bounds of it are made from.
        label: What it is, for messages.
        diagonal: Whether it multiplies every element by a number.
        parts: The maps of a composition in which products may cancel, so that roundings are of the size of the product of
            their norms; a ``diagonal`` map beside one other cannot bring that about.
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
            ValueError: X is of another shape or type.
        """
        self._check("matmat", X, self.in_shape)
        return self._in_full(self.forward, X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Apply the adjoint to k outputs Y: (k, *out_shape) -> (k, *in_shape). Costs k applications.

        Raises:
            ValueError: Y is of another shape or type.
        """
        self._check("rmatmat", Y, self.out_shape)
        return self._in_full(self.adjoint, Y)

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
        """The same operator, built anew from the weights as they are now, computed in the floating-point type ``dtype``.

        Raises:
            TypeError: the operator was made by hand, without a ``build`` function for other types.
        """
        if self.build is None and dtype == self.dtype:
            return self
        if self.build is None:
            raise TypeError(f"{self!r}.to({dtype}): this operator was given without a `build` function for other types")
        return self.build(dtype)

    def divided_by(self, size: float) -> LinearOperator:
        """The operator over ``size``, a power of two, which is exact: squares of its values neither under- nor overflow."""
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
        """The operator's outputs in equal parts along an axis, each as an operator: a fused qkv projection is three.

        Args:
            parts: How many.
            axis: Axis of ``out_shape`` to cut; the last one, -1, for a dense layer.

        Raises:
            ValueError: the parts would not be equal.
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
        """The matrix, (out elements, in elements): costs one application per input element."""
        n = prod(self.in_shape)
        eye = torch.eye(n, dtype=self.dtype, device=self.device).reshape(n, *self.in_shape)
        return torch.cat([self.matmat(chunk).flatten(1) for chunk in eye.split(1024)]).T

    def _in_full(self, function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """What a function makes of X without gradients or autocast, whose contexts are entered only where they do something."""
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(self.device.type):
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
    """Neither gradients nor autocast, whatever is around; for a ``with`` block, or a function as ``@in_full()``."""
    with torch.no_grad(), ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def check_operator(call: str, A: object) -> None:
    """Raise TypeError unless A is a `LinearOperator`."""
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"{call}({type(A).__name__}): takes an operator, as from linear_operator(layer, in_shape); for a model there is "
            "spectral_norms(model, images)"
        )


def compose(first: LinearOperator, second: LinearOperator) -> LinearOperator:
    """The operator ``x -> second(first(x))``.

    Raises:
        ValueError: the first one's outputs are no inputs of the second.
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
    """Operators of equal shapes and groups as one, each on its own slice of the first axis, so that they share every step.

    Raises:
        ValueError: their shapes or groups differ.
    """
    first, many = operators[0], len(operators)
    if any((A.in_shape, A.out_shape, A.groups) != (first.in_shape, first.out_shape, first.groups) for A in operators):
        raise ValueError(f"direct_sum: {list(operators)} differ in shape or groups")

    def beside(functions: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda X: torch.cat([f(x) for f, x in zip(functions, X.chunk(many, dim=1), strict=True)], dim=1)

    return LinearOperator(
        (many * first.in_shape[0], *first.in_shape[1:]), (many * first.out_shape[0], *first.out_shape[1:]),
        first.dtype, first.device, beside([A.forward for A in operators]), beside([A.adjoint for A in operators]),
        groups=many * first.groups, label=f"{many} x {first.label}",
    )  # fmt: skip
