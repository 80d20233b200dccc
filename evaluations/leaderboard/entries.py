"""The models under a folder of runs, each with its figures, from reports of this version or of an older one.

A folder counts as a run if it has a report.json. For a run with twins, the twins count and the parent does not. Keys that a
report lacks become None, and so do numbers that are not finite, except a bound, which becomes infinite. Folders that cannot be
read are reported and left out. A run that failed a check has no valid figure of an attack, whichever version wrote it, and a
run whose certificates were refuted has no certified figure and no bound.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records import bound_gate, failed_proofs
from ..run_folder import begun, open_run, read_json
from ..wording import images_in_words, local_in_words, portable

Figures = dict[str, Any]
NOT_FAILED = ("pass", "flag", "skip")
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OSError)


@dataclass(frozen=True)
class Entry:
    """A model: the name of its page, the path of its run under the root, the run folder, and its figures with every key."""

    id: str
    run: str
    folder: Path
    figures: Figures


def read_entries(root: Path, say: Callable[[str], None]) -> list[Entry]:
    """Read every evaluated model under a folder, in the order of their paths.

    Args:
        root: Folder to search, with all folders under it.
        say: Called with one line for each run that is left out, with the reason.
    """
    found = []
    marks = ("run.json", "report.json", "config.json")
    for folder in sorted({path.parent for path in root.rglob("*.json") if path.name in marks}):
        for run, report in _reports(folder, "" if folder == root else folder.relative_to(root).as_posix(), say):
            try:
                found.append((run or root.resolve().name, root / run, completed(report)))
            except MALFORMED as error:
                say(f"{root / run}: left out: {_told(error)}")
    names = _page_names([run for run, _, _ in found])
    return [Entry(name, *rest) for name, rest in zip(names, found, strict=True)]


def completed(report: Figures) -> Figures:
    """The figures of one model, with every key present.

    Raises:
        ValueError: there is no figure of an attack, or a figure is not a share.
        KeyError, TypeError, AttributeError: it is not a report.
    """
    if not report.get("accuracy") or not report.get("robust"):
        raise ValueError("not evaluated: no figures of an attack in its report.json; run `robust-spectral evaluate` on it")
    clean = {**report["accuracy"], "accuracy": report["accuracy"]["clean"], "valid": True}
    gates = [{key: str(gate.get(key, "unknown")) for key in ("name", "status", "detail")} for gate in report.get("gates") or []]
    lipschitz = _lipschitz(report.get("lipschitz"))
    gates += _refuted_bound(lipschitz, [gate["name"] for gate in gates])
    failed = [gate for gate in gates if gate["status"] not in NOT_FAILED]
    proof_failed = [gate for gate in failed if "certified" in gate["name"]]
    if proof_failed and report.get("lipschitz"):
        lipschitz |= {
            "bound": math.inf,
            "bound_in_pixel_box": math.inf,
            "reason": f"refuted by a check: {_in_words(proof_failed)}",
        }
    proved = {key: [_attack({"attack": "certified", "valid": True, **entry}) for entry in report.get(key) or []]
              for key in ("certified", "certified_local")}  # fmt: skip
    config = report.get("config") or {}
    return {
        "model": str(report["model"]), "defence": str(report.get("defence", "unknown")),
        "data": portable(report.get("data", "unknown")), "seed": report.get("seed"), "clean": _accuracy(clean),
        "robust": [_judged(_attack(entry), failed) for entry in report["robust"]],
        "curves": [_judged(_curve(entry), failed) for entry in report.get("curves") or []],
        **{key: [_without_value(_judged(entry, proof_failed)) for entry in entries] for key, entries in proved.items()},
        "local_certificates": _local(None if proof_failed else report.get("local_certificates")), "gates": gates,
        "images": images_in_words(report), "sample_order": _order(report),
        "lipschitz": lipschitz, "layers": [_layer(layer) for layer in report.get("layers") or []],
        "config": {str(key): portable(value) for key, value in config.items() if value is not None},
        "versions": {str(key): str(value) for key, value in (report.get("versions") or {}).items()},
        "hardware": {str(key): str(value) for key, value in (report.get("hardware") or {}).items()},
        "command": portable(report["command"]) if report.get("command") else None,
        **{key: str(report[key]) if report.get(key) else None for key in ("model_sha256", "data_sha256")},
        **{key: _finite(report.get(key)) for key in ("training_seconds", "attack_seconds", "parameters")},
    }  # fmt: skip


def _reports(folder: Path, run: str, say: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """The report of a folder; for twins without a report of their own, the reports nested in it."""
    try:
        if not (folder / "report.json").is_file():
            if not (folder / "run.json").is_file() and not begun(folder):
                return  # another program's config.json
            if not open_run(folder).has_twins:
                say(f"{folder}: left out: not evaluated; run `robust-spectral evaluate` on it")
            return
        report = read_json(folder / "report.json")
        for name, nested in report.get("models", {"": report}).items():
            if not name or not (folder / Path(name).name / "report.json").is_file():
                yield "/".join(filter(None, (run, Path(name).name))), nested
    except MALFORMED as error:
        say(f"{folder}: left out: {_told(error).removeprefix(f'{folder}: ')}")


def _accuracy(entry: Figures) -> Figures:
    """Accuracy, images, interval and validity (None: not recorded, or not tested). Without a figure, valid is False."""
    share, ci, n = _finite(entry["accuracy"]), entry.get("ci"), _finite(entry.get("n"))
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"accuracy {share}: not a share between 0 and 1")
    valid = False if share is None else entry.get("valid")
    if valid not in (True, False, None):
        raise ValueError(f"valid {valid!r}: neither true nor false")
    reason = entry.get("reason")
    if valid is False:
        reason = reason or ("no reason was recorded" if share is not None else "no figure was recorded")
    return {
        "accuracy": share, "n": None if n is None else int(n), "ci": [float(end) for end in ci] if ci else None,
        "valid": valid, "reason": None if reason is None or valid else str(reason),
    }  # fmt: skip


def _attack(entry: Figures) -> Figures:
    named = {"attack": str(entry["attack"]), "norm": str(entry["norm"]), "eps": float(entry["eps"])}
    return {**named, **_accuracy(entry), "seconds": _finite(entry.get("seconds"))}


def _curve(entry: Figures) -> Figures:
    """Accuracy at every size, by an attack that minimises the perturbation or by all attacks."""
    steps = {key: [float(value) for value in entry[key]] for key in ("sizes", "accuracies")}
    return {"attack": str(entry["attack"]), "norm": str(entry["norm"]), **steps, "valid": entry.get("valid"),
            "reason": entry.get("reason")}  # fmt: skip


def _judged(cell: Figures, failed: list[Figures]) -> Figures:
    """A figure, not valid if a check that it depends on has failed."""
    if not failed or cell["valid"] is False:
        return cell
    return {**cell, "valid": False, "reason": f"failed the check {_in_words(failed)}"}


def _without_value(cell: Figures) -> Figures:
    """A certified figure; an invalid one has no value, because a refuted proof says nothing about the model."""
    return {**cell, "accuracy": None, "ci": None} if cell["valid"] is False else cell


def _refuted_bound(lipschitz: Figures, names: list[str]) -> list[Figures]:
    """The failed check of a bound below its estimate, for reports of versions that did not make it."""
    bound, local, estimate = (lipschitz[key] for key in ("bound", "bound_in_pixel_box", "estimate"))
    if bound is None or estimate is None:
        return []
    return [gate for gate in failed_proofs([bound_gate(bound, math.inf if local is None else local, estimate)])
            if gate["name"] not in names]  # fmt: skip


def _in_words(gates: list[Figures]) -> str:
    return "; ".join(f"{gate['name']}: {gate['detail']}" for gate in gates)


def _lipschitz(found: Figures | None) -> Figures:
    found = found or {}
    bounds = {key: _or_infinite(found[key]) if key in found else None for key in ("bound", "bound_in_pixel_box")}
    rest = {key: _finite(found.get(key)) for key in ("estimate", "failure_probability")}
    return {**bounds, **rest, **{key: found.get(key) for key in ("reason", "certified_dtype")}}


def _local(found: Figures | None) -> str | None:
    """The sentence on the certificates around single images, if there are any."""
    return portable(local_in_words(found)) if found else None


def _order(report: Figures) -> str:
    """The order of the test images of which the evaluated ones are the first: the data set's own, or a digest of another."""
    drawn = (report.get("planned") or {}).get("sample_order")
    return str(drawn["sha256"]) if drawn else "first"


def _layer(layer: Figures) -> Figures:
    numbers = {key: _finite(layer.get(key)) for key in ("lower", "target", "before")}
    return {"name": str(layer["name"]), "kind": str(layer.get("kind", "unknown")), **numbers,
            "upper": _or_infinite(layer["upper"]) if "upper" in layer else None}  # fmt: skip


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r}: not a number")
    return value if math.isfinite(value) else None


def _or_infinite(value: Any) -> float:
    finite = _finite(value)
    return math.inf if finite is None else finite


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"not a report of a run ({type(error).__name__}: {error})"


def _page_names(runs: list[str]) -> list[str]:
    """File names from the paths of the runs: readable, and different even where a file system ignores case."""
    plain = [re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:60] or "model" for run in runs]
    seen = Counter(plain)
    digests = [hashlib.sha256(run.encode()).hexdigest()[:8] for run in runs]
    return [name if seen[name] == 1 else f"{name}-{digest}" for name, digest in zip(plain, digests, strict=True)]
