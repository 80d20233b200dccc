"""Spectral norms held, measured and proved: spectrum, finetune, grid, evaluate, report, leaderboard, export.

Exit status: 0 done; 1 an attack broke what was certified, a fault of this package; 2 a mistake that you can mend, told in one
line; 130 interrupted: the same command goes on, finetune with --resume.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from robust_spectral import linear_layers, lipschitz_bound, spectral_norm, top_singular

from .command_evaluate import evaluate
from .command_finetune import finetune, grid
from .terminal import console, errors

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)


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


app.command()(finetune)
app.command()(grid)
app.command()(evaluate)


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
