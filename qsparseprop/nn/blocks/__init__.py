"""Blocks that form while a model runs: what takes part in them, and where they begin and end.

A sparse layer that defers gives a `DeferredTensor`. What follows is recorded on it (`record`: batch normalisation,
additions, activations), each operation as a node of autograd where a gradient is wanted (`operations`), and computed in
one pass when a sparse layer takes it (`product`) or when anybody else wants the values.
"""

from qsparseprop.nn.blocks import record as _record  # noqa: F401 -- fills the table
from qsparseprop.nn.blocks.product import deferred_product

__all__ = ["deferred_product"]
