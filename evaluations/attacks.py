"""The attacks an evaluation runs, each a function from a model and images to adversarial images of the same order.

PGD is that of the Adversarial Robustness Toolbox, AutoAttack the authors' own code as packaged in pyautoattack, with the
budget its name stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robust_spectral.plugins.registry import find

NORMS = {"l2": 2, "linf": np.inf}


@dataclass(frozen=True)
class Attack:
    """An attack: a name, the largest number of images it is run on by default, and how it is run."""

    name: str
    run: Callable[[nn.Module, Tensor, Tensor, str, float, int], Tensor]


def pgd(model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int, steps: int = 40) -> Tensor:
    """Projected gradient descent, 40 steps of 2.5 eps / 40 from one random start."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    device = "gpu" if images.is_cuda else "cpu"
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=device
    )
    attack = ProjectedGradientDescent(
        classifier, norm=NORMS[norm], eps=eps, eps_step=2.5 * eps / steps, max_iter=steps, num_random_init=1, batch_size=128,
        verbose=False,
    )  # fmt: skip
    on_device = torch.cuda.device(images.device) if images.is_cuda else nullcontext()  # ART's "gpu" is the current one
    with _seeded(seed), on_device:
        adversarial = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
    return torch.from_numpy(adversarial).to(images)


def autoattack(model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int) -> Tensor:
    """AutoAttack, standard version: APGD-CE, targeted APGD-DLR, targeted FAB and Square, 100 iterations or 5000 queries.

    Raises:
        ValueError: the model has fewer than four classes, for which the standard version is not defined.
    """
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    if classes < 4:
        raise ValueError(f"autoattack: the standard version needs at least 4 classes, the model has {classes}")
    attack = AutoAttack(
        model, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, seed=seed, version="standard", device=images.device
    )
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(9, classes - 1)
    with _seeded(seed):
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=128)
    return adversarial.detach()


PGD, AUTOATTACK = Attack("pgd", pgd), Attack("autoattack", autoattack)


def find_attack(name: str) -> Attack:
    """An attack by name, of this package or another that is installed.

    Raises:
        ValueError: there is none of that name; the near ones are offered.
    """
    attack: Attack = find("attack", name)
    return attack


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random states that the attacks draw from, and put them back afterwards."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
