"""Operations as users write them: casts, maxima and sorting, pools, products, conditions, outputs and parametrised layers."""

import copy
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import mirrored
from networks import Call, bounded, of, sampled, seeded
from reference import gain, jacobian_norm, map_norm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.modeling_outputs import ImageClassifierOutput

import robust_spectral as rs

Build = Callable[[], nn.Module]


def written(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :3], y[:, 3:] = torch.maximum(x[:, :3], x[:, 3:]), torch.minimum(x[:, :3], x[:, 3:])
    return y


def interleaved(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, ::2], y[:, 1::2] = torch.max(x[:, ::2], x[:, 1::2]), torch.min(x[:, ::2], x[:, 1::2])
    return y


def chunked(m: nn.Module, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


def halved(m: nn.Module, x: Tensor) -> Tensor:
    a, b = x.split(x.shape[1] // 2, dim=1)
    return torch.cat((torch.max(a, b), torch.min(a, b)), dim=1)


def stacked(m: nn.Module, x: Tensor) -> Tensor:
    pairs = x.view(len(x), -1, 2)
    return torch.stack([pairs.max(2).values, pairs.min(2).values], 2).flatten(1)


def by_view(m: nn.Module, x: Tensor) -> Tensor:
    pairs = x.view(len(x), -1, 2)
    return torch.cat([pairs.max(dim=-1)[0], pairs.min(dim=-1)[0]], 1)


def by_extremes(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x.unflatten(1, (2, -1)).amax(1), x.unflatten(1, (2, -1)).amin(1)], 1)


ONE: dict[str, tuple[Build, tuple[int, ...]]] = {
    "chunk and cat": (of(chunked), (6,)), "split and cat": (of(halved), (6,)), "stack": (of(stacked), (6,)),
    "view and maxima": (of(by_view), (6,)), "view and extremes": (of(by_extremes), (6,)),
    "on channels": (of(chunked), (4, 3, 3)), "written": (of(written), (6,)), "written in turns": (of(interleaved), (6,)),
    "sort": (of(lambda m, x: x.view(len(x), -1, 2).sort(2)[0].flatten(1)), (6,)),
    "sort of three": (of(lambda m, x: torch.sort(x.view(len(x), -1, 3), descending=True).values.flatten(1)), (6,)),
    "topk": (of(lambda m, x: x.topk(2, dim=1)[0]), (6,)),
    "topk below": (of(lambda m, x: x.topk(2, largest=False).values), (6,)),
    "maximum with a constant": (of(lambda m, x: torch.maximum(x, m.c), c=torch.randn(6)), (6,)),
    "largest": (of(lambda m, x: x.max(1, keepdim=True)[0]), (6,)), "mT": (of(lambda m, x: x.mT), (2, 3)),
    "split, permute, cat": (of(lambda m, x: torch.cat([p.permute(0, 1, 3, 2) for p in x.split(2, 1)][::-1], 1)), (4, 3, 3)),
    "patches merged": (of(lambda m, x: torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)), (4, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", ONE.values(), ids=ONE)
def test_maxima_sorting_and_rearranging_have_constant_one(build: Build, shape: tuple[int, ...]) -> None:
    model = seeded(build)
    assert 1 <= bounded(model, *shape).value <= 1 + 1e-9
    assert sampled(model, *shape) <= 1 + 1e-9


def running(norm: Any) -> nn.Module:
    nn.init.uniform_(norm.running_var, 0.2, 2.0)
    nn.init.normal_(norm.running_mean)
    if norm.affine:
        nn.init.normal_(norm.weight)
    return nn.Sequential(norm).eval()


MATRIX, SQUARE = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.diag(torch.tensor([1.0, 5, 2, 3]))
LINEAR: dict[str, tuple[Build, tuple[int, ...]]] = {
    "x @ W.T": (of(lambda m, x: x @ m.c.T, c=MATRIX.T.contiguous()), (6,)),
    "x @ W.mT": (of(lambda m, x: x @ m.c.mT, c=MATRIX.T.contiguous()), (6,)),
    "W in front": (of(lambda m, x: (m.c.T @ x.T).T, c=MATRIX), (6,)),
    "addmm": (of(lambda m, x: torch.addmm(m.b, x, m.c), c=MATRIX, b=torch.randn(4)), (6,)),
    "addmm with factors": (of(lambda m, x: torch.addmm(m.b, x, m.c, beta=0.5, alpha=-2), c=MATRIX, b=torch.randn(4)), (6,)),
    "baddbmm": (of(lambda m, x: torch.baddbmm(m.b, x, m.c.expand(len(x), 6, 4)), c=MATRIX, b=torch.randn(1, 3, 4)), (3, 6)),
    "einsum": (of(lambda m, x: torch.einsum("bi,ij->bj", x, m.c), c=MATRIX), (6,)),
    "masked": (of(lambda m, x: (3 * x).masked_fill(m.c, -9.0), c=torch.tensor([True, False, False])), (3,)),
    "chosen by a constant": (of(lambda m, x: torch.where(m.c, x, 2.0), c=torch.tensor([True, False, False])), (3,)),
    "float": (of(lambda m, x: m.f(x.float().double()), f=nn.Linear(6, 4)), (6,)),
    "to float32": (of(lambda m, x: m.f(x.to(torch.float32).to(torch.float64)), f=nn.Linear(6, 4)), (6,)),
    "to the weight's type": (of(lambda m, x: m.f(x.to(m.f.weight.dtype)), f=nn.Linear(6, 4)), (6,)),
    "double and back": (of(lambda m, x: m.f(x.double()).to(x.dtype), f=nn.Linear(6, 4)), (6,)),
    "type_as": (of(lambda m, x: m.f(x.float().type_as(m.f.weight)), f=nn.Linear(6, 4)), (6,)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), (6,)),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4))).eval(), (6,)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 4)), (6,)),
    "custom parametrisation": (lambda: mirrored(nn.Linear(6, 4)), (6,)),
    "weight norm of a convolution": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 5)),
    "custom parametrisation of a convolution": (lambda: mirrored(nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 5)),
    "instance norm by running statistics": (
        lambda: running(nn.InstanceNorm2d(2, affine=True, track_running_stats=True)), (2, 3, 3)),
    "instance norm by running statistics in one dimension": (
        lambda: running(nn.InstanceNorm1d(3, track_running_stats=True)), (3, 4)),
    "average pool": (of(lambda m, x: F.avg_pool2d(x, 4, 3, ceil_mode=True)), (2, 6, 6)),
    "average pool with a divisor": (of(lambda m, x: F.avg_pool2d(x, 2, divisor_override=1)), (2, 6, 6)),
    "adaptive average pool": (of(lambda m, x: F.adaptive_avg_pool2d(x, (3, 4))), (2, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", LINEAR.values(), ids=LINEAR)
def test_the_bound_of_a_linear_operation_is_its_norm(build: Build, shape: tuple[int, ...]) -> None:
    model = seeded(build)
    assert bounded(model, *shape).value == pytest.approx(map_norm(model, shape), rel=1e-6)
    assert map_norm(model, shape) <= bounded(model, *shape).value * (1 + 1e-6)


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], float]] = {
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), (2, 6, 6), 1),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, 3, 2, 1), (2, 6, 6), 2),
    "with indices": (lambda x: F.max_pool2d(x, 3, 1, return_indices=True)[0], (2, 6, 6), 3),
    "ceil_mode": (lambda x: F.max_pool2d(x, 4, 3, ceil_mode=True), (2, 7, 7), 2),
    "F.max_pool1d": (lambda x: F.max_pool1d(x, 3, 1), (2, 6), math.sqrt(3)),
    "max_pool1d with indices": (lambda x: F.max_pool1d_with_indices(x, 3, 1)[0], (2, 6), math.sqrt(3)),
    "F.max_pool3d": (lambda x: F.max_pool3d(x, 2), (2, 4, 4, 4), 1),
    "adaptive, dividing": (lambda x: F.adaptive_max_pool2d(x, 3), (2, 6, 6), 1),
    "adaptive, with indices": (lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0], (2, 6, 6), 1),
    "adaptive in one dimension": (lambda x: F.adaptive_max_pool1d(x, 2), (2, 6), 1),
}


