"""Check `lipschitz_bound` on many random networks against sampled gains: Jacobians and differences, near and far.

    python evaluations/benchmarks/fuzz_graphs.py --networks 10000 --out evaluations/benchmarks/results/fuzz_graphs.json

The networks come from tests/generated_graphs.py, one for each seed; every second one has multiplicative gates and attention,
which have a bound on inputs in [0, 1] only. tests/lipschitz/test_generated_graphs.py checks them. Runs from a checkout, with
one process for each core. Ends with status 1 if any bound fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "lipschitz"))

from generated_graphs import network
from test_generated_graphs import check

from robust_spectral.evaluations.run_folder import environment, write_json


def judge(seed: int) -> tuple[list[str], str | None]:
    """The kinds of steps of a network, and the error of its bound, None if the bound is correct."""
    local = seed % 2 == 1
    try:
        check(random.Random(seed), local)
    except Exception as error:  # noqa: BLE001
        return network(random.Random(seed), local=local).kinds, f"seed {seed}: {type(error).__name__}: {str(error)[:300]}"
    return network(random.Random(seed), local=local).kinds, None


def main() -> int:
    """Check the networks, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first network; the others follow")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seeds, start = range(options.seed, options.seed + options.networks), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.imap(judge, seeds, chunksize=50))
    steps = Counter(kind for kinds, _ in found for kind in kinds)
    failures = [failure for _, failure in found if failure]
    print(*failures, f"{len(found)} networks, {len(failures)} failures; steps: {dict(steps)}", sep="\n")
    if options.out:
        result = {"first seed": options.seed, "seconds": round(time.perf_counter() - start), **environment()}
        write_json(options.out, {**result, "networks": len(found), "failures": failures, "steps": dict(steps)})
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
