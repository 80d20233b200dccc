"""Random programs: a small network whose ``forward`` has twists that a tracer may see wrongly, or not at all.

A program is drawn from kinds of twists. The kinds in ``UNSEEN`` are the ones for which no recorded graph is the program, so
that a bound may be refused; the programs of all other kinds should have a finite one.
"""

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import program_operations as operations
import program_patches as patches
import program_twists as twists
import program_writes as writes
import torch
from program_twists import Draft, Shape, Twist
from torch import Tensor, nn

KINDS: dict[str, list[Twist]] = {
    "write into a fresh tensor": writes.FRESH,
    "write into a buffer": writes.HELD,
    "write into a view": writes.VIEWS,
    "Fourier transform": writes.FOURIER,
    "tensor guard": twists.GUARDS,
    "question of a tracer": twists.TRACERS,
    "branch on the batch size": twists.BATCHES,
    "branch on the gradient mode": twists.GRADIENTS,
    "branch on training": twists.TRAINING,
    "state": twists.STATE,
    "branch on data": twists.BRANCHES,
    "numpy": twists.DETOURS,
    "detached": twists.DETACHED,
    "randomness": twists.RANDOM,
    "batch statistics": twists.BATCH_STATISTICS,
    "autograd function": operations.FUNCTIONS,
    "wrong gradient": operations.WRONG_GRADIENTS,
    "arguments of a call": operations.CALLS,
    "cast": operations.CASTS,
    "half precision": operations.HALVES,
    "order": operations.ORDERS,
    "matrix product": operations.MATRICES,
    "choice": operations.CHOICES,
    "pooling": operations.POOLS,
    "parametrised layer": operations.PARAMETRISED,
    "attention": operations.ATTENTION,
    "gate": operations.GATES,
    "hook on a layer": patches.LAYER_HOOKS,
    "forward of a layer": patches.LAYER_FORWARDS,
    "normalisation in front": patches.NORMALISED,
    "other weights": patches.WEIGHTS,
    "scripted": patches.SCRIPTED,
    "output in a container": patches.OUTPUTS,
    "hook on the model": patches.ROOT_HOOKS,
    "forward of the model": patches.ROOT_FORWARDS,
    "hook on all modules": patches.EVERYWHERE,
}
UNSEEN = (
    "question of a tracer", "branch on the batch size", "branch on the gradient mode", "state", "branch on data", "numpy",
    "randomness", "batch statistics", "half precision", "hook on all modules",
)  # fmt: skip
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, lambda: nn.LeakyReLU(-0.7), nn.Softplus, nn.Identity]
MOST = 150  # elements of a value