@pytest.mark.parametrize("pool, shape, constant", POOLS.values(), ids=POOLS)
def test_every_spelling_of_a_max_pool_has_its_constant(
    pool: Callable[[Tensor], Tensor], shape: tuple[int, ...], constant: float
) -> None:
    model = Call(lambda m, x: pool(x)).double()
    assert bounded(model, *shape).value == pytest.approx(constant, rel=1e-9)
    spike = torch.zeros(1, *shape, dtype=torch.float64)
    spike[(0, 0, *[2] * (len(shape) - 1))] = 1
    assert max(gain(model, 0 * spike, spike), sampled(model, *shape)) <= constant * (1 + 1e-9)


MASK = torch.ones(5, 5).tril().bool()
sdpa = F.scaled_dot_product_attention
HEADS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "attention": (of(lambda m, x: sdpa(m.q(x), m.k(x), x), q=nn.Linear(4, 4), k=nn.Linear(4, 4)), (5, 4)),
    "causal": (of(lambda m, x: sdpa(m.q(x), x, x, is_causal=True), q=nn.Linear(4, 4)), (5, 4)),
    "masked": (of(lambda m, x: sdpa(m.q(x), x, x, attn_mask=m.c), q=nn.Linear(4, 4), c=MASK), (5, 4)),
    "biased": (of(lambda m, x: sdpa(x, x, m.q(x), m.c.to(x)), q=nn.Linear(4, 4), c=MASK.float()), (5, 4)),
    "heads": (of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)), (5, 4)),
    "heads without weights": (of(lambda m, x: m.a(x, x, x, need_weights=False)[0],
                                 a=nn.MultiheadAttention(4, 2, batch_first=True)), (5, 4)),
    "heads along the first axis": (of(lambda m, x: m.a(y := x.transpose(0, 1), y, y)[0].transpose(0, 1),
                                      a=nn.MultiheadAttention(4, 2)), (5, 4)),
}  # fmt: skip


