"""Singular values of operators: the largest ones as estimates from below, and whole spectra of circular convolutions.

`top_singular` runs a solver: `Lanczos`, or `PowerQR`, the block power method of Ebrahimpour Boroojeny et al. (2024). Single
Krylov and power steps and dense decompositions with their cost are available too, for norm bounds and for training, which
updates singular vectors step by step.
"""

from .circular_convolution import DuplicateStructure as DuplicateStructure
from .circular_convolution import RepresentationGap as RepresentationGap
from .circular_convolution import circular_singular_values as circular_singular_values
from .circular_convolution import duplicate_structure as duplicate_structure
from .circular_convolution import plain_circular as plain_circular
from .circular_convolution import representation_gap as representation_gap
from .circular_convolution import representatives as representatives
from .krylov import KrylovSpace as KrylovSpace
from .krylov import apply_grouped as apply_grouped
from .krylov import from_groups as from_groups
from .krylov import golub_kahan as golub_kahan
from .krylov import krylov_space as krylov_space
from .krylov import orthonormal_rows as orthonormal_rows
from .krylov import random_block as random_block
from .krylov import rayleigh_ritz as rayleigh_ritz
from .krylov import to_groups as to_groups
from .solvers import Found as Found
from .solvers import Lanczos as Lanczos
from .solvers import PowerQR as PowerQR
from .solvers import SingularTriplets as SingularTriplets
from .solvers import Solver as Solver
from .solvers import dense_blocks as dense_blocks
from .solvers import dense_ritz as dense_ritz
from .solvers import dense_work as dense_work
from .solvers import next_block as next_block
from .solvers import power_step as power_step
from .solvers import size_of as size_of
from .solvers import top_singular as top_singular
from .solvers import unit_rows as unit_rows
