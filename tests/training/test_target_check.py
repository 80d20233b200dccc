"""A Lipschitz target counts as met only where neither a sampled Jacobian nor the model itself refutes the network's bound."""

import math

import pytest
import torch
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.training import fastclip, target_check


def finish(model: nn.Module, images: Tensor, target: float) -> None:
    rs.FastClip(model, images, max_norm=math.inf, lipschitz_target=target).finish()


@pytest.mark.slow
def test_a_bound_below_the_sampled_slope_is_an_error(
    convnet: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastclip, "lipschitz_bound", lambda *_: rs.LipschitzBound(0.0))
    message = (
        r"FastClip\(lipschitz_target=0.5\): not known to be met.*a sampled Jacobian norm, 0\.\d+, is above the bound of the"
    )
    with pytest.raises(ValueError, match=message):
        finish(convnet, images, 0.5)


@pytest.mark.slow
def test_a_graph_that_is_not_the_model_is_an_error(convnet: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def differs(model: nn.Module, examples: Tensor) -> str:
        asked.append((model, examples.shape))
        return "outputs differ by 3 at batch size 4"

    monkeypatch.setattr(target_check, "disagreement", differs)
    with pytest.raises(
        ValueError, match="not known to be met, since the bound is refuted: outputs differ by 3 at batch size 4"
    ):
        finish(convnet, images, 1.0)
    assert asked == [(convnet, (2, 3, 8, 8))]


@pytest.mark.slow
def test_the_bound_is_checked_only_once_it_meets_the_target(
    convnet: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(fastclip, "check_target", lambda model, example, bound, target: seen.append(bound.value))
    finish(convnet, images, 0.5)
    assert len(seen) == 1 and seen[0] <= 0.5


@pytest.mark.parametrize("outputs", [3, 300])
def test_a_true_bound_passes_for_few_and_many_outputs_and_a_small_one_fails(outputs: int) -> None:
    model = nn.Sequential(nn.Linear(20, outputs, bias=False))
    nn.init.orthogonal_(model[0].weight, 2.0)
    example = torch.rand(1, 20)
    target_check.check_target(model, example, rs.LipschitzBound(2.0), 3.0)
    with pytest.raises(ValueError, match="a sampled Jacobian norm"):
        target_check.check_target(model, example, rs.LipschitzBound(0.1), 3.0)


def test_a_model_without_gradients_is_checked_by_its_graph_alone() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    target_check.check_target(Detached(4, 3), torch.rand(1, 4), rs.LipschitzBound(1e-9), 1.0)
    indices = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    target_check.check_target(indices, torch.zeros(1, 2, dtype=torch.long), rs.LipschitzBound(0.0), 1.0)
