"""Sampled gains of a program, by differences only, and the check of its Lipschitz bounds against them.

A gain is the distance of two outputs over the distance of their inputs, in one row of a batch while the others stay. The same
input must have the same output in the next call and beside other inputs: a distance of 0 with a change has no finite gain.
"""

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from generated_programs import KINDS, Program, program
from program_patches import tensor_of
from torch import Tensor, nn

import robust_spectral as rs

SIZES, MODES = (1, 2, 3, 5, 7), ("without gradients", "with gradients", "for an input with gradient")
REFUSED = (RuntimeError, ValueError)  # of a write that autograd refuses, or of a statistic of one element
Run = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


class Change(NamedTuple):
    """The distance of two outputs, the distance of their inputs, and the sizes to which rounding errors are relative."""

    change: float
    distance: float
    inputs: float
    outputs: float

    def excess(self, bound: float, rounding: float) -> float:
        """How much the change is above what a Lipschitz constant and the relative rounding error of both outputs allow."""
        allowed = bound * self.distance * (1 + 1e-6) + rounding * (bound * self.inputs + self.outputs)
        return self.change - allowed if math.isfinite(self.change) else math.inf

    @property
    def gain(self) -> float:
        return self.change / self.distance if self.distance else math.inf


@dataclass
class Verdict:
    """The outcome of a check: "finite", "refused", "unsound" or "raised", why, and the kinds of the program."""

    result: str
    detail: str
    kinds: list[str]


def runner(model: nn.Module, mode: str) -> Run:
    """The function of a batch that a model is in a gradient mode, with outputs in float64, flat."""

    def run(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(mode != MODES[0]):
            output = tensor_of(model(x.detach().clone().requires_grad_(mode == MODES[2])))
        return output.detach().flatten(1).double().clone()

    return run


def steepest(run: Run, x: Tensor, step: float) -> Tensor:
    """The direction of the largest gain at an input, from differences along all axes, which are one batch."""
    axes = step * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    up, down = run(torch.cat([x + axes, x - axes])).chunk(2)
    return torch.linalg.svd(up - down, full_matrices=False)[0][:, 0].reshape(x.shape).to(x.dtype)


def bisected(run: Run, x: Tensor, y: Tensor, step: float) -> Pair:
    """Two near points on the way from x to y: each time the half with the larger gain, which is not smaller than before."""
    while float((x - y).norm()) > 2 * step:
        middle = (x + y) / 2
        first, between, last = run(torch.stack([x, middle, y]))
        x, y = (x, middle) if (between - first).norm() > (last - between).norm() else (middle, y)
    return x, y


def pairs(run: Run, point: Callable[[], Tensor], clip: Callable[[Tensor], Tensor], step: float) -> Iterator[Pair]:
    """Pairs of inputs, far and near, among them the steepest that are found from a few points."""
    for _ in range(2):
        x = clip(point())
        direction = steepest(run, x, step)
        yield clip(x - step * direction), clip(x + step * direction)
        yield clip(x - 20 * step * direction), clip(x + 20 * step * direction)
        y, noise = point(), torch.randn_like(x)
        yield x, y
        yield x, clip(x + 3 * step * noise / noise.norm())
        yield bisected(run, x, y, step)
        yield bisected(run, clip(x - direction.sign()), clip(x + direction.sign()), step)


def changes(run: Run, found: list[Pair], size: int) -> Iterator[Change]:
    """The change of each pair in its row of a batch, of the rows beside it, and of the whole batch when it runs again."""
    cycle = itertools.islice(itertools.cycle(found), -(-len(found) // size) * size)
    for group in zip(*[cycle] * size, strict=True):
        batch = torch.stack([x for x, _ in group])
        before = run(batch)
        for row, (_, y) in enumerate(group):
            other = batch.clone()
            other[row] = y
            after = run(other)
            for i in range(size):
                yield _change(batch[i], other[i], before[i], after[i])
        again = run(batch)
        yield from (_change(batch[i], batch[i], before[i], again[i]) for i in range(size))


def _change(x: Tensor, y: Tensor, before: Tensor, after: Tensor) -> Change:
    distance = float((x.double() - y.double()).norm())
    inputs, outputs = x.norm() + y.norm(), before.norm() + after.norm()
    return Change(float((before - after).norm()), distance, float(inputs), float(outputs))


def sampled(made: Program, scale: float | None = None) -> list[Change]:
    """Changes of a program inside the box [0, 1], or around 0 at a scale, in every mode and batch size that it takes."""
    size = scale or 1.0
    step = size * min(0.3, max(1e-4, 1000 * rounding(made)))

    def point() -> Tensor:
        if scale is not None:
            return scale * torch.randn(made.shape, dtype=made.dtype)
        x = torch.rand(made.shape, dtype=made.dtype)
        return x.round() if float(x.flatten()[0]) < 0.3 else x  # corners of the box

    def clip(x: Tensor) -> Tensor:
        return x if scale is not None else x.clamp(0, 1)

    found: list[Pair] = []
    measured: list[Change] = []
    for mode in MODES[:2]:
        with contextlib.suppress(*REFUSED):
            found += pairs(runner(made.model, mode), point, clip, step)
    for mode, size in itertools.product(MODES, SIZES):
        with contextlib.suppress(*REFUSED):
            measured += changes(runner(made.model, mode), found, size)
    return measured


def rounding(made: Program) -> float:
    """The relative rounding error that a difference of outputs is allowed: a hundred operations', and the casts'."""
    return 200 * torch.finfo(made.dtype).eps + made.rounding


def judge(made: Program, found: rs.LipschitzBound) -> tuple[str, str]:
    """The result of a check of bounds against sampled gains, and its detail."""
    regions = [(found.local, None), (found.value, 1.0), (found.value, 30.0)]
    for bound, scale in regions:
        if math.isfinite(bound):
            worst = max(sampled(made, scale), key=lambda c: c.excess(bound, rounding(made)))
            if worst.excess(bound, rounding(made)) > 0:
                return "unsound", f"gain {worst.gain:.6g} at distance {worst.distance:.3g} for a bound of {bound:.6g}"
    if math.isinf(found.value) and not found.reason:
        return "raised", "a refusal without a reason"
    return ("refused", str(found.reason)) if math.isinf(found.local) else ("finite", str(found.reason))


def check(seed: int, kind: str | None = None) -> Verdict:
    """Draw a program, by default of the kind of its seed, bound it, and compare the bounds with its sampled gains."""
    made = program(random.Random(seed), kind or list(KINDS)[seed % len(KINDS)])
    with made.hooked(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = rs.lipschitz_bound(made.model, made.example())
        except Exception as error:  # noqa: BLE001
            return Verdict("raised", f"{type(error).__name__}: {str(error)[:300]}", made.kinds)
        torch.manual_seed(seed)
        random.seed(seed)  # of the programs that draw numbers when they run
        result, detail = judge(made, found)
    return Verdict(result, detail, made.kinds)
