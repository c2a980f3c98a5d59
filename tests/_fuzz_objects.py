"""Arguments that make no sense, and models that are not what they seem to be; each by name, so that a case can be
written down, and made anew for every call."""

from __future__ import annotations

import copy
import enum
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from qsparseprop import nn as qnn
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse


class Raising:
    """Whose every use is an error of its own kind."""

    def __bool__(self) -> bool:
        raise ValueError("no truth in it")

    def __len__(self) -> int:
        raise ValueError("no length")

    def __iter__(self) -> Any:
        raise ValueError("not to be iterated over")

    def __eq__(self, other: object) -> bool:
        raise ValueError("not to be compared")

    __hash__ = None  # type: ignore[assignment]


class Index:
    """A whole number to whoever asks for one."""

    def __index__(self) -> int:
        return 1 << 70


class Text(str):
    """A string by another name."""


class Number(enum.IntEnum):
    """A whole number by another name."""

    FOUR = 4


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("called")


def _endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


VALUES: dict[str, Callable[[], Any]] = {
    **{repr(v): (lambda v=v: v) for v in (
        None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 63, -(1 << 63), 10**40, 0.0,
        0.5, 0.9, 1.0, 1.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), 1j, "", ".", "0", "4",
        "weight", "absmax", "standard", "layer", "top1", "minmax", "0.weight", "\ud800", "\0", b"bytes", (), (1,), (0,),
        (2, 12), (2, 3, 6, 6), (0, 12), (-1, 3), (2, 3, 0, 6), (2, 3, 1, 1), (1 << 40, 1 << 40), (2, (3,)), (2.5, 3),
        (True, False), (3.0, 4.0), (None, None), frozenset({"4"}), range(3), slice(2), ..., Ellipsis)},
    "list": list, "dict": dict, "set": set, "names": lambda: ["0", "4"], "other names": lambda: ["x"],
    "numbers": lambda: [2, 3, 6, 6], "nested": lambda: [[[2]]], "mapping": lambda: {"x": 1}, "keys": lambda: {3: "x"},
    "ordered": OrderedDict, "endless": _endless, "object": object, "raising": Raising, "class": lambda: Raising,
    "function": lambda: (lambda *args, **kwargs: None), "raises": lambda: _raises, "index": Index,
    "text": lambda: Text("absmax"), "number": lambda: Number.FOUR, "decimal": lambda: Decimal("0.5"),
    "fraction": lambda: Fraction(1, 2), "path": lambda: Path("/nowhere/at/all"), "folder": lambda: Path("/"),
    "iterator": lambda: iter([1, 2]), "generator": lambda: (i for i in (1, 2)), "module": lambda: np,
    "error": lambda: ValueError("x"), "torch.float32": lambda: torch.float32, "torch.int8": lambda: torch.int8,
    "torch.bfloat16": lambda: torch.bfloat16, "channels_last": lambda: torch.channels_last,
    "layout": lambda: torch.sparse_csr, "meta device": lambda: torch.device("meta"), "float32 of numpy":
    lambda: np.float32(0.5), "int64 of numpy": lambda: np.int64(3), "bool of numpy": lambda: np.bool_(True),
    "array": lambda: np.ones((2, 12), np.float32), "strings": lambda: np.array(["a"]), "objects":
    lambda: np.array([None, 1], object), "size": lambda: torch.Size([2, 12]), "rng": torch.Generator,
    "scalar": lambda: torch.tensor(0.5), "whole": lambda: torch.tensor(3), "empty": lambda: torch.empty(0), "matrix":
    lambda: _tensor(2, 12), "images": lambda: _tensor(2, 3, 6, 6), "integers": lambda: torch.arange(24).view(2, 12),
    "bools": lambda: torch.ones(30, 12, dtype=torch.bool), "mask": lambda: (_tensor(30, 128) > 0), "complex":
    lambda: torch.zeros(2, 12, dtype=torch.complex64), "half": lambda: _tensor(2, 12).half(), "doubles":
    lambda: _tensor(2, 12).double(), "nan tensor": lambda: _tensor(2, 12) * float("nan"), "inf tensor":
    lambda: torch.full((2, 12), float("inf")), "meta tensor": lambda: torch.empty(2, 12, device="meta"), "huge":
    lambda: torch.zeros(1).expand(10**6, 10**6), "sparse": lambda: _tensor(2, 12).to_sparse(), "csr":
    lambda: _tensor(2, 12).to_sparse_csr(), "gradient": lambda: _tensor(2, 12).requires_grad_(), "parameter":
    lambda: nn.Parameter(_tensor(2, 12)), "freed": lambda: _freed(_tensor(2, 12)), "config": QuantConfig, "ancestor":
    QuantConfig.ancestor, "linear": lambda: nn.Linear(12, 9), "linear type": lambda: nn.Linear, "optimizer":
    lambda: torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1), "lbfgs": lambda: torch.optim.LBFGS([nn.Parameter(
        torch.zeros(2))]), "state": lambda: nn.Linear(12, 9).state_dict(),
}  # fmt: skip


