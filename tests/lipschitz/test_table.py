"""The table of operations: which rows lack a box or a rounding, and wrong rows that samples of small networks uncover."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Call, sampled, seeded
from reference import gain
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.lipschitz import LipschitzWalk, graph_of, pair_of, preserved
from robust_spectral.lipschitz.table import PATTERNS, TABLE

aten = torch.ops.aten
NO_BOX = [
    "_log_softmax", "_upsample_bicubic2d_aa", "addcmul", "col2im", "index_add",
    "index_copy", "index_put", "log_softmax", "masked_scatter", "scatter",
    "scatter_add", "scatter_reduce", "upsample_bicubic2d",
]  # fmt: skip
NO_ROUNDING = [
    "_log_softmax", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "addcmul", "addmm", "baddbmm", "col2im", "cumsum",
    "einsum", "exp", "expm1", "index_add", "index_copy", "index_put", "linalg_vector_norm",
    "log", "log1p", "log_softmax", "masked_scatter", "pow", "reciprocal",
    "rsqrt", "scaled_dot_product_attention", "scatter", "scatter_add", "scatter_reduce", "sqrt", "square", "std", "std_mean",
    "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d", "var", "var_mean",
]  # fmt: skip


def without(part: str) -> list[str]:
    """Names of torch's own operations whose row lacks a part."""
    named = {str(operation): row for operation, row in TABLE.items()}
    lacking = [name for name, row in named.items() if getattr(row, part) is None]
    return sorted(name.removeprefix("aten.") for name in lacking if name.startswith("aten."))


def test_the_rows_without_a_box_are_known() -> None:
    assert without("box") == sorted(NO_BOX)


def test_the_rows_without_a_rounding_are_known() -> None:
    assert without("rounding") == sorted(NO_ROUNDING)


def test_every_row_is_of_an_operation_of_torch_or_of_a_registered_one() -> None:
    assert all(callable(operation) for operation in TABLE) and all(PATTERNS.values())


Network = tuple[Any, Callable[..., Tensor], tuple[int, ...]]
NETWORKS: dict[str, Network] = {
    "activations": (aten.tanh, lambda m, x: torch.tanh(x), (4,)),
    "activations with a dip": (aten.silu, lambda m, x: F.silu(4 * x - 3), (4,)),
    "affine layers": (aten.linear, lambda m, x: m.f(x), (4,)),
    "affine layers, convolution": (aten.conv2d, lambda m, x: m.g(x), (2, 4, 4)),
    "affine layers, pool": (aten.avg_pool2d, lambda m, x: F.avg_pool2d(x, 2), (2, 4, 4)),
    "arithmetic, product": (aten.mul, lambda m, x: m.c * x, (4,)),
    "arithmetic, sum": (aten.add, lambda m, x: x + torch.relu(x), (4,)),
    "arithmetic, mean": (aten.mean, lambda m, x: x.mean(1, keepdim=True), (4,)),
    "matrix products": (aten.matmul, lambda m, x: x @ m.w, (3, 4)),
    "matrix products, softmax": (aten.softmax, lambda m, x: torch.softmax(4 * x, 1), (2,)),
    "maxima": (aten.maximum, lambda m, x: torch.maximum(x[:, :2], x[:, 2:]), (4,)),
    "maxima, sorting": (aten.sort, lambda m, x: x.sort(1)[0], (4,)),
    "maxima, pool": (aten.max_pool2d, lambda m, x: F.max_pool2d(x, 2), (1, 4, 4)),
    "normalisation": (aten.layer_norm, lambda m, x: F.layer_norm(x, (4,), eps=0.1), (4,)),
    "powers": (aten.std, lambda m, x: x.std(1, keepdim=True), (4,)),
    "powers, norm": (aten.linalg_vector_norm, lambda m, x: x.norm(dim=1, keepdim=True), (4,)),
    "rearranging": (aten.cat, lambda m, x: torch.cat([x, 2 * x], 1), (4,)),
    "rearranging, copies": (aten.expand, lambda m, x: x[:, None].expand(-1, 3, -1), (4,)),
    "rearranging, order": (aten.flip, lambda m, x: x.flip(1), (4,)),
    "writing": (aten.where, lambda m, x: torch.where(m.c > 0, x, 3 * x), (4,)),
    "writing, sums": (aten.index_add, lambda m, x: m.c.repeat(len(x), 1).index_add(1, m.i, x), (4,)),
    "writing, constants": (aten.masked_fill, lambda m, x: x.masked_fill(m.c > 1, 2.0), (4,)),
}
LOCAL: dict[str, Network] = {
    "powers": (aten.square, lambda m, x: torch.square(x), (4,)),
    "products": (aten.mul, lambda m, x: x * m.f(x), (4,)),
    "quotients": (aten.div, lambda m, x: m.c / (0.1 + torch.relu(x)), (4,)),
    "exponentials": (aten.exp, lambda m, x: torch.exp(x), (4,)),
    "products of matrices": (aten.matmul, lambda m, x: x @ x.mT, (1, 1)),
}
SHARP = {name: net for name, net in {**NETWORKS, **LOCAL}.items() if TABLE[net[0]].box}


