"""Certificates around images: never above what a search finds, never worse than the global bound, exact for affine networks."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from local_networks import NETWORKS, network, smallest_margins, some_images
from networks import Call, seeded
from scipy.optimize import minimize
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.certificates import margins

RADII = torch.tensor([0.02, 0.1, 0.1, 0.4, 0.4, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_margin_is_never_above_the_smallest_one_found_in_the_ball(name: str) -> None:
    model = network(name)
    images, labels = some_images(model, len(RADII))
    found, least = rs.certify(model, images, labels, RADII, steps=10), smallest_margins(model, images, labels, RADII)
    assert bool((found.margins <= least + 1e-9).all())
    assert bool(torch.isfinite(found.margins).all()) and found.reason is None
    assert bool((found.certified == (found.margins > 0)).all())
    assert 0 <= found.failure_probability <= 1e-8


@pytest.mark.parametrize("name", ["dense", "gates"])
def test_without_gradient_steps_a_margin_is_not_above_the_smallest_one_found_either(name: str) -> None:
    model = network(name)
    images, labels = some_images(model, len(RADII))
    found, least = rs.certify(model, images, labels, RADII, steps=0), smallest_margins(model, images, labels, RADII)
    assert bool((found.margins <= least + 1e-9).all())


def test_a_margin_without_a_box_is_never_above_the_smallest_one_found() -> None:
    model = network("dense")
    images, labels = some_images(model, len(RADII))
    found = rs.certify(model, images, labels, RADII, None, steps=10)
    least = smallest_margins(model, images, labels, RADII, None)
    assert bool((found.margins <= least + 1e-9).all())


@pytest.mark.parametrize("name", ["gates", "attention", "layer norm"])
def test_a_small_ball_has_a_margin_close_to_the_smallest_one(name: str) -> None:
    model = network(name)
    images, labels = some_images(model, 2)
    found = rs.certify(model, images, labels, 0.02, steps=0)
    assert bool(found.local.all()) and bool(found.certified.all())
    torch.testing.assert_close(found.margins, smallest_margins(model, images, labels, 0.02), rtol=0, atol=0.01)


def below_zero(scale: float) -> nn.Module:
    """Two numbers whose larger one goes through a ReLU, less a multiple of the first: one is below zero all over the ball."""

    def margins(m: nn.Module, x: Tensor) -> Tensor:
        first, second = 10 * x[..., :1] - 4.9, 0.01 * x[..., 1:] - 0.105
        kept = torch.relu(F.max_pool2d(torch.cat([first, second], -1), (1, 2)))
        difference = scale * x[:, :, 0, 0] - kept.flatten(1) + 0.2 - scale / 2
        return torch.cat([difference, 0 * difference], 1)

    return Call(margins).double().eval()


def test_a_hard_swish_with_values_next_to_its_kinks_keeps_its_margins() -> None:
    model = Call(lambda m, x: torch.cat([F.hardswish(m.c * (x - 0.5) + m.d).sum(1, keepdim=True), 0 * x[:, :1] - 3.0], 1),
                 c=torch.tensor([1.0, -2.0, 1.0, 0.5]), d=torch.tensor([-2.999, -3.001, 2.99, 3.01])).double()  # fmt: skip
    images, labels = torch.full((3, 4), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    radii = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
    for sign in (1, -1):
        signed = Call(lambda m, x, sign=sign: sign * model(x) + m.c, c=torch.tensor([8.0 - 8 * sign, 0.0])).double()
        found = rs.certify(signed, images, labels, radii, steps=10)
        assert bool((found.margins <= smallest_margins(signed, images, labels, radii) + 1e-9).all())


@pytest.mark.parametrize("scale", [-7.0, 7.0])
def test_elements_below_zero_all_over_the_ball_stay_in_a_pool_before_a_relu(scale: float) -> None:
    model, image = below_zero(scale), torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    along = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None, None, None] * torch.tensor([1.0, 0.0])
    for radius in (0.1, 0.4):
        scores = model(image + radius * along)
        found = rs.certify(model, image, torch.zeros(1, dtype=torch.long), radius, steps=10)
        assert float(found.margins) <= float((scores[:, 0] - scores[:, 1]).min()) + 1e-9


@pytest.mark.parametrize("name", ["dense", "softmax"])
def test_a_margin_is_never_below_that_of_the_global_bound(name: str) -> None:
    model = network(name)
    images, labels = some_images(model, 6)
    radii = rs.certified_radius(model(images), labels, rs.lipschitz_bound(model, images[:2], box=(0, 1)))
    found = rs.certify(model, images, labels, radii * 0.999)
    assert bool(found.certified.all()) and not bool(found.local.any())


def affine(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """An affine network, images, the predicted classes and the other classes' differences of rows, (n, classes - 1, inputs)."""
    torch.manual_seed(seed)
    layer = nn.Linear(6, 4).double()
    images = torch.rand(5, 6, dtype=torch.float64)
    images[:, :2] = images[:, :2].round()
    labels = layer(images).argmax(1)
    others = torch.stack([torch.tensor([c for c in range(4) if c != label]) for label in labels.tolist()])
    return nn.Sequential(layer), images, labels, layer.weight.detach()[labels][:, None] - layer.weight.detach()[others]


