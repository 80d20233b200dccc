"""Evaluation of a finished run: its accuracy under attacks, compared with its certified accuracy.

The evaluation is planned as units of work (`work`), done by an engine (`engine`) into records (`records`), and merged here.
The merge is a pure function of the records, so the figures do not depend on which process did a unit, when, or how often the
evaluation was stopped. An image that falls at one size of perturbation counts as fallen at every larger one. `samples.parquet`
contains the verdict for each sample, with the smallest distance at which the attack fooled the model, and `report.json` the
figures computed from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from robust_spectral import LipschitzBound

from ..data import PROPORTIONAL
from ..records import FOLDER, SCHEMA, Record, Unit, failed_proofs, figures, refuse_foreign, seconds_of
from ..run_folder import Run, check_device, environment, open_run, remove_scratch, write_atomically, write_json
from ..wording import local_in_words, not_tested, percent
from .engine import Engine, in_this_process
from .evaluated_images import ORDERS, class_gate, order_to_take, ordered, record_of
from .partial_results import do_units, once
from .radii import certified_radii, local_radii, radius_columns
from .verdicts import recorded, table_rows, verdicts
from .work import CHECKS, AttackPlan, Subject, Work, bound_of, network_gates, open_subject, plan_work

Say = Callable[[str], None]
Progress = Callable[[str, Sequence[Unit] | None, int], None]
_EXAMPLES = 8  # number of adversarial images stored for the pages


def evaluate(
    folder: Path,
    plans: Sequence[AttackPlan],
    *,
    seed: int = 0,
    device: str = "cpu",
    block: int = 128,
    gate_samples: int = 64,
    local_certificates: int = 0,
    sample_order: str | None = None,
    engine: Engine = in_this_process,
    shard: tuple[int, int] = (1, 1),
    say: Say = print,
    progress: Progress = lambda name, left, total: None,
    command: str = "",
) -> bool:
    """Evaluate a run, or each of its twins, and write samples.parquet and report.json into its folder.

    Args:
        folder: The run folder.
        plans: The attacks.
        seed: Seed of the attacks' random draws.
        device: Device of the model.
        block: Number of images in a unit of work.
        gate_samples: Number of images for the checks (called gates in report.json).
        local_certificates: Number of first images around which radii are proved one by one, which takes seconds to minutes for
            each; 0 for the global bound alone. Radii of an earlier evaluation of the run stay in the report.
        sample_order: "proportional", an order of the test images of which every first part is in proportion to their classes,
            or "first", the data set's own order; attacks, checks and certificates take the first images of it. Default: the
            order of an earlier evaluation of the run or its twins, else proportional.
        engine: The engine that does the units.
        shard: (i, n): do every n-th unit from the i-th on, and merge only if the others are done as well.
        say: Called with each message on the results, as soon as they are known.
        progress: Called before a model is loaded, then after every unit, with the name of the model (empty without twins), the
            units that are left in their order (None while it loads), and the number of all its units in this shard.
        command: The command that repeats this evaluation, for the record.

    Returns:
        bool: Whether all units are done, so that there is a report.

    Raises:
        ValueError: the folder is no run, the model does not match its record, or an option is out of range.
    """
    check_options(plans, device, block, gate_samples, shard, local_certificates, sample_order)
    complete = True
    opened = open_run(folder)
    order = order_to_take(opened.models.values(), sample_order)
    if order != (sample_order or PROPORTIONAL):
        say("evaluated: the first test images, as earlier here; --sample-order proportional takes each class in proportion")
    for name, run in opened.models.items():
        shown = name if opened.has_twins else ""
        tell = once(_prefixed(say, shown))
        progress(shown, None, 0)
        subject = open_subject(run, device)
        remove_scratch(run.folder / FOLDER)
        refuse_foreign(run.folder, run.record["model_sha256"], run.record["test_data_sha256"])
        how: dict[str, Any] = {"seed": seed, "block": block, "gate_samples": gate_samples}
        how |= record_of(order, subject.data)
        everything = _with_earlier(run, plans, how, tell)
        how["local_certificates"] = max(local_certificates, _certified_earlier(run, how))
        work = plan_work(run.record, subject.data.tests, everything, **how)
        mine = work.units[shard[0] - 1 :: shard[1]]
        do_units(engine, run.folder, work, mine, device, partial(progress, shown), partial(_say_finished, subject, tell))
        left = sum(not unit.path(run.folder).is_file() for unit in work.units)
        if left:
            where = name if opened.has_twins else folder
            say(f"{where}: {left} of {len(work.units)} units are left to other shards; the last to finish writes the report")
            complete = False
            continue
        _merge(subject, work, tell)
        planned = {"plans": [asdict(plan) for plan in everything], **how}
        here = {"evaluated_with": environment(device), "command": command, "planned": planned, "checks": CHECKS,
                "test_images": subject.data.tests, "class_names": subject.data.class_names}  # fmt: skip
        write_json(run.folder / "report.json", run.report() | here)
    return complete


def check_options(
    plans: Sequence[AttackPlan], device: str, block: int, gate_samples: int, shard: tuple[int, int],
    local_certificates: int = 0, sample_order: str | None = None,
) -> None:  # fmt: skip
    """Check the options of an evaluation before it starts.

    Raises:
        ValueError: an option is out of range, or an attack is given twice.
    """
    check_device(device)
    if block < 1 or gate_samples < 1 or not 1 <= shard[0] <= shard[1]:
        raise ValueError(
            f"block={block}, gate_samples={gate_samples}: at least 1; shard {shard[0]}/{shard[1]}: from 1/n to n/n"
        )
    if local_certificates < 0:
        raise ValueError(f"local_certificates={local_certificates}: expected the number of images to certify one by one, or 0")
    if sample_order not in (*ORDERS, None):
        raise ValueError(f"sample_order {sample_order!r}: expected {' or '.join(ORDERS)}")
    if len({(plan.attack, plan.norm) for plan in plans}) < len(plans) or not plans:
        raise ValueError("evaluate: give at least one attack, and each attack once for a norm, with all its sizes")


def planned_work(run: Run) -> Work:
    """The units from which the report of an evaluated run was made."""
    subject, planned = open_subject(run, "cpu"), run.report()["planned"]
    return plan_work(run.record, subject.data.tests, _plans_in(planned), **planned)


def _plans_in(planned: dict[str, Any]) -> list[AttackPlan]:
    """Take the plans out of a report's record of its work."""
    return [AttackPlan(**plan | {"eps": tuple(plan["eps"])}) for plan in planned.pop("plans")]


