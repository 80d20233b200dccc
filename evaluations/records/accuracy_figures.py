"""The figures of a report from verdicts per sample: a pure function, so that a report can be recomputed at any time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .attack_checks import autoattack_gate, certificate_gate, pgd_gate
from .distances import at_sizes, curves, l2_radius, smallest
from .network_checks import failed_proofs

Row = dict[str, Any]
Errors = Mapping[tuple[str, str, float | None], str]
SCHEMA = 2  # version of the rows and figures; from 2 on, eps is null for attacks that minimise it, and distances can be inf


def figures(
    run: dict[str, Any], rows: list[Row], lipschitz: dict[str, Any], pixels: int, gates: Sequence[Row] = (),
    errors: Errors | None = None, local: Row | None = None, sizes: Mapping[str, Iterable[float]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compute the report.json of one model.

    Args:
        run: The content of its run.json.
        rows: The rows of its samples.parquet.
        lipschitz: bound, bound_in_pixel_box, estimate, failure_probability, reason, and the certified dtype with its errors.
        pixels: Number of values of an image; an L-inf ball of radius eps lies in the L2 ball of radius eps sqrt(pixels).
        gates: The results of the checks of the model and the attacks: name, status, detail.
        errors: Why an attack failed, by attack, norm and eps.
        local: images, local, dtype, failure_probability and reason of the certificates around single images, if there are any;
            the report then has the keys ``local_certificates`` and ``certified_local``.
        sizes: Sizes for each norm at which attacks that minimise the perturbation are reported, besides those of other attacks.
    """
    clean = [row for row in rows if row["attack"] == "none"]
    stand = [row["robust"] for row in clean]
    found = [row for row in rows if row["attack"] != "none"]
    attacked = at_sizes(found, sizes or {})
    norms = sorted({row["norm"] for row in attacked}) or ["l2"]
    sandwiches = [sandwich(attacked, clean, norm, eps, pixels) for norm, eps in _levels(attacked)]
    own = [_sandwich_gate(sandwiches), certificate_gate(found, pixels), *pgd_gate(found), *autoattack_gate(found)]
    all_gates = [*gates, *own]
    failed = [gate for gate in all_gates if gate["status"] == "fail"]
    skipped = [gate for gate in all_gates if gate["status"] == "skip"]
    broken = failed_proofs(all_gates)
    withdrawn = {"bound": math.inf, "bound_in_pixel_box": math.inf, "reason": f"refuted by a check: {_in_words(broken)}"}
    entries = (*_per_attack(attacked), *map(_worst, sandwiches))

    def proved(around: bool) -> list[Row]:
        return [judged_proof(entry, _in_words(broken)) for norm in norms
                for entry in certified(clean, norm, attacked, pixels, around)]  # fmt: skip

    def judged(entries: Iterable[Row]) -> list[Row]:
        return [_judged(entry, _in_words(failed), _in_words(skipped), errors or {}) for entry in entries]

    return {
        "schema": SCHEMA,
        "model": run["config"]["model"], "defence": run["defence"], "data": run["config"]["data"], "seed": run["seed"],
        "accuracy": {"clean": _share(stand), "n": len(stand), "ci": _with_interval(stand)["ci"]},
        "robust": judged(entries),
        "curves": judged(curves(found)),
        "certified": proved(around=False),
        **({"certified_local": proved(around=True)} if local else {}),
        "lipschitz": lipschitz | withdrawn if broken else lipschitz,
        **({"local_certificates": local | {"local": 0, "reason": withdrawn["reason"]} if broken else local} if local else {}),
        "layers": run["layers"],
        "sandwich": [level | {"certified": None} if broken else level for level in sandwiches],
        "gates": all_gates,
        "config": run["config"], "model_sha256": run["model_sha256"],
        "data_sha256": run["test_data_sha256"], "versions": run["versions"], "hardware": run["hardware"],
        "training_seconds": run["seconds"],
    }  # fmt: skip


def certified(clean: list[Row], norm: str, attacked: list[Row], pixels: int, around: bool = False) -> list[Row]:
    """Certified accuracy at the attacked sizes and on a 1-2-5 grid that extends down to sizes with positive accuracy.

    Args:
        clean: The rows of the images without an attack.
        norm: The norm of the sizes, l2 or linf.
        attacked: The rows of the attacks.
        pixels: Number of values of an image.
        around: Take the images with certificates around single images only, with the larger of both radii; empty if no radius
            rests on the bounds around its image. Default: all images, with the radii of the global bound.
    """
    if around and not any(row.get("certified_by") == "local" for row in clean):
        return []
    attacked_eps = {row["eps"] for row in attacked if row["norm"] == norm}
    whole = math.sqrt(pixels) / l2_radius(norm, pixels)  # no two images with pixels in [0, 1] are farther apart
    sizes = _one_two_five(sorted(min(radius, whole) for radius in _radii(clean, norm, pixels, around)))
    return certified_at(clean, norm, sorted(attacked_eps | set(sizes)), pixels, around)


def certified_at(clean: list[Row], norm: str, grid: list[float], pixels: int, around: bool = False) -> list[Row]:
    """Certified accuracy at the given sizes, of the images and radii that `certified` takes."""
    radii = _radii(clean, norm, pixels, around)
    return [
        {"norm": norm, "eps": eps, "n": len(radii), **_with_interval([radius >= eps for radius in radii])} for eps in grid
    ]  # fmt: skip


