"""Whether a model does what its graph says, on inputs, batch sizes and gradient modes that the graph was not made with.

A comparison of samples: it finds a forward pass that depends on the batch or on the gradient mode, and proves nothing.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Tensor, nn

from ..operators import full_precision_no_grad
from .graph import Graph, graph_of, pair_of, preserved, tensors_of
from .precision import full_precision
from .table import NoClaim

_SIZES, _LARGE = (1, 2, 3, 7), 33  # the large one for inputs of few elements
_SMALL_INPUT = 20_000
_RELATIVE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the output's largest norm, where rounding has no smaller bound


def disagreement(model: nn.Module, images: Tensor, errors: float = math.inf) -> str | None:
    """A sentence on where a model and its graph differ on images, or why there is no graph; None where they agree.

    Args:
        model: The model, in eval mode for the comparison.
        images: (n, ...), a batch that it takes; they are run at batch sizes of 1, 2, 3, 7, and 33 where they are small.
        errors: A bound of the rounding error of one output in L2, if there is one.
    """
    with preserved(model), full_precision_no_grad(), full_precision(images.device):
        try:
            return difference(model, graph_of(model, pair_of(images)), images, errors)
        except NoClaim as refused:
            return str(refused)


def difference(model: nn.Module, graph: Graph, images: Tensor, errors: float = math.inf) -> str | None:
    """`disagreement` for a graph that is known; within `preserved`, and without TF32."""
    sizes = (*_SIZES, _LARGE) if images[0].numel() <= _SMALL_INPUT else _SIZES
    inputs = torch.cat([images] * -(-max(sizes) // len(images)))[: max(sizes)]
    wanted = _rows(graph, inputs)
    scale = max((float(rows.norm(dim=1).max()) for rows in wanted), default=0.0)
    limit = min(_RELATIVE.get(images.dtype, 1e-3) * scale, errors * (1 + 1e-9)) + 1e-300
    for size, gradients in itertools.product(sizes, (False, True)):
        how = f"a batch of {size}{' with gradients' if gradients else ''}"
        found = _outputs(model, inputs[:size], gradients)
        if isinstance(found, str) and gradients:
            continue
        if isinstance(found, str):
            return f"{graph.model} does not run on {how}: {found}"
        if [tensor.numel() for tensor in found] != [size * rows.shape[1] for rows in wanted]:
            return f"the output of {graph.model} on {how} has another shape than on a batch of 2"
        far = _distance(found, wanted)
        if far <= limit:
            continue
        if not far <= errors or not _distance_in_double(model, inputs[:size], gradients, wanted, math.nan) <= 1e-6 * scale:
            return (
                f"the output of {graph.model} for an input on {how} is another than on a batch of 2 (by {far:.3g}): it depends "
                "on the other inputs of its batch, on the batch's size, on the gradient mode, or on chance"
            )
    return None


def alike_in_double(model: nn.Module, graph: Graph, inputs: Tensor, errors: float) -> bool:
    """Whether a copy of the model in float64 computes what the graph does, within its errors; True where it does not run."""
    return errors == math.inf or _distance_in_double(model, inputs, False, _rows(graph, inputs), 0.0) <= 2 * errors


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest distance between an output and the one wanted for the same input."""
    return max(
        float((tensor.double().reshape(-1, rows.shape[1]) - rows[: tensor.numel() // rows.shape[1]]).norm(dim=1).max())
        for tensor, rows in zip(found, wanted, strict=True)
    )


def _distance_in_double(model: nn.Module, x: Tensor, gradients: bool, wanted: list[Tensor], otherwise: float) -> float:
    """`_distance` of the outputs of a copy of a model in float64; ``otherwise`` where there is none, or it does not run."""
    try:
        copied = copy.deepcopy(model).double()
    except Exception:  # noqa: BLE001 - whatever the model's own code raises
        return otherwise
    found = _outputs(copied, x.double(), gradients)
    return otherwise if isinstance(found, str) else _distance(found, wanted)


def _rows(graph: Graph, inputs: Tensor) -> list[Tensor]:
    """The graph's outputs for each input, (n, elements of one output), in float64."""
    pairs = torch.cat([inputs, inputs[: len(inputs) % 2]]).split(2)
    runs = [graph.run(pair) for pair in pairs]
    if any(tensor.shape[:1] != (2,) for tensor in runs[0]):
        raise NoClaim(f"an output of {graph.model} has no batch axis in front")
    return [torch.cat([run[i].double().reshape(2, -1) for run in runs])[: len(inputs)] for i in range(len(graph.outputs))]


def _outputs(model: nn.Module, x: Tensor, gradients: bool) -> list[Tensor] | str:
    """The tensors of a model's output, or the error that it ends with."""
    with torch.set_grad_enabled(gradients):
        batch = x.clone().requires_grad_(gradients and x.is_floating_point())
        try:
            found = tensors_of(model(batch))
        except Exception as error:  # noqa: BLE001 - whatever the model's own code raises
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return [tensor.detach() for tensor in found]
