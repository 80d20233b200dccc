"""Spectral norms of implicitly linear layers: measured, bounded and clipped; Lipschitz bounds and certified radii of networks.

Importing this package imports torch and nothing heavier. Hosts live in `robust_spectral.plugins`, the evaluations and the
command line in `robust_spectral.evaluations`.
"""

from .affine import linear_operator as linear_operator
from .certify import certified_radius as certified_radius
from .circular import DuplicateStructure as DuplicateStructure
from .circular import RepresentationGap as RepresentationGap
from .circular import circular_singular_values as circular_singular_values
from .circular import duplicate_structure as duplicate_structure
from .circular import representation_gap as representation_gap
from .clipping import ClipResult as ClipResult
from .clipping import clip_ as clip_
from .fastclip import FastClip as FastClip
from .folding import fold_batchnorms_ as fold_batchnorms_
from .layers import LinearLayer as LinearLayer
from .layers import linear_layers as linear_layers
from .layers import spectral_norms as spectral_norms
from .lipschitz import LipschitzBound as LipschitzBound
from .lipschitz import lipschitz_bound as lipschitz_bound
from .lipschitz import lipschitz_estimate as lipschitz_estimate
from .moves import MoveGamma as MoveGamma
from .moves import MoveWeight as MoveWeight
from .moves import MoveWeightAndGamma as MoveWeightAndGamma
from .norms import NormInterval as NormInterval
from .norms import spectral_norm as spectral_norm
from .operators import LinearOperator as LinearOperator
from .projection import projected_weight as projected_weight
from .spectrum import Lanczos as Lanczos
from .spectrum import PowerQR as PowerQR
from .spectrum import SingularTriplets as SingularTriplets
from .spectrum import top_singular as top_singular

__version__ = "0.1.0"
