"""`clip_`: by a dense float64 reference the norm meets its target, and layers below their target keep their bits."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from cases import CASES, CLIPPABLE, Case, mirrored, randomised, scaled
from reference import dense, norm, same_bits, singular_values, snapshot
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import robust_spectral as rs
from robust_spectral.clipping.clip import clip_until_proved_
from robust_spectral.clipping.moved_parameters import Move, MoveGamma, MoveWeight, MoveWeightAndGamma
from robust_spectral.clipping.tracked_layer import TrackedLayer
from robust_spectral.layers.discovery import LinearLayer

every_clippable = pytest.mark.parametrize("case", CLIPPABLE, ids=str)
same_padding_copies = pytest.mark.filterwarnings("ignore:Using padding='same'")


def weight_of(module: nn.Module) -> Tensor:
    return (module[0] if isinstance(module, nn.Sequential) else module).weight


@same_padding_copies
@every_clippable
def test_clipping_brings_the_norm_to_its_target(case: Case) -> None:
    module = case.build()
    before = norm(module, case.in_shape)
    result = rs.clip_(module, case.in_shape, 0.5 * before)
    after = norm(module, case.in_shape)
    assert after <= 1.001 * 0.5 * before
    assert after >= 0.99 * 0.5 * before
    assert before in result.before and after in result.after
    assert result.after.upper <= 1.001 * 0.5 * before
    assert result.steps > 0


@same_padding_copies
@every_clippable
def test_only_the_weight_changes_and_by_the_reported_distortion(case: Case) -> None:
    module = case.build()
    before = snapshot(module)
    result = rs.clip_(module, case.in_shape, 0.5 * norm(module, case.in_shape))
    after = snapshot(module)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == [name for name, parameter in module.named_parameters() if parameter is weight_of(module)]
    change = (after[moved[0]].double() - before[moved[0]].double()).norm() / before[moved[0]].double().norm()
    assert result.distortion == pytest.approx(float(change), rel=1e-4, abs=0)


@same_padding_copies
@pytest.mark.parametrize("factor", [0.9, 0.5])
@every_clippable
def test_clipping_changes_no_more_than_rescaling(case: Case, factor: float) -> None:
    module = case.build()
    result = rs.clip_(module, case.in_shape, factor * norm(module, case.in_shape))
    assert 0 < result.distortion <= 1.001 * (1 - factor)


@same_padding_copies
@every_clippable
def test_clipping_twice_is_clipping_once(case: Case) -> None:
    module = case.build()
    target = 0.7 * norm(module, case.in_shape)
    rs.clip_(module, case.in_shape, target)
    once = snapshot(module)
    again = rs.clip_(module, case.in_shape, target)
    assert same_bits(once, snapshot(module))
    assert (again.steps, again.distortion) == (0, 0.0)


@same_padding_copies
@pytest.mark.parametrize("case", [case for case in CASES if case.clippable or "zero" in case.name], ids=str)
def test_a_layer_already_below_its_target_keeps_its_bits(case: Case) -> None:
    module = case.build()
    before = snapshot(module)
    result = rs.clip_(module, case.in_shape, max(1.01 * norm(module, case.in_shape), 1e-3))
    assert same_bits(before, snapshot(module))
    assert (result.steps, result.distortion) == (0, 0.0)


def test_a_layer_exactly_at_its_target_keeps_its_bits() -> None:
    module = nn.Linear(4, 4)
    nn.init.eye_(module.weight)
    before = snapshot(module)
    assert rs.clip_(module, (4,), 1.0).steps == 0
    assert same_bits(before, snapshot(module))


def test_an_infinite_target_clips_nothing() -> None:
    module = scaled(nn.Linear(4, 4), 1e6)
    before = snapshot(module)
    rs.clip_(module, (4,), math.inf)
    assert same_bits(before, snapshot(module))


@pytest.mark.slow
@pytest.mark.parametrize("in_shape", [(4, 16, 16)], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_clipping_a_layer_too_large_for_a_dense_matrix_meets_the_target_and_is_idempotent(
    in_shape: tuple[int, ...], mode: str
) -> None:
    module = nn.Conv2d(4, 9, 3, padding=1, padding_mode=mode, bias=False)
    result = rs.clip_(module, in_shape, 1.0)
    once = snapshot(module)
    after = norm(module, in_shape)
    assert after <= result.after.upper <= 1.001
    assert after >= 0.99
    rs.clip_(module, in_shape, 1.0)
    assert same_bits(once, snapshot(module))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_clipping_a_dense_layer_is_clipping_its_singular_values(shape: tuple[int, int]) -> None:
    module = nn.Linear(*shape, bias=False).double()
    U, S, Vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    target = float(S[2])
    rs.clip_(module, shape[:1], target, vectors=min(shape))
    torch.testing.assert_close(module.weight.detach(), U * S.clamp_max(target) @ Vh, rtol=0, atol=2e-3 * target)


@pytest.mark.parametrize("shape", [(80, 40), (40, 80)], ids=str)
def test_more_singular_values_than_tracked_vectors_are_all_clipped(shape: tuple[int, int]) -> None:
    module = nn.Linear(*shape, bias=False)
    S = singular_values(module, shape[:1])
    target = float(S[25])
    result = rs.clip_(module, shape[:1], target, vectors=4)
    assert result.distortion <= 1.01 * float((S - S.clamp_max(target)).norm() / S.norm())
    torch.testing.assert_close(singular_values(module, shape[:1]), S.clamp_max(target), rtol=2e-3, atol=0)


def test_clipping_one_singular_value_is_the_rank_one_projection() -> None:
    left, right = (torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0] for _ in range(2))
    module = nn.Linear(5, 5, bias=False).double()
    module.weight = nn.Parameter(left * torch.tensor([4.0, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64) @ right.T)
    wanted = left * torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64) @ right.T
    result = rs.clip_(module, (5,), 1.0)
    torch.testing.assert_close(module.weight.detach(), wanted, rtol=0, atol=2e-3)
    assert result.distortion == pytest.approx(3 / math.sqrt(16 + 0.25 + 0.09 + 0.04 + 0.01), rel=2e-3)


def test_singular_values_of_a_dense_layer_below_the_target_are_kept() -> None:
    module = nn.Linear(8, 6).double()
    before = singular_values(module, (8,))
    rs.clip_(module, (8,), float(before[1]) * 0.95)
    torch.testing.assert_close(singular_values(module, (8,))[2:], before[2:], rtol=2e-3, atol=0)


def test_many_equal_singular_values_are_all_clipped() -> None:
    module = nn.Linear(20, 20, bias=False)
    nn.init.orthogonal_(module.weight, 3.0)
    original = module.weight.detach().clone()
    rs.clip_(module, (20,), 1.0)
    torch.testing.assert_close(module.weight.detach(), original / 3, rtol=0, atol=2e-3)


@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5, bias=False), lambda: nn.Conv1d(3, 2, 3, bias=False)], ids=["dense", "conv"]
)
def test_clipping_commutes_with_scaling(make: Callable[[], nn.Module], exponent: int) -> None:
    module = make()
    in_shape = (6,) if isinstance(module, nn.Linear) else (3, 6)
    weight, target = module.weight.detach().clone(), 0.6 * norm(module, in_shape)
    rs.clip_(module, in_shape, target)
    once = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.copy_(weight * 2.0**exponent)
    rs.clip_(module, in_shape, target * 2.0**exponent)
    torch.testing.assert_close(module.weight.detach() / 2.0**exponent, once, rtol=0, atol=2e-3 * target)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_clipping_a_composite_changes_only_the_weight_of_the_convolution(training: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), randomised(nn.BatchNorm2d(4), [3.0, -2.0, 0.0, 1.0]))
    module.train(training)
    before = snapshot(module)
    rs.clip_(module, (3, 5, 5), 1.0)
    changed = [name for name, tensor in snapshot(module).items() if not torch.equal(tensor, before[name])]
    assert changed == ["0.weight"]
    assert 0.99 <= norm(module, (3, 5, 5)) <= 1.001
    assert all(part.training == training for part in module.modules())


def grouped_with_scales(scales: list[float]) -> nn.Conv2d:
    module = nn.Conv2d(2 * len(scales), 2 * len(scales), 3, padding=1, groups=len(scales))
    with torch.no_grad():
        for weight, scale in zip(module.weight.split(2), scales, strict=True):
            part = nn.Conv2d(2, 2, 3, padding=1)
            part.weight = nn.Parameter(weight.clone())
            weight.mul_(scale / norm(part, (2, 5, 5)))
    return module


def group_norms(module: nn.Conv2d) -> list[float]:
    rows = module.out_channels // module.groups
    norms = []
    for weight in module.weight.detach().split(rows):
        part = nn.Conv2d(weight.shape[1], rows, module.kernel_size, padding=module.padding)
        part.weight = nn.Parameter(weight.clone())
        norms.append(norm(part, (weight.shape[1], 5, 5)))
    return norms


def test_a_grouped_convolution_is_clipped_group_by_group() -> None:
    module = grouped_with_scales([4.0, 0.9, 2.0, 0.3, 1.5])
    before = module.weight.detach().clone()
    rs.clip_(module, (10, 5, 5), 1.0)
    assert group_norms(module) == pytest.approx([1.0, 0.9, 1.0, 0.3, 1.0], rel=2e-3)
    for group in (1, 3):
        assert torch.equal(module.weight[2 * group : 2 * group + 2], before[2 * group : 2 * group + 2])


def test_a_depthwise_convolution_is_clipped_channel_by_channel() -> None:
    module = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    with torch.no_grad():
        module.weight.mul_(torch.tensor([0.1, 1, 2, 4, 8, 16]).reshape(6, 1, 1, 1))
    before, norms = module.weight.detach().clone(), group_norms(module)
    rs.clip_(module, (6, 5, 5), 1.0)
    assert group_norms(module) == pytest.approx([min(value, 1.0) for value in norms], rel=2e-3)
    assert torch.equal(module.weight[0], before[0]) and norms[0] < 1


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_clipped_in_their_own_type(dtype: torch.dtype) -> None:
    for _ in range(6):
        module = scaled(nn.Linear(8, 8), 5.0).to(dtype)
        rs.clip_(module, (8,), 1.0)
        assert module.weight.dtype == dtype
        assert 0.98 <= norm(module, (8,)) <= 1.001


def test_frozen_weights_are_clipped_and_stay_frozen() -> None:
    module = scaled(nn.Linear(5, 5), 10.0).requires_grad_(False)
    rs.clip_(module, (5,), 1.0)
    assert norm(module, (5,)) <= 1.001 and not module.weight.requires_grad


def test_gradients_and_the_random_state_are_left_alone() -> None:
    module = scaled(nn.Conv2d(2, 3, 3), 10.0)
    module.weight.grad = torch.ones_like(module.weight)
    parameter, random = module.weight, torch.get_rng_state()
    rs.clip_(module, (2, 5, 5), 1.0)
    assert module.weight is parameter and parameter.requires_grad
    assert torch.equal(parameter.grad, torch.ones_like(parameter)) and module.bias.grad is None
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.ConvTranspose1d(4, 3, 1)], ids=["dense", "conv"])
def test_weights_that_are_not_finite_are_an_error_and_untouched(make: Callable[[], nn.Module], value: float) -> None:
    module = make()
    with torch.no_grad():
        module.weight.view(-1)[2] = value
    before = snapshot(module)
    with pytest.raises(ValueError, match="NaN or infinite"):
        rs.clip_(module, (4,) if isinstance(module, nn.Linear) else (4, 3), 1.0)
    assert same_bits(before, snapshot(module))


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, math.nan, -math.inf], ids=str)
def test_a_target_that_is_not_positive_is_an_error(max_norm: float) -> None:
    module = nn.Linear(3, 3)
    before = snapshot(module)
    with pytest.raises(ValueError, match="max_norm"):
        rs.clip_(module, (3,), max_norm)
    assert same_bits(before, snapshot(module))


@pytest.mark.parametrize(
    "module, in_shape, culprit",
    [
        (StdConv2d(3, 4, 3), (3, 5, 5), "standardises"),
        (nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 5, 5), "standardises"),
        (parametrizations.orthogonal(nn.Linear(6, 4)), (6,), "parametris"),
        (parametrizations.spectral_norm(nn.Linear(6, 4)), (6,), "parametris"),
        (torch.nn.utils.spectral_norm(nn.Linear(3, 4)), (3,), "weight"),
        (nn.AvgPool2d(2), (3, 4, 4), "AvgPool2d"),
        (nn.BatchNorm2d(4), (4, 3, 3), "BatchNorm2d"),
        (nn.LayerNorm(4), (4,), "LayerNorm"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), (3,), "Sequential"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (3, 5, 5), "Sequential"),
    ],
    ids=[
        "StdConv2d",
        "StdConv2d, BN",
        "orthogonal",
        "spectral_norm",
        "spectral_norm, old",
        "pool",
        "batchnorm",
        "LayerNorm",
        "chain",
        "act",
    ],
)
def test_modules_that_cannot_be_clipped_are_refused_and_unchanged(
    module: nn.Module, in_shape: tuple[int, ...], culprit: str
) -> None:
    before = snapshot(module)
    with pytest.raises(NotImplementedError, match=culprit):
        rs.clip_(module, in_shape, 0.1)
    assert same_bits(before, snapshot(module))


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError):
        rs.clip_(nn.Conv2d(3, 4, 3), (4, 5, 5))


def test_clipping_is_deterministic() -> None:
    module, twin = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    twin.load_state_dict(module.state_dict())
    for part in (module, twin):
        rs.clip_(part, (4, 6, 6), 0.5)
    assert same_bits(snapshot(module), snapshot(twin))


def test_no_singular_value_of_a_clipped_circular_convolution_exceeds_the_target() -> None:
    module = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    in_shape = (3, 6, 6)
    top = norm(module, in_shape)
    rs.clip_(module, in_shape, 0.8 * top)
    assert float(torch.linalg.svdvals(dense(module, in_shape)).max()) <= 0.8 * top * 1.001


PARAMETRISED = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)), (3, 6, 6)),
    "weight norm, groups": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=2)), (4, 6, 6)),
    "weight norm of all": (lambda: parametrizations.weight_norm(nn.Linear(7, 5), dim=None), (7,)),
    "linear parametrisation": (lambda: mirrored(nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 5)),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(3, 6, 3), (3, 6, 6)),
    "ScaledStdConv2d, groups": (lambda: ScaledStdConv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "weight norm, batchnorm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), randomised(nn.BatchNorm2d(4), [2.0] * 4)),
        (3, 6, 6),
    ),
}


@pytest.mark.parametrize("factor", [0.9, 0.3])
@pytest.mark.parametrize("make, in_shape", PARAMETRISED.values(), ids=PARAMETRISED)
def test_a_parametrised_weight_is_clipped_through_its_original_parameters(
    make: Callable[[], nn.Module], in_shape: tuple[int, ...], factor: float
) -> None:
    torch.manual_seed(0)
    module = make().eval()
    true = norm(module, in_shape)
    result = rs.clip_(module, in_shape, factor * true)
    after = norm(module, in_shape)
    assert 0.99 * factor * true <= after <= 1.001 * factor * true
    assert after in result.after and result.after.upper <= 1.001 * factor * true
    assert rs.clip_(module, in_shape, factor * true).steps == 0


MOVES = {"weight": MoveWeight(), "gamma": MoveGamma(), "both": MoveWeightAndGamma()}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(
    "make, in_shape",
    [
        (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 6, 6)),
        (lambda: nn.Conv2d(6, 6, 3, stride=2, groups=3), (6, 7, 7)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 4)),
        (lambda: nn.Linear(5, 6), (5,)),
    ],
    ids=["conv", "groups", "transposed", "dense"],
)
def test_a_composite_is_clipped_through_its_weight_its_gamma_or_both(
    make: Callable[[], nn.Module], in_shape: tuple[int, ...], move: Move
) -> None:
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if len(in_shape) == 1 else nn.BatchNorm2d
    module = nn.Sequential(make(), randomised(kind(6), [1.5, -2.0, 0.0, 0.3, 1.0, 4.0])).eval()
    true, before = norm(module, in_shape), snapshot(module)
    layer = LinearLayer("0", module[0], in_shape, module[1], "1")
    clip_until_proved_(TrackedLayer.of(layer, vectors=4, composite=True, seed=0, move=move), 0.5 * true, 1e-9)
    assert 0.99 * 0.5 * true <= norm(module, in_shape) <= 1.001 * 0.5 * true
    moved = {name for name, value in snapshot(module).items() if not torch.equal(value, before[name])}
    assert (
        moved
        == {"weight": {"0.weight"}, "gamma": {"1.weight"}, "both": {"0.weight", "1.weight"}}[
            next(name for name, one in MOVES.items() if one is move)
        ]
    )


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_gradients_of_a_move_equal_those_of_autograd(move: Move) -> None:
    torch.manual_seed(0)
    conv, batchnorm = nn.Conv2d(2, 3, 3, padding=1).double(), randomised(nn.BatchNorm2d(3), [1.5, -2.0, 0.3]).double().eval()
    layer = LinearLayer("0", conv, (2, 5, 5), batchnorm, "1")
    X, U = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    found = move.gradients(layer, X, U, True)
    for row, (x, u) in enumerate(zip(X.split(1), U.split(1), strict=True)):
        score = ((batchnorm(conv(x)) - batchnorm(conv(torch.zeros_like(x)))) * u).sum()
        for gradient, true in zip(found, torch.autograd.grad(score, move.parameters(layer)), strict=True):
            if isinstance(move, MoveWeightAndGamma) and true.ndim > 1:  # without the component along each filter
                filters = conv.weight.detach().flatten(1)
                along = (true.flatten(1) * filters).sum(1) / filters.square().sum(1)
                true = true - (along[:, None] * filters).reshape(true.shape)
            torch.testing.assert_close(gradient[row], true)


def test_moving_gamma_is_refused_for_a_layer_without_a_batch_normalisation() -> None:
    with pytest.raises(NotImplementedError, match=r"'conv'.*γ"):
        TrackedLayer.of(LinearLayer("conv", nn.Conv2d(2, 2, 3), (2, 5, 5)), vectors=1, composite=True, seed=0, move=MoveGamma())


@pytest.mark.parametrize(
    "make, in_shape",
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 8, 8)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 8, 8)),
        (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2), (4, 12)),
        (lambda: nn.Linear(9, 7), (9,)),
    ],
    ids=["circular", "zeros", "groups", "dense"],
)
def test_the_projection_distorts_no_more_than_the_update_and_meets_the_target(
    make: Callable[[], nn.Module], in_shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module = make()
    twin, target = copy.deepcopy(module), 0.5 * norm(module, in_shape)
    update, projection = rs.clip_(module, in_shape, target), rs.clip_(twin, in_shape, target, method="projection")
    assert norm(twin, in_shape) <= projection.after.upper <= 1.001 * target
    zeros = getattr(module, "padding_mode", "") == "zeros"  # for zero padding the projection is conservative
    assert projection.distortion <= update.distortion * (1.05 if zeros else 1.005)
    assert rs.clip_(twin, in_shape, target, method="projection").steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_the_update_is_close_to_the_projection_where_many_singular_values_are_clipped(mode: str, fraction: float) -> None:
    module, in_shape = nn.Conv2d(12, 12, 3, padding=1, padding_mode=mode), (12, 9, 9)
    twin, target = copy.deepcopy(module), fraction * norm(module, in_shape)
    update, projection = rs.clip_(module, in_shape, target), rs.clip_(twin, in_shape, target, method="projection")
    assert norm(module, in_shape) <= 1.001 * target
    assert update.distortion <= min(1.15 * projection.distortion, 0.97 * (1 - fraction))


def composite(module: nn.Module, gamma: list[float]) -> nn.Module:
    return nn.Sequential(module, randomised(nn.BatchNorm2d(len(gamma)), gamma)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, in_shape",
    [
        (lambda: nn.Conv2d(3, 24, 7, stride=2, padding=3), (3, 24, 24)),
        (lambda: nn.Conv2d(12, 24, 3, padding=1, groups=2), (12, 12, 12)),
        (lambda: nn.ConvTranspose2d(12, 12, 4, stride=2, padding=1), (12, 8, 8)),
        (lambda: nn.Conv2d(3, 48, 8, stride=8), (3, 32, 32)),
        (lambda: composite(nn.Conv2d(12, 12, 3, padding=1), [0.5, 2.0, 0.0, -1.0] * 3), (12, 12, 12)),
    ],
    ids=["stride", "groups", "transposed", "patches", "composite"],
)  # fmt: skip
def test_clipping_many_singular_values_distorts_less_than_rescaling(
    make: Callable[[], nn.Module], in_shape: tuple[int, ...]
) -> None:
    module = make()
    target = 0.5 * norm(module, in_shape)
    result = rs.clip_(module, in_shape, target)
    assert 0.98 * target <= norm(module, in_shape) <= 1.001 * target
    assert result.distortion <= 0.43


@pytest.mark.slow
def test_clipping_a_wide_dense_layer_far_below_its_norm_clips_its_singular_values() -> None:
    module = nn.Linear(700, 800)
    U, S, Vh = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
    target = 0.1 * float(S[0])
    rs.clip_(module, (700,), target)
    nearest = (U * S.clamp(max=target)) @ Vh
    assert float((module.weight.detach() - nearest).norm() / nearest.norm()) <= 2e-3


@pytest.mark.slow
def test_the_papers_descent_lowers_the_norm_and_reports_the_norm_reached() -> None:
    module = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    true = norm(module, (4, 8, 8))
    result = rs.clip_(module, (4, 8, 8), 0.7 * true, method="paper")
    after = norm(module, (4, 8, 8))
    assert after in result.after and 0.7 * true * 0.99 <= after < 0.9 * true
    assert result.steps > 1


def test_layers_without_a_projection_are_refused_by_the_projection_method() -> None:
    parametrised = parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    for module in (nn.Conv2d(3, 3, 3, stride=2), nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), parametrised):
        before = snapshot(module)
        with pytest.raises(NotImplementedError):
            rs.clip_(module, (3, 6, 6), 0.1, method="projection")
        assert same_bits(before, snapshot(module))
    with pytest.raises(ValueError, match="method"):
        rs.clip_(nn.Linear(2, 2), (2,), method="gradient descent")  # type: ignore[arg-type]
