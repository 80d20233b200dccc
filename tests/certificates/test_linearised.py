"""The linearised network: its adjoint is one, and it is the network up to the square of a small change."""

from functools import cache
from typing import Any

import pytest
import torch
from local_networks import NETWORKS, network, some_images, walk_of
from torch import Tensor

from robust_spectral.certificates.linearised import Linearised, norms, rows
from robust_spectral.certificates.local_walk import LocalWalk

SMOOTH = ["attention", "softmax"]


@cache
def walked(name: str, radius: float = 0.05) -> LocalWalk:
    model = network(name)
    images, _ = some_images(model, 3)
    return walk_of(model, images, torch.tensor([radius, radius / 5, 2 * radius], dtype=torch.float64), 0.0, 1.0)


def moved(walk: LocalWalk, count: int = 2) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
    """Random changes of the input and errors of all non-linear operations, (count, images, ...)."""
    of_input = torch.randn(count, *walk.env[walk.graph.input].shape, dtype=torch.float64)
    errors = {node: torch.randn(count, *walk.env[node].shape, dtype=torch.float64) for node in walk.errors}
    return {walk.graph.input: of_input}, errors


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_push_and_pull_are_adjoint(name: str, count: int) -> None:
    walk = walked(name)
    (output,) = walk.graph.outputs
    changes, errors = moved(walk, count)
    cotangent = torch.randn(count, *walk.env[output].shape, dtype=torch.float64)
    after = walk.linear.push(dict(changes), output, errors)[output]
    back, seen = walk.linear.pull({output: cotangent})
    there = (after * cotangent).flatten(1).sum(1)
    here = (changes[walk.graph.input] * back).flatten(1).sum(1)
    here = here + sum((errors[node] * part).flatten(1).sum(1) for node, part in seen.items())
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_derivative_of_the_linearised_network_is_that_of_the_network(name: str) -> None:
    model = network(name)
    images, _ = some_images(model, 3)
    walk = walk_of(model, images, torch.full((3,), 1e-7, dtype=torch.float64), 0.0, 1.0)
    (output,) = walk.graph.outputs
    step = torch.randn_like(images)
    pushed = walk.linear.push({walk.graph.input: step[None]}, output)[output][0]
    wanted = (walk.graph.run(images + 1e-5 * step)[0] - walk.graph.run(images - 1e-5 * step)[0]) / 2e-5
    torch.testing.assert_close(pushed, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_the_true_errors_the_linearised_network_is_the_network_and_all_bounds_hold(name: str) -> None:
    walk = walked(name)
    images = walk.env[walk.graph.input]
    for size in (1e-3, 0.5, 1.0):
        step = torch.randn_like(images)
        step = step / norms(step, 3)[:, None, None, None] * walk.radii[:, None, None, None] * size
        step = (images + step).clamp(0, 1) - images
        check_node_by_node(walk, walk.graph.values(images + step), step)


def check_node_by_node(walk: LocalWalk, after: dict[Any, Any], step: Tensor) -> None:
    """Each node's change is that of the linearised network from its sources plus an error within its bounds."""
    changes = {walk.graph.input: step[None]}
    for node in walk.linear.steps(walk.graph.outputs[0]):
        if not isinstance(after[node], Tensor):
            changes[node] = walk.linear.change(node, changes)
            continue
        true = (after[node] - walk.env[node])[None]
        linear = walk.linear.change(node, changes)
        e = true - (0.0 if linear is None else linear)
        if node in walk.errors and node not in walk.linear.replaced:
            reach = walk.errors[node].reach
            assert bool((e[0].abs() <= reach + 1e-12).all()), node
            assert bool((norms(e[0], walk.images) <= walk.sizes[node] + 1e-11).all()), node
            low, high = walk.boxes[node]
            assert bool(((after[node] >= low - 1e-12) & (after[node] <= high + 1e-12)).all()), node
        elif node not in walk.errors:
            assert float(e.abs().max()) <= 1e-11, node
        if node in walk.balls:
            assert bool((norms(true[0], walk.images) <= walk.balls[node] + 1e-11).all()), node
        changes[node] = true


def test_changes_of_one_image_do_not_move_another() -> None:
    walk = walked("residual")
    (output,) = walk.graph.outputs
    changes, errors = moved(walk)
    for part in (*changes.values(), *errors.values()):
        rows(part, 3, 1)[:, 1] = 0.0
    assert float(walk.linear.push(changes, output, errors)[output][:, 1].abs().max()) == 0


def test_no_change_gives_none() -> None:
    walk = walked("dense")
    (output,) = walk.graph.outputs
    assert walk.linear.push({walk.graph.input: None}, output)[output] is None
    assert isinstance(walk.linear, Linearised)


def test_slopes_in_place_of_the_usual_ones_change_the_adjoint_only() -> None:
    walk = walked("dense")
    (output,) = walk.graph.outputs
    cotangent = {output: torch.ones(2, *walk.env[output].shape, dtype=torch.float64)}
    before, _ = walk.linear.pull(cotangent)
    zero = {node: torch.zeros_like(walk.env[node]) for node in walk.errors}
    without, _ = walk.linear.pull(cotangent, zero)
    assert float(without.abs().max()) == 0 and torch.equal(walk.linear.pull(cotangent)[0], before)
