"""Frozen models for serving: what was trained, swapped or dense, as codes from one layer to the next."""

from qsparseprop.inference.freezing import freeze
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.report import FreezeReport, LayerReport, measure_accuracy

__all__ = ["FreezeReport", "FrozenModule", "LayerReport", "freeze", "measure_accuracy"]
