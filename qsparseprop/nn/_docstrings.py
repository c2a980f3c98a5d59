"""What the docstrings of layers have in common: a class says its first sentence, the rest is written here once."""

from __future__ import annotations

import inspect
from typing import TypeVar

from qsparseprop.nn._base import SparseModule

_Layer = TypeVar("_Layer", bound=SparseModule)

_CONVOLUTION = """
Any kernel size, stride, {paddings}, dilation and groups. Usually made by `from_dense`; the
constructor makes a layer without weights, for `load_state_dict` and `regrow`.

Parameters
----------
{arguments}
    As in torch.nn.{dense}; the bias starts at zero.
vectorizing_over_on : bool, optional
    Order of the lanes, see `from_dense`.
qconfig : QuantConfig, optional
    For quantised layers.

Attributes
----------
{attributes}
    As in torch.nn.{dense}.
weight, bias, crow_indices, col_indices
    See `SparseWeight`{rows}."""

_QUANTISED = """
The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes."""


def _continued(kind: type[_Layer], rest: str) -> type[_Layer]:
    if kind.__doc__ is not None:  # under -OO nobody has one
        kind.__doc__ = f"{inspect.cleandoc(kind.__doc__)}\n{rest}\n"
    return kind


def describes_convolution(kind: type[_Layer]) -> type[_Layer]:
    """Go on in the docstring of a convolution with its arguments, which are those of the dense one, and attributes."""
    arguments = [name for name, parameter in inspect.signature(kind).parameters.items()
                 if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]  # fmt: skip
    padding = ["padding", "output_padding"] if kind.transposed else ["padding"]
    attributes = ["in_channels", "out_channels", "kernel_size", "stride", *padding, "dilation", "groups",
                  "padding_mode"]  # fmt: skip
    return _continued(kind, _CONVOLUTION.format(
        dense=kind._dense_type.__name__, arguments=", ".join(arguments), attributes=", ".join(attributes),
        paddings="padding, output padding" if kind.transposed else "padding (zeros)",
        rows="; a row of the pattern is a channel of the input" if kind.transposed else ""))  # fmt: skip


def describes_quantised(kind: type[_Layer]) -> type[_Layer]:
    """Go on in the docstring of a quantised layer with what becomes of its weight."""
    return _continued(kind, _QUANTISED)
