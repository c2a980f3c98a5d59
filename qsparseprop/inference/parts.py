"""Freezing what cannot be traced as a whole: layer by layer, the largest parts first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qsparseprop._torch_compat import keep_off_fast_path
from qsparseprop.inference.batches import Batch
from qsparseprop.inference.capture import NotCapturable
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.report import FreezeReport, LayerReport
from qsparseprop.inference.steps import Product
from qsparseprop.inference.whole import Options, freeze_module, freeze_rows
from qsparseprop.utils._places import replace_children

__all__ = ["freeze_parts"]



def freeze_parts(model: nn.Module, batches: Sequence[Batch], options: Options, reason: str) -> nn.Module:
    """Freeze parts of a model in place.

    Parameters
    ----------
    model : torch.nn.Module
        From `qsparseprop.inference.capture.float_copy`; runs as it did, with frozen parts.
    batches : sequence of Batch
    options : Options
    reason : str
        Why it is not frozen as a whole.

    Returns
    -------
    torch.nn.Module
        The model, with the report as its attribute ``freeze_report``.
    """
    parts = _Parts(options)
    parts.inside("", model, [*batches, *_single(model, batches[0])])
    report = parts.put_in(model, batches[0])
    report.whole, report.reason = False, reason
    model.freeze_report = report  # type: ignore[assignment]  # torch types only what modules hold themselves
    return model


def _single(model: nn.Module, batch: Batch) -> list[Batch]:
    """The first sample alone, which tells what sizes parts depend on; nothing where the model does not take one."""
    try:
        _run(model, batch.first())
    except Exception:
        # whatever the model's own code says to that
        return []
    return [batch.first()]


class _Parts:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.frozen: dict[str, tuple[nn.Module, FrozenModule]] = {}
        self.left: list[LayerReport] = []
        self.done: set[int] = set()

    def inside(self, name: str, module: nn.Module, batches: Sequence[Batch]) -> None:
        """Freeze what a module calls, from what it is called with."""
        new = dict(_children(name, module))
        while new:
            calls = _record(module, new, batches)
            # what is not called itself may have parts that are
            further: dict[str, nn.Module] = {}
            for path, child in new.items():
                if id(child) in self.done or not any(map(_has_weights, child.modules())):
                    continue
                if not calls[path] and path not in self.options.keep_float and next(child.children(), None) is not None:
                    further.update(_children(path, child))
                    continue
                self.done.add(id(child))
                self.part(path, child, calls[path])
            new = further

    def part(self, path: str, module: nn.Module, batches: Sequence[Batch]) -> None:
        """Freeze a module, or what is inside of it."""
        if path in self.options.keep_float:
            self.leave(path, module, "asked for")
            return
        if not batches:
            self.leave(path, module, "not called as a module")
            return
        try:
            frozen = self.whole(path, module, batches)
        except NotCapturable as error:
            if next(module.children(), None) is None:
                self.leave(path, module, str(error))
            else:
                self.inside(path, module, batches)
            return
        if any(isinstance(step, Product) for step in frozen.program.steps):
            self.frozen[path] = module, frozen
        else:
            self.left.extend(_named(path, layer) for layer in frozen.report)

    def whole(self, path: str, module: nn.Module, batches: Sequence[Batch]) -> FrozenModule:
        options = self.options.below(path)
        try:
            if type(module) is nn.Linear and all(len(b.args) == 1 and not b.kwargs for b in batches):
                return freeze_rows(module, batches, options)
            return freeze_module(module, batches, options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def leave(self, path: str, module: nn.Module, reason: str) -> None:
        """Report the layers of a module as they are."""
        for name, layer in module.named_modules(prefix=path):
            if _has_weights(layer):
                weights = torch.cat([p.detach().flatten() for p in layer.parameters(recurse=False) if p.ndim > 1])
                zeros = float((weights == 0).float().mean())
                self.left.append(LayerReport(name, type(layer).__name__, zeros, False, reason))

    def put_in(self, model: nn.Module, batch: Batch) -> FreezeReport:
        """Put frozen parts in their places, but for those with which the model does not run."""
        report = FreezeReport()
        for path, (module, frozen) in self.frozen.items():
            calls: list[bool] = []
            handle = frozen.register_forward_pre_hook(lambda *_, calls=calls: calls.append(True))
            _replace(model, module, frozen)
            try:
                _run(model, batch)
                handle.remove()
                if calls:
                    _run(model, batch)  # where nobody listens modules may go another way
                why = "" if calls else "its weight is read outside of its own forward pass"
            except Exception as error:
                # of the model's own code, which met a part that has no weights
                why = f"the model does not run with it frozen ({type(error).__name__}: {error})"
            handle.remove()
            if why:
                _replace(model, frozen, module)
                self.leave(path, module, why)
            else:
                report.extend(_named(path, layer) for layer in frozen.report)
        report.extend(self.left)
        return report


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    replace_children(model, {id(old): new})
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            keep_off_fast_path(module, any(isinstance(part, FrozenModule) for part in module.modules()))


def _has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies with weights of its own."""
    return not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False))


def _named(path: str, layer: LayerReport) -> LayerReport:
    name = ".".join(part for part in (path, layer.name) if part)
    return LayerReport(name, layer.kind, layer.zeros, layer.quantised, layer.reason, layer.error)


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a module may call: its children, and those of lists and dicts of modules."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(path, child)
        else:
            yield path, child


def _record(module: nn.Module, children: dict[str, nn.Module], batches: Sequence[Batch]) -> dict[str, list[Batch]]:
    """What a module calls its children with."""
    calls: dict[str, list[Batch]] = {path: [] for path in children}

    def listen(path: str, child: nn.Module) -> Any:
        def heard(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # the module may write to them later
            calls[path].append(Batch(*_copied(args, kwargs)))

        return child.register_forward_pre_hook(heard, with_kwargs=True)

    handles = [listen(path, child) for path, child in children.items()]
    try:
        for batch in batches:
            _run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))


def _run(module: nn.Module, batch: Batch) -> None:
    args, kwargs = _copied(batch.args, batch.kwargs)
    with torch.no_grad():
        module(*args, **kwargs)
