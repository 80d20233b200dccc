"""Random networks: no sampled gain exceeds the bound, and every operation in them has a Lipschitz rule."""

import copy
import math
import random

import pytest
import torch
from generated_graphs import Network, network
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gain, jacobian_norm
from torch import Tensor

import robust_spectral as rs

SHAPE = (2, 4, 4)


def sampled(net: Network, points: Tensor) -> float:
    """Largest gain between points, near and far, and of the Jacobian at two of them."""
    directions = torch.randn_like(points)
    near = (points + 1e-4 * directions).clamp(0, 1) if bool((points >= 0).all()) else points + 1e-4 * directions
    return max(gain(net, points, near), gain(net, points, points.flip(0)), *(jacobian_norm(net, x) for x in points[:3]))


def rounding(net: Network, points: Tensor) -> float:
    """Largest distance between the outputs for one input in float32 and in float64."""
    with torch.no_grad():
        single = net(points).double()
        return float((single - net.double()(points.double())).flatten(1).norm(dim=1).max())


def check(draw: random.Random, local: bool) -> None:
    net = network(draw, local=local)
    found = rs.lipschitz_bound(net, torch.zeros(1, *SHAPE, dtype=torch.float64))
    inside = torch.rand(6, *SHAPE, dtype=torch.float64)
    inside[::2] = inside[::2].round()  # corners of the box
    where = (net.kinds, found.reason)
    assert math.isfinite(found.local), where
    assert sampled(net, inside) <= found.local * (1 + 1e-9), where
    if not local:
        assert math.isfinite(found.value) and found.reason is None, where
        single = copy.deepcopy(net).float()  # another network, as its weights are rounded
        errors = rs.lipschitz_bound(single, torch.zeros(1, *SHAPE)).errors
        assert rounding(single, inside.float()) <= errors[torch.float32], where
    for size in (0.3, 3.0, 30.0):
        assert sampled(net, size * torch.randn(6, *SHAPE, dtype=torch.float64)) <= found.value * (1 + 1e-9), where


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("seed", range(60))
def test_no_sampled_gain_exceeds_the_bound_of_a_random_network(seed: int, local: bool) -> None:
    check(random.Random(seed), local)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.booleans())
def test_no_sampled_gain_exceeds_the_bound_of_a_network_that_hypothesis_draws(draw: random.Random, local: bool) -> None:
    check(draw, local)
