"""Weights that a model computes of its parameters at every call: masked, standardised or cut out of another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparseprop.inference.draft import Draft, Node, Operator, compute, names_in

__all__ = ["compute_weights"]

#: Operators with weights.
_LAYERS = {"linear", "addmm", "matmul", "mm", "einsum", "conv1d", "conv2d", "conv3d",
           "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm"}  # fmt: skip


def compute_weights(draft: Draft) -> None:
    """Compute once, in place, what layers have for weights and biases, where it depends on constants alone.

    Parameters
    ----------
    draft : Draft
        Of operators.
    """
    found = _Constants(draft)
    for node in draft.nodes:
        assert isinstance(node, Operator)
        if _LAYERS.intersection(node.operator.split(".")[1:2]):
            for name in names_in([node.arguments, node.keywords]):
                value = found.value(name)
                if isinstance(value, Tensor):
                    draft.constants[name] = value.contiguous()
        found.add(node)
    draft.without_unread()


class _Constants:
    """Values that depend on no input, computed when they are asked for."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.values: dict[str, Any] = dict(draft.constants)
        self.nodes: dict[str, Node] = {}

    def add(self, node: Node) -> None:
        if all(name in self.values or name in self.nodes for name in node.inputs):
            self.nodes[node.output] = node

    def value(self, name: str) -> Any:
        """A value; None for one that depends on an input."""
        if name not in self.values and name in self.nodes:
            node = self.nodes[name]
            known = {source: self.value(source) for source in node.inputs}
            with torch.no_grad():
                self.values[name] = compute(node, known, self.draft.constants)
        return self.values.get(name)
