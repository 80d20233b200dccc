"""The configuration of a fine-tuning run, checked before the run starts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from robust_spectral import MoveGamma, MoveWeight, MoveWeightAndGamma
from robust_spectral.clipping import Move
from robust_spectral.plugins.registry import find
from robust_spectral.training import Composites

MOVES: dict[str, type[Move]] = {"weight": MoveWeight, "gamma": MoveGamma, "weight+gamma": MoveWeightAndGamma}


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Parse the text of the option ``name``, such as "0.5,0.4", into numbers.

    Raises:
        ValueError: the text contains anything else.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--{name} {text}: expected a number, or one for each channel, as in 0.49,0.48,0.45") from error


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that a fine-tuning run depends on, stored in its run.json; each field is an option of the command finetune."""

    model: str
    data: str
    image_size: int | None = None
    pretrained: bool = False
    pretrained_path: str | None = None
    initial_checkpoint: str | None = None
    mean: str | None = None
    std: str | None = None
    epochs: int = 3
    batch_size: int = 64
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    sched: str = "cosine"
    warmup_epochs: int = 0
    defence: str = "fastclip"
    max_norm: float | None = 1.0
    lipschitz_target: float | None = None
    composites: Composites = "auto"
    move: Literal["weight", "gamma", "weight+gamma"] = "weight"
    spectral_warmup: float = 0.5
    logit_scale: float = 1.0
    objective: Literal["accuracy", "certified"] = "accuracy"
    margin_eps: float = 0.0
    adversarial_eps: float = 0.0
    adversarial_norm: Literal["l2", "linf"] = "l2"
    adversarial_steps: int = 7
    lift: bool = False
    freeze_bn: bool = False
    fold_bn: bool = False
    small_stem: bool = False
    residuals: Literal["summed", "averaged"] = "summed"
    amp: bool = False
    amp_dtype: str = "float16"
    model_ema: bool = False
    model_ema_decay: float = 0.999
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm={self.max_norm}: must be positive; inf for no clipping")
        numbers("mean", self.mean), numbers("std", self.std)
        find("defence", self.defence)
        if self.lipschitz_target is not None and not self.fastclip:
            raise ValueError(f"lipschitz_target={self.lipschitz_target}: only fastclip has it, not defence={self.defence!r}")
        if self.lipschitz_target is not None and not 0 < self.lipschitz_target < math.inf:
            raise ValueError(f"lipschitz_target={self.lipschitz_target}: must be positive and finite")
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0 or not self.logit_scale > 0:
            given = f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}, logit_scale={self.logit_scale}"
            raise ValueError(f"{given}: epochs must not be negative, the others must be positive")
        if self.amp_dtype not in ("float16", "bfloat16"):
            raise ValueError(f"amp_dtype={self.amp_dtype!r}: expected float16 or bfloat16")
        if self.composites not in ("auto", "always", "never"):
            raise ValueError(f"composites={self.composites!r}: expected auto, always or never")
        if self.move not in MOVES or (self.move != "weight" and self.composites == "never"):
            raise ValueError(f"move={self.move!r}: expected {', '.join(MOVES)}; γ moves with composites only, see composites")
        if not 0 <= self.adversarial_eps < math.inf or self.adversarial_steps < 1:
            given = f"adversarial_eps={self.adversarial_eps}, adversarial_steps={self.adversarial_steps}"
            raise ValueError(f"{given}: expected a finite size, 0 for none, and at least one step")
        if self.adversarial_norm not in ("l2", "linf"):
            raise ValueError(f"adversarial_norm={self.adversarial_norm!r}: expected l2 or linf")
        if self.objective not in ("accuracy", "certified") or self.residuals not in ("summed", "averaged"):
            given = f"objective={self.objective!r}, residuals={self.residuals!r}"
            raise ValueError(f"{given}: expected accuracy or certified, and summed or averaged")
        if (self.objective == "certified") != (0 < self.margin_eps < math.inf):
            raise ValueError(
                f"objective={self.objective!r}, margin_eps={self.margin_eps}: the certified objective needs the positive "
                "radius at which it certifies images, any other objective 0"
            )
        if self.lift and (self.finite_max_norm is None or self.spectral_warmup > 0):
            raise ValueError("lift: needs a finite max_norm and takes no spectral_warmup; give spectral_warmup=0")
        if not 0 <= self.spectral_warmup <= 1:
            raise ValueError(f"spectral_warmup={self.spectral_warmup}: is a share of the training steps, 0 to 1")

    def is_that_of(self, stored: dict[str, Any]) -> bool:
        """Whether a stored configuration describes the same run, on any device; options missing in it have their defaults."""
        given = {field.name: field.default for field in fields(self)} | stored
        return given | {"device": self.device} == json.loads(json.dumps(asdict(self)))

    @property
    def standardisation(self) -> dict[str, Any]:
        """The mean and std by which the model's input is standardised, None for timm's own."""
        return {"mean": numbers("mean", self.mean), "std": numbers("std", self.std)}

    @property
    def clips(self) -> bool:
        """Whether the run constrains spectral norms with FastClip."""
        return self.fastclip and (self.finite_max_norm is not None or self.lipschitz_target is not None)

    @property
    def fastclip(self) -> bool:
        """Whether the defence is ``fastclip`` or ``fastclip-composite``."""
        return self.defence in ("fastclip", "fastclip-composite")

    @property
    def finite_max_norm(self) -> float | None:
        """The largest spectral norm allowed in every layer; None without such a limit."""
        return self.max_norm if self.max_norm is not None and math.isfinite(self.max_norm) else None
