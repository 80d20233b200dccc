"""Operations that are linear in their arguments, or in one of them, and what is left of them without constants."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import arguments, operation_of

aten = torch.ops.aten

# Linear in all their arguments together, up to a constant.
_LINEAR = {getattr(aten, name) for name in (
    "add", "sub", "rsub", "neg", "positive", "cat", "concat", "hstack", "vstack", "stack", "sum", "mean", "cumsum",
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "permute", "transpose", "t", "numpy_T", "mT", "movedim", "contiguous", "clone", "alias", "detach",
    "detach_copy", "lift_fresh_copy", "_to_copy", "to", "type_as", "select", "slice", "narrow", "split",
    "split_with_sizes", "tensor_split", "chunk", "unsafe_chunk", "unsafe_split", "unbind", "index_select", "index",
    "gather", "take_along_dim", "flip", "roll", "rot90", "repeat", "tile", "repeat_interleave", "pad",
    "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal", "tril", "triu", "unfold",
    "im2col", "col2im", "dropout", "feature_dropout", "alpha_dropout", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "copy", "slice_scatter",
    "select_scatter", "diagonal_scatter", "meshgrid", "where",
)} | {operator.getitem}  # fmt: skip
# Linear in one argument, if the others are constant: in which, by position; None for any.
_LINEAR_IN = {
    **dict.fromkeys((aten.mul, aten.matmul, aten.bmm, aten.mm, aten.mv, aten.dot, aten.einsum), None),
    **dict.fromkeys((aten.div, aten.true_divide, aten.linear, aten.masked_fill, aten.conv1d, aten.conv2d, aten.conv3d,
                     aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), 0),
}  # fmt: skip


def _listed(value: Any) -> list[Any]:
    return [part for item in value for part in _listed(item)] if isinstance(value, tuple | list) else [value]


def is_linear(n: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether a node's change is a linear function of the changes of its sources, where all that moves are sources."""
    operation = operation_of(n.target)
    if operation in (aten.dropout, aten.feature_dropout, aten.alpha_dropout) and arguments(n)["train"]:
        return False
    if operation in (aten.div, aten.true_divide) and n.kwargs.get("rounding_mode") is not None:
        return False
    if operation in _LINEAR:
        return True
    if operation not in _LINEAR_IN or len(sources) != 1 or _listed(n.args).count(sources[0]) != 1:
        return False
    place = _LINEAR_IN[operation]
    return place is None or n.args[place] is sources[0]


_SAME = {aten.detach, aten.detach_copy, aten.alias, aten.lift_fresh_copy}  # whose derivative in torch may be 0
_ADDENDS = {
    aten.add: (1,), aten.sub: (1,), aten.rsub: (1,), aten.constant_pad_nd: (2,), aten.pad: (3,), aten.masked_fill: (2,),
    aten.where: (1, 2),
}  # fmt: skip


def without_constants(
    n: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a linear operation with all constant terms at zero: what is left is linear."""

    def zero(value: Any) -> Any:
        if isinstance(value, fx.Node) and value not in sources:
            held = values[value]
            return torch.zeros_like(held) if isinstance(held, Tensor) and held.is_floating_point() else value
        return value

    operation = operation_of(n.target)
    if operation in _LINEAR_IN and operation not in _ADDENDS:
        named = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
        args = tuple(zero(value) if name == "bias" else value for name, value in zip(named, n.args, strict=False))
        return args, {name: zero(value) if name == "bias" else value for name, value in n.kwargs.items()}
    args = fx.node.map_arg(n.args, zero)
    places = _ADDENDS.get(operation, ())
    args = tuple(0 if i in places and isinstance(value, int | float) else value for i, value in enumerate(args))
    return args, dict(fx.node.map_arg(n.kwargs, zero))


def is_identity(n: fx.Node) -> bool:
    """Whether an operation gives its argument."""
    return operation_of(n.target) in _SAME
