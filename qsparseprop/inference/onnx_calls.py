"""Operators of torch, which programs call on ordinary tensors, as nodes of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsparseprop.inference.calls import Name, call_operator
from qsparseprop.inference.onnx_arguments import Arguments
from qsparseprop.inference.onnx_elements import ELEMENTWISE
from qsparseprop.inference.onnx_layers import FIRST_OF_SEVERAL, LAYERS
from qsparseprop.inference.onnx_shapes import NUMBERS, SEVERAL, SHAPES
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import Call
from qsparseprop.utils.errors import ConfigurationError

if TYPE_CHECKING:
    from qsparseprop.inference.capture import Signature
    from qsparseprop.inference.onnx import _Export

__all__ = ["described_inputs", "export_call"]

#: What makes a tensor for each operator, by its name with or without the overload.
_CALLS = {**ELEMENTWISE, **SHAPES, **LAYERS, **FIRST_OF_SEVERAL}


def described_inputs(
    program: Program, signature: Signature | None
) -> dict[str, tuple[Sequence[int | None], torch.dtype]]:
    """Shapes, with None for the batch, and dtypes of inputs.

    Parameters
    ----------
    program : Program
    signature : Signature, optional
        Without it inputs are whole numbers where they choose rows of a table, and floats otherwise.

    Returns
    -------
    dict
    """
    if signature is not None:
        found = zip(signature.shapes, signature.dtypes, strict=True)
        kinds = [(shape, torch.float32 if dtype.is_floating_point else dtype) for shape, dtype in found]
        return dict(zip(program.inputs, kinds, strict=True))
    return {name: ((None, *program.values[name].shape), torch.int64 if _chooses_rows(program, name) else torch.float32)
            for name in program.inputs}  # fmt: skip


def _chooses_rows(program: Program, name: str) -> bool:
    return any(isinstance(step, Call) and step.operator == "aten.embedding.default" and step.arguments[1] == Name(name)
               for step in program.users(name))  # fmt: skip


def export_call(export: _Export, step: Call) -> str | list[str] | None:
    """Translate a call.

    Parameters
    ----------
    export : _Export
    step : Call

    Returns
    -------
    str, list of str or None
        The tensor that it gives, or several; None where it depends on no input, and so is computed.

    Raises
    ------
    ConfigurationError
        If it is not translated, with its name.
    """
    if step.operator == "getitem":
        return _item(export, step)
    call = Arguments(export, step)
    name = step.operator.split(".", 1)[1]
    short = name.split(".")[0]
    if all(each in export.known for each in step.inputs):
        export.known[step.output] = call_operator(step, export.known)
        export.sizes.add(step)
        if isinstance(export.known[step.output], Tensor | bool | int | float | list | tuple):
            return None
    known = {name, short} & {*_CALLS, *SEVERAL} or step.operator in NUMBERS
    if not known:
        raise call.refused("is not translated to ONNX")
    try:
        export.sizes.add(step)
    except Exception as error:
        # whatever torch says to tensors without values
        raise call.refused("whose sizes depend on values, is not translated to ONNX") from error
    several = SEVERAL.get(name, SEVERAL.get(short))
    if several is not None and isinstance(export.sizes.meta(step.output), list):
        parts = several(call)
        call.close()
        return parts
    found = (NUMBERS.get(step.operator) or _CALLS[short])(call)
    call.close()
    if short in FIRST_OF_SEVERAL:
        return [found]
    return export.graph.add("Identity", [found], step.output)


def _item(export: _Export, step: Call) -> str | None:
    """One of several results."""
    source, index = step.arguments
    held = export.known.get(source.name)
    parts = export.several.get(source.name, [])
    if not isinstance(held, list | tuple) and not 0 <= index < len(parts):
        raise ConfigurationError(f"getitem, of step {step.output!r}, of result {index} of {source.name!r} is not "
                                 "translated to ONNX")  # fmt: skip
    export.sizes.add(step)
    if isinstance(held, list | tuple):
        export.known[step.output] = held[index]
        return None
    return export.graph.add("Identity", [parts[index]], step.output)
