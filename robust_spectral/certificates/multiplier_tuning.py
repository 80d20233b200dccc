"""Tuning of the multipliers of one map for a long time, for the smallest bound of a whole network.

At the best multipliers each element of an error has the same share of the map's top singular vectors on both sides. A round is
one step of a power iteration with a block of vectors, and one step of each multiplier's logarithm towards equal shares. Many
singular values come close to the largest one; the shares are those of all of these, and the steps become shorter with time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..lipschitz import NoClaim
from .joint_map import JointMap

_VECTORS = 4  # for each image; the images are equal, so that their vectors are of the same map
_SHARPNESS = 50.0  # a singular value counts by this power of its square
_FIRST_RATE, _LAST_RATE = 0.5, 0.003  # of the logarithms
_LEAST_ROUNDS = 3.0  # the last rate is at least this number, divided by that of the rounds
_SETTLING = 20  # steps of a power iteration


class Tuning:
    """The multipliers of a map whose images are equal, in float32 where that runs.

    Args:
        build: Makes the map in a precision.

    Attributes:
        joint: The map; its terms hold the multipliers.
        aim: The largest squared singular value that is aimed at.
        top: The largest one, as far as it is known.
    """

    def __init__(self, build: Callable[[torch.dtype], JointMap], aim: float = 0.95) -> None:
        self.aim, self.top, self.rounds = aim, 0.0, 0
        try:
            self.joint = build(torch.float32)
            self.X = self._start()
        except (RuntimeError, OverflowError):  # an operation casts to float64, or numbers are large
            self.joint = build(torch.float64)
            self.X = self._start()

    def _start(self) -> Tensor:
        joint = self.joint
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(_VECTORS, joint.images, joint.given, generator=generator, dtype=torch.float64)
        X = X.to(joint.device, joint.dtype)
        if len(joint.terms) > 1:
            joint.fit_scale(X[:1])
        return X

    def _apply(self) -> tuple[Tensor, Tensor]:
        """One step of the power iteration: orthonormal vectors and their images, as rows."""
        shape = self.X.shape
        Q = torch.linalg.qr(self.X.reshape(-1, shape[2]).mT).Q.mT
        Y = self.joint.forward(Q.reshape(shape))
        self.X = self.joint.adjoint(Y)
        Y = Y.reshape(len(Q), -1)
        if not bool(torch.isfinite(Y).all()):
            raise NoClaim("its multipliers overflow")
        return Q, Y

    def settled(self) -> float:
        """The largest squared singular value of the multipliers as they are, after some more steps for it alone."""
        for _ in range(_SETTLING):
            _, Y = self._apply()
        return float(torch.linalg.eigvalsh((Y @ Y.mT).double())[-1])

    def round(self, over: float) -> None:
        """Move the multipliers; ``over`` is the part of the time that is over."""
        Q, Y = self._apply()
        squares, turn = torch.linalg.eigh((Y @ Y.mT).double())
        squares, turn = squares.clamp_min(1e-300), turn.mT.to(Q)
        self.top = float(squares[-1])
        weights = (squares / self.top) ** _SHARPNESS
        weights = weights / weights.sum()
        ins = (turn @ Q).square().mul(weights.to(Q)[:, None]).sum(0)
        outs = (turn @ Y).square().mul((weights / squares).to(Q)[:, None]).sum(0)
        self.rounds += 1
        last = min(0.2, max(_LAST_RATE, _LEAST_ROUNDS * over / self.rounds))
        self._step(ins, outs, _FIRST_RATE * (last / _FIRST_RATE) ** over)

    def _step(self, ins: Tensor, outs: Tensor, rate: float) -> None:
        terms = list(self.joint.terms.values())
        shares = list(ins.split(self.joint.counts))
        energies = iter(outs.split(self.joint.sizes)[1:])
        budget = sum(float(share.sum()) for term, share in zip(terms, shares, strict=True) if term.fixed)
        total = sum(math.exp(float(term.log[0, 0])) for term in terms if term.fixed)
        rise = max(-1.0, min(2 * rate + 0.05, 0.5 * math.log(self.top / self.aim) / max(budget, 0.2)))
        for term, given in zip(terms, shares, strict=True):
            if term.fixed:
                wanted = math.log(max(float(given.sum()) / max(budget, 1e-30), 1e-6) * total)
                term.log = term.log + max(-1.0, min(1.0, (wanted - float(term.log[0, 0])) * rate * 2 + rise))
                continue
            term.equalise(given[None], next(energies)[None], rate)
