"""What tests/_fuzz_api.py calls: public functions with arguments that work, and what must hold of their results."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import qsparseprop
from qsparseprop import nn as qnn
from qsparseprop.inference import FrozenModule, export_onnx, freeze, load, measure_accuracy, save
from qsparseprop.nn import accept_dense_state
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.quantization import QuantConfig, QuantizedTensor, dequantize, quantize
from qsparseprop.training import CheckpointError, Finetuner, NonFiniteLossError
from qsparseprop.utils import measurement_utils, pruning_utils
from qsparseprop.utils.saved_tensors import CompressedModule, compress_saved_tensors
from qsparseprop.utils.state_files import read_state_dict
from qsparseprop.utils.state_report import format_weights, weight_infos

from ._fuzz_objects import dense, sparse

#: What is documented of functions that check their arguments.
USUAL = (TypeError, ValueError)


class Target(NamedTuple):
    """A function, its arguments by the names of what works, and what it may raise."""

    call: Callable[..., Any]
    arguments: dict[str, str]
    errors: tuple[type[Exception], ...] = USUAL
    #: whether it changes what it is given even if it is refused in the middle (a training that has begun)
    trains: bool = False


# ---- arguments that work ----


class Frozen:
    """What takes a second to make, once."""

    module: nn.Module | None = None

    @classmethod
    def make(cls) -> nn.Module:
        if cls.module is None:
            cls.module = freeze(dense().eval(), [torch.randn(4, 3, 6, 6)])
        return cls.module


def _batches() -> list[Any]:
    return [(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4))]


def _quantized() -> QuantizedTensor:
    return quantize(torch.linspace(-1, 1, 24).view(2, 12))


GOOD: dict[str, Callable[[], Any]] = {
    "shape": lambda: (2, 3, 6, 6), "sparsity": lambda: 0.5, "batches": _batches, "quantized": _quantized,
    "epochs": lambda: 1, "yes": lambda: True, "no": lambda: False, "nothing": lambda: None, "12": lambda: 12,
    "9": lambda: 9, "one": lambda: 1, "masked": lambda: torch.rand(30, 128) < 0.5,
    "values": lambda: torch.randn(30, 128), "linear layer": lambda: nn.Linear(12, 9),
    "conv1": lambda: nn.Conv1d(4, 6, 3),
    "conv2": lambda: nn.Conv2d(4, 6, 3), "conv3": lambda: nn.Conv3d(4, 6, 3),
    "convt1": lambda: nn.ConvTranspose1d(4, 6, 3), "convt2": lambda: nn.ConvTranspose2d(4, 6, 3),
    "convt3": lambda: nn.ConvTranspose3d(4, 6, 3), "frozen model": Frozen.make, "calibration": lambda:
    [torch.randn(4, 3, 6, 6)], "file": lambda: os.path.join(tempfile.gettempdir(), f"fuzz-{os.getpid()}"),
    "sparse state": lambda: sparse(1).state_dict(), "attach": lambda: (lambda model: model),
    "zero mean": lambda: "minmax", "take": lambda: "take_zeros", "scheme": lambda: "standard",
    "512": lambda: 512, "sawb": lambda: "sawb", "loss": lambda: nn.functional.cross_entropy,
    "run": lambda: (lambda: dense()(torch.randn(2, 3, 6, 6))),
    "codes": lambda: _quantized().codes, "scale": lambda: _quantized().scale,
    "zero point": lambda: _quantized().zero_point, "crow": lambda: sparse()[4].crow_indices,
    "sparse values": lambda: nn.Parameter(sparse()[4].weight.detach()),
    "attention layer": lambda: nn.MultiheadAttention(12, 3),
}  # fmt: skip


# ---- calls ----


def _with_optimizer(call: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer that is None is one that trains the model."""

    def called(model: Any, optimizer: Any, **more: Any) -> Any:
        if optimizer is None and isinstance(model, nn.Module):
            optimizer = torch.optim.AdamW(model.parameters())
        return call(model, optimizer, **more)

    return called


class _Enough(ValueError):
    """Ends trainings of thousands of epochs."""


def _stop_after(steps: int) -> Callable[[], None]:
    left = iter(range(steps))

    def stop() -> None:
        if next(left, None) is None:
            raise _Enough("trained long enough")

    return stop


