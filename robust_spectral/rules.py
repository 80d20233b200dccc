"""The Lipschitz rules of torch's own modules and functions, entered where the walk looks them up by importing this file.

A rule gets the walk and a node. It returns the constant from the network's input to the node's value, or inf for no claim; or,
of an affine node, the operator. All samples of a batch count together, so that no rule needs to know which axis they are on,
but for those that would mix them. In a local walk the size of values may be used as well.
"""

from . import activations as activations
from . import affine_rules as affine_rules
from . import arithmetic as arithmetic
from . import normalisation as normalisation
from . import places as places
from . import pooling as pooling
