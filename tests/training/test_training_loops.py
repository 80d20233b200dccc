"""The hook in common training loops, which need no change, with common optimizers, and under DDP."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from reference import norm
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import robust_spectral as rs

HELD, PROVED = 1.02, 1.001


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def true_norms(model: nn.Module) -> list[float]:
    return [norm(copy.deepcopy(model[index]).cpu(), shape) for index, shape in {0: (3, 8, 8), 2: (8, 8, 8), 6: (32,)}.items()]


def batches(device: torch.device | str = "cpu", count: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 16, 3, 8, 8, generator=generator)
    labels = torch.randint(5, (count, 16), generator=generator)
    return list(zip(images.to(device), labels.to(device), strict=True))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(20 * model(x).float(), y)


def ordinary(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    for x, y in batches(device_of(model)):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
    return 16


def accumulating(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    for index, (x, y) in enumerate(batches(device_of(model))):
        (loss(model, x, y) / 4).backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    return 4


def half_precision(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    for x, y in batches(device_of(model)):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            value = loss(model, x, y)
        value.backward()
        optimizer.step()
    return 16


def timms_scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    scaler = NativeScaler(device=device_of(model).type)
    for index, (x, y) in enumerate(batches(device_of(model))):
        scaler(loss(model, x, y), optimizer, parameters=model.parameters(), clip_grad=1.0, need_update=index % 2 == 1)
        if index % 2 == 1:
            optimizer.zero_grad()
    return 8


def sharpness_aware(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Two backward passes a step, the second at weights that were moved and are moved back."""
    for x, y in batches(device_of(model)):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        with torch.no_grad():
            moves = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in model.parameters()]
            for p, move in zip(model.parameters(), moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        loss(model, x, y).backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()
    return 16


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    return ordinary(torch.compile(model, backend="eager"), optimizer)


def averaging(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    x, y = batches(device_of(model))[0]
    loss(model, x, y).backward()
    optimizer.step()
    averages = ModelEmaV3(model, decay=0.9), torch.optim.swa_utils.AveragedModel(model)  # of weights that are clipped already
    for x, y in batches(device_of(model)):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        averages[0].update(model)
        averages[1].update_parameters(model)
    for average in averages:  # norms are convex, so an average of clipped weights is within the target
        assert max(true_norms(average.module)) <= HELD
    return 17


def copying(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    steps = ordinary(model, optimizer)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.state_dict().keys() == convnet().state_dict().keys()
        assert true_norms(twin) == true_norms(model)
    return steps


LOOPS = [ordinary, accumulating, half_precision, timms_scaler, sharpness_aware, compiled, averaging, copying]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_norms_are_kept_near_the_target_in_every_training_loop(
    loop: Callable[[nn.Module, torch.optim.Optimizer], int], device: str
) -> None:
    model = convnet().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    clipper = rs.FastClip(model, torch.zeros(1, 3, 8, 8, device=device))
    clipper.attach(optimizer)
    assert loop(model, optimizer) == clipper.steps
    assert max(true_norms(model)) <= HELD
    clipper.finish()
    assert max(true_norms(model)) <= PROVED


OPTIMIZERS = {
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=2e-3, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True),
    "lamb": lambda p: timm.optim.create_optimizer_v2(p, "lamb", lr=2e-3),
    "lion": lambda p: timm.optim.create_optimizer_v2(p, "lion", lr=5e-4),
    "muon": lambda p: timm.optim.create_optimizer_v2(p, "muon", lr=2e-3),
    "AdamW, capturable": lambda p: torch.optim.AdamW(p, lr=2e-3, capturable=p[0].is_cuda),
}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_norms_are_kept_near_the_target_with_every_optimizer(make: Callable[..., torch.optim.Optimizer], device: str) -> None:
    model = convnet().to(device)
    optimizer = make(list(model.parameters()))
    clipper = rs.FastClip(model, torch.zeros(1, 3, 8, 8, device=device))
    clipper.attach(optimizer)
    assert ordinary(model, optimizer) == clipper.steps
    assert max(true_norms(model)) <= HELD


def test_finish_proves_the_norms_although_lookahead_moves_the_weights_after_the_hook() -> None:
    model = convnet()
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_adamw", lr=2e-3)
    clipper = rs.FastClip(model, torch.zeros(1, 3, 8, 8))
    clipper.attach(optimizer)
    ordinary(model, optimizer)
    assert clipper.steps == 16
    clipper.finish()
    assert max(true_norms(model)) <= PROVED


def test_a_model_in_channels_last_is_clipped_and_keeps_its_memory_format() -> None:
    model = convnet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rs.FastClip(model, torch.zeros(1, 3, 8, 8)).attach(optimizer)
    ordinary(model, optimizer)
    assert max(true_norms(model)) <= HELD
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_layers_are_clipped_and_stay_frozen() -> None:
    model = convnet()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    rs.FastClip(model, torch.zeros(1, 3, 8, 8), max_norm=0.3).attach(optimizer)
    ordinary(model, optimizer)
    assert max(true_norms(model)) <= 0.3 * HELD
    assert not model[0].weight.requires_grad and model[0].weight.grad is None


def test_a_lazy_model_is_initialised_and_clipped() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    rs.FastClip(model, torch.zeros(1, 2, 6, 6), max_norm=0.1).finish()
    assert norm(copy.deepcopy(model[0]), (2, 6, 6)) <= 0.1 * PROVED


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten())
        example = torch.zeros(1, 2, 6, 6)
    with pytest.raises(ValueError, match="meta device"):
        rs.FastClip(model, example)


def test_a_model_cast_to_another_dtype_is_still_clipped() -> None:
    model = convnet()
    clipper = rs.FastClip(model, torch.zeros(1, 3, 8, 8), max_norm=0.3)
    clipper.step()
    model.double()
    for _ in range(5):
        clipper.step()
    assert max(true_norms(model)) <= 0.3 * HELD
    assert model[0].weight.dtype == torch.float64


def one_rank(rank: int, folder: str) -> None:
    """Train under DDP, with and without broadcast buffers, then try FSDP2, and write the outcome to files."""
    torch.set_num_threads(1)  # as in the tests' own processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for broadcast in (True, False):
        model = convnet()
        model.insert(1, nn.BatchNorm2d(8))
        replica = DistributedDataParallel(model, broadcast_buffers=broadcast)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        clipper = rs.FastClip(model, torch.zeros(1, 3, 8, 8), composites="never")
        clipper.attach(optimizer)
        for x, y in batches(count=100):
            optimizer.zero_grad()
            loss(replica, x[rank::2], y[rank::2]).backward()
            optimizer.step()
        clipper.finish()
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        torch.save({"parameters": parameters, "clipper": clipper.state_dict()}, f"{folder}/{broadcast}-{rank}.pt")
    model = convnet()
    clipper = rs.FastClip(model, torch.zeros(1, 3, 8, 8))
    fully_shard(model)
    try:
        clipper.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    except NotImplementedError as error:
        torch.save(str(error), f"{folder}/sharded-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_stay_identical_under_ddp_and_sharded_weights_are_refused(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)

    for broadcast in (True, False):
        first, second = (torch.load(tmp_path / f"{broadcast}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert equal(first, second)
        kernel = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        kernel.load_state_dict({"weight": first["parameters"]["0.weight"]})
        assert norm(kernel, (3, 8, 8)) <= PROVED
    assert all("sharded" in torch.load(tmp_path / f"sharded-{rank}.pt") for rank in (0, 1))
