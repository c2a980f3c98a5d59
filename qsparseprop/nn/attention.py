"""Multi-head attention whose projections are layers of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparseprop.contents import check_memory_of

if TYPE_CHECKING:
    from qsparseprop.nn.linear import SparseLinear

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.Module):
    """What torch.nn.MultiheadAttention computes, with four Linear layers that are called.

    torch's own module hands the weights of its projections to a function, so that they cannot be replaced by sparse
    layers. Here they can. Made by `from_dense`.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : nn.Linear, or a sparse module in its place
    embed_dim, num_heads, head_dim, dropout, batch_first
        As in torch.nn.MultiheadAttention.
    """

    # What torch's encoder layers look at before they compute with weights that do not exist here.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self, q_proj: nn.Linear | SparseLinear, k_proj: nn.Module, v_proj: nn.Module, out_proj: nn.Module,
        num_heads: int, dropout: float = 0.0, batch_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.embed_dim, self.num_heads = q_proj.out_features, num_heads
        self.head_dim = self.embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first

    @classmethod
    def from_dense(cls, attention: nn.MultiheadAttention) -> MultiheadAttention:
        """Take over the weights of torch's module, which is not changed.

        Parameters
        ----------
        attention : torch.nn.MultiheadAttention

        Returns
        -------
        MultiheadAttention

        Raises
        ------
        TypeError
            For another kind of module, or a subclass.
        NotImplementedError
            For ``add_bias_kv`` and ``add_zero_attn``.
        """
        if type(attention) is not nn.MultiheadAttention:
            raise TypeError(f"{cls.__name__}.from_dense expects torch.nn.MultiheadAttention, got "
                            f"{type(attention).__module__}.{type(attention).__qualname__}")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise NotImplementedError("add_bias_kv and add_zero_attn are not supported")
        check_memory_of(attention)
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        pairs = [*zip(weights, biases, strict=True), (attention.out_proj.weight, attention.out_proj.bias)]
        q_proj, k_proj, v_proj, out_proj = (_linear(weight, bias) for weight, bias in pairs)
        made = cls(q_proj, k_proj, v_proj, out_proj, attention.num_heads, attention.dropout, attention.batch_first)
        return made.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply attention; arguments and results are those of torch.nn.MultiheadAttention.

        Parameters
        ----------
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            As for torch's.

        Returns
        -------
        output : Tensor
        weights : Tensor or None
            None without `need_weights`.

        Raises
        ------
        RuntimeError
            If `is_causal` is given without `attn_mask`, as in torch.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is needed with it")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (t[None] for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        images, length = query.shape[:2]
        q, k, v = (
            layer(t).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = _joint_mask(attn_mask, key_padding_mask, images, self.num_heads, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout, self.training)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(heads.transpose(1, 2).reshape(images, length, self.embed_dim))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # on "meta": a layer that initialises itself would draw random numbers
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _joint_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, images: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to be added to the scores, (images or 1, heads or 1, queries or 1, keys)."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, -torch.inf)
        return mask.to(dtype)

    joint = None
    if attn_mask is not None:
        joint = additive(attn_mask)
        joint = joint[None, None] if joint.ndim == 2 else joint.unflatten(0, (images, heads))
    if key_padding_mask is not None:
        padding = additive(key_padding_mask).reshape(images, 1, 1, -1)
        joint = padding if joint is None else joint + padding
    return joint
