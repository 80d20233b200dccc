"""Certified radii: no perturbation inside them changes the class, and they are zero where nothing is proved."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import robust_spectral as rs

ONE = rs.LipschitzBound(1.0)


def radius(logits: list[float], label: int, bound: rs.LipschitzBound = ONE) -> float:
    (found,) = rs.certified_radius(torch.tensor([logits], dtype=torch.float64), torch.tensor([label]), bound)
    return float(found)


def test_the_radius_is_the_margin_over_root_two_times_the_bound() -> None:
    assert radius([3.0, 1.0, -5.0], 0, rs.LipschitzBound(4.0)) == pytest.approx(2 / (math.sqrt(2) * 4), rel=1e-12)


def test_the_margin_is_to_the_best_other_class() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0], [5.0, 4.5, 1.0], [0.0, -1.0, 7.0]])
    found = rs.certified_radius(logits, torch.tensor([0, 0, 2]), ONE) * math.sqrt(2)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 7.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "logits, label",
    [
        ([1.0, 1.0], 0),
        ([1.0, 1.0], 1),
        ([2.0, 2.0, 1.0], 0),
        ([1.0, 2.0], 0),
        ([-1.0, -2.0, 0.0], 1),
        ([math.nan, 0.0], 0),
        ([1.0, math.nan], 0),
        ([2.0, 1.0, math.nan], 0),
        ([math.nan, math.nan], 0),
        ([math.inf, 0.0], 0),
        ([1.0, -math.inf], 0),
        ([-math.inf, -math.inf], 0),
        ([math.inf, math.inf], 0),
        ([math.inf, -math.inf], 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("bound", [ONE, rs.LipschitzBound(0.0), rs.LipschitzBound(math.inf)], ids=["1", "0", "inf"])
def test_a_tied_wrong_or_non_finite_prediction_has_radius_zero(
    logits: list[float], label: int, bound: rs.LipschitzBound
) -> None:
    assert radius(logits, label, bound) == 0.0


PAIRS = torch.tensor([[0.0, 0.5, 8.0], [0.5, 0.0, 0.25], [8.0, 0.25, 0.0]], dtype=torch.float64)


def test_the_radius_is_the_smallest_over_the_pairs_of_classes() -> None:
    bound = rs.LipschitzBound(1.0, pairs=PAIRS)
    assert radius([3.0, 1.0, 2.0], 0, bound) == pytest.approx(1 / math.sqrt(2), rel=1e-12)  # √2 L is below the pair's constant
    assert radius([3.0, 1.0, -20.0], 0, bound) == pytest.approx(4.0, rel=1e-12)
    assert radius([0.0, 1.0, 0.0], 1, bound) == pytest.approx(2.0, rel=1e-12)
    assert radius([3.0, 3.0, 0.0], 0, bound) == radius([2.0, 3.0, 0.0], 0, bound) == 0.0


def test_pairs_of_another_number_of_classes_are_not_used() -> None:
    assert radius([3.0, 1.0], 0, rs.LipschitzBound(1.0, pairs=PAIRS)) == radius([3.0, 1.0], 0)


def test_a_pair_of_classes_with_constant_zero_does_not_limit_the_radius() -> None:
    bound = rs.LipschitzBound(1.0, pairs=torch.zeros(2, 2, dtype=torch.float64))
    assert radius([3.0, 1.0], 0, bound) > 1e300 and radius([1.0, 3.0], 0, bound) == 0.0


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_an_infinite_or_nan_bound_gives_radius_zero(value: float) -> None:
    assert radius([9.0, 0.0], 0, rs.LipschitzBound(value)) == 0.0


def test_a_constant_network_has_an_unlimited_radius() -> None:
    assert radius([1.0, 0.0], 0, rs.LipschitzBound(0.0)) >= 1e308


@pytest.mark.parametrize("estimate", [1.0, 3, torch.tensor(1.0), None], ids=str)
def test_a_number_in_place_of_a_bound_is_refused(estimate: object) -> None:
    with pytest.raises(TypeError, match="bound"):
        rs.certified_radius(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), estimate)


def test_the_sampled_estimate_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    estimate = rs.lipschitz_estimate(model, torch.zeros(1, 3))
    with pytest.raises(TypeError, match="estimate"):
        rs.certified_radius(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), estimate)


@pytest.mark.parametrize("logits, labels", [((2, 3), (3,)), ((2, 3), (2, 1)), ((3,), (3,)), ((2, 3, 4), (2,))], ids=str)
def test_shapes_that_do_not_fit_are_an_error(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="certified_radius"):
        rs.certified_radius(torch.zeros(logits), torch.zeros(labels, dtype=torch.long), ONE)


def test_an_empty_batch_has_no_radii() -> None:
    assert rs.certified_radius(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), ONE).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_radii_are_float64_whatever_the_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, 1.0]], dtype=dtype, requires_grad=True)
    found = rs.certified_radius(logits, torch.tensor([0], dtype=torch.int32), ONE)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert float(found) == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_radii_are_rounded_down() -> None:
    """Check 2 (L r)^2 < margin^2 in exact arithmetic."""
    logits = torch.randn(500, 4, dtype=torch.float64) * 10.0 ** torch.randint(-8, 8, (500, 1))
    value = 0.1 + float(torch.rand(()))
    radii = rs.certified_radius(logits, logits.argmax(1), rs.LipschitzBound(value))
    for row, r in zip(logits.sort(1, descending=True).values.tolist(), radii.tolist(), strict=True):
        margin = Fraction(row[0]) - Fraction(row[1])
        assert 0 < 2 * (Fraction(value) * Fraction(r)) ** 2 < margin**2
        assert r == pytest.approx(float(margin) / (math.sqrt(2) * value), rel=1e-9)


def halfplanes(normal: list[float], offset: float) -> nn.Module:
    """Two logits, ±(normal x + offset) / 2: the boundary is a plane at known distance, and its certificate is exact."""
    layer = nn.Linear(len(normal), 2).double()
    with torch.no_grad():
        layer.weight.copy_(0.5 * torch.tensor([normal, [-n for n in normal]], dtype=torch.float64))
        layer.bias.copy_(0.5 * torch.tensor([offset, -offset], dtype=torch.float64))
    return nn.Sequential(layer)


def test_the_radius_of_a_linear_classifier_is_the_distance_to_its_boundary() -> None:
    model = halfplanes([3.0, -4.0], 2.0)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    logits = model(x)
    found = rs.certified_radius(logits, logits.argmax(1), rs.lipschitz_bound(model, x, box=(0.0, 5.0)))
    distance = (x @ torch.tensor([3.0, -4.0], dtype=torch.float64) + 2).abs() / 5
    torch.testing.assert_close(found, distance, rtol=1e-10, atol=0)
    assert bool((found < distance).all())


def test_a_step_just_beyond_the_radius_changes_the_class_of_a_linear_classifier() -> None:
    model = halfplanes([3.0, -4.0], 2.0)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    r = rs.certified_radius(model(x), torch.tensor([0]), rs.lipschitz_bound(model, x))
    towards = torch.tensor([[-0.6, 0.8]], dtype=torch.float64)
    assert int(model(x + r * (1 - 1e-9) * towards).argmax()) == 0
    assert int(model(x + r * (1 + 1e-9) * towards).argmax()) == 1


def attack(model: nn.Module, x: Tensor, labels: Tensor, radii: Tensor) -> Tensor:
    """Normalised gradient ascent on the margin, projected onto the sphere of each radius."""
    delta = torch.randn_like(x)
    for _ in range(30):
        delta = (delta / delta.flatten(1).norm(dim=1)[:, None] * radii[:, None]).requires_grad_()
        logits = model(x + delta)
        others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
        (gradient,) = torch.autograd.grad((others - logits.gather(1, labels[:, None])[:, 0]).sum(), delta)
        step = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None] * radii[:, None]
        delta = (delta + 0.5 * step).detach()
    delta = delta / delta.flatten(1).norm(dim=1)[:, None] * radii[:, None]
    return x + delta


def test_no_perturbation_inside_the_radius_changes_the_class() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).double()
    bound = rs.lipschitz_bound(model, torch.zeros(1, 6, dtype=torch.float64))
    x = 3 * torch.randn(200, 6, dtype=torch.float64)
    labels = model(x).argmax(1)
    radii = rs.certified_radius(model(x), labels, bound)
    assert bool((radii > 0).all())
    assert torch.equal(model(attack(model, x, labels, radii)).argmax(1), labels)
    noise = torch.randn(50, 200, 6, dtype=torch.float64)
    noise = noise / noise.norm(dim=2, keepdim=True) * radii[None, :, None]
    assert bool((model(x + noise).argmax(2) == labels).all())


def test_the_attack_of_these_tests_succeeds_outside_the_radius() -> None:
    model = halfplanes([3.0, -4.0], 2.0)
    x = torch.randn(50, 2, dtype=torch.float64)
    labels = model(x).argmax(1)
    radii = rs.certified_radius(model(x), labels, rs.lipschitz_bound(model, x, box=None))
    assert bool((model(attack(model, x, labels, 1.01 * radii)).argmax(1) != labels).all())


def test_a_larger_bound_never_gives_a_larger_radius() -> None:
    radii = [radius([2.0, 1.0], 0, rs.LipschitzBound(value)) for value in (0.5, 1.0, 1.0 + 1e-12, 2.0, 1e300)]
    assert radii == sorted(radii, reverse=True)


def test_an_untraceable_network_certifies_nothing() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    x = torch.tensor([[5.0, 1.0]])
    assert float(rs.certified_radius(Branching()(x), torch.tensor([0]), rs.lipschitz_bound(Branching(), x))) == 0.0
