"""What became of the tensors that a layer gave the last time: a guess of what will become of the next one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from qsparseprop._torch_compat import watcher
from qsparseprop.nn.deferred.passes import Activation

#: What is remembered at most: operations of a chain, and different ones behind the same result (as an activation whose
#: limits change from call to call).
LONGEST, MOST_BRANCHES = 16, 16

#: What can follow a product: "BatchNorm", "add", or an activation.
Operation = str | Activation

#: After so many calls in which nothing was deferred since only the values were wanted, it is tried again.
RETRY = 16


class Usage:
    """Of the results of one operation behind one layer; those of the operations that follow are its branches.

    A wrong guess costs time, never more.

    Attributes
    ----------
    absorbed : bool
        Whether an operation has been recorded on it.
    packed : bool
        Whether a sparse layer has taken it packed.
    summed : bool
        Whether it was a summand of another chain.
    read : bool
        Whether anybody else has seen its values.
    keeps_values : bool
        Whether the values were wanted the last time, beside the packed form.
    fed : bool
        Of a layer's product: whether the layer has taken its input packed.
    """

    __slots__ = ("_branches", "_calls", "_depth", "_followed", "_values_only", "absorbed", "fed", "keeps_values",
                 "packed", "read", "summed")  # fmt: skip

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._branches: dict[Operation, Usage] = {}
        self._followed: set[Operation] = set()
        self._calls = 0
        self._values_only = self.keeps_values = False
        self.absorbed = self.packed = self.summed = self.read = self.fed = False

    def branch(self, operation: Operation) -> Usage:
        """That of what an operation gives; a call of it begins."""
        self._followed.add(operation)
        found = self._branches.get(operation)
        if found is None:
            found = Usage(self._depth + 1)
            if self._depth < LONGEST and len(self._branches) < MOST_BRANCHES:
                self._branches[operation] = found
        return found.begin()

    def begin(self, borrowed: bool = False) -> Usage:
        """A new tensor is made.

        Parameters
        ----------
        borrowed : bool
            Whether its rows are those of an ordinary tensor, so that nothing is saved before the chain ends.
        """
        if not self._values_only or self._calls % RETRY == 0:  # otherwise nothing could be learned from the last one
            self.keeps_values = self.summed or self.read
            packed, read = self.packed or self.summed, self.read
            if borrowed:
                self._values_only = (read or self._read_behind()) and not (packed or self._packed_behind())
            else:
                self._values_only = read and not (packed or self.absorbed)
        self.absorbed = self.packed = self.summed = self.read = self.fed = False
        self._followed.clear()
        self._calls += 1
        return self

    @property
    def plain(self) -> bool:
        """Whether only the values were wanted, so that deferring saves nothing, or less than it costs.

        Where somebody sees what autograd saves, this may not depend on a guess.
        """
        return self._values_only and self._calls % RETRY != 0 and watcher() is None

    def _behind(self) -> Iterable[Usage]:
        return (branch for operation, branch in self._branches.items() if operation in self._followed)

    def _read_behind(self) -> bool:
        """Whether the values of something that followed were read."""
        return any(branch.read or branch._read_behind() for branch in self._behind())

    def _packed_behind(self) -> bool:
        """Whether something that followed was packed, or part of a sum, of whichever chain that became."""
        return "add" in self._followed or any(
            branch.packed or branch.summed or branch._packed_behind() for branch in self._behind())

    def chain(self) -> list[Operation]:
        """What was recorded, one operation after the other; the longest of several chains."""
        return longest([operation, *branch.chain()] for operation, branch in self._branches.items()
                       if operation in self._followed)  # fmt: skip


def longest(chains: Iterable[list[Operation]]) -> list[Operation]:
    """The longest of several chains; none of none."""
    return max(chains, key=len, default=[])


def name_of(operation: Operation) -> str:
    """What users call it."""
    if isinstance(operation, str):
        return operation
    name, options = operation
    if name == "clamp":
        names: dict[tuple[float, ...], str] = {(0.0, math.inf): "ReLU", (0.0, 6.0): "ReLU6"}
        return names.get(options, "Hardtanh")
    return {"leaky_relu": "LeakyReLU", "silu": "SiLU", "hardswish": "Hardswish"}.get(name, "GELU")
