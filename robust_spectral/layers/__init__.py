"""The linear layers of a model, found during one forward pass, with the batch normalisations that follow them.

`fold_batchnorms_` merges each batch normalisation with the layer before it.
"""

from .batchnorm_folding import fold_batchnorms_ as fold_batchnorms_
from .discovery import LinearLayer as LinearLayer
from .discovery import example_for as example_for
from .discovery import linear_layers as linear_layers
from .discovery import spectral_norms as spectral_norms
from .discovery import uncompiled as uncompiled
