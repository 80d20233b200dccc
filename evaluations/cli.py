"""Spectral norms held, measured and proved: spectrum, finetune, evaluate, report, leaderboard, export.

Exit status: 0 done; 1 an attack broke what was certified, a fault of this package; 2 a mistake that you can mend, told in one
line; 130 interrupted: the same command goes on, finetune with --resume.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from robust_spectral import linear_layers, lipschitz_bound, spectral_norm, top_singular

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)


@app.command()
def spectrum(
    model: Annotated[str, typer.Argument(help="A timm model name, for instance resnet18.")],
    image_size: Annotated[int, typer.Option(help="Height and width of the input.")] = 224,
    in_chans: Annotated[int, typer.Option(help="Channels of the input.")] = 3,
    pretrained: Annotated[bool, typer.Option(help="Load timm's published weights.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="A local checkpoint of the model.")] = None,
    failure_probability: Annotated[float, typer.Option(help="Of each upper bound; 0 for deterministic ones only.")] = 1e-9,
    composites: Annotated[bool, typer.Option(help="Take a layer with the batch normalisation behind it.")] = True,
    top: Annotated[int, typer.Option(help="Also estimate so many of each layer's largest singular values.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write the intervals, and the values of --top, as an SVG picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Spectral norm of every linear layer of a timm model, as proved intervals, and the network's Lipschitz bound."""
    from robust_spectral.plugins.timm import load

    if top < 0:
        raise ValueError(f"spectrum(top={top}): must not be negative")
    net = load(model, pretrained=pretrained, checkpoint=checkpoint, in_chans=in_chans)
    example = torch.zeros(1, in_chans, image_size, image_size)
    layers: list[dict[str, Any]] = []
    for layer in linear_layers(net, example):
        A = layer.operator(composite=composites)
        norm = spectral_norm(A, failure_probability)
        values = top_singular(A, top).values.tolist() if top else []
        layers.append({"name": layer.name, "kind": layer.kind, "in_shape": "x".join(map(str, layer.in_shape)),
                       "lower": norm.lower, "upper": norm.upper, "method": norm.method, "top": values})  # fmt: skip
        if not as_json:
            errors.print(f"[dim]{layer.name}[/dim]", end="\r")
    if plot is not None:
        from .charts import layer_spectra

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(layer_spectra(layers))
    bound = lipschitz_bound(net, example, failure_probability)
    if as_json:
        proved = {"lipschitz_bound": bound.value, "lipschitz_bound_in_pixel_box": bound.local}
        found = {key: None if math.isinf(value) else value for key, value in proved.items()}
        typer.echo(json.dumps({"model": model, "layers": layers, **found, "reason": bound.reason}, indent=1))
        return
    columns = ["layer", "kind", "input", "lower", "upper", "proved by", *(["estimates"] if top else [])]
    table = Table(*columns, title=f"{model}: spectral norms")
    for row in layers:
        estimates = [" ".join(f"{value:.4g}" for value in row["top"])] if top else []
        table.add_row(row["name"], row["kind"], row["in_shape"], f"{row['lower']:.5g}", f"{row['upper']:.5g}", row["method"],
                      *estimates)  # fmt: skip
    console.print(table)
    console.print(f"Lipschitz bound (pixels in [0, 1] -> logits, L2): {bound.value:.6g}" if bound.reason is None
                  else f"Lipschitz bound: none, {bound.reason}")  # fmt: skip
    if bound.local < bound.value:
        console.print(f"Lipschitz bound between images with pixels in [0, 1]: {bound.local:.6g}")


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="A timm model name.")],
    data: Annotated[str, typer.Option(help="digits, mnist5k, photos, idx:PATH, folder:PATH, torch/NAME or hfds/NAME.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; must be new.")],
    image_size: Annotated[int | None, typer.Option(help="Resize images to this height and width.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Start from timm's published weights.")] = False,
    pretrained_path: Annotated[
        str | None, typer.Option(help="Start from this file of pretrained weights; timm adapts head and first convolution.")
    ] = None,
    initial_checkpoint: Annotated[
        str | None, typer.Option("--initial-checkpoint", "--checkpoint", help="Start from this checkpoint of the same model.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 3,
    batch_size: Annotated[int, typer.Option()] = 64,
    opt: Annotated[str, typer.Option(help="timm's optimizer name.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option()] = 1e-4,
    sched: Annotated[str, typer.Option(help="timm's schedule name.")] = "cosine",
    warmup_epochs: Annotated[int, typer.Option(help="Of the learning rate.")] = 0,
    defence: Annotated[
        str,
        typer.Option(help="fastclip, fastclip-composite, none, miyato, gouk, delattre, senderovich, bjorck or another."),
    ] = "fastclip",
    max_norm: Annotated[float, typer.Option(help="Spectral norm allowed in every layer; inf for no clipping.")] = 1.0,
    lipschitz_target: Annotated[
        float | None,
        typer.Option(help="Bound allowed to the whole network, pixels to logits; spread over its layers."),
    ] = None,
    composites: Annotated[str, typer.Option(help="Clip a layer with its batch normalisation: auto, always or never.")] = "auto",
    spectral_warmup: Annotated[float, typer.Option(help="Share of the steps that lower norms to --max-norm.")] = 0.5,
    logit_scale: Annotated[float, typer.Option(help="Temperature: the loss is taken on this multiple of the logits.")] = 1.0,
    objective: Annotated[
        str, typer.Option(help="accuracy, or certified: a loss on the margins that --margin-eps needs.")
    ] = "accuracy",
    margin_eps: Annotated[float, typer.Option(help="L2 radius that the certified objective asks for.")] = 0.0,
    lift: Annotated[bool, typer.Option(help="Raise the small singular values of matrices towards --max-norm.")] = False,
    fold_bn: Annotated[bool, typer.Option(help="Fold batch normalisations into their layers before training.")] = False,
    residuals: Annotated[str, typer.Option(help="summed, or averaged: half of every residual block's output.")] = "summed",
    freeze_bn: Annotated[bool, typer.Option(help="Keep the statistics of batch normalisations as they are.")] = False,
    twin: Annotated[bool, typer.Option(help="Also train an unclipped twin, same budget, loss on plain logits.")] = False,
    amp: Annotated[bool, typer.Option(help="Automatic mixed precision.")] = False,
    amp_dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    model_ema: Annotated[bool, typer.Option(help="Keep and save timm's moving average of the weights.")] = False,
    model_ema_decay: Annotated[float, typer.Option()] = 0.999,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    resume: Annotated[bool, typer.Option(help="Go on with the interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
) -> None:
    """Fine-tune a timm model with its layers' spectral norms held at --max-norm.

    On several GPUs: torchrun --nproc-per-node 2 -m robust_spectral.evaluations finetune …; each takes its share of every batch.
    """
    from .config import FinetuneConfig
    from .finetune import finetune as run
    from .ranks import ranks
    from .twins import finetune_twins

    config = FinetuneConfig(
        model=model, data=data, image_size=image_size, pretrained=pretrained, pretrained_path=pretrained_path,
        initial_checkpoint=initial_checkpoint, epochs=epochs, batch_size=batch_size, opt=opt, lr=lr,
        weight_decay=weight_decay, sched=sched, warmup_epochs=warmup_epochs,
        defence=defence, max_norm=None if max_norm == math.inf else max_norm, lipschitz_target=lipschitz_target,
        composites=composites, spectral_warmup=spectral_warmup, logit_scale=logit_scale,  # type: ignore[arg-type]
        objective=objective, margin_eps=margin_eps, lift=lift, fold_bn=fold_bn, residuals=residuals,  # type: ignore[arg-type]
        freeze_bn=freeze_bn, amp=amp, amp_dtype=amp_dtype,
        model_ema=model_ema, model_ema_decay=model_ema_decay, seed=seed, device=device,
    )  # fmt: skip
    if twin:
        plain = replace(
            config, max_norm=None, lipschitz_target=None, logit_scale=1.0, objective="accuracy", margin_eps=0.0, lift=False
        )
        finetune_twins({"plain": plain, "clipped": config}, out, resume=resume)
    else:
        run(config, out, resume=resume)
    if not ranks().first:
        return
    if as_json:
        from .runs import read_json, twin_folders

        typer.echo(json.dumps({name or "model": read_json(path / "run.json") for name, path in twin_folders(out).items()}))
    else:
        console.print(f"run: {out}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Folder of a finished run; or give --model, --data and --out.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="One trained elsewhere: timm/NAME (timm's mean and std in front), module:function, file.py:function."
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights; without them those it comes with.")] = None,
    data: Annotated[str | None, typer.Option(help="The data it is evaluated on, as for finetune.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize images to this height and width.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make of it.")] = None,
    defence: Annotated[str, typer.Option(help="What to call the way it was trained.")] = "unknown",
    attack: Annotated[list[str], typer.Option(help="pgd, autoattack, square, …; may be given again.")] = ["pgd"],  # noqa: B006
    norm: Annotated[str, typer.Option(help="l2 or linf.")] = "l2",
    eps: Annotated[list[str], typer.Option(help="Size of the perturbation, 0.5 or 8/255; may be given again.")] = ["0.5"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Test images, from the first one.")] = 200,
    autoattack_eps: Annotated[list[str] | None, typer.Option(help="Sizes for AutoAttack; default those of --eps.")] = None,
    autoattack_samples: Annotated[int | None, typer.Option(help="Images for AutoAttack; default --samples.")] = None,
    gate_samples: Annotated[int, typer.Option(help="Images that the sanity gates look at.")] = 64,
    block: Annotated[int, typer.Option(help="Images in a unit of work; what is lost at most when it is stopped.")] = 128,
    engine: Annotated[str, typer.Option(help="local, or ray: a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(help="Processes of the local engine.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster: auto to join the one at hand.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: do the i-th of n shares; the last one to end writes the report.")] = "1/1",
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Attack a run and its twin, or any model, and record a verdict for every image.

    Goes on where it was stopped: what is done lies in the run's folder, one file a block of images.
    """
    from .engine import make_engine
    from .evaluate import evaluate as attack_run
    from .runs import read_json, twin_folders
    from .work import AttackPlan

    plans = [
        AttackPlan(
            name, norm.lower(), _sizes(autoattack_eps or eps), samples if autoattack_samples is None else autoattack_samples
        )
        if name == "autoattack"
        else AttackPlan(name, norm.lower(), _sizes(eps), samples)
        for name in dict.fromkeys(attack)
    ]
    folder = _folder_to_evaluate(run, model, data, out, checkpoint, image_size, defence)
    says = errors if as_json else console
    with Progress(TextColumn("units of work"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=errors) as bar:
        task = bar.add_task("units", total=None)
        complete = attack_run(
            folder, plans, seed=seed, device=device, block=block, gate_samples=gate_samples,
            engine=make_engine(engine, workers, address), shard=_share(shard), command=_command(),
            say=lambda text: says.print(text, highlight=False, markup=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if not complete:
        return
    found = {name or "model": read_json(path / "report.json") for name, path in twin_folders(folder).items()}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    if any(gate["status"] == "fail" and "certified" in gate["name"] for figures in found.values() for gate in figures["gates"]):
        raise typer.Exit(1)


def _folder_to_evaluate(
    run: Path | None, model: str | None, data: str | None, out: Path | None, checkpoint: Path | None, image_size: int | None,
    defence: str,
) -> Path:  # fmt: skip
    from .models import adopt
    from .runs import open_run

    if (run is None) == (model is None):
        raise ValueError("evaluate: give the folder of a run, or --model with --data and --out")
    if run is not None:
        given = {"--data": data, "--out": out, "--checkpoint": checkpoint, "--image-size": image_size}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"evaluate {run}: {', '.join(wrong)} goes with --model; a run has a model and data of its own")
        open_run(run)
        return run
    if data is None or out is None or model is None:
        raise ValueError(
            f"evaluate(model={model!r}): needs --data, what to evaluate it on, and --out, a folder for the records"
        )
    return adopt(model, data, out, checkpoint=checkpoint, image_size=image_size, defence=defence)


def _sizes(texts: list[str]) -> tuple[float, ...]:
    """Numbers and fractions of them, as in 8/255."""
    try:
        return tuple(float(Fraction(text)) for text in texts)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"eps {', '.join(texts)}: expected positive numbers or fractions, such as 0.5 or 8/255") from error


def _share(text: str) -> tuple[int, int]:
    """ "2/4" as numbers."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit()):
        raise ValueError(f"shard {text!r}: expected i/n, as in 2/4")
    return int(first), int(last)


def _command() -> str:
    """The command line of this process."""
    return shlex.join(["robust-spectral", *sys.argv[1:]])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show the figures of an evaluated run, and write its page, report.html."""
    from .report import print_report, write_report

    figures = write_report(run)
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        return
    print_report(figures, console)
    console.print(f"page: {run / 'report.html'}", markup=False, soft_wrap=True)


@app.command()
def leaderboard(
    runs: Annotated[Path, typer.Argument(help="Folder with evaluated runs, at any depth.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the site.")] = Path("site"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Build a static site that ranks the models of many runs: open its index.html."""
    from .leaderboard import build

    rows = build(runs, out, say=lambda text: errors.print(text, markup=False, highlight=False))
    if as_json:
        typer.echo((out / "leaderboard.json").read_text(), nl=False)
    else:
        models = len({row["id"] for row in rows})
        console.print(f"{models} models, {len(rows)} rows: {out / 'index.html'}", markup=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not hold anything yet.")],
    to: Annotated[str, typer.Option(help="hub: a folder timm and its hub load; robustbench: entry and images.")] = "hub",
    about: Annotated[
        Path | None, typer.Option(help="For robustbench: JSON with link, name, authors, venue, architecture, …")
    ] = None,
    board: Annotated[str, typer.Option(help="For robustbench: its dataset and threat model.")] = "cifar10/L2",
    entry: Annotated[str, typer.Option(help="For robustbench: the entry's name, as in Lee2026Norms_R18.")] = "",
) -> None:
    """Write a run so that others can use it: for timm and the Hugging Face hub, or for RobustBench."""
    from .export import to_hub, to_robustbench

    if to not in ("hub", "robustbench"):
        raise ValueError(f"export(to={to!r}): expected hub or robustbench")
    if to == "hub":
        to_hub(run, out)
    elif about is None:
        raise ValueError("export(to='robustbench'): needs --about, a JSON file with link, name, authors, venue, architecture …")
    else:
        to_robustbench(run, out, board, entry, about)
    console.print(f"written: {out}", markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line; what the user can mend is one line on standard error and exit status 2."""
    try:
        app()
    except (MemoryError, torch.OutOfMemoryError) as error:
        errors.print(Text(f"error: out of memory, give a smaller --block or --batch-size: {error}"), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print(Text("interrupted; what was done is kept"), soft_wrap=True)
        sys.exit(130)
    except ImportError as error:
        errors.print(
            Text(f"error: {error}; pip install 'robust-spectral[{'ray' if error.name == 'ray' else 'evaluations'}]'"),
            soft_wrap=True,
        )
        sys.exit(2)
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("ROBUST_SPECTRAL_TRACEBACK") == "1":
            raise
        errors.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
