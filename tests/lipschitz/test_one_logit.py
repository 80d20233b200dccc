"""Certified radii of networks with one logit: the sign is the class, and |logit| / L the radius."""

import math
from fractions import Fraction

import pytest
import torch
from reference import norm
from torch import Tensor, nn

import robust_spectral as rs


def radius(logit: float, label: float, bound: rs.LipschitzBound) -> float:
    (found,) = rs.certified_radius(torch.tensor([[logit]], dtype=torch.float64), torch.tensor([label]), bound)
    return float(found)


def test_the_radius_is_the_size_of_the_logit_over_the_bound_where_its_sign_is_the_class() -> None:
    bound = rs.LipschitzBound(4.0)
    for logit, label, expected in [(3.0, 1, 0.75), (-3.0, 0, 0.75), (0.5, 1, 0.125), (3.0, 0, 0.0), (-3.0, 1, 0.0)]:
        assert radius(logit, label, bound) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("logit", [0.0, -0.0, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, math.inf], ids=str)
def test_a_tied_or_non_finite_logit_has_radius_zero_for_both_labels(logit: float, value: float) -> None:
    assert radius(logit, 0, rs.LipschitzBound(value)) == radius(logit, 1, rs.LipschitzBound(value)) == 0.0


def test_an_infinite_bound_gives_radius_zero_and_a_constant_network_an_unlimited_one_on_the_right_side() -> None:
    assert radius(9.0, 1, rs.LipschitzBound(math.inf)) == 0.0
    assert radius(1.0, 1, rs.LipschitzBound(0.0)) > 1e300 and radius(1.0, 0, rs.LipschitzBound(0.0)) == 0.0


def test_radii_are_rounded_down() -> None:
    """Check L r < |logit| in exact arithmetic."""
    logits, value = (
        torch.randn(500, 1, dtype=torch.float64) * 10.0 ** torch.randint(-8, 8, (500, 1)),
        0.1 + float(torch.rand(())),
    )
    radii = rs.certified_radius(logits, logits[:, 0] > 0, rs.LipschitzBound(value))
    for (logit,), r in zip(logits.tolist(), radii.tolist(), strict=True):
        assert 0 < Fraction(value) * Fraction(r) < abs(Fraction(logit))
        assert r == pytest.approx(abs(logit) / value, rel=1e-9)


def test_rounding_errors_are_subtracted_once_for_each_of_the_two_inputs() -> None:
    bound = rs.LipschitzBound(2.0, errors={torch.float64: 0.25, torch.float32: math.inf})
    assert radius(1.5, 1, bound) == pytest.approx((1.5 - 2 * 0.25) / 2, rel=1e-12)
    with pytest.warns(UserWarning, match=r"rounding of float64 \(0\.5 logits\) exceeds every margin"):
        assert radius(-0.4, 0, bound) == 0.0


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0], [False, True]], ids=str)
def test_labels_may_be_whole_numbers_of_any_dtype(labels: list) -> None:
    radii = rs.certified_radius(torch.tensor([[-1.0], [2.0]]), torch.tensor(labels), rs.LipschitzBound(1.0))
    assert radii.tolist() == pytest.approx([1.0, 2.0], rel=1e-6)


@pytest.mark.parametrize("label", [-1, 2, 0.5, math.nan], ids=str)
def test_other_labels_are_refused(label: float) -> None:
    message = r"label at index 1 is (-1|2|0\.5|nan); with one logit for each image, labels are 0 or 1"
    with pytest.raises(ValueError, match=message):
        rs.certified_radius(torch.ones(2, 1), torch.tensor([1, label]), rs.LipschitzBound(1.0))


def test_one_logit_and_the_two_logits_of_half_its_size_have_the_same_radius() -> None:
    z = torch.randn(20, 1, dtype=torch.float64)
    labels = (z[:, 0] > 0).long()
    one = rs.certified_radius(z, labels, rs.LipschitzBound(3.0))
    two = rs.certified_radius(torch.cat([-z, z], 1) / 2, labels, rs.LipschitzBound(3.0 / math.sqrt(2)))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_the_radius_of_a_linear_classifier_is_the_distance_to_its_boundary() -> None:
    model = nn.Sequential(nn.Linear(3, 1)).double()
    x = torch.rand(30, 3, dtype=torch.float64)
    logits = model(x)
    labels = (logits[:, 0] > 0).long()
    found = rs.certified_radius(logits, labels, rs.lipschitz_bound(model, x[:1]))
    normal = model[0].weight[0].detach()
    torch.testing.assert_close(found, logits[:, 0].abs() / normal.norm(), rtol=1e-9, atol=0)
    towards = torch.where(labels == 1, -1.0, 1.0)[:, None] * normal / normal.norm()
    for step, stays in ((1 - 1e-6, True), (1 + 1e-6, False)):
        moved = model(x + step * found[:, None] * towards)[:, 0] > 0
        assert bool(((moved == (labels == 1)) == stays).all())


def search(model: nn.Module, x: Tensor, labels: Tensor, radii: Tensor) -> Tensor:
    """Descent on the signed logit, projected onto the sphere of each radius."""
    sign, delta = torch.where(labels == 1, 1.0, -1.0).double(), torch.randn_like(x)
    for _ in range(30):
        delta = (delta / delta.norm(dim=1)[:, None] * radii[:, None]).requires_grad_()
        (slope,) = torch.autograd.grad((sign * model(x + delta)[:, 0]).sum(), delta)
        delta = (delta - 0.5 * slope / slope.norm(dim=1).clamp_min(1e-30)[:, None] * radii[:, None]).detach()
    return x + delta / delta.norm(dim=1)[:, None] * radii[:, None]


def test_no_perturbation_inside_the_radius_changes_the_sign_and_a_larger_one_does() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    x = torch.rand(60, 6, dtype=torch.float64)
    logits = model(x) - model(x).median()
    model[2].bias.data -= model(x).median().detach()
    logits = model(x)
    labels = (logits[:, 0] > 0).long()
    bound = rs.lipschitz_bound(model, x[:1])
    assert bound.value <= norm(model[0], (6,)) * norm(model[2], (16,)) * (1 + 1e-6)
    radii = rs.certified_radius(logits, labels, bound)
    assert 20 <= int(labels.sum()) <= 40 and int((radii > 0).sum()) >= 58
    sure = radii > 0
    inside = model(search(model, x[sure], labels[sure], radii[sure]))[:, 0] > 0
    assert torch.equal(inside, labels[sure] == 1)
    outside = model(search(model, x[sure], labels[sure], 20 * radii[sure]))[:, 0] > 0
    assert int((outside != (labels[sure] == 1)).sum()) > 20
