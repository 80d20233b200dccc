"""Linear operators: the action of a linear layer on a batch of inputs, and of its adjoint, without forming a matrix.

`linear_operator` makes a `LinearOperator` from a module in eval mode. This package also provides ways to call a module in eval
mode, the factor of each channel of a batch normalisation, and the kernel of a convolution from which its norm is bounded.
"""

from .arguments import check_floating as check_floating
from .arguments import check_present as check_present
from .arguments import check_real as check_real
from .arguments import checked_shape as checked_shape
from .arguments import misfit as misfit
from .base import Kernel as Kernel
from .base import LinearOperator as LinearOperator
from .base import Shape as Shape
from .base import check_operator as check_operator
from .base import compose as compose
from .base import direct_sum as direct_sum
from .base import full_precision_no_grad as full_precision_no_grad
from .batchnorms import batchnorm_operator as batchnorm_operator
from .batchnorms import batchnorm_scale as batchnorm_scale
from .batchnorms import is_batchnorm as is_batchnorm
from .batchnorms import is_standard_batchnorm as is_standard_batchnorm
from .convolution import bounding_kernel as bounding_kernel
from .convolution import convolution_settings as convolution_settings
from .convolution import periods as periods
from .convolution import phases_of_taps as phases_of_taps
from .from_module import convolution_then_batchnorm as convolution_then_batchnorm
from .from_module import is_plain as is_plain
from .from_module import linear_operator as linear_operator
from .from_module import norm_shape as norm_shape
from .from_module import then_batchnorm as then_batchnorm
from .from_module import unchecked_operator as unchecked_operator
from .from_module import weights_operator as weights_operator
from .module_calls import evaluating as evaluating
from .module_calls import forward_pass as forward_pass
from .module_calls import is_overridden as is_overridden
from .module_calls import running_eagerly as running_eagerly
