"""`linear_layers`: layers and composites are found by dataflow, not by names."""

import pytest
import timm
import torch
from cases import randomised
from reference import norm, same_bits, snapshot
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import robust_spectral as rs


class Swapped(nn.Module):
    """A convolution followed by a batch normalisation, declared in reverse order under meaningless names."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = randomised(nn.BatchNorm2d(4))
        self.omega = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha(self.omega(x))


class ActivatedBetween(nn.Module):
    """conv -> ReLU -> BN, where the ReLU may or may not write into the convolution's output."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation, self.bn = nn.Conv2d(3, 4, 3), activation, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.activation(self.conv(x)))


class Doubled(nn.Module):
    """In-place arithmetic between a convolution and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).mul_(2))


class Shared(nn.Module):
    """One convolution, applied to inputs of two shapes and to one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(self.conv(self.conv(x))))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def described(model: nn.Module, x: Tensor) -> list[tuple[str, str, str | None]]:
    return [(layer.name, layer.kind, layer.batchnorm_name) for layer in rs.linear_layers(model, x)]


def test_layers_come_in_the_order_of_the_forward_pass(convnet: nn.Module, images: Tensor) -> None:
    layers = rs.linear_layers(convnet, images)
    assert [layer.name for layer in layers] == ["0", "3", "8"]
    assert [layer.in_shape for layer in layers] == [(3, 8, 8), (6, 8, 8), (32,)]
    assert [layer.kind for layer in layers] == ["conv+bn", "conv+bn", "dense"]
    assert layers[0].module is convnet[0] and layers[0].batchnorm is convnet[1]


def test_a_composite_is_found_by_dataflow_whatever_its_parts_are_called(images: Tensor) -> None:
    model = Swapped().eval()
    assert described(model, images) == [("omega", "conv+bn", "alpha")]
    true = norm(nn.Sequential(model.omega, model.alpha), (3, 8, 8))
    assert true in rs.spectral_norm(rs.linear_layers(model, images)[0].operator())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)], ids=str)
def test_an_activation_between_convolution_and_batchnorm_prevents_a_composite(activation: nn.Module, images: Tensor) -> None:
    assert described(ActivatedBetween(activation), images) == [("conv", "conv", None)]


def test_an_in_place_change_between_convolution_and_batchnorm_prevents_a_composite(images: Tensor) -> None:
    assert described(Doubled(), images) == [("conv", "conv", None)]


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.5)], ids=str)
def test_the_norm_is_correct_with_an_identity_between_convolution_and_batchnorm(between: nn.Module, images: Tensor) -> None:
    model = ActivatedBetween(between).eval()
    layer = rs.linear_layers(model, images)[0]
    alone, composite = norm(model.conv, (3, 8, 8)), norm(nn.Sequential(model.conv, model.bn), (3, 8, 8))
    assert (composite if layer.batchnorm else alone) in rs.spectral_norm(layer.operator())


def test_a_batchnorm_before_a_convolution_forms_no_composite(images: Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    assert described(model, images) == [("1", "conv", None)]


def test_a_batchnorm_with_activation_forms_a_composite_by_its_affine_part(images: Tensor) -> None:
    act = randomised(BatchNormAct2d(4), [2.0, -1.0, 0.0, 0.5])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act).eval()
    (layer,) = rs.linear_layers(model, images)
    affine = nn.BatchNorm2d(4)
    affine.load_state_dict(act.state_dict())
    assert layer.kind == "conv+bn"
    assert norm(nn.Sequential(model[0], affine), (3, 8, 8)) in rs.spectral_norm(layer.operator())


@pytest.mark.parametrize(
    "layer, batchnorm, x, kind",
    [
        (nn.Linear(5, 4), nn.BatchNorm1d(4), torch.zeros(2, 5), "dense+bn"),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), torch.zeros(2, 3, 6), "conv+bn"),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), torch.zeros(2, 2, 3, 3, 3), "conv+bn"),
        (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), torch.zeros(2, 3, 4, 4), "conv+bn"),
    ],
    ids=["dense", "conv1d", "conv3d", "transposed"],
)
def test_every_kind_of_layer_forms_a_composite(layer: nn.Module, batchnorm: nn.Module, x: Tensor, kind: str) -> None:
    model = nn.Sequential(layer, randomised(batchnorm)).eval()
    (found,) = rs.linear_layers(model, x)
    assert found.kind == kind
    assert norm(model, x.shape[1:]) in rs.spectral_norm(found.operator())
    assert norm(layer, x.shape[1:]) in rs.spectral_norm(found.operator(composite=False))


