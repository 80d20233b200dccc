"""The bound of a network: equal to the known constant, never below a sampled gain, infinite where nothing is known."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import randomised
from networks import Call, bound, sampled, seeded
from reference import dense, gain, jacobian_norm, norm, same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), randomised(nn.BatchNorm2d(channels))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.act(out)


NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "gelu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)), (6,)),
    "dense on a sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)), (3, 4)),
    "dense, batchnorm over the sequence":
        (lambda: nn.Sequential(nn.Linear(4, 5), randomised(nn.BatchNorm1d(3), [1.0, 2.0, -3.0])), (3, 4)),
    "dense, batchnorm": (lambda: nn.Sequential(nn.Linear(4, 3), randomised(nn.BatchNorm1d(3), [1.0, 2.0, -3.0])), (4,)),
    "residual": (lambda: nn.Sequential(Residual(3), nn.MaxPool2d(3, 2, 1), Residual(3)), (3, 6, 6)),
    "concatenation": (lambda: Call(lambda m, x: torch.cat([m.a(x), F.relu(m.b(x)), x], dim=1),
                                   a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(2, 2, 1)), (2, 4, 4)),
    "negative axis concatenation": (lambda: Call(lambda m, x: torch.cat([m.a(x), x], -1), a=nn.Linear(3, 2)), (3,)),
    "one layer twice": (lambda: Call(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Conv2d(2, 2, 3, padding=1)), (2, 5, 5)),
    "one layer on two shapes": (lambda: Call(lambda m, x: m.a(m.p(m.a(x))), a=nn.Conv2d(2, 2, 3, padding=1),
                                             p=nn.AvgPool2d(2)), (2, 6, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), nn.ReLU6(), nn.Conv2d(3, 2, 3)), (2, 4, 4)),
    "circular": (lambda: nn.Sequential(nn.Conv2d(2, 3, 4, padding=2, padding_mode="circular"), nn.Mish()), (2, 5, 5)),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.ELU(1.5)), (2, 5, 5)),
    "upsampling": (lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 3)), (2, 4, 4)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), randomised(nn.BatchNorm2d(4), [1.0, 0.0, -2.0, 3.0]),
                                      nn.Hardswish(), nn.Conv2d(4, 6, 1, groups=2)), (4, 6, 6)),
    "normalised input": (lambda: Call(lambda m, x: m.f((x - m.mean) / m.std), f=nn.Conv2d(3, 4, 3),
                                      mean=torch.rand(1, 3, 1, 1), std=torch.rand(1, 3, 1, 1) + 0.1), (3, 5, 5)),
    "gated by a constant": (lambda: Call(lambda m, x: m.gate * m.f(x) + 0.5 * x, f=nn.Linear(4, 4), gate=torch.randn(4)),
                            (4,)),
    "overlapping branches": (lambda: Call(lambda m, x: m.a(x) - m.b(F.softplus(x) if m.training else torch.tanh(x)),
                                          a=nn.Linear(4, 3), b=nn.Linear(4, 3)), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", NETWORKS.values(), ids=NETWORKS)
def test_no_sampled_gain_exceeds_the_bound(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    found = bound(model, *shape)
    assert math.isfinite(found.value) and found.reason is None
    assert sampled(model, *shape) <= found.value


@pytest.mark.parametrize("build, shape", NETWORKS.values(), ids=NETWORKS)
def test_the_bound_is_not_far_above_the_largest_sampled_gain(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    assert bound(model, *shape).value <= 12 * sampled(model, *shape)


def test_norms_multiply_along_a_chain() -> None:
    model = seeded(NETWORKS["dense"][0])
    wanted = norm(model[0], (6,)) * norm(model[2], (8,))
    assert bound(model, 6).value == pytest.approx(wanted, rel=1e-9)


def test_the_bound_of_a_residual_block_is_one_plus_the_norm_of_its_branch() -> None:
    model = seeded(lambda: Call(lambda m, x: x + m.f(x), f=nn.Linear(4, 4)))
    assert bound(model, 4).value == pytest.approx(1 + norm(model.f, (4,)), rel=1e-9)


def test_the_bound_of_a_concatenation_is_the_root_of_the_sum_of_squares() -> None:
    model = seeded(lambda: Call(lambda m, x: torch.cat([m.f(x), m.g(x)], 1), f=nn.Linear(4, 4), g=nn.Linear(4, 2)))
    assert bound(model, 4).value == pytest.approx(math.hypot(norm(model.f, (4,)), norm(model.g, (4,))), rel=1e-9)


def test_a_composite_is_bounded_by_its_norm_and_not_by_the_product_of_two_norms() -> None:
    conv, batchnorm = nn.Conv2d(3, 4, 3), randomised(nn.BatchNorm2d(4), [4.0, 0.1, -0.5, 1.0])
    model = nn.Sequential(conv, batchnorm).double().eval()
    found, whole = bound(model, 3, 6, 6).value, norm(model, (3, 6, 6))
    product = norm(conv, (3, 6, 6)) * norm(batchnorm, (4, 4, 4))
    assert found == pytest.approx(whole, rel=1e-9)
    assert whole <= found < product


def test_a_convolution_used_twice_counts_with_and_without_its_batchnorm() -> None:
    model = seeded(
        lambda: Call(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=nn.Conv2d(2, 2, 1), bn=randomised(nn.BatchNorm2d(2)))
    )
    wanted = norm(nn.Sequential(model.conv, model.bn), (2, 3, 3)) + norm(model.conv, (2, 3, 3))
    assert bound(model, 2, 3, 3).value == pytest.approx(wanted, rel=1e-9)


def test_the_bound_lists_every_node_of_the_network() -> None:
    model = seeded(NETWORKS["dense"][0])
    rows = bound(model, 6).nodes
    assert [(row.name, row.kind) for row in rows] == [("0", "linear"), ("1", "relu"), ("2", "linear")]
    assert rows[0].bound == pytest.approx(norm(model[0], (6,)), rel=1e-9)
    assert rows[-1].bound == bound(model, 6).value


def test_the_failure_probabilities_of_the_layers_add_up() -> None:
    model = nn.Sequential(nn.Linear(1300, 1300), nn.ReLU(), nn.Linear(1300, 1300), nn.Linear(1300, 3))
    found = rs.lipschitz_bound(model, torch.zeros(1, 1300), 1e-7)
    assert found.failure_probability == pytest.approx(2e-7)


def test_a_layer_applied_twice_counts_once_in_the_failure_probability() -> None:
    model = Call(lambda m, x: m.f(F.relu(m.f(x))), f=nn.Linear(1300, 1300))
    assert rs.lipschitz_bound(model, torch.zeros(1, 1300), 1e-7).failure_probability == 1e-7


def test_a_failure_probability_of_zero_gives_a_finite_deterministic_bound() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    found = rs.lipschitz_bound(model, torch.zeros(1, 3, 24, 24), 0.0)
    assert found.failure_probability == 0 and math.isfinite(found.value)


@pytest.mark.parametrize("pooled", [False, True], ids=["dense", "pooled and dense"])
def test_pairs_of_outputs_have_the_constant_of_their_difference(pooled: bool) -> None:
    head = (
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
        if pooled
        else nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    )
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), *head))
    pairs, features = bound(model, 2, 4, 4).pairs, norm(model[0], (2, 4, 4))
    weight = dense(nn.Sequential(*model[2:]), (3, 4, 4))
    wanted = features * (weight[:, None] - weight[None]).norm(dim=2)
    assert pairs is not None and bool((pairs >= wanted * (1 - 1e-15)).all())
    torch.testing.assert_close(pairs, wanted, rtol=1e-6, atol=1e-5)
    assert float(pairs.max()) <= math.sqrt(2) * bound(model, 2, 4, 4).value * (1 + 1e-9)


def test_a_network_that_does_not_end_in_a_linear_layer_has_no_pairs() -> None:
    assert bound(seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU())), 4).pairs is None


GATED = {
    "gate": (Call(lambda m, x: x * torch.sigmoid(m.f(x)), f=nn.Linear(6, 6)), (6,)),
    "product": (Call(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(6, 4), b=nn.Linear(6, 4)), (6,)),
    "squeeze and excite": (Call(lambda m, x: x * torch.sigmoid(m.f(x.mean((2, 3), keepdim=True))), f=nn.Conv2d(3, 3, 1)),
                           (3, 4, 4)),
    "attention": (Call(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x), q=nn.Linear(4, 4),
                       k=nn.Linear(4, 4)), (5, 4)),
    "attention by hand": (Call(lambda m, x: torch.softmax(m.q(x) @ x.transpose(1, 2), -1) @ x, q=nn.Linear(4, 4)), (5, 4)),
    "normalised by hand": (Call(lambda m, x: x * torch.rsqrt(x.var(-1, keepdim=True) + 0.5)), (6,)),
    "root mean square of another": (Call(lambda m, x: x / (m.f(x).pow(2).mean(-1, keepdim=True) + 0.5).sqrt(),
                                         f=nn.Linear(6, 6)), (6,)),
    "square": (Call(lambda m, x: torch.square(m.f(x)), f=nn.Linear(4, 4)), (4,)),
    "quotient": (Call(lambda m, x: m.f(x) / (1 + torch.relu(m.f(x))), f=nn.Linear(4, 4)), (4,)),
    "one matrix for many": (Call(lambda m, x: x @ x.mean(1, keepdim=True)), (3, 4, 4)),
    "products by names": (Call(lambda m, x: torch.einsum("bij,bkj->bik", m.q(x), x), q=nn.Linear(4, 4)), (5, 4)),
    "negative weights": (Call(lambda m, x: m.f(x) * m.f(x), f=nn.Linear(4, 4)), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("model, shape", GATED.values(), ids=GATED)
def test_functions_that_are_lipschitz_only_on_a_box_have_a_local_bound(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = model.double().eval()
    found = bound(model, *shape)
    assert found.value == math.inf and math.isfinite(found.local) and found.reason is not None
    x, y = torch.rand(2, 64, *shape, dtype=torch.float64)
    corners = x.round()
    largest = max(*(gain(model, a, b) for a, b in ((x, y), (corners, y), (corners, corners.flip(0)))),
                  *(jacobian_norm(model, point) for point in torch.cat([x[:8], corners[:8]])))  # fmt: skip
    assert largest <= found.local <= 200 * largest


def test_affine_layers_in_a_row_are_bounded_as_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)))
    whole = float(torch.linalg.matrix_norm(dense(model, (6,)), 2))
    assert whole * (1 - 1e-12) <= bound(model, 6).value <= whole * (1 + 1e-9)


def naive(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The bound of a chain of residual blocks from the norms of single layers: 1 + the branch at each sum."""
    total = 1.0
    for block in model:
        alone = norm(block.conv, shape) * float(norm(block.bn, (*shape[:1], 1, 1)))
        total *= 1 + alone
    return total


