"""The Lagrangian for the input's ball and all errors: its map, its bound for any multipliers, and what tuning gains."""

import math
from functools import cache

import pytest
import torch
from local_networks import NETWORKS, network, some_images, walk_of
from test_linearised import moved, walked
from torch import Tensor

from robust_spectral.certificates.joint_map import JointMap, Term
from robust_spectral.certificates.linearised import norms, rows
from robust_spectral.certificates.local_walk import LocalWalk


def joint_of(walk: LocalWalk, spread: float = 0.0, seed: int = 1) -> JointMap:
    """The map to the change of the last non-linear operation's argument, with random multipliers."""
    node = list(walk.errors)[-1]
    source = walk.linear.sources[node][0]
    steps = {walk.graph.input, *walk.linear.steps(source)}
    generator = torch.Generator().manual_seed(seed)
    terms = {}
    for n, term in walk.terms.items():
        if n in steps:
            log = spread * torch.randn(term.log.shape, generator=generator, dtype=torch.float64)
            terms[n] = Term(term.size, term.reach, log, term.energy, term.sources)
    return JointMap(walk.linear, terms, [source], lambda changes: [changes[0]], seed)


def exact_norm(joint: JointMap) -> Tensor:
    """The largest singular value for each image, from the dense matrix."""
    identity = torch.eye(joint.given, dtype=torch.float64)[:, None].expand(-1, joint.images, -1)
    return torch.linalg.svdvals(joint.forward(identity).permute(1, 0, 2))[:, 0]


@cache
def small() -> LocalWalk:
    model = network("dense")
    images, _ = some_images(model, 2)
    return walk_of(model, images, torch.tensor([0.3, 0.1], dtype=torch.float64), 0.0, 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_map_and_its_adjoint_are_adjoint(name: str) -> None:
    joint = joint_of(walked(name), spread=1.0)
    X = torch.randn(2, joint.images, joint.given, dtype=torch.float64)
    Y = torch.randn(2, joint.images, sum(joint.sizes), dtype=torch.float64)
    there, here = (joint.forward(X) * Y).sum((0, 2)), (X * joint.adjoint(Y)).sum((0, 2))
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_error_is_at_most_its_energy_element_by_element_where_its_multipliers_are(name: str) -> None:
    walk = walked(name)
    changes, _ = moved(walk, 4)
    x = walk.env[walk.graph.input]
    step = changes[walk.graph.input]
    step = step * (walk.radii / norms(step, walk.images, 1)).reshape(4, -1, *[1] * (x.ndim - 1))
    for i in range(4):
        after = walk.graph.values((x + step[i]).clamp(0, 1))
        for node, term in walk.terms.items():
            if term.energy is None:
                continue
            given = {s: (after[s] - walk.env[s])[None] for s in walk.linear.sources[node]}
            error = rows((after[node] - walk.env[node])[None] - walk.linear.change(node, given), walk.images, 1)[0].square()
            tensors = [rows(part, walk.images, 1)[0].square() for part in term.energy([given[s] for s in term.sources])]
            if term.log.shape[1] > 1:
                met = sum(part.reshape(len(part), -1, error.shape[1]).sum(1) for part in tensors)
                assert bool((error <= met * (1 + 1e-6) + 1e-20).all())
            else:
                assert bool((error.sum(1) <= sum(part.sum(1) for part in tensors) * (1 + 1e-6) + 1e-20).all())


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_holds_for_any_multipliers(name: str, spread: float) -> None:
    walk = walked(name)
    joint = joint_of(walk, spread)
    x, source = walk.env[walk.graph.input], joint.sources[0]
    s = joint.operator()
    X = torch.randn(1, joint.images, joint.given, dtype=torch.float64)
    for _ in range(60):
        X = s.adjoint(s.forward(X / X.norm(dim=2, keepdim=True)))
    largest = X.norm(dim=2)[0].sqrt() * 1.02
    steps = torch.randn(20, *x.shape, dtype=torch.float64)
    steps = steps * (walk.radii / norms(steps, walk.images, 1)).reshape(20, -1, *[1] * (x.ndim - 1))
    met = torch.stack([
        norms(walk.graph.values((x + step).clamp(0, 1))[source] - walk.env[source], walk.images) for step in steps
    ])  # fmt: skip
    assert bool((met.amax(0) <= joint.bound(largest)).all())


def test_the_tuned_bound_is_below_that_of_separate_balls_and_above_what_is_met() -> None:
    walk = small()
    joint = joint_of(walk)
    joint.tune()
    tuned = joint.bound(exact_norm(joint))
    separate = torch.zeros_like(tuned)
    for node, term in joint.terms.items():
        identity = torch.eye(term.reach.shape[1], dtype=torch.float64)[:, None].expand(-1, joint.images, -1)
        unit = identity.reshape(len(identity), *walk.env[node].shape)
        start = {walk.graph.input: unit if node is walk.graph.input else torch.zeros_like(walk.env[walk.graph.input])[None]}
        errors = {} if node is walk.graph.input else {node: unit}
        after = walk.linear.push(start, joint.last, errors)[joint.sources[0]]
        matrix = rows(after.expand(len(identity), *after.shape[1:]), joint.images, 1)
        separate = separate + term.size * torch.linalg.matrix_norm(matrix.permute(1, 0, 2), 2)
    assert bool((tuned < separate).all())


def test_a_norm_above_one_adds_the_errors_that_it_allows() -> None:
    joint = joint_of(small())
    budget = sum(term.log.exp().amax(1) for term in joint.terms.values() if term.fixed)
    below, above = joint.bound(torch.full((2,), 0.5)), joint.bound(torch.full((2,), 2.0))
    torch.testing.assert_close(below, 0.5 * budget.sqrt())
    slack = sum(term.slack(torch.full((2,), 3.0, dtype=torch.float64)) for term in joint.terms.values() if not term.fixed)
    torch.testing.assert_close(above.square(), 4 * budget + slack)
    assert math.isfinite(float(above.sum())) and bool((slack > 0).all())
