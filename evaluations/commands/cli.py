"""Measure, bound and constrain spectral norms: spectrum, finetune, grid, evaluate, report, leaderboard, export.

Exit status: 0 success; 1 an attack or a check refuted a certificate, which is a fault of this package; 2 user error, explained
in one line; 130 interrupted: run the same command again to continue, finetune with --resume.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from typer.core import TyperGroup

from ..terminal import console, errors
from .evaluate_command import evaluate
from .finetune_command import finetune, grid
from .spectrum_command import spectrum


class _Interruptible(TyperGroup):
    """Commands that report when they are interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _print_interrupted()
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Interruptible, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)


app.command()(spectrum)
app.command()(finetune)
app.command()(grid)
app.command()(evaluate)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show the figures of an evaluated run, and write its page, report.html."""
    from ..reporting import print_report, write_report

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
    """Build a static site that ranks the models of many runs; open its index.html in a browser."""
    from ..leaderboard import build

    rows = build(runs, out, say=lambda text: errors.print(text, markup=False, highlight=False))
    if as_json:
        typer.echo((out / "leaderboard.json").read_text(), nl=False)
    else:
        models = len({row["id"] for row in rows})
        console.print(f"{models} models, {len(rows)} rows: {out / 'index.html'}", markup=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")],
    to: Annotated[str, typer.Option(help="hub: a folder for timm and its hub; robustbench: entry and images.")] = "hub",
    about: Annotated[
        Path | None, typer.Option(help="For robustbench: JSON with link, name, authors, venue, architecture, …")
    ] = None,
    board: Annotated[str, typer.Option(help="For robustbench: its dataset and threat model.")] = "cifar10/L2",
    entry: Annotated[str, typer.Option(help="For robustbench: the entry's name, such as Lee2026Norms_R18.")] = "",
) -> None:
    """Export a run for timm and the Hugging Face hub, or for RobustBench."""
    from ..publishing import to_hub, to_robustbench

    if to not in ("hub", "robustbench"):
        raise ValueError(f"export(to={to!r}): expected hub or robustbench")
    if to == "hub":
        to_hub(run, out)
    elif about is None:
        raise ValueError("export(to='robustbench'): needs --about, a JSON file with link, name, authors, venue, architecture …")
    else:
        to_robustbench(run, out, board, entry, about)
    console.print(f"written: {out}", markup=False, soft_wrap=True)


def _print_interrupted() -> None:
    errors.print(Text("interrupted; finished work is kept: the same command continues, finetune with --resume"), soft_wrap=True)


def main() -> None:
    """Run the command line; a user error is one line on standard error and exit status 2."""
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, about a file that is then refused with an error
    try:
        app()
    except KeyboardInterrupt:
        _print_interrupted()
        sys.exit(130)
    except (MemoryError, torch.OutOfMemoryError) as error:
        told = f"out of memory, give a smaller --block or --batch-size: {error}"
    except ImportError as error:
        told = f"{error}; pip install 'robust-spectral[{'ray' if error.name == 'ray' else 'evaluations'}]'"
    except (ValueError, NotImplementedError, OSError) as error:
        if os.environ.get("ROBUST_SPECTRAL_TRACEBACK") == "1":
            raise
        told = str(error)
    else:
        return
    errors.print(Text.assemble(("error: ", "bold red"), told), soft_wrap=True)
    sys.exit(2)
