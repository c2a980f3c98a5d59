"""What the sparse modules share: the values, their pattern, and conversion from and to dense."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qsparseprop.geometry import Geometry
from qsparseprop.nn.functional import sparse_product
from qsparseprop.pattern import Plan, check_pattern, dense_pattern, make_plan, row_indices
from qsparseprop.quantization import QuantConfig

#: What the kernels read and write; other dtypes are converted.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

#: Input sizes whose offset tables a module keeps: training and evaluation batches, and the odd last one of each.
KEPT_PLANS = 8


def dense_weight(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight of a dense module and the mask of the entries to keep.

    With prune's mask attached the mask decides (a kept weight may be zero), and the weight is ``weight_orig *
    weight_mask``, since prune refreshes ``module.weight`` only in a forward pass.
    """
    parameters = dict(module.named_parameters(recurse=False))
    mask = dict(module.named_buffers(recurse=False)).get("weight_mask")
    if "weight_orig" in parameters and mask is not None:
        return parameters["weight_orig"].detach() * mask, mask != 0
    weight = module.weight.detach()
    return weight, weight != 0


def dense_bias(module: nn.Module) -> tuple[Tensor, bool] | None:
    """Bias of a dense module, pruned or not, and whether it requires a gradient."""
    parameters = dict(module.named_parameters(recurse=False))
    mask = dict(module.named_buffers(recurse=False)).get("bias_mask")
    if "bias_orig" in parameters and mask is not None:
        return parameters["bias_orig"].detach() * mask, parameters["bias_orig"].requires_grad
    return None if module.bias is None else (module.bias.detach(), module.bias.requires_grad)


def trains_weight(module: nn.Module) -> bool:
    """Whether the weight of a dense module, pruned or not, requires a gradient."""
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.get("weight_orig", parameters.get("weight")).requires_grad


