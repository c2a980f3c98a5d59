"""What follows a layer becomes a part of it: batch normalisation, limits, padding before it, and residual additions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qsparseprop.inference.draft import Draft, Function, Layer, Node, Operator, Pooling, Sum
from qsparseprop.inference.steps import Window

__all__ = ["fold", "fold_residuals"]


def fold(draft: Draft) -> None:
    """Fold normalisations, limits and padding, in place.

    Parameters
    ----------
    draft : Draft
    """
    for absorb in (_absorb_padding, _absorb_affine, _absorb_limits, _absorb_steps):
        _everywhere(draft, absorb)


def _everywhere(draft: Draft, absorb: Callable[[Draft, Node, Node], Node | None]) -> None:
    """Put one node in the place of two neighbours, of which nobody else reads the first, where `absorb` makes one."""
    readers = draft.readers()
    made: dict[str, Node] = {}
    nodes: list[Node] = []
    for node in draft.nodes:
        before = made.get(node.inputs[0]) if node.inputs else None
        both = None
        if before is not None and len(readers[before.output]) == 1 and before.output not in draft.outputs:
            both = absorb(draft, before, node)
        if both is not None:
            nodes.remove(before)  # type: ignore[arg-type]  # there is one
            node = both
        made[node.output] = node
        nodes.append(node)
    draft.nodes = nodes


def _absorb_affine(draft: Draft, before: Node, node: Node) -> Node | None:
    if not isinstance(before, Layer) or not isinstance(node, Layer):
        return None
    if not node.affine or node.weight.shape[1] != 1 or node.groups != node.weight.shape[0] or before.limited:
        return None
    factor = node.weight.double().flatten()
    rows = factor.view(-1, *[1] * (before.weight.ndim - 1))
    before.weight = (before.weight.double() * rows).float()
    before.bias = (before.bias.double() * factor + node.bias.double()).float()
    before.output = node.output
    return before


def _absorb_limits(draft: Draft, before: Node, node: Node) -> Node | None:
    if not isinstance(node, Function) or node.limits is None or not isinstance(before, Layer | Sum):
        return None
    low, high = node.limits
    before.low, before.high = (min(max(limit, low), high) for limit in (before.low, before.high))
    before.output = node.output
    return before


def _absorb_padding(draft: Draft, before: Node, node: Node) -> Node | None:
    """Zeros around an image, before a convolution."""
    if not isinstance(before, Operator) or not isinstance(node, Layer) or node.weight.ndim != 4 or node.affine:
        return None
    if before.operator not in ("aten.pad.default", "aten.constant_pad_nd.default"):
        return None
    source, sides = before.inputs[0], list(before.arguments[1])
    rest = [*before.arguments[2:], *before.keywords.values()]
    while len(sides) > 4 and not any(sides[-2:]):  # of channels and images, where nothing is added
        sides = sides[:-2]
    if len(sides) != 4 or min(sides) < 0 or any(value not in ("constant", 0, None) for value in rest):
        return None
    if not draft.images(source):
        return None
    window, (left, right, top, bottom) = node.window, sides
    more = (top, bottom, left, right)
    sums = [own + new for own, new in zip(window.padding, more, strict=True)]
    node.window = Window(window.kernel, window.stride, (sums[0], sums[1], sums[2], sums[3]), window.dilation)
    node.inputs = (source, *node.inputs[1:])
    return node


def _absorb_steps(draft: Draft, before: Node, node: Node) -> Node | None:
    """Every second row, and of those every second column: one step."""
    if not isinstance(before, Pooling) or not isinstance(node, Pooling):
        return None
    if any(pool.window.kernel != (1, 1) or any(pool.window.padding) for pool in (before, node)):
        return None
    stride = tuple(a * b for a, b in zip(before.window.stride, node.window.stride, strict=True))
    node.window = Window((1, 1), (stride[0], stride[1]))
    node.inputs, node.kind = before.inputs, "max"
    return node


def fold_residuals(draft: Draft, coded: set[int]) -> None:
    """Fold additions on codes into the layers that compute one of their operands, in place.

    Parameters
    ----------
    draft : Draft
    coded : set of int
        Ids of the nodes that are computed on codes; those that are left stay in it.
    """
    readers = draft.readers()
    made = {node.output: node for node in draft.nodes}
    order = {id(node): index for index, node in enumerate(draft.nodes)}
    for position, node in enumerate(draft.nodes):
        if not isinstance(node, Sum) or id(node) not in coded or node.inputs[0] == node.inputs[1]:
            continue
        layers = [made[name] for name in node.inputs if name in made]
        free = [layer for layer in layers if isinstance(layer, Layer) and id(layer) in coded and not layer.limited
                and len(layer.inputs) == 1 and len(readers[layer.output]) == 1 and layer.output not in draft.outputs]
        if not free:
            continue
        # those that do not only copy first, and of these the one that is computed last
        layer = max(free, key=lambda found: (not found.affine, order[id(found)]))
        other = next(name for name in node.inputs if name != layer.output)
        layer.inputs = (layer.inputs[0], other)
        layer.low, layer.high, layer.output = node.low, node.high, node.output
        draft.nodes[order[id(layer)]], draft.nodes[position] = node, layer
        order[id(layer)] = position
        made[layer.output] = layer
        node.output = ""
    draft.nodes = [node for node in draft.nodes if node.output]


def check_weights(draft: Draft) -> None:
    """Check that weights are numbers.

    Parameters
    ----------
    draft : Draft

    Raises
    ------
    ValueError
        Naming the layer.
    """
    for node in draft.nodes:
        if isinstance(node, Layer) and not bool(torch.isfinite(node.weight).all() and torch.isfinite(node.bias).all()):
            raise ValueError(f"the weights of {node.layer or node.output!r} hold NaN or infinity")
