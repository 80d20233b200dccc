"""The linear layers of a model: found by watching one forward pass, with the batch normalisations that follow them.

`fold_batchnorms_` writes a layer and its batch normalisation as one.
"""

from .batchnorm_folding import fold_batchnorms_ as fold_batchnorms_
from .discovery import LinearLayer as LinearLayer
from .discovery import example_for as example_for
from .discovery import linear_layers as linear_layers
from .discovery import spectral_norms as spectral_norms
from .discovery import uncompiled as uncompiled