def _version(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor; those made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version


class SparseModule(nn.Module):
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
    qconfig : QuantConfig or None
        None where the module computes in float32.
    """

    _dense_type: ClassVar[type[nn.Module]]
    quantized: ClassVar[bool] = False

    weight: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    qconfig: QuantConfig | None = None

    def _configure(self, qconfig: QuantConfig | None) -> None:
        if not self.quantized:
            if qconfig is not None:
                raise TypeError(f"{type(self).__name__} computes in float32 and takes no qconfig")
        elif qconfig is None:
            self.qconfig = QuantConfig()
        elif isinstance(qconfig, QuantConfig):
            self.qconfig = qconfig
        else:
            raise TypeError(f"qconfig must be a QuantConfig, got {type(qconfig).__name__}")

    def _set_weight(self, weight: Tensor, mask: Tensor, bias: tuple[Tensor, bool] | None, requires_grad: bool) -> None:
        rows = weight.shape[0]
        crow, col, flat = dense_pattern(mask.reshape(rows, -1))
        self.weight = nn.Parameter(weight.reshape(-1)[flat].clone(), requires_grad)
        self.register_buffer("crow_indices", crow)
        self.register_buffer("col_indices", col)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias[0].clone(), bias[1])

    @classmethod
    def _check_dense(cls, module: nn.Module) -> tuple[Tensor, Tensor]:
        wanted = cls._dense_type
        if not isinstance(module, wanted):
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.{wanted.__name__}, "
                            f"got {type(module).__module__}.{type(module).__qualname__}")
        weight, mask = dense_weight(module)
        if weight.device.type != "cpu":
            raise ValueError(f"the weight must be on the CPU, got device {weight.device}")
        if not weight.is_floating_point():
            raise TypeError(f"the weight must be floating point, got {weight.dtype}")
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight has {int((~torch.isfinite(weight)).sum())} NaN or Inf of "
                             f"{weight.numel()} values; all must be finite")
        return weight, mask

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
        dense = self.weight.new_zeros(torch.Size(self.weight_shape).numel())
        return dense.index_put((self._flat_indices(),), self.weight).view(self.weight_shape)

    def _flat_indices(self) -> Tensor:
        rows = self.weight_shape[0]
        columns = torch.Size(self.weight_shape).numel() // max(rows, 1)
        return row_indices(self.crow_indices) * columns + self.col_indices

    @torch.no_grad()
    def apply_further_mask(self, mask: Tensor) -> None:
        """Remove the weights outside of a mask, in place.

        `weight` stays the same Parameter with fewer elements; its gradient, where it has one, is cut alike. State that
        an optimizer keeps for each element does not change with it: make the optimizer anew.

        Parameters
        ----------
        mask : Tensor
            Of the dense weight's shape; what is zero in it is removed. Positions that do not exist are ignored.

        Raises
        ------
        ValueError
            For another shape; nothing has changed then.
        """
        if tuple(mask.shape) != tuple(self.weight_shape):
            raise ValueError(f"mask must have shape {tuple(self.weight_shape)}, got {tuple(mask.shape)}")
        kept = mask.reshape(-1)[self._flat_indices()] != 0
        rows = row_indices(self.crow_indices)[kept]
        crow = torch.zeros_like(self.crow_indices)
        crow[1:] = torch.bincount(rows, minlength=crow.numel() - 1).cumsum(0)
        grad = None if self.weight.grad is None else self.weight.grad[kept]
        self.weight.grad = None
        values = self.weight.data[kept]
        # A graph that still exists keeps a node that accumulates gradients of the old size; torch makes a new one only
        # when the dtype changes on the way.
        self.weight.data = values.to(torch.float64 if values.dtype != torch.float64 else torch.float32)
        self.weight.data = values
        self.weight.grad = grad
        self.crow_indices, self.col_indices = crow, self.col_indices[kept]

    # ---- plans: what depends on the pattern and the input's size only ----

    def _plan(self, geometry: Geometry, groups: int) -> Plan:
        crow, col = self.crow_indices, self.col_indices
        if self.weight.ndim != 1 or self.weight.numel() != col.numel():
            raise ValueError(f"weight must have one value for each of the {col.numel()} column indices, "
                             f"got shape {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != (self.weight_shape[0],):
            raise ValueError(f"bias must have shape ({self.weight_shape[0]},), got {tuple(self.bias.shape)}")
        version = (crow.data_ptr(), _version(crow), col.data_ptr(), _version(col), col.numel())
        plans: OrderedDict[Geometry, Plan] = self.__dict__.setdefault("_plans", OrderedDict())
        if self.__dict__.get("_plans_version") != version:
            rows = self.weight_shape[0]
            check_pattern(crow, col, (rows, torch.Size(self.weight_shape).numel() // max(rows, 1)))
            plans.clear()
            self.__dict__["_plans_version"] = version
        plan = plans.get(geometry)
        if plan is None:
            plan = plans[geometry] = make_plan(crow, col, geometry, groups)
            if len(plans) > KEPT_PLANS:
                plans.popitem(last=False)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        # plans are made anew: they may be larger than the weights
        return {k: v for k, v in self.__dict__.items() if k not in ("_plans", "_plans_version")}

    def _check_input(self, x: Tensor) -> None:
        kind = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{kind} expects a tensor, got {type(x).__name__}")
        if not (x.is_cpu and self.weight.is_cpu):
            raise ValueError(f"{kind} computes on the CPU, got an input on device {x.device} and weights on device "
                             f"{self.weight.device}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{kind} expects a floating-point input (float32, bfloat16, ...), got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{kind} expects a strided tensor, got layout {x.layout}")

    def _multiply(self, x: Tensor, plan: Plan) -> Tensor:
        """The product for a 4-D input, in the dtype that torch gives to such a layer: x's, or autocast's."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if x.dtype not in _KERNEL_DTYPES:
            x = x.to(torch.float32)
        y = sparse_product(x, self.weight, self.bias, plan, self.qconfig,
                           dtype if dtype in _KERNEL_DTYPES else torch.float32)
        return y if y.dtype == dtype else y.to(dtype)
