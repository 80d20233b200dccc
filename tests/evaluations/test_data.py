"""Data sets by name: disjoint splits, pixels in [0, 1], and errors that say what to do."""

import hashlib
import struct

import pytest
import torch
from PIL import Image

from robust_spectral.evaluations.data.image_data import check_pixels, data_hash, load_data


@pytest.mark.parametrize("name, shape", [("digits", (1, 8, 8)), ("mnist5k", (1, 28, 28)), ("photos", (3, 64, 64))])
def test_built_in_data_sets_have_pixels_in_0_1_and_ten_classes(name, shape):
    data = load_data(name)
    images, labels = data.test_images(100)
    assert images.shape == (100, *shape) and (data.channels, data.image_size) == (shape[0], shape[2])
    assert images.min() >= 0 and images.max() <= 1
    assert data.classes == 10 and set(labels.tolist()) == set(range(10))


def test_training_and_test_split_share_no_image():
    data = load_data("mnist5k")
    train = {image.numpy().tobytes() for image, _ in data.train}
    assert len(train) == 4000 and len(data.test) == 1000
    assert not any(image.numpy().tobytes() in train for image, _ in data.test)


def test_images_are_resized_on_request_and_stay_in_the_box():
    images, _ = load_data("digits", 16).test_images(10)
    assert images.shape == (10, 1, 16, 16) and images.max() <= 1


def test_same_name_gives_the_same_images():
    first, second = (load_data("photos") for _ in range(2))
    assert data_hash(first) == data_hash(second)
    images, labels = first.test_images(first.tests)
    assert data_hash(first) == hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def test_unknown_name_offers_the_nearest_ones():
    with pytest.raises(ValueError, match="mnist5k"):
        load_data("mnist")


def test_pixels_outside_the_box_are_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        check_pixels(torch.tensor([0.0, 1.5]), "mine")
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        check_pixels(torch.tensor([0.0, float("nan")]), "mine")


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # timm leaves files open
def test_image_folder_is_read_through_timm(tmp_path):
    for split in ("train", "validation"):
        for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 40), colour).save(folder / f"{i}.png")
    data = load_data(f"folder:{tmp_path}", 32)
    images, labels = data.test_images(6)
    assert data.classes == 2 and images.shape == (6, 3, 32, 32) and data.came == "40x40"
    assert torch.equal(images[:, 0].mean((1, 2)).round().long(), labels)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:.*read-only")
def test_a_torchvision_data_set_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, 4, 28, 28) + bytes(4 * 28 * 28))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, 4) + bytes([1, 2, 3, 4]))
    data = load_data(f"torch/mnist:{tmp_path}", 32)
    images, labels = data.test_images(4)
    assert (data.classes, data.channels) == (10, 3) and images.shape == (4, 3, 32, 32) and labels.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name, words",
    [
        ("torch/cifar10", "needs the folder that contains it, as in torch/cifar10:PATH"),
        ("torch/cifar10:FOLDER", "cannot be read"),
        ("torch/nosuchset:FOLDER", "cannot be read"),
        ("folder:", "as in folder:PATH"),
        ("wds/mine", "pip install webdataset"),
    ],
)
def test_a_data_set_that_timm_cannot_read_is_an_error_with_advice(name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_data(name.replace("FOLDER", str(tmp_path)), 32)


def test_an_image_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size=-3: must be positive"):
        load_data("digits", -3)


def test_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_data(f"folder:{tmp_path / 'nowhere'}")
