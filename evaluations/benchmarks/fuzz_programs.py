"""Check `lipschitz_bound` on many random programs against sampled gains: differences, near and far, in batches and modes.

    python evaluations/benchmarks/fuzz_programs.py --programs 5000 --out evaluations/benchmarks/results/fuzz_programs.json

The programs come from tests/generated_programs.py, one for each seed: small networks whose ``forward`` writes in place, asks
about its input, keeps state, is hooked or replaced, and so on. A bound below a sampled gain is unsound; a refusal is not an
error, and is expected for the kinds that no recorded graph covers. tests/program_gains.py checks each program. Runs from a
checkout, with one process for each core. Ends with status 1 if any bound is unsound or any call raises.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from generated_programs import KINDS, UNSEEN
from program_gains import Verdict, check

from robust_spectral.evaluations.run_folder import environment, write_json


def judge(seed: int) -> Verdict:
    """The verdict on a program; an error of the check itself counts as raised."""
    try:
        return check(seed)
    except Exception as error:  # noqa: BLE001
        return Verdict("raised", f"in the check: {type(error).__name__}: {str(error)[:300]}", [])


def shares(found: list[Verdict]) -> dict[str, Any]:
    """The number of programs, and how many have a finite bound, are unsound, and raise."""
    results = Counter(verdict.result for verdict in found)
    finite = round(results["finite"] / max(1, len(found)), 4)
    return {"programs": len(found), "finite share": finite, "unsound": results["unsound"], "raised": results["raised"]}


def by_kind(found: list[Verdict]) -> dict[str, dict[str, Any]]:
    """The figures of each kind of twist: over all programs that have it, and over those that have no other."""
    table = {}
    for kind in KINDS:
        having = [verdict for verdict in found if kind in verdict.kinds]
        alone = [verdict for verdict in having if len(verdict.kinds) == 1]
        figures = {**shares(having), "share": round(len(having) / len(found), 4)}
        table[kind] = {**figures, "alone": shares(alone), "seen": kind not in UNSEEN}
    return table


def main() -> int:
    """Check the programs, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first program; the others follow")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seeds, start = range(options.seed, options.seed + options.programs), time.perf_counter()
    pool = multiprocessing.get_context("spawn").Pool(options.processes, initializer=torch.set_num_threads, initargs=(1,))
    with pool:
        found = list(pool.imap(judge, seeds, chunksize=20))
    bad = [(seed, verdict) for seed, verdict in zip(seeds, found, strict=True) if verdict.result in ("unsound", "raised")]
    failures = [f"seed {seed}: {verdict.result}: {verdict.kinds}: {verdict.detail}" for seed, verdict in bad]
    seen = shares([verdict for verdict in found if not set(verdict.kinds) & set(UNSEEN)])
    table = by_kind(found)
    print(*failures, sep="\n")
    print(f"{'kind':30} programs  share  finite  unsound  raised   alone  finite  unsound  raised")
    for kind, row in table.items():
        alone = row["alone"]
        print(f"{kind:30} {row['programs']:8} {row['share']:6.1%} {_figures(row)} {alone['programs']:7} {_figures(alone)}")
    print(f"{len(found)} programs: {shares(found)}; of kinds that a recorded graph can cover: {seen}")
    if options.out:
        result = {"first seed": options.seed, "seconds": round(time.perf_counter() - start), **environment()}
        write_json(options.out, {**result, **shares(found), "seen": seen, "kinds": table, "failures": failures})
    return int(bool(failures))


def _figures(row: dict[str, Any]) -> str:
    return f"{row['finite share']:7.1%} {row['unsound']:8} {row['raised']:7}"


if __name__ == "__main__":
    sys.exit(main())
