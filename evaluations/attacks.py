"""A harness that runs attacks and checks their results, so that a verdict can be trusted whatever the attack does.

An attack has a `norm`, an `eps` and a call from model, images and labels to adversarial images. One that searches for the
smallest perturbation has no `eps`: its result is a distance for each image, which decides about every size at once.

The harness passes an attack the model wrapped in a `Witness`, which remembers for each image the first input inside the ball
that fools the model, or the nearest one if there is no ball, in case the attack does not return it. The witness records whole
batches only, not the subsets that AutoAttack continues with; AutoAttack keeps its own findings. The harness moves the returned
images into the ball and the pixel box in float64 and predicts them again; only a perturbation that fools the model then has a
distance. An attack that raises an error gives a verdict with this error, never a robust image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from robust_spectral.operators import evaluating
from robust_spectral.plugins.registry import find

NORMS = {"l2": 2, "linf": np.inf}
HARNESS = 2  # version, raised when the results of an attack or a check may change, so that no older record is reused
_OF_THE_MACHINE = ("not enough memory", "CUDA error", "CUDA out of memory")  # errors that say nothing about the model
ROUNDING = 1e-6  # distance by which a stored image may lie outside its ball, relative to eps


class Attack(Protocol):
    """The interface of an attack. It is registered under the entry points ``robust_spectral.attacks``.

    An attack is made with the arguments ``norm`` and ``eps``; one whose class has ``minimal = True`` minimises the perturbation
    and is made with ``eps=None``.

    An attack is a dataclass, so that its budget is part of its record. Its attribute ``package`` names the distribution whose
    version is recorded as well.
    """

    norm: str
    eps: float | None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images (n, channels, height, width) in [0, 1], one for each image, in the order of the images."""


