"""What the sparse modules share: the values, their pattern, and conversion from and to dense."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from qsparseprop import arguments, ops
from qsparseprop._torch_compat import is_jit_tracing, transforms_active
from qsparseprop.contents import is_convertible
from qsparseprop.layout.geometry import Geometry
from qsparseprop.layout.modes import Modes, checked_modes, forced_modes
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, PlanCache
from qsparseprop.nn._dense import dense_weight
from qsparseprop.nn._interop import refuse_input, refuse_scripting, refuse_tracing
from qsparseprop.nn._pattern import HELD
from qsparseprop.nn._product import ProductCall
from qsparseprop.nn._traced import config_text, traced_product
from qsparseprop.nn._values import SparseValues
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.nn.blocks import deferred_product
from qsparseprop.nn.deferred import DeferredTensor, may_defer
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.usage import Operation, longest
from qsparseprop.nn.functional import sparse_product
from qsparseprop.quantization import QuantConfig

#: What the kernels read and write; other dtypes are converted.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


_Module = TypeVar("_Module", bound="SparseModule")
_Dense = TypeVar("_Dense", bound=nn.Module)


class SparseModule(SparseWeight):
    """A layer with a sparse weight: conversion from dense, quantisation, and the product.

    Attributes
    ----------
    qconfig : QuantConfig or None
        None where the module computes in float32.
    weight, bias, crow_indices, col_indices
        See `SparseWeight`.
    """

    _dense_type: ClassVar[type[nn.Module]]
    quantized: ClassVar[bool] = False
    #: Whether the weight is stored as that of the layer from the output to the input.
    transposed: ClassVar[bool] = False
    #: Whether results can be deferred, and whether they are, see `qsparseprop.nn.deferred`.
    can_defer: ClassVar[bool] = False
    deferring: bool = False
    _qconfig: QuantConfig | None = None
    _qconfig_text: str = config_text(None)

    def _set_up(self, bias: bool, qconfig: QuantConfig | None, device: Any = None, dtype: Any = None) -> None:
        """Start with no weights at all, and a bias of zeros."""
        if self.quantized:
            self.qconfig = QuantConfig() if qconfig is None else qconfig
        elif qconfig is not None:
            raise TypeError(f"{type(self).__name__} computes in float32 and takes no qconfig")
        for size in self.weight_shape:
            arguments.whole_number(size, f"each size of the weight of {type(self).__name__}", 0, (1 << 31) - 1)
        rows = self.weight_shape[0]
        self.weight = SparseValues(torch.empty(0, device=device, dtype=dtype))
        self._set_pattern(torch.zeros(rows + 1, dtype=torch.int32, device=device),
                          torch.empty(0, dtype=torch.int32, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(self._outputs, device=device, dtype=dtype)) if bias else None
        )

    def _fill(
        self: _Module, weight: Tensor, mask: Tensor, bias: tuple[Tensor, bool] | None, requires_grad: bool
    ) -> _Module:
        """Take over a dense weight where the mask is set."""
        crow, col, flat = dense_pattern(mask.reshape(self._matrix_shape()))
        self.weight = SparseValues(weight.reshape(-1)[flat].clone(), requires_grad)
        self._set_pattern(crow, col)
        if bias is not None:
            self.bias = nn.Parameter(bias[0].clone(), bias[1])
        return self

    @property
    def qconfig(self) -> QuantConfig | None:
        """How the module quantises; None where it computes in float32."""
        return self._qconfig

    @qconfig.setter
    def qconfig(self, qconfig: QuantConfig | None) -> None:
        if not isinstance(qconfig, QuantConfig if self.quantized else type(None)):
            wanted = "a QuantConfig" if self.quantized else "None: the module computes in float32"
            raise TypeError(f"qconfig must be {wanted}, got {type(qconfig).__name__}")
        # torch.compile can read a string, but not turn a QuantConfig into one
        self._qconfig, self._qconfig_text = qconfig, config_text(qconfig)

    @qconfig.deleter
    def qconfig(self) -> None:
        # torch.ao.quantization gives every module one, and takes it away again
        self.qconfig = None

    @classmethod
    def from_dense(cls: type[_Module], dense: Any, *, qconfig: QuantConfig | None = None) -> _Module:
        """Take over the nonzeros of a dense layer, of the kind that the class is for."""
        raise NotImplementedError

    @classmethod
    def like(cls: type[_Module], dense: nn.Module, qconfig: QuantConfig | None = None) -> _Module:
        """A module without weights, with the settings of a dense one."""
        raise NotImplementedError

    @classmethod
    def _check_kind(cls, module: nn.Module) -> None:
        if isinstance(module, nn.Module):
            arguments.model(module, "the dense layer")
        if not isinstance(module, cls._dense_type):
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.{cls._dense_type.__name__}, "
                            f"got {type(module).__module__}.{type(module).__qualname__}")

    @classmethod
    def _check_dense(cls, module: nn.Module) -> tuple[Tensor, Tensor]:
        cls._check_kind(module)
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            ops.check_storage(tensor, f"{name} of the dense layer")
        weight, mask = dense_weight(module)
        if weight.device.type != "cpu":
            raise ValueError(f"the weight must be on the CPU, got device {weight.device}")
        if not is_convertible(weight.dtype) or weight.element_size() < 2:  # of single bytes torch computes nothing
            raise TypeError(f"the weight must be floating point, of 16 bits or more, got {weight.dtype}")
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight has {int((~torch.isfinite(weight)).sum())} NaN or Inf of "
                             f"{weight.numel()} values; all must be finite")
        return weight, mask

    def to_dense(self) -> nn.Module:
        """A dense layer with the same weight and bias."""
        raise NotImplementedError

    def _fill_dense(self, make: Callable[..., _Dense]) -> _Dense:
        """Give a dense layer, which `make` makes, the weight and bias."""
        # on "meta": a dense layer that initialises itself would draw random numbers
        dense = make(device="meta", dtype=self.weight.dtype).to_empty(device="cpu")
        with torch.no_grad():
            weight = dense.get_parameter("weight")
            weight.copy_(self.dense_weight())
            weight.requires_grad_(self.weight.requires_grad)
            if self.bias is not None:
                ops.check_storage(self.bias, "bias")
                bias = dense.get_parameter("bias")
                bias.copy_(self.bias)
                bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    # ---- plans: what depends on the pattern and the input's size only ----

    def _plan(self, geometry: Geometry, groups: int) -> Plan:
        """The plan for a geometry; sizes are checked by those who read the values."""
        self._check_stamp()
        if self._shown:
            self._refuse_written()
        cache = self.__dict__.get("_plans")
        if cache is None:
            cache = self.__dict__["_plans"] = PlanCache()
        pattern = self._pattern
        crow, col = (self._crow, self._columns) if pattern is None else pattern.held
        plan = cache.find(crow, col, geometry, groups)
        if plan is not None:
            return plan
        return cache.get(crow, col, self._matrix_shape(), geometry, groups, self._wanted_modes(), pattern)

    def last_plan(self) -> Plan | None:
        """The plan that was made last: of the latest size of input that was new."""
        cache = self.__dict__.get("_plans")
        return None if cache is None else cache.last()

    @property
    def product_modes(self) -> Modes | None:
        """How products on codes walk the weight: "list" or "dense" for each, in the plan that was made last.

        They give the same bits; None where there was no input yet, and of inputs that torch.compile traces. Set them to
        choose, or to None to let plans choose by what the machine costs (`qsparseprop.layout.modes.choose_modes`); rows
        that are too long for dense rows are lists in any case.

        Raises
        ------
        ValueError
            When set, if these are not three, each "list" or "dense".
        """
        plan = self.last_plan()
        return self.__dict__.get("_modes") if plan is None else plan.modes

    @product_modes.setter
    def product_modes(self, modes: Modes | None) -> None:
        self.__dict__["_modes"] = None if modes is None else checked_modes(modes)
        self._forget_tried_modes()

    def suggest_modes(self, modes: Modes) -> None:
        """Take modes that were faster when tried, with as many nonzeros; copies and other machines choose anew."""
        self._forget_tried_modes()
        self.__dict__["_tried"] = (self.nonzeros, modes)

    def _forget_tried_modes(self) -> None:
        for name in ("_plans", "_tried"):
            self.__dict__.pop(name, None)

    def _wanted_modes(self) -> Modes | None:
        """Those of the user, or that were tried with as many nonzeros, where nothing else is forced."""
        modes: Modes | None = self.__dict__.get("_modes")
        nonzeros, tried = self.__dict__.get("_tried", (None, None))
        if modes is None and nonzeros == self.nonzeros and forced_modes() is None:
            return tried
        return modes

    def __getstate__(self) -> dict[str, Any]:
        # plans are made anew: they may be larger than the weights; references to copies cannot be pickled
        left = ("_plans", "_tried", "_copies", "_usages", *HELD)
        return {**{k: v for k, v in self.__dict__.items() if k not in left}, **self._stored_pattern()}

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_scripting(self)

    def _check_input(self, x: Tensor) -> None:
        if self._is_usual(x):
            return
        kind = type(self).__name__
        if not isinstance(x, Tensor):
            refuse_input(self, x)
        refuse_tracing(self)
        weight = self.weight
        with torch._C.DisableTorchFunctionSubclass():  # a look at an attribute takes longer with it
            on_cpu = weight.is_cpu
        if not (x.is_cpu and on_cpu):
            raise ValueError(f"{kind} computes on the CPU, got an input on device {x.device} and weights on device "
                             f"{weight.device}")
        if not x.is_floating_point():
            raise TypeError(f"{kind} expects a floating-point input (float32, bfloat16, ...), got {x.dtype}")
        if x.is_nested:
            raise TypeError(f"{kind} expects a strided tensor, got a nested one")
        if x.layout != torch.strided:
            raise TypeError(f"{kind} expects a strided tensor, got layout {x.layout}")
        if torch.compiler.is_compiling():
            return
        if transforms_active():
            raise NotImplementedError(f"{kind} does not go with the transforms of torch.func (vmap, grad, jvp, ...): "
                                      "use autograd, or the dense module that to_dense() gives")
        ops.check_storage(x, "the input")  # before anything reads it

    def _is_usual(self, x: Tensor) -> bool:
        """Whether nothing is to be said against an input, found out by a few quick questions."""
        # tracing first: then questions may be answered by tensors
        if torch.compiler.is_compiling() or is_jit_tracing() or type(x) is not Tensor:
            return False
        return x.dtype in KERNEL_DTYPES and ops.are_plain(x) and not transforms_active()

    def _dtypes(self, x: Tensor) -> tuple[Tensor, torch.dtype, torch.dtype]:
        """The input in a dtype of the kernels, that of their output, and the dtype of the result.

        The latter is the one that torch gives to such a layer: x's, or autocast's, which leaves float64 alone.
        """
        dtype = x.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if x.dtype not in KERNEL_DTYPES:
            x = x.to(torch.float32)
        return x, dtype if dtype in KERNEL_DTYPES else torch.float32, dtype

    def _defer(
        self, x: Tensor, images: tuple[int, ...], layout: Callable[[bool], Layout], geometry: Geometry, groups: int
    ) -> Tensor | None:
        """A deferred product, see `deferred_product`; None where there can be none."""
        dtype = x.dtype
        if dtype not in KERNEL_DTYPES or 0 in images or 0 in self.weight_shape:
            return None
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            if dtype not in KERNEL_DTYPES:
                return None
        return deferred_product(self, x, images, layout, geometry, groups, dtype)

    def last_chain(self) -> list[Operation]:
        """What was computed together with the layer when it last ran."""
        return longest(usage.chain() for usage in self.__dict__.get("_usages", {}).values())

    def took_packed(self) -> bool:
        """Whether its input came packed out of the chain before it when it last ran."""
        return any(usage.fed for usage in self.__dict__.get("_usages", {}).values())

    def _defers(self, x: Tensor) -> bool:
        """Whether the result for an input may be deferred; checks it then."""
        if not (self.deferring and self.can_defer and may_defer()):
            return False
        if type(x) is DeferredTensor:
            return True
        if type(x) not in (Tensor, nn.Parameter):
            return False
        self._check_input(x)
        return True

    def _product(self, x: Tensor, geometry: Geometry, groups: int, shape: Sequence[int] | None = None) -> Tensor:
        """The product for an input of four dimensions, or of two, see `sparse_product`."""
        weight, values, bias = self._operands()
        if not values.is_cpu:
            raise ValueError(f"{type(self).__name__} computes on the CPU, got an input on device {x.device} and "
                             f"weights on device {values.device}")
        x, out_dtype, dtype = self._dtypes(x)
        call = ProductCall(values, self._plan(geometry, groups), (self._crow, self._columns), self._qconfig,
                           out_dtype, shape)  # fmt: skip
        y = sparse_product(x, weight, bias, call)
        return y if y.dtype == dtype else y.to(dtype)

    def _trace(self, x: Tensor, numbers: Sequence[int], groups: int) -> Tensor:
        """The product for a 4-D input, as a single operator; see `traced_product`."""
        self._check_sizes()
        x, out_dtype, dtype = self._dtypes(x)
        y = traced_product(x, self.weight, self.bias, self._crow, self._columns, numbers, groups,
                           self._qconfig_text, out_dtype)
        return y if y.dtype == dtype else y.to(dtype)
