"""Spectral norms of implicitly linear layers: measured, bounded and clipped; Lipschitz bounds and certified radii of networks.

Importing this package imports torch and nothing heavier. Adapters to other libraries are in `robust_spectral.plugins`,
evaluations and the command line in `robust_spectral.evaluations`.
"""

from .certificates import Certificates as Certificates
from .certificates import certify as certify
from .certificates import local_radius as local_radius
from .certificates import refined_bound as refined_bound
from .clipping import ClipResult as ClipResult
from .clipping import MoveGamma as MoveGamma
from .clipping import MoveWeight as MoveWeight
from .clipping import MoveWeightAndGamma as MoveWeightAndGamma
from .clipping import clip_ as clip_
from .clipping import projected_weight as projected_weight
from .layers import LinearLayer as LinearLayer
from .layers import fold_batchnorms_ as fold_batchnorms_
from .layers import linear_layers as linear_layers
from .layers import spectral_norms as spectral_norms
from .lipschitz import LipschitzBound as LipschitzBound
from .lipschitz import certified_radius as certified_radius
from .lipschitz import lipschitz_bound as lipschitz_bound
from .lipschitz import lipschitz_estimate as lipschitz_estimate
from .norms import NormInterval as NormInterval
from .norms import spectral_norm as spectral_norm
from .operators import LinearOperator as LinearOperator
from .operators import linear_operator as linear_operator
from .singular_values import DuplicateStructure as DuplicateStructure
from .singular_values import Lanczos as Lanczos
from .singular_values import PowerQR as PowerQR
from .singular_values import RepresentationGap as RepresentationGap
from .singular_values import SingularTriplets as SingularTriplets
from .singular_values import circular_singular_values as circular_singular_values
from .singular_values import duplicate_structure as duplicate_structure
from .singular_values import representation_gap as representation_gap
from .singular_values import top_singular as top_singular
from .training import FastClip as FastClip

__version__ = "0.1.0"