def test_an_affine_network_has_its_exact_margin_in_a_ball() -> None:
    model, images, labels, rows = affine()
    scores = model(images).detach()
    others = torch.stack([torch.cat([s[:label], s[label + 1 :]]) for s, label in zip(scores, labels.tolist(), strict=True)])
    for radius in (0.01, 0.3, 2.0):
        exact = (scores.gather(1, labels[:, None]) - others - radius * rows.norm(dim=2)).amin(1)
        found = rs.certify(model, images, labels, radius, None)
        torch.testing.assert_close(found.margins, exact, rtol=0, atol=1e-6)


def test_an_affine_network_has_its_exact_margin_in_a_ball_and_a_box() -> None:
    model, images, labels, rows = affine()
    scores = model(images).detach()
    for radius in (0.3, 1.2):
        found = rs.certify(model, images, labels, radius, steps=60)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            gaps = scores[i, label] - torch.cat([scores[i, :label], scores[i, label + 1 :]])
            exact = min(float(gap) + least(row, image, radius) for gap, row in zip(gaps, rows[i], strict=True))
            assert float(found.margins[i]) <= exact + 1e-7
            assert float(found.margins[i]) >= min(exact, 0.0) - 1e-2 * radius


def least(row: Tensor, image: Tensor, radius: float) -> float:
    """The smallest ⟨row, d⟩ for d in the ball with image + d in the unit box, by scipy."""
    limits = list(zip((-image).tolist(), (1 - image).tolist(), strict=True))
    start = (-row / row.norm() * radius / 2).numpy().clip(*(-image).numpy()[None], *(1 - image).numpy()[None])
    ball = {"type": "ineq", "fun": lambda d: radius**2 - d @ d, "jac": lambda d: -2 * d}
    found = minimize(lambda d: row.numpy() @ d, start, jac=lambda d: row.numpy(), bounds=limits, constraints=[ball], tol=1e-12)
    return float(found.fun)


def test_a_ball_of_radius_zero_has_the_margin_of_the_image() -> None:
    model = network("residual")
    images, labels = some_images(model)
    found = rs.certify(model, images, labels, 0.0)
    top = model(images).topk(2, 1)[0]
    torch.testing.assert_close(found.margins, top[:, 0] - top[:, 1], rtol=0, atol=1e-9)
    assert bool(found.certified.all())


def test_an_image_of_another_predicted_class_is_not_certified() -> None:
    model = network("dense")
    images, labels = some_images(model)
    labels[::2] = (labels[::2] + 1) % 4
    found = rs.certify(model, images, labels, 1e-3)
    assert found.certified.tolist() == [False, True, False, True]
    assert rs.local_radius(model, images, labels, rounds=2)[::2].tolist() == [0.0, 0.0]


def test_images_may_have_radii_of_their_own() -> None:
    model = network("dense")
    images, labels = some_images(model, 3)
    radii = torch.tensor([0.0, 1e-3, 3.0])
    assert rs.certify(model, images, labels, radii, steps=0).certified.tolist() == [True, True, False]


def test_a_batch_in_another_order_or_in_parts_has_nearly_the_same_certificates() -> None:
    """Random starts differ by the place in a batch, and gradient steps end when all images of a batch are certified."""
    model = network("convolutions")
    images, labels = some_images(model)
    whole = rs.certify(model, images, labels, 0.4, steps=10)
    turned = rs.certify(model, images.flip(0), labels.flip(0), 0.4, steps=10)
    parts = torch.cat([rs.certify(model, images[i : i + 2], labels[i : i + 2], 0.4, steps=10).certified for i in (0, 2)])
    torch.testing.assert_close(whole.margins, turned.margins.flip(0), rtol=0, atol=0.01)
    assert torch.equal(whole.certified, parts)
    assert torch.equal(whole.margins, rs.certify(model, images, labels, 0.4, steps=10).margins)


