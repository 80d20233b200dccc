"""Certificates around single images: the smallest margin in an L2 ball, and the largest ball without a change of class.

A global Lipschitz constant must hold everywhere; around one image most of a network is linear, and the rest is nearly so. For
each image `LocalWalk` bounds how far the network is from its linearisation while the image moves in the ball, and `Margins`
bounds the difference of the true class's logit and each other one from below. The result is the better of that and of the
global bound.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import uncompiled
from ..lipschitz import Graph, NoClaim, certified_radius, graph_of, lipschitz_bound, pair_of, preserved
from ..operators import full_precision_no_grad
from .forms import written_out
from .local_walk import Kept, LocalWalk
from .margins import least_margins
from .results import Certificates, Radii

_SHARE = 1e-3  # of the failure probability, for each norm
_MOST_ELEMENTS = 4e6  # of all activations of the images that are treated together
_MOST_IMAGES = 16
_FIRST = 1 / 144  # of the distance at which a linear network changes its class: the first radius tried is 1 / 12 of it
_LEAST_RADIUS = 1e-7  # a smaller radius is certified by this one


def certify(
    model: nn.Module, images: Tensor, labels: Tensor, radius: float | Tensor, box: tuple[float, float] | None = (0.0, 1.0), *,
    steps: int = 100, seconds: float | None = None, failure_probability: float = 1e-9,
    progress: Callable[[int, int], None] | None = None,
) -> Certificates:  # fmt: skip
    """Prove that no perturbation of L2 norm up to ``radius`` changes the predicted class of images.

    Perturbed images are in the ball and in the box. The bounds are for the model in eval mode, in the dtype of its weights
    where the rounding of its forward pass is bounded (`LipschitzBound.errors`), else in real arithmetic.

    Args:
        model: As for `lipschitz_bound`, with logits (n, classes) as its output; unchanged afterwards.
        images: (n, ...), in the box.
        labels: True classes, (n,).
        radius: One for all images, or (n,).
        box: Least and largest value of the input's elements; None for unlimited inputs.
        steps: Gradient steps on the bounds of images that are not certified without.
        seconds: Take no more gradient steps after this time; results then depend on the machine's load.
        failure_probability: Allowed for each image, positive.
        progress: Called with the numbers of finished and of all images.

    Raises:
        ValueError: an image is outside the box, a radius or label is invalid, or shapes do not fit.
        TypeError: as `lipschitz_bound`.
    """
    _check(images, labels, box)
    radii = _radii(radius, len(images))
    if len(images) == 0:
        return Certificates(radii, radii > 0, radii > 0, 0.0)
    return _Prover(model, images, labels, box, failure_probability, steps, seconds, progress).at(radii)


def local_radius(
    model: nn.Module, images: Tensor, labels: Tensor, box: tuple[float, float] | None = (0.0, 1.0), *,
    rounds: int = 4, steps: int = 20, failure_probability: float = 1e-9, progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """The largest L2 radius proved around each image, by bisection: (n,) float64, never below that of the global bound.

    Args:
        model: As for `lipschitz_bound`, with logits (n, classes) as its output; unchanged afterwards.
        images: (n, ...), in the box.
        labels: True classes, (n,).
        box: Least and largest value of the input's elements; None for unlimited inputs.
        rounds: Radii that are tried for each image.
        steps: Gradient steps at each radius.
        failure_probability: Allowed for each image.
        progress: Called with the numbers of finished and of all images.

    Raises:
        ValueError: an image is outside the box, or shapes do not fit.
        TypeError: as `lipschitz_bound`.
    """
    found = largest_radii(
        model, images, labels, box, rounds=rounds, steps=steps, failure_probability=failure_probability, progress=progress
    )
    return found.radii


def largest_radii(
    model: nn.Module, images: Tensor, labels: Tensor, box: tuple[float, float] | None = (0.0, 1.0), *,
    rounds: int = 4, steps: int = 20, failure_probability: float = 1e-9, progress: Callable[[int, int], None] | None = None,
) -> Radii:  # fmt: skip
    """The radii of `local_radius`, with the bound that each rests on; arguments and errors are the same."""
    _check(images, labels, box)
    if len(images) == 0:
        none = torch.zeros(0, dtype=torch.float64)
        return Radii(none, none > 0, 0.0)
    return _Prover(model, images, labels, box, failure_probability, steps, None, progress).radii(rounds)


class _Prover:
    """The bounds of a model around images, at any radii; its tensors by image are on the CPU."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, box: tuple[float, float] | None, failure_probability: float,
        steps: int, seconds: float | None, progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        if not 0 < failure_probability < 1:
            raise ValueError(f"certify(failure_probability={failure_probability}): give a number between 0 and 1")
        self.model, self.images, self.labels, self.box = uncompiled(model), images, labels.long().cpu(), box
        self.allowed, self.steps, self.progress = failure_probability, steps, progress
        self.until = math.inf if seconds is None else time.perf_counter() + seconds
        self.bound = lipschitz_bound(self.model, images[:2], failure_probability * _SHARE, box)
        self.spent = torch.full((len(images),), self.bound.failure_probability, dtype=torch.float64)
        self.reason: str | None = None
        self.seed = 0  # of random starts, a fresh one for every walk
        self.norms: dict[Any, Any] = {}
        self.graph: Graph | None = None
        self.start: Kept = {}  # multipliers of the last walk around the images of a search
        self.searching = False
        self.size = _MOST_IMAGES  # of a batch
        with torch.inference_mode(False), preserved(self.model), full_precision_no_grad():
            self.logits, self.dtype = self._logits()
        if self.bound.errors.get(self.dtype, 0.0) == math.inf:
            self.reason = self.bound.errors_reason
        self.exact_in = self.dtype if self.dtype in self.bound.errors else None

    def _logits(self) -> tuple[Tensor, torch.dtype]:
        """The logits of all images, in float64, and the dtype that the model computes in."""
        pairs = torch.cat([self.images, self.images[: len(self.images) % 2]]).split(2)
        try:
            graph = graph_of(self.model, pair_of(self.images))
            runs = [graph.run(pair) for pair in pairs]
            values = graph.values(pairs[0]).values()
            self.size = min(_MOST_IMAGES, int(_MOST_ELEMENTS * 2 / sum(v.numel() for v in values if isinstance(v, Tensor))))
        except NoClaim as refused:
            self.reason = str(refused)
            with torch.no_grad():
                runs = [[self.model(pair)] for pair in pairs]
        shapes = [tuple(tensor.shape) for tensor in runs[0]]
        if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
            raise ValueError(f"certify: the model must have one output, logits (n, classes); for two images it has {shapes}")
        if not bool(((self.labels >= 0) & (self.labels < shapes[0][1])).all()):
            raise ValueError(f"certify(labels): the classes are 0 to {shapes[0][1] - 1}")
        return torch.cat([run[0] for run in runs])[: len(self.images)].double().cpu(), self.images.dtype

    def at(self, radii: Tensor) -> Certificates:
        """The certificates at given radii."""
        margins = self._global_margins(radii)
        local = torch.zeros_like(margins, dtype=torch.bool)
        due = (self._right() & ~(margins > 0) & (self.reason is None)).nonzero()[:, 0]
        for done, indices in self._batches(due):
            found = self._local_margins(indices, radii[indices])
            local[indices] = found > margins[indices]
            margins[indices] = torch.maximum(margins[indices], found)
            if self.progress is not None:
                self.progress(len(margins) - len(due) + done, len(margins))
        margins, local = margins.to(self.images.device), local.to(self.images.device)
        return Certificates(margins, margins > 0, local, float(self.spent.max()), self.reason, self.exact_in)

    def radii(self, rounds: int) -> Radii:
        """The largest radii that are found, with the global ones, and whether each is from around the image."""
        proved = certified_radius(self.logits.to(self.dtype), self.labels, self.bound)
        local = torch.zeros_like(proved, dtype=torch.bool)
        for done, indices in self._batches((self._right() & (self.reason is None)).nonzero()[:, 0]):
            found = self._searched(indices, proved[indices], rounds)
            local[indices] = found > proved[indices]
            proved[indices] = torch.maximum(proved[indices], found)
            if self.progress is not None:
                self.progress(done, len(proved))
        proved, local = proved.to(self.images.device), local.to(self.images.device)
        return Radii(proved, local, float(self.spent.max()), self.reason, self.exact_in)

    def _searched(self, indices: Tensor, proved: Tensor, rounds: int) -> Tensor:
        """The largest radii whose margins are positive among those tried: between the best and the least that fails.

        A radius is tried where a straight line through the margins at both meets 0, not near either. While none has failed, it
        is next to where the line through the margins at the image and the best one does if the network is nearly linear, else
        between that and the best one.
        """
        low, high, steepest = proved, torch.full_like(proved, math.inf), self._steepest(indices)
        linear = steepest
        centre, below = self._others(indices)[0].amin(1), torch.full_like(low, -math.inf)
        above = centre
        self.start, self.searching = {}, True
        for _ in range(rounds):
            share = (above / (above - below)).clamp(0.2, 0.8)
            beyond = (low.clamp_min(_FIRST * linear) * linear).sqrt()
            beyond = torch.where((above < centre) & (linear > steepest / 2), low + 0.8 * (linear - low), beyond)
            tried = torch.where(high < math.inf, low + share * (high - low), beyond)
            tried = torch.where(high > 1.02 * low, tried, 0.98 * low)
            margins = self._local_margins(indices, tried)
            better, worse = (margins > 0) & (tried > low), ~(margins > 0) & (tried < high)
            low, above = torch.where(better, tried, low), torch.where(better, margins, above)
            line = low * centre / (centre - above).clamp_min(1e-300)
            linear = torch.where(better, line.clamp_max(12 * low), linear)
            high, below = torch.where(worse, tried, high), torch.where(worse, margins, below)
        self.start, self.searching = {}, False
        return low

    def _right(self) -> Tensor:
        return self.logits.argmax(1) == self.labels

    def _others(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The margins to all other classes, (n, classes - 1), and these classes."""
        own, classes = self.labels[indices], self.logits.shape[1]
        others = torch.arange(classes - 1, device=own.device).expand(len(own), -1)
        others = others + (others >= own[:, None])
        scores = self.logits[indices]
        return scores.gather(1, own[:, None]) - scores.gather(1, others), others

    def _global_margins(self, radii: Tensor) -> Tensor:
        """The margins that the global Lipschitz bound proves."""
        margins, others = self._others(torch.arange(len(radii)))
        constants = torch.full_like(margins, math.sqrt(2) * self.bound.value * (1 + 1e-15))
        if self.bound.pairs is not None:
            constants = torch.minimum(constants, self.bound.pairs.to(margins)[self.labels[:, None], others])
        reach = torch.where(radii[:, None] > 0, constants * radii[:, None] * (1 + 1e-14), 0.0)
        found = (margins - reach).amin(1) - self._rounding(margins)
        return torch.where(torch.isfinite(found), found, -math.inf)

    def _rounding(self, margins: Tensor) -> Tensor:
        """How far a computed margin may be from the exact one of this walk, in the model's dtype and in float64."""
        known = self.bound.errors
        both = known.get(self.dtype, 0.0) + known.get(torch.float64, 0.0)
        return math.sqrt(2) * (1 + 1e-9) * both + 1e-12 * self.logits.abs().amax()

    def _batches(self, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Images in batches of equal size, with the number of images that are then done."""
        if len(indices) == 0:
            return
        self.size = max(2, min(self.size, len(indices))) if self.graph is None else self.size
        for first in range(0, len(indices), self.size):
            yield min(first + self.size, len(indices)), indices[first : first + self.size]

    def _local_margins(self, indices: Tensor, radii: Tensor) -> Tensor:
        """Lower bounds of the margins in the ball and the box, (n,)."""
        try:
            return self._walked(indices, radii) - self._rounding(self.logits)
        except NoClaim as refused:
            self.reason, self.start = str(refused), {}
            if len(set(indices.tolist())) == 1:
                return torch.full((len(indices),), -math.inf, dtype=torch.float64)
        return torch.cat([self._local_margins(indices[i : i + 1], radii[i : i + 1]) for i in range(len(indices))])

    def _walked(self, indices: Tensor, radii: Tensor) -> Tensor:
        count, fill = len(indices), self.size - len(indices)
        which, radii = torch.cat([indices, indices[-1:].expand(fill)]), torch.cat([radii, radii[-1:].expand(fill)])
        images = self.images[which]
        with torch.inference_mode(False), preserved(self.model), full_precision_no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # torch's own, of operations on many vectors
            if self.graph is None:
                self.graph = graph_of(self.model, images, written_out)
            values = self.graph.values(images)
            (output,) = self.graph.outputs
            device = values[output].device
            if not bool(torch.isfinite(self.logits[which]).all()):
                raise NoClaim("the logits of an image are not finite")
            far = (values[output].cpu() - self.logits[which]).abs().max()
            if not float(far) <= 1e-9 * (1 + float(self.logits.abs().max())):
                raise NoClaim(f"{self.graph.model} computes something else in a batch of {len(images)} than in a batch of 2")
            low, high = self.box or (-math.inf, math.inf)
            x = values[self.graph.input]
            box = (torch.full_like(x, low), torch.full_like(x, high))
            self.seed += 100_000
            walk = LocalWalk(
                self.graph,
                values,
                radii.to(device).clamp_min(_LEAST_RADIUS),
                box,
                self.allowed * _SHARE,
                self.norms,
                seed=self.seed,
                start=self.start,
            )
            walk.run()
            self.start = walk.kept if self.searching else {}
            margins, others = (tensor.to(device) for tensor in self._others(which))
            steps = 0 if time.perf_counter() > self.until else self.steps
            labels, until = self.labels[which].to(device), float(self._rounding(self.logits))
            best = least_margins(walk, output, margins, labels, others, steps, until)
        self.spent[indices] += walk.spent + walk.failure_probability
        if not bool((self.spent[indices] <= self.allowed).all()):
            raise NoClaim(f"more norms than the failure probability {self.allowed:g} is enough for")
        return best[:count].cpu()

    def _steepest(self, indices: Tensor) -> Tensor:
        """A guess of radii that are not certified: the margin over its gradient's norm, as if the network were linear."""
        with torch.inference_mode(False), torch.enable_grad(), preserved(self.model):
            own = self.labels[indices].to(self.images.device, copy=True)[:, None]
            x = self.images[indices].detach().clone().requires_grad_()
            scores = self.model(x)
            margins = scores.gather(1, own) - scores.scatter(1, own, -math.inf).amax(1, keepdim=True)
            (slope,) = torch.autograd.grad(margins.sum(), x)
        return (margins.detach()[:, 0] / slope.flatten(1).norm(dim=1).clamp_min(1e-12)).double().cpu()


def _radii(radius: float | Tensor, count: int) -> Tensor:
    radii = torch.as_tensor(radius, dtype=torch.float64).cpu()
    if radii.shape not in ((), (count,)) or not bool(((radii >= 0) & (radii < math.inf)).all()):
        raise ValueError(f"certify(radius={radius}): give one for all images, or (n,); finite and at least 0")
    return radii.expand(count).clone()


def _check(images: Any, labels: Any, box: tuple[float, float] | None) -> None:
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(f"certify: images and labels must be tensors; got {type(images).__name__} and {type(labels).__name__}")
    if images.ndim < 2 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"certify: images must be (n, ...) and labels (n,); got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise ValueError("certify(labels): give whole numbers, the indices of classes")
    if box is not None and len(images) and not box[0] <= float(images.min()) <= float(images.max()) <= box[1]:
        raise ValueError(
            f"certify(box={box}): the images have values from {float(images.min()):g} to {float(images.max()):g}; give the box "
            "that all images are in, or None"
        )
