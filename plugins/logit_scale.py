"""Logits at a scale of their own, so that an attack on the cross-entropy does not depend on the scale of a model's logits.

Unscaled, large logits have no gradient in float32, and the gradient of small logits, as of networks with small norms, points
towards all classes rather than the nearest: half as many images again then survive PGD. The median, unlike the smallest logit,
does not depend on the value of a class that is masked by a large negative logit.
"""

from __future__ import annotations

from torch import Tensor

_ABOVE_MEDIAN = 7.0  # for the largest logit: the cross-entropy neither vanishes in float32 nor weighs all classes alike


def scale_free(logits: Tensor) -> Tensor:
    """Scale logits (n, classes), image by image, such that the largest is 7 above their median; the factor has no gradient."""
    seen = logits.detach()
    above = (seen.amax(1, keepdim=True) - seen.median(1, keepdim=True).values).clamp_min(1e-30)
    return logits * (_ABOVE_MEDIAN / above)
