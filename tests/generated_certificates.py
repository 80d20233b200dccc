"""Random small networks with images around which margins are certified, and the search that no margin may exceed.

A case has few inputs, mostly one to eight, so that bounds are nearly tight and a search is nearly exhaustive: errors of a
rule that are too small then show. Images lie at kinks, at the ends of the box and at equal values more often than by chance.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import generated_graphs
import torch
import torch.nn.functional as F
from generated_graphs import LOCAL, Draft, Step, by_function, by_module
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.certificates import prover
from robust_spectral.certificates.errors import RULES, LocalError
from robust_spectral.certificates.local_walk import LocalWalk
from robust_spectral.lipschitz import operation_of

aten = torch.ops.aten
Function = Callable[..., Any]  # or a module's class
OPERATIONS: dict[Any, tuple[Function, ...]] = {  # on maps (images, channels, height, width)
    aten.relu: (torch.relu,), aten.relu6: (F.relu6,), aten.abs: (torch.abs,),
    aten.leaky_relu: (lambda x: F.leaky_relu(x, 1.7),), aten.prelu: (nn.PReLU,),
    aten.hardtanh: (lambda x: F.hardtanh(x, -0.5, 0.7),), aten.clamp: (lambda x: x.clamp(-0.3, 0.6),),
    aten.clip: (lambda x: aten.clip(x, -0.3, 0.6),),
    aten.clamp_min: (lambda x: x.clamp_min(0.1),), aten.clamp_max: (lambda x: x.clamp_max(0.1),),
    aten.tanh: (torch.tanh,), aten.sigmoid: (torch.sigmoid,), aten.sin: (torch.sin,), aten.cos: (torch.cos,),
    aten.gelu: (F.gelu, lambda x: F.gelu(x, approximate="tanh")), aten.silu: (F.silu,), aten.erf: (torch.erf,),
    aten.atan: (torch.atan,), aten.log_sigmoid: (F.logsigmoid,), aten.mish: (F.mish,),
    aten.softplus: (F.softplus, lambda x: F.softplus(x, 3.0)),
    aten.exp: (torch.exp,), aten.expm1: (torch.expm1,), aten.log: (torch.log, lambda x: (x.clamp_min(0) + 0.1).log()),
    aten.log1p: (lambda x: x.abs().log1p(),), aten.sqrt: (torch.sqrt, lambda x: (x.abs() + 0.05).sqrt()),
    aten.rsqrt: (torch.rsqrt, lambda x: (x.clamp_min(0) + 0.1).rsqrt()),
    aten.reciprocal: (torch.reciprocal, lambda x: (x.clamp_min(0) + 0.2).reciprocal()),
    aten.square: (aten.square, lambda x: aten.square(x - x.mean((2, 3), keepdim=True))),
    aten.pow: (lambda x: x**4, lambda x: (x.clamp_min(0) + 0.1) ** 1.5, lambda x: (x.clamp_min(0) + 0.1) ** -0.5),
    aten.mul: (lambda x: x * x.flip(1, 3), lambda x: x * x, lambda x: x * x.sum((1, 2, 3), keepdim=True),
               lambda x: x[:, :1] * x[:, -1:].amax(3, keepdim=True)),
    aten.matmul: (lambda x: x @ x.transpose(2, 3), lambda x: x.transpose(2, 3) @ x, lambda x: x @ x.flip(2, 3).transpose(2, 3)),
    aten.bmm: (lambda x: torch.bmm(x[:, 0], x[:, -1].transpose(1, 2))[:, None],),
    aten.softmax: (lambda x: x.softmax(1), lambda x: x.softmax(3), lambda x: x.flatten(1).softmax(1).view_as(x)),
    aten.layer_norm: (lambda x: F.layer_norm(x, x.shape[3:], eps=0.05), lambda x: F.layer_norm(x, x.shape[1:], eps=0.1)),
    aten.group_norm: (lambda x: F.group_norm(x, 1, eps=0.1), lambda x: F.group_norm(x, x.shape[1], eps=0.2)),
    aten.instance_norm: (lambda x: F.instance_norm(x, eps=0.1),),
    aten.rms_norm: (lambda x: F.rms_norm(x, x.shape[3:], eps=0.1), lambda x: F.rms_norm(x, x.shape[1:], eps=0.2)),
    aten.max_pool2d: (lambda x: F.max_pool2d(x, (1, 2), 1), lambda x: F.max_pool2d(x, 2, 1), lambda x: F.max_pool2d(x, 3, 1, 1),
                      lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 2).relu(),
                      lambda x: F.max_pool2d(x.relu(), 3, 1, 1)),
}  # fmt: skip
OTHERS: tuple[Function, ...] = (  # written as others, or with a global constant only
    F.hardswish, F.hardsigmoid, F.elu, F.selu, F.celu, F.softsign, F.tanhshrink, F.softshrink, torch.asinh, F.hardshrink,
    lambda x: torch.maximum(x, x.flip(3)), lambda x: torch.minimum(x[:, :1], 0.3 - x), lambda x: x.amin(2, keepdim=True),
    lambda x: torch.cat([x, x], 1).chunk(2, 1)[0], lambda x: F.glu(torch.cat([x, 1 - x], 1), 1),
    lambda x: x.logsumexp(3, keepdim=True), lambda x: x.log_softmax(1), lambda x: x.norm(dim=1, keepdim=True),
    lambda x: x / (x.square().sum(1, keepdim=True) + 1).sqrt(), lambda x: x.float().type_as(x),
    lambda x: x.double().type_as(x) + x, lambda x: x.var((2, 3), keepdim=True, correction=0),
    lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), lambda x: x + F.relu(x - 0.5),
    lambda x: (x > 0.5).type_as(x) * x, lambda x: torch.where(x > 0.3, x, 0.3), lambda x: x.sort(3)[0],
    lambda x: F.scaled_dot_product_attention(x, x.flip(2), 2 * x),
    lambda x: F.max_pool2d(x, 2, ceil_mode=True), lambda x: F.max_pool1d(x.flatten(2), 2, 1)[:, :, None], lambda x: x.cumsum(3),
    lambda x: F.normalize(x.flatten(1), dim=1).view_as(x), lambda x: torch.hypot(x, x.flip(3)), lambda x: F.lp_pool2d(x, 2, 2),
)  # fmt: skip


def step_of(functions: tuple[Function, ...]) -> Callable[[Draft, int], Step]:
    """A step that applies one of some functions to a value that is scaled and shifted."""

    def operation(draft: Draft, i: int) -> Step:
        function, draw = draft.draw.choice(functions), draft.draw
        if function is nn.PReLU:
            module = nn.PReLU(draft.shapes[i][0])
            nn.init.normal_(module.weight)
            return by_module(i, draft.module(module))
        scale = draw.choice([1.0, 1.0, 0.5, 3.0, 8.0]) * draw.choice([1, 1, -1])
        shift = draw.choice([0.0, 0.0, -scale / 2, draw.gauss(0, 1)])
        if function in POSITIVE:
            scale, shift = 1.0, draw.choice([0.1, 1.1, 2.3])
        return by_function(i, lambda x: function(scale * x + shift))

    return operation


POSITIVE = (torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal)  # of values that are mostly above 0
ALIASES = {aten.prelu: aten._prelu_kernel, aten.softmax: aten._softmax}  # other names in graphs
KINDS = [step_of(functions) for functions in OPERATIONS.values()] + [step_of((function,)) for function in OTHERS] + 3 * LOCAL


@dataclass
class Case:
    """A network with logits, and images, labels, radii and a box for `certify`."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    radii: Tensor
    box: tuple[float, float] | None
    steps: int


