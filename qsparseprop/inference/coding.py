"""Which values are coded, and what of them has scales of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from qsparseprop.inference.draft import Draft, Flat, Function, Joined, Layer, Node, Pooling, Sum
from qsparseprop.inference.folding import fold_residuals

__all__ = ["Coding", "choose"]

#: An int32 holds the sum of so many products of codes.
MAX_COLUMNS = 1 << 16


@dataclass(eq=False)
class Coding:
    """What of a draft is computed on codes.

    Parameters
    ----------
    coded : set of int
        Ids of nodes.
    values : set of str
        Values that codes are made of.
    reasons : dict
        By the id of a layer that is not coded: why.
    """

    coded: set[int]
    values: set[str] = field(default_factory=set)
    reasons: dict[int, str] = field(default_factory=dict)


def choose(draft: Draft, keep_float: Collection[str]) -> Coding:
    """Choose what is computed on codes, and fold residual additions there.

    Layers are, unless they must not; everything else where what it takes comes from codes and what it gives becomes
    codes again.

    Parameters
    ----------
    draft : Draft
        Changed in place.
    keep_float : collection of str
        Names of layers that are not.

    Returns
    -------
    Coding
    """
    reasons: dict[int, str] = {}
    chosen: dict[int, Node] = {}
    for node in draft.nodes:
        if isinstance(node, Layer):
            reason = _why_float(node, keep_float)
            if reason:
                reasons[id(node)] = reason
                continue
        elif not isinstance(node, Pooling | Sum | Joined | Flat) and not (isinstance(node, Function) and _finite(node)):
            continue
        chosen[id(node)] = node
    made = {node.output: node for node in draft.nodes}
    readers = draft.readers()

    def read_by_layers(name: str) -> bool:
        # it is coded anyway, and what only moves codes costs no accuracy
        return any(id(reader) in chosen and _always(reader) for reader in readers[name])

    while True:
        lost = [key for key, node in chosen.items() if not _always(node) and not (
            any(id(reader) in chosen for reader in readers.get(node.output, ()))
            and any(id(made.get(name)) in chosen or (isinstance(node, Pooling | Joined | Flat) and read_by_layers(name))
                    for name in node.inputs))]  # fmt: skip
        if not lost:
            break
        for key in lost:
            node = chosen.pop(key)
            if isinstance(node, Layer):
                reasons[key] = "nothing around it is coded"
    coding = Coding(set(chosen), reasons=reasons)
    fold_residuals(draft, coding.coded)
    for node in draft.nodes:
        if id(node) in coding.coded:
            coding.values.update(node.inputs)
    return coding


def _always(node: Node) -> bool:
    return isinstance(node, Layer) and not node.affine


def _why_float(node: Layer, keep_float: Collection[str]) -> str:
    if any(node.layer == name or node.layer.startswith(f"{name}.") for name in keep_float):
        return "asked for"
    if node.columns > MAX_COLUMNS:
        return f"rows of {node.columns} weights, of more than {MAX_COLUMNS}"
    if not node.weight.shape[0] or not node.columns:
        return "it has no weights"
    return ""


def _finite(node: Function) -> bool:
    """Whether a function is defined around zero; of others no table is made."""
    with torch.no_grad():
        return bool(node.of(torch.linspace(-256, 256, 1025, dtype=torch.float64)).isfinite().all())
