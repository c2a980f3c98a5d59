"""Gives every operator that torch knows of qsparseprop nonsense, by torch's dispatcher and by the way past it.

Run by test_ops_arguments in a process of its own, as a module of this package: an access beyond a tensor ends it.
Arguments: seed, number of calls of each operator on each instruction set.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import random
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch

from qsparseprop import ops
from qsparseprop._kernels import _dispatch, _epilogue, _matmul, _norm, _pack, _plan, _quantize, _statistics
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.nn._traced import config_text, sparse_layer, sparse_layer_backward
from qsparseprop.ops import epilogues, layers, masks, normalisation, products, quantization, transpose
from qsparseprop.quantization import QuantConfig

from ._fuzz import corrupt, describe, end_after, guard, valid_quantizations, valid_rows
from ._guarded import GuardedTorch, guarded_copy, guarded_empty

Call = tuple[ops.Operator, list[Any]]
#: Bytes that a call may ask for beyond what the process has, or is refused by the system.
MEMORY = 4 << 30
CONFIGS = [None, QuantConfig(), QuantConfig(granularity="tensor", input="sawb", weight="sawb", grad="luq"),
           QuantConfig(grad_weight="float32", check_finite=True)]  # fmt: skip


class Guarded(GuardedTorch):
    """What results are made like is guarded, too."""

    @staticmethod
    def empty_like(tensor: torch.Tensor) -> torch.Tensor:
        return guarded_copy(tensor)


def registered() -> set[str]:
    """Operators of ``torch.ops.qsparseprop``, once everything is imported that registers any."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.removeprefix("qsparseprop::") for name in names if name.startswith("qsparseprop::")}


def valid_masks() -> Iterator[Call]:
    for shape in ((5, 37), (2, 3, 4, 5), (16,), (1, 129), (0, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
            yield ops.relu_mask, [x]
            yield ops.relu_mask_, [x]
            yield ops.keep_masked, [x, ops.relu_mask(x)[1]]
            if x.ndim == 2:
                yield ops.transpose, [x, 1, *shape]
    yield ops.transpose, [torch.randn(3, 17, 40), 3, 17, 40]


def valid_layers() -> Iterator[Call]:
    """Of layers as graphs have them."""
    for geometry, shape, groups in (
        (linear_geometry(20, 30), (70, 20, 1, 1), 1), (linear_geometry(20, 30, True), (5, 30, 1, 1), 1),
        (conv_geometry(4, 18, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 5, False), (5, 4, 6, 5), 2),
        (conv_geometry(4, 18, (3, 4, 5), (2, 3, 2), (2, 1, 2), (1, 1, 1, 1, 0, 1), (1, 1, 1), 3, False),
         (3, 4, 12, 5), 1),
    ):  # fmt: skip
        rows, columns = geometry.output_grid.planes, geometry.in_channels // groups * len(geometry.tap_shift)
        crow, col, _ = dense_pattern(torch.rand(rows, columns) < 0.3)
        values, outputs = torch.randn(col.numel()), geometry.in_channels if geometry.transposed else rows
        for config in CONFIGS:
            for dtype in (torch.float32, torch.bfloat16):
                x, text = torch.randn(shape).to(dtype), config_text(config)
                rest = [crow, col, list(geometry.numbers), groups, text]
                forward = [x, values, torch.randn(outputs), *rest, dtype]
                y, *packed = sparse_layer(*forward)
                yield sparse_layer, forward
                if config is None or config.grad_weight == "float32":
                    packed = [packed[0], None, None]
                dy = torch.randn(y.shape).to(dtype)
                yield sparse_layer_backward, [dy, values, *packed, *rest, list(shape), [True] * 3, dtype]


def corrupted(argument: Any) -> Any:
    """As in `_fuzz`, and texts that were almost a configuration."""
    if isinstance(argument, str) and argument.startswith("{"):
        place, new = random.randrange(len(argument)), random.choice(["", "0", "-", "}", "null", '"', "1e999", "é"])
        if random.random() < 0.5:  # one setting
            settings = json.loads(argument)
            values = [None, -1, 1e300, "absmax", "luq", [], [0.5, 0.5]]
            settings[random.choice([*settings, "unknown"])] = random.choice(values)
            return json.dumps(settings)
        return argument[:place] + new + argument[place + random.randrange(3) :]
    return corrupt(argument)


def main() -> None:
    seed, calls = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable()
    sanitized = bool(os.environ.get("QSPARSEPROP_SANITIZED"))  # which takes its time, and terabytes of addresses
    end_after(200)
    torch.set_num_threads(1 + seed % 2)
    random.seed(seed)
    torch.manual_seed(seed)
    if not sanitized:
        with open("/proc/self/statm") as file:
            has = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
    families = products, layers, quantization, normalisation, epilogues, masks
    for module in (*families, _plan, _matmul, _pack, _quantize, _norm, _epilogue, _statistics):
        module.torch = Guarded()
    for module in (products, layers, quantization, epilogues, masks, sys.modules[transpose.function.__module__], _pack):
        module.empty = guarded_empty
    valid: dict[str, list[Call]] = collections.defaultdict(list)
    for op, arguments in (*valid_quantizations(), *valid_rows(), *valid_masks(), *valid_layers()):
        if isinstance(op, ops.Operator):
            valid[op.overload._schema.name.removeprefix("qsparseprop::")].append((op, arguments))
    assert valid.keys() == registered(), f"no nonsense is given to {registered() - valid.keys()}"

    refused, accepted = collections.Counter[str](), collections.Counter[str]()
    for isa in _dispatch.supported_isas():
        _dispatch.set_isa(isa)
        for name, known in sorted(valid.items()):
            for number in range(calls):
                op, arguments = random.choice(known)
                arguments = list(arguments)
                for _ in range(random.choice([1, 1, 1, 2])):
                    place = random.randrange(len(arguments))
                    arguments[place] = corrupted(arguments[place])
                print(isa, name, *map(describe, arguments), sep="\n  ", flush=True)
                try:
                    (op.overload if number % 2 else op)(*map(guard, arguments))
                except Exception as error:  # which kind is checked elsewhere; here it matters that there is one
                    refused[name] += 1
                    print(repr(error))
                else:
                    accepted[name] += 1
    assert refused.keys() == valid.keys(), f"nothing was refused by {valid.keys() - refused.keys()}"
    print("done:", json.dumps({"operators": len(valid), "refused": refused.total(), "accepted": accepted.total()}))


if __name__ == "__main__":
    main()