def _fit(train_batches: Any, epochs: Any, **settings: Any) -> Any:
    folder, model = settings.pop("folder"), dense()
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.1), after_step=_stop_after(3))
    if folder is True:
        with tempfile.TemporaryDirectory() as made:
            return tuner.fit(train_batches, epochs, folder=made, **settings)
    return tuner.fit(train_batches, epochs, folder=folder, **settings)


def _tuner_loads(state: Any) -> None:
    model = dense()
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.1))
    tuner.load_state_dict(state)


def _remasked(mask: Any, optimizer: Any) -> nn.Module:
    model = sparse()
    model[4].apply_further_mask(mask, optimizer)  # type: ignore[index,operator]
    return model


def _regrown(mask: Any, values: Any, optimizer: Any) -> nn.Module:
    model = sparse()
    model[4].regrow(mask, values, optimizer)  # type: ignore[index,operator]
    return model


def _set(name: str) -> Callable[[Any], nn.Module]:
    def called(value: Any) -> nn.Module:
        model = sparse()
        try:
            setattr(model[4], name, value)  # type: ignore[index]
        finally:
            model(torch.randn(2, 3, 6, 6))  # as before, or as set
        return model

    return called


def _loads(choice: Any, key: Any, value: Any, strict: Any) -> nn.Module:
    model, state = sparse(), sparse(1).state_dict()
    state[key] = value
    with accept_dense_state(choice):
        model.load_state_dict(state, strict=strict)
    return model


def _compress(module: Any, **settings: Any) -> None:
    if not callable(module):
        raise TypeError("the test calls it")
    with compress_saved_tensors(**settings):
        y = module(torch.randn(2, 3, 6, 6, requires_grad=True))
    if isinstance(y, Tensor) and y.requires_grad:
        y.sum().backward()


def _freeze(model: Any, calibration: Any, **settings: Any) -> None:
    frozen = freeze(model, calibration, **settings)
    frozen(torch.randn(2, 3, 6, 6))


def _export(frozen: Any, path: Any, coded_sums: Any) -> None:
    export_onnx(frozen, path, coded_sums)


def _saved(frozen: Any, path: Any) -> None:
    save(frozen, path)
    assert isinstance(load(path), FrozenModule)


def _quantize(**settings: Any) -> Tensor:
    x = settings["x"]
    found = dequantize(quantize(**settings))
    assert found.shape == x.shape, (found.shape, x.shape)
    return found


def _attend(**settings: Any) -> Tensor:
    layer = qnn.MultiheadAttention(**settings)
    return layer(*[torch.randn(5, 2, 12)] * 3)


def _infos(state: Any) -> str:
    return format_weights(weight_infos(state))


