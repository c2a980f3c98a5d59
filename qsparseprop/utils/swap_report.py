"""What `swap_modules_with_sparse` decided for each layer, and why, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SwapDecision", "SwapReport"]

#: What changes for code around a swapped model, told once below the table.
_WEIGHT_DECAY = ("Weights of sparse layers are 1-D: weight decay for p.ndim > 1 leaves them out, "
                 "qsparseprop.utils.optimizer_utils.parameter_groups does not.")  # fmt: skip


@dataclass
class SwapDecision:
    """What was decided for one layer, and why.

    Attributes
    ----------
    name, kind : str
        Qualified name in the model and type of the dense layer.
    shape : tuple of int
        Shape of its weight; of several, that of the largest.
    input_shape : tuple of int or None
        Shape of its input in the recorded forward pass; None where there was none.
    sparsity : float
        Fraction of zeros, masked ones included.
    dense_ms, sparse_ms : float or None
        Forward + backward, medians in milliseconds; None where nothing was timed.
    products : str
        How the sparse layer's products walk its weight: "list", "dense" (rows), or both for the product with the
        input, that with the gradient, and the weight gradient; empty where nothing was timed, or in float32.
    swapped : bool
    reason : str
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...] | None
    sparsity: float
    dense_ms: float | None = None
    sparse_ms: float | None = None
    products: str = ""
    swapped: bool = False
    reason: str = ""


def _decision(d: SwapDecision) -> str:
    return ("sparse" if d.swapped else "dense") + (f": {d.reason}" if d.reason else "")


class SwapReport(list[SwapDecision]):
    """Decisions of `swap_modules_with_sparse`; prints as a table.

    One `SwapDecision` for every module with a prunable weight.
    """

    @property
    def swapped(self) -> list[SwapDecision]:
        """Those that were replaced."""
        return [d for d in self if d.swapped]

    def tell_chains(self, joined: Mapping[str, Sequence[str]]) -> None:
        """Let the reasons of layers that were replaced say what they were computed together with.

        Parameters
        ----------
        joined : mapping of str to sequence of str
            By the name of a layer.
        """
        for decision in self.swapped:
            if names := joined.get(decision.name):
                together = "together with " + ", ".join(names)
                decision.reason = ", ".join(part for part in (together, decision.reason) if part)

    def as_dicts(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(d) for d in self]

    def table(self) -> str:
        """One line a layer."""
        head = ("layer", "type", "weight", "input", "sparsity", "dense ms", "sparse ms", "products", "decision")
        rows = [head]
        for d in self:
            rows.append((
                d.name, d.kind, "x".join(map(str, d.shape)),
                "-" if d.input_shape is None else "x".join(map(str, d.input_shape)), f"{100 * d.sparsity:.1f} %",
                "-" if d.dense_ms is None else f"{d.dense_ms:.2f}",
                "-" if d.sparse_ms is None else f"{d.sparse_ms:.2f}",
                d.products or "-",
                _decision(d),
            ))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table()}\n{_WEIGHT_DECAY}" if self.swapped else self.table()
