"""Lipschitz bounds of whole networks, and certified radii of their predictions.

`lipschitz_bound` applies one rule to each operation of a network; `lipschitz_estimate` is a lower bound from sampled Jacobians.
The decorators `rule`, `interval` and `rounds` register rules for layers of other packages. The rules of torch's own layers that
such rules may build on are exported as well. `traced_at` and `LipschitzWalk` are the graph and the walk that bounds come from;
`JOINERS` registers a batch normalisation that is joined with the layer before it.
"""

from .bound import LipschitzBound as LipschitzBound
from .bound import NodeBound as NodeBound
from .bound import lipschitz_bound as lipschitz_bound
from .boxes import Box as Box
from .certificates import certified_radius as certified_radius
from .certificates import full_precision as full_precision
from .estimate import lipschitz_estimate as lipschitz_estimate
from .registry import JOINERS as JOINERS
from .registry import interval as interval
from .registry import rounds as rounds
from .registry import rule as rule
from .rounding_walk import RoundingWalk as RoundingWalk
from .rounding_walk import Terms as Terms
from .rules.activations import activation_slope as activation_slope
from .rules.affine_layers import affine_layer as affine_layer
from .rules.affine_layers import batchnorm_bound as batchnorm_bound
from .rules.interval_arithmetic import activation_box as activation_box
from .rules.interval_arithmetic import batchnorm_box as batchnorm_box
from .rules.interval_arithmetic import increasing_box as increasing_box
from .rules.interval_arithmetic import linear_box as linear_box
from .rules.normalisation import root_mean_square_bound as root_mean_square_bound
from .rules.roundings import batchnorm_rounding as batchnorm_rounding
from .rules.roundings import linear_rounding as linear_rounding
from .rules.roundings import not_rounded as not_rounded
from .tracing import pair_of as pair_of
from .tracing import traced_at as traced_at
from .walk import Affine as Affine
from .walk import Build as Build
from .walk import Key as Key
from .walk import LipschitzWalk as LipschitzWalk