def _radii(clean: list[Row], norm: str, pixels: int, around: bool) -> list[float]:
    """Radii in a norm; rows of evaluations without certificates around single images have one radius only, the global one."""
    rows = [row for row in clean if row.get("local_radius") is not None] if around else clean
    column = "certified_radius" if around or not rows or "global_radius" not in rows[0] else "global_radius"
    return [row[column] / l2_radius(norm, pixels) for row in rows]


def judged_proof(entry: Row, refuted: str) -> Row:
    """A certified accuracy with its validity; one that a check refutes has no value, so that nothing shows it as a number."""
    if not refuted:
        return entry | {"valid": True, "reason": None}
    return entry | {"accuracy": None, "ci": None, "valid": False, "reason": refuted}


def sandwich(attacked: list[Row], clean: list[Row], norm: str, eps: float, pixels: int) -> Row:
    """Certified, worst-case, attacked and clean accuracy at one size, on the images that all its attacks were run on.

    The worst case counts every attack in this norm that broke an image within eps, whatever size it was run at.
    """
    verdicts: dict[str, dict[int, bool]] = defaultdict(dict)
    for row in attacked:
        if (row["norm"], row["eps"]) == (norm, eps):
            verdicts[row["attack"]][row["sample"]] = row["robust"]
    common = sorted(set.intersection(*(set(seen) for seen in verdicts.values())))
    by_sample = {row["sample"]: row for row in clean}
    needed = eps * l2_radius(norm, pixels)
    proved = [by_sample[i]["certified_radius"] >= needed for i in common]
    falls = smallest(attacked, norm)
    worst = [falls[i] > eps for i in common]
    attacks = {name: _share([seen[i] for i in common]) for name, seen in verdicts.items()}
    standing = [by_sample[i]["robust"] for i in common]
    contained = all(stands or not certain for stands, certain in zip(worst, proved, strict=True))
    ordered = [_share(proved), _share(worst), *sorted(attacks.values()), _share(standing)]
    return {
        "norm": norm, "eps": eps, "n": len(common), "certified": ordered[0], "worst": ordered[1], "attacks": attacks,
        "clean": ordered[-1], "holds": contained and ordered == sorted(ordered),
        "worst_ci": _with_interval(worst)["ci"],
    }  # fmt: skip


def _in_words(gates: list[Row]) -> str:
    return "; ".join(f"{gate['name']}: {gate['detail']}" for gate in gates)


def _per_attack(attacked: list[Row]) -> list[Row]:
    groups: dict[tuple[str, str, float], list[bool]] = defaultdict(list)
    for row in attacked:
        groups[row["attack"], row["norm"], row["eps"]].append(row["robust"])
    return [
        {"attack": attack, "norm": norm, "eps": eps, **_with_interval(seen), "n": len(seen)}
        for (attack, norm, eps), seen in groups.items()
    ]


def _worst(entry: Row) -> Row:
    return {"attack": "worst case", "norm": entry["norm"], "eps": entry["eps"], "accuracy": entry["worst"],
            "ci": entry["worst_ci"], "n": entry["n"]}  # fmt: skip


def _judged(entry: Row, failed: str, skipped: str, errors: Errors) -> Row:
    """The entry with its validity and the reason: False after a failed check or attack, None if one was skipped, else True."""
    own = next((error for at, error in errors.items() if _concerns(at, entry)), None)
    if own or failed:
        return entry | {"valid": False, "reason": own or failed}
    return entry | ({"valid": None, "reason": f"not tested: {skipped}"} if skipped else {"valid": True, "reason": None})


def _concerns(at: tuple[str, str, float | None], entry: Row) -> bool:
    """Whether an entry rests on an attack, norm and size; None stands for all sizes."""
    attack, norm, eps = at
    of_size = eps == entry["eps"] or None in (eps, entry["eps"])
    return entry["attack"] in (attack, "worst case") and entry["norm"] == norm and of_size


def _sandwich_gate(sandwiches: list[Row]) -> Row:
    broken = [f"{s['norm']} {s['eps']:g}" for s in sandwiches if not s["holds"]]
    detail = f"violated at {', '.join(broken)}" if broken else f"holds at all {len(sandwiches)} sizes"
    return {"name": "certified <= worst case <= attacks <= clean", "status": "fail" if broken else "pass", "detail": detail}


def _levels(attacked: list[Row]) -> list[tuple[str, float]]:
    return sorted({(row["norm"], row["eps"]) for row in attacked})


def _one_two_five(radii: list[float]) -> list[float]:
    """Rounded sizes from below the lower quartile of the positive radii to just above the largest."""
    positive = [radius for radius in radii if 0 < radius < math.inf]
    if not positive:
        return []
    exponents = range(math.floor(math.log10(positive[len(positive) // 4])), math.ceil(math.log10(positive[-1])) + 1)
    steps = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    below = [s for s in steps if s <= positive[len(positive) // 4]][-1:]
    above = [s for s in steps if s > positive[-1]][:1]
    return below + [s for s in steps if positive[len(positive) // 4] < s <= positive[-1]] + above


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _with_interval(flags: list[bool]) -> Row:
    """Accuracy with its 95 % Wilson interval."""
    from scipy.stats import binomtest  # takes as long as all other imports of the pages

    if not flags:
        return {"accuracy": 0.0, "ci": [0.0, 1.0]}
    interval = binomtest(sum(flags), len(flags)).proportion_ci(method="wilson")
    return {"accuracy": _share(flags), "ci": [float(interval.low), float(interval.high)]}
