"""The Lipschitz rules of torch's own modules and functions, entered into the tables by importing this package.

A rule takes the walk and a node. It returns the Lipschitz constant from the network's input to the node's value, or inf for no
claim; for an affine node it returns the operator (`Affine`). All samples of a batch count together, so that no rule needs to
know which axis they are on, except those that would mix them. In a local walk a rule may use the size of values as well.
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
