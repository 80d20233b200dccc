"""Constants of a forward pass that it computes itself, and whose rounding in float32 is not known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from .table import operation_of
from .walk import CONSTANTS, LipschitzWalk

aten = torch.ops.aten
_MADE_EXACTLY = (
    aten.zeros, aten.ones, aten.eye, aten.full, aten.empty, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros,
    aten.new_ones, aten.lift_fresh_copy, aten.clone, aten.alias, aten.detach, aten.contiguous, aten.copy,
    aten.slice_scatter, aten.select_scatter, aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.expand,
    aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.permute, aten.transpose, aten.t, aten.cat, aten.stack,
    aten.index, aten.fill, aten.repeat, aten.to, aten._to_copy, aten.type_as,
)  # fmt: skip


def _rounds(node: fx.Node) -> bool:
    """Whether a constant node, or one that it is made of, computes floating-point numbers."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    held = all(float(torch.tensor(a, dtype=torch.float32)) == a for a in numbers if math.isfinite(a))
    if operation_of(node.target) in CONSTANTS:
        return not held
    return not held or operation_of(node.target) not in _MADE_EXACTLY or any(map(_rounds, node.all_input_nodes))


def held(value: Any) -> bool:
    """Whether float32 holds all numbers of a value."""
    return not isinstance(value, Tensor) or not value.is_floating_point() or torch.equal(value.float().double(), value.double())


def computed_constant(walk: LipschitzWalk) -> fx.Node | None:
    """The first node at which floating-point constants are computed from others and used together with the input."""
    moving = {node for node in walk.graph.nodes if walk.depends(node)}
    used = {argument for node in moving for argument in node.all_input_nodes if argument not in moving}
    return next(
        (
            node
            for node in walk.graph.nodes
            if node in used and node.op == "call_function" and (_rounds(node) or not held(walk.env[node]))
        ),
        None,
    )
