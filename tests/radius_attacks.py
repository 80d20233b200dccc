"""Attacks on images at their own certified radii: PGD, targeted APGD, DDN and a search for rounding errors.

Each attack asks a `Witness` for logits, which keeps the point of the smallest margin of each image among all points that are in
its ball and in [0, 1] by a float64 check. An attack can so not count a point outside the ball, and loses none in it.
"""

import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from generated_certificates import length, margins_of
from torch import Tensor, nn

from robust_spectral.certificates import largest_radii

BEYOND, FEW = (1.5, 2.0, 4.0), 30  # multiples of an attack's distance that are attacked, and of how many images


class Witness:
    """A model that keeps, for each image, the smallest margin at a point of its ball and the box.

    Args:
        model: In float64.
        images: (n, ...), in [0, 1].
        labels: (n,).
        radii: (n,).
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.radii = radii.reshape(-1, *[1] * (images.ndim - 1))
        self.best, self.points = torch.full((len(images),), math.inf, dtype=torch.float64), images.clone()

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        margins, point = margins_of(logits.detach(), self.labels), x.detach()
        better = (margins < self.best) & ((point - self.images).flatten(1).norm(dim=1) <= self.radii.flatten())
        better &= ((point >= 0) & (point <= 1)).flatten(1).all(1)
        self.best = torch.where(better, margins, self.best)
        self.points = torch.where(better.reshape(self.radii.shape), point, self.points)
        return logits

    def repeated(self, times: int) -> "Witness":
        """A witness with each image several times, (times * n, ...): first all images once."""
        images, radii = self.images.repeat(times, *[1] * (self.images.ndim - 1)), self.radii.flatten().repeat(times)
        return Witness(self.model, images, self.labels.repeat(times), radii)

    def learn(self, other: "Witness") -> None:
        """Take over what a repeated witness found."""
        groups = zip(other.best.split(len(self.best)), other.points.split(len(self.best)), strict=True)
        for best, points in groups:
            better = best < self.best
            self.best = torch.where(better, best, self.best)
            self.points = torch.where(better.reshape(self.radii.shape), points, self.points)

    @property
    def broken(self) -> Tensor:
        return self.best <= 0

    def inside(self, x: Tensor) -> Tensor:
        """Points moved into the balls, and then into the box, which contains their centres."""
        moved = x - self.images
        moved = moved * (self.radii * (1 - 1e-15) / length(moved)).clamp_max(1.0)
        return (self.images + moved).clamp(0, 1)

    def start(self) -> Tensor:
        direction = torch.randn_like(self.images)
        return self.inside(self.images + direction / length(direction) * self.radii)


def slope_of(loss: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(loss.sum(), x)
    return slope / length(slope)


def pgd(witness: Witness, steps: int = 100, restarts: int = 5) -> None:
    """Normalised steps on the margin, from the image and from random starts, and in every second run on the cross-entropy."""
    every = witness.repeated(restarts)
    run = torch.arange(len(every.images)) // max(1, len(witness.images))
    x = torch.where((run == 0).reshape(every.radii.shape), every.images, every.start())
    for step in range(steps + 1):
        x = x.detach().requires_grad_()
        logits = every(x)
        entropy = -F.cross_entropy(logits, every.labels, reduction="none")
        loss = torch.where(run % 2 == 1, entropy, margins_of(logits, every.labels))
        x = every.inside(x.detach() - every.radii * (1 - step / (steps + 1)) / 4 * slope_of(loss, x))
    witness.learn(every)


def apgd_targeted(witness: Witness, steps: int = 100) -> None:
    """APGD on the targeted loss of the difference of logits, for each other class.

    Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, 2020.
    """
    with torch.no_grad():
        others = (
            witness.model(witness.images).scatter(1, witness.labels[:, None], -math.inf).argsort(1, descending=True)[:, :-1]
        )
    every = witness.repeated(others.shape[1])
    _apgd(every, others.T.flatten(), steps)
    witness.learn(every)


def _apgd(witness: Witness, target: Tensor, steps: int) -> None:
    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        logits = witness(x)
        loss = (logits.gather(1, target[:, None]) - logits.gather(1, witness.labels[:, None]))[:, 0]
        if logits.shape[1] >= 4:
            ranked = logits.sort(1)[0]
            loss = loss / (ranked[:, -1] - (ranked[:, -3] + ranked[:, -4]) / 2).clamp_min(1e-12)
        return loss.detach(), slope_of(loss, x)

    x = witness.start()
    old, size = x, 2 * witness.radii
    loss, slope = evaluate(x)
    best, best_x, best_slope, last, reduced = loss, x, slope, loss, torch.ones_like(loss, dtype=torch.bool)
    window, counted, rises = max(int(0.22 * steps), 1), 0, torch.zeros_like(loss)
    for step in range(steps):
        moved, old = x - old, x
        ahead = witness.inside(x + size * slope)
        x = witness.inside(x + 0.75 * (ahead - x) + 0.25 * moved) if step else ahead
        before = loss
        loss, slope = evaluate(x)
        rises, counted = rises + (loss > before), counted + 1
        better = loss > best
        best, wide = torch.where(better, loss, best), better.reshape(witness.radii.shape)
        best_x, best_slope = torch.where(wide, x, best_x), torch.where(wide, slope, best_slope)
        if counted == window:
            reduced = (rises <= 0.75 * window) | (~reduced & (last >= best))
            wide, last = reduced.reshape(witness.radii.shape), best
            size = torch.where(wide, size / 2, size)
            x, slope = torch.where(wide, best_x, x), torch.where(wide, best_slope, slope)
            window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            counted, rises = 0, torch.zeros_like(loss)


def ddn(witness: Witness, steps: int = 100, gamma: float = 0.05) -> Tensor:
    """The distances of the nearest images of another class that are found, (n,); infinite where none is.

    Source: Rony et al., Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and defenses, 2019.
    """
    images, labels = witness.images, witness.labels
    x = images.clone().requires_grad_()
    margins = margins_of(witness(x), labels)
    (slope,) = torch.autograd.grad(margins.sum(), x)
    size = margins.detach().reshape(witness.radii.shape) / length(slope) * 1.2
    moved, found, nearest = torch.zeros_like(images), torch.full((len(images),), math.inf, dtype=torch.float64), images.clone()
    for step in range(steps):
        x = (images + moved).requires_grad_()
        logits = witness(x)
        beaten = margins_of(logits.detach(), labels) <= 0
        far = moved.flatten(1).norm(dim=1)
        better = beaten & (far < found)
        found, nearest = torch.where(better, far, found), torch.where(better.reshape(size.shape), x.detach(), nearest)
        slope = slope_of(F.cross_entropy(logits, labels, reduction="none"), x)
        rate = size * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        size = size * torch.where(beaten, 1 - gamma, 1 + gamma).reshape(size.shape)
        moved = moved + rate * slope
        moved = ((images + moved / length(moved) * size).clamp(0, 1) - images).detach()
    low, high = torch.zeros_like(found), torch.ones_like(found)
    for _ in range(12):  # along the line from the image to the nearest one
        middle = (low + high) / 2
        with torch.no_grad():
            beaten = margins_of(witness(images + middle.reshape(size.shape) * (nearest - images)), labels) <= 0
        low, high = torch.where(beaten, low, middle), torch.where(beaten, middle, high)
    return torch.where(found < math.inf, found * high, found)


def rounding_search(model: nn.Module, witness: Witness, dtype: torch.dtype, tries: int = 40) -> Tensor:
    """The images of which another class is predicted in a dtype at a point just inside the sphere, with other last bits."""
    images = witness.images.to(dtype)
    moved = witness.points - witness.images
    out = witness.inside(witness.images + moved / length(moved) * witness.radii)
    broken, best = torch.zeros_like(witness.broken), torch.full_like(witness.best, math.inf)
    near = torch.stack([witness.points, out, images + 0.9999999 * (out - images)]).to(dtype)
    point = near[0]
    for attempt in range(len(near) + tries):
        tried = near[attempt] if attempt < len(near) else point
        if attempt >= len(near):
            towards = torch.where(torch.rand_like(tried) < 0.5, -1.0, 2.0)
            tried = torch.where(torch.rand_like(tried) < 0.5, torch.nextafter(tried, towards.to(dtype)), tried).clamp(0, 1)
        inside = (tried.double() - images.double()).flatten(1).norm(dim=1) <= witness.radii.flatten()
        with torch.no_grad():
            logits = model(tried)
        margins = margins_of(logits, witness.labels)
        broken |= inside & (logits.argmax(1) != witness.labels)
        better = inside & (margins <= best)
        best, point = torch.where(better, margins, best), torch.where(better.reshape(witness.radii.shape), tried, point)
    return broken


def broken_by(model: nn.Module, images: Tensor, labels: Tensor, radii: Tensor) -> dict[str, Tensor]:
    """Which images each attack breaks at their radii, (n,)."""
    witness = Witness(copy.deepcopy(model).double(), images.double(), labels, radii)
    found = {}
    for name, attack in {"PGD": pgd, "APGD-T": apgd_targeted, "DDN": ddn}.items():
        witness.best = torch.full_like(witness.best, math.inf)
        attack(witness)
        found[name] = witness.broken
    return {**found, "rounding": rounding_search(model, witness, images.dtype)}


def figures(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The radii of images, what the attacks break at them, and what they find beyond the distance of a minimal attack."""
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    images, labels, count = images[right], labels[right], len(images)
    start = time.perf_counter()
    found = largest_radii(model, images, labels)
    seconds, kept = time.perf_counter() - start, found.radii > 0
    broken = broken_by(model, images[kept], labels[kept], found.radii[kept])
    distances = ddn(Witness(copy.deepcopy(model).double(), images.double(), labels, found.radii))
    some = (distances < math.inf).nonzero()[:FEW, 0]
    factors = torch.tensor(BEYOND, dtype=torch.float64).repeat_interleave(len(some))
    which = some.repeat(len(BEYOND))
    at = broken_by(model, images[which], labels[which], factors * distances[which])
    beyond = {}
    for i, factor in enumerate(BEYOND):
        shares = [at[name].double().split(len(some))[i].mean() for name in ("PGD", "APGD-T")]
        beyond[str(factor)] = round(float(min(shares)), 4)
    return {
        "dtype": str(images.dtype).removeprefix("torch."), "tried": count, "images": len(images), "proved": int(kept.sum()),
        "local": int(found.local.sum()), "broken": int(torch.stack(list(broken.values())).any(0).sum()),
        "broken by": {name: int(flags.sum()) for name, flags in broken.items()}, "median radius": float(found.radii.median()),
        "median distance": float(distances.median()), "radius above distance": int((found.radii > distances).sum()),
        "seconds for radii": round(seconds, 1), "failure probability": found.failure_probability, "reason": found.reason,
        "found beyond": beyond,
    }  # fmt: skip
