"""How an attack is run so that its verdicts can be trusted, whatever the attack itself does.

An attack has a `norm`, an `eps` and a call from model, images and labels to adversarial images. Here it is shown the model
through a `Witness`, which keeps the first image inside the ball that fools the model, should the attack pass it over; it sees
whole batches only, not the parts of them that AutoAttack goes on with, which keeps what it finds itself. What an attack
returns is put back into the ball and the pixel box in float64, and predicted again. An attack that fails is a verdict of its
own, never a robust image.
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
HARNESS = 2  # raised whenever what an attack or a gate finds may change, so that no older record is taken for a new one
_OF_THE_MACHINE = ("not enough memory", "CUDA error", "CUDA out of memory")  # errors that say nothing of the model
ROUNDING = 1e-6  # by which a stored image may be outside its ball, relative to eps


class Attack(Protocol):
    """What the harness runs; registered under the entry points ``robust_spectral.attacks``, made with ``norm`` and ``eps``.

    A dataclass, so that its budget is part of its record; ``package`` names the distribution whose version is, too.
    """

    norm: str
    eps: float

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (n, channels, height, width) in [0, 1], one for each image, in their order."""


def make_attack(name: str, norm: str, eps: float) -> Attack:
    """An attack by name, of this package or another that is installed.

    Raises:
        ValueError: there is none of that name (the near ones are offered), or it has no such norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}: expected one of {', '.join(NORMS)}")
    attack: Attack = find("attack", name)(norm=norm, eps=eps)
    return attack


def describe(attack: Attack) -> dict[str, Any]:
    """What makes an attack the one it is: its class, its budget, the version of the package it comes from."""
    kind, package = type(attack), getattr(attack, "package", None)
    told = {"class": f"{kind.__module__}.{kind.__qualname__}", "harness": HARNESS, **asdict(attack)}  # type: ignore[call-overload]
    return told | ({"package": f"{package} {version(package)}"} if package else {})


@dataclass(frozen=True)
class Noise:
    """Random perturbations of full size, whatever the model: a control, which any attack must beat."""

    norm: str = "l2"
    eps: float = 0.5
    draws: int = 100
    package: ClassVar[None] = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The last of all draws; the witness has seen the others."""
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
    """The model under attack, which remembers for every image the first input in its ball that was not given its label."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float) -> None:
        super().__init__()
        self.model, self.images, self.labels, self.norm, self.eps = model, images, labels, norm, eps
        self.best, self.found = images.clone(), torch.zeros_like(labels, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits of a batch; one of another number of images than are attacked is not remembered."""
        logits: Tensor = self.model(x)
        if x.shape == self.images.shape:
            self._note(x.detach(), logits.detach())
        return logits

    def _note(self, x: Tensor, logits: Tensor) -> None:
        new = ((logits.argmax(1) != self.labels) & ~self.found).nonzero()[:, 0]
        if len(new):
            x = x[new]
            size = size_of(x.double() - self.images[new].double(), self.norm)
            boxed = ((x >= 0) & (x <= 1)).flatten(1).all(1)  # false for NaN
            new, x = new[boxed & (size <= self.eps * (1 + ROUNDING))], x[boxed & (size <= self.eps * (1 + ROUNDING))]
            self.best[new], self.found[new] = x.to(self.best), True


@dataclass(frozen=True)
class Verdict:
    """What an attack came to on a batch of n images.

    Attributes:
        adversarial: The images it ended with, (n, channels, height, width), inside ball and box.
        predicted: Their predicted classes, (n,).
        distance: Norms of their perturbations, (n,), float64.
        error: Why it failed, and then no image counts as robust or fooled; None where it did not.
    """

    adversarial: Tensor
    predicted: Tensor
    distance: Tensor
    error: str | None = None


def run_attack(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Verdict:
    """Attack images that the model classifies correctly, in eval mode, with the global random states seeded.

    Args:
        attack: The attack.
        model: Takes pixels in [0, 1] and gives logits.
        images: (n, channels, height, width).
        labels: (n,).
        seed: Of torch and numpy, which are left as they were.
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
            return Verdict(images, labels, torch.zeros(len(labels), dtype=torch.float64), f"{type(error).__name__}: {error}")
        missed = witness.found & (predicted == labels)
        if bool(missed.any()):
            adversarial[missed] = witness.best[missed]
            predicted = predict(model, adversarial)
    return Verdict(adversarial, predicted, size_of(adversarial.double() - images.double(), attack.norm))


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes (n,) of images.

    Raises:
        ValueError: a logit is not finite.
    """
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(128)])
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are NaN or infinite")
    return logits.argmax(1)


def into_ball(adversarial: Tensor, images: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """Adversarial images put back into the pixel box and the ball of radius eps, or of one of (n, 1, 1, 1), around the images.

    Raises:
        ValueError: they are of another shape than the images, or a value is not finite.
    """
    if adversarial.shape != images.shape:
        raise ValueError(f"an attack returned images of shape {tuple(adversarial.shape)} for {tuple(images.shape)}")
    if not bool(torch.isfinite(adversarial).all()):
        raise ValueError("an attack returned NaN or infinite pixels")
    delta = adversarial.double().clamp(0, 1) - images.double()
    if norm == "linf":
        most = torch.as_tensor(eps, dtype=delta.dtype, device=delta.device)
        delta = delta.clamp(-most, most)
    else:
        size = size_of(delta, norm).reshape(-1, *[1] * (delta.ndim - 1))
        delta = delta * (eps / size.clamp_min(1e-300)).clamp(max=1)
    return (images.double() + delta).clamp(0, 1).to(images.dtype)


def size_of(delta: Tensor, norm: str) -> Tensor:
    """Norm of each perturbation of a batch."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=NORMS[norm], dim=1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states that attacks draw from, and put them back afterwards."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