def make_attack(name: str, norm: str, eps: float | None) -> Attack:
    """Make an attack by name, from this package or another installed one; one that minimises the perturbation ignores eps.

    Raises:
        ValueError: no attack has this name (similar names are listed), or it does not support the norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}: expected one of {', '.join(NORMS)}")
    attack: Attack = find("attack", name)(norm=norm, eps=None if is_minimal(name) else eps)
    return attack


def is_minimal(name: str) -> bool:
    """Whether the attack of this name minimises the perturbation, so that it has no size.

    Raises:
        ValueError: no attack has this name.
    """
    return bool(getattr(find("attack", name), "minimal", False))


def describe(attack: Attack) -> dict[str, Any]:
    """The identity of an attack: its class, its budget, and the versions of the harness and of the package it comes from."""
    kind, package = type(attack), getattr(attack, "package", None)
    told = {"class": f"{kind.__module__}.{kind.__qualname__}", "harness": HARNESS, **asdict(attack)}  # type: ignore[call-overload]
    return told | ({"package": f"{package} {version(package)}"} if package else {})


@dataclass(frozen=True)
class Noise:
    """Random perturbations of full size, independent of the model: a control, which any attack must beat."""

    norm: str = "l2"
    eps: float = 0.5
    draws: int = 100
    package: ClassVar[None] = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the last draw; the witness has recorded any earlier one that fools the model."""
        noisy = images
        with torch.no_grad():
            for _ in range(self.draws):
                noisy = into_ball(images + self._draw(images), images, self.norm, self.eps)
                model(noisy)
        return noisy

    def _draw(self, images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        if self.norm == "linf":
            return self.eps * noise.sign()
        return self.eps * noise / size_of(noise, "l2").reshape(-1, *[1] * (noise.ndim - 1))


class Witness(nn.Module):
    """The model under attack. Remembers for each image an input in its ball that does not get the image's label.

    The first such input is kept; the nearest, if eps is None and there is no ball. Its distance is inf where there is none.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float | None) -> None:
        super().__init__()
        self.model, self.images, self.labels, self.norm, self.eps = model, images, labels, norm, eps
        self.best, self.distance = images.clone(), torch.full_like(labels, torch.inf, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits of a batch. A batch of another shape than the attacked images is not recorded."""
        logits: Tensor = self.model(x)
        if x.shape == self.images.shape:
            self._note(x.detach(), logits.detach())
        return logits

    def _note(self, x: Tensor, logits: Tensor) -> None:
        fooled = logits.argmax(1) != self.labels
        new = (fooled if self.eps is None else fooled & self.distance.isinf()).nonzero()[:, 0]
        if len(new):
            x = x[new]
            size = size_of(x.double() - self.images[new].double(), self.norm)
            boxed = ((x >= 0) & (x <= 1)).flatten(1).all(1)  # false for NaN
            inside = size < self.distance[new] if self.eps is None else size <= self.eps * (1 + ROUNDING)
            new, x, size = new[boxed & inside], x[boxed & inside], size[boxed & inside]
            self.best[new], self.distance[new] = x.to(self.best), size


@dataclass(frozen=True)
class Verdict:
    """The result of an attack on a batch of n images.

    Attributes:
        adversarial: The adversarial images, (n, channels, height, width), inside ball and box.
        predicted: Their predicted classes, (n,).
        distance: Norms of the perturbations that fool the model, (n,), float64; inf where none does.
        error: Why the attack failed; no image then counts as robust or fooled. None if the attack did not fail.
    """

    adversarial: Tensor
    predicted: Tensor
    distance: Tensor
    error: str | None = None


def run_attack(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Verdict:
    """Attack images that the model classifies correctly, in eval mode, with the global random states seeded.

    Args:
        attack: The attack.
        model: A module from pixels in [0, 1] to logits.
        images: (n, channels, height, width).
        labels: (n,).
        seed: Seed of torch and numpy for the attack; their random states are restored afterwards.
    """
    witness = Witness(model, images, labels, attack.norm, attack.eps)
    with seeded(seed), evaluating(model):
        witness.eval()
        try:
            adversarial = into_ball(attack(witness, images, labels), images, attack.norm, attack.eps)
            predicted = predict(model, adversarial)
        except Exception as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _OF_THE_MACHINE):
                raise
            return Verdict(images, labels, witness.distance.fill_(torch.inf), f"{type(error).__name__}: {error}")
        distance = _distance(adversarial, images, predicted != labels, attack.norm)
        nearer = witness.distance.isfinite() & (distance.isinf() if attack.eps is not None else witness.distance < distance)
        if bool(nearer.any()):
            adversarial[nearer] = witness.best[nearer]
            predicted = predict(model, adversarial)
    return Verdict(adversarial, predicted, _distance(adversarial, images, predicted != labels, attack.norm))


def _distance(adversarial: Tensor, images: Tensor, fooled: Tensor, norm: str) -> Tensor:
    """The norms of the perturbations that fool the model, (n,) in float64; inf for the others."""
    size = size_of(adversarial.double() - images.double(), norm)
    return torch.where(fooled, size, torch.inf)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the predicted classes (n,) of images.

    Raises:
        ValueError: a logit is not finite, or the model gives one logit for an image.
    """
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(128)])
    if logits.shape[1:] == (1,):
        raise ValueError(
            "the model gives one logit for an image, and attacks need one for each class; give two: torch.cat([-z, z], 1) / 2"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are NaN or infinite")
    return logits.argmax(1)


def into_ball(adversarial: Tensor, images: Tensor, norm: str, eps: float | Tensor | None) -> Tensor:
    """Move adversarial images into the pixel box and the ball of radius eps around the images.

    Args:
        adversarial: (n, channels, height, width).
        images: (n, channels, height, width).
        norm: l2 or linf.
        eps: The radius, for all images or of shape (n, 1, 1, 1); None for the pixel box alone.

    Raises:
        ValueError: the adversarial images have another shape than the images, or a value is not finite.
    """
    if adversarial.shape != images.shape:
        raise ValueError(f"an attack returned images of shape {tuple(adversarial.shape)} for {tuple(images.shape)}")
    if not bool(torch.isfinite(adversarial).all()):
        raise ValueError("an attack returned NaN or infinite pixels")
    delta = adversarial.double().clamp(0, 1) - images.double()
    if eps is not None and norm == "linf":
        most = torch.as_tensor(eps, dtype=delta.dtype, device=delta.device)
        delta = delta.clamp(-most, most)
    elif eps is not None:
        size = size_of(delta, norm).reshape(-1, *[1] * (delta.ndim - 1))
        delta = delta * (eps / size.clamp_min(1e-300)).clamp(max=1)
    return (images.double() + delta).clamp(0, 1).to(images.dtype)


def size_of(delta: Tensor, norm: str) -> Tensor:
    """The norm of each perturbation of a batch."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=NORMS[norm], dim=1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states that attacks draw from, and restore them afterwards."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
