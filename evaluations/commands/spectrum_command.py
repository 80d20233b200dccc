"""The command that measures and bounds a network without changing it: spectrum."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor, nn

from robust_spectral import (
    LinearLayer,
    LipschitzBound,
    linear_layers,
    lipschitz_bound,
    refined_bound,
    spectral_norm,
    top_singular,
)

from ..config import numbers
from ..run_folder import make_folder, write_text
from ..terminal import console, errors

_IMAGE_SIZE, _CHANNELS = 224, 3
Row = dict[str, Any]


def spectrum(
    model: Annotated[str, typer.Argument(help="A timm model, resnet18 or timm/resnet18, or the folder of a run.")],
    image_size: Annotated[int | None, typer.Option(help="Height and width of the input; 224, or the run's.")] = None,
    in_chans: Annotated[int | None, typer.Option(help="Channels of the input; 3, or the run's.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes; the model's own, or the run's.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Load timm's published weights.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="A local checkpoint of the model.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of the pixels a timm model was trained on, 0.49,0.48,0.45; 0 for raw pixels.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, in the form of --mean; 1 for raw pixels.")] = None,
    failure_probability: Annotated[
        float, typer.Option(help="Failure probability of each upper bound; 0 for deterministic bounds only.")
    ] = 1e-9,
    composites: Annotated[bool, typer.Option(help="Measure a layer together with the batch normalisation after it.")] = True,
    refine: Annotated[
        float, typer.Option(help="Seconds for a smaller Lipschitz bound, by multipliers for all activations together.")
    ] = 0.0,
    top: Annotated[int, typer.Option(help="Also estimate this many of each layer's largest singular values.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write the intervals, and the values of --top, as an SVG picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a proved interval for the spectral norm of every linear layer of a model, and the network's Lipschitz bound."""
    given = {"image_size": image_size, "in_chans": in_chans, "num_classes": num_classes, "checkpoint": checkpoint,
             "pretrained": pretrained or None, "mean": numbers("mean", mean), "std": numbers("std", std)}  # fmt: skip
    if wrong := [f"{name}={value}" for name, value in given.items() if isinstance(value, int) and value < 1]:
        raise ValueError(f"spectrum({', '.join(wrong)}): must be positive")
    if top < 0:
        raise ValueError(f"spectrum(top={top}): must not be negative")
    if not 0 <= refine < math.inf:
        raise ValueError(f"spectrum(refine={refine}): give seconds, at least 0")
    if refine and failure_probability == 0:
        raise ValueError(
            "spectrum(refine, failure_probability=0): a refined bound is probabilistic; give a probability above 0"
        )
    if plot is not None:
        make_folder(plot.parent)  # fails before slow work
    net, example = _network(model, given)
    layers: list[Row] = []
    with errors.status("") as status:  # not shown in a file or a pipe
        for layer in linear_layers(net, example):
            status.update(Text(layer.name))
            layers.append(_row(layer, failure_probability, composites, top))
    if plot is not None:
        from ..reporting import layer_spectra

        write_text(plot, layer_spectra(layers))
    bound = _bounded(net, example, failure_probability, refine)
    if as_json:
        typer.echo(json.dumps({"model": model, "layers": layers, **_told(bound)}, indent=1))
    else:
        _print(model, layers, bound)


def _network(model: str, given: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The model, and an input of its shape; ``given`` contains the options for a timm model, None where not given."""
    from robust_spectral.plugins.timm import load, load_weights

    from ..models import load_model, logits_of, sized

    name, folder = model.removeprefix("timm/"), Path(model)
    if (folder / "run.json").is_file() or (folder / "config.json").is_file() or ("/" in name and ":" not in name):
        if wrong := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]:
            raise ValueError(f"spectrum {model}: {', '.join(wrong)} goes with a timm model; a run has a model of its own")
        net, run = load_model(folder)
        return net.eval(), torch.zeros(1, run["channels"], run["image_size"], run["image_size"])
    channels, size = given["in_chans"] or _CHANNELS, given["image_size"] or _IMAGE_SIZE
    net = load(name, bool(given["pretrained"]), num_classes=given["num_classes"], in_chans=channels, mean=given["mean"],
               std=given["std"], **sized(name, size))  # fmt: skip
    if given["checkpoint"] is not None:
        load_weights(net.model, given["checkpoint"], "give the --num-classes and --in-chans of the checkpoint")
    example = torch.zeros(1, channels, size, size)
    logits_of(net, example, model)
    return net, example


def _bounded(net: nn.Module, example: Tensor, failure_probability: float, seconds: float) -> LipschitzBound:
    """The network's bound, refined for a time."""
    if seconds == 0:
        return lipschitz_bound(net, example, failure_probability)
    with errors.status("refining the Lipschitz bound") as status:

        def show(part: float, value: float) -> None:
            status.update(f"refining the Lipschitz bound: {value:.6g}, {part:.0%} of the time")

        return refined_bound(net, example, seconds, failure_probability, progress=show)


def _row(layer: LinearLayer, failure_probability: float, composites: bool, top: int) -> Row:
    operator = layer.operator(composite=composites)
    norm = spectral_norm(operator, failure_probability)
    values = top_singular(operator, top).values.tolist() if top else []
    return {"name": layer.name, "kind": layer.kind, "in_shape": "x".join(map(str, layer.in_shape)),
            "lower": norm.lower, "upper": norm.upper, "method": norm.method, "top": values}  # fmt: skip


def _told(bound: LipschitzBound) -> Row:
    proved = {"lipschitz_bound": bound.value, "lipschitz_bound_in_pixel_box": bound.local}
    return {**{key: None if math.isinf(value) else value for key, value in proved.items()}, "reason": bound.reason}


def _print(model: str, layers: list[Row], bound: LipschitzBound) -> None:
    top = any(row["top"] for row in layers)
    columns = ["kind", "input", "lower", "upper", "proved by", *(["estimates"] if top else [])]
    table = Table(Column("layer", overflow="fold"), *columns, title=f"{model}: spectral norms")
    for row in layers:
        estimates = [" ".join(f"{value:.4g}" for value in row["top"])] if top else []
        table.add_row(row["name"], row["kind"], row["in_shape"], f"{row['lower']:.5g}", f"{row['upper']:.5g}", row["method"],
                      *estimates)  # fmt: skip
    console.print(table)
    console.print(f"Lipschitz bound (pixels in [0, 1] -> logits, L2): {bound.value:.6g}" if bound.reason is None
                  else f"Lipschitz bound: none, {bound.reason}")  # fmt: skip
    if bound.local < bound.value:
        console.print(f"Lipschitz bound between images with pixels in [0, 1]: {bound.local:.6g}")
