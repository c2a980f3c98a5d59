"""Attention whose projections can be made sparse, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsparseprop.nn import MultiheadAttention, SparseLinear
from qsparseprop.utils.network_utils import swap_modules_with_dense, swap_modules_with_sparse, unfold_attention
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune

from ._helpers import generator, relative_error

N, L, S, E, HEADS = 3, 5, 6, 16, 4


def operands(batch_first: bool, batched: bool = True, kdim: int = E, vdim: int = E) -> list[torch.Tensor]:
    shapes = [(N, L, E), (N, S, kdim), (N, S, vdim)]
    tensors = [torch.randn(s, generator=generator(i)) for i, s in enumerate(shapes)]
    if not batched:
        return [t[0] for t in tensors]
    return tensors if batch_first else [t.transpose(0, 1) for t in tensors]


def assert_close(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per head", "padding", "both"])
def test_like_torch(batch_first, need_weights, masks):
    dense = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    padding = torch.arange(S) >= torch.tensor([[S], [4], [3]])
    arguments = {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(L, S)},
        "per head": {"attn_mask": torch.randn(N * HEADS, L, S)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": torch.where(causal, -9.0, 0.0), "key_padding_mask": torch.where(padding, -9.0, 0.0)},
    }[masks]
    x = operands(batch_first)
    ours = MultiheadAttention.from_dense(dense)
    assert_close(ours(*x, need_weights=need_weights, **arguments), dense(*x, need_weights=need_weights, **arguments))


@pytest.mark.parametrize("settings", [{"kdim": 7, "vdim": 9}, {"bias": False}, {"dropout": 0.5}])
@pytest.mark.parametrize("batched", [True, False])
def test_settings(settings, batched):
    dense = nn.MultiheadAttention(E, HEADS, batch_first=True, **settings).eval()
    x = operands(True, batched, settings.get("kdim", E), settings.get("vdim", E))
    ours = MultiheadAttention.from_dense(dense)
    assert not ours.training
    for average in (True, False):
        assert_close(ours(*x, average_attn_weights=average), dense(*x, average_attn_weights=average))
    if "dropout" in settings:
        ours.train()
        assert not torch.equal(ours(*x)[0], ours(*x)[0])


def test_gradients():
    dense = nn.MultiheadAttention(E, HEADS, batch_first=True)
    ours = MultiheadAttention.from_dense(dense)
    for module in (dense, ours):
        module(*operands(True), need_weights=False)[0].square().sum().backward()
    grads = torch.cat([p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
    assert relative_error(grads, dense.in_proj_weight.grad) < 1e-5
    assert relative_error(ours.out_proj.weight.grad, dense.out_proj.weight.grad) < 1e-5


def test_refusals():
    with pytest.raises(TypeError, match=r"expects torch.nn.MultiheadAttention, got torch.nn.modules.linear.Linear"):
        MultiheadAttention.from_dense(nn.Linear(2, 2))
    for settings in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        dense = nn.MultiheadAttention(E, HEADS, **settings)
        with pytest.raises(NotImplementedError, match="add_bias_kv and add_zero_attn"):
            MultiheadAttention.from_dense(dense)
        model = nn.ModuleList([dense])
        assert unfold_attention(model)[0] is dense
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        MultiheadAttention.from_dense(nn.MultiheadAttention(E, HEADS))(*operands(False), is_causal=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("container", [False, True])
def test_inside_of_torchs_transformer(training, container):
    """All projections become sparse, and evaluation does not take torch's way around the modules."""
    model = nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    if container:
        model = nn.TransformerEncoder(model, 2)
    unfold_attention(model)
    layerwise_magnitude_prune(model, 0.8, skip=())
    x = torch.randn(N, L, E)
    wanted = model.train()(x)
    model.train(training)
    swap_modules_with_sparse(model, x, quantize=False, include_dense=False, verbose=False, min_sparsity=0.5)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 6 * (2 if container else 1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):  # without gradients torch's fast path is near
            assert relative_error(model(x), wanted.detach()) < 1e-5
            padding = torch.arange(L) >= torch.tensor([[L], [4], [3]])
            assert torch.isfinite(model(x, src_key_padding_mask=padding)).all()
    assert relative_error(swap_modules_with_dense(model)(x), wanted.detach()) < 1e-5
