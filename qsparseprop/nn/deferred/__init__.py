"""Blocks that form while a model runs: tensors that are computed when the next sparse layer takes them.

A sparse layer that defers gives a `DeferredTensor`. What follows is recorded on it (`record`: batch normalisation,
additions, activations), each operation as a node of autograd (`nodes`), and computed in one pass when a sparse layer
takes it (`product`) or when anybody else wants the values (`pending`). Gradients are deferred in the same way
(`gradient`).
"""

from qsparseprop.nn.deferred import record as _record  # noqa: F401 -- fills the table
from qsparseprop.nn.deferred.conditions import may_defer, one_by_one
from qsparseprop.nn.deferred.product import deferred_product
from qsparseprop.nn.deferred.tensor import DeferredTensor, ordinary, pending_of

__all__ = ["DeferredTensor", "deferred_product", "may_defer", "one_by_one", "ordinary", "pending_of"]
