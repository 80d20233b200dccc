"""The leaderboard: a static site made from nothing but the reports and example images of the runs under a folder.

    index.html           a board for every level (data, norm, size of the perturbation), with sorting and filters
    models/<id>.html     a page for each model
    leaderboard.json     every row of every board

The same runs give the same bytes, independently of the clock, of the order of a directory and of the place of the runs. Pages
contain their style, script and pictures, so that they can be opened from a disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..reporting import examples, layer_norms, render, robustness, uri
from ..run_folder import write_json, write_text
from .entries import Entry, Figures, read_entries
from .scatter import markers, picture
from .standings import Board, Row, boards

MAKER = '<meta name="generator" content="robust-spectral leaderboard">'


def build(root: Path, out: Path, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Write the site, and return the rows of all boards, as in its leaderboard.json.

    Args:
        root: Folder with runs, at any depth.
        out: Folder of the site; pages of models that no longer exist are removed from it.
        say: Called with one line for each thing that is left out, with the reason.

    Raises:
        ValueError: there is no such folder, no evaluated run in it, or the index.html in ``out`` is no leaderboard.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give the one that the runs are in")
    entries = read_entries(root, say)
    if not entries:
        raise ValueError(f"{root}: no evaluated run; make one with `robust-spectral finetune` and `robust-spectral evaluate`")
    index = out / "index.html"
    if index.is_file() and MAKER not in index.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{index}: is no leaderboard; give another --out, nothing was overwritten")
    levels = boards(entries)
    rows = [row for board in levels for row in board.rows]
    write_json(out / "leaderboard.json", rows)
    write_text(out / "index.html", _index(entries, levels))
    for entry in entries:
        write_text(out / "models" / f"{entry.id}.html", _page(entry, levels, say))
    _forget(out / "models", {entry.id for entry in entries})
    return rows


def _index(entries: list[Entry], levels: list[Board]) -> str:
    first = max(levels, key=lambda board: len(board.rows))
    shapes = markers([entry.figures["defence"] for entry in entries])
    pictures = {board.id: picture(board) for board in levels}
    return render("leaderboard.html", boards=levels, first=first, models=len(entries), shapes=shapes, pictures=pictures,
                  around_images=any(entry.figures["local_certificates"] for entry in entries))  # fmt: skip


def _page(entry: Entry, levels: list[Board], say: Callable[[str], None]) -> str:
    try:
        shown = examples(entry.folder)
    except ValueError as error:
        say(f"{error}; the page is written without them")
        shown = []
    standings = [(board, row) for board in levels for row in board.rows if row["id"] == entry.id]
    return render("model.html", entry=entry, figures=entry.figures, standings=standings, examples=shown,
                  plots=_plots(entry.figures), around_images=bool(entry.figures["local_certificates"]))  # fmt: skip


def _plots(figures: Figures) -> dict[str, list[str]]:
    """The pictures of a model as data URIs, because their internal names would clash in one page."""
    drawn = _for_charts(figures)
    norms = sorted({e["norm"] for e in drawn["robust"]})
    curves = [robustness({_label(figures["defence"]): drawn}, norm) for norm in norms]
    layers = [layer_norms({_label(figures["defence"]): drawn})] if figures["layers"] else []
    return {
        name: [uri("image/svg+xml", svg.encode()) for svg in made] for name, made in (("curves", curves), ("layers", layers))
    }


def _for_charts(figures: Figures) -> dict[str, Any]:
    """The figures for the pictures: only valid ones, with NaN, which is not drawn, for missing numbers."""

    def cells(key: str) -> list[Figures]:
        known = [e for e in figures[key] if e["valid"] is not False]
        return [{**e, "attack": _label(e["attack"]), "ci": e["ci"] or [e["accuracy"]] * 2} for e in known]

    gap = float("nan")
    layers = [{**layer, "name": _label(layer["name"]), "kind": _label(layer["kind"]),
               **{key: gap if layer[key] in (None, float("inf")) else layer[key] for key in ("lower", "upper", "before")}}
              for layer in figures["layers"]]  # fmt: skip
    accuracy = {"clean": gap if figures["clean"]["accuracy"] is None else figures["clean"]["accuracy"]}
    return {
        "accuracy": accuracy,
        "robust": cells("robust"),
        "certified": cells("certified"),
        "certified_local": cells("certified_local"),
        "curves": [{**e, "attack": _label(e["attack"])} for e in figures["curves"] if e["valid"] is not False],
        "layers": layers,
    }


def _label(text: str) -> str:
    """A text that a picture can show: no formula, no character that its font lacks."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")[:60]


def _forget(folder: Path, kept: set[str]) -> None:
    """Remove the pages of models that no longer exist, if this program made them."""
    for page in folder.glob("*.html"):
        if page.stem not in kept and MAKER in page.read_text(encoding="utf-8", errors="replace"):
            page.unlink()
