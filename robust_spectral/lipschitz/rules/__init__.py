"""The Lipschitz rules of torch's own modules and functions, registered by importing this package.

A rule takes the walk and a node. It returns the Lipschitz constant of the node's value as a function of the network's input, or
inf if it proves none; for an affine node it returns the operator (`Affine`). All samples of a batch count together as one
vector, so that only a rule of an operation that may mix samples needs to know the batch axis. In a local walk a rule may also
use the size of values.
"""

from . import activations as activations
from . import affine_layers as affine_layers
from . import arithmetic as arithmetic
from . import attention as attention
from . import interval_arithmetic as interval_arithmetic
from . import normalisation as normalisation
from . import pooling as pooling
from . import powers as powers
from . import rearranging as rearranging
from . import roundings as roundings
