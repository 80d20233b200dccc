"""Check certificates around single images on many random networks against searches for smaller margins.

    python evaluations/benchmarks/fuzz_certificates.py --networks 5000 \
        --out evaluations/benchmarks/results/fuzz_certificates.json
    python evaluations/benchmarks/fuzz_certificates.py --networks 0 --planted 20 \
        --out evaluations/benchmarks/results/fuzz_planted.json
    python evaluations/benchmarks/fuzz_certificates.py --radii --images 500 \
        --out evaluations/benchmarks/results/fuzz_radii.json

The networks come from tests/generated_certificates.py, one for each seed, with one to ten images, a radius for each and a
box. A margin of `certify` above one that gradient and sign steps find in the ball and the box is unsound. A float64 model has
an allowance of 1e-12 of its largest logit, for the rounding of the search. With ``--planted N`` every rule is made wrong in
turn: up to N networks with its operation are checked with its errors 0.3, 0.1 and 0.03 times what they are, until one is
unsound.

With ``--radii``, networks of several families are trained on digits, and every image is attacked at its own largest proved
radius: tests/radius_attacks.py. The same attacks at 1.5 to 4 times the distance of a minimal attack must find what they are to
find. Runs from a checkout. Ends with status 1 if anything is unsound or raises, or if a planted fault is not found.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from generated_certificates import OPERATIONS, Verdict, case, check, wrong
from radius_attacks import figures
from radius_networks import FAMILIES, trained

from robust_spectral.evaluations.run_folder import environment, write_json

FACTORS = (0.3, 0.1, 0.03)  # of a rule's errors, until one is found; loose rules may be sound with less than their errors


def judge(seed: int) -> Verdict:
    """The verdict on a case; an error of the check itself counts as raised."""
    try:
        return check(case(seed))
    except Exception as error:  # noqa: BLE001
        return Verdict("raised", f"in the check: {type(error).__name__}: {str(error)[:300]}", [])


def shares(found: list[Verdict]) -> dict[str, Any]:
    """The number of networks, the share of those with bounds around all images, and how many are unsound, and raise."""
    results = Counter(verdict.result for verdict in found)
    finite = round(results["proved"] / max(1, len(found)), 4)
    counts = {"networks": len(found), "images": sum(verdict.images for verdict in found)}
    return {**counts, "finite share": finite, "unsound": results["unsound"], "raised": results["raised"]}


def by_operation(found: list[Verdict]) -> dict[str, dict[str, Any]]:
    """The figures of all networks that have an operation with an error of its own, and how often they have it."""
    steps = Counter(operation for verdict in found for operation in verdict.operations)
    having = {operation: [v for v in found if operation in v.operations] for operation in sorted(steps)}
    return {operation: {"errors": steps[operation], **shares(having[operation])} for operation in having}


def planted(operation: Any, tries: int) -> dict[str, Any]:
    """The largest factor of an operation's errors for which a network is unsound, and how many were checked for it."""
    for factor in FACTORS:
        for seed in range(tries):
            with wrong(operation, factor):
                verdict = check(case(seed, operation))
            if verdict.result == "unsound":
                return {"found": True, "factor": factor, "networks": seed + 1}
    return {"found": False, "factor": FACTORS[-1], "networks": tries}


def random_networks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check planted faults and random networks; the result so far, after every 25 networks and at the end."""
    wanted = OPERATIONS if options.planted else []
    faults = {}
    for operation in wanted:
        faults[str(operation)] = row = planted(operation, options.planted)
        outcome = "found" if row["found"] else "NOT FOUND"
        print(f"{operation!s:45} times {row['factor']}: {outcome} in {row['networks']} networks", flush=True)
        yield {"right": all(row["found"] for row in faults.values()), "planted": faults}
    found: list[Verdict] = []
    failures: list[str] = []
    seeds = range(options.seed, options.seed + options.networks)
    for seed, verdict in zip(seeds, judged(seeds, options.processes), strict=True):
        found.append(verdict)
        if verdict.result in ("unsound", "raised"):
            failures.append(f"seed {seed}: {verdict.result}: {sorted(set(verdict.operations))}: {verdict.detail}")
            print(failures[-1], flush=True)
        if len(found) % 25 == 0 or len(found) == len(seeds):
            reasons = Counter(v.detail.split(" (at ")[0][:120] for v in found if v.result == "refused").most_common(40)
            right = not failures and all(row["found"] for row in faults.values())
            result = {"first seed": options.seed, **shares(found), "right": right, "operations": by_operation(found)}
            yield {**result, "failures": failures, **({"planted": faults} if faults else {}), "refusals": dict(reasons)}


def table(result: dict[str, Any]) -> str:
    """The printed table of random networks."""
    rows = [f"{'operation with an error':45} errors networks images  finite  unsound  raised"]
    for name, row in {**result["operations"], "all": {"errors": "", **result}}.items():
        counts = f"{row['errors']:6} {row['networks']:8} {row['images']:6}"
        rows.append(f"{name:45} {counts} {row['finite share']:7.1%} {row['unsound']:8} {row['raised']:7}")
    return "\n".join(rows)


def judged(seeds: range, processes: int) -> Iterator[Verdict]:
    """The verdicts on cases, in order."""
    prepare()
    if processes == 1:
        yield from map(judge, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=prepare) as pool:
        yield from pool.imap(judge, seeds, chunksize=10)


def prepare() -> None:
    """One thread, and few passes of the garbage collector, which else take a fifth of the time."""
    torch.set_num_threads(1)
    gc.set_threshold(200_000, 50, 50)


def attacked_radii(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Attack images at their radii; the result so far, after every network."""
    prepare()
    rows = []
    for name in options.only or FAMILIES:
        rows.append({"network": name, **figures(*trained(name, options.images))})
        print(line(rows[-1]), flush=True)
        total = {key: sum(row[key] for row in rows) for key in ("images", "proved", "broken")}
        least = min(min(row["found beyond"].values()) for row in rows)
        right = total["broken"] == 0 and least > 0.95
        yield {**total, "least share found beyond": least, "right": right, "networks": rows}


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    numbers = f"{row['images']:4} images, {row['proved']:4} with a radius, median {row['median radius']:.4f}"
    beyond = ", ".join(f"{factor} x {share:.1%}" for factor, share in row["found beyond"].items())
    found = f"{row['broken']} broken; found at {beyond}"
    return f"{row['network']:24} {row['dtype']} {numbers} of {row['median distance']:.4f}; {found}"


def main() -> int:
    """Check the certificates, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first network; the others follow")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--planted", type=int, default=0, help="most networks for each rule that is made wrong")
    parser.add_argument("--radii", action="store_true", help="attack images of trained networks at their radii instead")
    parser.add_argument("--images", type=int, default=500, help="most images of each trained network")
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), help="families of trained networks")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start, result = time.perf_counter(), {"right": True}
    for result in attacked_radii(options) if options.radii else random_networks(options):
        if options.out:  # so that a stop loses little
            write_json(options.out, {"seconds": round(time.perf_counter() - start), **environment(), **result})
    if not options.radii and options.networks:
        print(table(result))
    return int(not result["right"])


if __name__ == "__main__":
    sys.exit(main())
