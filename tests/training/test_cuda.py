"""Norms, clips and bounds on a GPU: the same as on a CPU, in full precision whatever the settings of the process."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from reference import norm
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.training import held_layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYERS = [
    (nn.Conv2d(3, 8, 3, padding=1), (3, 9, 9)), (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8)),
    (nn.Conv2d(4, 4, 3, groups=2, padding=1), (4, 7, 7)), (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 8, 8)),
    (nn.ConvTranspose2d(4, 3, 3, stride=2), (4, 5, 5)), (nn.Conv1d(2, 5, 3), (2, 12)), (nn.Linear(20, 11), (20,)),
    (nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)), (3, 8, 8)),
]  # fmt: skip


@pytest.fixture(params=[False, True], ids=["float32", "TF32 allowed"], autouse=True)
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("layer", "in_shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_an_interval_contains_the_true_norm(layer: nn.Module, in_shape: tuple[int, ...]) -> None:
    interval = rs.spectral_norm(rs.linear_operator(copy.deepcopy(layer).eval().cuda(), in_shape))
    true = norm(layer.eval(), in_shape)
    assert interval.lower <= true * (1 + 1e-12) and true <= interval.upper * (1 + 1e-12)
    assert interval.upper <= interval.lower * 1.02


@pytest.mark.parametrize(("layer", "in_shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_a_clipped_layer_meets_its_target(layer: nn.Module, in_shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).eval()
    target = 0.7 * norm(layer, in_shape)
    rs.clip_(layer.cuda(), in_shape, target)
    assert 0.99 * target <= norm(layer.cpu(), in_shape) <= 1.001 * target


def test_the_bound_of_a_network_agrees_with_the_cpu_and_is_above_its_estimate(convnet: nn.Module, images: Tensor) -> None:
    on_cpu = rs.lipschitz_bound(convnet, images, box=None).value
    on_gpu = rs.lipschitz_bound(copy.deepcopy(convnet).cuda(), images.cuda(), box=None).value
    assert on_gpu == pytest.approx(on_cpu, rel=1e-2)
    assert rs.lipschitz_estimate(copy.deepcopy(convnet).cuda(), images.cuda()) <= on_gpu


def test_norms_are_at_most_the_target_after_training_with_a_scaler_that_skips_steps(convnet: nn.Module, images: Tensor) -> None:
    model, images = convnet.cuda(), images.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)  # too large at first
    clipper = rs.FastClip(model, images)
    clipper.attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            value = F.cross_entropy(20 * model(images).float(), torch.tensor([0, 1], device="cuda"))
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0 < clipper.steps < 30
    clipper.finish()
    assert max(row["upper"] for row in clipper.report()) <= 1.001 * (1 + 1e-9)


@pytest.fixture
def smaller_twins_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_layer, "_CHEAP", 2e4)


@pytest.mark.usefixtures("smaller_twins_on_a_cpu")
def test_a_clipper_keeps_clipping_its_model_moved_to_the_gpu_and_back(convnet: nn.Module) -> None:
    clipper = rs.FastClip(convnet, torch.randn(1, 3, 24, 24), max_norm=0.5)
    for device in ("cpu", "cuda", "cpu"):
        convnet.to(device)
        for _ in range(40):
            with torch.no_grad():
                convnet[0].weight.mul_(1.005)
            clipper.step()
        assert max(row["lower"] for row in clipper.report()) <= 0.5 * 1.02


@pytest.mark.usefixtures("smaller_twins_on_a_cpu")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_a_clipper_is_restored_on_another_device(devices: tuple[str, str], convnet: nn.Module) -> None:
    images = torch.randn(1, 3, 24, 24)
    clipper = rs.FastClip(copy.deepcopy(convnet).to(devices[0]), images.to(devices[0]))
    for _ in range(8):
        clipper.step()
    model = convnet.to(devices[1])
    other = rs.FastClip(model, images.to(devices[1]))
    other.load_state_dict(clipper.state_dict())
    for _ in range(40):
        with torch.no_grad():
            model[0].weight.mul_(1.005)
        other.step()
    assert other.steps == 48 and 0.97 <= max(row["lower"] for row in other.report()) <= 1.02


def test_a_step_captured_in_a_cuda_graph_is_clipped_by_calls_after_each_replay(convnet: nn.Module, images: Tensor) -> None:
    model, images, labels = convnet.cuda(), images.cuda(), torch.tensor([0, 1], device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, capturable=True)
    clipper = rs.FastClip(model, images)
    clipper.attach(optimizer)

    def train() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(20 * model(images), labels).backward()
        optimizer.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(beside)
    graph, steps = torch.cuda.CUDAGraph(), clipper.steps
    with pytest.warns(UserWarning, match="after each replay"), torch.cuda.graph(graph):
        train()
    assert clipper.steps == steps
    for _ in range(30):
        graph.replay()
        clipper.step()
    assert max(clipper.norms().values()) <= 1.02
    clipper.finish()
    assert max(row["upper"] for row in clipper.report()) <= 1.001 * (1 + 1e-9)
