"""Freezing a model as a whole: traced, folded, calibrated, and lowered to a program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qsparseprop import arguments
from qsparseprop.inference.batches import Batch
from qsparseprop.inference.calibration import OBSERVERS, calibrate, token_codes
from qsparseprop.inference.capture import Captured, NotCapturable, Signature, capture
from qsparseprop.inference.coding import Coding, choose, find_tokens
from qsparseprop.inference.computed import compute_weights
from qsparseprop.inference.draft import Draft, Layer, Node, Operator, run_draft
from qsparseprop.inference.folding import check_weights, fold
from qsparseprop.inference.lowering import lower
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.patterns import recognise
from qsparseprop.inference.refining import refine
from qsparseprop.inference.report import FreezeReport, LayerReport

__all__ = ["Options", "freeze_module", "freeze_rows"]

#: A graph is the model's where no element of its outputs differs by more, relative to the largest of them.
SAME = 1e-3
#: Operators with weights that stay as they are.
_FLOATING = {
    "aten.conv_transpose1d.default": "ConvTranspose1d",
    "aten.conv_transpose2d.input": "ConvTranspose2d",
    "aten.conv_transpose3d.input": "ConvTranspose3d",
    "aten.conv3d.default": "Conv3d",
    "aten.conv3d.padding": "Conv3d",
    "aten.conv1d.default": "Conv1d",
    "aten.conv2d.default": "Conv2d",
    "aten.conv2d.padding": "Conv2d",
    "aten.linear.default": "Linear",
    "aten.lstm.input": "LSTM",
    "aten.gru.input": "GRU",
    "aten.rnn_tanh.input": "RNN",
    "aten.rnn_relu.input": "RNN",
    "aten.bilinear.default": "Bilinear",
    "aten.embedding.default": "Embedding",
}
#: Products, which have weights where one of their operands is a constant.
_PRODUCTS = {"matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot", "inner"}


@dataclass(frozen=True)
class Options:
    """Settings of `qsparseprop.inference.freeze`.

    Parameters
    ----------
    observer : str
    per_channel, correct_bias : bool
    keep_float : tuple of str
        Names of layers.
    token_scales : bool
        Whether tokens have scales of their own.
    """

    observer: str = "minmax"
    per_channel: bool = True
    correct_bias: bool = True
    keep_float: tuple[str, ...] = ()
    token_scales: bool = True

    def check(self) -> None:
        """Check them.

        Raises
        ------
        ValueError
        """
        arguments.one_of(self.observer, OBSERVERS, "observer")
        for name in ("per_channel", "correct_bias", "token_scales"):
            arguments.flag(getattr(self, name), name)

    def below(self, name: str) -> Options:
        """Those for a part of the model, whose names are shorter.

        Parameters
        ----------
        name : str

        Returns
        -------
        Options
        """
        if not name:
            return self
        inside = tuple(kept.removeprefix(f"{name}.") for kept in self.keep_float if kept.startswith(f"{name}."))
        return replace(self, keep_float=inside)


def freeze_module(
    model: nn.Module, batches: Sequence[Batch], options: Options, example: Batch | None = None
) -> FrozenModule:
    """Freeze a model as a whole.

    Parameters
    ----------
    model : torch.nn.Module
        From `qsparseprop.inference.capture.float_copy`.
    batches : sequence of Batch
    options : Options
    example : Batch, optional
        What it is traced with in the place of the first batch.

    Returns
    -------
    FrozenModule

    Raises
    ------
    NotCapturable
        If it can only be frozen in parts.
    ValueError
        For values that are not finite.
    """
    example = batches[0] if example is None else example
    captured = capture(model, example.args, example.kwargs)
    _check_like(batches, captured.signature)
    draft = captured.draft
    compute_weights(draft)
    recognise(draft)
    check_weights(draft)
    fold(draft)
    _check_same(model, captured, (batches[0], batches[0].first(), batches[0].one_more()))
    return _frozen(captured.draft, captured.signature, [batch.tensors for batch in batches], options)


def freeze_rows(layer: nn.Linear, batches: Sequence[Batch], options: Options) -> FrozenModule:
    """Freeze a linear layer, whose input may have any number of dimensions.

    Parameters
    ----------
    layer : torch.nn.Linear
    batches : sequence of Batch
    options : Options

    Returns
    -------
    FrozenModule
    """
    rows = [batch.tensors[0].reshape(-1, layer.in_features) for batch in batches]
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
    node = Layer(inputs=("input",), output="output", weight=layer.weight.detach().float(), bias=bias, kind="Linear")
    shapes: dict[str, Any] = {"input": (None, layer.in_features), "output": (None, layer.out_features)}
    draft = Draft(("input",), ("output",), [node], {}, shapes, set(shapes))
    check_weights(draft)
    signature = Signature(((0,), {}), 0, {}, (shapes["input"],), (torch.float32,))
    return _frozen(draft, signature, [(each,) for each in rows], options, rows=True)


def _frozen(
    draft: Draft, signature: Signature, inputs: Sequence[Sequence[Tensor]], options: Options, rows: bool = False
) -> FrozenModule:
    kinds = {node.output: node for node in draft.nodes}
    coding = choose(draft, options.keep_float)
    names = {output: node.layer for output, node in kinds.items()}
    codes = calibrate(draft, coding, inputs, options.observer, options.per_channel, names)
    dynamic = find_tokens(draft, coding, rows) if options.token_scales else set()
    codes |= {name: token_codes(codes[name], options.per_channel) for name in dynamic}
    program = lower(draft, coding, codes, dynamic)
    program, errors = refine(draft, program, inputs, options.correct_bias)
    return FrozenModule(program, signature, _report(draft, coding, errors), rows)


def _report(draft: Draft, coding: Coding, errors: dict[str, float]) -> FreezeReport:
    report = FreezeReport()
    for node in draft.nodes:
        if isinstance(node, Layer):
            if node.kind == "pad":
                continue
            zeros = float((node.weight == 0).float().mean()) if node.weight.numel() else 0.0
            report.append(LayerReport(node.layer, node.kind, zeros, id(node) in coding.coded,
                                      coding.reasons.get(id(node), ""), errors.get(node.output)))  # fmt: skip
        elif (kind := _floating_kind(draft, node)) is not None:
            report.append(LayerReport(node.layer, kind, None, False, "has no form on codes"))
    return report


def _floating_kind(draft: Draft, node: Node) -> str | None:
    if type(node) is not Operator:
        return None
    kind = node.operator.removeprefix("aten.").split(".")[0]
    held = [draft.constants[name] for name in node.inputs if name in draft.constants]
    if kind in _PRODUCTS and any(tensor.ndim > 1 and tensor.is_floating_point() for tensor in held):
        return kind
    return _FLOATING.get(node.operator)


def _check_like(batches: Iterable[Batch], signature: Signature) -> None:
    """Check that all batches have the shapes of the example."""
    for batch in batches:
        shapes = [tuple(tensor.shape) for tensor in batch.tensors]
        fits = len(shapes) == len(signature.shapes) and all(
            len(shape) == len(known) and all(n in (None, m) for n, m in zip(known, shape, strict=True))
            for shape, known in zip(shapes, signature.shapes, strict=True))  # fmt: skip
        if not fits:
            raise NotCapturable("calibration batches differ in more than their number of samples")


def _check_same(model: nn.Module, captured: Captured, batches: Iterable[Batch]) -> None:
    """Check that a graph computes what the model does, of one sample as of several."""
    for batch in batches:
        try:
            with torch.no_grad():
                result = model(*batch.args, **batch.kwargs)
        except Exception as error:
            # whatever the model's own code says to fewer or more samples
            raise NotCapturable(f"it does not run for each size of the batch ({error})") from error
        given = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        found = run_draft(captured.draft, batch.tensors)
        for mine, theirs in zip(found, given, strict=True):
            if mine.shape != theirs.shape or not _close(mine, theirs):
                raise NotCapturable("its graph computes something else than it does")


def _close(mine: Tensor, theirs: Tensor) -> bool:
    if not theirs.is_floating_point():
        return torch.equal(mine, theirs)
    finite = theirs.isfinite()
    if not torch.equal(mine.isfinite(), finite):
        return False
    mine, theirs = mine[finite].double(), theirs[finite].double()
    return not mine.numel() or bool((mine - theirs).abs().max() <= SAME * theirs.abs().max().clamp(min=1e-30))


