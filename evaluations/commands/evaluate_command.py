"""The command that attacks: evaluate."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import numbers
from ..terminal import console, errors
from .evaluation_display import EvaluationDisplay


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Folder of a finished run; or give --model, --data and --out.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model trained elsewhere: timm/NAME (--mean and --std default to timm's), module:function, file.py:function."
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="For --model: a file of its weights; default: its own.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of the pixels a timm model was trained on, 0.49,0.48,0.45; 0 for raw pixels.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, in the form of --mean; 1 for raw pixels.")] = None,
    data: Annotated[str | None, typer.Option(help="Data to evaluate the model on, as for finetune.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize images to this height and width, as for finetune.")] = None,
    out: Annotated[Path | None, typer.Option(help="For --model: the run folder to make.")] = None,
    defence: Annotated[str, typer.Option(help="For --model: name of its defence, for reports.")] = "unknown",
    attack: Annotated[
        list[str] | None,
        typer.Option(help="pgd, ddn, fmn, autoattack, …; repeatable. Default: l2 pgd, ddn, apgd-t-3; linf pgd, apgd-t."),
    ] = None,
    norm: Annotated[str, typer.Option(help="l2 or linf.")] = "l2",
    eps: Annotated[list[str], typer.Option(help="Size of the perturbation, 0.5 or 8/255; repeatable.")] = ["0.5"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Number of test images.")] = 200,
    sample_order: Annotated[
        str | None,
        typer.Option(help="proportional to the classes, or first ones of the data; default: as earlier, else proportional."),
    ] = None,
    autoattack_eps: Annotated[list[str] | None, typer.Option(help="Sizes for AutoAttack; default: those of --eps.")] = None,
    autoattack_samples: Annotated[int | None, typer.Option(help="Number of images for AutoAttack; default: --samples.")] = None,
    gate_samples: Annotated[int, typer.Option(help="Number of images for the checks (gates in report.json).")] = 64,
    local_certificates: Annotated[
        str,
        typer.Option(
            help="Prove a radius around each of this many first images, or all; seconds to minutes each. 0: global bound alone."
        ),
    ] = "0",
    block: Annotated[
        int, typer.Option(help="Images in a unit of work (an attack at one size); a stop loses the units in progress.")
    ] = 128,
    engine: Annotated[str, typer.Option(help="local, or ray: a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(help="Number of processes of the local engine.")] = 1,
    address: Annotated[str | None, typer.Option(help="Ray cluster; auto: the running one, default: a new one.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: do the i-th of n shares; the last to finish writes the report.")] = "1/1",
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Attack a run with its twins, or any model, and record a verdict for every image.

    An evaluation that was stopped continues: the run's folder contains one file for each finished unit of work. The result of
    each attack is printed as soon as all its images are attacked.
    """
    says, display = errors if as_json else console, EvaluationDisplay(errors)
    adopted = {"data": data, "out": out, "checkpoint": checkpoint, "image_size": image_size, "mean": numbers("mean", mean),
               "std": numbers("std", std)}  # fmt: skip
    try:
        with display:  # the imports take seconds
            from ..attacking import DEFAULT_ATTACKS, AttackPlan, check_options, images_to_certify, make_engine, sizes
            from ..attacking import evaluate as attack_run

            usual = eps, samples
            own = {"autoattack": (autoattack_eps or eps, samples if autoattack_samples is None else autoattack_samples)}
            chosen = {name: own.get(name, usual) for name in attack or DEFAULT_ATTACKS.get(norm.lower(), ("pgd",))}
            plans = [AttackPlan(name, norm.lower(), sizes(levels), images) for name, (levels, images) in chosen.items()]
            who, share = make_engine(engine, workers, address), _share(shard)
            check_options(plans, device, block, gate_samples, share, sample_order=sample_order)
            certified = images_to_certify(local_certificates, plans)
            folder = _folder_to_evaluate(run, model, adopted, defence)
            complete = attack_run(
                folder, plans, seed=seed, device=device, block=block, gate_samples=gate_samples, local_certificates=certified,
                sample_order=sample_order, engine=who, shard=share, command=_command(), progress=display.watch,
                say=lambda text: says.print(text, highlight=False, markup=False, soft_wrap=True),
            )  # fmt: skip
    except KeyboardInterrupt:
        errors.print(display.kept(), highlight=False, markup=False, soft_wrap=True)
        raise
    if complete:
        _show(folder, as_json)


def _show(folder: Path, as_json: bool) -> None:
    """Print the figures as JSON if asked for, and exit with status 1 if a certificate was refuted."""
    from ..records import failed_proofs
    from ..run_folder import open_run

    found = {name: one.report() for name, one in open_run(folder).models.items()}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    if any(failed_proofs(figures["gates"]) for figures in found.values()):
        raise typer.Exit(1)


def _folder_to_evaluate(run: Path | None, model: str | None, adopted: dict[str, Any], defence: str) -> Path:
    """The run's folder, or a new one for a model; ``adopted`` contains the options that need --model, None where not given."""
    from ..models import adopt
    from ..run_folder import open_run

    if (run is None) == (model is None):
        raise ValueError("evaluate: give the folder of a run, or --model with --data and --out")
    if run is not None:
        if wrong := [f"--{name.replace('_', '-')}" for name, value in adopted.items() if value is not None]:
            raise ValueError(f"evaluate {run}: {', '.join(wrong)} goes with --model; a run has a model and data of its own")
        open_run(run)
        return run
    if adopted["data"] is None or adopted["out"] is None or model is None:
        raise ValueError(
            f"evaluate(model={model!r}): needs --data, the data to evaluate it on, and --out, a folder for the records"
        )
    return adopt(model, defence=defence, **adopted)


def _share(text: str) -> tuple[int, int]:
    """Parse a shard such as 2/4."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit()):
        raise ValueError(f"shard {text!r}: expected i/n, as in 2/4")
    return int(first), int(last)


def _command() -> str:
    """The command line of this process."""
    return shlex.join(["robust-spectral", *sys.argv[1:]])