@dataclass
class Program:
    """A model in eval mode, the shape and dtype of its inputs, its kinds of twists, and the relative error of its casts.

    The model is the program while ``hooked`` is entered, as hooks on all modules are registered then.
    """

    model: nn.Module
    shape: Shape
    dtype: torch.dtype
    kinds: list[str]
    rounding: float
    everywhere: list[Callable[[], Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the hooks on all modules, and remove them in the end."""
        handles = [register() for register in self.everywhere]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def example(self, size: int = 2) -> Tensor:
        return torch.rand(size, *self.shape, dtype=self.dtype)


class Network(nn.Module):
    """A network whose ``forward`` applies its parts one by one."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def affine(draft: Draft) -> nn.Module:
    if len(draft.shape) == 1:
        return nn.Linear(draft.size, draft.draw.randint(4, 10))
    channels, stride = draft.draw.randint(2, 4), draft.draw.choice([1, 1, 2])
    mode = draft.draw.choice(["zeros", "circular", "reflect"]) if min(draft.shape[1:]) > 1 else "zeros"
    return nn.Conv2d(draft.shape[0], channels, 3, stride, 1, padding_mode=mode)


def batchnorm(draft: Draft) -> nn.Module:
    norm = (nn.BatchNorm1d if len(draft.shape) == 1 else nn.BatchNorm2d)(draft.shape[0])
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def activation(draft: Draft) -> nn.Module:
    return draft.draw.choice(ACTIVATIONS)()


def pool(draft: Draft) -> nn.Module:
    return nn.AvgPool2d(2, 1) if min(draft.shape[1:], default=0) > 1 and len(draft.shape) == 3 else nn.Identity()


def appended(draft: Draft, part: nn.Module) -> bool:
    """Append a part to a draft if it takes the draft's value, gives each input its own row, and does not grow too large."""
    try:
        with torch.no_grad():
            shapes = [part.eval()(torch.rand(n, *draft.shape)).shape for n in (3, 2, 1)]
    except (RuntimeError, ValueError, IndexError):  # a window, or a statistic, that does not fit the shape
        return False
    shape = tuple(shapes[0][1:])
    if math.prod(shape) > MOST or len(shape) not in (1, 3) or [s[0] for s in shapes] != [3, 2, 1]:
        return False
    draft.parts.append(part)
    draft.shape = shape
    return True


def stretch(draft: Draft, steps: list[Twist], base: int) -> bool:
    """Append steps to a draft in random order, between a number of plain parts; whether all of them fit."""
    others = draft.draw.choices([affine, batchnorm, activation, pool], [1, 1, 3, 1], k=base)
    plain = [Twist("any", affine if i == 0 else make) for i, make in enumerate(others)]
    order = [*steps, *plain]
    draft.draw.shuffle(order)
    fits = [appended(draft, step.make(draft)) for step in order]
    return all(fit for fit, step in zip(fits, order, strict=True) if step in steps)


def assembled(draw: random.Random, chosen: list[Twist], shape: Shape) -> tuple[nn.Module, Draft] | None:
    """The model of some twists, and its draft; None where a twist does not fit."""
    draft = Draft(draw, shape)
    maps, flats = ([t for t in chosen if t.place == place] for place in ("map", "flat"))
    for twist in chosen:
        if twist.place == "any":
            (maps if len(shape) == 3 and draw.random() < 0.5 else flats).append(twist)
    if len(shape) == 3:
        if not stretch(draft, maps, draw.randint(0, 2)):
            return None
        appended(draft, nn.Flatten())
    if not stretch(draft, flats, draw.randint(1, 2)):
        return None
    if draw.random() < 0.5:
        appended(draft, nn.Linear(draft.size, 3))
    layers = [part for part in draft.parts if type(part) in (nn.Conv2d, nn.Linear)]
    model: nn.Module = draw.choice([Network, lambda parts: nn.Sequential(*parts)])(draft.parts)
    draft.shape = shape
    for twist in sorted(chosen, key=lambda t: patches.PLACES.index(t.place)):
        if twist.place == "layer":
            if not layers:
                return None
            twist.make(draw.choice(layers), draft)
        elif twist.place not in ("map", "flat", "any"):
            model = twist.make(model, draft)
    return model.eval(), draft


def forget(model: nn.Module) -> None:
    """Remove what the steps with memory have kept of earlier calls."""
    for part in model.modules():
        for name in ("calls", "last"):
            vars(part).pop(name, None)
        if "calls" in part._buffers:
            part.calls.zero_()


def runs(model: nn.Module, shape: Shape) -> bool:
    """Whether a model takes batches of several sizes without gradients, and gives finite values in rows."""
    try:
        with torch.no_grad():
            outputs = [patches.tensor_of(model(torch.rand(n, *shape))) for n in (2, 3, 1)]
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return all(bool(torch.isfinite(y).all()) and y.shape[0] == n for n, y in zip((2, 3, 1), outputs, strict=True))


def program(draw: random.Random, kind: str) -> Program:
    """A random program with a kind of twist and up to three others, in float32 or float64; without others in two of five."""
    number = draw.choices([0, 1, 2, 3], [8, 5, 4, 3])[0]
    kinds = [kind, *draw.sample([other for other in KINDS if other != kind], number)]
    dtype = draw.choice([torch.float32, torch.float64])
    before = torch.get_default_dtype()
    torch.manual_seed(draw.randrange(2**31))
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while True:
                chosen = [draw.choice(KINDS[kind]) for kind in kinds]
                flat = not any(twist.place in ("map", "front") for twist in chosen) and draw.random() < 0.4
                shape = (draw.randint(4, 10),) if flat else draw.choice([(2, 4, 4), (1, 4, 4), (3, 3, 4)])
                found = assembled(draw, chosen, shape)
                if found is None:
                    continue
                made = Program(found[0], shape, dtype, kinds, found[1].rounding, found[1].everywhere)
                with made.hooked():
                    fits = runs(made.model, shape)
                if fits:
                    forget(made.model)
                    return made
    finally:
        torch.set_default_dtype(before)