def test_classes_taken_one_by_one_have_the_margins_of_all_at_once_and_far_ones_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 40)))
    images, labels = some_images(model, 2)
    wanted, made = rs.certify(model, images, labels, 0.02, steps=0), list[Any]()
    make = margins.Margins.__init__

    def counted(*args: Any) -> None:
        made.append(args)
        make(*args)

    monkeypatch.setattr(margins, "MOST_NUMBERS", 1.0)
    monkeypatch.setattr(margins.Margins, "__init__", counted)
    found = rs.certify(model, images, labels, 0.02, steps=0)
    assert bool(wanted.local.all()) and 1 <= len(made) < 39
    torch.testing.assert_close(found.margins, wanted.margins, rtol=0, atol=1e-6)


def test_a_local_radius_is_at_least_the_global_one_and_its_ball_is_certified() -> None:
    model = network("convolutions")
    images, labels = some_images(model, 3)
    found = rs.local_radius(model, images, labels, rounds=4, steps=5)
    everywhere = rs.certified_radius(model(images), labels, rs.lipschitz_bound(model, images[:2], box=(0, 1)))
    assert bool((found >= everywhere * (1 - 1e-9)).all()) and bool((found > 1.2 * everywhere).any())
    assert bool(rs.certify(model, images, labels, found * 0.999).certified.all())
    assert bool((smallest_margins(model, images, labels, found) >= 0).all())
    assert math.isfinite(float(found.max()))


def test_a_local_radius_may_exceed_the_distance_that_the_gradient_tells_where_the_box_is_near() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3))).double()
    images = (torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    labels = model(images).argmax(1)
    found = rs.local_radius(model, images, labels)
    assert bool(rs.certify(model, images, labels, found * 0.999).certified.all())
    assert not bool(rs.certify(model, images, labels, found * 1.01).certified.any())
    assert bool((found > 1.1 * rs.certified_radius(model(images), labels, rs.lipschitz_bound(model, images))).all())


def test_a_certificate_without_a_bound_of_rounding_says_so() -> None:
    model = network("dense").float()
    images, labels = some_images(network("dense"), 2)
    assert rs.certify(model, images.float(), labels, 0.01).dtype == torch.float32
    assert rs.certify(model, images.float(), labels, 0.01, None).dtype is None


def test_a_cast_within_a_network_leaves_its_certificates() -> None:
    plain = network("dense")
    images, labels = some_images(plain, 2)
    cast = Call(lambda m, x: m.inner(x.double()), inner=plain)
    found, wanted = (rs.certify(m, images, labels, 0.3, steps=0) for m in (cast, plain))
    assert found.reason is None and bool(found.local.any())
    torch.testing.assert_close(found.margins, wanted.margins, rtol=0, atol=1e-3)


def test_an_operation_that_torch_has_no_quick_form_of_for_many_vectors_warns_nobody() -> None:
    model = Call(
        lambda m, x: m.b(torch.relu(m.a(x)).unfold(2, 2, 1).flatten(1)), a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Linear(48, 3)
    )
    images, labels = some_images(model.double(), 2)
    assert rs.certify(model, images, labels, 0.3, steps=0).reason is None


def test_an_image_whose_units_cannot_move_does_not_disturb_the_others_of_its_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(x[:, :4] - 0.5)
        z = F.relu(h - x[:, 4:]) * torch.sigmoid(x[:, 4:])
        return m.o(F.relu(m.i(torch.cat([x, z, h], 1)) * 4))

    model = seeded(lambda: Call(forward, i=nn.Linear(16, 6), o=nn.Linear(6, 3))).double()
    images = torch.rand(3, 8, dtype=torch.float64)
    images[0], images[1, :4], images[1, 4:] = 0, 0.9, 0.35
    found = rs.certify(model, images, model(images).argmax(1), 0.3, steps=5)
    assert found.reason is None and bool(torch.isfinite(found.margins).all())


@pytest.mark.parametrize("exponent", [0, 26, 34])
def test_margins_do_not_depend_on_the_scale_of_a_hidden_layer(exponent: int) -> None:
    small = 2.0**-exponent
    first, second = torch.randn(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    second[1:, 0] = torch.tensor([1.0, -0.5, 0.75]) * small

    def forward(m: Any, x: Tensor) -> Tensor:
        a = F.relu((x - 0.5) @ first + 8 * (x[:, :1] - 0.5))
        b = F.relu((x - 0.5) @ second)
        return torch.cat([a.sum(1, keepdim=True) * 2.0**-12 + 0.01 - b.sum(1, keepdim=True) / small, 0 * a[:, :1]], 1)

    images = torch.full((2, 4), 0.5, dtype=torch.float64)
    images[0, 0] = 0.875
    model, radii = Call(forward), torch.tensor([2.0**-10, 0.3], dtype=torch.float64)
    labels = model(images).argmax(1)
    found = rs.certify(model, images, labels, radii, steps=20)
    assert bool((found.margins <= smallest_margins(model, images, labels, radii) + 1e-12).all())
    assert bool(found.certified[0]) and not bool(found.certified[1])
