"""Support functions of a ball and a box: never below the largest value, and close to it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robust_spectral.certificates.errors import LocalError, Pieces
from robust_spectral.certificates.margins import lowest
from robust_spectral.certificates.supports import support


def largest(c: Tensor, radius: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """The largest ⟨c, d⟩ with ‖d‖ ≤ radius, -below ≤ d ≤ above, by bisection of κ: d = c / κ moved into the box."""
    low, high = torch.full((len(c),), -60.0, dtype=c.dtype), torch.full((len(c),), 60.0, dtype=c.dtype)
    for _ in range(200):
        middle = (low + high) / 2
        d = torch.minimum(torch.maximum(c / middle.exp()[:, None], -below), above)
        low, high = torch.where(d.norm(dim=1) > radius, middle, low), torch.where(d.norm(dim=1) > radius, high, middle)
    d = torch.minimum(torch.maximum(c / high.exp()[:, None], -below), above)
    assert bool((d.norm(dim=1) <= radius * (1 + 1e-9)).all())
    return (c * d).sum(1)


def cases(count: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = torch.randn(count, 9, dtype=torch.float64) * 10 ** (2 * torch.rand(count, 1, dtype=torch.float64) - 1)
    c[::5, ::2], c[1] = 0.0, 0.0
    above, below = torch.rand(2, count, 9, dtype=torch.float64) * 10 ** (3 * torch.rand(2, count, 9, dtype=torch.float64) - 2)
    above[::3, ::3], below[::4, ::4] = 0.0, 0.0
    return c, 10 ** (3 * torch.rand(count, dtype=torch.float64) - 2), above, below


@pytest.mark.parametrize("rounds", [1, 4, 30])
def test_a_support_is_at_least_the_largest_value(rounds: int) -> None:
    c, radius, above, below = cases()
    found, exact = support(c[None], radius, above, below, rounds)[0], largest(c, radius, above, below)
    assert bool((found >= exact * (1 - 1e-12) - 1e-12).all())
    assert bool((found <= c.norm(dim=1) * radius * (1 + 1e-12)).all())
    if rounds == 30:
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=1e-9)


def test_a_support_of_equal_ends_needs_them_once() -> None:
    c, radius, above, _ = cases(50)
    assert torch.equal(support(c[None], radius, above), support(c[None], radius, above, above))


def test_a_support_without_a_box_is_that_of_the_ball() -> None:
    c, radius, above, _ = cases(50)
    found = support(c[None], radius, torch.full_like(above, torch.inf))[0]
    torch.testing.assert_close(found, c.norm(dim=1) * radius)


def test_a_support_of_radius_zero_is_zero() -> None:
    c, radius, above, below = cases(50)
    assert torch.equal(support(c[None], radius * 0, above, below)[0].clamp_max(0), radius * 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_support_of_an_uneven_box_takes_the_end_that_the_functional_points_to(sign: float) -> None:
    c = torch.tensor([[[sign]]], dtype=torch.float64)
    above, below = torch.tensor([[0.1]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    (found,) = support(c, torch.ones(1, dtype=torch.float64), above, below, 30)[0].tolist()
    assert found == pytest.approx(0.1 if sign > 0 else 0.5, rel=1e-2)


def test_the_minimum_over_a_piecewise_graph_is_never_above_a_sampled_value() -> None:
    z = torch.linspace(-1, 1, 11, dtype=torch.float64)[None]
    low, high = -0.7 - z.abs(), 0.9 + z.abs()
    kink = torch.minimum(torch.maximum(-z, low), high)
    values = [(z + end).relu() - z.relu() for end in (low, kink, high)]
    slopes = (torch.zeros_like(z), torch.ones_like(z))
    offsets = (values[0], values[2] - high)
    error = LocalError(0.5, z * 0, pieces=Pieces((low, kink, high), slopes, offsets))
    check_minimum(error, low, high, lambda d: (z + d).relu() - z.relu())


def test_the_minimum_over_a_sector_is_never_above_a_sampled_value() -> None:
    half = torch.linspace(0.0, 0.5, 11, dtype=torch.float64)[None]
    low, high = -half - 0.3, 0.9 - half
    error = LocalError(0.5, half, pieces=Pieces((low, high), (half,), sector=True))
    for share in (-1.0, -0.4, 0.0, 1.0):
        check_minimum(error, low, high, lambda d, share=share: (0.5 + share * half) * d)


def check_minimum(error: LocalError, low: Tensor, high: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    slope = torch.full_like(low, 0.5)
    for _ in range(20):
        c, g = torch.randn(2, 3, *low.shape, dtype=torch.float64) * 3
        lam, kap = torch.rand(2, 3, 1, 1, dtype=torch.float64).square() * 10 + 1e-9
        found = lowest(error, slope, c, g, lam, kap)
        for share in torch.linspace(0, 1, 41, dtype=torch.float64):
            d = low + share * (high - low)
            y = change(d)
            value = c * y - g * d + lam / 2 * d.square() + kap / 2 * (y - slope * d).square()
            assert bool((found <= value + 1e-9).all())
