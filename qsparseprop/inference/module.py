"""A frozen model as a module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qsparseprop._torch_compat import is_jit_tracing, transforms_active
from qsparseprop.arguments import shown
from qsparseprop.inference.capture import Signature, structure
from qsparseprop.inference.compiled import CompiledProgram
from qsparseprop.inference.program import Program
from qsparseprop.inference.report import FreezeReport

__all__ = ["FrozenModule"]


class FrozenModule(nn.Module):
    """A model that computes on codes of 8 bits; made by `freeze`.

    It takes and gives what the model does that it was made of, for batches of any size. It has no parameters, gradients
    end at it, and it does not train. A frozen linear layer takes (..., features).

    Parameters
    ----------
    program : Program
    signature : Signature
        What it takes and gives.
    report : FreezeReport
    rows : bool
        Whether the first input may have more dimensions than the program's, all of which count rows.

    Attributes
    ----------
    program : Program
        What is computed.
    report : FreezeReport
        What was frozen, and the errors that this makes.
    classes : tuple of str or None
        What the classes are called that its outputs stand for, where somebody has said it; kept by `save`.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, program: Program, signature: Signature, report: FreezeReport, rows: bool = False) -> None:
        super().__init__()
        self.program, self.signature, self.report, self.rows = program, signature, report, rows
        self._compiled = CompiledProgram(program)
        self._takes_one = signature.arguments == ((0,), {}) and not signature.others
        super().train(False)

    @property
    def freeze_report(self) -> FreezeReport:
        """The report, under the name that it has on models that are frozen in parts."""
        return self.report

    def train(self, mode: bool = True) -> FrozenModule:
        """Refuse to train.

        Parameters
        ----------
        mode : bool
            False changes nothing.

        Returns
        -------
        FrozenModule

        Raises
        ------
        RuntimeError
            If `mode` is true.
        """
        if mode:
            raise RuntimeError("a frozen model does not train; train the one that it was made of and freeze it again")
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model computes.

        Parameters
        ----------
        *args, **kwargs
            As the model takes them; what is no tensor must be what it was when the model was frozen.

        Returns
        -------
        Tensor, or tuple, list, dict, namedtuple or other container of Tensor
            As the model gives them, float32 where they are floating point.

        Raises
        ------
        TypeError, ValueError
            For other arguments, shapes or dtypes than those that the model was frozen with.
        """
        _check_eager()
        if self._takes_one and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            inputs = self._checked([args[0]])  # without the search for tensors, which takes as long as a layer
        else:
            inputs = self._inputs(args, kwargs)
        leading = inputs[0].shape[:-1]
        if self.rows:
            inputs = [inputs[0].reshape(-1, inputs[0].shape[-1])]
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                outputs = self._compiled(*inputs)
        else:
            outputs = self._compiled(*inputs)
        if self.rows:
            outputs = tuple(output.view(*leading, output.shape[-1]) for output in outputs)
        results = self.signature.results
        if type(results) is int:
            return outputs[results]
        return _pytree.tree_map(lambda number: None if number is None else outputs[number], results)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments, after a check of everything."""
        leaves, spec = _pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        signature = self.signature
        if structure(spec) != signature.arguments:
            given = [_kind(leaf) for leaf in leaves]
            raise TypeError(f"the model was frozen for {_called(signature)}, as the calibration data had its "
                            f"arguments, got {_written(structure(spec), given)}")  # fmt: skip
        tensors: list[Tensor] = []
        for number, leaf in enumerate(leaves):
            if number in signature.others:
                known = signature.others[number]
                if isinstance(leaf, Tensor) or type(leaf) is not type(known) or leaf != known:
                    raise ValueError(f"the model was frozen with {known!r} for an argument, got {shown(leaf)}")
            elif isinstance(leaf, Tensor):
                tensors.append(leaf)
            else:
                raise TypeError(f"the model was frozen for {_called(signature)}, got a {type(leaf).__name__}")
        return self._checked(tensors)

    def _checked(self, tensors: list[Tensor]) -> list[Tensor]:
        batches: set[int] = set()
        checked = []
        for number, tensor in enumerate(tensors):
            shape, dtype = self.signature.shapes[number], self.signature.dtypes[number]
            given = tuple(tensor.shape[-1:]) if self.rows else tuple(tensor.shape)
            wanted = shape[1:] if self.rows else shape
            fits = len(given) == len(wanted) and all(n is None or n == m for n, m in zip(wanted, given, strict=True))
            same = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype is dtype
            if not fits or not same or tensor.device.type != "cpu":
                raise ValueError(
                    f"input {number} must be {_tensor(wanted, dtype, self.rows)} on the CPU, as it was when the model "
                    f"was frozen, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                )
            batches.update(m for n, m in zip(wanted, given, strict=True) if n is None)
            tensor = tensor.detach()
            checked.append(tensor.float() if dtype.is_floating_point else tensor)
        if len(batches) > 1:
            raise ValueError(f"inputs have batches of different sizes, {sorted(batches)}")
        return checked

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModule:
        # nothing in it changes
        copied = FrozenModule(self.program, self.signature, copy.copy(self.report), self.rows)
        copied.classes = self.classes
        return copied

    def extra_repr(self) -> str:
        """What it takes, and what was frozen.

        Returns
        -------
        str
        """
        return f"{_called(self.signature)}, {self.report.summary()}"


def _tensor(shape: Sequence[int | None], dtype: torch.dtype, rows: bool = False) -> str:
    sizes = ", ".join("batch" if n is None else str(n) for n in shape)
    kind = "floating point" if dtype.is_floating_point else str(dtype)
    return f"{kind} (..., {sizes})" if rows else f"{kind} ({sizes})"


def _called(signature: Signature) -> str:
    """A call with the arguments that a model takes: ``(floating point (batch, 3), mask=torch.bool (batch, 4))``."""
    tensors = iter(map(_tensor, signature.shapes, signature.dtypes))
    count = len(_pytree.tree_leaves(signature.arguments))
    return _written(signature.arguments, [repr(signature.others[number]) if number in signature.others else
                                          next(tensors) for number in range(count)])  # fmt: skip


def _written(arguments: Any, leaves: Sequence[str]) -> str:
    """Positional and keyword arguments with words in the place of numbers."""

    def words(tree: Any) -> str:
        if isinstance(tree, dict):
            return "{" + ", ".join(f"{key!r}: {words(each)}" for key, each in tree.items()) + "}"
        if isinstance(tree, list | tuple):
            inside = ", ".join(map(words, tree))
            return f"[{inside}]" if isinstance(tree, list) else f"({inside})"
        return leaves[tree]

    positional, keyword = arguments
    return "(" + ", ".join([*map(words, positional), *(f"{key}={words(each)}" for key, each in keyword.items())]) + ")"


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _check_eager() -> None:
    """Refuse what would make a constant of what kernels compute, or take them for operators of torch."""
    if is_jit_tracing() or torch.compiler.is_exporting():
        raise RuntimeError("a frozen model is no graph of torch's operators, torch.jit.trace, torch.export and ONNX's "
                           "exporters cannot take it over: qsparseprop.inference.save writes it to a file, and "
                           "export_onnx for other engines")  # fmt: skip
    if transforms_active():
        raise NotImplementedError("a frozen model has no derivatives and no vmap (torch.func): it takes batches of any "
                                  "size, and the model that it was made of has gradients")  # fmt: skip
