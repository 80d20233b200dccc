"""Models and examples that cannot be analysed: one sentence on what came, where, and what to do. Inference mode is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import norm
from timm.layers import StdConv2d
from torch import Tensor, nn

import robust_spectral as rs

X = torch.rand(2, 3, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))


def with_integers() -> nn.Sequential:
    model = net()
    model[4].weight = nn.Parameter(torch.ones(5, 256, dtype=torch.int8), requires_grad=False)
    return model


class Casting(nn.Module):
    """A model that runs its one layer in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.half())


class Particular(nn.Module):
    """A model that takes images of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 4, "images of 4 pixels"
        return self.fc(x)


REFUSALS: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "wrong channels": (net, torch.rand(1, 4, 8, 8), ValueError,
        r"batch \(n, \.\.\.\) of shape \(1, 4, 8, 8\): '0', Conv2d\(.*\), gets \(1, 4, 8, 8\) and takes 3 channels and 2"),
    "wrong image size": (net, torch.rand(1, 3, 9, 9), ValueError, r"'4', Linear\(.*\), gets \(1, 324\) and takes 256 features"),
    "no batch and no channels": (net, torch.rand(8), ValueError, r"gets \(8,\) and takes 3 channels and 2 spatial axes"),
    "window larger than the image": (lambda: nn.Conv2d(3, 3, 5), torch.rand(1, 3, 3, 3), ValueError, "needs more positions"),
    "half model": (lambda: net().half(), X, ValueError,
        r"reaches '0' \(Conv2d\) as torch.float32 and the weights are torch.float16; give example_input.to\(torch.float16\)"),
    "double model": (lambda: net().double(), X, ValueError, r"give example_input.to\(torch.float64\)"),
    "integer images": (net, (X * 255).byte(), ValueError, r"as torch.uint8 and the weights are torch.float32"),
    "model that casts": (Casting, torch.rand(1, 4), ValueError, r"reaches 'fc' \(Linear\) as torch.float16"),
    "model with an assertion": (Particular, torch.rand(1, 5), ValueError, "AssertionError: images of 4 pixels"),
    "meta model": (lambda: net().to("meta"), X, ValueError, r"'0.weight' of Sequential is on the meta device .* load the"),
    "meta model and example": (lambda: net().to("meta"), X.to("meta"), ValueError, "on the meta device and has no values"),
    "meta example": (net, X.to("meta"), ValueError, "it is on meta and the weights are on cpu"),
    "integer weights": (with_integers, X, NotImplementedError,
        r"the weight of '4' \(Linear\) is torch.int8; quantised layers are not covered"),
    "complex weights": (lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)), torch.rand(1, 4), NotImplementedError,
        r"the weight of '0' \(Linear\) is complex; only real layers"),
    "complex weights and example": (lambda: nn.Linear(4, 3, dtype=torch.complex64), torch.rand(1, 4, dtype=torch.complex64),
        NotImplementedError, "'weight' of Linear is complex"),
    "array": (net, X.numpy(), TypeError, r"got ndarray; give torch.as_tensor"),
    "tuple": (net, (X,), TypeError, "got tuple; a model of several inputs has to be wrapped"),
    "dict": (net, {"x": X}, TypeError, "got dict; a model of several inputs"),
    "nothing": (net, None, TypeError, "got NoneType"),
    "function": (lambda: torch.relu, X, TypeError, "model must be an nn.Module; got builtin_function_or_method"),
    "no layer": (lambda: nn.LSTM(4, 3), torch.rand(1, 2, 4), ValueError, "no dense layer of torch.nn .* consists of LSTM"),
}  # fmt: skip


@pytest.mark.parametrize("make, example, error, text", REFUSALS.values(), ids=list(REFUSALS))
def test_a_model_or_an_example_is_refused_in_one_sentence(make, example, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        rs.spectral_norms(make(), example)
    assert "\n" not in str(raised.value)
    assert not [raw for raw in ("mat1 and mat2", "Given groups", "expected scalar type", "aten::") if raw in str(raised.value)]


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_refused_by_its_layers() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear})
    with pytest.raises(ValueError, match=r"quantised layers, such as '0' \(Linear\).*before its quantisation"):
        rs.spectral_norms(model, torch.zeros(1, 4))


def test_layers_of_a_meta_model_are_found_with_a_meta_example() -> None:
    assert [layer.in_shape for layer in rs.linear_layers(net().to("meta"), X.to("meta"))] == [(3, 8, 8), (256,)]


@pytest.mark.parametrize("in_shape, error", [
    (3, TypeError), (torch.zeros(3), TypeError), ("3", TypeError), ((3.5,), TypeError), (None, TypeError), ((), ValueError),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("call", [rs.linear_operator, rs.clip_], ids=["linear_operator", "clip_"])
def test_a_shape_that_is_none_is_refused_with_an_example(call, in_shape: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{call.__name__}\(in_shape=.*: give the shape of one input,? without the batch axis"):
        call(nn.Linear(3, 4), in_shape)


@pytest.mark.parametrize("module, in_shape, error, text", [
    (torch.relu, (3,), TypeError, "takes an nn.Module"),
    (with_integers()[4], (256,), NotImplementedError, r"'weight' of Linear is torch.int8"),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (4, 5, 5), ValueError, "takes 3 channels and 2 spatial axes"),
    (StdConv2d(3, 4, 3), (4, 5, 5), ValueError, "StdConv2d takes 3 channels and 2 spatial axes"),
    (nn.Conv2d(3, 4, 3), (3, 2, 2), ValueError, "needs more positions for its window and padding"),
], ids=["function", "integers", "channels", "derived class", "window"])  # fmt: skip
def test_a_layer_without_an_operator_is_refused_in_one_sentence(module, in_shape, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rs.linear_operator(module, in_shape)


def test_a_type_that_is_no_floating_point_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype=torch.int8\): give torch.float32 or torch.float64"):
        rs.linear_operator(nn.Linear(3, 4), (3,), torch.int8)


def test_weights_of_eight_bits_are_measured_in_float32() -> None:
    module = nn.Linear(16, 8, bias=False).to(torch.float8_e4m3fn)
    wanted = float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
    assert wanted in rs.spectral_norm(rs.linear_operator(module, (16,)))


@pytest.mark.parametrize("where", ["model and example made outside", "example made inside", "both made inside"])
def test_norms_are_the_same_in_inference_mode(where: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(net(), nn.Unflatten(1, (5, 1, 1)), StdConv2d(5, 3, 1)).eval()
    state, wanted = model.state_dict(), rs.spectral_norms(model, X)
    with torch.inference_mode():
        example = X if where == "model and example made outside" else X.clone()
        if where == "both made inside":
            model = nn.Sequential(net(), nn.Unflatten(1, (5, 1, 1)), StdConv2d(5, 3, 1)).eval()
            model.load_state_dict(state)
        assert rs.spectral_norms(model, example) == wanted
    assert rs.spectral_norms(model, example) == wanted


def test_a_clipper_made_in_inference_mode_works_outside_of_it() -> None:
    model = net().eval()
    with torch.inference_mode():
        clipper = rs.FastClip(model, X.clone(), 0.3)
        layer = rs.linear_layers(model, X)[1]
        clipper.step()
    for _ in range(3):
        clipper.step()
    clipper.finish()
    assert norm(model[:2], (3, 8, 8)) <= 0.3004 and norm(layer.module, (256,)) <= 0.3004


def test_weights_made_in_inference_mode_are_not_clipped() -> None:
    with torch.inference_mode():
        model = net()
    for call in (lambda: rs.FastClip(model, X), lambda: rs.clip_(model[4], (256,), 0.1)):
        with pytest.raises(ValueError, match=r"weights were made in torch.inference_mode\(\) .* outside of it"):
            call()