def _with_earlier(run: Run, plans: Sequence[AttackPlan], how: dict[str, Any], say: Say) -> list[AttackPlan]:
    """The plans and the plans of an earlier report, so that running another attack does not lose its results."""
    report = run.report() if run.evaluated else {}
    planned = dict(report.get("planned") or {"plans": []})
    planned.pop("local_certificates", None)  # does not change the results of an attack
    found = {(plan.attack, plan.norm): plan for plan in plans}
    for earlier in _plans_in(planned):
        mine = found.get((earlier.attack, earlier.norm))
        if planned != how or (mine and mine.samples != earlier.samples):
            say(
                f"left out of the report: {earlier.attack} {earlier.norm} of an earlier evaluation with other samples, another "
                "order of them, another seed or other blocks"
            )
        elif mine:
            found[earlier.attack, earlier.norm] = replace(mine, eps=tuple(sorted({*mine.eps, *earlier.eps})))
        else:
            found[earlier.attack, earlier.norm] = earlier
    return list(found.values())


def _certified_earlier(run: Run, how: dict[str, Any]) -> int:
    """The number of images that an earlier evaluation of a run certified one by one, in the same order of images."""
    planned = (run.report().get("planned") or {}) if run.evaluated else {}
    return int(planned.get("local_certificates", 0)) if planned.get("sample_order") == how.get("sample_order") else 0


def _say_finished(subject: Subject, say: Say, part: Work) -> None:
    """Say the clean accuracy and the accuracies under attack that are known before all units are done."""
    folder = subject.run.folder
    if part.clean:
        clean = [recorded(folder, unit).tensors for unit in part.clean]
        logits, labels = (torch.cat([tensors[key] for tensors in clean]) for key in ("logits", "labels"))
        say(_clean_in_words(logits.argmax(1) == labels))
    verdicts(folder, part, {"sample": ordered(subject.data, part.sample_order).tolist()}, say)


def _clean_in_words(right: Tensor) -> str:
    return f"clean accuracy {percent(_mean(right))} % on {len(right)} images"


def _prefixed(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}" if name else text)


