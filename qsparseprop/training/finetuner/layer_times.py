"""How long each module of a model takes, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["LayerTime", "LayerTimer", "layer_table"]


@dataclass
class LayerTime:
    """Time of one module, without that of the modules inside of it.

    Attributes
    ----------
    name, kind : str
        Qualified name in the model and type.
    calls : int
        Forward passes that were timed.
    forward_ms, backward_ms : float
        Mean of a call, in milliseconds.
    """

    name: str
    kind: str
    calls: int = 0
    forward_ms: float = 0.0
    backward_ms: float = 0.0


def layer_table(times: Sequence[LayerTime], rows: int | None = None) -> str:
    """Return a table of times, the slowest first: all of them, or so many rows."""
    ordered = sorted(times, key=lambda t: -(t.forward_ms + t.backward_ms) * t.calls)
    lines = [f"{'module':<32} {'type':<24} {'calls':>6} {'forward ms':>11} {'backward ms':>12}"]
    for t in ordered[:rows]:
        name = t.name or "(model)"
        lines.append(f"{name:<32} {t.kind:<24} {t.calls:>6} {t.forward_ms:>11.3f} {t.backward_ms:>12.3f}")
    return "\n".join(lines)


class _Record:
    __slots__ = ("backward", "calls", "forward")

    def __init__(self) -> None:
        self.calls, self.forward, self.backward = 0, 0.0, 0.0


class LayerTimer:
    """Context manager: times every module of a model in the forward and backward passes that run inside.

    The nodes of autograd's graph are timed one by one and booked on the innermost module in whose forward pass they
    were made. Nothing is put between modules, so operations in place stay allowed (full backward hooks forbid them).

    Parameters
    ----------
    model : nn.Module
        On the CPU. Modules inside of ``torch.compile``, or run again by activation checkpointing, are not seen.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> with LayerTimer(model) as timer:
    ...     model(torch.ones(2, 8)).sum().backward()
    >>> [t.name for t in timer.times()]
    ['', '0', '1']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._records = {name: _Record() for name in self._modules}
        self._handles: list[Any] = []
        # Modules whose forward pass runs: name, start, time of the modules inside, nodes that the inputs come from.
        self._stack: list[list[Any]] = []
        # Nodes stay referenced: they have one Python object only as long as somebody holds it. Those of parameters are
        # the same ones in every pass; the others are let go when the next pass begins.
        self._booked: set[Any] = set()
        self._leaves: set[Any] = set()
        self._node_start = 0.0
        # Spent in the hooks themselves, on the clock that modules are timed with.
        self._own = 0.0

    def __enter__(self) -> LayerTimer:
        for name, module in self._modules.items():
            # The outermost of the hooks: what others do counts as the module's.
            before = module.register_forward_pre_hook(self._before(name), prepend=True, with_kwargs=True)
            self._handles += [before, module.register_forward_hook(self._after(name), always_call=True)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._booked.clear()
        self._leaves.clear()

    def times(self) -> list[LayerTime]:
        """Return the modules that were called, in the order of `named_modules`."""
        return [
            LayerTime(name, type(self._modules[name]).__name__, r.calls, 1e3 * r.forward / r.calls,
                      1e3 * r.backward / r.calls)
            for name, r in self._records.items() if r.calls
        ]  # fmt: skip

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered = time.perf_counter()
            # Now, not afterwards: an operation in place gives its input a new node.
            sources = {t.grad_fn for t in _tensors((args, kwargs)) if t.grad_fn is not None}
            if not self._stack:
                self._booked.clear()
            now = time.perf_counter()
            self._own += now - entered
            self._stack.append([name, now - self._own, 0.0, sources])

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            entered = time.perf_counter()
            # A pass that an exception has ended may have left others on the stack.
            while self._stack and self._stack[-1][0] != name:
                self._stack.pop()
            if not self._stack:
                return
            _, start, inside, sources = self._stack.pop()
            total = entered - self._own - start
            record = self._records[name]
            record.calls += 1
            record.forward += total - inside
            if self._stack:
                self._stack[-1][2] += total
            for tensor in _tensors(output):
                self._book(tensor.grad_fn, sources, record)
            self._own += time.perf_counter() - entered

        return hook

    def _book(self, node: Any, sources: set[Any], record: _Record) -> None:
        """Time all nodes between a module's output and its inputs that no module inside of it has taken."""
        queue, seen = [node], set()
        while queue:
            node = queue.pop()
            if node is None or node in sources or node in seen:
                continue
            seen.add(node)
            booked = self._booked if node.next_functions else self._leaves
            if node not in booked:
                booked.add(node)

                def before(grads: Any) -> None:
                    self._node_start = time.perf_counter()

                def after(grad_inputs: Any, grad_outputs: Any) -> None:
                    record.backward += time.perf_counter() - self._node_start

                node.register_prehook(before)
                node.register_hook(after)
            queue += [source for source, _ in node.next_functions]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