def largest_in_the_box(model: nn.Module, shape: tuple[int, ...]) -> float:
    x, y = torch.rand(2, 32, *shape, dtype=torch.float64)
    corners = x.round()
    return max(gain(model, x, y), gain(model, corners, y), *(jacobian_norm(model, p) for p in torch.cat([x[:4], corners[:8]])))


@pytest.mark.parametrize("build, shape", HEADS.values(), ids=HEADS)
def test_attention_as_torch_has_it_has_a_local_bound(build: Build, shape: tuple[int, ...]) -> None:
    model = seeded(build)
    found = bounded(model, *shape)
    assert found.value == math.inf and found.reason is not None
    assert largest_in_the_box(model, shape) <= found.local <= 200 * largest_in_the_box(model, shape)


relu = torch.relu
BOXED: dict[str, tuple[Build, tuple[int, ...]]] = {
    "variance and mean": (of(lambda m, x: torch.cat(torch.var_mean(x, -1, keepdim=True), 1)), (6,)),
    "variance": (of(lambda m, x: torch.var(x, 1, correction=0, keepdim=True)), (6,)),
    "deviation and mean": (of(lambda m, x: torch.stack(torch.std_mean(m.f(x), (1, 2)), 1), f=nn.Linear(4, 4)), (3, 4)),
    "linear attention": (
        of(lambda m, x: linear_attention(m.q(x), m.k(x), x, 0.1), q=nn.Linear(4, 4), k=nn.Linear(4, 4)), (5, 4)),
    "over a sum of products": (of(lambda m, x: x / (relu(x) @ relu(m.f(x)).mT + 0.5), f=nn.Linear(4, 4)), (4, 4)),
    "over a sum of products by names": (
        of(lambda m, x: x / (torch.einsum("bik,bjk->bij", relu(x), m.f(x).square()) + 0.5), f=nn.Linear(4, 4)), (4, 4)),
    "over a sum and a product": (
        of(lambda m, x: 1 / torch.baddbmm(x + 0.5, relu(x), relu(m.f(x)), alpha=0.5), f=nn.Linear(4, 4)), (4, 4)),
    "logarithm of a mean": (of(lambda m, x: torch.log(relu(m.f(x)).mean(1, keepdim=True) + 0.1), f=nn.Linear(6, 6)), (6,)),
}  # fmt: skip


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """The attention of EfficientViT: an average with the products of ReLU features as weights."""
    out = relu(q) @ (relu(k).transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0))
    return out[..., :-1] / (out[..., -1:] + eps)


