"""The layers that a clipper controls, and their targets: by pattern, relative, with a warm-up, for a whole network."""

import math
from collections.abc import Callable

import pytest
import torch
from convnets import train, true_norms
from reference import norm, same_bits, snapshot
from timm.layers import StdConv2d
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.clipping.moved_parameters import MoveGamma


@pytest.mark.parametrize("target", [0.2, 1.0])
def test_a_lipschitz_target_for_the_network_is_met_after_finish(target: float, convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.AdamW(convnet.parameters(), lr=0.003)
    clipper = rs.FastClip(convnet, images, max_norm=math.inf, lipschitz_target=target)
    clipper.attach(optimizer)
    train(convnet, optimizer, images, 10)
    assert len({row["target"] for row in clipper.report()}) == 1
    clipper.finish()
    bound = rs.lipschitz_bound(convnet, images, box=None).value
    assert 0.8 * target <= bound <= target


def test_a_lipschitz_target_above_the_bound_of_the_network_clips_nothing(convnet: nn.Module, images: Tensor) -> None:
    before = snapshot(convnet)
    rs.FastClip(convnet, images, max_norm=math.inf, lipschitz_target=1e6).finish()
    assert same_bits(before, snapshot(convnet))


class Skipping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_lipschitz_target_out_of_reach_or_without_a_bound_is_an_error(images: Tensor) -> None:
    same_size = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match="clip more layers"):
        rs.FastClip(Skipping(same_size), images, lipschitz_target=0.9).finish()
    with pytest.raises(ValueError, match="GLU"):
        rs.FastClip(nn.Sequential(same_size, nn.GLU(3)), images, lipschitz_target=1.0).finish()
    with pytest.raises(ValueError, match="lipschitz_target"):
        rs.FastClip(same_size, images, lipschitz_target=0.0)


@pytest.mark.parametrize("start, steps", [(16.0, 4), (0.5, 4)], ids=["from above", "from below"])
def test_the_target_falls_geometrically_from_the_layers_own_norm(start: float, steps: int) -> None:
    model = nn.Linear(6, 6, bias=False)
    nn.init.orthogonal_(model.weight, start)
    clipper = rs.FastClip(model, torch.zeros(1, 6), max_norm=1.0, warmup_steps=steps, vectors=6)
    seen = []
    for _ in range(steps + 1):
        clipper.step()
        seen.append(norm(model, (6,)))
    wanted = [max(start, 1.0) ** (1 - step / steps) for step in (1, 2, 3, 4, 4)] if start > 1 else [start] * 5
    assert seen == pytest.approx(wanted, rel=1e-4)


def test_the_target_falls_from_each_layers_own_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer, size in zip(model, (81.0, 16.0), strict=True):
        nn.init.orthogonal_(layer.weight, size)
    clipper = rs.FastClip(model, torch.zeros(1, 4), warmup_steps=4, vectors=4)
    for wanted in ((27.0, 8.0), (9.0, 4.0), (3.0, 2.0), (1.0, 1.0)):
        clipper.step()
        assert [norm(layer, (4,)) for layer in model] == pytest.approx(wanted, rel=1e-4)


def test_finish_clips_to_the_final_target_whatever_the_warmup(convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=0.5, warmup_steps=1000)
    clipper.step()
    clipper.finish()
    assert max(true_norms(convnet)) <= 0.5005


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan], ids=str)
def test_a_target_that_is_not_positive_is_an_error(max_norm: float, convnet: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        rs.FastClip(convnet, images, max_norm=max_norm)


@pytest.mark.parametrize("wrong", [{"max_norm": "1"}, {"max_norm": {"*": None}}, {"lipschitz_target": "1"}], ids=str)
def test_a_target_that_is_not_a_number_is_an_error(wrong: dict, convnet: nn.Module, images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"FastClip\(.*=('1'|None)\): must be a number"):
        rs.FastClip(convnet, images, **wrong)


@pytest.mark.parametrize(
    "layer", [StdConv2d(3, 4, 3), torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))], ids=["StdConv2d", "spectral_norm"]
)
def test_a_layer_that_cannot_be_clipped_is_refused_by_name(layer: nn.Module, images: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="'1'"):
        rs.FastClip(nn.Sequential(nn.Identity(), layer), images)


def test_a_model_without_linear_layers_is_an_error(images: Tensor) -> None:
    with pytest.raises(ValueError, match="no convolution"):
        rs.FastClip(nn.Sequential(nn.ReLU()), images)


