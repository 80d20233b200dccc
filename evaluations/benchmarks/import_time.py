"""Time of `import robust_spectral` over `import torch`, in alternating fresh processes, so that slow moments affect both.

    python evaluations/benchmarks/import_time.py --out evaluations/benchmarks/results/import_time.json

Each process measures its own import, without the start of Python. The ratio is the median over the pairs. The core imports
numpy as well, but no host library.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from robust_spectral.evaluations.run_folder import environment, write_json

TIMED = "import time; clock = time.perf_counter(); import {}; print(time.perf_counter() - clock)"


def seconds(module: str) -> float:
    """Seconds of an import in a process of its own."""
    command = [sys.executable, "-c", TIMED.format(module)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(run.stdout)


def main() -> None:
    """Time the pairs, print the ratio, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    modules = ("torch", "robust_spectral")
    for module in modules:  # fills the file cache
        seconds(module)
    pairs = []
    for index in range(options.pairs):
        order = modules if index % 2 else modules[::-1]
        pairs.append({module: seconds(module) for module in order})
    ratios = [pair["robust_spectral"] / pair["torch"] for pair in pairs]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    medians = {module: statistics.median(pair[module] for pair in pairs) for module in modules}
    print(", ".join(f"{module} {value:.3f} s" for module, value in medians.items()))
    print(f"ratio {ratio:.3f}, quartiles {low:.3f} to {high:.3f}")
    if options.out:
        write_json(options.out, {
            "pairs": options.pairs, "seconds": medians, "ratio": ratio, "quartiles": [low, high], **environment(),
        })  # fmt: skip


if __name__ == "__main__":
    main()
