"""Entries for RobustBench's leaderboards, made and checked without the package robustbench.

A board is a folder ``<dataset>/<threat model>`` of JSON files, one for each model, from which the leaderboards are rendered.
`model_info` makes such an entry from a model's figures, `problems` lists the errors of any entry, and `write_model_info` writes
it. The robust accuracy of an entry must be that of the official AutoAttack; no other figure is put in its place.
"""

from __future__ import annotations

import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

BOARDS = {
    "cifar10/L2": ("0.5",),
    "cifar10/Linf": ("8/255", "0.031"),
    "cifar100/Linf": ("8/255",),
    "imagenet/Linf": ("4/255",),
    "cifar10/corruptions": (),
    "cifar100/corruptions": (),
    "imagenet/corruptions": (),
}  # board -> its sizes of perturbation as RobustBench writes them, the usual one first
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}

_TEXTS = ("link", "name", "authors", "venue", "architecture")
_ALWAYS = (*_TEXTS, "additional_data", "number_forward_passes", "dataset", "eps", "clean_acc", "reported")
_CORRUPTIONS = ("corruptions_acc", "corruptions_acc_3d", "corruptions_mce", "corruptions_mce_3d")
_FIELDS = {*_ALWAYS, "autoattack_acc", "external", "unreliable", "footnote", *_CORRUPTIONS}
_NUMBER = re.compile(r"\d{1,3}(\.\d{1,2})?")
_MODEL_NAME = re.compile(r"[A-Za-z-]+\d{4}[A-Za-z0-9_.-]+")


