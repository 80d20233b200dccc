"""Cheap attacks and their combinations against AutoAttack, in accuracy left and in processor time.

    python evaluations/benchmarks/attack_ensembles.py runs/demo/clipped:l2:1.5 runs/adversarial:l2:1.5 \\
        runs/demo/plain:l2:1 runs/demo/clipped:linf:0.1 --out evaluations/benchmarks/results/attack_ensembles.json

Each case is a run of this package, a norm and a size. The first images of its test data are attacked by AutoAttack's standard
version and by every candidate. The worst case of a combination counts an image as robust if every attack of it leaves the image
standing; its time is the sum, since evaluations run every attack on every image. Attacks that minimise the perturbation need
the same time for all sizes. Their distances are compared, image by image, with the smallest distance that PGD reaches on a grid
of sizes from 0.4 to 2 times the size of the case, ``--grid-step`` times apart. Every case is added to those in the JSON file.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_spectral.evaluations.attacks import is_minimal, make_attack, predict, run_attack
from robust_spectral.evaluations.models import load_run
from robust_spectral.evaluations.run_folder import environment, read_json, write_json

SEED = 0
CANDIDATES: dict[str, tuple[str, dict[str, int]]] = {
    "pgd": ("pgd", {}),
    "pgd, 3 restarts": ("pgd", {"restarts": 3}),
    "ddn": ("ddn", {}),
    "ddn, 40 steps": ("ddn", {"steps": 40}),
    "fmn": ("fmn", {}),
    "apgd-t": ("apgd-t", {}),
    "apgd-t, 20 steps": ("apgd-t", {"steps": 20}),
    "apgd-t, 50 steps, 3 targets": ("apgd-t-3", {}),
}
COMBINATIONS = [
    ("pgd", "ddn"), ("pgd", "fmn"), ("pgd", "ddn", "fmn"), ("pgd", "ddn, 40 steps"), ("pgd", "apgd-t"),
    ("pgd", "apgd-t, 20 steps"), ("pgd", "apgd-t, 50 steps, 3 targets"), ("pgd", "ddn", "apgd-t, 20 steps"),
    ("pgd", "ddn", "apgd-t, 50 steps, 3 targets"), ("pgd", "fmn", "apgd-t, 50 steps, 3 targets"),
]  # fmt: skip
GRID = 0.4, 2.0  # multiples of the size of a case


@dataclass(frozen=True)
class Outcome:
    """The smallest distances of an attack, (n,), inf where it failed; which images it leaves standing; processor seconds."""

    distance: Tensor
    stands: Tensor
    seconds: float


def attacked(model: nn.Module, images: Tensor, labels: Tensor, name: str, norm: str, eps: float, **budget: int) -> Outcome:
    """Run one attack on correctly classified images (n, channels, height, width) with labels (n,).

    Raises:
        RuntimeError: the attack failed.
    """
    attack: Any = make_attack(name, norm, eps)
    clock = time.process_time()
    verdict = run_attack(replace(attack, **budget), model, images, labels, SEED)
    if verdict.error:
        raise RuntimeError(f"{name}: {verdict.error}")
    stands = verdict.distance > eps if is_minimal(name) else verdict.distance.isinf()
    return Outcome(verdict.distance, stands, time.process_time() - clock)


def smallest_by_pgd(model: nn.Module, images: Tensor, labels: Tensor, norm: str, sizes: list[float]) -> Tensor:
    """The smallest distance of PGD on a grid of sizes; each size is tried on the images that stand at all smaller ones."""
    distance = torch.full((len(labels),), torch.inf, dtype=torch.float64)
    for eps in sizes:
        left = distance.isinf().nonzero()[:, 0]
        if len(left):
            distance[left] = attacked(model, images[left], labels[left], "pgd", norm, eps).distance
    return distance


def compared(run: str, norm: str, eps: float, count: int, step: float) -> dict[str, Any]:
    """The figures of one case, of ``count`` images, with PGD on a grid with steps of so many times eps."""
    model, data, _ = load_run(Path(run))
    model.eval()
    images, labels = data.test_images(count)
    right = predict(model, images) == labels
    images, labels = images[right], labels[right]
    official = attacked(model, images, labels, "autoattack", norm, eps)

    def row(name: str, *parts: Outcome) -> dict[str, Any]:
        robust, seconds = torch.stack([part.stands for part in parts]).all(0), sum(part.seconds for part in parts)
        told = {"attack": name, "robust": 100 * float(robust.sum()) / count, "seconds": round(seconds, 1),
                "share_of_autoattack": round(seconds / official.seconds, 3),
                "only_by_autoattack": int((robust & ~official.stands).sum()),
                "not_by_autoattack": int((~robust & official.stands).sum())}  # fmt: skip
        print(f"{run} {norm} {eps:g} {told}", flush=True)
        return told

    rows = [row("autoattack", official)]
    found: dict[str, Outcome] = {}
    for label, (name, budget) in CANDIDATES.items():
        if name == "ddn" and norm != "l2":
            continue
        found[label] = attacked(model, images, labels, name, norm, eps, **budget)
        rows.append(row(label, found[label]))
    for names in (names for names in COMBINATIONS if set(names) <= found.keys()):
        rows.append(row(" + ".join(names), *(found[name] for name in names)))
    grid = [eps * (GRID[0] + i * step) for i in range(round((GRID[1] - GRID[0]) / step) + 1)]
    pgd = smallest_by_pgd(model, images, labels, norm, grid)
    minimal = {label: found[label].distance for label in found if is_minimal(CANDIDATES[label][0])}
    if len(minimal) > 1:
        minimal["all of them"] = torch.stack(list(minimal.values())).amin(0)
    distances = [{"attack": label, "no_larger_than_pgd": 100 * float((distance <= pgd).double().mean()),
                  "median": float(distance.median()), "median_of_pgd": float(pgd.median())}
                 for label, distance in minimal.items()]  # fmt: skip
    print(distances, flush=True)
    return {"run": Path(run).name, "norm": norm, "eps": eps, "images": count, "clean": 100 * len(labels) / count,
            "rows": rows, "pgd_grid": {"sizes": len(grid), "step": eps * step}, "distances": distances}  # fmt: skip


def main() -> None:
    """Compare in every case, print a line for each attack, add the case to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help="RUN:NORM:EPS")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--grid-step", type=float, default=0.05, help="in multiples of EPS")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = read_json(options.out)["cases"] if options.out and options.out.is_file() else []
    for case in options.cases:
        run, norm, eps = case.rsplit(":", 2)
        cases.append(compared(run, norm, float(eps), options.images, options.grid_step))
        if options.out:
            write_json(options.out, {"cases": cases} | environment())


if __name__ == "__main__":
    main()
