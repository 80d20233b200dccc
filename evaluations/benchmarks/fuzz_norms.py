"""Check `spectral_norm`, and each theorem it chooses from, on many random layers against dense float64 decompositions.

    python evaluations/benchmarks/fuzz_norms.py --layers 20000 --seed 0 --out evaluations/benchmarks/results/fuzz_norms.json

The layers come from tests/generated.py, one for each seed; tests/enclosure.py checks them. Runs from a checkout, with one
process for each core. Ends with status 1 if any bound fails, or if upper / true of `spectral_norm` has a median above 1.02 or
a 99th percentile above 1.2.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from enclosure import Verdict, verdict
from generated import KINDS, generate_layer

from robust_spectral.evaluations.run_folder import environment, write_json

MEDIAN_LIMIT, P99_LIMIT = 1.02, 1.2
COLUMNS = ("layers", "refused", "failures", "median", "p99", "max", "lanczos median", "lanczos p99")


def judge(seed: int) -> Verdict:
    """The verdict on the layer of a seed; any error except a refusal is a failure."""
    layer = generate_layer(seed)
    try:
        return verdict(layer)
    except Exception as error:  # noqa: BLE001
        return Verdict(seed, layer.kind, failures=(f"crash: {type(error).__name__}: {error}",))


def prepare() -> None:
    """Use one thread in this process, and ignore the warning about the copies that padding='same' makes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Using padding='same'")


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """Counts, and quantiles of upper / true over the layers that were not refused."""
    ratios = np.array([v.ratio for v in verdicts if v.refusal is None])
    lanczos = np.array([v.lanczos_ratio for v in verdicts if v.refusal is None])
    wanted = [(ratios, 0.5), (ratios, 0.99), (ratios, 1.0), (lanczos, 0.5), (lanczos, 0.99)]
    numbers = [float(np.quantile(x, q, method="higher")) if len(x) else np.nan for x, q in wanted]
    counts = [len(verdicts), len(verdicts) - len(ratios), sum(bool(v.failures) for v in verdicts)]
    return dict(zip(COLUMNS, [*counts, *numbers], strict=True))


def show(name: str, row: dict[str, Any]) -> None:
    """Print one line of the table."""
    print(f"{name:26s}" + "".join(f"{row[c]:>{len(c) + 2}d}" if c in COLUMNS[:3] else f"{row[c]:>16.9g}" for c in COLUMNS))


def main() -> int:
    """Check the layers, print a row for each kind, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20000, help="number of layers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first layer; the others follow")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    seeds, start = range(options.seed, options.seed + options.layers), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), initializer=prepare) as pool:
        verdicts = list(pool.imap(judge, seeds, chunksize=50))

    kinds = {kind: summary([v for v in verdicts if v.kind == kind]) for kind in KINDS}
    total = summary(verdicts)
    print(f"{'kind':26s}" + "".join(f"  {c}" if c in COLUMNS[:3] else f"{c:>16s}" for c in COLUMNS))
    for name, row in [*kinds.items(), ("all", total)]:
        show(name, row)
    failures = [f"{generate_layer(v.seed)}: {'; '.join(v.failures)}" for v in verdicts if v.failures]
    refusals = [f"seed {v.seed}: {v.kind}: {v.refusal}" for v in verdicts if v.refusal]
    print(*failures, sep="\n")
    print(*refusals, sep="\n")
    if options.out:
        result = {"first seed": options.seed, "seconds": round(time.perf_counter() - start), **environment()}
        write_json(options.out, {**result, "all": total, "kinds": kinds, "failures": failures, "refusals": refusals})
    return int(bool(failures) or not (total["median"] <= MEDIAN_LIMIT and total["p99"] <= P99_LIMIT))


if __name__ == "__main__":
    sys.exit(main())
