"""One training step of common architectures: deferred, computed one by one, and with the same layers unfused."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsparseprop.nn.deferred import one_by_one

from ._helpers import relative_error

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks, which know the architectures, are not beside the tests", allow_module_level=True)


def load(name: str) -> Any:
    """A module of the benchmarks' folder."""
    spec = importlib.util.spec_from_file_location(f"benchmarks{name}", BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo, differential = load("_architectures"), load("_differential")

#: Those of large packages that take less than a few seconds; others wait for the night.
QUICK = {"squeezenet1_1", "mobilenet_v2", "shufflenet_v2_x0_5", "vit", "tf_efficientnet_lite0"}

SMOOTH = {"GELU", "SiLU", "Hardswish"}

pytestmark = pytest.mark.filterwarnings("ignore")  # what other packages use is their own affair


def architectures() -> list[Any]:
    return [pytest.param(a, id=f"{a.package}-{a.name}", marks=() if a.package in ("qsparseprop", "transformers")
                         or a.name in QUICK else pytest.mark.nightly) for a in zoo.ARCHITECTURES]  # fmt: skip


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_there_are_architectures_of_many_kinds():
    assert len(zoo.ARCHITECTURES) >= 25
    names = [(a.package, a.name) for a in zoo.ARCHITECTURES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("architecture", architectures())
def test_chains_change_nothing(architecture):
    if not architecture.available:
        pytest.skip(f"needs {architecture.package}")
    dense = differential.pruned(architecture.make)
    inputs = architecture.inputs()
    unfused, fused = (differential.swapped(dense, fuse) for fuse in (False, True))
    stepwise = copy.deepcopy(fused)
    masks = differential.existing(fused)
    for number in range(2):  # the second step knows what became of results in the first one
        step = differential.run_step(fused, inputs, number)
        with one_by_one():
            single = differential.run_step(stepwise, inputs, number)
        # where nobody has computed the values, bounds of them are their range: with a smooth activation, whose least
        # value is between the ends, these are not reached, and the quantisation's steps differ
        smooth = any(SMOOTH & set(chain.joined) for chain in step.chains.values())
        assert len(step.outputs) == len(single.outputs) > 0
        if smooth:
            for mine, theirs in zip(step.outputs, single.outputs, strict=True):
                assert relative_error(mine, theirs) <= 0.05
            assert differential.buffer_distance(step, single) <= 0.05
            assert differential.distance(step, single, masks) <= 0.05
        else:
            assert_same(dict(enumerate(step.outputs)), dict(enumerate(single.outputs)))
            assert_same(step.buffers, single.buffers)
            assert_same(step.gradients, single.gradients)

        other, exact = (differential.run_step(model, inputs, number) for model in (unfused, dense))
        assert [(type(y), y.shape, y.dtype, y.stride()) for y in step.outputs] == [
            (type(y), y.shape, y.dtype, y.stride()) for y in other.outputs]  # fmt: skip
        assert step.buffers.keys() == other.buffers.keys()
        for name, buffer in other.buffers.items():
            if not buffer.is_floating_point():
                assert torch.equal(step.buffers[name], buffer), name
        # what quantisation does to the unfused network is what it may do here
        noise = differential.distance(other, exact, masks)
        assert differential.distance(step, exact, masks) <= 1.3 * noise + 0.02
        assert differential.buffer_distance(step, exact) <= 1.3 * differential.buffer_distance(other, exact) + 0.02
