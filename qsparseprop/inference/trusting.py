"""Arguments of operators whose kernels in torch read tensors without a look at their sizes: recurrence, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["TRUSTING", "check_trusting"]

#: Recurrent operators, and rows of their weights for each hidden feature.
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
#: Operators that are checked.
TRUSTING = {*_GATES, "scaled_dot_product_attention"}


def check_trusting(overload: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Check that what an operator takes has sizes that go together.

    Parameters
    ----------
    overload : Overload
        Of one of `TRUSTING`.
    arguments : sequence
    keywords : mapping

    Raises
    ------
    ValueError
        If they have not, or sequences are packed.
    """
    names = [argument.name for argument in overload._schema.arguments]
    given = {**dict(zip(names, arguments, strict=False)), **keywords}
    if str(overload).split(".")[1] in _GATES:
        _check_recurrent(overload, given)
    elif given["key"].shape[-2:-1] != given["value"].shape[-2:-1]:
        raise ValueError(f"{overload} has other numbers of keys and values")


def _check_recurrent(overload: Any, given: Mapping[str, Any]) -> None:
    name, kind = str(overload).split(".")[1:3]
    if kind != "input":
        raise ValueError(f"{overload} takes packed sequences, which programs do not have")
    source, weights = given["input"], list(given["params"])
    states = list(given["hx"]) if name == "lstm" else [given["hx"]]
    tensors = [source, *states, *weights]
    if not all(isinstance(t, Tensor) and t.is_floating_point() and t.dtype is source.dtype for t in tensors):
        raise ValueError(f"{overload} takes tensors of one dtype")
    if len(states) != 1 + (name == "lstm") or any(t.ndim != 3 for t in (source, *states)):
        raise ValueError(f"{overload} takes an input and states of three dimensions")
    directions, layers = 1 + bool(given["bidirectional"]), int(given["num_layers"])
    output, hidden = states[0].shape[2], states[-1].shape[2]
    rows = _GATES[name] * hidden
    batch = source.shape[0 if given["batch_first"] else 1]
    wanted: list[tuple[int, ...]] = []
    for layer in range(min(layers, len(weights))):
        inside = source.shape[2] if layer == 0 else output * directions
        one: list[tuple[int, ...]] = [(rows, inside), (rows, output)]
        one += [(rows,), (rows,)] if given["has_biases"] else []
        one += [(output, hidden)] if output != hidden else []
        wanted += one * directions
    fits = [tuple(t.shape) for t in weights] == wanted != [] and layers > 0 and hidden > 0
    if not fits or any(tuple(t.shape[:2]) != (layers * directions, batch) for t in states):
        raise ValueError(f"{overload} has weights or states of other sizes than go with its input")
