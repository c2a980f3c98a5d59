"""Frozen models for serving: what was trained, swapped or dense, as codes from one layer to the next."""

from qsparseprop.inference.freezing import freeze
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.onnx import export_onnx
from qsparseprop.inference.report import FreezeReport, LayerReport, measure_accuracy
from qsparseprop.inference.saving import load, save

__all__ = ["FreezeReport", "FrozenModule", "LayerReport", "export_onnx", "freeze", "load", "measure_accuracy", "save"]
