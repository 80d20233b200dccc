"""The charts of a report, as SVG text. Lines differ in dash and marker as well as in colour."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#c0392b", "#2e7d32", "#6a3d9a")
STYLE = {
    "font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "robust_spectral", "svg.fonttype": "path",
}  # fmt: skip
KINDS: dict[str, tuple[Any, str]] = {"clean": (":", ""), "pgd": ("-", "o"), "autoattack": ("", "X"), "certified": ("--", "v"),
         "certified_local": ((0, (6, 1, 1, 1)), "^")}  # fmt: skip
_CURVES: tuple[Any, ...] = ("-", "-.", (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1)))  # dashes of attacks that minimise the perturbation


def robustness(models: dict[str, dict[str, Any]], norm: str) -> str:
    """Accuracy against the size of the perturbation: clean, under each attack, and certified, for every model, if valid.

    An attack that minimises the perturbation is a curve over all sizes, others are points at theirs.

    Certificates around single images are a curve of their own, with the number of images in its label.

    The axis of sizes is logarithmic, because certified sizes are orders of magnitude smaller than attacked ones.
    """
    figure, axes = _canvas(7.6, 4.2)
    for colour, (name, figures) in zip(COLOURS, models.items(), strict=False):
        clean = 100 * figures["accuracy"]["clean"]
        axes.axhline(clean, color=colour, ls=KINDS["clean"][0], lw=1.2, label=f"{name}: clean")
        shown = [e for e in figures["robust"] if e["norm"] == norm and e.get("valid") is not False]
        curves = [c for c in figures.get("curves", []) if c["norm"] == norm and c.get("valid") is not False]
        for attack in sorted({e["attack"] for e in shown} - {"worst case", *(c["attack"] for c in curves)}):
            entries = sorted((e for e in shown if e["attack"] == attack), key=lambda e: e["eps"])
            _attack_line(axes, colour, name, attack, entries)
        for dashes, curve in zip(_CURVES, (c for c in curves if c["attack"] != "worst case"), strict=False):
            axes.step(curve["sizes"], [100 * accuracy for accuracy in curve["accuracies"]], where="post", color=colour, lw=1.2,
                      ls=dashes, label=f"{name}: {curve['attack']}")  # fmt: skip
        for kind in ("certified", "certified_local"):
            valid = [e for e in figures.get(kind, []) if e["norm"] == norm and e.get("valid") is not False]
            if any(e["accuracy"] for e in valid):
                _certified_line(axes, colour, name, kind, sorted(valid, key=lambda e: e["eps"]))
    axes.set(xlabel=f"size of the perturbation, {'L2' if norm == 'l2' else 'L∞'}, pixels in [0, 1]", ylabel="accuracy, %",
             ylim=(-2, 102), xscale="log")  # fmt: skip
    _name_near_sizes(axes)
    _legend(axes)
    return _svg(figure)


def _name_near_sizes(axes: Axes) -> None:
    """Label the attacked sizes, if they are too close together for powers of ten."""
    marked = [np.asarray(line.get_xdata(), dtype=float) for line in axes.lines if line.get_marker() not in ("None", "")]
    sizes = np.unique(np.concatenate(marked)) if marked else np.zeros(0)
    if len(sizes) and sizes[-1] < 30 * sizes[0]:
        axes.minorticks_off()
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])


def _attack_line(axes: Axes, colour: str, name: str, attack: str, entries: list[dict[str, Any]]) -> None:
    x, y = [e["eps"] for e in entries], [100 * e["accuracy"] for e in entries]
    below = [100 * (e["accuracy"] - e["ci"][0]) for e in entries]
    above = [100 * (e["ci"][1] - e["accuracy"]) for e in entries]
    line, marker = KINDS.get(attack, ("-.", "s"))
    axes.errorbar(
        x, y, yerr=[below, above], color=colour, ls=line or "none", marker=marker, ms=8 if attack == "autoattack" else 5,
        capsize=2, elinewidth=0.8, label=f"{name}: {attack}",
    )  # fmt: skip


def _certified_line(axes: Axes, colour: str, name: str, kind: str, entries: list[dict[str, Any]]) -> None:
    label = "certified" if kind == "certified" else f"certified around each\nimage ({entries[0]['n']} images)"
    axes.plot([e["eps"] for e in entries], [100 * e["accuracy"] for e in entries], color=colour, marker=KINDS[kind][1], ms=4,
              ls=KINDS[kind][0], lw=1.4, label=f"{name}: {label}")  # fmt: skip


def layer_norms(models: dict[str, dict[str, Any]]) -> str:
    """Spectral norm of every layer before and after fine-tuning."""
    first = next(iter(models.values()))["layers"]
    figure, axes = _canvas(7.6, max(2.6, 0.19 * len(first) + 1.2))
    rows = list(range(len(first)))
    axes.plot([row["before"] for row in first], rows, ls="", marker="|", ms=10, mew=2, color="#555555", label="before")
    for colour, marker, (name, figures) in zip(COLOURS, "os^D", models.items(), strict=False):
        axes.plot(
            [row["upper"] for row in figures["layers"]], rows, ls="", marker=marker, ms=5, color=colour, label=f"{name}: after"
        )
    targets = {row["target"] for figures in models.values() for row in figures["layers"] if row["target"]}
    for target in sorted(targets):
        axes.axvline(target, color="#555555", lw=0.8, ls="--")
    axes.set(xlabel="spectral norm (proved upper end)", xscale="symlog" if _has_zero(models) else "log")
    _name_layers(axes, first)
    _legend(axes)
    return _svg(figure)


def layer_spectra(layers: list[dict[str, Any]]) -> str:
    """The proved interval of every layer's spectral norm, and estimates of its largest singular values if there are any."""
    figure, axes = _canvas(7.6, max(2.6, 0.19 * len(layers) + 1.2))
    rows = list(range(len(layers)))
    axes.hlines(rows, [row["lower"] for row in layers], [row["upper"] for row in layers], color=COLOURS[0], lw=3)
    ends = [row["upper"] for row in layers]
    axes.plot(ends, rows, ls="", marker="|", ms=10, mew=2, color=COLOURS[0], label="proved interval")
    points = [(value, i) for i, row in enumerate(layers) for value in row["top"]]
    if points:
        axes.plot(*zip(*points, strict=True), ls="", marker=".", color=COLOURS[1], label="largest singular values (estimates)")
    axes.set(xlabel="singular value")
    axes.set_xlim(left=-0.01 * max(ends))
    _name_layers(axes, layers)
    _legend(axes)
    return _svg(figure)


