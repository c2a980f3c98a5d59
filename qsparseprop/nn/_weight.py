"""A weight of which only the nonzeros exist: values and pattern, how they change, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop.nn._state import FORMAT, check_format, read_state
from qsparseprop.ops import are_plain, check_storage
from qsparseprop.pattern import row_indices


class SparseWeight(nn.Module):
    """A weight of which only the nonzeros exist.

    Attributes
    ----------
    weight : Parameter
        (nonzeros,) values, row by row.
    crow_indices, col_indices : Tensor
        The pattern in CSR, int32 buffers that are part of the state: row pointers (rows + 1,) and columns (nonzeros,)
        of the weight seen as a matrix (rows, everything else).
    bias : Parameter or None
        (rows,).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor

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
        return dense.index_put((self._flat_indices(),), self.weight).view(self.weight_shape)

    def _matrix_shape(self) -> tuple[int, int]:
        """Rows, and everything else."""
        shape = self.weight_shape
        return shape[0], math.prod(shape[1:])

    def _flat_indices(self) -> Tensor:
        check_storage(self.crow_indices, "crow_indices")
        check_storage(self.col_indices, "col_indices")
        return row_indices(self.crow_indices) * self._matrix_shape()[1] + self.col_indices

    def _check_sizes(self) -> None:
        weight, bias = self.weight, self.bias  # every access to a parameter is a call of __getattr__
        if weight.shape != self.col_indices.shape:
            raise ValueError(f"weight must have one value for each of the {self.col_indices.numel()} column indices, "
                             f"got shape {tuple(weight.shape)}")
        if bias is not None and bias.shape != (self.weight_shape[0],):
            raise ValueError(f"bias must have shape ({self.weight_shape[0]},), got {tuple(bias.shape)}")

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
        NotImplementedError
            For an optimizer whose state does not belong to single weights (LBFGS).
        """
        self._check_mask(mask, "mask")
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
        ValueError, NotImplementedError
            See `apply_further_mask`.
        """
        self._check_mask(mask, "mask")
        if values is not None:
            self._check_mask(values, "values")
        old = self._flat_indices()
        flat = torch.cat([old, mask.reshape(-1).nonzero().squeeze(1)]).unique()
        self._rearrange(flat, None if values is None else values.detach().reshape(-1)[flat], optimizer)

    def _check_mask(self, mask: Tensor, name: str) -> None:
        if tuple(mask.shape) != tuple(self.weight_shape):
            raise ValueError(f"{name} must have shape {tuple(self.weight_shape)}, got {tuple(mask.shape)}")
        check_storage(mask, name)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What an optimizer keeps for each element of `weight`; an error if it cannot follow a change of the pattern.

        Raises
        ------
        ValueError, NotImplementedError
            See `apply_further_mask`.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise NotImplementedError("LBFGS keeps its state for all parameters together, so that single weights can "
                                      "neither be removed nor added: make a new optimizer instead")
        weight = self.weight
        if weight.requires_grad and not any(weight is p for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer does not train the weight of this module")
        state = optimizer.state.get(weight, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}

    @torch.no_grad()
    def _rearrange(self, flat: Tensor, fresh: Tensor | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Move the weights to the positions `flat` (int64, ascending), which may lack old ones and have new ones."""
        check_storage(self.weight, "weight")
        state = {} if optimizer is None else self.check_optimizer(optimizer)
        old = self._flat_indices()
        place = torch.searchsorted(old, flat)
        known = torch.cat([old, old.new_full((1,), -1)])[place] == flat
        source = place[known]

        def move(tensor: Tensor, fresh: Tensor | None = None) -> Tensor:
            moved = tensor.new_zeros(flat.numel()) if fresh is None else fresh.to(tensor.dtype)
            moved[known] = tensor[source]
            return moved

        rows, columns = self._matrix_shape()
        crow = torch.zeros_like(self.crow_indices)
        crow[1:] = torch.bincount(flat // max(columns, 1), minlength=rows).cumsum(0)
        grad = None if self.weight.grad is None else move(self.weight.grad)
        values = move(self.weight.data, fresh)
        for name, tensor in state.items():
            optimizer.state[self.weight][name] = move(tensor)
        self._replace(crow, (flat % max(columns, 1)).to(torch.int32), values, grad)

    def _replace(self, crow: Tensor, col: Tensor, values: Tensor, grad: Tensor | None = None) -> None:
        """Give the Parameter another number of values."""
        self.weight.grad = None
        # A graph that still exists keeps a node that accumulates gradients of the old size; torch makes a new one only
        # when the dtype changes on the way.
        self.weight.data = values.to(torch.float64 if values.dtype != torch.float64 else torch.float32)
        self.weight.data = values
        self.weight.grad = grad
        self.crow_indices, self.col_indices = crow, col

    # ---- state ----

    def get_extra_state(self) -> Tensor:
        """Format of the state and shape of the dense weight: int64, (1 + dimensions,)."""
        return torch.tensor([FORMAT, *self.weight_shape])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse what `get_extra_state` of another format or another shape has given."""
        if (error := check_format(state, self.weight_shape, "_extra_state")) is not None:
            raise RuntimeError(error)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
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
                self.weight = nn.Parameter(_as_memory(values), self.weight.requires_grad)
                self.crow_indices, self.col_indices = _as_memory(crow), _as_memory(col)
                if bias is not None:
                    self.bias = nn.Parameter(_as_memory(bias), self.bias.requires_grad)
                return
            if bias is not None:
                self.bias.copy_(bias)
            if torch.equal(crow, self.crow_indices) and torch.equal(col, self.col_indices):
                self.weight.copy_(values)
            else:
                # copies: what is saved and what is trained must not share memory
                where = self.crow_indices.device
                self._replace(crow.to(where, copy=True), col.to(where, copy=True), values.to(self.weight, copy=True))


def _as_memory(tensor: Tensor) -> Tensor:
    """A tensor of a state as the kernels read it: copied where it has gaps, or is the negative of what is stored."""
    plain = type(tensor) not in (Tensor, nn.Parameter) or (are_plain(tensor) and tensor.is_contiguous())
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)


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
            raise RuntimeError(f"the keys of a state must be strings, got {key!r}: nothing was loaded")
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
