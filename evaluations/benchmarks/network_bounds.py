"""Lipschitz bounds of timm models against the product of their layers' norms, with time and memory.

    python evaluations/benchmarks/network_bounds.py --out evaluations/benchmarks/results/network_bounds.json

The naive sound bound multiplies the norms of all layers and batch normalisations, each taken separately, adds at sums, and
takes √2 for the difference of two logits. Weights are random, batch normalisations have the statistics of a random batch, and
each model has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from clip_census import calibrate
from torch import nn
from training_overhead import resident_peak

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, write_json
from robust_spectral.lipschitz import Affine, LipschitzWalk, graph_of, pair_of, preserved
from robust_spectral.numerics import product_up
from robust_spectral.operators import full_precision_no_grad

MODELS = {
    "test_resnet": 64, "resnet18": 64, "resnet50": 64, "dla34": 64, "mobilenetv2_035": 64, "densenet121": 64,
    "resnet18@224": 224,
}  # fmt: skip


class Apart(LipschitzWalk):
    """A walk in which every layer and batch normalisation counts separately."""

    def bound_of(self, last: float | Affine) -> float:
        """The norm of the last step times the bound of its input."""
        return last if isinstance(last, float) else product_up(self.bound(last.source), self.step_norm(last))


def naive_bound(model: nn.Module, example: torch.Tensor) -> float:
    """The product of the norms of separate layers."""
    pair = pair_of(example)
    with preserved(model), full_precision_no_grad():
        graph = graph_of(model, pair)
        walk = Apart(graph, graph.values(pair), 1e-9)
        walk.run()
    return walk.value


def entry(name: str) -> dict[str, Any]:
    """The row of one model."""
    torch.manual_seed(0)
    size = MODELS[name]
    model, example = timm.create_model(name.partition("@")[0], num_classes=10).eval(), torch.zeros(1, 3, size, size)
    calibrate(model, size)
    before, clock = resident_peak(), time.perf_counter()
    found = rs.lipschitz_bound(model, example)
    row = {"model": name, "input": size, "bound": found.value, "seconds": time.perf_counter() - clock,
           "peak_memory_mib": resident_peak(), "memory_before_mib": before}  # fmt: skip
    assert found.pairs is not None
    pair, naive = float(found.pairs.max()), naive_bound(model, example)
    estimate = rs.lipschitz_estimate(model, torch.rand(4, 3, size, size))
    return {**row, "largest_pair": pair, "naive": naive, "naive_over_bound": naive / found.value,
            "naive_over_largest_pair": math.sqrt(2) * naive / pair, "estimate": estimate,
            "errors": {str(kind): error for kind, error in found.errors.items()}}  # fmt: skip


def main() -> None:
    """Measure every model, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(entry(options.model)))
        return
    rows = []
    for name in options.models:
        command = [sys.executable, "-W", "ignore", __file__, "--model", name]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
    if options.out:
        write_json(options.out, {"rows": rows, **environment()})


if __name__ == "__main__":
    main()