def _pickled(model: nn.Module) -> None:
    """A layer that was made can be saved, and loaded by another one of its kind."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)


def _made(kind: str) -> Callable[..., nn.Module]:
    def called(**settings: Any) -> nn.Module:
        layer = getattr(qnn, kind)(**settings)
        assert repr(layer)
        layer.to_dense()
        _pickled(layer)
        return layer

    return called


def _run(**settings: Any) -> nn.Module:
    """A model is swapped, and runs."""
    model = qsparseprop.swap_modules_with_sparse(**settings)
    assert str(model.swap_report)
    return model


def _layer_targets() -> dict[str, Target]:
    found: dict[str, Target] = {}
    common = {"bias": "yes", "device": "nothing", "dtype": "nothing", "qconfig": "nothing"}
    linear = {"in_features": "12", "out_features": "9"} | common
    for prefix in ("Sparse", "QuantizedSparse"):
        found[f"{prefix}Linear"] = Target(_made(f"{prefix}Linear"), linear, (*USUAL, RuntimeError))
        found[f"{prefix}Linear.from_dense"] = Target(
            getattr(qnn, f"{prefix}Linear").from_dense, {"linear": "linear layer", "qconfig": "nothing"})  # fmt: skip
        for dims in (1, 2, 3):
            for kind, layer in (("Conv", "conv"), ("ConvTranspose", "convt")):
                name = f"{prefix}{kind}{dims}d"
                sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
                settings = dict.fromkeys(sizes, "one") | common
                found[name] = Target(_made(name), settings, (*USUAL, RuntimeError))
                found[f"{name}.from_dense"] = Target(
                    getattr(qnn, name).from_dense,
                    {"conv": f"{layer}{dims}", "vectorizing_over_on": "nothing", "qconfig": "nothing"},
                )
    for kind, layer in (("Linear", "linear layer"), ("Conv2d", "conv2")):
        of = getattr(qnn, f"FakeQuant{kind}").from_dense
        found[f"FakeQuant{kind}.from_dense"] = Target(of, {kind.rstrip("2d").lower(): layer, "qconfig": "nothing"})
    found["MultiheadAttention.from_dense"] = Target(qnn.MultiheadAttention.from_dense, {"attention": "attention layer"})
    return found


#: Of what runs a model, which may have errors of its own.
RAN = (*USUAL, RuntimeError, NotImplementedError)


def _model_targets() -> dict[str, Target]:
    swap = {"model": "dense", "input_shape": "shape", "inplace": "yes", "verbose": "no", "prototype": "no",
            "quantize": "yes", "skip_modules": "nothing", "min_sparsity": "0.0", "include_dense": "no",
            "qconfig": "nothing", "fuse": "no", "on_layer": "nothing"}  # fmt: skip
    prune = {"model": "dense", "sparsity": "sparsity", "skip": "nothing"}
    gradual = {"model": "sparse", "optimizer": "nothing", "final_sparsity": "0.9", "end_step": "12",
               "begin_step": "one", "interval": "one", "initial_sparsity": "nothing", "scope": "'layer'", "skip": "()"}
    q = qsparseprop
    return {
        "swap_modules_with_sparse": Target(_run, swap, RAN),
        "swap_modules_with_sparse, timed": Target(_run, swap | {"include_dense": "yes"}, RAN),
        "swap_modules_with_dense": Target(q.swap_modules_with_dense, {"model": "sparse", "inplace": "yes"}),
        "swap_modules_for_state": Target(q.swap_modules_for_state, {
            "model": "dense", "state_dict": "sparse state", "quantize": "yes", "qconfig": "nothing", "fuse": "no"}),
        **{f.__name__: Target(f, {"model": "sparse"}) for f in (
            q.unfold_attention, q.fuse_modules, q.unfuse_modules, q.chains, q.sparsity, q.make_pruning_permanent,
            pruning_utils.prunable_modules, pruning_utils.collect_masks)},
        "attach_adapters": Target(q.attach_adapters, {"model": "sparse", "attach": "attach"}, RAN),  # what is attached
        "parameter_groups": Target(q.parameter_groups, {"model": "sparse", "weight_decay": "0.5", "no_decay": "()"}),
        "global_magnitude_prune": Target(q.global_magnitude_prune, prune),
        "layerwise_magnitude_prune": Target(q.layerwise_magnitude_prune, prune),
        "layer_sparsity": Target(pruning_utils.layer_sparsity, {"model": "dense", "names": "names"}),
        "make_mask_enforcer": Target(pruning_utils.make_mask_enforcer, {"model": "dense", "masks": "dict"}),
        "cubic_sparsity": Target(pruning_utils.cubic_sparsity, {
            "step": "one", "initial": "0.0", "final": "0.9", "begin": "0", "end": "12"}),
        "GradualPruner": Target(_with_optimizer(q.GradualPruner), gradual, (*USUAL, NotImplementedError)),
        "apply_further_mask": Target(_remasked, {"mask": "masked", "optimizer": "nothing"},
                                     (*USUAL, NotImplementedError)),
        "regrow": Target(_regrown, {"mask": "masked", "values": "values", "optimizer": "nothing"},
                         (*USUAL, NotImplementedError)),
        "qconfig": Target(_set("qconfig"), {"value": "config"}),
        "product_modes": Target(_set("product_modes"), {"value": "nothing"}),
        "crow_indices": Target(_set("crow_indices"), {"value": "crow"}),
        "weight": Target(_set("weight"), {"value": "sparse values"}, (*USUAL, RuntimeError, NotImplementedError)),
        "load_state_dict": Target(_loads, {"choice": "take", "key": "'weight'", "value": "matrix", "strict": "no"},
                                  (*USUAL, RuntimeError)),
    }  # fmt: skip


def _other_targets() -> dict[str, Target]:
    frozen = {"observer": "zero mean", "per_channel": "yes", "correct_bias": "yes", "keep_float": "()",
              "token_scales": "yes", "example": "nothing", "metric": "nothing"}  # fmt: skip
    tuner = {"model": "dense", "optimizer": "nothing", "scheduler": "nothing", "loss_function": "loss",
             "autocast_dtype": "nothing", "memory_format": "channels_last", "after_step": "nothing",
             "scheduler_per_epoch": "no", "max_grad_norm": "nothing", "forward_context": "nothing",
             "stateful": "nothing"}  # fmt: skip
    fit = {"train_batches": "batches", "epochs": "epochs", "evaluation_batches": "nothing",
           "folder": "yes", "resume": "no", "checkpoint_every": "nothing", "progress": "nothing",
           "time_layers": "0", "report": "nothing"}  # fmt: skip
    quantized = {"x": "matrix", "scheme": "'absmax'", "bits": "8", "group_size": "nothing", "dim": "nothing",
                 "generator": "nothing", "unsigned": "nothing"}  # fmt: skip
    config = dict.fromkeys(QuantConfig.__dataclass_fields__, "nothing") | {
        "weight": "'absmax'", "input": "'absmax'", "grad": "'absmax'", "sawb_nonzeros": "no", "check_finite": "no"}
    return {
        "QuantConfig": Target(lambda **s: QuantConfig(**{k: v for k, v in s.items() if v is not None}), config),
        "QuantizedTensor": Target(lambda **s: dequantize(QuantizedTensor(**s)), {
            "codes": "codes", "scale": "scale", "zero_point": "zero point", "scheme": "'absmax'", "bits": "8",
            "dim": "nothing", "group_size": "nothing"}),
        "quantize": Target(_quantize, quantized),
        "quantize by a scheme's option": Target(
            lambda x, scheme, constants: quantize(x, scheme, bits=4, constants=constants),
            {"x": "matrix", "scheme": "sawb", "constants": "(3.0, 4.0)"}),
        "dequantize": Target(dequantize, {"q": "quantized", "dtype": "torch.float32"}),
        "compress_saved_tensors": Target(_compress, {
            "module": "dense", "scheme": "scheme", "group_size": "512", "min_size": "0"}, RAN, True),
        "CompressedModule": Target(CompressedModule, {
            "module": "dense", "scheme": "scheme", "group_size": "512", "min_size": "0"}),
        "accept_dense_state": Target(lambda choice: accept_dense_state(choice).__enter__(), {"choice": "take"}),
        "Finetuner": Target(_with_optimizer(Finetuner), tuner),
        "Finetuner.fit": Target(_fit, fit, (*USUAL, OSError, NonFiniteLossError, CheckpointError, ImportError), True),
        "Finetuner.load_state_dict": Target(_tuner_loads, {"state": "dict"}, (CheckpointError,)),
        "freeze": Target(_freeze, {"model": "dense", "calibration": "calibration"} | frozen, RAN),
        "save": Target(_saved, {"frozen": "frozen model", "path": "file"}, (*USUAL, OSError)),
        "load": Target(load, {"path": "file"}, (*USUAL, OSError)),
        "export_onnx": Target(_export, {"frozen": "frozen model", "path": "file", "coded_sums": "no"},
                              (*USUAL, OSError)),
        "measure_accuracy": Target(measure_accuracy, {"model": "dense", "batches": "batches", "metric": "'top1'"}, RAN),
        "frozen model": Target(lambda x: Frozen.make()(x), {"x": "images"}, (*USUAL, RecursionError)),
        "read_state_dict": Target(read_state_dict, {"path": "file"}, (*USUAL, OSError)),
        "weight_infos": Target(_infos, {"state": "sparse state"}),
        "saved_for_backward_bytes": Target(measurement_utils.saved_for_backward_bytes, {
            "forward": "run", "model": "nothing"}, RAN),
        "model_costs": Target(measurement_utils.model_costs, {"model": "dense", "example": "shape"}, RAN),
    }  # fmt: skip


def targets() -> dict[str, Target]:
    """By name."""
    return _layer_targets() | _model_targets() | _other_targets()


def consistent(value: Any) -> None:
    """Assert that every sparse weight within is one: pattern, number of values, and what they stand for."""
    for module in value.modules() if isinstance(value, nn.Module) else ():
        if not isinstance(module, SparseWeight) or module.weight.is_meta:
            continue
        mask, weight = module.mask(), module.dense_weight()
        assert mask.shape == weight.shape == tuple(module.weight_shape)
        assert int(mask.sum()) == module.weight.numel() == module.nonzeros
        assert not weight.detach()[~mask].any()


def file_of_this_process() -> Path:
    """What calls that write have written."""
    return Path(GOOD["file"]())
