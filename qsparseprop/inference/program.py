"""What a frozen model computes: steps over named values, which are codes of 8 bits or ordinary tensors.

This is data alone: it is what files hold (`qsparseprop.inference.files`), what the kernels are set up from
(`qsparseprop.inference.compiled`), and what `qsparseprop.inference.reference` computes in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from qsparseprop.inference.checks import check_step
from qsparseprop.inference.steps import Product, Quantize, Step, Value

__all__ = ["Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in the order in which they are computed.

    Parameters
    ----------
    inputs, outputs : tuple of str
        Names of ordinary tensors.
    values : dict
        Of each name. Those of a batch of any size.
    steps : tuple of Step
    constants : dict
        Tensors that calls take, by name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    steps: tuple[Step, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {*self.inputs, *self.constants}
        for step in self.steps:
            missing = [name for name in step.inputs if name not in known]
            if missing:
                raise ValueError(f"step {step.output!r} reads {missing[0]!r}, which nothing before it computes")
            if step.output in known or step.output not in self.values:
                raise ValueError(f"step {step.output!r} must compute a value of its own")
            check_step(step, self.values)
            if isinstance(step, Quantize) and step.dynamic:
                self._check_readers(step)
            known.add(step.output)
        lost = [name for name in self.outputs if name not in known]
        if lost:
            raise ValueError(f"nothing computes the output {lost[0]!r}")
        coded = [name for name in (*self.inputs, *self.outputs)
                 if name in self.values and self.values[name].codes is not None]
        if coded:
            raise ValueError(f"inputs and outputs are ordinary tensors, {coded[0]!r} is coded")

    def __repr__(self) -> str:
        """A line for each input, each step and the outputs."""
        lines = [f"{name}: {self._shape(name)}" for name in self.inputs]
        lines += [f"{step!r}: {self._shape(step.output)}" for step in self.steps]
        return "\n  ".join(["Program(", *lines, f"return {', '.join(self.outputs)}"]) + "\n)"

    def _shape(self, name: str) -> str:
        value = self.values[name]
        many = "" if value.rows == 1 else f"{value.rows} rows of "
        coded = "" if value.codes is None else f", {value.codes!r}"
        return f"{many}({', '.join('?' if n < 0 else str(n) for n in value.shape)}){coded}"

    def _check_readers(self, step: Quantize) -> None:
        for reader in self.users(step.output):
            made = self.values.get(reader.output)
            if not isinstance(reader, Product) or made is None or made.codes is not None:
                raise ValueError(f"step {reader.output!r} reads codes with scales of tokens, which only products do "
                                 "that give ordinary tensors")

    def users(self, name: str) -> Iterator[Step]:
        """The steps that read a value."""
        return (step for step in self.steps if name in step.inputs)
