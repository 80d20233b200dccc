"""Proved intervals around the spectral norm of an operator, each with the name of the theorem that proves its upper end.

`spectral_norm` returns the smallest bound that applies: from a dense decomposition, from the kernel of a convolution, or from
a Lanczos run, whose bound is valid with a stated probability.
"""

from .enclosures import NormInterval as NormInterval
from .enclosures import norm_intervals as norm_intervals
from .enclosures import spectral_norm as spectral_norm
from .lanczos_bound import lanczos_interval as lanczos_interval
from .lanczos_bound import largest_by_group as largest_by_group
