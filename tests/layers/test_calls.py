"""Layers as a model calls them: by keyword, with an output size, without a batch axis, with hooks, compiled."""

import copy
from collections.abc import Callable

import pytest
import torch
from cases import randomised
from reference import map_norm, norm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import robust_spectral as rs


class Decoder(nn.Module):
    """A transposed convolution, called by a function, and a batch normalisation."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], kind: type[nn.Module] = nn.ConvTranspose2d) -> None:
        super().__init__()
        self.up, self.bn, self.call = kind(3, 4, 3, stride=2, padding=1), randomised(nn.BatchNorm2d(4), [1.5, -2, 1, 0.3]), call

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.call(self.up, x))


class ByKeyword(nn.Module):
    """A convolution, a batch normalisation and a dense layer, all called with ``input=``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), randomised(nn.BatchNorm2d(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=self.bn(input=self.conv(input=x)).mean((2, 3)))


class WithScale(nn.Linear):
    """A dense layer whose call takes a factor."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return super().forward(x) * (1.0 if scale is None else scale)


class Scaled(nn.Module):
    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.fc, self.scale = WithScale(4, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(scale=self.scale, x=x)


CALLS = {
    "positional": lambda up, x: up(x, [8, 8]),
    "keyword": lambda up, x: up(x, output_size=torch.Size([8, 8])),
    "both keywords": lambda up, x: up(output_size=(2, 4, 8, 8)[-2:], input=x),
    "unequal": lambda up, x: up(x, output_size=(7, 8)),
    "the default": lambda up, x: up(x, output_size=(7, 7)),
    "none": lambda up, x: up(x),
}  # fmt: skip
IMAGES = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_transposed_convolution_is_measured_as_it_is_called(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Decoder(call).double().eval()
    alone = rs.spectral_norms(model, IMAGES.double(), composites=False)["up"]
    composite = rs.spectral_norms(model, IMAGES.double())["up"]
    assert map_norm(lambda x: call(model.up, x), (3, 4, 4)) in alone
    assert map_norm(model, (3, 4, 4)) in composite


def test_the_output_size_changes_the_norm() -> None:
    """Otherwise the tests of this file could not tell the two apart."""
    torch.manual_seed(0)
    model = Decoder(CALLS["keyword"])
    called, default = (map_norm(lambda x, c=call: c(model.up, x), (3, 4, 4), torch.float32)
                       for call in (CALLS["keyword"], CALLS["none"]))  # fmt: skip
    assert called > 1.001 * default


@pytest.mark.parametrize("kind, shape, size", [
    (nn.ConvTranspose1d, (3, 5), (10,)), (nn.ConvTranspose3d, (3, 2, 3, 2), (4, 5, 4)),
], ids=["1d", "3d"])  # fmt: skip
def test_an_output_size_of_any_number_of_axes_is_taken_into_account(kind, shape, size) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = kind(3, 4, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=size)

    model = Model().double()
    (layer,) = rs.linear_layers(model, torch.zeros(1, *shape).double())
    assert layer.operator().out_shape == (4, *size)
    assert map_norm(model, shape) in rs.spectral_norm(layer.operator())


def test_two_output_sizes_of_one_layer_are_two_layers() -> None:
    model = Decoder(lambda up, x: up(x, output_size=(8, 8))[..., :7, :7] + up(x))
    layers = rs.linear_layers(model, IMAGES)
    assert [(layer.name, layer.output_padding) for layer in layers] == [("up", (1, 1)), ("up#2", None)]
    assert all(layer.module is model.up for layer in layers)


def test_a_parametrised_transposed_convolution_is_measured_as_it_is_called() -> None:
    model = Decoder(CALLS["keyword"]).double().eval()
    parametrizations.weight_norm(model.up)
    found = rs.spectral_norms(model, IMAGES.double(), composites=False)["up"]
    assert map_norm(lambda x: CALLS["keyword"](model.up, x), (3, 4, 4)) in found


def test_the_operator_of_a_call_with_an_output_size_follows_the_weights() -> None:
    model = Decoder(CALLS["keyword"]).double().eval()
    A = rs.linear_layers(model, IMAGES.double())[0].operator()
    model.up.weight = nn.Parameter(2 * model.up.weight.detach())
    assert map_norm(model, (3, 4, 4)) in rs.spectral_norm(A)


@pytest.mark.parametrize("override", [
    lambda up: up.register_forward_hook(lambda module, inputs, output: output),
    lambda up: setattr(up, "forward", up.forward),
], ids=["hook", "replaced forward"])  # fmt: skip
def test_an_output_size_of_an_overridden_layer_is_refused_by_name(override) -> None:
    model = Decoder(CALLS["keyword"])
    override(model.up)
    with pytest.raises(NotImplementedError, match=r"layer 'up' \(ConvTranspose2d\) is called with 'output_size'"):
        rs.spectral_norms(model, IMAGES)


@pytest.mark.parametrize("composites", [True, False])
def test_a_clip_of_a_layer_called_with_an_output_size_holds_the_norm_as_called(composites: bool) -> None:
    torch.manual_seed(1)
    model = Decoder(CALLS["keyword"]).eval()
    clipper = rs.FastClip(model, IMAGES, 0.4, composites="always" if composites else "never")
    for _ in range(5):
        clipper.step()
    assert clipper.finish()["up"].after.upper <= 0.4004
    call = model if composites else lambda x: CALLS["keyword"](model.up, x)
    assert 0.39 <= map_norm(call, (3, 4, 4), torch.float32) <= 0.4005


@pytest.mark.parametrize("move", [rs.MoveGamma(), rs.MoveWeightAndGamma()], ids=str)
def test_a_move_of_gamma_sees_the_output_size(move) -> None:
    model = Decoder(CALLS["keyword"]).eval()
    rs.FastClip(model, IMAGES, 0.4, move=move).finish()
    assert map_norm(model, (3, 4, 4), torch.float32) <= 0.4005


def test_a_clipper_of_a_layer_called_with_an_output_size_is_copied_with_its_model() -> None:
    model = Decoder(CALLS["keyword"]).eval()
    twin, clipper = copy.deepcopy((model, rs.FastClip(model, IMAGES, 0.4)))
    clipper.finish()
    assert map_norm(twin, (3, 4, 4), torch.float32) <= 0.4005 < map_norm(model, (3, 4, 4), torch.float32)


def test_layers_that_are_called_by_keyword_are_found() -> None:
    model = ByKeyword().eval()
    layers = rs.linear_layers(model, torch.zeros(2, 3, 6, 6))
    assert [(layer.name, layer.kind, layer.in_shape) for layer in layers] == [
        ("conv", "conv+bn", (3, 6, 6)), ("fc", "dense", (4,)),
    ]  # fmt: skip
    found = rs.spectral_norms(model, torch.zeros(2, 3, 6, 6))
    assert norm(nn.Sequential(model.conv, model.bn), (3, 6, 6)) in found["conv"]


def test_a_call_with_another_argument_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"layer 'fc' \(WithScale\) is called with 'scale'"):
        rs.spectral_norms(Scaled(3.0), torch.zeros(1, 4))
    with pytest.raises(NotImplementedError, match="'scale'"):
        rs.FastClip(Scaled(3.0), torch.zeros(1, 4))
    model = Scaled(None)
    assert map_norm(model, (4,), torch.float32) == pytest.approx(rs.spectral_norms(model, torch.zeros(1, 4))["fc"].upper)


def test_a_layer_may_be_called_without_a_batch_axis() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.fc(self.conv(image).mean((1, 2))) for image in x])

    assert [layer.in_shape for layer in rs.linear_layers(OneByOne(), torch.zeros(2, 3, 6, 6))] == [(3, 6, 6), (4,)]


def test_a_hook_on_the_convolution_is_part_of_its_composite(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomised(nn.BatchNorm2d(4))).double().eval()
    model[0].register_forward_hook(lambda module, inputs, output: output.cumsum(-1))
    (layer,) = rs.linear_layers(model, images.double())
    assert layer.kind == "conv+bn"
    assert map_norm(model, (3, 8, 8)) in rs.spectral_norm(layer.operator())


class DoublesInEval(nn.BatchNorm2d):
    """A batch normalisation with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("batchnorm", ["forward hook", "pre-hook", "replaced forward", "own class"])
def test_a_batchnorm_that_may_compute_something_else_forms_no_composite(batchnorm: str, images: Tensor) -> None:
    norms = DoublesInEval(4) if batchnorm == "own class" else nn.BatchNorm2d(4)
    if batchnorm == "forward hook":
        norms.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif batchnorm == "pre-hook":
        norms.register_forward_pre_hook(lambda module, inputs: None)
    elif batchnorm == "replaced forward":
        old = norms.forward
        norms.forward = lambda input: 2 * old(input)  # type: ignore[method-assign]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norms).eval()
    (layer,) = rs.linear_layers(model, images)
    assert layer.batchnorm is None
    assert norm(model[0], (3, 8, 8)) in rs.spectral_norm(layer.operator())


@pytest.mark.slow
@pytest.mark.parametrize("called", [True, False])
def test_a_model_compiled_in_place_is_analysed_without_being_compiled(convnet: nn.Module, images: Tensor, called: bool) -> None:
    wanted = rs.spectral_norms(convnet, images)
    convnet.compile(backend="eager" if called else (lambda graph, _: pytest.fail("was compiled")))
    if called:
        convnet(images)
    assert rs.spectral_norms(convnet, images) == wanted


@pytest.mark.slow
def test_a_model_with_compiled_parts_is_analysed_without_being_compiled() -> None:
    fail = lambda graph, _: pytest.fail("was compiled")  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    wanted = rs.spectral_norms(model, torch.zeros(1, 4))
    model[0].compile(backend=fail)
    model[2] = torch.compile(model[2], backend=fail)
    assert list(rs.spectral_norms(model, torch.zeros(1, 4)).values()) == list(wanted.values())
