"""What the state of a sparse module is, and what is accepted when one is loaded.

The keys of a module: ``weight`` (the values), ``crow_indices`` and ``col_indices`` (the pattern), ``bias`` where there
is one, and ``_extra_state`` (int64: the format's number, then the shape of the dense weight). All are tensors, so that
any file format for tensors will do. A module loads all of its keys or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qsparseprop.arguments import shown
from qsparseprop.contents import is_convertible, unreadable
from qsparseprop.layout.pattern import check_pattern, dense_pattern
from qsparseprop.ops import check_storage

if TYPE_CHECKING:
    from qsparseprop.nn._weight import SparseWeight

#: Number of the format that this version writes and reads.
FORMAT = 1

_SPARSE_KEYS = ("weight", "crow_indices", "col_indices")
_CHOICES = ("keep_pattern", "take_zeros")
_dense_choice: ContextVar[str | None] = ContextVar("dense_choice", default=None)


@contextlib.contextmanager
def accept_dense_state(choice: str) -> Iterator[None]:
    """Let sparse modules load states of dense layers, plain or with the masks of torch.nn.utils.prune.

    Parameters
    ----------
    choice : {"keep_pattern", "take_zeros"}
        "keep_pattern": the module keeps its pattern and takes the values there, whatever the others are.
        "take_zeros": the module takes the pattern of the dense weight: what is zero in it (or masked) does not exist.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        For another choice.

    Examples
    --------
    >>> with accept_dense_state("take_zeros"):
    ...     model.load_state_dict(torch.load("pruned.pt"))
    """
    if choice not in _CHOICES:
        raise ValueError(f"choice must be one of {', '.join(map(repr, _CHOICES))}, got {shown(choice)}")
    token = _dense_choice.set(choice)
    try:
        yield
    finally:
        _dense_choice.reset(token)


class State(NamedTuple):
    """Values, pattern and bias of a sparse module."""

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None


class FoundState(NamedTuple):
    """What a state dict holds for a module; `state` is None where nothing is to be loaded."""

    state: State | None
    missing: list[str]
    unexpected: list[str]
    errors: list[str]


def check_format(state: Any, shape: tuple[int, ...], key: str) -> str | None:
    """What is wrong with a module's ``_extra_state``, or None."""
    problem = unreadable(state)
    if problem is None and (state.dtype != torch.int64 or state.ndim != 1 or state.numel() < 1):
        problem = f"got dtype {state.dtype} and shape {tuple(state.shape)}"
    if problem is not None:
        return (f"{key}: expected a 1-D tensor of dtype torch.int64, the format's number and the weight's shape; "
                f"{problem}")
    if (number := int(state[0])) != FORMAT:
        return (f"{key}: the state is in format {number} of sparse modules, this version of qsparseprop reads format "
                f"{FORMAT}")
    if state.numel() != 1 + len(shape):
        return (f"{key}: the state is that of a weight of {state.numel() - 1} dimensions, this module's has "
                f"{len(shape)}")
    if (saved := tuple(state[1:].tolist())) != tuple(shape):
        return f"{key}: the state is that of a weight of shape {saved}, this module's is {tuple(shape)}"
    return None


def _check_tensor(state: Any, shape: tuple[int, ...], key: str) -> str | None:
    """What is wrong with a floating-point tensor, or None."""
    if isinstance(state, Tensor) and not state.is_nested and tuple(state.shape) != tuple(shape):
        return f"{key}: expected shape {tuple(shape)}, got {tuple(state.shape)}"
    if (problem := unreadable(state)) is not None:
        return f"{key}: {problem}"
    if not is_convertible(state.dtype):
        return f"{key}: expected a floating-point tensor, got dtype {state.dtype}"
    return None


def _check_mask(state: Any, shape: tuple[int, ...], key: str) -> str | None:
    """What is wrong with a mask of torch.nn.utils.prune, which may have any real dtype, or None."""
    if isinstance(state, Tensor) and not state.is_nested and tuple(state.shape) != tuple(shape):
        return f"{key}: expected shape {tuple(shape)}, got {tuple(state.shape)}"
    if (problem := unreadable(state)) is not None:
        return f"{key}: {problem}"
    return f"{key}: expected a mask of real numbers, got dtype {state.dtype}" if state.is_complex() else None


