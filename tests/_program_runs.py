"""Runs the programs of `_programs`: without blocks, with blocks of deferred tensors, and with these one by one."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from qsparseprop.nn.deferred import one_by_one
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.saved_tensors import compress_saved_tensors

CALLS = 3


class Failure(Exception):
    """What a program raises itself."""


class Double(Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Saving(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Ignoring(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ones(x.shape, dtype=x.dtype)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Same(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Viewing(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Dirty(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Recursive(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.bn = pruned(nn.Conv2d(c, c, 3, padding=1)), norm(nn.BatchNorm2d(c))

    def forward(self, x, depth):
        y = F.relu(self.bn(self.conv(x)))
        return y + self.forward(y, depth - 1) if depth else y


def pruned(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        gone = torch.rand(layer.weight.shape) < 0.65
        # a channel without weights is constant, and its sign behind a normalisation a matter of rounding
        gone.view(len(gone), -1)[:, 0] = False
        if gone.float().mean() < 0.35:  # too few for a sparse layer
            gone.view(len(gone), -1)[:, 1::2] = True
        layer.weight[gone] = 0
    return layer


def norm(layer: nn.Module) -> nn.Module:
    if layer.weight is not None:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


def norm_of(t: Tensor) -> float:
    return t.double().norm().item()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those that mean anything."""
    return tuple(s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)


class Log:
    """What a program sees, in the order in which it does."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any, Tensor | None]] = []
        self.call = 0
        self.features: list[Tensor] = []
        self._retained: list[tuple[str, Tensor]] = []
        self._x: Tensor | None = None
        self.message, self.size = "", 0.0  # of the error, and of the gradients of outputs

    # ---- what is written down ----

    def mark(self, name: str) -> None:
        self.entries.append((name, None, None))

    def look(self, name: str, x: Tensor) -> None:
        """All but the values."""
        self.entries.append((name, (x.shape, _strides(x), x.dtype, self._has_gradient(x), x.is_inference(),
                                    x.is_contiguous(), x.device, x.layout), None))  # fmt: skip

    def see(self, name: str, *tensors: Tensor | None) -> None:
        for x in tensors:
            if x is None:
                self.mark(name)
                continue
            self.look(name, x)
            self._values(name, x)

    def _values(self, name: str, x: Tensor | None) -> None:
        if x is None:
            self.entries.append((name, "None", None))
            return
        with torch.inference_mode(False), torch.no_grad():
            strides = None
            if name.startswith("gradient of ") or "gradient" not in name:
                strides = _strides(x)
            self.entries.append((name, (x.shape, x.dtype, strides), x.detach().clone()))

    def _has_gradient(self, x: Tensor) -> bool:
        """Views that inference mode makes of tensors with a history have none, but still want a gradient."""
        return x.grad_fn is not None or (x.requires_grad and (x is self._x or isinstance(x, nn.Parameter)))

    def text(self, x: Tensor) -> None:
        """What a debugger would show."""
        self.mark("text" if "e" in repr(x) and str(x) and len(x) >= 0 else "no text")

    @property
    def error_type(self) -> str | None:
        return next((what for name, what, _ in self.entries if name == "error"), None)

    def error(self, error: Exception) -> None:
        self.entries.append(("error", type(error).__name__, None))
        self.message = str(error)

    # ---- what a program calls ----

    def input(self, shape, dtype=torch.float32, requires_grad=False, channels_last=False) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(self.call)).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self._x = x.requires_grad_(requires_grad)
        self.features, self._retained = [], []
        return x

    def loss(self, ys: list[Tensor]) -> Tensor:
        total = torch.zeros((), requires_grad=True)
        for i, y in enumerate(ys):
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(i))
            self.size = max(self.size, norm_of(weights))
            total = total + (y.float() * weights).sum()
        return total

    def grad(self, loss: Tensor, inputs: list[Tensor]) -> None:
        inputs = [x for x in inputs if self._has_gradient(x)]
        if inputs:
            for g in torch.autograd.grad(loss, inputs, allow_unused=True):
                self._values("gradient", g)

    def second(self, ys: list[Tensor], x: Tensor) -> None:
        """A derivative of a derivative, which sparse layers refuse."""
        if x.requires_grad:
            (g,) = torch.autograd.grad(self.loss(ys), [x], create_graph=True, allow_unused=True)
            if g is not None and g.requires_grad:
                self._values("gradient", g)
                (g * g).sum().backward()

    def numpy(self, x: Tensor) -> Any:
        return x.detach().float().numpy()

    def hook(self, name: str, x: Tensor, factor: float | None = None) -> None:
        if self._has_gradient(x):
            x.register_hook(lambda g: self._saw(name, g, factor))

    def _saw(self, name: str, g: Tensor, factor: float | None) -> Tensor | None:
        self._values("gradient " + name, g)
        return None if factor is None else g * factor

    def retain(self, name: str, x: Tensor) -> None:
        if x.grad_fn is not None:
            x.retain_grad()
            self._retained.append((name, x))

    def hook_that(self, does: str, name: str) -> Hook:
        return Hook(self, does, name)

    def one_after_the_other(self, modules: nn.Sequential, x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
            self.look("part", x)
        return x

    @contextlib.contextmanager
    def packing(self):
        """Notes how much is saved, and changes nothing."""
        with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            yield

    def gradients(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self._values("gradient of " + name, parameter.grad)
        self._values("gradient of x", self._x.grad)
        for name, x in self._retained:
            self._values("gradient retained " + name, x.grad)

    def buffers(self, model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if "indices" not in name:
                self._values(name, buffer)


class Hook:
    """A hook of any kind; copies of the module share the log."""

    def __init__(self, log: Log, does: str, name: str) -> None:
        self.log, self.does, self.name = log, does, name

    def __deepcopy__(self, memo):
        return self

    def __call__(self, module, args, output=None):
        seen = args if output is None else output
        for x in seen if isinstance(seen, tuple) else (seen,):
            if not isinstance(x, Tensor):
                continue
            if self.does == "reads":
                self.log._values("hook " + self.name, x)
            else:
                self.log.mark("hook " + self.name)
        if self.does == "doubles" and isinstance(seen, Tensor):
            return seen * 2
        if self.does == "doubles" and output is None and len(seen) == 1 and isinstance(seen[0], Tensor):
            return (seen[0] * 2,)
        return None


def _namespace() -> dict[str, Any]:
    return {"torch": torch, "nn": nn, "F": F, "copy": copy, "io": io, "checkpoint": checkpoint,
            "checkpoint_sequential": checkpoint_sequential, "save_on_cpu": save_on_cpu, "one_by_one": one_by_one,
            "compress_saved_tensors": compress_saved_tensors, "pruned": pruned, "norm": norm, "Recursive": Recursive,
            "Failure": Failure, "Double": Double, "Saving": Saving, "Ignoring": Ignoring, "Same": Same,
            "Viewing": Viewing, "Dirty": Dirty}  # fmt: skip


class _CodedNorm(Function):
    """Batch normalisation that keeps 8 bits of its input for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, training, momentum, eps):
        ctx.save_for_backward(x, weight, bias)
        ctx.statistics = None if training else (mean.clone(), var.clone())
        ctx.eps = eps
        return _batch_norm(x, mean, var, weight, bias, training, momentum, eps)

    @staticmethod
    def backward(ctx, dy):
        x, *parameters = ctx.saved_tensors
        dims = [d for d in range(x.ndim) if d != 1]
        least = x.amin(dims, keepdim=True)
        step = ((x.amax(dims, keepdim=True) - least) / 255).clamp_min(1e-30)
        rounded = ((x - least) / step).round() * step + least
        with torch.enable_grad():
            copies = [None if t is None else t.detach().requires_grad_() for t in (rounded, *parameters)]
            statistics = ctx.statistics or (None, None)
            y = _batch_norm(copies[0], *statistics, *copies[1:], ctx.statistics is None, 0.0, ctx.eps)
        found = iter(torch.autograd.grad(y, [t for t in copies if t is not None], dy))
        return *(None if t is None else next(found) for t in copies), None, None, None, None, None