@pytest.mark.parametrize("build, shape", BOXED.values(), ids=BOXED)
def test_products_and_moments_have_a_local_bound_by_the_sign_and_size_of_values(build: Build, shape: tuple[int, ...]) -> None:
    model = seeded(build)
    assert largest_in_the_box(model, shape) <= bounded(model, *shape).local < math.inf


def test_an_average_by_linear_attention_stays_within_its_values() -> None:
    near = of(lambda m, x: linear_attention(x, x, x, 1e-4))
    apart = of(lambda m, x: (relu(x) @ (relu(x).mT @ x)) / (relu(x) @ (relu(x).mT @ (x[..., :1] + 1)) + 1e-4))
    assert bounded(seeded(near), 5, 4).local < 1e-2 * bounded(seeded(apart), 5, 4).local


@pytest.mark.parametrize("jump", [
    lambda m, x: torch.where(x > 0.5, x, 0.1 * x), lambda m, x: x.masked_fill(x > 0.5, 0.0), lambda m, x: x * (x > 0.5),
    lambda m, x: x * (x > 0.5).to(x.dtype),
], ids=["where", "masked_fill", "product", "cast"])  # fmt: skip
def test_a_choice_by_a_comparison_of_the_input_has_no_bound_as_it_jumps(jump: Callable[..., Tensor]) -> None:
    found = bounded(Call(jump).double(), 6)
    assert found.value == found.local == math.inf and "jump" in str(found.reason)


@pytest.mark.parametrize("statistic", [torch.var, torch.std, torch.var_mean, torch.std_mean])
@pytest.mark.parametrize("settings", [{}, {"unbiased": False}, {"dim": 0}], ids=["all", "all, biased", "batch"])
def test_a_statistic_over_the_batch_has_no_bound(statistic: Callable[..., Any], settings: dict[str, Any]) -> None:
    found = bounded(Call(lambda m, x: torch.cat([*map(torch.atleast_1d, tuple(statistic(x, **settings)))])
                         if "mean" in statistic.__name__ else x * statistic(x, **settings)).double(), 6)  # fmt: skip
    assert found.value == found.local == math.inf and found.reason is not None


Pair = namedtuple("Pair", ["first", "second"])
OUTPUTS: dict[str, tuple[Callable[[nn.Module, Tensor], Any], float]] = {
    "dictionary of one": (lambda m, x: {"logits": 3 * x}, 3), "ordered dictionary": (lambda m, x: OrderedDict(out=3 * x), 3),
    "output of transformers": (lambda m, x: ImageClassifierOutput(logits=3 * x), 3),
    "dictionary of two": (lambda m, x: {"a": 3 * x, "b": 4 * x}, 5), "tuple": (lambda m, x: (3 * x, 4 * x), 5),
    "named tuple": (lambda m, x: Pair(3 * x, 4 * x), 5), "nested": (lambda m, x: [3 * x, {"a": (4 * x, None)}], 5),
    "with numbers": (lambda m, x: (3 * x, x.shape, None), 3),
}  # fmt: skip


@pytest.mark.parametrize("function, constant", OUTPUTS.values(), ids=OUTPUTS)
def test_all_tensors_of_an_output_are_bounded_together(function: Callable[..., Any], constant: float) -> None:
    assert bounded(Call(function).double(), 4).value == pytest.approx(constant, rel=1e-9)