def _dense_tensor(
    found: Mapping[str, Any], name: str, shape: tuple[int, ...], prefix: str
) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """A dense parameter, pruned or not, its mask, and what is wrong with them."""
    mask = None
    if f"{name}_orig" in found and f"{name}_mask" in found:
        mask, key = found[f"{name}_mask"], f"{name}_orig"
        problems = [_check_tensor(found[key], shape, prefix + key), _check_mask(mask, shape, f"{prefix}{name}_mask")]
    elif name in found:
        key = name
        problems = [_check_tensor(found[key], shape, prefix + key)]
    else:
        return None, None, []
    errors = [problem for problem in problems if problem is not None]
    if errors:
        return None, None, errors
    return found[key] if mask is None else found[key] * mask, mask, []


def _read_dense(module: SparseWeight, found: Mapping[str, Any], prefix: str) -> tuple[State | None, list[str]]:
    shape = module.weight_shape
    weight, mask, errors = _dense_tensor(found, "weight", shape, prefix)
    bias = None
    if module.bias is not None:
        bias, _, of_bias = _dense_tensor(found, "bias", (module._outputs,), prefix)
        errors += of_bias
    choice = _dense_choice.get()
    if choice is None:
        key = "weight_orig" if "weight_orig" in found else "weight"
        errors.append(f"{prefix}{key}: is the weight of a dense layer; load it within "
                      "accept_dense_state('keep_pattern') or accept_dense_state('take_zeros') of qsparseprop.nn")
    if errors or weight is None:
        return None, errors
    if choice == "keep_pattern":
        flat, (crow, col) = module._flat_indices(), module._indices()
    else:
        kept = weight if mask is None else mask
        crow, col, flat = dense_pattern((kept != 0).reshape(shape[0], -1))
    return State(weight.detach().reshape(-1)[flat], crow, col, bias), []


def _read_sparse(module: SparseWeight, found: Mapping[str, Any], prefix: str) -> tuple[State | None, list[str]]:
    absent = [key for key in _SPARSE_KEYS if key not in found]
    if absent:
        return None, [f"{prefix}{key}: is missing, values and pattern only make sense together" for key in absent]
    values, crow, col = (found[key] for key in _SPARSE_KEYS)
    problems: list[str | None] = []
    if "_extra_state" in found:
        problems.append(check_format(found["_extra_state"], module.weight_shape, f"{prefix}_extra_state"))
    try:
        check_pattern(crow, col, module._matrix_shape(), prefix)
        problems.append(_check_tensor(values, (col.numel(),), f"{prefix}weight"))
    except (TypeError, ValueError, RuntimeError) as error:  # the last one from subclasses of Tensor
        problems.append(str(error))
    bias = found.get("bias")
    if module.bias is not None and "bias" in found:
        problems.append(_check_tensor(bias, (module._outputs,), f"{prefix}bias"))
    errors = [problem for problem in problems if problem is not None]
    return (None, errors) if errors else (State(values, crow, col, bias), [])


def read_state(module: SparseWeight, state_dict: Mapping[str, Any], prefix: str, assign: bool) -> FoundState:
    """Find and check a module's state, and change nothing.

    Parameters
    ----------
    module : SparseWeight
    state_dict : mapping of str to Tensor
    prefix : str
        What the module's keys start with.
    assign : bool
        Whether the state's tensors will take the place of the module's, which may be on the meta device then.
    """
    found = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    pruned = "weight_orig" in found and "weight_mask" in found
    weight = found.get("weight")
    dense = pruned or (isinstance(weight, Tensor) and not weight.is_nested and weight.ndim == len(module.weight_shape))
    expected = {"weight_orig", "weight_mask"} if pruned else {"weight"}
    if not dense:
        expected = {*_SPARSE_KEYS, "_extra_state"}
    if module.bias is not None:
        expected |= {"bias_orig", "bias_mask"} if dense and "bias_orig" in found else {"bias"}
    missing = [prefix + key for key in sorted(expected) if key not in found]
    unexpected = [prefix + key for key in found if key not in expected]
    if not found.keys() & {*_SPARSE_KEYS, "weight_orig"}:
        return FoundState(None, missing, unexpected, [])
    state, errors = (_read_dense if dense else _read_sparse)(module, found, prefix)
    if not assign and any(t is not None and t.is_meta for t in (module.weight, module.bias)):
        errors.append(f"{prefix}weight: the module is on the meta device; load with assign=True")
    if not assign:
        for name, tensor in (("weight", module.weight), *module._held_indices(), ("bias", module.bias)):
            try:
                check_storage(tensor, f"{prefix}{name} of the module")
            except ValueError as error:
                errors.append(str(error))
    if module.bias is None and state is not None:
        state = state._replace(bias=None)
    return FoundState(None if missing or errors else state, missing, unexpected, errors)