def _freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


# ---- models; all take (2, 3, 6, 6) unless it is their fault that they do not ----


def dense(seed: int = 0) -> nn.Sequential:
    """Convolutions, a batch normalisation and linear layers, two thirds of whose weights are zeros."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 30), nn.ReLU(),
                          nn.Linear(30, 4, bias=False))  # fmt: skip
    for index in (0, 4, 6):
        weight = model[index].weight
        weight.data *= torch.rand(weight.shape) < 0.3
    return model


def sparse(seed: int = 0, **settings: Any) -> nn.Module:
    """The same with sparse layers."""
    return swap_modules_with_sparse(dense(seed), None, include_dense=False, verbose=False, min_sparsity=0, **settings)


def _changed(change: Callable[[nn.Sequential], Any], make: Callable[[], Any] = dense) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        other = change(model)
        return other if isinstance(other, nn.Module) else model

    return made


def _cut(model: nn.Module, name: str, value: Any) -> None:
    model._parameters[name] = value


def _cycle(model: nn.Sequential) -> None:
    vars(model[3])["owner"] = model  # not as a child, which torch itself does not survive


def _share_weight(model: nn.Sequential) -> nn.Module:
    other = nn.Linear(30, 4, bias=False)
    other.weight = model[6].weight
    model[6] = nn.Sequential(nn.Identity(), other)
    model.extra = other
    return model


def _infer(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[4].weight = nn.Parameter(model[4].weight.clone())


def _poisoned(value: float) -> Callable[[nn.Sequential], None]:
    def change(model: nn.Sequential) -> None:
        with torch.no_grad():
            model[4].weight.view(-1)[7] = value

    return change


class Held(nn.Module):
    """A model that also keeps its layers in a list, and a method of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()
        self.kept = [self.inner[4]]
        self.method = self.inner[6].forward

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Odd(nn.Module):
    """A model that fails, in one way or the other, when it runs."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way, self.calls = dense(), way, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.way == "raises":
            raise ValueError("not today")
        if self.way == "once" and self.calls > 1:
            raise KeyError("once only")
        if self.way == "asserts":
            raise AssertionError
        y = self.inner(x)
        if self.way == "nothing":
            return None
        if self.way == "text":
            return "text"
        if self.way == "nan":
            return y * float("nan")
        self.grown = nn.Linear(4, 4)
        return self.grown(y)

    def __deepcopy__(self, memo: Any) -> Odd:
        if self.way == "asserts":
            raise TypeError("not to be copied")
        made = Odd(self.way)
        made.inner = copy.deepcopy(self.inner, memo)
        made.calls = self.calls
        return made


def _quantised_weight(model: nn.Sequential) -> None:
    del model[4]._parameters["weight"]
    model[4].weight = torch.zeros(30, 128)  # type: ignore[assignment]


MODELS: dict[str, Callable[[], Any]] = {
    "dense": dense, "sparse": sparse, "float sparse": lambda: sparse(quantize=False),
    "simulated": lambda: sparse(prototype=True), "fused": lambda: fuse_modules(sparse()),
    "eval": _changed(lambda m: m.eval()), "bfloat16": _changed(lambda m: m.bfloat16()),
    "double": _changed(lambda m: m.double()), "half": _changed(lambda m: m.half()),
    "complex": _changed(lambda m: m.to(torch.complex64)), "meta": _changed(lambda m: m.to("meta")),
    "channels last": _changed(lambda m: m.to(memory_format=torch.channels_last)),
    "frozen": _changed(lambda m: m.requires_grad_(False)), "nan": _changed(_poisoned(float("nan"))),
    "inf": _changed(_poisoned(float("inf"))), "large": _changed(_poisoned(3e38)),
    "sparse nan": _changed(lambda m: [m[4].weight.data.fill_(float("nan"))], sparse),
    "no weight": _changed(lambda m: _cut(m[4], "weight", None)),
    "weight that is a tensor": _changed(_quantised_weight),
    "weight of another shape": _changed(lambda m: _cut(m[4], "weight", nn.Parameter(torch.ones(3, 4)))),
    "scalar weight": _changed(lambda m: _cut(m[4], "weight", nn.Parameter(torch.tensor(1.0)))),
    "expanded weight": _changed(lambda m: _cut(m[4], "weight", nn.Parameter(torch.ones(1).expand(30, 128)))),
    "freed weight": _changed(lambda m: [m[4].weight.untyped_storage().resize_(0)]),
    "freed bias": _changed(lambda m: [m[4].bias.untyped_storage().resize_(0)], sparse),
    "int8 weight": _changed(lambda m: _cut(m[4], "weight", nn.Parameter(torch.ones(30, 128, dtype=torch.int8), False))),
    "sparse tensor": _changed(lambda m: _cut(m[4], "weight", nn.Parameter(m[4].weight.detach().to_sparse()))),
    "bias of another size": _changed(lambda m: _cut(m[4], "bias", nn.Parameter(torch.ones(7)))),
    "inference tensors": _changed(_infer), "cycle": _changed(_cycle), "shared weight": _changed(_share_weight),
    "module twice": _changed(lambda m: nn.Sequential(*m, m[2], nn.Identity())), "held": Held,
    **{f"odd: {way}": (lambda way=way: Odd(way))
       for way in ("raises", "once", "asserts", "nothing", "text", "nan", "grows")},
    "pruned": _changed(lambda m: [prune.l1_unstructured(m[4], "weight", 0.5)]),
    "pruned bias": _changed(lambda m: [prune.l1_unstructured(m[4], "bias", 0.5)]),
    "mask of another shape": _changed(lambda m: m[4].register_buffer("weight_mask", torch.ones(3))),
    "mask without its weight": _changed(lambda m: m[4].register_buffer("weight_mask", torch.ones(30, 128))),
    "mask of nan": _changed(lambda m: [prune.custom_from_mask(m[4], "weight", torch.full((30, 128), torch.nan))]),
    "spectral norm": _changed(lambda m: [parametrizations.spectral_norm(m[4])]),
    "weight norm": _changed(lambda m: [parametrizations.weight_norm(m[4])]),
    "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "nothing": nn.Sequential,
    "no features": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 0), nn.Linear(0, 4)),
    "reflecting": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    "attention": lambda: nn.MultiheadAttention(12, 3), "embedding": lambda: nn.Embedding(10, 4),
    "lstm": lambda: nn.LSTM(12, 4), "parallel": lambda: nn.DataParallel(dense()),
    "jit": lambda: torch.jit.script(dense()), "compiled": lambda: torch.compile(dense(), backend="eager"),
    "layer": lambda: nn.Linear(12, 9), "sparse layer": lambda: qnn.SparseLinear.from_dense(nn.Linear(12, 9)),
    "empty layer": lambda: qnn.QuantizedSparseLinear(12, 9), "list": lambda: nn.ModuleList([nn.Linear(12, 9)]),
    "relu": nn.ReLU, "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)),
    "no children": lambda: nn.Module(), "uncalled": lambda: nn.Module.__new__(nn.Linear),
}  # fmt: skip
