"""Checks (called gates in report.json) that a model must pass before its attacked accuracies mean anything.

Most broken defences are not robust but hard to attack: their gradients vanish, their answers are random or depend on the
batch, they return probabilities, or they optimise in the forward pass. Each check looks for one such sign on a few images. If
a check fails, every attacked accuracy of the model is invalid. A check that counts broken images or vanishing gradients fails
only if there are at least two, even where one exceeds its threshold. A check with too few images to pass is skipped: it was not
tested.

Sources: Carlini et al., On Evaluating Adversarial Robustness (2019); the flags of AutoAttack (Croce and Hein 2020) and their
thresholds; Pintor et al., Indicators of Attack Failure (2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from robust_spectral.operators import evaluating

from ..attacks import Attack, make_attack, run_attack
from ..wording import percent

Status = Literal["pass", "flag", "fail", "skip"]
VERSION = 4  # version of the checks, raised when their results may change
_REPEATS = 5
_ROUNDING = 1e-4  # allowed difference of logits between batches, or passes on a GPU, relative to the largest
_MORE_THAN_PGD = 0.005  # share of the images that a control or a doubled budget may break in addition
_BLACK_BOX = 0.002  # share of the images that a search without gradients may break in addition
_FEWEST = 2  # least number of images that must show a sign
_CHANCE = 0.05  # significance level of twice the steps against another random start
_ENOUGH = 8  # least number of correctly classified images for a check to pass
_MUCH_MORE = 0.1  # share of the images that AutoAttack's gradients, or twice the steps, may break unflagged
_GRADIENT_STEPS, _TARGETS, _QUERIES = 50, 3, 500  # reduced budgets, so that checks stay cheap


@dataclass(frozen=True)
class Gate:
    """The result of one check: its name, its status, and a detail in words."""

    name: str
    status: Status
    detail: str


def check_model(model: nn.Module, images: Tensor, labels: Tensor) -> list[Gate]:
    """Check the model itself, with a few passes of images (n, channels, height, width) with labels (n,)."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with evaluating(model), torch.no_grad():
        logits = model(images)
        training = [name or "the model" for name, part in model.named_modules() if part.training]
        if not bool(torch.isfinite(logits).all()):
            return [Gate("finite logits", "fail", "some logits are NaN or infinite")]
        if logits.shape[1:] == (1,):
            return [Gate("a logit for each class", "fail", "one logit for an image, by which attacks cannot tell two classes")]
        gates = [
            _logits_gate(logits),
            _deterministic(model, images, logits),
            _batch_independent(model, images, logits),
            _no_optimisation(model, images),
            _gradients(model, images, labels, logits),
        ]
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    return [*gates, _keeps_eval_mode(training, moved)]


def check_attacks(model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int) -> Iterator[Gate]:
    """Check the attacks at one size of perturbation, on images that the model classifies correctly."""
    if not len(labels):
        yield Gate(f"attacks at {norm} {eps:g}", "skip", "no image is classified correctly, so none is attacked")
        return
    pgd: Any = make_attack("pgd", norm, eps)
    square: Any = make_attack("square", norm, eps)
    gradients: Any = make_attack("autoattack-gradients", norm, eps)

    def stands(attack: Attack, chosen: Tensor, seed: int = seed) -> Tensor:
        if not len(chosen):
            return torch.ones_like(chosen, dtype=torch.bool)
        verdict = run_attack(attack, model, images[chosen], labels[chosen], seed)
        if verdict.error is not None:
            raise ValueError(verdict.error)
        return verdict.predicted == labels[chosen]

    every = torch.arange(len(labels), device=labels.device)
    where, total = f"at {norm} {eps:g}", len(labels)
    try:
        robust = stands(pgd, every)
        left = every[robust]
        for control, name in (("fgsm", "a single step"), ("noise", "random noise")):
            broken = ~stands(make_attack(control, norm, eps), left)
            yield _beaten(f"{name} is weaker than PGD", where, broken, total, _MORE_THAN_PGD)
        longer = ~stands(replace(pgd, steps=2 * pgd.steps), left)
        again = ~stands(pgd, left, seed + 1) if int(longer.sum()) >= _FEWEST else longer
        yield _converged(where, longer, again, total)
        stronger = ~stands(replace(gradients, steps=_GRADIENT_STEPS, targets=_TARGETS), left)
        yield _beaten("AutoAttack's gradients break little more", where, stronger, total, _MUCH_MORE, status="flag")
        left = left[~stronger]
        searched = ~stands(replace(square, queries=_QUERIES), left)
        yield _beaten("a search without gradients breaks no more", where, searched, total, _BLACK_BOX, "AutoAttack's gradients")
        yield _sweep(model, images, norm, stands(make_attack("pgd", norm, _whole_box(norm, images)), every))
    except ValueError as error:
        yield Gate(f"attacks {where}", "fail", f"an attack failed: {error}")


def _logits_gate(logits: Tensor) -> Gate:
    sums = logits.double().sum(1)
    probabilities = bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-5).all())
    seen = "none is negative and each row sums to 1: remove the softmax" if probabilities else "logits"
    return Gate("logits, not probabilities", "fail" if probabilities else "pass", seen)


