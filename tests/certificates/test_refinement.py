"""Refined Lipschitz bounds: above every sampled gain, never above the product of norms, and true as a matrix inequality."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from local_networks import NETWORKS, conv, head, network
from networks import Call, sampled, seeded
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.certificates.global_errors import GlobalWalk, global_error
from robust_spectral.certificates.refinement import Refinement, global_walk
from robust_spectral.lipschitz import preserved
from robust_spectral.operators import full_precision_no_grad

SMALLER = {  # largest part of `lipschitz_bound` that is left
    "dense": 0.8, "convolutions": 0.9, "residual": 0.8, "max-pool": 0.8, "batch norm": 0.8, "GELU": 0.9, "MaxMin": 0.9,
    "two branches": 0.95,
}  # fmt: skip
PLAIN = [name for name in NETWORKS if name not in ("gates", "attention")]
ELEMENTWISE = {
    "ReLU6": F.relu6, "ELU": F.elu, "a steep ELU": lambda x: F.elu(x, 2.0), "SELU": F.selu, "CELU": F.celu, "SiLU": F.silu,
    "Mish": F.mish, "hard-swish": F.hardswish, "hard-sigmoid": F.hardsigmoid, "softplus": F.softplus, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "absolute value": torch.abs, "clamp": lambda x: x.clamp(-0.5, 0.7),
    "sine": torch.sin, "GELU": F.gelu, "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"), "log-sigmoid": F.logsigmoid,
    "a falling leaky ReLU": lambda x: F.leaky_relu(x, -1.5), "arctan": torch.atan, "error function": torch.erf,
    "asinh": torch.asinh,
}  # fmt: skip


def refined(model: nn.Module, *shape: int, rounds: int = 60) -> rs.LipschitzBound:
    return rs.refined_bound(model, torch.zeros(1, *shape, dtype=torch.float64), None, rounds=rounds)


def walk_of(model: nn.Module, *shape: int) -> GlobalWalk:
    with preserved(model), full_precision_no_grad():
        return global_walk(model, torch.zeros(1, *shape, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_a_bound_is_between_the_sampled_gains_and_the_product_of_norms(name: str) -> None:
    model = network(name)
    known, found = rs.lipschitz_bound(model, torch.zeros(1, 2, 4, 4, dtype=torch.float64)), refined(model, 2, 4, 4)
    assert sampled(model, 2, 4, 4) <= found.value <= known.value * SMALLER.get(name, 1.0)
    assert found.local <= known.local and found.reason is None
    assert known.failure_probability <= found.failure_probability <= 1e-7
    if known.pairs is not None:
        assert found.pairs is not None and bool((found.pairs <= known.pairs).all())
        assert float(found.pairs.max()) <= math.sqrt(2) * found.value * (1 + 1e-12)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_operation_has_no_slope_outside_its_sector(name: str) -> None:
    walk = walk_of(Call(lambda m, x: ELEMENTWISE[name](x)), 3)
    (node,) = walk.graph.outputs
    error = global_error(walk, node, walk.graph.input)
    assert isinstance(error.slope, Tensor) and error.by_element
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    steps, centre = ELEMENTWISE[name](x).diff(), float(error.slope.flatten()[0])
    half = error.energy([x.diff()[:, None, None].expand(-1, 2, 3)])[0][:, 0, 0]
    assert bool(((steps - centre * x.diff()).abs() <= half + 1e-12).all())
    assert error.gain == pytest.approx(float((half / x.diff()).max()))


@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), ((2, 3), (2, 1), (1, 0))])
def test_the_change_of_a_maximum_is_near_the_mean_change_of_its_window(kernel: int, stride: int, padding: int) -> None:
    pool = nn.MaxPool2d(kernel, stride, padding)
    walk = walk_of(pool, 1, 5, 6)
    (node,) = walk.graph.outputs
    error = global_error(walk, node, walk.graph.input)
    assert error.linear is not None
    one, other = torch.randn(2, 200, 1, 5, 6, dtype=torch.float64)
    other[::2] = one[::2] + 3 * torch.eye(30, dtype=torch.float64)[torch.arange(100) % 30].reshape(-1, 1, 5, 6)
    step = other - one
    missed = (pool(other) - pool(one) - error.linear(step)).square()
    energy = error.energy([step[None]])[0][0].square().sum(1)
    assert bool((missed <= energy + 1e-12).all())
    assert bool((missed.flatten(1).sum(1).sqrt() <= error.gain * step.flatten(1).norm(dim=1)).all())


def test_the_multipliers_of_a_dense_network_satisfy_the_matrix_inequality_of_lipsdp() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)))
    walk = walk_of(model, 5)
    with torch.no_grad():
        found = Refinement(walk, math.inf, None, 200, None)
        found.run()
    d = [(found.best[n][0].exp() / term.size[0] ** 2).diag() for n, term in found.terms.items() if not term.fixed]
    A, B, C = (model[i].weight.detach() for i in (0, 2, 4))
    M = torch.zeros(27, 27, dtype=torch.float64)  # of changes of the input and of the two ReLUs' values
    M[:5, :5] = torch.eye(5, dtype=torch.float64) * found.value**2
    M[5:17, :5], M[:5, 5:17] = -d[0] @ A / 2, -A.mT @ d[0] / 2
    M[5:17, 5:17] = d[0]
    M[17:, 5:17], M[5:17, 17:] = -d[1] @ B / 2, -B.mT @ d[1] / 2
    M[17:, 17:] = d[1] - C.mT @ C
    assert float(torch.linalg.eigvalsh(M)[0]) >= -1e-9 * float(M.abs().max())
    smaller = M - torch.diag(torch.cat([torch.full((5,), 0.1 * found.value**2), torch.zeros(22)])).double()
    assert float(torch.linalg.eigvalsh(smaller)[0]) < 0


def test_a_linear_network_has_its_norm_as_bound() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)))
    x = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)
    exact = float(torch.linalg.matrix_norm((model(x) - model(0 * x)).detach(), 2))
    assert exact * (1 - 1e-9) <= refined(model, 1, 4, 4).value <= 1.02 * exact


def test_more_rounds_do_not_make_a_residual_network_worse() -> None:
    model = network("residual")
    few, many = (refined(model, 2, 4, 4, rounds=rounds).value for rounds in (30, 150))
    assert many <= 1.02 * few


def test_rounds_give_the_same_bound_again_and_leave_the_model_as_it_is() -> None:
    model = seeded(lambda: nn.Sequential(conv(1, 3), nn.BatchNorm2d(3), nn.MaxPool2d(3, 2, 1), nn.ReLU(), head(12))).train()
    before = copy.deepcopy(model.state_dict())
    first, second = refined(model, 1, 4, 4, rounds=20), refined(model, 1, 4, 4, rounds=20)
    assert first.value == second.value and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_float32_networks_and_casts_to_float64_are_refined() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))).float()
    x = torch.zeros(1, 6)
    known = rs.lipschitz_bound(model, x).value
    assert rs.refined_bound(model, x, None, rounds=40).value < 0.8 * known
    cast = Call(lambda m, x: m.net(x.double()), net=model.double())
    assert rs.refined_bound(cast, x, None, rounds=40).value < 0.8 * known


def test_an_operation_without_a_constant_of_its_own_leaves_the_known_bound_with_the_reason() -> None:
    model = seeded(lambda: Call(lambda m, x: m.b(m.a(x).relu().sort(1).values), a=nn.Linear(4, 6), b=nn.Linear(6, 2)))
    found = refined(model, 4)
    assert found.value == rs.lipschitz_bound(model, torch.zeros(1, 4, dtype=torch.float64)).value
    assert found.reason is not None and found.reason.startswith("not refined") and "sort" in found.reason


def test_a_network_without_a_global_constant_has_none_after_refinement() -> None:
    model = network("gates")
    known, found = rs.lipschitz_bound(model, torch.zeros(1, 2, 4, 4, dtype=torch.float64)), refined(model, 2, 4, 4)
    assert found.value == math.inf and (found.local, found.reason) == (known.local, known.reason)


def test_a_pattern_and_a_normalisation_count_with_their_constants() -> None:
    model = seeded(
        lambda: Call(
            lambda m, x: m.c(m.n(m.b(m.a(x) * torch.sigmoid(m.a(x)))).relu()),
            a=nn.Linear(4, 8), b=nn.Linear(8, 6), n=nn.LayerNorm(6, eps=0.1), c=nn.Linear(6, 2),
        )
    )  # fmt: skip
    known, found = rs.lipschitz_bound(model, torch.zeros(1, 4, dtype=torch.float64)).value, refined(model, 4)
    assert sampled(model, 4) <= found.value <= known and found.reason is None


def test_several_outputs_are_bounded_together() -> None:
    model = seeded(lambda: Call(lambda m, x: (m.a(x).relu(), {"b": m.b(m.a(x).relu()).relu()}),  # type: ignore[arg-type,return-value]
                                a=nn.Linear(4, 8), b=nn.Linear(8, 6)))  # fmt: skip
    x = torch.randn(2, 50, 4, dtype=torch.float64)
    (a, b), (c, d) = ((y, z["b"]) for y, z in map(model, x))
    gains = torch.cat([a - c, b - d], 1).norm(dim=1) / (x[0] - x[1]).norm(dim=1)
    assert float(gains.detach().max()) <= refined(model, 4).value


def test_progress_is_reported_and_time_limits_are_checked() -> None:
    model, x, seen = network("dense"), torch.zeros(1, 2, 4, 4, dtype=torch.float64), []
    found = rs.refined_bound(model, x, 0.5, progress=lambda over, value: seen.append((over, value)))
    assert seen and all(0 <= over < 1 and value >= found.value for over, value in seen)
    for arguments in ({"seconds": None}, {"seconds": 0.0}, {"rounds": 0}, {"failure_probability": 0.0}):
        with pytest.raises(ValueError, match="refined_bound"):
            rs.refined_bound(model, x, **arguments)  # type: ignore[arg-type]


def squared_norm(found: Refinement) -> float:
    """The squared norm of the map for the first image, from its matrix."""
    joint = found.map()
    columns = torch.eye(joint.given, dtype=torch.float64)[:, None].expand(-1, joint.images, -1)
    return float(torch.linalg.matrix_norm(joint.forward(columns)[:, 0], 2)) ** 2


def test_a_norm_above_one_is_made_up_for_by_smaller_multipliers_at_higher_levels() -> None:
    walk = walk_of(network("residual"), 2, 4, 4)
    with torch.no_grad():
        found = Refinement(walk, math.inf, None, 60, None)
        found.run()
        assert found.levels == 4  # those of two ReLUs, of a max-pooling, and of the output
        generator = torch.Generator().manual_seed(5)
        for term in found.terms.values():
            term.log = term.log + 0.3 * torch.randn(term.log.shape[1], generator=generator, dtype=torch.float64)
        square, levels = squared_norm(found), walk.levels()
        assert square > 1
        for node, term in found.terms.items():
            term.log = term.log + (found.levels - levels[node]) * math.log(square)
        assert squared_norm(found) <= 1 + 1e-9
        larger = float(found.terms[walk.graph.input].log[0, 0].div(2).exp())
        for node, term in found.terms.items():
            term.log = term.log - (found.levels - levels[node]) * math.log(square)
        assert found.by_levels(math.sqrt(square)) == pytest.approx(larger)
