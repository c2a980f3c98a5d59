"""The Parameter of a sparse weight: one-dimensional values, which refuse to be taken for the dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparseprop._kernels._tensor import treat_as_tensor
from qsparseprop._torch_compat import called_by_parameter
from qsparseprop.nn._engine import STARTS_BACKWARD, run_backward

_WAY_OUT = ("this is the weight of a sparse layer, the 1-D values of its nonzeros: use the layer's dense_weight(), "
            "which has the dense shape and keeps gradients, or swap_modules_with_dense(model)")  # fmt: skip


def _named(names: str, *places: Any) -> set[Callable[..., Any]]:
    """Functions of several modules or classes by their names, as far as this version of torch has them."""
    return {function for name in names.split() for place in places if (function := getattr(place, name, None))}


#: What treats its operand as a matrix or a kernel. Of one dimension torch takes some of these for something else.
_MATRIX = _named(
    "matmul __matmul__ __rmatmul__ mm mv bmm addmm addmv addbmm baddbmm einsum tensordot inner outer ger kron "
    "chain_matmul t adjoint transpose swapaxes swapdims movedim moveaxis permute cdist pdist cosine_similarity "
    "linear bilinear embedding normalize conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "pinverse svd qr cov corrcoef vander kthvalue unbind __iter__ matrix_norm cond det slogdet eigh eig svdvals "
    "multi_dot vecdot",
    torch, Tensor, F, torch.linalg,
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}  # fmt: skip

#: What looks along one dimension where it is given one: of the dense weight that would be another.
_ALONG = _named(
    "sum mean amax amin max min std var prod norm argmax argmin any all cumsum cumprod softmax log_softmax logsumexp "
    "nansum nanmean median sort argsort topk unflatten renorm flip roll select index_select narrow count_nonzero "
    "vector_norm std_mean var_mean quantile nanquantile",
    torch, Tensor, F, torch.linalg,
)  # fmt: skip

#: What gives another shape, which must be one-dimensional: an element is not a row of the dense weight.
_SHAPE = _named("view reshape unsqueeze expand flatten expand_as view_as reshape_as broadcast_to repeat tile "
                "atleast_2d atleast_3d diag unfold as_strided __getitem__", torch, Tensor)  # fmt: skip

#: What broadcasts its operands: beside a matrix or a column of scales, each nonzero would be taken for a column.
_BROADCASTING = _named(
    "add add_ sub sub_ subtract subtract_ rsub mul mul_ multiply multiply_ div div_ divide divide_ true_divide "
    "true_divide_ floor_divide floor_divide_ remainder remainder_ fmod fmod_ pow pow_ float_power atan2 hypot lerp "
    "lerp_ where maximum minimum fmax fmin clamp clamp_ clip clip_ addcmul addcmul_ addcdiv addcdiv_ copy_ copysign "
    "copysign_ eq ne lt le gt ge isclose allclose masked_fill masked_fill_ dist logaddexp xlogy broadcast_tensors "
    "mse_loss l1_loss smooth_l1_loss huber_loss kl_div __add__ __radd__ __iadd__ __sub__ "
    "__rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ "
    "__floordiv__ __rfloordiv__ __pow__ __rpow__ __mod__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__",
    torch, Tensor, F,
)  # fmt: skip

#: What has another argument before the dimension.
_SECOND = _named("norm vector_norm quantile nanquantile", torch, Tensor, torch.linalg)
_SELECTS = _named("topk renorm flip roll", torch, Tensor)


#: Steps of torch's optimizers that read and write the state of a parameter by its size, and look at no other.
_FUSED = _named("_fused_adam_ _fused_adamw_ _fused_sgd_ _fused_adagrad_", torch)


def _check_fused(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse to step a parameter by a state or gradient of another size, which would write beside it in memory."""
    parameters, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, (tuple, list)))
    for values in others:
        for parameter, value in zip(parameters, values, strict=False):
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise RuntimeError(
                    f"the optimizer keeps a state of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: a pattern has changed without it. Make a new one after loading a state "
                    "of another pattern, and give it to apply_further_mask, regrow and GradualPruner"
                )


def _wants_dimension(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function was told a dimension."""
    if any(kwargs.get(name) is not None for name in ("dim", "axis", "dims")):
        return True
    if function is torch.linalg.norm:  # an order means one thing for vectors and another one for matrices
        return len(args) > 1 or kwargs.get("ord") is not None
    if function in _SELECTS:
        return False
    place = 2 if function in _SECOND else 1  # behind the order of a norm and the like
    return len(args) > place and isinstance(args[place], (int, tuple, list)) and not isinstance(args[place], bool)


def _beside_a_matrix(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operand has more than one dimension."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(isinstance(value, Tensor) and value.ndim > 1 for value in (*args, *kwargs.values()))


class SparseValues(nn.Parameter):
    """Values of the nonzeros of a sparse weight, (nonzeros,).

    An ordinary Parameter for everything that treats elements alike: optimizers, norms of all elements, averages, files.
    What takes it for the dense weight - products, transposition, rows, one dimension of several - raises a
    NotImplementedError that names `SparseWeight.dense_weight`: torch would take some of these for what they mean of a
    vector.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse what is meant for the dense weight; results are plain tensors."""
        kwargs = kwargs or {}
        if (func in _MATRIX or (func in _ALONG and _wants_dimension(func, args, kwargs))
                or (func in _BROADCASTING and _beside_a_matrix(args, kwargs))):  # fmt: skip
            # no TypeError, which Python's operators would replace by one of their own
            raise NotImplementedError(f"{getattr(func, '__name__', func)}: {_WAY_OUT}")
        if func in STARTS_BACKWARD:
            return run_backward(func, args, kwargs, cls)
        if func in _FUSED:
            with torch._C.DisableTorchFunctionSubclass():
                _check_fused(args, kwargs)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            if type(error) not in (RuntimeError, IndexError):
                raise
            raise type(error)(f"{error} ({_WAY_OUT})") from error
        if func is Tensor.detach and called_by_parameter():
            return torch.Tensor._make_subclass(cls, result, False)  # nn.Parameter(layer.weight)
        if func in _SHAPE and result.ndim != 1 and type(args[0]) is cls:
            raise NotImplementedError(f"{func.__name__} to shape {tuple(result.shape)}: {_WAY_OUT}")
        return result

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # type: ignore[override]  # torch's has no types
        return f"Parameter containing:\n{self.detach()!r}"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """As a Parameter is pickled, of this class."""
        function, arguments, *rest = super().__reduce_ex__(protocol)
        if function is torch._utils._rebuild_parameter:
            return _rebuild, arguments[:2]
        return function, arguments, *rest


treat_as_tensor(SparseValues)


def as_values(parameter: Tensor | None) -> None:
    """Make a vector that became the weight of a sparse layer refuse what values refuse.

    In place, since optimizers know the object: parameters of earlier versions' files, of ``to("meta")`` and the like,
    and those that somebody has set, are plain.
    """
    if type(parameter) is nn.Parameter and parameter.ndim == 1:
        parameter.__class__ = SparseValues


def _rebuild(data: Tensor, requires_grad: bool) -> SparseValues:
    return SparseValues(data, requires_grad)


# files that hold parameters themselves are read by torch.load(weights_only=True), as those of dense ones are
torch.serialization.add_safe_globals([_rebuild])


def plain(values: Tensor) -> Tensor:
    """Values as a tensor of torch's own class, without their graph: what kernels are given.

    Every attribute of a subclass is looked up in Python, which would take longer than a small layer.
    """
    if type(values) is not SparseValues:
        return values
    with torch._C.DisableTorchFunctionSubclass():
        return values.detach()
