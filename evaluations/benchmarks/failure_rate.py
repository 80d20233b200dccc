"""Failure rate of the probabilistic Lanczos bound: 10,000 runs at failure probability 0.01 for each spectrum.

    python evaluations/benchmarks/failure_rate.py --out evaluations/benchmarks/results/failure_rate.json

Diagonal operators suffice, because a uniformly random start makes the singular vectors irrelevant. One dominant value and a
single step are the worst case, where the bound fails almost as often as the probability allows; the spectrum of a convolution
is the usual case. Ends with status 1 if a rate exceeds the probability by more than three standard errors.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, write_json
from robust_spectral.norms import lanczos_interval


def spectra() -> dict[str, Tensor]:
    """Singular values by name, scaled so that the largest is 1."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
    values = rs.circular_singular_values(layer, (4, 6, 6))
    return {
        "one large value": torch.tensor([1.0] + [1e-3] * 49, dtype=torch.float64),
        "equispaced": torch.linspace(1, 0, 50, dtype=torch.float64),
        "convolution": values / values[0],
    }


def diagonal(values: Tensor) -> rs.LinearOperator:
    """The diagonal operator with the given values."""
    n = len(values)
    return rs.LinearOperator((n,), (n,), values.dtype, values.device, lambda X: X * values, lambda Y: Y * values)


def main() -> int:
    """Count failures, print a row for each spectrum and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--probability", type=float, default=0.01)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    p, runs = options.probability, options.runs
    limit = p + 3 * math.sqrt(p * (1 - p) / runs)
    rows, started = [], time.perf_counter()
    for name, values in spectra().items():
        for steps in (1, 5):
            A = diagonal(values)
            failures = sum(lanczos_interval(A, p, rtol=0, max_steps=steps, seed=seed)[1] < 1 for seed in range(runs))
            rows.append({"spectrum": name, "steps": steps, "runs": runs, "failures": failures, "rate": failures / runs})
            print(
                f"{name:18s} {steps} steps: {failures} of {runs} below the norm, at most {limit * runs:.0f} allowed", flush=True
            )
    if options.out:
        seconds = round(time.perf_counter() - started)
        write_json(options.out, {"probability": p, "limit": limit, "rows": rows, "seconds": seconds, **environment()})
    return int(any(row["rate"] > limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