def _deterministic(model: nn.Module, images: Tensor, logits: Tensor) -> Gate:
    apart = max(float((model(images) - logits).abs().max()) for _ in range(_REPEATS - 1)) / _size(logits)
    good = apart <= (_ROUNDING if images.is_cuda else 0.0)
    return Gate("deterministic", "pass" if good else "fail", f"{_REPEATS} passes differ by {apart:.1e} of the largest logit")


def _batch_independent(model: nn.Module, images: Tensor, logits: Tensor) -> Gate:
    order = torch.arange(len(images) - 1, -1, -1, device=images.device)
    alone = torch.cat([model(image[None]) for image in images[:16]])
    backwards = model(images[order])[order]
    pairs = ((alone, logits[:16]), (backwards, logits))
    apart = max(float((a - b).abs().max()) for a, b in pairs) / _size(logits)
    turned = sum(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in pairs)
    detail = f"alone and in reverse order, logits differ by {apart:.1e} of the largest, {turned} predicted classes change"
    return _gate("answers do not depend on the batch", apart > _ROUNDING or turned > 0, detail, tested=len(images) > 1)


def _no_optimisation(model: nn.Module, images: Tensor) -> Gate:
    """Check that the forward pass runs without autograd; a pass that optimises its input fails."""
    name = "no optimisation in the forward pass"
    try:
        with torch.inference_mode():
            model(images[:1].clone())
    except RuntimeError as error:
        return Gate(name, "fail", f"the pass fails with gradients disabled: {str(error).splitlines()[0]}")
    return Gate(name, "pass", "runs with gradients disabled")


def _gradients(model: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> Gate:
    """Check the gradients of the cross-entropy at correctly classified images, in float32 as attacks compute them."""
    name, right = "gradients are there", logits.argmax(1) == labels
    if not bool(right.any()):
        return Gate(name, "skip", "no image is classified correctly")
    with torch.enable_grad():
        x = images[right].detach().clone().requires_grad_()
        output = model(x)
        if not output.requires_grad:
            return Gate(name, "fail", "no gradient reaches the pixels")
        slope = torch.autograd.grad(F.cross_entropy(output, labels[right], reduction="sum"), x, allow_unused=True)[0]
    sizes = torch.zeros(int(right.sum())) if slope is None else slope.flatten(1).abs().amax(1)
    dead = int((~torch.isfinite(sizes) | (sizes == 0)).sum())
    detail = f"zero or not finite at {dead} of {len(sizes)} images"
    return _gate(name, dead >= _FEWEST, detail, tested=len(sizes) >= _ENOUGH)


def _keeps_eval_mode(training: list[str], moved: list[str]) -> Gate:
    name = "eval mode is kept"
    if training or moved:
        seen = f"'{training[0]}' is in training mode" if training else f"a pass changes '{moved[0]}'"
        return Gate(name, "fail", seen)
    return Gate(name, "pass", "no module is in training mode, and a pass changes no parameter or buffer")


def _beaten(name: str, where: str, broken: Tensor, total: int, most: float, by: str = "PGD", status: Status = "fail") -> Gate:
    count = int(broken.sum())
    failed = count >= _FEWEST and count > most * total
    detail = f"{count} of {total} images survive {by} but fall to this attack"
    return _gate(f"{name} {where}", failed, detail, tested=total >= _ENOUGH, status=status)


def _converged(where: str, longer: Tensor, again: Tensor, total: int) -> Gate:
    """Check that twice the steps break no more images than PGD from another random start, beyond chance (an exact sign test).

    The smallest difference that is significant is five images. If twice the steps break many more images than the first attack
    without failing this test, the check is flagged.
    """
    gained, lost = int((longer & ~again).sum()), int((again & ~longer).sum())
    chance = float(binomtest(gained, gained + lost, alternative="greater").pvalue) if gained else 1.0
    failed = gained - lost > _MORE_THAN_PGD * total and chance < _CHANCE
    many = int(longer.sum()) > _MUCH_MORE * total
    detail = f"{int(longer.sum())} of {total} images survive PGD but fall to twice its steps"
    detail += f", {int(again.sum())} fall to PGD from another random start" if int(longer.sum()) >= _FEWEST else ""
    status: Status = "fail" if failed else "flag"
    return _gate(f"twice the steps break no more {where}", failed or many, detail, tested=total >= _ENOUGH, status=status)


def _sweep(model: nn.Module, images: Tensor, norm: str, robust: Tensor) -> Gate:
    with evaluating(model), torch.no_grad():
        chance = 1 / model(images[:1]).shape[1]
    share, total = float(robust.double().mean()), len(robust)
    most = chance + 3 * math.sqrt(chance * (1 - chance) / total)
    detail = f"{percent(share)} % of {total} images survive a size that can turn any image grey; chance is {percent(chance)} %"
    return _gate(f"without limit in {norm}, attacks succeed", share > most, detail, tested=total >= _ENOUGH and most < 1)


def _gate(name: str, failed: bool, detail: str, *, tested: bool, status: Status = "fail") -> Gate:
    """The result of a check: with too few images it is skipped instead of passed, but it can still fail."""
    if failed:
        return Gate(name, status, detail)
    return Gate(name, "pass", detail) if tested else Gate(name, "skip", f"too few images to tell: {detail}")


def _whole_box(norm: str, images: Tensor) -> float:
    """A size at which every image can be turned plain grey."""
    return 0.5 if norm == "linf" else 0.5 * math.sqrt(math.prod(images.shape[1:]))


def _size(logits: Tensor) -> float:
    return max(float(logits.abs().max()), 1e-30)
