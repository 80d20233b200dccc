"""`fold_batchnorms_`: the outputs stay the same, and models that cannot be folded are refused."""

import copy

import pytest
import timm
import torch
from cases import randomised
from reference import norm, same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs


def test_a_folded_model_gives_the_same_outputs(convnet: nn.Module, images: Tensor) -> None:
    before = convnet(images)
    assert rs.fold_batchnorms_(convnet, images) == ["1", "4"]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in convnet)
    torch.testing.assert_close(convnet(images), before, rtol=1e-5, atol=1e-6)
    assert convnet[3].bias is not None and convnet[3].bias.requires_grad


def test_the_norm_of_a_folded_layer_is_the_norm_of_the_composite(convnet: nn.Module, images: Tensor) -> None:
    composite = norm(convnet[3:5], (6, 8, 8))
    rs.fold_batchnorms_(convnet, images)
    assert norm(convnet[3], (6, 8, 8)) == pytest.approx(composite, rel=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_folded_timm_model_keeps_its_outputs_activations_and_mode(name: str) -> None:
    model, images = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            randomised(part)
    before, found = model(images), len(rs.linear_layers(model, images))
    folded = rs.fold_batchnorms_(model, images)
    assert folded and not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-4)
    assert len(rs.linear_layers(model, images)) == found and not any(part.training for part in model.modules())


@pytest.mark.parametrize(
    "layer, in_shape",
    [(nn.ConvTranspose2d(3, 4, 3, bias=False), (3, 5, 5)), (nn.Linear(6, 4), (6,)), (nn.Conv1d(2, 4, 3), (2, 9))],
    ids=["transposed", "dense", "one axis"],
)
def test_transposed_dense_and_1d_layers_are_folded(layer: nn.Module, in_shape: tuple[int, ...]) -> None:
    kind = nn.BatchNorm2d if len(in_shape) == 3 else nn.BatchNorm1d
    model, x = nn.Sequential(layer, randomised(kind(4), [0.5, -2.0, 0.0, 1.0])).eval(), torch.randn(3, *in_shape)
    before = model(x)
    rs.fold_batchnorms_(model, x)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.one(self.conv(x))))


@pytest.mark.parametrize(
    "model, culprit",
    [
        (Shared(), "used more than once"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), "grouped"),
        (nn.Sequential(timm.layers.StdConv2d(3, 4, 3), nn.BatchNorm2d(4)), "forward pass of its own"),
    ],
    ids=["shared", "no statistics", "transposed groups", "standardised"],
)  # fmt: skip
def test_a_model_that_cannot_be_folded_is_refused_and_unchanged(model: nn.Module, culprit: str) -> None:
    model = copy.deepcopy(model).eval()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=culprit):
        rs.fold_batchnorms_(model, torch.randn(2, 3, 8, 8))
    assert same_bits(before, snapshot(model))


@pytest.mark.parametrize("override", [
    lambda conv: conv.register_forward_hook(lambda module, inputs, output: output + 1),
    lambda conv: setattr(conv, "forward", lambda input: input[:, :1].expand(-1, 6, -1, -1)),
], ids=["hook", "replaced forward"])  # fmt: skip
def test_a_batchnorm_after_an_overridden_convolution_is_not_folded(convnet: nn.Module, images: Tensor, override) -> None:
    override(convnet[0])
    before = snapshot(convnet)
    with pytest.raises(NotImplementedError, match=r"'0' .* has a forward pass of its own"):
        rs.fold_batchnorms_(convnet, images)
    assert same_bits(before, snapshot(convnet))


def test_a_batchnorm_with_a_hook_is_not_folded(convnet: nn.Module, images: Tensor) -> None:
    convnet[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    before = convnet(images)
    assert rs.fold_batchnorms_(convnet, images) == ["4"]
    torch.testing.assert_close(convnet(images), before, rtol=1e-5, atol=1e-6)
