"""Proved intervals around the spectral norm of an operator; each upper bound names its theorem.

`spectral_norm` takes the smallest of the bounds that fit: a dense decomposition, bounds of convolutions by their kernel, or a
bound from a Lanczos run that holds with a stated probability.
"""

from .enclosures import NormInterval as NormInterval
from .enclosures import norm_intervals as norm_intervals
from .enclosures import spectral_norm as spectral_norm
from .lanczos_bound import lanczos_interval as lanczos_interval
