"""The rows of the table for torch's own operations, one file for each family, registered by importing this package.

The bound of a row takes the walk and a node. It returns the Lipschitz constant of the node's value as a function of the
network's input, or raises `NoClaim`; for an affine node it returns the operator (`Affine`). All samples of a batch count
together as one vector, so that only an operation that may mix samples needs to know the batch axis. In a local walk a row may
also use the size of values.
"""

from . import activations as activations
from . import affine_layers as affine_layers
from . import arithmetic as arithmetic
from . import matrix_products as matrix_products
from . import maxima as maxima
from . import normalisation as normalisation
from . import patterns as patterns
from . import powers as powers
from . import quotients as quotients
from . import rearranging as rearranging
from . import writing as writing
