"""Attack a finished run and set what the attacks leave standing against what is proved.

Every image goes through all attacks asked for; an adversarial image is put back into the ball and the pixel box in float64
and predicted again before it counts. An image that falls at one size of perturbation has fallen at every larger one. The
verdicts are kept per sample (`samples.parquet`), the figures follow from them (`report.json`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from robust_spectral import LipschitzBound, certified_radius, lipschitz_bound, lipschitz_estimate
from robust_spectral.affine import evaluating

from .attacks import NORMS, find_attack
from .data import data_hash
from .figures import figures
from .finetune import load_run
from .runs import check_device, twin_folders, write_atomically, write_json

Say = Callable[[str], None]
_MOST_OF_IT = 0.99  # of each certified radius that is to be left by rounding in float32, or else float64 is certified


@dataclass(frozen=True)
class AttackPlan:
    """One attack at several sizes of perturbation, on the first ``samples`` images."""

    attack: str
    norm: str
    eps: tuple[float, ...]
    samples: int

    def __post_init__(self) -> None:
        find_attack(self.attack)
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r}: expected one of {', '.join(NORMS)}")
        if not self.eps or not all(e > 0 and math.isfinite(e) for e in self.eps):
            raise ValueError(f"eps {self.eps}: every size of perturbation must be positive and finite")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: attack at least one image")


def evaluate(folder: Path, plans: Sequence[AttackPlan], *, seed: int = 0, device: str = "cpu", say: Say = print) -> None:
    """Evaluate a run, or each twin of a run with twins: writes samples.parquet and report.json beside each model.

    Raises:
        ValueError: the folder is no run, the model does not match its record, or an option is out of range.
    """
    check_device(device)
    if len({(plan.attack, plan.norm) for plan in plans}) < len(plans):
        raise ValueError("evaluate: an attack is asked for twice with the same norm; give it once, with all sizes")
    torch.backends.cudnn.allow_tf32 = False  # what is certified are float32 logits
    for name, run in twin_folders(folder).items():
        _evaluate_run(run, plans, seed, device, _prefixed(say, name))


def _prefixed(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}" if name else text)


def _evaluate_run(folder: Path, plans: Sequence[AttackPlan], seed: int, device: str, say: Say) -> None:
    model, data, run = load_run(folder)
    model = model.to(device).eval()
    if data_hash(*data.test_images(len(data.test))) != run["test_data_sha256"]:  # type: ignore[arg-type]
        raise ValueError(f"{folder}: the test images of {data.name!r} here are not those the run was made with")
    if run["classes"] < 4 and any(plan.attack == "autoattack" for plan in plans):
        raise ValueError(f"{folder}: autoattack, standard version, needs at least 4 classes, the model has {run['classes']}")
    images, labels = (t.to(device) for t in data.test_images(max(plan.samples for plan in plans)))
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(128)])
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{folder}: the model's logits are NaN or infinite")
    bound = lipschitz_bound(model, images[:1])
    estimate = lipschitz_estimate(model, images[:64])
    radii, dtype = certified_radii(model, images, labels, logits, bound)
    predicted = logits.argmax(1)
    say(f"clean accuracy {100 * float((predicted == labels).float().mean()):.1f} % on {len(labels)} images")
    rows = _rows("none", "l2", 0.0, labels, predicted, predicted == labels, torch.zeros_like(radii), radii)
    for plan in plans:
        rows += _run_plan(model, images, labels, predicted, radii, plan, seed, say)
    table = pa.Table.from_pylist(rows)
    write_atomically(folder / "samples.parquet", lambda scratch: pq.write_table(table, scratch))
    write_json(folder / "report.json", figures(run, rows, _lipschitz(bound, estimate, dtype), math.prod(images.shape[1:])))


def _run_plan(
    model: nn.Module, images: Tensor, labels: Tensor, clean: Tensor, radii: Tensor, plan: AttackPlan, seed: int, say: Say
) -> list[dict[str, Any]]:
    """Rows of one attack over its grid, smallest perturbation first."""
    count = min(plan.samples, len(images))
    images, labels, clean, radii = images[:count], labels[:count], clean[:count], radii[:count]
    standing = clean == labels
    predicted, distance = clean.clone(), torch.zeros(count, dtype=torch.float64, device=images.device)
    rows: list[dict[str, Any]] = []
    for eps in sorted(set(plan.eps)):  # what fell keeps the prediction and the distance at which it fell
        alive = standing.nonzero()[:, 0]
        if len(alive):
            x = images[alive]
            with evaluating(model):
                adversarial = find_attack(plan.attack).run(model, x, labels[alive], plan.norm, eps, seed)
                adversarial = into_ball(adversarial, x, plan.norm, eps)
                with torch.no_grad():
                    predicted[alive] = torch.cat([model(batch) for batch in adversarial.split(128)]).argmax(1)
            distance[alive] = size_of(adversarial.double() - x.double(), plan.norm)
            standing = standing & (predicted == labels)
        rows += _rows(plan.attack, plan.norm, eps, labels, predicted, standing, distance, radii)
        say(f"{plan.attack} {plan.norm} eps {eps:g}: {100 * float(standing.float().mean()):.1f} % of {count} images stand")
    return rows


def into_ball(adversarial: Tensor, images: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """Adversarial images put back into the pixel box and the ball of radius eps, or of one of (n, 1, 1, 1), around the images.

    Raises:
        ValueError: a value is not finite.
    """
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


def _rows(
    attack: str, norm: str, eps: float, labels: Tensor, predicted: Tensor, robust: Tensor, distance: Tensor, radii: Tensor
) -> list[dict[str, Any]]:
    columns = zip(labels.tolist(), predicted.tolist(), robust.tolist(), distance.tolist(), radii.tolist(), strict=True)
    return [
        {"sample": i, "label": label, "attack": attack, "norm": norm, "eps": eps, "predicted": guess, "robust": ok,
         "distance": far, "certified_radius": radius, "status": "ok"}
        for i, (label, guess, ok, far, radius) in enumerate(columns)
    ]  # fmt: skip


def certified_radii(
    model: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, bound: LipschitzBound
) -> tuple[Tensor, torch.dtype]:
    """Certified radii and the dtype of the forward pass they are about, float64 where rounding in float32 costs much."""
    single = certified_radius(logits, labels, bound)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = torch.cat([exact(batch.double()) for batch in images.split(128)])
    double = certified_radius(logits, labels, bound)
    kept = double > 0
    if bool(kept.any()) and bool((single[kept] >= _MOST_OF_IT * double[kept]).all()):
        return single, torch.float32
    return double, torch.float64


def _lipschitz(bound: LipschitzBound, estimate: float, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "certified_dtype": str(dtype).removeprefix("torch."),
        "errors": {str(kind).removeprefix("torch."): error for kind, error in bound.errors.items()},
        "bound": bound.value,
        "bound_in_pixel_box": bound.local,
        "estimate": estimate,
        "failure_probability": bound.failure_probability,
        "reason": bound.reason or bound.errors_reason,
    }