def test_the_bound_of_a_residual_network_is_far_below_the_one_from_single_layer_norms() -> None:
    model = seeded(lambda: nn.Sequential(*(Residual(6) for _ in range(6))))
    assert bound(model, 6, 5, 5).value <= naive(model, (6, 5, 5)) / 2


def test_the_local_bound_is_never_above_the_global_one() -> None:
    found = bound(seeded(NETWORKS["dense"][0]), 6)
    assert found.local <= found.value


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.PReLU(4), nn.BatchNorm1d(4)], ids=lambda layer: type(layer).__name__)
def test_a_weight_that_is_not_finite_is_an_error(layer: nn.Module) -> None:
    nn.init.constant_(layer.weight, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        rs.lipschitz_bound(nn.Sequential(layer), torch.zeros(2, 4))


def test_an_input_that_the_model_does_not_take_is_an_error() -> None:
    with pytest.raises(ValueError):
        rs.lipschitz_bound(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 5))


def test_an_example_without_a_batch_axis_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a batch \(n, ...\) of shape \(1, 8, 8\), .* the first input twice"):
        rs.lipschitz_bound(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.zeros(1, 8, 8))


def test_the_repr_of_a_bound_is_one_line(convnet: nn.Module, images: Tensor) -> None:
    found = rs.lipschitz_bound(convnet, images, box=None)
    assert found.pairs is not None
    smallest = min(float(found.pairs[i, j]) for i in range(5) for j in range(5) if i != j)
    assert repr(found) == f"LipschitzBound(value={found.value}, local={found.value}, smallest pair={smallest}, reason=None)"
    assert repr(rs.LipschitzBound(math.inf, reason="so")) == "LipschitzBound(value=inf, local=inf, reason='so')"


