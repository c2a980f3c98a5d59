"""Tensors that are computed when somebody wants them, and gradients of such tensors.

A `DeferredTensor` knows what is still to be done (`pending`, `gradient`): an affine map of each channel and an
activation, which a sparse layer computes in the pass that packs them for it. What brings it there is in `steps` and
`product`; who records what, and when, in `qsparseprop.nn.blocks`.
"""

from qsparseprop.nn.deferred.conditions import may_defer, one_by_one
from qsparseprop.nn.deferred.tensor import DeferredTensor, ordinary, pending_of

__all__ = ["DeferredTensor", "may_defer", "one_by_one", "ordinary", "pending_of"]
