"""A weight of which only the nonzeros exist: values and pattern, how they change, and how they are stored."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop._torch_compat import before_averaging
from qsparseprop.arguments import instance, shown
from qsparseprop.layout.pattern import compact_pattern, pattern_stamp, row_indices, tensor_version
from qsparseprop.nn._interop import (
    check_deletion,
    check_owners,
    check_parameter,
    element_state,
    inner_optimizer,
    outdate_graphs,
)
from qsparseprop.nn._pattern import PatternHolder, restored
from qsparseprop.nn._state import FORMAT, check_format, read_state
from qsparseprop.nn._values import SparseValues, as_values, plain
from qsparseprop.nn.autograd.graph import NoGradient
from qsparseprop.ops import are_plain, check_storage

_PATTERN = ("crow_indices", "col_indices")
_VALUES = "a tensor of one value for each column index"


class SparseWeight(PatternHolder, nn.Module):
    """A weight of which only the nonzeros exist.

    Attributes
    ----------
    weight : SparseValues
        (nonzeros,) values, row by row: a Parameter.
    crow_indices, col_indices : Tensor
        The pattern in CSR, int32: row pointers (rows + 1,) and columns (nonzeros,) of the weight seen as a matrix
        (rows, everything else). They are part of the state, but no buffers: whoever averages buffers, casts them, or
        sends them in every step would spoil the pattern or waste time on it. See `PatternHolder`.
    indices_stamp : Tensor
        float64 scalar, a buffer that is not part of the state: a number made of the pattern. Where buffers are sent or
        averaged it tells that the values beside it were those of another pattern.
    bias : Parameter or None
        (rows,), or in transposed layers one element for each feature or channel of the output as well.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    indices_stamp: Tensor
    _copies: list[weakref.ref[Tensor]]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        raise NotImplementedError

    @property
    def nonzeros(self) -> int:
        """Number of weights that exist."""
        return self.weight.numel()

    @property
    def sparsity(self) -> float:
        """Fraction of the dense weight that is zero."""
        total = torch.Size(self.weight_shape).numel()
        return 1.0 - self.nonzeros / total if total else 0.0

    def mask(self) -> Tensor:
        """The pattern as a bool tensor of the dense weight's shape."""
        mask = torch.zeros(self.weight_shape, dtype=torch.bool)
        mask.view(-1)[self._flat_indices()] = True
        return mask

    def dense_weight(self) -> Tensor:
        """The weight with its zeros, differentiable with respect to `weight`."""
        check_storage(self.weight, "weight")
        dense = self.weight.new_zeros(torch.Size(self.weight_shape).numel())
        values = self.weight if self.nonzeros else NoGradient.apply(self.weight)
        return dense.index_put((self._flat_indices(),), values).view(self.weight_shape)

    def _matrix_shape(self) -> tuple[int, int]:
        """Rows, and everything else."""
        shape = self.weight_shape
        return shape[0], math.prod(shape[1:])

    @property
    def _outputs(self) -> int:
        """Features or channels of the output, for each of which a bias has an element."""
        return self.weight_shape[0]

    def _flat_indices(self) -> Tensor:
        self._refuse_written()
        self._check_held()
        rows, columns = self._matrix_shape()
        if self._pattern is not None and self._pattern.count == rows * columns:
            return torch.arange(rows * columns, device="cpu")
        crow, col = self._indices()
        return row_indices(crow) * columns + col

    def _check_sizes(self) -> None:
        weight, bias = self.weight, self.bias  # every access to a parameter is a call of __getattr__
        instance(weight, Tensor, "weight", _VALUES)
        with torch._C.DisableTorchFunctionSubclass():
            shape = weight.shape
        self._check_shapes(shape, bias)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weight, its values as a plain tensor, and the bias, after `_check_sizes`."""
        found = self._parameters  # without a call of __getattr__ for each
        weight: Tensor | None = found.get("weight")
        bias: Tensor | None = found.get("bias")
        if weight is None or "bias" not in found:  # something else stands in a parameter's place
            weight, bias = self.weight, self.bias
            instance(weight, Tensor, "weight", _VALUES)
        values = plain(weight)
        self._check_shapes(values.shape, bias)
        return weight, values, bias

    def _check_shapes(self, shape: torch.Size, bias: Tensor | None) -> None:
        if shape != self._values_shape:
            raise ValueError(f"weight must have one value for each of the {math.prod(self._values_shape)} column "
                             f"indices, got shape {tuple(shape)}")
        if bias is not None and bias.shape != (self._outputs,):
            raise ValueError(f"bias must have shape ({self._outputs},), got {tuple(bias.shape)}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See torch.nn.Module; parameters of dense layers are refused, and one that is a pattern is just a tensor."""
        if name in _PATTERN and param is not None:
            object.__setattr__(self, name, param.detach())
            return
        check_parameter(self, name, param)
        if name == "weight":
            as_values(param)
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        check_deletion(self, name)
        super().__delattr__(name)

    # ---- the pattern ----

    def _set_pattern(self, crow: Tensor, col: Tensor) -> None:
        """Take over a pattern, which must go with the values."""
        self._hold_pattern(crow, col, compact_pattern(crow, col, self._matrix_shape()))
        self._copies = []
        self._stamp_pattern(crow, col)

    def _stamp_pattern(self, crow: Tensor, col: Tensor) -> None:
        stamp = pattern_stamp(crow, col)
        self.register_buffer("indices_stamp", stamp, persistent=False)
        self._stamp = None if stamp.is_meta else stamp.item()

    def _check_stamp(self) -> None:
        """Refuse values that came with the stamp of another pattern."""
        stamp = self._buffers["indices_stamp"]  # as self.indices_stamp, without a call of __getattr__
        # the value, since many write to `data`, which counts no version
        if type(stamp) is not Tensor or stamp.is_meta or stamp.item() == self._stamp:
            return
        own = pattern_stamp(*self._indices())
        # an average of the same number differs by roundings
        if stamp.dtype == own.dtype and not torch.isclose(stamp, own, rtol=1e-12, atol=0.0):
            raise ValueError(
                f"the values of this {type(self).__name__}({self.extra_repr()}) were sent or averaged together with "
                "those of another sparsity pattern. DistributedDataParallel sends values, not patterns: make the "
                "models of all processes alike before wrapping them, by the same seed or by loading one state. "
                "Averages of weights (EMA, SWA) want one pattern: start a new average after it has changed."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseWeight:
        super()._apply(fn, recurse)
        as_values(self._parameters.get("weight"))

        def move(indices: Tensor) -> Tensor:
            moved = fn(indices)  # to another device, into shared memory; but never to another dtype
            return moved if moved.dtype == indices.dtype else indices.to(moved.device)

        indices = self._indices()
        moved = [move(t) for t in indices]
        same = all(a is b for a, b in zip(moved, indices, strict=True))
        if same and (self._pattern is None or not any(map(tensor_version, moved))):
            self._stamp_pattern(*moved)  # the buffer has been cast
        else:
            self._set_pattern(*moved)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        as_values(self._parameters.get("weight"))
        crow, col = (restored(self.__dict__.pop(name, None)) for name in _PATTERN)
        if crow is not None and col is not None:
            self._hold_pattern(crow, col, compact_pattern(crow, col, self._matrix_shape()))
            return
        # whole modules in files of earlier versions
        crow, col = (self._buffers.pop(name, None) for name in _PATTERN)
        if crow is not None and col is not None:
            self._set_pattern(crow, col)

    # ---- changes of the pattern ----

    def apply_further_mask(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove the weights outside of a mask, in place.

        `weight` stays the same Parameter with fewer elements; its gradient, where it has one, is cut alike.

        Parameters
        ----------
        mask : Tensor
            Of the dense weight's shape; what is zero in it is removed. Positions that do not exist are ignored.
        optimizer : torch.optim.Optimizer, optional
            What it keeps for each weight (momentum, Adam's moments, ...) is cut alike. An optimizer that is not named
            here has to be made anew.

        Raises
        ------
        ValueError
            For another shape, or an optimizer that does not train this weight; nothing has changed then.
        TypeError
            For what is no optimizer.
        NotImplementedError
            For an optimizer whose state does not belong to single weights (LBFGS) or lies in other processes
            (ZeroRedundancyOptimizer), and for a weight that FSDP or DistributedDataParallel has laid out; in every
            process alike, and nothing has changed then either.
        """
        self._check_mask(mask, "mask")
        check_owners([self])
        self._remove(mask, optimizer)

    def _remove(self, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """`apply_further_mask` without its checks."""
        flat = self._flat_indices()
        self._rearrange(flat[mask.reshape(-1)[flat] != 0], None, optimizer)

    def regrow(
        self, mask: Tensor, values: Tensor | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Add weights, in place.

        `weight` stays the same Parameter with more elements; its gradient, where it has one, is zero for the new ones.

        Parameters
        ----------
        mask : Tensor
            Of the dense weight's shape; where it is not zero a weight is added. Those that exist stay as they are.
        values : Tensor, optional
            Of the dense weight's shape: what the new weights start at; zero without it.
        optimizer : torch.optim.Optimizer, optional
            What it keeps for each weight (momentum, Adam's moments, ...) starts at zero for the new ones.

        Raises
        ------
        ValueError, TypeError, NotImplementedError
            See `apply_further_mask`.
        """
        self._check_mask(mask, "mask")
        if values is not None:
            self._check_mask(values, "values")
        check_owners([self])
        old = self._flat_indices()
        flat = torch.cat([old, mask.reshape(-1).nonzero().squeeze(1)]).unique()
        self._rearrange(flat, None if values is None else values.detach().reshape(-1)[flat], optimizer)

    def _check_mask(self, mask: Tensor, name: str) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(mask)}")
        if tuple(mask.shape) != tuple(self.weight_shape):
            raise ValueError(f"{name} must have shape {tuple(self.weight_shape)}, got {tuple(mask.shape)}")
        check_storage(mask, name)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What an optimizer keeps for each element of `weight`; an error if it cannot follow a change of the pattern.

        Raises
        ------
        ValueError, TypeError, NotImplementedError
            See `apply_further_mask`.
        """
        check_owners([self])
        return element_state(inner_optimizer(optimizer), self.weight)

    @torch.no_grad()
    def _rearrange(self, flat: Tensor, fresh: Tensor | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Move the weights to the positions `flat` (int64, ascending), which may lack old ones and have new ones."""
        check_storage(self.weight, "weight")
        inner = None if optimizer is None else inner_optimizer(optimizer)
        state = {} if inner is None else element_state(inner, self.weight)
        old = self._flat_indices()
        if torch.equal(flat, old):
            return  # nothing was removed or added
        place = torch.searchsorted(old, flat)
        known = torch.cat([old, old.new_full((1,), -1)])[place] == flat
        source = place[known]

        def move(tensor: Tensor, fresh: Tensor | None = None) -> Tensor:
            moved = tensor.new_zeros(flat.numel()) if fresh is None else fresh.to(tensor.dtype)
            moved[known] = tensor[source]
            return moved

        rows, columns = self._matrix_shape()
        crow = torch.zeros_like(self._crow)
        crow[1:] = torch.bincount(flat // max(columns, 1), minlength=rows).cumsum(0)
        grad = None if self.weight.grad is None else move(self.weight.grad)
        values = move(self.weight.data, fresh)
        if inner is not None:
            for name, tensor in state.items():
                inner.state[self.weight][name] = move(tensor)
        self._replace(crow, (flat % max(columns, 1)).to(torch.int32), values, grad)

    def _replace(self, crow: Tensor, col: Tensor, values: Tensor, grad: Tensor | None = None) -> None:
        """Give the Parameter another number of values."""
        outdate_graphs(self.weight)
        self.weight.grad = None
        # A graph that still exists keeps a node that accumulates gradients of the old size, and refuses to now; torch
        # makes a new one only when the dtype changes on the way.
        self.weight.data = values.to(torch.float64 if values.dtype != torch.float64 else torch.float32)
        self.weight.data = values
        self.weight.grad = grad if values.numel() else None  # as after a backward pass
        self._set_pattern(crow, col)

    # ---- state ----

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, copy in zip(_PATTERN, self._copied_pattern(), strict=True):
            destination[prefix + name] = copy

    def _copied_pattern(self) -> Sequence[Tensor]:
        """A copy of the pattern: what averages or overwrites the tensors of a state must not reach the pattern.

        The same one for as long as somebody holds it unchanged, since a module in several places of a model has one
        weight in the files of formats that store shared tensors once.
        """
        self._refuse_written()
        kept = [ref() for ref in self.__dict__.get("_copies", ())]
        copies = [c for c in kept if c is not None and tensor_version(c) == 0]
        if not copies or len(copies) < len(kept):
            copies = [t if self._pattern is not None else t.clone() for t in self._indices()]
            self._copies = [weakref.ref(copy) for copy in copies]
        return copies

    def get_extra_state(self) -> Tensor:
        """Format of the state and shape of the dense weight: int64, (1 + dimensions,)."""
        return torch.tensor([FORMAT, *self.weight_shape])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse what `get_extra_state` of another format or another shape has given."""
        if (error := check_format(state, self.weight_shape, "_extra_state")) is not None:
            raise RuntimeError(error)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        found = read_state(self, state_dict, prefix, assign)
        missing_keys.extend(found.missing)
        error_msgs.extend(found.errors)
        if strict:
            unexpected_keys.extend(found.unexpected)
        if found.state is None:
            return
        values, crow, col, bias = found.state
        with torch.no_grad():
            if assign:
                self.weight = SparseValues(_as_memory(values), self.weight.requires_grad)
                self._set_pattern(_as_memory(crow), _as_memory(col))
                if bias is not None and self.bias is not None:
                    self.bias = nn.Parameter(_as_memory(bias), self.bias.requires_grad)
                return
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)
            if all(map(torch.equal, (crow, col), self._indices())):
                self.weight.copy_(values)
                self._forget_shown()
            else:
                # copies: what is saved and what is trained must not share memory
                where = self._crow.device
                self._replace(crow.to(where, copy=True), col.to(where, copy=True), values.to(self.weight, copy=True))


def _as_memory(tensor: Tensor) -> Tensor:
    """A tensor of a state as the kernels read it: copied where it has gaps, or is the negative of what is stored."""
    plain = type(tensor) not in (Tensor, nn.Parameter) or (are_plain(tensor) and tensor.is_contiguous())
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)


def refuse_other_patterns(average: nn.Module, model: nn.Module) -> None:
    """Refuse to average the weights of a model with those of another sparsity pattern.

    Raises
    ------
    ValueError
        Naming the layer.
    """
    mine, theirs = ([(name, m) for name, m in root.named_modules() if isinstance(m, SparseWeight)]
                    for root in (average, model))  # fmt: skip
    for (_, a), (name, b) in zip(mine, theirs, strict=False):
        if not a._same_pattern(b):
            raise ValueError(f"{name or type(b).__name__} has another sparsity pattern than its average, whose weights "
                             "belong to other positions: start a new average (AveragedModel) after weights were "
                             "removed or added")  # fmt: skip


before_averaging(refuse_other_patterns)


def refuse_bad_state(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """Check the states of all sparse modules of a model; a pre-hook of its load_state_dict.

    torch collects errors while it loads one module after the other, so that a model is half-loaded when the last one
    turns out to be bad.

    Raises
    ------
    RuntimeError
        Naming all keys that are wrong; nothing has changed then.
    """
    assign = local_metadata.get("assign_to_params_buffers", False)
    of_module: dict[str, dict[str, Any]] = {}  # in one pass: there may be many of both
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise RuntimeError(f"the keys of a state must be strings, got {shown(key)}: nothing was loaded")
        of_module.setdefault(key[: key.rfind(".") + 1], {})[key] = value
    errors = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseWeight):
            own = f"{prefix}{name}." if name else prefix
            errors += read_state(module, of_module.get(own, {}), own, assign).errors
    if errors:
        raise RuntimeError(f"the state does not fit {type(model).__name__}, nothing was loaded:\n\t"
                           + "\n\t".join(errors))


def check_before_loading(model: nn.Module) -> None:
    """Let a model refuse bad states of its sparse modules before anything is loaded."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is refuse_bad_state for hook in hooks):
        model.register_load_state_dict_pre_hook(refuse_bad_state)
