"""Pruning on while a model trains: fewer and fewer weights, along a schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop import arguments
from qsparseprop.contents import check_memory_of
from qsparseprop.nn._dense import held
from qsparseprop.nn._interop import check_owners, check_unsplit, element_state, inner_optimizer
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.utils._prunable import refuse_unknown
from qsparseprop.utils._schedule import cubic_sparsity, progress_in

__all__ = ["GradualPruner"]


class GradualPruner:
    """Prunes a model on while it trains, by magnitude, along `cubic_sparsity`.

    Sparse modules lose weights for good: values, pattern, gradient and what the optimizer keeps for each of them get
    smaller together. Dense layers with a mask of torch.nn.utils.prune get more zeros in it, so that the same schedule
    can be run dense. Other layers are left alone.

    Parameters
    ----------
    model : nn.Module
        Swapped by `swap_modules_with_sparse`, or with masks attached.
    optimizer : torch.optim.Optimizer
        Trains the model. Any one of torch's whose state belongs to single weights, which is all but LBFGS.
    final_sparsity : float
        Fraction of zeros at the end, in [0, 1).
    end_step, begin_step : int
        Calls of `step` at which the last and the first weights go.
    interval : int
        Calls of `step` from one pruning to the next; what was removed takes some steps to make up for.
    initial_sparsity : float, optional
        Fraction of zeros at the beginning; what the model has without it.
    scope : {"global", "layer"}
        One threshold for all layers, or the same sparsity for each layer.
    skip : collection of str
        Names, as ``named_modules`` gives them, of layers to leave as they are.

    Attributes
    ----------
    modules : dict of str to nn.Module
        What is pruned.
    steps : int
        Calls of `step` so far.

    Raises
    ------
    ValueError
        For impossible numbers, names that do not exist, a model without anything to prune, or an optimizer that does
        not train it.
    NotImplementedError
        For LBFGS and ZeroRedundancyOptimizer, and for a model that FSDP or DistributedDataParallel has wrapped; in
        every process alike, here and in `step`, where nothing has changed then.

    Examples
    --------
    >>> pruner = GradualPruner(model, optimizer, 0.95, end_step=1000, interval=50)
    >>> for images, labels in batches:
    ...     loss = criterion(model(images), labels)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     pruner.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        final_sparsity: float,
        *,
        end_step: int,
        begin_step: int = 0,
        interval: int = 1,
        initial_sparsity: float | None = None,
        scope: str = "global",
        skip: Collection[str] = (),
    ) -> None:
        for name, value in (("final_sparsity", final_sparsity), ("initial_sparsity", initial_sparsity)):
            if value is not None or name == "final_sparsity":
                arguments.number(value, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        arguments.model(model)
        check_memory_of(model)
        for name, value in (("begin_step", begin_step), ("end_step", end_step), ("interval", interval)):
            arguments.number(value, name)
        if not 0 <= begin_step < end_step or interval < 1:
            raise ValueError("begin_step must not be negative and come before end_step, and interval must be positive, "
                             f"got {begin_step}, {end_step} and {interval}")
        if not isinstance(scope, str) or scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {arguments.shown(scope)}")
        candidates = {name: m for name, m in model.named_modules()
                      if isinstance(m, SparseWeight) or (prune.is_pruned(m) and hasattr(m, "weight_mask"))}
        refuse_unknown(skip, candidates, "skip names nothing that could be pruned on")
        self.modules = {name: m for name, m in candidates.items() if name not in skip}
        if not self.modules:
            raise ValueError("the model has neither sparse modules nor masks of torch.nn.utils.prune to prune on")
        self._groups = [list(self.modules)] if scope == "global" else [[name] for name in self.modules]
        self._optimizer = optimizer
        self.final_sparsity, self.interval = final_sparsity, interval
        self.begin_step, self.end_step = begin_step, end_step
        self.steps = 0
        self._check_optimizer()
        self._initial = [self._zeros(group) if initial_sparsity is None else initial_sparsity
                         for group in self._groups]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weights of all layers that are pruned."""
        return self._zeros(self.modules)

    def step(self) -> bool:
        """Count an optimizer step, and prune if it is time to.

        To be called after ``optimizer.step()``.

        Returns
        -------
        bool
            Whether this was a step at which weights may go.
        """
        due = (self.begin_step <= self.steps <= self.end_step
               and ((self.steps - self.begin_step) % self.interval == 0 or self.steps == self.end_step))
        if due:
            self._check_optimizer()
            for group, initial in zip(self._groups, self._initial, strict=True):
                self._prune(group, cubic_sparsity(self.steps, initial, self.final_sparsity, self.begin_step,
                                                  self.end_step))
        self.steps += 1
        return due

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is: number of steps and initial sparsities."""
        return {"steps": self.steps, "initial_sparsity": list(self._initial)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a schedule; the model's and the optimizer's own states are loaded for themselves.

        Parameters
        ----------
        state_dict : mapping
            Of `state_dict`.

        Raises
        ------
        ValueError, TypeError, KeyError
            If it is none, or one of another model; nothing has changed then.
        """
        self.steps, self._initial = progress_in(state_dict, len(self._groups))

    def _check_optimizer(self) -> None:
        sparse = [m for m in self.modules.values() if isinstance(m, SparseWeight)]
        check_owners(sparse)
        masked = [m for m in self.modules.values() if not isinstance(m, SparseWeight)]
        check_unsplit(m._parameters.get("weight_orig") for m in masked)
        optimizer = inner_optimizer(self._optimizer)
        for module in sparse:
            element_state(optimizer, module.weight)

    def _zeros(self, names: Collection[str]) -> float:
        modules = [self.modules[name] for name in names]
        total = sum(_weight_size(m) for m in modules)
        return 1 - sum(_existing(m).numel() for m in modules) / total if total else 0.0

    @torch.no_grad()
    def _prune(self, names: Collection[str], sparsity: float) -> None:
        modules = [self.modules[name] for name in names]
        magnitudes = [_existing(m).abs() for m in modules]
        counts = [m.numel() for m in magnitudes]
        surplus = sum(counts) - round((1 - sparsity) * sum(_weight_size(m) for m in modules))
        if surplus <= 0:
            return
        scores = torch.cat([m.to(torch.float32) for m in magnitudes])
        kept = prune.L1Unstructured(surplus).compute_mask(scores, torch.ones_like(scores)).bool()
        for module, part in zip(modules, kept.split(counts), strict=True):
            mask = module.mask() if isinstance(module, SparseWeight) else held(module, "weight_mask") != 0
            mask = mask.contiguous()
            mask.view(-1)[mask.view(-1).nonzero().squeeze(1)[~part]] = False
            if isinstance(module, SparseWeight):
                module._remove(mask, self._optimizer)
            else:
                held(module, "weight_mask").copy_(mask)


def _weight_size(module: nn.Module) -> int:
    return math.prod(module.weight_shape if isinstance(module, SparseWeight) else held(module, "weight_mask").shape)


def _existing(module: nn.Module) -> torch.Tensor:
    """The weights that exist, in the order of their positions."""
    if isinstance(module, SparseWeight):
        return module.weight.detach()
    return held(module, "weight_orig").detach()[held(module, "weight_mask") != 0]
