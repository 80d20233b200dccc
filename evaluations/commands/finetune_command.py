"""The commands that train: finetune, and grid for many runs."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..config import FinetuneConfig, read_recipe, recipe_names
from ..run_folder import open_run
from ..terminal import console, errors
from ..wording import percent


def _take_recipe(context: typer.Context, recipe: str | None) -> str | None:
    """Use the options of a recipe as the defaults of the command."""
    if recipe is not None:
        context.default_map = {**(context.default_map or {}), **read_recipe(recipe)}
    return recipe


def finetune(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Name of a timm model.")],
    data: Annotated[str, typer.Option(help="digits, mnist5k, photos, idx:PATH, folder:PATH, torch/NAME:PATH or hfds/NAME.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; must be new.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            callback=_take_recipe, is_eager=True, help=f"A TOML file of options, or one of {', '.join(recipe_names())}."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Resize images to this height and width; default: unchanged, 224 for folder:, torch/, hfds/."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Start from timm's published weights.")] = False,
    pretrained_path: Annotated[
        str | None, typer.Option(help="Start from this file of pretrained weights; timm adapts head and first convolution.")
    ] = None,
    initial_checkpoint: Annotated[
        str | None, typer.Option("--initial-checkpoint", "--checkpoint", help="Start from this checkpoint of the same model.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of the model's pixels, such as 0.49,0.48,0.45; 0 for raw pixels; default: timm's.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, in the form of --mean; 1 for raw pixels.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images in a step, over all processes.")] = 64,
    opt: Annotated[str, typer.Option(help="Optimizer, by timm's name.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 1e-4,
    sched: Annotated[str, typer.Option(help="Learning-rate schedule, by timm's name.")] = "cosine",
    warmup_epochs: Annotated[int, typer.Option(help="Epochs in which the learning rate rises to --lr.")] = 0,
    defence: Annotated[
        str,
        typer.Option(help="fastclip, fastclip-composite, none, miyato, gouk, delattre, senderovich, bjorck or a plugin's."),
    ] = "fastclip",
    max_norm: Annotated[float, typer.Option(help="Largest spectral norm of a layer; inf for no clipping.")] = 1.0,
    lipschitz_target: Annotated[
        float | None,
        typer.Option(help="Largest Lipschitz bound of the network, pixels to logits; shared out among its layers."),
    ] = None,
    composites: Annotated[
        str, typer.Option(help="Clip a layer together with the batch normalisation after it: auto, always or never.")
    ] = "auto",
    move: Annotated[
        str, typer.Option(help="Parameters that change when both are clipped: weight, gamma or weight+gamma.")
    ] = "weight",
    spectral_warmup: Annotated[float, typer.Option(help="Share of the steps in which norms fall to --max-norm.")] = 0.5,
    logit_scale: Annotated[float, typer.Option(help="Temperature: factor of the logits in the loss.")] = 1.0,
    objective: Annotated[
        str, typer.Option(help="accuracy, or certified: a loss with margins, for certificates at --margin-eps.")
    ] = "accuracy",
    margin_eps: Annotated[float, typer.Option(help="L2 radius for the certified objective.")] = 0.0,
    adversarial_eps: Annotated[float, typer.Option(help="Train on images attacked by PGD of this size; 0: no attack.")] = 0.0,
    adversarial_norm: Annotated[str, typer.Option(help="Norm of --adversarial-eps: l2 or linf.")] = "l2",
    adversarial_steps: Annotated[int, typer.Option(help="PGD steps of the attacks of --adversarial-eps.")] = 7,
    lift: Annotated[
        bool, typer.Option(help="Raise small singular values towards --max-norm: dense layers, convolutions without overlap.")
    ] = False,
    fold_bn: Annotated[bool, typer.Option(help="Fold batch normalisations into layers before training.")] = False,
    small_stem: Annotated[bool, typer.Option(help="A ResNet for small images: no stride, no pooling at its start.")] = False,
    residuals: Annotated[str, typer.Option(help="summed, or averaged: halve each residual block's output.")] = "summed",
    freeze_bn: Annotated[bool, typer.Option(help="Freeze the running statistics of batch normalisations.")] = False,
    twin: Annotated[
        bool, typer.Option(help="Also train a twin: the same start and budget without the defence, loss on unscaled logits.")
    ] = False,
    amp: Annotated[bool, typer.Option(help="Automatic mixed precision.")] = False,
    amp_dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    model_ema: Annotated[bool, typer.Option(help="Keep and save timm's moving average of the weights.")] = False,
    model_ema_decay: Annotated[float, typer.Option(help="Share of the average kept in a step, less at first.")] = 0.999,
    seed: Annotated[int, typer.Option(help="Seed of new weights and of the order of the images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    resume: Annotated[bool, typer.Option(help="Continue the interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
) -> None:
    """Fine-tune a timm model with the spectral norms of its layers kept at or below --max-norm.

    A --recipe sets options; options on the command line override it.

    The progress line shows the loss, the accuracy (acc) of a training batch, and the largest norm of a layer, or of a layer
    together with the batch normalisation after it where both are clipped together.

    On several GPUs: torchrun --nproc-per-node 2 -m robust_spectral.evaluations finetune …; each takes its share of every batch.
    """
    options = {field.name: context.params[field.name] for field in fields(FinetuneConfig)}
    config = FinetuneConfig(**options | {"max_norm": None if max_norm == math.inf else max_norm})  # fails before slow work
    from ..finetuning import finetune as run
    from ..finetuning import finetune_twins, ranks

    if twin:
        defence = config.defence if config.fastclip else "none"  # without a max_norm FastClip is off, others are not
        plain = replace(
            config, defence=defence, max_norm=None, lipschitz_target=None, logit_scale=1.0, objective="accuracy",
            margin_eps=0.0, lift=False,
        )  # fmt: skip
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
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing; show the finished runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Fine-tune and evaluate every run of a file; continue where an earlier call was stopped.

    Start it once for each core or GPU, with a --device of its own: the processes share the runs. The figures are in grid.json;
    `leaderboard` makes a site of the folder.
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
        console.print(
            f"at most {best['drop']:g} points below the plain run: {told}", highlight=False, markup=False, soft_wrap=True
        )