def test_targets_are_set_by_layer_name_and_layers_without_one_are_left_alone(convnet: nn.Module, images: Tensor) -> None:
    before = snapshot(convnet)
    clipper = rs.FastClip(convnet, images, max_norm={"0": 0.3, "[1-7]": 0.5})
    clipper.finish()
    assert [(row["name"], row["target"]) for row in clipper.report()] == [("0", 0.3), ("3", 0.5)]
    assert [row["upper"] <= 1.001 * row["target"] for row in clipper.report()] == [True, True]
    assert torch.equal(before["8.weight"], convnet[8].weight)


@pytest.mark.parametrize(
    "chosen, names",
    [({"include": "3"}, ["3"]), ({"exclude": ["8", "0"]}, ["3"]), ({"include": ["0", "8"], "exclude": "8"}, ["0"])],
    ids=str,
)
def test_layers_are_chosen_by_pattern(chosen: dict, names: list[str], convnet: nn.Module, images: Tensor) -> None:
    assert [layer.name for layer in rs.FastClip(convnet, images, **chosen).layers] == names


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"include": "convs.*"}, "include.*convs"),
        ({"exclude": ["head"]}, "exclude.*head"),
        ({"max_norm": {"head": 1.0}}, "max_norm.*head"),
        ({"exclude": "*"}, "no layer is left"),
        ({"max_norm": {"0": 0.0}}, "must be positive"),
        ({"max_norm": math.nan}, "must be positive"),
        ({"every": 0}, "at least 1"),
        ({"composites": "never", "move": MoveGamma()}, "composites only"),
        ({"sweeps": 0}, "at least 1"),
        ({"vectors": 0}, "at least 1"),
    ],
    ids=str,
)
def test_an_invalid_option_is_an_error(wrong: dict, words: str, convnet: nn.Module, images: Tensor) -> None:
    before = snapshot(convnet)
    with pytest.raises(ValueError, match=words):
        rs.FastClip(convnet, images, **wrong)
    assert same_bits(before, snapshot(convnet))


def test_a_relative_target_is_a_multiple_of_each_layers_own_norm(convnet: nn.Module, images: Tensor) -> None:
    own = true_norms(convnet)
    clipper = rs.FastClip(convnet, images, max_norm=0.5, relative=True)
    clipper.finish()
    assert true_norms(convnet) == pytest.approx([0.5 * value for value in own], rel=2e-2)
    assert [row["target"] for row in clipper.report()] == pytest.approx([0.5 * value for value in own], rel=2e-2)


def test_a_lipschitz_target_is_refused_where_a_normalisation_can_undo_the_clip(convnet: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"lipschitz_target=2.*2 layers.*eval mode"):
        rs.FastClip(convnet.train(), images, math.inf, lipschitz_target=2.0).finish()
    with pytest.raises(ValueError, match="2 layers"):
        rs.FastClip(convnet.eval(), images, math.inf, lipschitz_target=2.0, composites="never").finish()
    rs.FastClip(convnet.train(), images, math.inf, lipschitz_target=2.0, move=MoveGamma()).finish()
    assert 1 <= rs.lipschitz_bound(convnet, images, box=None).value <= 2


@pytest.mark.parametrize("call", [rs.FastClip.norms, rs.FastClip.step, rs.FastClip.finish])
def test_a_lipschitz_target_is_spread_over_the_layers_under_autocast(
    call: Callable[[rs.FastClip], object], convnet: nn.Module, images: Tensor
) -> None:
    clipper = rs.FastClip(convnet, images, 10.0, lipschitz_target=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        call(clipper)
    assert all(tracked.target < 10 for tracked in clipper._tracked.values())


def test_a_zero_layer_has_no_relative_target() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    clipper = rs.FastClip(model, torch.zeros(1, 4), max_norm=0.5, relative=True, warmup_steps=5)
    for _ in range(6):
        clipper.step()
    assert [row["target"] is None for row in clipper.report()] == [True, False]


def test_a_wrong_batch_optimizer_or_state_is_an_error_that_names_what_was_given(convnet: nn.Module, images: Tensor) -> None:
    with pytest.raises(TypeError, match="a tensor; got tuple"):
        rs.FastClip(convnet, tuple(images.shape))  # type: ignore[arg-type]
    clipper = rs.FastClip(convnet, images)
    with pytest.raises(TypeError, match=r"takes an optimizer, .* got Sequential"):
        clipper.attach(convnet)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes the state_dict"):
        clipper.load_state_dict(convnet.state_dict())