def network(function: Callable[..., Tensor]) -> nn.Module:
    parts = {"f": nn.Linear(4, 4), "g": nn.Conv2d(2, 2, 3, padding=1)}
    constants = {"c": torch.tensor([1.0, -5.0, 2.0, 0.5]), "w": torch.randn(4, 3), "i": torch.tensor([1, 0, 1, 2])}
    return seeded(lambda: Call(function, **parts, **constants))


def bounded(model: nn.Module, shape: tuple[int, ...]) -> rs.LipschitzBound:
    return rs.lipschitz_bound(model, torch.zeros(1, *shape, dtype=torch.float64))


def too_small(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether samples exceed the global bound."""
    return sampled(model, *shape) > bounded(model, shape).value * (1 + 1e-9)


def locally_too_small(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether samples in the box, some of them close to its corners, exceed the local bound."""
    x = torch.rand(64, *shape, dtype=torch.float64)
    corners = x.round()
    gains = [gain(model, corners, corners + 1e-6 * (0.5 - corners)), gain(model, x, x.flip(0)), gain(model, corners, x)]
    return max(gains) > bounded(model, shape).local * (1 + 1e-5)


def leaves_its_box(model: nn.Module, operation: Any, shape: tuple[int, ...]) -> bool:
    """Whether values of an operation's nodes leave their boxes for inputs in [0, 1]."""
    x = torch.rand(2, *shape, dtype=torch.float64)
    with preserved(model), torch.no_grad():
        graph = graph_of(model, pair_of(x))
        centre = torch.full_like(x, 0.5)
        radius = math.sqrt(centre.numel()) / 2
        box = torch.zeros_like(x), torch.ones_like(x)
        walk = LipschitzWalk(graph, graph.values(centre), 1e-9, box=box, radius=radius)
        walk.run()
        nodes = [node for node in walk.boxes if getattr(node.target, "overloadpacket", None) is operation]
        assert nodes
        inside = torch.rand(60, 2, *shape, dtype=torch.float64)
        runs = [graph.values(x) for x in [*inside[:50].round(), *inside[50:]]]
    return any(outside(run[node], walk.boxes[node]) for run in runs for node in nodes)


def outside(value: Any, box: tuple[Any, Any]) -> bool:
    if isinstance(value, tuple | list):
        return any(outside(value[i], (box[0][i], box[1][i])) for i in range(len(value)) if value[i].is_floating_point())
    return bool(((value < box[0]) | (value > box[1])).any())


def lowered(bound: Callable[..., Any]) -> Callable[..., Any]:
    """A row's bound that gives 0.9 of what it should."""
    return lambda walk, n: 0.9 * walk.bound_of(bound(walk, n))


def shifted(box: Callable[..., Any]) -> Callable[..., Any]:
    """A row's box whose upper fifth is missing."""

    def wrong(walk: Any, n: Any) -> Any:
        low, high = box(walk, n)
        if isinstance(low, tuple | list):
            return low, tuple(h - (h - l) / 5 if h.is_floating_point() else h for l, h in zip(low, high, strict=True))  # noqa: E741
        return low, high - (high - low) / 5

    return wrong


@pytest.mark.parametrize("operation, function, shape", NETWORKS.values(), ids=NETWORKS)
def test_samples_uncover_a_bound_that_is_a_tenth_too_small(
    operation: Any, function: Callable[..., Tensor], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(function)
    assert not too_small(model, shape)
    monkeypatch.setitem(TABLE, operation, replace(TABLE[operation], bound=lowered(TABLE[operation].bound)))
    assert too_small(model, shape)


@pytest.mark.parametrize("operation, function, shape", LOCAL.values(), ids=LOCAL)
def test_samples_uncover_a_local_bound_that_is_too_small(
    operation: Any, function: Callable[..., Tensor], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(function)
    assert not locally_too_small(model, shape)
    right = TABLE[operation].bound
    monkeypatch.setitem(TABLE, operation, replace(TABLE[operation], bound=lambda walk, n: 0.4 * walk.bound_of(right(walk, n))))
    assert locally_too_small(model, shape)


@pytest.mark.parametrize("operation, function, shape", SHARP.values(), ids=SHARP)
def test_samples_uncover_a_box_that_is_too_small(
    operation: Any, function: Callable[..., Tensor], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(function)
    assert not leaves_its_box(model, operation, shape)
    box: Any = TABLE[operation].box
    monkeypatch.setitem(TABLE, operation, replace(TABLE[operation], box=shifted(box)))
    assert leaves_its_box(model, operation, shape)


def test_samples_uncover_a_pattern_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(lambda m, x: x * torch.sigmoid(2 * x))
    assert not too_small(model, (4,))

    def lowered_where_found(pattern: Callable[..., float | None]) -> Callable[..., float | None]:
        return lambda walk, n: None if (found := pattern(walk, n)) is None else 0.9 * found

    wrong = [(lowered_where_found(pattern), *others) for pattern, *others in PATTERNS[aten.mul]]
    monkeypatch.setitem(PATTERNS, aten.mul, wrong)  # type: ignore[arg-type]
    assert too_small(model, (4,))
