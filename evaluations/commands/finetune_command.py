"""The commands that train: finetune, and grid for many of them."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..config import FinetuneConfig
from ..finetuning import read_recipe, recipe_names
from ..run_folder import open_run
from ..terminal import console, errors
from ..wording import percent


def _take_recipe(context: typer.Context, recipe: str | None) -> str | None:
    """Have the options of a recipe be the defaults of the command."""
    if recipe is not None:
        context.default_map = {**(context.default_map or {}), **read_recipe(recipe)}
    return recipe


def finetune(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A timm model name.")],
    data: Annotated[str, typer.Option(help="digits, mnist5k, photos, idx:PATH, folder:PATH, torch/NAME:PATH or hfds/NAME.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; must be new.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            callback=_take_recipe, is_eager=True, help=f"Options from a TOML file, or of a name: {', '.join(recipe_names())}."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Resize images to this height and width; default as they are, 224 for folder:, torch/ and hfds/."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Start from timm's published weights.")] = False,
    pretrained_path: Annotated[
        str | None, typer.Option(help="Start from this file of pretrained weights; timm adapts head and first convolution.")
    ] = None,
    initial_checkpoint: Annotated[
        str | None, typer.Option("--initial-checkpoint", "--checkpoint", help="Start from this checkpoint of the same model.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="What it was trained with, as 0.49,0.48,0.45, or 0 for plain pixels; default timm's.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="As --mean, or 1 for plain pixels.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images in a step, over all processes.")] = 64,
    opt: Annotated[str, typer.Option(help="timm's optimizer name.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the optimizer.")] = 1e-4,
    sched: Annotated[str, typer.Option(help="timm's schedule name.")] = "cosine",
    warmup_epochs: Annotated[int, typer.Option(help="Epochs in which the learning rate rises to --lr.")] = 0,
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
    move: Annotated[str, typer.Option(help="What is moved to clip both: weight, gamma or weight+gamma.")] = "weight",
    spectral_warmup: Annotated[float, typer.Option(help="Share of the steps that lower norms to --max-norm.")] = 0.5,
    logit_scale: Annotated[float, typer.Option(help="Temperature: the loss is taken on this multiple of the logits.")] = 1.0,
    objective: Annotated[
        str, typer.Option(help="accuracy, or certified: a loss on the margins that --margin-eps needs.")
    ] = "accuracy",
    margin_eps: Annotated[float, typer.Option(help="L2 radius that the certified objective asks for.")] = 0.0,
    adversarial_eps: Annotated[float, typer.Option(help="Train on images attacked by PGD, of this size; 0 for none.")] = 0.0,
    adversarial_norm: Annotated[str, typer.Option(help="Of the attacks of --adversarial-eps: l2 or linf.")] = "l2",
    adversarial_steps: Annotated[int, typer.Option(help="Of the attacks of --adversarial-eps, each.")] = 7,
    lift: Annotated[bool, typer.Option(help="Raise the small singular values of matrices towards --max-norm.")] = False,
    fold_bn: Annotated[bool, typer.Option(help="Fold batch normalisations into their layers before training.")] = False,
    small_stem: Annotated[bool, typer.Option(help="A ResNet for small images: no stride, no pooling at its start.")] = False,
    residuals: Annotated[str, typer.Option(help="summed, or averaged: half of every residual block's output.")] = "summed",
    freeze_bn: Annotated[bool, typer.Option(help="Keep the statistics of batch normalisations as they are.")] = False,
    twin: Annotated[bool, typer.Option(help="Also train an unclipped twin, same budget, loss on plain logits.")] = False,
    amp: Annotated[bool, typer.Option(help="Automatic mixed precision.")] = False,
    amp_dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    model_ema: Annotated[bool, typer.Option(help="Keep and save timm's moving average of the weights.")] = False,
    model_ema_decay: Annotated[float, typer.Option(help="Share of it that a step keeps, less at first.")] = 0.999,
    seed: Annotated[int, typer.Option(help="Of the weights that are new, and of the order of the images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    resume: Annotated[bool, typer.Option(help="Go on with the interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
) -> None:
    """Fine-tune a timm model with its layers' spectral norms held at --max-norm.

    A --recipe stands for options; those given beside it count.

    It shows the loss, the accuracy (acc) of a training batch, and the largest norm: of a layer with the batch normalisation
    behind it, where both are held together.

    On several GPUs: torchrun --nproc-per-node 2 -m robust_spectral.evaluations finetune …; each takes its share of every batch.
    """
    options = {field.name: context.params[field.name] for field in fields(FinetuneConfig)}
    config = FinetuneConfig(**options | {"max_norm": None if max_norm == math.inf else max_norm})  # before what takes long
    from ..finetuning import finetune as run
    from ..finetuning import finetune_twins, ranks

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
        typer.echo(json.dumps({name: run.record for name, run in open_run(out).models.items()}))
    else:
        console.print(f"run: {out}", markup=False, soft_wrap=True)


def grid(
    file: Annotated[
        Path, typer.Argument(help=escape("TOML: [finetune] options of all runs, [[runs]], [[evaluate]], [frontier]."))
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs.")],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing; show what is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Fine-tune and evaluate every run of a file; goes on where it was stopped.

    Start it as often as there are cores or GPUs, each with a --device of its own: they share the runs. Its figures are in
    grid.json; `leaderboard` makes a site of the folder.
    """
    from ..grids import read_grid, run_grid, write_rows

    asked = read_grid(file, out)
    say = lambda text: errors.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    failed = {} if only_table else run_grid(asked, out, device=device, say=say)
    found = write_rows(asked, out)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print_rows(found)
    if failed:
        name, why = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(asked.runs)} runs failed, {name} first: {why}")


def _print_rows(found: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(key for row in found["rows"] for key in row["robust"]))
    headers = [Column("run", overflow="fold"), "clean", *columns, "largest norm", "seconds"]
    table = Table(*headers, title=f"{found['done']} of {found['runs']} runs done")
    for row in found["rows"]:
        doubtful = "invalid" if row["gates_fail"] else "not tested"
        cells = [row["clean"], *(row["robust"].get(key, "–") for key in columns)]
        norm = "" if row["largest_norm"] is None else f"{row['largest_norm']:.4g}"
        shown = [doubtful if cell is None else cell if cell == "–" else percent(cell) for cell in cells]
        table.add_row(row["name"], *shown, norm, f"{row['seconds']:.0f}")
    console.print(table)
    for best in found["frontier"]:
        told = "no run"
        if best["name"] is not None:
            told = f"{best['name']}: clean {percent(best['clean'])}, attacked {percent(best['robust'])}"
        console.print(f"within {best['drop']:g} points of plain: {told}", highlight=False, markup=False, soft_wrap=True)