NETS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "float": lambda m, x: m.b(F.gelu(m.a(x)).float().to(m.b.weight)),
    "to float32": lambda m, x: m.b(F.gelu(m.a(x)).to(torch.float32).to(m.b.weight.dtype)),
    "to the weight's type": lambda m, x: m.b(F.gelu(m.a(x)).to(m.b.weight.dtype)),
    "double and back": lambda m, x: m.b(F.gelu(m.a(x).double()).to(m.b.weight.dtype)),
    "float in front": lambda m, x: m.b(F.gelu(m.a(x.float().to(m.a.weight.dtype)))),
    "float32 softmax": lambda m, x: m.b(F.softmax(m.a(x), -1, dtype=torch.float32).to(m.b.weight.dtype)),
    "double layer norm": lambda m, x: m.b(F.layer_norm(m.a(x).double(), (8,), eps=0.1).type_as(m.b.weight)),
    "sort": lambda m, x: m.b(m.a(x).view(len(x), -1, 2).sort(2)[0].flatten(1)),
    "MaxMin": lambda m, x: m.b(chunked(m, m.a(x))),
}


def without_casts(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """The network in float64 with casts that do not round."""
    exact = copy.deepcopy(model).double()
    plain = {"float32 softmax": lambda x: F.softmax(x, -1), "double layer norm": lambda x: F.layer_norm(x, (8,), eps=0.1),
             "sort": lambda x: x.view(len(x), -1, 2).sort(2)[0].flatten(1),
             "MaxMin": lambda x: chunked(exact, x)}.get(name, F.gelu)  # fmt: skip
    return lambda x: exact.b(plain(exact.a(x)))


ROUNDED: dict[str, Build] = {
    "limits that are tensors": of(lambda m, x: torch.clamp(m.f(x), m.low, m.high) * m.c, f=nn.Linear(6, 6), c=torch.rand(6),
                                  low=torch.full((6,), 1000.0), high=torch.full((6,), 2000.0)),
    "number as limit": of(lambda m, x: m.f(x).clamp_min(1000.3) * m.c, f=nn.Linear(6, 6), c=torch.rand(6)),
    "chosen": of(lambda m, x: torch.where(m.c > 0.5, m.f(x), 1000.3) * m.c, f=nn.Linear(6, 6), c=torch.rand(6)),
    "masked": of(lambda m, x: m.f(x).masked_fill(m.c > 0.5, 1000.3) * m.c, f=nn.Linear(6, 6), c=torch.rand(6)),
    "instance norm by running statistics": of(
        lambda m, x: m.n(m.f(x).unflatten(1, (2, 3))), f=nn.Linear(6, 6),
        n=running(nn.InstanceNorm1d(2, affine=True, track_running_stats=True))),
    "tanh gelu": of(lambda m, x: m.f(x) * (1 + torch.tanh(0.79788456 * (m.f(x) + 0.044715 * m.f(x) ** 3))), f=nn.Linear(6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("build", ROUNDED.values(), ids=ROUNDED)
def test_rounding_to_float32_is_at_most_its_bound(build: Build) -> None:
    model, x = build().float().eval(), torch.rand(64, 6)
    found = rs.lipschitz_bound(model, x[:1])
    apart = (model(x).double() - copy.deepcopy(model).double()(x.double())).flatten(1).norm(dim=1).max()
    assert 0 < float(apart.detach()) <= found.errors[torch.float32] < 1


@pytest.mark.parametrize("name", NETS)
def test_rounding_in_both_types_is_at_most_its_bound_casts_included(name: str) -> None:
    model = Call(NETS[name], a=nn.Linear(6, 8), b=nn.Linear(8, 4)).eval()
    x = torch.rand(64, 6)  # in float32, so that a cast in front does not round
    x[::2] = x[::2].round()
    for run in (model, copy.deepcopy(model).double()):
        dtype = run.b.weight.dtype
        found = rs.lipschitz_bound(run, torch.zeros(1, 6, dtype=dtype))
        with torch.no_grad():
            apart = (run(x.to(dtype)).double() - without_casts(model, name)(x.double())).norm(dim=1).max()
        assert float(apart) <= found.errors[dtype] < 1e-2
    assert (float(apart) > 1e-12) == (name in ("float", "to float32", "float32 softmax"))
