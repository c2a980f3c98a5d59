"""One training step of common architectures: deferred, computed one by one, and with the same layers unfused."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsparseprop.nn.deferred import one_by_one

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


def distances(masks: dict[str, Tensor]) -> list[Callable[[Any, Any], float]]:
    """Of two steps: of gradients, outputs and running statistics."""
    return [lambda a, b: differential.distance(a, b, masks), differential.output_distance, differential.buffer_distance]


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
        other, exact = (differential.run_step(model, inputs, number) for model in (unfused, dense))
        if any(SMOOTH & set(chain.joined) for chain in step.chains.values()):
            # The least value of these activations lies between the ends. Where nobody has computed the values, a bound
            # that they need not reach is their range, so that the quantisation's steps differ: by its noise, no more.
            for distance in distances(masks):
                assert distance(step, single) <= distance(other, exact) + 0.02
        else:
            assert_same(dict(enumerate(step.outputs)), dict(enumerate(single.outputs)))
            assert_same(step.buffers, single.buffers)
            assert_same(step.gradients, single.gradients)

        assert [(type(y), y.shape, y.dtype, y.stride()) for y in step.outputs] == [
            (type(y), y.shape, y.dtype, y.stride()) for y in other.outputs]  # fmt: skip
        assert step.buffers.keys() == other.buffers.keys()
        for name, buffer in other.buffers.items():
            if not buffer.is_floating_point():
                assert torch.equal(step.buffers[name], buffer), name
        # what quantisation does to the unfused network is what it may do here
        for distance in distances(masks):
            assert distance(step, exact) <= 1.3 * distance(other, exact) + 0.02
