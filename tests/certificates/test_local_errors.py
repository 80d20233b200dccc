"""Local errors: no operation is further from its linear part than its rule says, anywhere in the box of its arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_networks import walk_of
from networks import Call
from torch import Tensor, fx, nn

from robust_spectral.certificates.errors import RULES, LocalError
from robust_spectral.certificates.joint_map import Energy
from robust_spectral.certificates.linearised import norms, rows
from robust_spectral.certificates.local_walk import LocalWalk
from robust_spectral.lipschitz import operation_of

aten = torch.ops.aten
_TRIED = 80  # changes
Row = tuple[Callable[[nn.Module, Tensor], Tensor], float, float]  # the operation, and where its inputs lie
WINDOWS = (([2, 2], [2, 2]), ([3, 3], [2, 2], [1, 1]), ([2, 3], [1, 1], [1, 0]))
FLAT: dict[Any, Row] = {  # on inputs (64,)
    aten.relu: (lambda m, x: torch.relu(x), -2, 2),
    aten.relu6: (lambda m, x: aten.relu6(x), -3, 9),
    aten.abs: (lambda m, x: x.abs(), -2, 2),
    aten.leaky_relu: (lambda m, x: aten.leaky_relu(x, 3.0), -2, 2),
    aten.prelu: (lambda m, x: aten.prelu(x, m.c), -2, 2),
    aten._prelu_kernel: (lambda m, x: aten._prelu_kernel(x, m.c[None]), -2, 2),
    aten.hardtanh: (lambda m, x: aten.hardtanh(x, -0.5, 0.7), -2, 2),
    aten.clamp: (lambda m, x: aten.clamp(x, -0.5, 0.7), -2, 2),
    aten.clip: (lambda m, x: aten.clip(x, -0.5, 0.7), -2, 2),
    aten.clamp_min: (lambda m, x: aten.clamp_min(x, 0.7), -2, 2),
    aten.clamp_max: (lambda m, x: aten.clamp_max(x, 0.7), -2, 2),
    aten.tanh: (lambda m, x: x.tanh(), -4, 4),
    aten.sigmoid: (lambda m, x: x.sigmoid(), -7, 7),
    aten.sin: (lambda m, x: x.sin(), -7, 7),
    aten.cos: (lambda m, x: x.cos(), -7, 7),
    aten.gelu: (lambda m, x: torch.cat([aten.gelu(x), aten.gelu(x, approximate="tanh")], 1), -4, 4),
    aten.silu: (lambda m, x: aten.silu(x), -9, 9),
    aten.erf: (lambda m, x: x.erf(), -3, 3),
    aten.atan: (lambda m, x: x.atan(), -5, 5),
    aten.log_sigmoid: (lambda m, x: aten.log_sigmoid(x), -9, 9),
    aten.mish: (lambda m, x: aten.mish(x), -9, 9),
    aten.elu: (lambda m, x: torch.cat([aten.elu(x, 0.6), aten.elu(x, 2.0, 1.5, 0.7)], 1), -4, 4),
    aten.selu: (lambda m, x: aten.selu(x), -4, 4),
    aten.celu: (lambda m, x: aten.celu(x, 0.6), -4, 4),
    aten.softplus: (lambda m, x: aten.softplus(x, 2.0), -12, 12),
    aten.exp: (lambda m, x: x.exp(), -3, 3),
    aten.expm1: (lambda m, x: aten.expm1(x), -3, 3),
    aten.log: (lambda m, x: x.log(), 0.05, 3),
    aten.log1p: (lambda m, x: x.log1p(), -0.9, 3),
    aten.sqrt: (lambda m, x: x.sqrt(), 0.05, 3),
    aten.rsqrt: (lambda m, x: x.rsqrt(), 0.05, 3),
    aten.reciprocal: (lambda m, x: torch.cat([x.reciprocal(), (-x).reciprocal()], 1), 0.05, 3),
    aten.square: (lambda m, x: aten.square(x), -2, 2),
    aten.pow: (lambda m, x: torch.cat([x**4, (x + 2.1) ** 3, (x + 2.1) ** 1.5, (x + 2.1) ** -0.5], 1), -2, 2),
    aten.mul: (lambda m, x: torch.cat([x[:, :32] * x[:, 32:], x[:, :1] * x[:, 1:], x * x], 1), -2, 2),
    aten.matmul: (lambda m, x: x[:, :32].view(-1, 4, 8) @ x[:, 32:].view(-1, 8, 4), -2, 2),
    aten.bmm: (lambda m, x: aten.bmm(x[:, :32].view(-1, 4, 8), x[:, 32:].view(-1, 8, 4)), -2, 2),
    aten.softmax: (lambda m, x: x.view(-1, 8, 8).softmax(2), -3, 3),
    aten._softmax: (lambda m, x: aten._softmax(x.view(-1, 8, 8), 1, False), -3, 3),
    aten.layer_norm: (lambda m, x: aten.layer_norm(x.view(-1, 8, 8), (8,), m.c[:8], None, 1e-2), -2, 2),
    aten.group_norm: (lambda m, x: aten.group_norm(x.view(-1, 4, 16), 2, m.c[:4], m.c[:4], 1e-2), -2, 2),
    aten.instance_norm: (
        lambda m, x: aten.instance_norm(x.view(-1, 4, 16), m.c[:4], None, None, None, True, 0.1, 1e-2, False), -2, 2),
    aten.rms_norm: (lambda m, x: aten.rms_norm(x.view(-1, 8, 8), (8,), m.c[:8], 1e-2), -2, 2),
    aten.max_pool2d: (
        lambda m, x: torch.cat([aten.max_pool2d(x.view(-1, 1, 8, 8), *window).flatten(1) for window in WINDOWS], 1), -2, 2),
}  # fmt: skip
OUT_OF_REACH = {aten.mm: "multiplies matrices without an axis of images"}


def some(count: int, low: float, high: float) -> Tensor:
    """Inputs (count, 64): spread over an interval, and near its whole numbers, where kinks are."""
    x = torch.rand(count, 64, dtype=torch.float64) * (high - low) + low
    x[:, ::4] = (x[:, ::4].round() + 1e-4 * torch.randn(count, 16, dtype=torch.float64)).clamp(low, high)
    return x


class Rules(LocalWalk):
    """A walk that asks for the rules alone, with the boxes that they give."""

    def _tighten(self, node: fx.Node) -> None:
        """Leave boxes as they are."""

    def _joint(self, sources: list[fx.Node], energy: Energy) -> None:
        """No map is needed for a norm that is not computed."""

    def _norm(self, joint: None, of: Any) -> Tensor:
        return torch.full((self.images,), torch.inf, dtype=torch.float64)


def walked(function: Callable[..., Tensor], low: float, high: float) -> LocalWalk:
    """A walk around eight inputs, in uneven boxes from narrow to all that is allowed."""
    model = Call(function, c=torch.linspace(-1.5, 2.0, 64)).double().eval()
    x = some(8, low, high)
    below, above = (torch.rand_like(x) * torch.tensor([1e-3, 0.1, 0.3, 0.6, 1.0, 1.5, 3.0, 1e3])[:, None] for _ in range(2))
    box = ((x - below).clamp_min(low), (x + above).clamp_max(high))
    return walk_of(model, x, (box[1] - box[0]).norm(dim=1), *box, kind=Rules)


def changes(walk: LocalWalk, node: fx.Node) -> Tensor:
    """Changes of an argument (k, images, ...) in its box and its ball: near, anywhere, at single ends and at corners."""
    low, high = (end - walk.env[node] for end in walk.box(node))
    share = torch.rand(_TRIED, *low.shape, dtype=torch.float64)
    share[:20] = share[:20].round()
    share[20:40] = torch.where(torch.rand_like(share[20:40]) < 0.1, share[20:40].round(), -low / (high - low).clamp_min(1e-300))
    moved = low + share * (high - low)
    moved[40:50] *= 1e-3
    shrunk = (walk.ball(node) / norms(moved, walk.images, 1).clamp_min(1e-300)).clamp_max(1.0)
    return (rows(moved, walk.images, 1) * shrunk[..., None]).reshape(moved.shape)


def excess(walk: LocalWalk, node: fx.Node, error: LocalError) -> float:
    """How far the largest error that is found is above the bounds, relative to them."""
    sources = walk.linear.sources[node]
    given = {source: changes(walk, source) for source in sources}
    linear = walk.linear.change(node, given)
    after = torch.stack([
        walk.graph.rerun(node, lambda a, i=i: walk.env[a] + given[a][i] if a in given else walk.env[a]) for i in range(_TRIED)
    ])  # fmt: skip
    e = after - walk.env[node] - (0.0 if linear is None else linear)
    noise = 1e-13 * (1 + after.abs().amax())
    found = [float((e.abs() / (error.reach + noise)).max())]
    size = norms(e, walk.images, 1)
    if error.energy is not None:
        parts = torch.stack([norms(part, walk.images, 1) for part in error.energy([given[s] for s in sources])])
        found.append(float((size / (parts.norm(dim=0) + 10 * noise)).max()))
    if error.size is not None:
        found.append(float((size / (error.size + 10 * noise)).max()))
    return max(found) - 1


def errors_of(walk: LocalWalk, operation: Any) -> list[tuple[fx.Node, LocalError]]:
    return [(node, error) for node, error in walk.errors.items() if operation_of(node.target) is operation]


@pytest.mark.parametrize("operation", FLAT, ids=str)
def test_an_operation_is_as_near_to_its_linear_part_as_its_rule_says(operation: Any) -> None:
    walk = walked(*FLAT[operation])
    found = errors_of(walk, operation)
    assert found and all(error.energy or error.size is not None for _, error in found)
    assert max(excess(walk, node, error) for node, error in found) <= 1e-9


def test_every_rule_has_a_row_or_a_reason_to_have_none() -> None:
    assert {*FLAT, *OUT_OF_REACH} == {*RULES} and {*FLAT}.isdisjoint(OUT_OF_REACH)


@pytest.mark.parametrize("operation", [aten.relu, aten.tanh, aten.exp, aten.max_pool2d], ids=str)
def test_a_rule_with_half_the_reach_is_found(operation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[operation]

    def wrong(walk: LocalWalk, node: fx.Node) -> LocalError:
        error = right(walk, node)
        return replace(error, reach=error.reach / 2)

    monkeypatch.setitem(RULES, operation, wrong)
    walk = walked(*FLAT[operation])
    assert max(excess(walk, node, error) for node, error in errors_of(walk, operation)) > 0.1


@pytest.mark.parametrize("operation", [aten.relu, aten.mul, aten.max_pool2d, aten.matmul], ids=str)
def test_a_rule_with_a_tenth_of_the_energy_is_found(operation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES[operation]

    def wrong(walk: LocalWalk, node: fx.Node) -> LocalError:
        error = right(walk, node)
        energy, size = error.energy, error.size
        smaller = None if energy is None else lambda given: [part / 10 for part in energy(given)]
        return replace(error, energy=smaller, size=None if size is None else size / 10)

    monkeypatch.setitem(RULES, operation, wrong)
    walk = walked(*FLAT[operation])
    assert max(excess(walk, node, error) for node, error in errors_of(walk, operation)) > 0.1
