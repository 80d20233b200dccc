"""A table of layers for parametrised tests, each with its input shape."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


@dataclass(frozen=True)
class Case:
    """One layer; ``build`` makes it with the same random weights every time."""

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    in_shape: tuple[int, ...]
    clippable: bool = True

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return self.make().eval()

    def __str__(self) -> str:
        return self.name


def scaled(module: nn.Module, factor: float) -> nn.Module:
    """The module with its weight times a factor."""
    with torch.no_grad():
        module.weight.mul_(factor)
    return module


def randomised(batchnorm: nn.Module, gamma: Sequence[float] | None = None) -> nn.Module:
    """A batch normalisation with random running statistics and the given gamma."""
    nn.init.uniform_(batchnorm.running_var, 0.1, 3.0)
    nn.init.normal_(batchnorm.running_mean)
    with torch.no_grad():
        if batchnorm.affine and gamma is not None:
            batchnorm.weight.copy_(torch.tensor(gamma))
            nn.init.normal_(batchnorm.bias)
    return batchnorm


class Mirrored(nn.Module):
    """A parametrisation: the weight plus its mirror image along the last axis."""

    def forward(self, W: Tensor) -> Tensor:
        return W + W.flip(-1)


def mirrored(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Mirrored())
    return module


def with_bias(module: nn.Module, value: float) -> nn.Module:
    nn.init.constant_(module.bias, value)
    return module


def zeroed(module: nn.Module) -> nn.Module:
    return scaled(module, 0.0)


def orthogonal(count: int, width: int, values: Sequence[float] = (1.0,)) -> nn.Sequential:
    """Square dense layers with the singular values given, one for each or one for all."""
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])
    for layer in net:
        nn.init.orthogonal_(layer.weight).data.mul_(torch.tensor(values)[:, None])
    return net


GAMMA = [1.5, -2.0, 0.0, 0.3]

DENSE = [
    Case("linear tall", lambda: nn.Linear(5, 9), (5,)),
    Case("linear wide", lambda: nn.Linear(9, 5, bias=False), (9,)),
    Case("linear on a sequence", lambda: nn.Linear(5, 4), (3, 5)),
    Case("linear with one input", lambda: nn.Linear(1, 6), (1,)),
    Case("linear with one output", lambda: nn.Linear(6, 1), (6,)),
    Case("linear float64", lambda: nn.Linear(6, 7).double(), (6,)),
]

CONVOLUTIONS = [
    Case("conv1d", lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
    Case("conv2d", lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 6, 5)),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 3, 4)),
    Case("conv2d without padding", lambda: nn.Conv2d(2, 3, 3), (2, 6, 6)),
    Case("conv2d 1x1", lambda: nn.Conv2d(6, 5, 1), (6, 3, 3)),
    Case("conv2d on one pixel", lambda: nn.Conv2d(4, 5, 3, padding=1), (4, 1, 1)),
    Case("conv2d window larger than its input", lambda: nn.Conv2d(2, 3, 7, padding=3), (2, 3, 3)),
    Case("conv2d stride", lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1), (2, 7, 6)),
    Case("conv2d stride above its window", lambda: nn.Conv2d(3, 4, 2, stride=3), (3, 8, 8)),
    Case("conv2d unequal strides", lambda: nn.Conv2d(2, 4, (3, 4), stride=(2, 3), padding=(1, 2)), (2, 6, 8)),
    Case("conv2d dilation", lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 7, 7)),
    Case("conv2d dilation and stride", lambda: nn.Conv2d(2, 4, 3, dilation=2, stride=2, padding=1), (2, 9, 8)),
    Case("conv2d reflect", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    Case("conv2d replicate", lambda: nn.Conv2d(2, 3, 5, padding=2, padding_mode="replicate"), (2, 6, 5)),
    Case("conv1d replicate far", lambda: nn.Conv1d(2, 3, 3, padding=4, padding_mode="replicate"), (2, 5)),
    Case("conv2d circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 5)),
    Case("conv2d circular even window", lambda: nn.Conv2d(2, 3, 4, padding=2, padding_mode="circular"), (2, 6, 6)),
    Case("conv2d circular even, stride", lambda: nn.Conv2d(2, 6, 4, 2, 1, padding_mode="circular"), (2, 8, 8)),
    Case("conv1d circular window larger", lambda: nn.Conv1d(2, 3, 5, padding=2, padding_mode="circular"), (2, 3)),
    Case("conv1d circular beyond its window", lambda: nn.Conv1d(1, 1, 1, padding=3, padding_mode="circular"), (1, 4)),
    Case("conv2d circular beyond its window", lambda: nn.Conv2d(2, 3, 3, padding=3, padding_mode="circular"), (2, 4, 4)),
    Case("conv1d circular dilation", lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"), (2, 8)),
    Case("conv2d valid", lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 5, 5)),
    Case("conv2d same", lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 5)),
    Case("conv2d same even window", lambda: nn.Conv2d(2, 3, (4, 2), padding="same"), (2, 5, 6)),
    Case("conv1d same even window dilation", lambda: nn.Conv1d(2, 3, 4, dilation=3, padding="same"), (2, 11)),
    Case("conv1d same even window circular", lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (2, 9)),
    Case("conv2d groups", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    Case("conv2d groups, stride", lambda: nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=3), (6, 5, 5)),
    Case("conv1d groups circular", lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2, padding_mode="circular"), (4, 7)),
    Case("conv2d groups reflect", lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect"), (4, 5, 5)),
    Case("conv2d depthwise", lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), (5, 5, 5)),
    Case("conv2d depthwise multiplier", lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 5, 5)),
    Case("transposed conv1d", lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), (3, 5)),
    Case("transposed conv2d", lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    Case("transposed conv2d groups", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 3, 4)),
    Case("transposed conv3d", lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2), (2, 2, 3, 2)),
    Case("conv2d float64", lambda: nn.Conv2d(2, 3, 3, padding=1).double(), (2, 5, 5)),
]

SCALES = [  # tiny weights keep biases of the usual size
    Case("linear x 1e-30", lambda: scaled(nn.Linear(5, 6), 1e-30), (5,)),
    Case("linear x 1e30", lambda: scaled(nn.Linear(5, 6), 1e30), (5,)),
    Case("conv2d x 1e-30", lambda: scaled(nn.Conv2d(2, 3, 3, padding=1), 1e-30), (2, 5, 5)),
    Case("conv2d x 1e30", lambda: scaled(nn.Conv2d(2, 3, 3, padding=1), 1e30), (2, 5, 5)),
    Case("conv2d groups x 0.1", lambda: scaled(nn.Conv2d(8, 8, 3, padding=1, groups=4), 0.1), (8, 4, 4)),
    Case("conv2d groups x 10", lambda: scaled(nn.Conv2d(8, 8, 3, padding=1, groups=4), 10.0), (8, 4, 4)),
    Case("conv2d circular x 1e-30", lambda: scaled(nn.Conv2d(2, 3, 3, 1, 1, padding_mode="circular"), 1e-30), (2, 5, 5)),
    Case("linear with a large bias", lambda: with_bias(nn.Linear(5, 6), 1e6), (5,)),
    Case("conv2d with a large bias", lambda: with_bias(nn.Conv2d(2, 3, 3, padding=1), 1e6), (2, 5, 5)),
    Case(
        "conv2d circular with a large bias",
        lambda: with_bias(nn.Conv2d(2, 3, 3, 1, 1, padding_mode="circular"), 1e6),
        (2, 5, 5),
    ),
    Case("transposed conv2d with a large bias", lambda: with_bias(nn.ConvTranspose2d(2, 3, 3, 2), 1e6), (2, 4, 4)),
    Case("linear zero", lambda: zeroed(nn.Linear(4, 3)), (4,), clippable=False),
    Case("conv2d zero", lambda: zeroed(nn.Conv2d(2, 3, 3, padding=1)), (2, 4, 4), clippable=False),
]

COMPOSITES = [
    Case("conv2d, batchnorm", lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), randomised(nn.BatchNorm2d(4), GAMMA)),
         (2, 5, 5)),
    Case("grouped conv2d, batchnorm",
         lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), randomised(nn.BatchNorm2d(4), GAMMA)),
         (4, 5, 5)),
    Case("circular conv1d, batchnorm without gamma",
         lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
                               randomised(nn.BatchNorm1d(3, affine=False))),
         (2, 7)),
    Case("transposed conv2d, batchnorm",
         lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2), randomised(nn.BatchNorm2d(4), GAMMA)), (2, 3, 3)),
    Case("linear, batchnorm", lambda: nn.Sequential(nn.Linear(6, 4), randomised(nn.BatchNorm1d(4), GAMMA)), (6,)),
    Case("linear on a sequence, batchnorm",
         lambda: nn.Sequential(nn.Linear(5, 6), randomised(nn.BatchNorm1d(4), GAMMA)), (4, 5)),
]  # fmt: skip

OTHERS = [
    Case("batchnorm2d", lambda: randomised(nn.BatchNorm2d(4), GAMMA), (4, 3, 3), clippable=False),
    Case("batchnorm1d on features", lambda: randomised(nn.BatchNorm1d(4), GAMMA), (4,), clippable=False),
    Case("average pool", lambda: nn.AvgPool2d(2), (2, 6, 6), clippable=False),
    Case("average pool 3/1/1, padding not counted", lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), (2, 5, 5),
         clippable=False),
    Case("adaptive average pool", lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7), clippable=False),
    Case("bilinear upsampling", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4), clippable=False),
    Case("dropout", lambda: nn.Dropout(0.5), (3, 4), clippable=False),
    Case("empty sequential", nn.Sequential, (3, 4), clippable=False),
    Case("batchnorm, conv2d",
         lambda: nn.Sequential(randomised(nn.BatchNorm2d(4), GAMMA), nn.Conv2d(4, 6, 3, padding=1, groups=2)), (4, 4, 4),
         clippable=False),
    Case("average pool, flatten, linear", lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 5)), (2, 4, 4),
         clippable=False),
    Case("convolutions of 4 and 6 groups",
         lambda: nn.Sequential(nn.Conv1d(4, 12, 3, padding=1, groups=4), nn.Conv1d(12, 6, 1, groups=6)), (4, 5),
         clippable=False),
    Case("conv2d, batchnorm, conv2d",
         lambda: nn.Sequential(nn.Conv2d(2, 4, 3), randomised(nn.BatchNorm2d(4), GAMMA), nn.Conv2d(4, 2, 3)), (2, 6, 6),
         clippable=False),
    Case("parametrised conv2d", lambda: mirrored(nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 5), clippable=False),
    Case("spectral-normed linear", lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), (5,), clippable=False),
    Case("weight-normed conv1d", lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), (2, 7), clippable=False),
]  # fmt: skip

CASES = DENSE + CONVOLUTIONS + SCALES + COMPOSITES + OTHERS
CLIPPABLE = [case for case in CASES if case.clippable]
