"""timm models with their input normalisation: loading, errors, and the Lipschitz rules of timm's layers."""

import pytest
import timm
import torch
from reference import gain
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import nn

import robust_spectral as rs
from robust_spectral.plugins.timm import load


def test_loaded_model_takes_pixels_and_normalises_inside():
    model = load("test_resnet", num_classes=10)
    x = torch.rand(2, 3, 32, 32)
    config = model.model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(model(x), model.model((x - mean) / std))


def test_normalisation_of_a_colour_model_is_averaged_for_grey_images():
    model = load("test_resnet", in_chans=1)
    assert model.normalize.mean.shape == (1, 1, 1)
    assert float(model.normalize.std) == pytest.approx(sum(model.model.pretrained_cfg["std"]) / 3)


def test_a_given_mean_and_std_are_applied_and_counted_in_the_lipschitz_bound():
    given, plain = load("test_resnet", mean=(0.1, 0.2, 0.3), std=(0.5,)), load("test_resnet", mean=(0,), std=(1,))
    plain.model.load_state_dict(given.model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    assert torch.equal(given(x), given.model((x - mean) / 0.5)) and torch.equal(plain(x), plain.model(x))
    bounds = [rs.lipschitz_bound(model, x, 0.0).value for model in (given, plain)]
    assert bounds[0] == pytest.approx(2 * bounds[1], rel=1e-6)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"mean": (0.5,)}, "give both"),
        ({"mean": (0.5,), "std": (0.0,)}, "std positive"),
        ({"mean": (0.5, 0.5), "std": (1,)}, "one for each of 3 channels"),
        ({"mean": (float("nan"),), "std": (1,)}, "one number"),
    ],
)
def test_an_invalid_mean_or_std_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        load("test_resnet", **given)


def test_unknown_model_name_offers_the_nearest_ones():
    with pytest.raises(ValueError, match=r"resnet18"):
        load("resnet18x")


def test_pretrained_weights_of_a_model_without_published_weights_are_an_error():
    with pytest.raises(ValueError, match="no weights for it; give a checkpoint"):
        load("darknet17", pretrained=True)


def test_a_checkpoint_round_trips_through_timm(tmp_path):
    model = load("test_resnet", num_classes=10)
    save_file(model.model.state_dict(), tmp_path / "weights.safetensors")
    plain = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.model(x), plain(x))
    again = load("test_resnet", num_classes=10, checkpoint=tmp_path / "weights.safetensors")
    assert torch.equal(model(x), again(x))


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_keys(tmp_path):
    save_file(load("test_resnet", num_classes=10).model.state_dict(), tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match=r"fc\.weight is \(10, 96\) where the model has \(7, 96\)"):
        load("test_resnet", num_classes=7, checkpoint=tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match="missing"):
        load("test_efficientnet", num_classes=10, checkpoint=tmp_path / "ten.safetensors")


def test_missing_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load("test_resnet", checkpoint=tmp_path / "nowhere.pth")


def test_pretrained_file_is_adapted_to_another_head(tmp_path):
    source = load("test_resnet", num_classes=1000)
    save_file(source.model.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    adapted = load("test_resnet", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(adapted.model.layer1[0].conv1.weight, source.model.layer1[0].conv1.weight)
    assert adapted(torch.rand(1, 3, 32, 32)).shape == (1, 5)


def test_inverse_standard_deviation_is_part_of_the_lipschitz_bound():
    model = load("test_resnet", num_classes=10)
    x = torch.rand(1, 3, 32, 32)
    inner = rs.lipschitz_bound(model.model, x, 0.0).value
    outer = rs.lipschitz_bound(model, x, 0.0).value
    assert outer == pytest.approx(inner / float(model.normalize.std.min()), rel=1e-6)


def test_a_batchnorm_with_activation_is_bounded_by_its_affine_norm_times_the_slope():
    bn = BatchNormAct2d(4, act_layer=nn.SiLU).eval()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -3.0, 0.5, 2.0]))
    bound = rs.lipschitz_bound(bn, torch.rand(1, 4, 5, 5)).value
    assert bound == pytest.approx(3 / (1 + bn.eps) ** 0.5 * 1.09984, rel=1e-6)


def test_a_network_of_depthwise_convolutions_has_a_finite_bound_above_its_estimate():
    model = load("tf_efficientnet_lite0", num_classes=10)
    x = torch.rand(2, 3, 32, 32)
    bound = rs.lipschitz_bound(model, x)
    assert bound.reason is None
    assert 0 < rs.lipschitz_estimate(model, x) <= bound.value


@pytest.mark.parametrize("kind", ["RmsNorm", "RmsNorm2d"])
def test_normalisations_by_the_root_mean_square_are_bounded(kind: str) -> None:
    norm = getattr(timm.layers, kind)(4, eps=1e-2)
    shape = (4, 3, 3) if kind.endswith("2d") else (4,)
    found = rs.lipschitz_bound(nn.Sequential(norm).double(), torch.zeros(1, *shape, dtype=torch.float64))
    assert found.value == pytest.approx(10, rel=1e-6)
    x = 0.01 * torch.randn(64, *shape, dtype=torch.float64)
    y = 0.01 * torch.randn(64, *shape, dtype=torch.float64)
    assert gain(norm.double(), x, y) <= found.value
