"""Graphs of ONNX: nodes one after the other, with names and constants of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.checker
from onnx import helper, numpy_helper, shape_inference

from qsparseprop._version import __version__
from qsparseprop.utils.errors import ConfigurationError

__all__ = ["OPSET", "Graph"]

#: ONNX Runtime reads it since 1.14.
OPSET, _IR = 18, 8


class Graph:
    """A graph that grows node by node."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._held: list[Any] = []
        self._names: set[str] = set()
        self._inputs: list[Any] = []

    def fresh(self, name: str) -> str:
        """A name that nothing has yet, this one if possible."""
        found, count = name, 1
        while found in self._names:
            found, count = f"{name}/{count}", count + 1
        self._names.add(found)
        return found

    def add_input(self, name: str, shape: Sequence[int | None], dtype: int = onnx.TensorProto.FLOAT) -> str:
        """A tensor that the graph is given, with None for a batch of any size and -1 for any other size."""
        sizes = ["batch" if n is None else None if n < 0 else n for n in shape]
        self._inputs.append(helper.make_tensor_value_info(self.fresh(name), dtype, sizes))
        return name

    def constant(self, array: Any, name: str) -> str:
        """A tensor of the graph; one of the same content is there once."""
        held = np.ascontiguousarray(array)
        held = held.reshape(np.shape(array))  # of no dimensions it would get one
        key = str(held.dtype), held.shape, held.tobytes()
        if key not in self._constants:
            self._constants[key] = self.fresh(name)
            self._held.append(numpy_helper.from_array(held, self._constants[key]))
        return self._constants[key]

    def add(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node with one result, which gets this name or one like it."""
        output = self.fresh(name)
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def add_all(self, operator: str, inputs: list[str], names: list[str], **attributes: Any) -> list[str]:
        """A node with several results, which get these names or ones like them."""
        outputs = [self.fresh(name) for name in names]
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        """The graph as a model, checked.

        Parameters
        ----------
        outputs : list of str
            The results, whose shapes ONNX infers.

        Returns
        -------
        onnx.ModelProto

        Raises
        ------
        ConfigurationError
            If onnx refuses it, as where operators of torch take dtypes that those of ONNX do not.
        """
        results = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self._nodes, "qsparseprop", self._inputs, results, self._held)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR,
                                  producer_name="qsparseprop", producer_version=__version__)  # fmt: skip
        try:
            inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
            del model.graph.output[:]
            model.graph.output.extend(inferred.graph.output)
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(f"onnx refuses what the model is as a graph: {reason}") from error
        return model