_batch_norm = F.batch_norm


def _coded_batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not torch.is_grad_enabled() or not x.numel():
        return _batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return _CodedNorm.apply(x, weight, bias, mean, var, training, momentum, eps)


class Runner:
    """Runs a program in one way and another, from copies of the same model."""

    def __init__(self, source: str) -> None:
        self._names = _namespace()
        exec(compile(source, "<program>", "exec"), self._names)
        self._log = Log()
        self._models: dict[bool, nn.Module] = {}

    def _model(self, quantize: bool) -> nn.Module:
        if quantize not in self._models:
            _seed(0)
            options = {"grad": "absmax", **getattr(self._names["Model"], "options", {})}
            self._models[quantize] = swap_modules_with_sparse(
                self._names["Model"](self._log), None, verbose=False, quantize=quantize, min_sparsity=0.3,
                include_dense=False, qconfig=QuantConfig(**options) if quantize else None,
            )  # fmt: skip
        return copy.deepcopy(self._models[quantize])

    def run(self, fuse: bool, stepwise: bool = False, quantize: bool = True, shaken: float = 0.0) -> list[Log]:
        """What the program saw, a log for each call; with weights changed by such a part of each, if that is wanted."""
        model, log, logs = self._model(quantize), self._log, []
        if shaken:
            _seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + shaken * torch.randn(parameter.shape))
        if fuse:
            fuse_modules(model)
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            if stepwise:
                stack.enter_context(one_by_one())
            if not quantize:
                stack.enter_context(mock.patch.object(F, "batch_norm", _coded_batch_norm))
            warnings.simplefilter("ignore")
            for log.call in range(CALLS):
                log.entries, log.message, log.size = [], "", 0.0
                _seed(log.call)
                try:
                    self._names["step"](model, log)
                except Exception as error:
                    log.error(error)
                    model.zero_grad()
                log.buffers(model)
                done = Log()
                done.entries, done.message, done.size = log.entries, log.message, log.size
                logs.append(done)
        return logs


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds
