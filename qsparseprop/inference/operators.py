"""Which operators of torch programs may call: those that compute, and do nothing else.

Programs come from files. An operator that is not named here is refused, whatever else it is: what reads or writes files
(`from_file`), shows memory that nobody has written (`empty`), reads where it is told to (`as_strided`, and kernels that
take sizes for granted, as those of normalisation and attention that torch calls after checks of its own), or changes
what others hold. Recurrence and attention are checked when they are called (`trusting.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PURE", "is_pure", "is_training"]

_ELEMENTWISE = """
abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor
ceil celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad div divide elu eq erf erfc erfinv exp exp2 expm1
float_power floor floor_divide floordiv fmax fmin fmod frac ge gelu glu greater greater_equal gt hardshrink
hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan le leaky_relu lerp less less_equal lgamma log
log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill
maximum minimum mish mul multiply nan_to_num ne neg negative not_equal positive pow prelu rad2deg reciprocal relu
relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_expit
special_log_ndtr special_ndtr sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy
"""
_REDUCTIONS = """
_log_softmax _safe_softmax _softmax all amax amin any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum
kthvalue linalg_norm linalg_vector_norm log_softmax logcumsumexp logsumexp max mean median min mode nanmean nansum
norm prod quantile softmax sort special_softmax std std_mean sum topk unique_consecutive var var_mean
"""
_SHAPES = """
_reshape_alias _to_copy _unsafe_view alias broadcast_tensors broadcast_to cat channel_shuffle chunk clone concat
contiguous detach diag_embed diagonal dstack expand expand_as flatten flip fliplr flipud hsplit hstack lift_fresh_copy
meshgrid movedim narrow permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll
rot90 select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile to transpose tril triu
type_as unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as vsplit vstack
"""
_INDEXING = """
bucketize constant_pad_nd embedding gather grid_sampler grid_sampler_2d grid_sampler_3d index index_add index_copy
index_fill index_put index_select masked_scatter masked_select nonzero one_hot pad reflection_pad1d reflection_pad2d
reflection_pad3d replication_pad1d replication_pad2d replication_pad3d scatter scatter_add scatter_reduce searchsorted
select_scatter slice_scatter take_along_dim
"""
_LAYERS = """
_adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
_upsample_nearest_exact2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv affine_grid_generator avg_pool1d avg_pool2d avg_pool3d
baddbmm batch_norm bilinear bmm cdist col2im conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
convolution cosine_similarity dot dropout einsum group_norm gru im2col inner instance_norm layer_norm linear lstm
matmul max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices mm mv native_group_norm
native_layer_norm outer pairwise_distance rms_norm rnn_relu rnn_tanh scaled_dot_product_attention tensordot
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d vdot
"""
_OTHERS = """
arange complex eye fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft
fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill full full_like imag linspace new_full new_ones new_zeros ones
ones_like real scalar_tensor stft sym_size view_as_complex view_as_real zeros zeros_like
"""

#: Names of operators, all overloads of which that write to none of their arguments may be called.
PURE = frozenset((_ELEMENTWISE + _REDUCTIONS + _SHAPES + _INDEXING + _LAYERS + _OTHERS).split())


def is_pure(name: str, overload: Any) -> bool:
    """Whether an operator does nothing but compute.

    Parameters
    ----------
    name : str
        Without namespace and overload.
    overload : Overload

    Returns
    -------
    bool
    """
    schema = overload._schema
    # of others scales may be negative, with which kernels read before the image
    if "upsample" in name and overload._overloadname != "vec":
        return False
    # those of Python's lists could repeat one as often as they like
    return name in PURE and not schema.is_mutable and not any(str(a.type) == "List[t]" for a in schema.arguments)


def is_training(overload: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether a call is one of training, as which normalisations change their statistics and dropout draws numbers.

    Parameters
    ----------
    overload : Overload
    arguments : sequence
    keywords : mapping

    Returns
    -------
    bool
    """
    names = [a.name for a in overload._schema.arguments if not a.kwarg_only]
    given = {**dict(zip(names, arguments, strict=False)), **keywords}
    return any(given.get(name) not in (None, False, 0) for name in ("train", "training"))
