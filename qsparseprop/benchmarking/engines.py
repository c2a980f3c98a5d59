"""Engines that serve dense models in 8 bits, as competitors: ONNX Runtime and OpenVINO, where they are installed.

Both get the same file, the model with per-channel weights as ONNX Runtime's own tools quantise it, since OpenVINO runs
such files in 8 bits, too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Engine", "installed_engines", "quantized_onnx"]

#: Takes a tensor and gives whatever the engine gives.
Engine = Callable[[Tensor], Any]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say to those who develop them."""
    logger = logging.getLogger()
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


def quantized_onnx(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """A model as ONNX in 8 bits, calibrated on an example.

    Parameters
    ----------
    model : torch.nn.Module
        Dense, in eval mode.
    example : Tensor
        A batch; the file takes batches of that size.
    folder : Path

    Returns
    -------
    Path

    Raises
    ------
    ImportError
        Without the packages onnx and onnxruntime.
    """
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OneBatch(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = [{"x": example.numpy()}]

        def get_next(self) -> dict[str, Any] | None:
            return self._left.pop() if self._left else None

    onnxruntime.set_default_logger_severity(3)  # errors; of what it leaves out it would tell in a line each
    plain, quantized = folder / "float.onnx", folder / "int8.onnx"
    with _quiet():
        torch.onnx.export(model, (example,), str(plain), input_names=["x"], dynamo=False, opset_version=17)
        quantize_static(str(plain), str(quantized), OneBatch(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
    return quantized


def _onnx_runtime(path: Path, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def _openvino(path: Path, threads: int) -> Engine:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
    return lambda x: request.infer({0: x.numpy()})


_ENGINES = {"onnxruntime": ("ONNX Runtime int8", _onnx_runtime), "openvino": ("OpenVINO int8", _openvino)}


def installed_engines(model: nn.Module, example: Tensor, threads: int) -> tuple[dict[str, Engine], list[str]]:
    """The engines that can serve a model, and a sentence for each that cannot.

    Parameters
    ----------
    model : torch.nn.Module
        Dense, in eval mode.
    example : Tensor
        A batch of the size that is asked for.
    threads : int

    Returns
    -------
    engines : dict
        By name.
    missing : list of str
    """
    found: dict[str, Engine] = {}
    missing = [f"{title}: the package {package} is not installed" for package, (title, _) in _ENGINES.items()
               if importlib.util.find_spec(package) is None]  # fmt: skip
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return {}, [*missing, "no engine is measured without onnx and onnxruntime, which make the file for both"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = quantized_onnx(model, example, Path(folder))
        except Exception as error:  # exporters refuse in many ways
            return {}, [*missing, f"the model cannot be exported to ONNX: {str(error).strip().splitlines()[0]}"]
        for package, (title, start) in _ENGINES.items():
            if importlib.util.find_spec(package) is not None:
                found[title] = start(path, threads)
    return found, missing