def test_the_model_and_the_example_are_left_unchanged(convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    convnet[1].eval()
    before, modes, random, example = (
        snapshot(convnet), [part.training for part in convnet.modules()], torch.get_rng_state(), images.clone(),
    )  # fmt: skip
    found = rs.lipschitz_bound(convnet, images, box=None)
    estimate = rs.lipschitz_estimate(convnet, images)
    assert 0 < estimate <= found.value < math.inf
    assert same_bits(before, snapshot(convnet))
    assert [part.training for part in convnet.modules()] == modes
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(example, images)
    assert all(parameter.grad is None for parameter in convnet.parameters())


def test_only_the_shape_of_the_example_matters(convnet: nn.Module, images: Tensor) -> None:
    assert rs.lipschitz_bound(convnet, images, box=None).value == rs.lipschitz_bound(convnet, torch.zeros(5, 3, 8, 8)).value


def test_an_example_outside_the_box_gives_a_warning(convnet: nn.Module, images: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"box=\(0, 1\).*values from 0 to 255"):
        rs.lipschitz_bound(convnet, torch.linspace(0, 255, 192).reshape(1, 3, 8, 8))
    rs.lipschitz_bound(convnet, images, box=(-9.0, 9.0))


def test_the_estimate_is_the_largest_jacobian_norm() -> None:
    model = seeded(NETWORKS["gelu"][0])
    x = torch.randn(5, 6, dtype=torch.float64)
    assert rs.lipschitz_estimate(model, x) == pytest.approx(max(jacobian_norm(model, point) for point in x), rel=1e-9)


def test_the_estimate_of_a_linear_network_is_its_norm() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    assert rs.lipschitz_estimate(model, torch.zeros(1, 5, dtype=torch.float64)) == pytest.approx(norm(model, (5,)), rel=1e-9)


def test_the_bound_of_a_timm_resnet_is_finite_and_above_its_estimate() -> None:
    model = timm.create_model("test_resnet", pretrained=False, num_classes=4)
    images = torch.rand(3, 3, 16, 16)
    found = rs.lipschitz_bound(model, images)
    assert found.reason is None
    assert 0 < rs.lipschitz_estimate(model, images) <= found.value < math.inf


def test_clipping_a_network_lowers_its_bound(convnet: nn.Module, images: Tensor) -> None:
    rs.FastClip(convnet, images, max_norm=1.0).finish()
    found = rs.lipschitz_bound(convnet, images, box=None)
    assert found.value <= 1.001**3
    assert rs.lipschitz_estimate(convnet, images) <= found.value
