"""What the nodes of a graph have in common: the mode they compute in, what they refuse, nodes without gradients."""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()


def without_graph() -> Any:
    """What a backward pass is computed in: it has no graph anyway, except with create_graph=True."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def direct_apply(function: type[torch.autograd.Function]) -> Any:
    """Its `apply` where no transforms of torch.func are active, which the class's own one looks after."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # of a class in C


def records_gradients() -> bool:
    """Whether torch's operators would become nodes of a graph.

    In inference mode they do not, even under enable_grad; an autograd.Function would, and find that it cannot save.
    """
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class NoGradient(torch.autograd.Function):
    """Part of a graph, for DistributedDataParallel, but gets no gradient: for tensors without elements."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """The tensor as it is."""
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        """No gradient."""


class NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, values: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as they are."""
        return tuple(g if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        """Refuse."""
        raise NotImplementedError("sparse modules can be differentiated once only: for second derivatives use the "
                                  "dense module that to_dense() gives")