@dataclass
class Verdict:
    """The outcome of a case: "proved", "refused", "unsound" or "raised", why, and the operations with an error of their own."""

    result: str
    detail: str
    operations: list[str]
    images: int = 0


def case(seed: int, operation: Any = None) -> Case:
    """The case of a seed; with an operation of `OPERATIONS`, all non-linear steps are of that operation."""
    draw = random.Random(seed)
    shape = draw.choice([(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2), (2, 3, 3), (2, 4, 4)][: 4 if operation else 6])
    kinds, lengths = (KINDS, (1, 1, 2, 2, 3, 4)) if operation is None else ([step_of(OPERATIONS[operation])], (1, 1, 2))
    net = generated_graphs.network(draw, most=64, shape=shape, kinds=kinds, sizes=lengths)
    example = torch.zeros(2, *shape, dtype=torch.float64)
    features, classes = net(example).shape[1], draw.choice([2, 2, 3, 4])
    model = nn.Sequential(net, nn.Linear(features, classes)).double().eval()
    sharper = draw.choice([1.0, 1.0, 2.0, 4.0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.0 if name.endswith("bias") and draw.random() < 0.2 else sharper)
    model = model.to(draw.choice([*[torch.float64] * 14, *[torch.float32] * 5, torch.bfloat16]))
    box: Any = draw.choice([(0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (-1.0, 2.0), None])
    images = pictures(draw, shape, box).to(next(model.parameters()).dtype)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels = torch.where(torch.rand(len(labels)) < 0.05, (labels + 1) % classes, labels)
    radii = steepest(model, images, labels) * torch.tensor([10 ** draw.uniform(-0.7, 1.0) for _ in labels])
    for i in range(len(radii)):
        if draw.random() < 0.15:
            radii[i] = draw.choice([0.0, 1e-9, 1e-7, 1e-5, 0.01, 1.0, 20.0])
    return Case(model, images, labels, radii, box, draw.choice([0, 0, 5, 15]))


def steepest(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The distances at which the margins would be 0 if the network were linear, at least 0.001 and at most 10."""
    x = images.double().clone().requires_grad_()
    margins = margins_of(copy.deepcopy(model).double()(x), labels)
    (slope,) = torch.autograd.grad(margins.sum(), x)
    return (margins.detach().abs() / length(slope).flatten()).nan_to_num(1.0, 1.0, 1.0).clamp(1e-3, 10)


def pictures(draw: random.Random, shape: tuple[int, ...], box: tuple[float, float] | None) -> Tensor:
    """One to ten images: anywhere in the box, or with values at its ends and middle, in pairs, or all equal."""
    low, high = box or (-2.0, 2.0)
    found = torch.rand(draw.choice([1, 2, 3, 6, 10]), *shape, dtype=torch.float64)
    for image in found:
        kind = draw.choice(["any", "any", "grid", "pairs", "constant", "mixed"])
        if kind in ("grid", "mixed"):
            image.copy_(torch.where(torch.rand(shape) < (1.0 if kind == "grid" else 0.4), (2 * image).round() / 2, image))
        elif kind == "pairs":
            image.copy_(torch.maximum(image, image.flip(2)))
        elif kind == "constant":
            image.fill_(draw.choice([0.0, 0.3, 0.5, 1.0]))
    return low + (high - low) * found


def check(made: Case) -> Verdict:
    """Certify margins and search for smaller ones: in float64 and, where its rounding is bounded, in the model's dtype."""
    operations: list[str] = []
    bounds: list[rs.LipschitzBound] = []
    try:
        with recorded(operations, bounds):
            found = rs.certify(made.model, made.images, made.labels, made.radii, made.box, steps=made.steps)
    except Exception as error:  # noqa: BLE001
        return Verdict("raised", f"{type(error).__name__}: {str(error)[:300]}", operations)
    exact, scale, points = lowest(copy.deepcopy(made.model).double(), made.images.double(), made.labels, made.radii, made.box)
    with torch.no_grad():
        right = made.model(made.images).argmax(1) == made.labels
    over = found.margins - exact
    if made.images.dtype in bounds[0].errors:
        over = torch.maximum(over, found.margins - computed(made, points))
    allowed = 1e-12 if found.dtype else 1e-6  # without a bound of rounding, a cast to float32 in the network counts as exact
    if bool((over > allowed * scale).any()):
        detail = f"by {over.max():.3g} of logits up to {scale:.3g}: {found.margins.tolist()}, found {exact.tolist()}"
        return Verdict("unsound", detail, operations, len(right))
    if found.reason is None and bool(torch.isfinite(found.margins[right]).all()):
        return Verdict("proved", "", operations, len(right))
    return Verdict("refused", found.reason or "a margin without a reason", operations, len(right))


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The true class's logit less the largest other one, in float64."""
    own = logits.double().gather(1, labels[:, None])
    return (own - logits.double().scatter(1, labels[:, None], -math.inf)).amin(1)


def lowest(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    box: tuple[float, float] | None,
    tries: int = 24,
    steps: int = 24,
) -> tuple[Tensor, float, Tensor]:
    """The smallest margins found by gradient and sign steps from many starts, the largest logit, and all last points.

    Starts are the image, points of the sphere and of the ball, and corners. All points are in the ball and in the box.
    """
    low, high = box or (-math.inf, math.inf)
    x, y = images.repeat_interleave(tries, 0), labels.repeat_interleave(tries)
    wide = radii.to(x).repeat_interleave(tries).reshape(-1, *[1] * (x.ndim - 1))
    kind = torch.arange(len(x)).reshape(wide.shape[0], *wide.shape[1:] and [1] * (x.ndim - 1)) % tries
    moved = torch.randn_like(x)
    moved = torch.where(kind % 3 == 2, moved.sign(), moved)
    moved = moved / length(moved) * wide * torch.where(kind % 3 == 1, torch.rand_like(wide), 1.0) * (kind > 0)
    best, scale = torch.full((len(x),), math.inf, dtype=x.dtype), 0.0
    reached = x.clone()
    for step in range(steps + 1):
        moved = moved * (wide / length(moved)).clamp_max(1.0)
        point = (x + moved).clamp(low, high).requires_grad_()
        logits = model(point)
        margins = margins_of(logits, y)
        seen = margins.detach().nan_to_num(nan=math.inf)
        reached = torch.where((seen < best).reshape(wide.shape), point.detach(), reached)
        best, scale = torch.minimum(best, seen), max(scale, float(logits.detach().abs().nan_to_num(0, 0, 0).amax()))
        (slope,) = torch.autograd.grad(margins.sum(), point)
        slope = slope.nan_to_num(0, 0, 0)
        direction = torch.where(kind % 2 == 0, slope, slope.sign())
        moved = (point.detach() - x) - direction / length(direction) * wide * 2 * 0.8**step
    return best.reshape(-1, tries).amin(1), scale, reached.reshape(-1, tries, *x.shape[1:])


def length(moved: Tensor) -> Tensor:
    return moved.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(-1, *[1] * (moved.ndim - 1))


def computed(made: Case, points: Tensor) -> Tensor:
    """The smallest margins that the model itself computes at points (images, tries, ...) that stay in the ball when rounded."""
    rounded = points.to(made.images.dtype)
    inside = (rounded.double() - made.images.double()[:, None]).flatten(2).norm(dim=2) <= made.radii[:, None]
    with torch.no_grad():
        margins = margins_of(made.model(rounded.flatten(0, 1)), made.labels.repeat_interleave(points.shape[1]))
    return torch.where(inside, margins.reshape(inside.shape), math.inf).amin(1)


@contextmanager
def recorded(operations: list[str], bounds: list[rs.LipschitzBound]) -> Iterator[None]:
    """Collect the operations for which a walk found an error, or only a global constant, and the global bound."""

    def bounded(*given: Any) -> rs.LipschitzBound:
        bounds.append(rs.lipschitz_bound(*given))
        return bounds[-1]

    class Recorded(LocalWalk):
        def run(self) -> None:
            try:
                super().run()
            finally:
                for node, error in self.errors.items():
                    alone = isinstance(error.slope, float) and error.energy is None
                    operations.append(str(operation_of(node.target)) + (" by a global constant" if alone else ""))

    with patch.object(prover, "LocalWalk", Recorded), patch.object(prover, "lipschitz_bound", bounded):
        yield


@contextmanager
def wrong(operation: Any, factor: float = 0.3) -> Iterator[None]:
    """Make all errors of an operation smaller than they are."""
    right, names = RULES[operation], [operation, *([ALIASES[operation]] if operation in ALIASES else [])]

    def smaller(walk: Any, node: Any) -> LocalError:
        error = right(walk, node)
        energy, size, graph = error.energy, error.size, error.pieces
        if graph is not None and graph.sector:
            graph = replace(graph, slopes=(graph.slopes[0] * factor,))
        return replace(
            error, reach=error.reach * factor, pieces=graph, size=None if size is None else size * factor,
            energy=None if energy is None else lambda given: [part * factor for part in energy(given)],
        )  # fmt: skip

    with patch.dict(RULES, dict.fromkeys(names, smaller)):
        yield