def model_info(
    board: str, *, link: str, name: str, authors: str, venue: str, architecture: str, additional_data: bool, images: int,
    clean_acc: float, autoattack_acc: float, reported: float | None = None, external: float | None = None,
    unreliable: bool | None = None, footnote: str | None = None, number_forward_passes: int = 1, eps: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The entry of a model on an L2 or Linf board. Accuracies are given as shares in [0, 1] and written in per cent.

    Args:
        board: ``cifar10/L2``, ``cifar10/Linf``, ``cifar100/Linf`` or ``imagenet/Linf``.
        link: Address of the paper.
        name: Title of the paper.
        authors: Full names with commas between them.
        venue: Where and when it appeared, such as "ICML 2020".
        architecture: Such as "WideResNet-28-10".
        additional_data: Whether the model was trained on more than the dataset's training images.
        images: Number of test images that the accuracies were measured on; must be the whole test set.
        clean_acc: Accuracy without attack.
        autoattack_acc: Robust accuracy under the official AutoAttack, version "standard", at ``eps``; not under another attack
            or a subset of its attacks, and not a certified accuracy.
        reported: The robust accuracy that the paper claims.
        external: The lowest robust accuracy known from another evaluation, where it is below ``autoattack_acc``.
        unreliable: Whether AutoAttack raised a flag that its figure may be too high; None if not checked.
        footnote: Text shown with the entry.
        number_forward_passes: Forward passes of the network for one prediction.
        eps: Size of the perturbation as written on the board; default the board's.

    Raises:
        ValueError: the board is unknown, ``images`` is not the whole test set, or the entry has `problems`.
    """
    if not BOARDS.get(board):
        raise ValueError(f"model_info(board={board!r}): expected one of {', '.join(b for b, sizes in BOARDS.items() if sizes)}")
    dataset = board.split("/")[0]
    if images != TEST_IMAGES[dataset]:
        raise ValueError(f"model_info(images={images}): figures must be of all {TEST_IMAGES[dataset]} test images of {dataset}")
    info: dict[str, Any] = {
        "link": link, "name": name, "authors": authors, "additional_data": additional_data,
        "number_forward_passes": number_forward_passes, "dataset": dataset, "venue": venue, "architecture": architecture,
        "eps": BOARDS[board][0] if eps is None else eps, "clean_acc": _percent("clean_acc", clean_acc),
        "reported": "" if reported is None else _percent("reported", reported),
        "autoattack_acc": _percent("autoattack_acc", autoattack_acc),
    }  # fmt: skip
    lower = None if external is None else _percent("external", external)
    optional = {"external": lower, "footnote": footnote, "unreliable": unreliable}
    info |= {key: value for key, value in optional.items() if value is not None}
    _raise_if_any("model_info", problems(info, board))
    return info


def problems(info: dict[str, Any], board: str | None = None) -> list[str]:
    """The errors of an entry for a board; empty if it is valid.

    Args:
        info: The content of a JSON file.
        board: The board, ``<dataset>/<threat model>``; default the `board_of` the entry.
    """
    board = board_of(info) if board is None else board
    if board not in BOARDS:
        return [f"there is no board {board!r}; the boards are {', '.join(BOARDS)}"]
    accuracy = "corruptions_acc" if board.endswith("/corruptions") else "autoattack_acc"
    found = [f"{key} is missing" for key in (*_ALWAYS, accuracy) if key not in info]
    found += [f"{key} is no field of an entry" for key in info if key not in _FIELDS]
    found += _text_problems(info) + _kind_problems(info, board) + _figure_problems(info, accuracy)
    return found


def board_of(info: dict[str, Any]) -> str:
    """The board of an entry. Its threat model is not a field, but follows from its accuracies and eps."""
    corruptions = any(info.get(key) is not None for key in _CORRUPTIONS)
    return f"{info.get('dataset')}/{'corruptions' if corruptions else 'L2' if info.get('eps') == '0.5' else 'Linf'}"


def write_model_info(info: dict[str, Any], folder: str | Path, model_name: str) -> Path:
    """Write an entry to ``<folder>/<dataset>/<threat model>/<model_name>.json``, replacing a file of that name.

    Args:
        info: The entry.
        folder: The folder of all boards.
        model_name: First author's name, year, first word of the title, and a suffix to distinguish models of one paper.

    Raises:
        ValueError: the name has another form, or the entry has `problems`.
    """
    if not _MODEL_NAME.fullmatch(model_name):
        raise ValueError(
            f"write_model_info(model_name={model_name!r}): expected <Name><Year><FirstWord>, as in Lee2026Norms_R18"
        )
    _raise_if_any("write_model_info", problems(info))
    path = Path(folder) / board_of(info) / f"{model_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(info, indent=2) + "\n", encoding="ascii")
    os.replace(scratch, path)
    return path


def _percent(key: str, share: float) -> str:
    if not 0 <= share <= 1:
        raise ValueError(f"model_info({key}={share}): give a share between 0 and 1, not per cent")
    return f"{100 * share:.2f}"


def _raise_if_any(call: str, found: list[str]) -> None:
    if found:
        raise ValueError(f"{call}: {'; '.join(found)}")


def _text_problems(info: dict[str, Any]) -> list[str]:
    baseline = info.get("venue") == "N/A"  # models without a paper have no authors
    needed = [key for key in _TEXTS if key in info and not (key == "authors" and baseline and info[key] == "")]
    found = [f"{key} is {info[key]!r}; expected a text" for key in needed if not _is_text(info[key])]
    if _is_text(info.get("link")) and not info["link"].startswith(("https://", "http://")):
        found.append(f"link is {info['link']!r}; expected an address that starts with https://")
    if not isinstance(info.get("footnote"), str | None):
        found.append(f"footnote is {info['footnote']!r}; expected a text")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _kind_problems(info: dict[str, Any], board: str) -> list[str]:
    dataset, eps, passes = info.get("dataset"), info.get("eps"), info.get("number_forward_passes", 1)
    flags = [key for key in ("additional_data", "unreliable") if not isinstance(info.get(key, False), bool)]
    found = [f"{key} is {info[key]!r}; expected true or false" for key in flags]
    if "dataset" in info and dataset != board.split("/")[0]:
        found.append(f"dataset is {dataset!r} on the board {board}")
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        found.append(f"number_forward_passes is {passes!r}; expected a whole number from 1 on")
    if "eps" in info and BOARDS[board] and eps not in BOARDS[board]:
        found.append(f"eps is {eps!r}; the board {board} has {' or '.join(map(repr, BOARDS[board]))}")
    if not BOARDS[board] and not (eps is None or isinstance(eps, str)):
        found.append(f"eps is {eps!r}; expected null, or the size trained with as a text")
    return found


def _figure_problems(info: dict[str, Any], accuracy: str) -> list[str]:
    needed = {"clean_acc", accuracy, "external"}  # a null in external breaks the rendering
    keys = [key for key in ("external", "autoattack_acc", "clean_acc", *_CORRUPTIONS) if key in info]
    figures = {key: info[key] for key in keys if key in needed or info[key] is not None}
    if info.get("reported") not in ("", None):
        figures["reported"] = info["reported"]
    bad = [key for key, value in figures.items() if not _is_figure(value, math.inf if "_mce" in key else 100)]
    found = [f"{key} is {figures[key]!r}; expected per cent as a text with two decimals, such as '53.42'" for key in bad]
    chain = [key for key in keys if key in figures and key not in (*bad, *_CORRUPTIONS)]
    return found + [
        f"{a} {figures[a]} is above {b} {figures[b]}" for a, b in pairwise(chain) if float(figures[a]) > float(figures[b])
    ]


def _is_figure(value: Any, most: float) -> bool:
    return isinstance(value, str) and bool(_NUMBER.fullmatch(value)) and float(value) <= most