def test_the_input_shape_of_a_dense_layer_on_a_sequence_is_its_features() -> None:
    (layer,) = rs.linear_layers(nn.Linear(4, 3), torch.zeros(2, 7, 4))
    assert (layer.name, layer.in_shape) == ("", (4,))


def test_a_batchnorm_over_the_sequence_axis_of_a_dense_layer_forms_no_composite() -> None:
    model = nn.Sequential(nn.Linear(4, 6), randomised(nn.BatchNorm1d(5))).eval()
    assert described(model, torch.zeros(2, 5, 4)) == [("0", "dense", None)]


def test_a_shared_module_is_listed_once_for_each_shape(images: Tensor) -> None:
    layers = rs.linear_layers(Shared(), images)
    assert [(layer.name, layer.in_shape) for layer in layers] == [("conv", (3, 8, 8)), ("conv#2", (3, 4, 4))]
    assert layers[0].module is layers[1].module


def test_tied_weights_are_listed_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert described(model, torch.zeros(1, 4)) == [("0", "dense", None), ("2", "dense", None)]


def test_a_layer_that_is_not_applied_is_not_listed() -> None:
    assert described(Unused(), torch.zeros(1, 4)) == [("used", "dense", None)]


def test_the_model_is_left_unchanged(convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    convnet[1].eval()
    for parameter in convnet.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, modes, random = snapshot(convnet), [part.training for part in convnet.modules()], torch.get_rng_state()
    rs.spectral_norms(convnet, images)
    assert same_bits(before, snapshot(convnet))
    assert [part.training for part in convnet.modules()] == modes
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in convnet.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in convnet.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_the_model_is_left_unchanged_when_the_forward_pass_fails(convnet: nn.Module) -> None:
    convnet.train()
    with pytest.raises(ValueError):
        rs.linear_layers(convnet, torch.zeros(1, 4, 8, 8))
    assert all(part.training for part in convnet.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in convnet.modules())


def test_a_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no convolution and no dense layer"):
        rs.linear_layers(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.zeros(1, 3))


def test_an_input_that_the_model_does_not_take_is_an_error(convnet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        rs.linear_layers(convnet, torch.zeros(1, 4, 8, 8))


def test_spectral_norms_gives_the_norms_of_the_composites(convnet: nn.Module, images: Tensor) -> None:
    found = rs.spectral_norms(convnet, images)
    assert list(found) == ["0", "3", "8"]
    assert norm(convnet[:2], (3, 8, 8)) in found["0"]
    assert norm(convnet[3:5], (6, 8, 8)) in found["3"]
    assert norm(convnet[8], (32,)) in found["8"]


def test_spectral_norms_gives_the_norms_of_the_layers_alone_on_request(convnet: nn.Module, images: Tensor) -> None:
    found = rs.spectral_norms(convnet, images, composites=False)
    assert norm(convnet[0], (3, 8, 8)) in found["0"]
    assert norm(convnet[3], (6, 8, 8)) in found["3"]


def test_a_layer_with_weights_that_are_not_finite_is_an_error(convnet: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        convnet[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        rs.spectral_norms(convnet, images)


def test_every_convolution_of_a_timm_resnet_forms_its_composite() -> None:
    model = timm.create_model("test_resnet", pretrained=False, num_classes=10)
    layers = rs.linear_layers(model, torch.zeros(1, 3, 32, 32))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.module for layer in layers if layer.kind == "conv+bn"] == [
        layer.module for layer in layers if isinstance(layer.module, nn.Conv2d)
    ]
    assert {id(layer.module) for layer in layers} == {id(module) for module in [*convolutions, model.fc]}
    assert {layer.batchnorm_name for layer in layers} >= {"conv1.1", "conv1.4", "bn1", "layer3.0.downsample.2"}


def test_a_compiled_model_is_analysed_without_being_compiled(convnet: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(convnet, backend=lambda graph, _: pytest.fail("was compiled"))
    assert list(rs.spectral_norms(compiled, images)) == ["0", "3", "8"]
    bounds = [rs.lipschitz_bound(model, images, box=None).value for model in (convnet, compiled)]
    assert bounds[0] == bounds[1] < float("inf")
    assert rs.FastClip(compiled, images, 10.0, lipschitz_target=1.0).finish().keys() == {"0", "3", "8"}
