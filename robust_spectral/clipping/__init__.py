"""Clipping of one layer's spectral norm, in place, until the norm is proved to be small enough.

`clip_` clips a layer; `projected_weight` returns the nearest weight that obeys a norm. A `Move` says which parameters change.
`TrackedLayer` keeps a layer's top singular directions, along which clips and the training hook act. `Transform`, `by_entries`,
`cut` and `kernel_map` are Fourier symbols of kernels and their clips, for defences that clip on a grid of frequencies.
"""

from .clip import ClipResult as ClipResult
from .clip import Method as Method
from .clip import check_max_norm as check_max_norm
from .clip import clip_ as clip_
from .clip import clip_until_proved_ as clip_until_proved_
from .coarse_grid import kernel_map as kernel_map
from .moved_parameters import Move as Move
from .moved_parameters import MoveGamma as MoveGamma
from .moved_parameters import MoveWeight as MoveWeight
from .moved_parameters import MoveWeightAndGamma as MoveWeightAndGamma
from .projection import projected_weight as projected_weight
from .symbols import Transform as Transform
from .symbols import by_entries as by_entries
from .symbols import cut as cut
from .tracked_layer import TOLERANCE as TOLERANCE
from .tracked_layer import TrackedLayer as TrackedLayer
from .weight_updates import multiply_by_groups_ as multiply_by_groups_
