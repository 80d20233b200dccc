"""Lipschitz bounds of whole networks, and certified radii of their predictions.

`lipschitz_bound` applies one row of a table to each ATen operation that a network runs; `lipschitz_estimate` is a lower bound
from sampled Jacobians. `rule` registers a row for an operation of another package, which `increasing` and `exact` help to
write. `Graph`, `graph_of` and `LipschitzWalk` are the graph and the walk that bounds come from; `disagreement` compares the
graph with the model.
"""

from .agreement import disagreement as disagreement
from .bound import LipschitzBound as LipschitzBound
from .bound import NodeBound as NodeBound
from .bound import lipschitz_bound as lipschitz_bound
from .boxes import Box as Box
from .certificates import certified_radius as certified_radius
from .estimate import ESTIMATE_ROUNDING as ESTIMATE_ROUNDING
from .estimate import lipschitz_estimate as lipschitz_estimate
from .graph import Graph as Graph
from .graph import graph_of as graph_of
from .graph import pair_of as pair_of
from .graph import preserved as preserved
from .graph import where as where
from .precision import full_precision as full_precision
from .rounding_walk import RoundingWalk as RoundingWalk
from .rules.activations import elementwise_slope as elementwise_slope
from .rules.node_arguments import arguments as arguments
from .rules.node_arguments import exact as exact
from .rules.node_arguments import increasing as increasing
from .rules.normalisation import normalisation_settings as normalisation_settings
from .table import NoClaim as NoClaim
from .table import operation_of as operation_of
from .table import rule as rule
from .walk import Affine as Affine
from .walk import Key as Key
from .walk import LipschitzWalk as LipschitzWalk
from .walk import named as named