def training_norms(training: dict[str, list[dict[str, Any]]]) -> str:
    """The norm of every layer over the training steps, as estimated in training, and the largest one drawn heavier."""
    figure, axes = _canvas(7.6, 3.2)
    for colour, (name, rows) in zip(COLOURS, training.items(), strict=False):
        if not rows:
            continue
        steps = [row["step"] for row in rows]
        for layer in rows[0]["norms"]:
            axes.plot(steps, [row["norms"][layer] for row in rows], color=colour, lw=0.5, alpha=0.45)
        axes.plot(steps, [row["largest_norm"] for row in rows], color=colour, lw=2, label=f"{name}: largest layer")
    axes.set(xlabel="training step", ylabel="spectral norm (estimate)", yscale="log")
    _legend(axes)
    return _svg(figure)


def accuracies(groups: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, *, logarithmic: bool = False) -> str:
    """A point for each model, (x, accuracy in %); up to forty groups differ in marker or filling, and in colour."""
    figure, axes = _canvas(7.6, 4.6)
    for index, (name, points) in enumerate(groups.items()):
        if points:
            filling = ("full", "none", "left", "top")[index // 10 % 4]
            axes.plot(*zip(*points, strict=True), ls="", marker="os^DvP*X<>"[index % 10], ms=6, label=name,
                      color=COLOURS[index % len(COLOURS)], fillstyle=filling)  # fmt: skip
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(-2, 102), xscale="log" if logarithmic else "linear")
    _legend(axes)
    return _svg(figure)


def _name_layers(axes: Axes, layers: list[dict[str, Any]]) -> None:
    """Label the vertical axis with the layers, the first one on top."""
    axes.set_yticks(range(len(layers)), [f"{row['name']} ({row['kind']})" for row in layers], fontsize=8)
    axes.invert_yaxis()


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _has_zero(models: dict[str, dict[str, Any]]) -> bool:
    return any(row["upper"] == 0 or row["before"] == 0 for figures in models.values() for row in figures["layers"])


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
