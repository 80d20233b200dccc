"""The computation of each kind of unit: clean logits, the Lipschitz bound, the checks, an attack on a block of images.

A unit of work depends only on the run folder and its own description, so any process on any machine with the folder can do it.
The result is a record, which `run_units` writes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_spectral import LipschitzBound, __version__, lipschitz_bound, lipschitz_estimate
from robust_spectral.lipschitz import disagreement, full_precision

from ..attacks import HARNESS, describe, is_minimal, make_attack, predict, run_attack
from ..data import ImageData, data_hash
from ..models import restore
from ..records import NETWORK_CHECKS, Record, Unit, bound_gate, graph_gate
from ..run_folder import Run, environment, open_run
from .evaluated_images import COVERAGE, ordered
from .gates import VERSION, check_attacks, check_model
from .radii import BLOCK, PIXELS, SETTINGS, LocalRadii, prove_around

DEFAULT_ATTACKS = {"l2": ("pgd", "ddn", "apgd-t-3"), "linf": ("pgd", "apgd-t")}  # nearly as strong as AutoAttack, in less time
CHECKS = {"gates": VERSION, "harness": HARNESS, "network": NETWORK_CHECKS, "classes": COVERAGE}  # versions that a report has
_FOR_ESTIMATE = 64  # number of images at which Jacobian norms are sampled
_FOR_GRAPH = 16  # number of images on which the graph that is bounded is compared with the model


@dataclass(frozen=True)
class Subject:
    """A run loaded onto a device: the model in eval mode, the data, and the opened run."""

    model: nn.Module
    data: ImageData
    run: Run


def open_subject(run: Run, device: str) -> Subject:
    """Load the model and data of a run; once in a process, as long as its run.json stays the same.

    Raises:
        ValueError: the model's weights or the test images are not the recorded ones.
    """
    return _subject(run.folder, device, (run.folder / "run.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _subject(folder: Path, device: str, written: int) -> Subject:
    run = open_run(folder)
    model, data = restore(run)
    if data_hash(data) != run.record["test_data_sha256"]:
        raise ValueError(f"{folder}: the test images of {data.name!r} here differ from those of the run")
    return Subject(model.to(device).eval(), data, run)


@dataclass(frozen=True)
class AttackPlan:
    """One attack on the first ``samples`` images of the evaluation's order, at several sizes.

    An attack that minimises the perturbation is run once, and its accuracy is reported at these sizes.
    """

    attack: str
    norm: str
    eps: tuple[float, ...]
    samples: int

    def __post_init__(self) -> None:
        if not self.eps or not all(e > 0 and math.isfinite(e) for e in self.eps):
            raise ValueError(f"eps {self.eps}: every size of perturbation must be positive and finite")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: attack at least one image")
        make_attack(self.attack, self.norm, self.eps[0])

    @property
    def runs(self) -> list[float | None]:
        """The sizes of the runs of the attack, in ascending order; a single None if it minimises the perturbation."""
        return [None] if is_minimal(self.attack) else [*sorted(set(self.eps))]


def sizes(given: Sequence[str | float]) -> tuple[float, ...]:
    """Parse sizes of perturbations: numbers, or fractions such as 8/255.

    Raises:
        ValueError: a size is neither a number nor a fraction.
    """
    try:
        return tuple(float(Fraction(size)) for size in given)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        told = ", ".join(map(str, given))
        raise ValueError(f"eps {told}: expected positive numbers or fractions, such as 0.5 or 8/255") from error


def images_to_certify(given: str | int, plans: Sequence[AttackPlan]) -> int:
    """Parse the number of images that are certified one by one: a whole number, or ``all`` for all that are attacked.

    Raises:
        ValueError: anything else is given.
    """
    if given == "all":
        return max(plan.samples for plan in plans)
    if not str(given).isdecimal():
        raise ValueError(f"local_certificates {given!r}: expected a number of images, 0 for none, or all")
    return int(given)


@dataclass(frozen=True)
class Work:
    """All units of an evaluation, by kind.

    Attributes:
        lipschitz: The bound and estimate of the network.
        clean: Logits of the images, block by block.
        gates: The checks, for each norm.
        attacks: The blocks of each attack, norm and size; the size is None for an attack that minimises the perturbation.
        sizes: All sizes of perturbation in each norm, in ascending order.
        local: The radii around the first images, block by block.
        sample_order: The record of the order of the images; None for the data set's own order.
    """

    lipschitz: Unit
    clean: list[Unit]
    gates: list[Unit]
    attacks: dict[tuple[str, str, float | None], list[Unit]]
    sizes: dict[str, list[float]]
    local: list[Unit] = field(default_factory=list)
    sample_order: dict[str, Any] | None = None

    @property
    def units(self) -> list[Unit]:
        """All units, long ones before short ones of their kind: a long unit at the end would leave other processes idle."""
        longest_first = sorted(self.attacks.items(), key=lambda item: "autoattack" not in item[0][0])
        attacks = (unit for _, blocks in longest_first for unit in blocks)
        return [self.lipschitz, *self.clean, *self.gates, *self.local, *attacks]


def plan_work(
    run: dict[str, Any], images: int, plans: Sequence[AttackPlan], seed: int, block: int, gate_samples: int,
    local_certificates: int = 0, sample_order: dict[str, Any] | None = None,
) -> Work:  # fmt: skip
    """Plan the units for attacks on a run with ``images`` test images, of which the first ones are certified one by one.

    The first images are those of the recorded ``sample_order``, or without one of the data set's own order.
    """

    def unit(task: str, config: dict[str, Any], start: int, stop: int) -> Unit:
        return Unit(run["model_sha256"], run["test_data_sha256"], task, config, start, stop, seed, sample_order)

    def blocks(task: str, config: dict[str, Any], count: int, block: int = block) -> list[Unit]:
        count = min(count, images)
        return [unit(task, config, start, min(start + block, count)) for start in range(0, count, block)]

    ours = {"package": f"robust_spectral {__version__}", "harness": HARNESS}
    samples = max(plan.samples for plan in plans)
    by_norm = {plan.norm: sorted({e for other in plans if other.norm == plan.norm for e in other.eps}) for plan in plans}
    return Work(
        unit("lipschitz", {"version": NETWORK_CHECKS, **ours}, 0, min(_FOR_ESTIMATE, images)),
        blocks("clean", ours, samples),
        [
            unit("gates", {"norm": norm, "eps": eps[len(eps) // 2], "version": VERSION, **ours}, 0, min(gate_samples, images))
            for norm, eps in by_norm.items()
        ],
        {
            (plan.attack, plan.norm, eps): blocks(plan.attack, describe(make_attack(plan.attack, plan.norm, eps)), plan.samples)
            for plan in plans
            for eps in plan.runs
        },
        by_norm,
        blocks("local-certificates", {**SETTINGS, **ours}, min(local_certificates, samples), BLOCK),
        sample_order,
    )


def do_unit(folder: Path, unit: Unit, device: str) -> tuple[Record, float, dict[str, Any]]:
    """Do a unit; return its record, the seconds it took, and the hardware.

    Raises:
        ValueError: as `open_subject`; the model's logits are not finite; or the attack or the images here are not the planned.
    """
    subject = open_subject(open_run(folder), device)
    places = ordered(subject.data, unit.sample_order)[unit.start : unit.stop]
    images, labels = (tensor.to(device) for tensor in subject.data.images_at(places.tolist()))
    started = time.perf_counter()
    tasks = {"clean": _clean, "lipschitz": _lipschitz, "gates": _gates, "local-certificates": _local}
    with full_precision(torch.device(device)):
        record = tasks.get(unit.task, _attack)(subject.model, images, labels, unit)
    return record, time.perf_counter() - started, environment(device)["hardware"]


def _clean(model: nn.Module, images: Tensor, labels: Tensor, unit: Unit) -> Record:
    """Logits in float32 and float64; the latter are NaN, and nothing is certified, if the model does not run in float64."""
    predict(model, images)
    with torch.no_grad():
        logits = model(images)
        try:
            exact = copy.deepcopy(model).double()(images.double()).double()
        except RuntimeError:
            exact = torch.full_like(logits, torch.nan, dtype=torch.float64)
    return Record({"logits": logits, "logits_float64": exact, "labels": labels}, {"device": images.device.type})


def _lipschitz(model: nn.Module, images: Tensor, labels: Tensor, unit: Unit) -> Record:
    """The bound and what may refute it: the largest Jacobian norm at the images, and how its graph differs from the model."""
    try:
        bound = lipschitz_bound(model, images[:1], box=PIXELS)
    except RuntimeError as error:
        bound = LipschitzBound(math.inf, reason=f"the network could not be bounded: {error}")
    try:
        estimate = lipschitz_estimate(model, images)
    except RuntimeError:
        estimate = math.nan  # no gradient reaches the pixels, which a check reports
    claimed = math.isfinite(min(bound.value, bound.local))
    boxed = bool(((images >= PIXELS[0]) & (images <= PIXELS[1])).all())
    rounding = 2 * bound.errors.get(images.dtype, math.inf) if boxed else math.inf
    differs = disagreement(model, images[:_FOR_GRAPH], rounding) if claimed else None
    errors = {str(dtype).removeprefix("torch."): repr(error) for dtype, error in bound.errors.items()}
    told = {"value": repr(bound.value), "local": repr(bound.local), "failure_probability": bound.failure_probability,
            "reason": bound.reason, "errors": errors, "errors_reason": bound.errors_reason,
            "estimate": repr(estimate), "differs": differs, "boxed": boxed, "device": images.device.type,
            "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    return Record({} if bound.pairs is None else {"pairs": bound.pairs}, told)


def bound_of(record: Record) -> LipschitzBound:
    """The proved bound in a record."""
    told = record.told
    errors = {getattr(torch, name): float(error) for name, error in told["errors"].items()}
    return LipschitzBound(
        float(told["value"]), reason=told["reason"], failure_probability=told["failure_probability"],
        local=float(told["local"]), pairs=record.tensors.get("pairs"), errors=errors, errors_reason=told["errors_reason"],
    )  # fmt: skip


def _local(model: nn.Module, images: Tensor, labels: Tensor, unit: Unit) -> Record:
    return prove_around(model, images, labels, unit.config)


def network_gates(record: Record, around: LocalRadii | None = None) -> list[dict[str, Any]]:
    """The checks of the bound in a record, and of the graph that it and the radii around images are of."""
    told = record.told
    bound, boxed, estimate = (float(told[key]) for key in ("value", "local", "estimate"))
    claimed = math.isfinite(min(bound, boxed)) or (around is not None and bool((around.radii > 0).any()))
    differs = told["differs"] or (around.differs if around else None)
    return [bound_gate(bound, boxed if told["boxed"] else math.inf, estimate), graph_gate(claimed, differs)]


def _gates(model: nn.Module, images: Tensor, labels: Tensor, unit: Unit) -> Record:
    right = predict(model, images) == labels
    found = check_model(model, images, labels)
    found += check_attacks(model, images[right], labels[right], unit.config["norm"], unit.config["eps"], unit.seed)
    failed = next((gate.detail for gate in found if gate.detail.startswith("an attack failed")), None)
    return Record({}, {"gates": [asdict(gate) for gate in found], "error": failed})


def _attack(model: nn.Module, images: Tensor, labels: Tensor, unit: Unit) -> Record:
    """The verdicts of an attack on a block, with the adversarial images that fooled the model."""
    attack = make_attack(unit.task, unit.config["norm"], unit.config["eps"])
    if describe(attack) != unit.config:
        raise ValueError(f"{unit.task}: this process has {describe(attack)}, but the work was planned with {unit.config}")
    predicted, distance = predict(model, images), torch.zeros(len(labels), dtype=torch.float64, device=images.device)
    right = (predicted == labels).nonzero()[:, 0]
    error, adversarial = None, images[:0]
    if len(right):
        verdict = run_attack(attack, model, images[right], labels[right], unit.seed)
        fell = verdict.predicted != labels[right]
        predicted[right], distance[right], error = verdict.predicted, verdict.distance, verdict.error
        adversarial, right = verdict.adversarial[fell], right[fell]
    tensors = {"predicted": predicted, "distance": distance, "labels": labels, "fallen": right, "adversarial": adversarial}
    return Record(tensors, {"error": error})