def _merge(subject: Subject, work: Work, say: Say) -> None:
    """Compute the verdicts and figures from the records of all units, and write them."""
    folder, record = subject.run.folder, subject.run.record
    lipschitz, clean = recorded(folder, work.lipschitz), [recorded(folder, unit) for unit in work.clean]
    local = local_radii([recorded(folder, unit) for unit in work.local])
    proof = network_gates(lipschitz, local)
    refuted = "; ".join(f"{gate['name']}: {gate['detail']}" for gate in failed_proofs(proof))
    bound = LipschitzBound(math.inf, reason=f"refuted by a check: {refuted}") if refuted else bound_of(lipschitz)
    local = local.withdrawn(f"refuted by a check: {refuted}") if refuted and local else local
    logits, exact, labels = (torch.cat([r.tensors[key] for r in clean]) for key in ("logits", "logits_float64", "labels"))
    on_cpu = {record.told["device"] for record in (lipschitz, *clean)} == {"cpu"}  # where float32 errors are bounded
    radii, dtype = certified_radii(logits, exact, labels, bound if on_cpu else _in_float64(bound))
    predicted = logits.argmax(1)
    say(_clean_in_words(predicted == labels))
    order = ordered(subject.data, work.sample_order)
    proved = {"sample": order[: len(labels)].tolist()} | radius_columns(radii, local)
    rows = table_rows("none", "l2", 0.0, labels, predicted, torch.zeros_like(radii), proved)
    attacked, errors = verdicts(folder, work, proved, say)
    rows += attacked
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"schema": str(SCHEMA)})
    write_atomically(folder / "samples.parquet", lambda scratch: pq.write_table(table, scratch))
    gates = [*proof, *(gate for unit in work.gates for gate in recorded(folder, unit).told["gates"])]
    attacked_images = {(attack, norm): units[-1].stop for (attack, norm, _), units in work.attacks.items()}
    gates.append(asdict(class_gate(subject.data, order, attacked_images)))
    network, around = _network_figures(lipschitz, bound, dtype), local.figures(radii) if local else None
    made = figures(record, rows, network, subject.data.example().numel(), gates, errors, around, work.sizes)
    if around:
        say(local_in_words(made["local_certificates"]))
    _write_figures(folder, work, made, lipschitz.told["parameters"])
    _keep_examples(subject, work)
    seen = max(unit.stop for unit in work.gates)
    known = f", {int((predicted == labels)[:seen].sum())} classified correctly" if seen <= len(labels) else ""
    _say_gates(made["gates"], f"{seen} images for the checks{known}", say)


def _write_figures(folder: Path, work: Work, made: dict[str, Any], parameters: int) -> None:
    """Write report.json: the figures, and the time they took."""
    for entry in made["robust"]:
        attack, norm = entry["attack"], entry["norm"]
        units = work.attacks.get((attack, norm, entry["eps"])) or work.attacks.get((attack, norm, None), [])
        entry["seconds"] = round(sum(seconds_of(folder, unit) for unit in units), 1) if units else None
    cost = {"attack_seconds": round(sum(seconds_of(folder, unit) for unit in work.units), 1)}
    write_json(folder / "report.json", made | cost | {"parameters": parameters})


def _say_gates(gates: list[dict[str, Any]], images: str, say: Say) -> None:
    for gate in gates:
        if gate["status"] == "fail":
            what = "no attacked and no certified" if failed_proofs([gate]) else "no attacked"
            say(f"check failed: {gate['name']}: {gate['detail']}; {what} accuracy is valid")
    if untested := not_tested(gates):
        say(f"{images}: {untested}")


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def _in_float64(bound: LipschitzBound) -> LipschitzBound:
    """The bound without its error bound for passes in float32."""
    return replace(bound, errors={**bound.errors, torch.float32: math.inf})


def _network_figures(record: Record, bound: LipschitzBound, dtype: torch.dtype) -> dict[str, Any]:
    """The Lipschitz bound and estimate of the network, and the dtype of the certified forward pass."""
    return {
        "certified_dtype": str(dtype).removeprefix("torch."),
        "errors": {str(kind).removeprefix("torch."): error for kind, error in bound.errors.items()},
        "bound": bound.value,
        "bound_in_pixel_box": bound.local,
        "estimate": float(record.told["estimate"]),
        "failure_probability": bound.failure_probability,
        "reason": bound.reason or bound.errors_reason,
    }


def _keep_examples(subject: Subject, work: Work) -> None:
    """Store a few images that fell, at the smallest sizes at which any did, with their unperturbed versions."""
    folder = subject.run.folder
    found = list(islice(_fallen_images(subject, work), _EXAMPLES))
    if found:
        clean = torch.stack([subject.data.test[told["sample"]][0] for _, told in found])
        tensors = {"clean": clean, "adversarial": torch.stack([image for image, _ in found])}
        text = {"examples": json.dumps([told for _, told in found])}
        write_atomically(folder / "examples.safetensors", lambda path: safetensors.torch.save_file(tensors, path, text))


def _fallen_images(subject: Subject, work: Work) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Adversarial images and the description of each, in order of size (none is last); for each sample only the first."""
    seen: set[int] = set()
    order, name = ordered(subject.data, work.sample_order).tolist(), subject.data.class_name
    for (attack, norm, eps), units in sorted(work.attacks.items(), key=lambda item: item[0][2] or math.inf):
        for unit in units:
            tensors = recorded(subject.run.folder, unit).tensors
            for index, image in zip(tensors["fallen"].tolist(), tensors["adversarial"], strict=True):
                if (sample := order[unit.start + index]) not in seen:
                    seen.add(sample)
                    label, predicted = (int(tensors[key][index]) for key in ("labels", "predicted"))
                    yield image, {
                        "sample": sample, "label": label, "attack": attack, "norm": norm, "predicted": predicted, "eps": eps,
                        "distance": float(tensors["distance"][index]), "label_name": name(label),
                        "predicted_name": name(predicted),
                    }  # fmt: skip
