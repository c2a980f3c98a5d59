"""Files of frozen models that are damaged, forged or of another time: one sentence, and nothing else happens."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from qsparseprop.inference.calls import Name, call_operator, find_operator
from qsparseprop.inference.files import load_program, save_program
from qsparseprop.inference.operators import PURE, is_pure
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import Call, Value
from qsparseprop.utils.errors import ConfigurationError
from tests._frozen_files import WAYS, join_file, split_file
from tests._frozen_programs import PROGRAMS, Builder, small_program

from ._helpers import run_fuzzer, sampled

pytest.importorskip("safetensors", reason="files of frozen models are read by safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_program(small_program(), tmp_path / "model.qsp")
    return tmp_path / "model.qsp"


def step_of(description: Any, kind: str) -> Any:
    return next(step for step in description["program"]["steps"] if step["step"] == kind)


def coded(description: Any) -> Any:
    return next(value for value in description["program"]["values"].values() if "zero_point" in value)


def put(*keys: Any, value: Any, kind: str | None = None) -> Callable[[Any], None]:
    """An edit: in the first step of a kind, or in the description."""

    def edit(description: Any) -> None:
        place = description if kind is None else step_of(description, kind)
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return edit


def put_value(key: str, value: Any) -> Callable[[Any], None]:
    return lambda description: coded(description).update({key: value})


BOMB = [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]
EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "later version": (put("version", value=2), r"version 2 .* reads versions up to 1"),
    "no version": (put("version", value=0), r"'version'.* must be a whole number"),
    "version as text": (put("version", value="1"), r"must be a whole number in .*, not '1'"),
    "other format": (put("format", value="x"), r"it is a 'x', not a 'qsparseprop\.frozen'"),
    "unknown field": (put("more", value=1), r"has 'more', which means nothing"),
    "unknown field of a step": (put("more", value=1, kind="product"), r"step 'v2' has 'more', which means nothing"),
    "unknown step": (put("step", value="eval", kind="add"), r"is of a kind that is not known, 'eval'"),
    "no steps": (put("program", "steps", value={}), r"must be a list"),
    "no inputs": (put("program", "inputs", value=[]), r"must be a list of 1 or more"),
    "input twice": (put("program", "inputs", value=["v0", "v0"]), r"an input comes twice"),
    "input without shape": (put("program", "inputs", value=["v0", "q"]), r"input 'q' has no shape"),
    "unprintable name": (put("program", "outputs", value=["\ud800"]), r"must be a name"),
    "value that nobody makes": (put("program", "values", "q", value={"shape": [1]}), r"nothing computes 'q'"),
    "value without a shape": (lambda d: d["program"]["values"].pop("v2"), r"'v2' computes a value that is not descr"),
    "no rows": (put("program", "values", "v1", "rows", value=0), r"'rows' of 'v1'"),
    "rows": (put("program", "values", "v1", "rows", value=3), r"different numbers of rows"),
    "enormous rows": (put("program", "values", "v1", "rows", value=2**31 - 1), r"(would take|numbers of rows)"),
    "tokens that are images": (put("dynamic", value=True, kind="quantize"), r"features around 128"),
    "step that nobody reads": (put("program", "outputs", value=["v0"]), r"nothing reads"),
    "zero point": (put_value("zero_point", 256), r"'zero_point' of 'v1' .* whole number in \[0, 255\]"),
    "truth for a number": (put_value("zero_point", True), r"not True"),
    "fraction for a number": (put_value("zero_point", 1.0), r"not 1\.0"),
    "negative scale": (put_value("scale", -1.0), r"must be finite, positive"),
    "scale that vanishes": (put_value("scale", 1e-60), r"must be finite, positive"),
    "scale too small": (put_value("scale", 1e-45), r"a scale is too small"),
    "scale too large": (put_value("scale", 1e39), r"finite number of float32"),
    "scales too far apart": (put("program", "values", "v2", "scale", value=1e-44), r"step 'v2': .* too far apart"),
    "enormous channels": (put_value("shape", [2**31 - 1]), r"more than 33,554,432 channels"),
    "enormous image": (put_value("shape", [3, 2**31 - 1, 6]), r"\(channels, height, width\)"),
    "number beyond 64 bits": (put_value("shape", [10**30]), r"whole number"),
    "negative size": (put_value("shape", [-5, 6, 6]), r"whole number"),
    "no kernel": (put("window", "kernel", value=[0, 3], kind="product"), r"'kernel' of 'window' of step 'v2'"),
    "negative kernel": (put("window", "kernel", value=[-3, -3], kind="product"), r"whole number in \[1, 65,536\]"),
    "no stride": (put("window", "stride", value=[0, 1], kind="product"), r"'stride'"),
    "negative padding": (put("window", "padding", value=[-1, 1, 1, 1], kind="product"), r"'padding'"),
    "padding of three": (put("window", "padding", value=[1, 1, 1], kind="product"), r"list of 4"),
    "enormous padding": (put("window", "padding", value=[1 << 16] * 4, kind="product"), r"gives \(4, 131076, 131076\)"),
    "groups": (put("groups", value=7, kind="product"), r"7 groups do not divide"),
    "limits": (put("low", value=3e38, kind="product"), r"limits must be in order"),
    "limit that is text": (put("low", value="0", kind="product"), r"finite number"),
    "nonzeros": (put("weight", "nonzeros", value=7, kind="product"), r"bytes of (low|codes|bits)"),
    "enormous nonzeros": (put("weight", "nonzeros", value=2**31, kind="product"), r"'nonzeros'"),
    "rows of a weight": (put("weight", "rows", value=5, kind="product"), r"5 rows and scales of shape \(4,\)"),
    "columns": (put("weight", "columns", value=28, kind="product"), r"(bytes of|columns)"),
    "no columns": (put("weight", "columns", value=0, kind="product"), r"'columns'"),
    "way": (put("weight", "way", value="zip", kind="product"), r"in a way that is not known, 'zip'"),
    "tensor of another kind": (put("bias", value="v2/weight/codes", kind="product"), r"must be of torch\.float32"),
    "tensor that is not there": (put("bias", value="x", kind="product"), r"the name of a tensor"),
    "tensor of another size": (put("bias", value="v2/weight/scale", kind="product"), r"belongs to nothing"),
    "count padding": (put("count_padding", value=1, kind="pool"), r"true or false"),
    "pool": (put("kind", value="min", kind="pool"), r"max or mean"),
    "enormous pool": (lambda d: (
        step_of(d, "pool")["window"].update(kernel=[1 << 16, 1], stride=[1, 1], padding=[65535, 65535, 0, 0]),
        d["program"]["values"][step_of(d, "pool")["output"]].update(shape=[4, 65541, 6])), r"is too large"),
    "pool of another dilation": (put("window", "dilation", value=[9, 9], kind="pool"), r"gives \(4, "),
    "nested": (put("arguments", value={"tuple": [BOMB]}, kind="call"), r"nested more than"),
    "no data": (put("arguments", value={"tuple": [{"set": []}]}, kind="call"), r"no plain data"),
    "not a tuple": (put("arguments", value=[], kind="call"), r"a tuple"),
    "hidden argument": (put("arguments", value={"tuple": [{"name": "v0"}, 1]}, kind="call"), r"'v0' is not among its"),
    "coded argument": (put("inputs", value=["v8", "v1", "c"], kind="call"), r"\['v1'\], which is coded"),
    "no keywords": (put("keywords", value={"dict": [[1, 2]]}, kind="call"), r"keywords are names"),
    "another namespace": (put("operator", value="prims.add.default", kind="call"), r"not an operator of ATen"),
    "python": (put("operator", value="os.system.default", kind="call"), r"not an operator of ATen"),
    "attribute": (put("operator", value="aten.__class__.mro", kind="call"), r"no operator"),
    "operator of files": (put("operator", value="aten.from_file.default", kind="call"), r"not among the operators"),
    "in place": (put("operator", value="aten.add_.Tensor", kind="call"), r"not among the operators"),
    "about": (put("about", value={"x": 1}), r"no plain data"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edited_descriptions_are_refused(name: str, path: Path) -> None:
    edit, sentence = EDITS[name]
    header, description, data = split_file(path)
    del header["__metadata__"]
    edit(description)
    join_file(path, header, description, data)
    with pytest.raises(ConfigurationError, match=sentence) as error:
        load_program(path)
    assert str(error.value).startswith(f"{path} holds no frozen model: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "sentence"), [
    ("", "no valid JSON"), ("[", "no valid JSON"), ("1", "the description must be an object"),
    ("NaN", "NaN is no number"),
    ("[" * 200_000, "nested too deeply"), ('{"a": 1, "a": 1}', "a key comes twice"), ("9" * 5000, "no valid JSON"),
    ('{"format": Infinity}', "no number"), ('{"format": 1e999}', "must be a name, not inf"),
])  # fmt: skip
def test_what_is_no_description_is_refused(text: str, sentence: str, path: Path) -> None:
    header, _, data = split_file(path)
    del header["__metadata__"]
    join_file(path, header, text, data)
    with pytest.raises(ConfigurationError, match=sentence):
        load_program(path)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "weights")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("a text")
    torch.save({"x": torch.ones(3)}, tmp_path / "pickle")
    for name, sentence in (("weights", "without the description"), ("empty", "it is empty"), (".", "it is a folder"),
                           ("text", "no valid file of safetensors"), ("pickle", "no valid file")):  # fmt: skip
        with pytest.raises(ConfigurationError, match=sentence):
            load_program(tmp_path / name)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigurationError, match="no regular file"):
            load_program(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        load_program(tmp_path / "nothing")


@pytest.mark.parametrize("change", ["another tensor", "dtype", "shape", "larger", "overlap", "swapped"])
def test_tensors_are_what_the_description_says(change: str, path: Path) -> None:
    header, description, data = split_file(path)
    del header["__metadata__"]
    bias = next(entry for name, entry in header.items() if name.endswith("/bias"))
    if change == "another tensor":
        header["more"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
        data += b"\0"
    elif change == "dtype":
        bias["dtype"] = "I32"
    elif change == "shape":
        bias["shape"] = [2, bias["shape"][0] // 2]
    elif change == "larger":
        bias["shape"] = [1 << 40]
    elif change == "overlap":
        bias["data_offsets"] = [0, bias["data_offsets"][1] - bias["data_offsets"][0]]
    else:
        scale = next(entry for name, entry in header.items() if name.endswith("weight/scale"))
        codes = next(entry for name, entry in header.items() if name.endswith("weight/codes"))
        scale["data_offsets"], codes["data_offsets"] = codes["data_offsets"], scale["data_offsets"]
    join_file(path, header, description, data)
    with pytest.raises(ConfigurationError, match=r"holds no frozen model: "):
        load_program(path)


@pytest.mark.parametrize(("kind", "way"), sampled(product(PROGRAMS, WAYS)))
@pytest.mark.parametrize("count", [50])
def test_damaged_files_are_refused_or_run(way: str, kind: str, count: int, tmp_path: Path) -> None:
    """In a process of its own, since kernels walk what is loaded."""
    found = run_fuzzer("_frozen_files", count, count, tmp_path, way, kind)
    assert found["refused"] > 0
    assert sum(found.values()) >= count


def test_memory_that_is_promised_is_not_taken(path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of memory are POSIX's")
    header, description, data = split_file(path)
    del header["__metadata__"]
    # a chain of joined values, each twice as large as the one before
    values, steps = description["program"]["values"], description["program"]["steps"]
    last = "v1"
    for k in range(40):
        shape = [values[last]["shape"][0] * 2, 6, 6]
        values[f"w{k}"] = {"shape": shape, "scale": 1.0, "zero_point": values["v1"]["zero_point"]}
        steps.append({"step": "concat", "inputs": [last, last], "output": f"w{k}"})
        last = f"w{k}"
    join_file(path, header, description, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigurationError, match=r"more than 33,554,432 channels"):
        load_program(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 23


# ---- operators ----


@pytest.mark.parametrize("name", [
    "from_file.default", "empty.memory_format", "empty_like.default", "new_empty.default", "as_strided.default",
    "resize_.default", "set_.source_Tensor", "add_.Tensor", "add.out", "copy_.default", "rand.default",
    "randn_like.default",
    "bernoulli.default", "native_dropout.default", "_local_scalar_dense.default", "_assert_async.default",
    "save.default", "mul.left_t", "max.dim_max", "print.default", "warn.default", "batch_norm_update_stats.default",
])  # fmt: skip
def test_operators_that_do_more_than_compute_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"(not among the operators|has no operator)"):
        find_operator(f"aten.{name}")


def test_operators_that_may_be_called_change_none_of_their_arguments() -> None:
    found = 0
    for name in PURE:
        packet = getattr(torch.ops.aten, name)
        allowed = [
            packet_overload for packet_overload in packet.overloads() if is_pure(name, getattr(packet, packet_overload))
        ]
        for overload in allowed:
            schema = getattr(packet, overload)._schema
            assert not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments), schema
            assert not any(str(a.type) in ("Generator", "Optional[Generator]") for a in schema.arguments), schema
            found += 1
    assert found > 400


def test_operators_that_models_use_may_be_called() -> None:
    x = torch.randn(2, 3, 4)
    values = {"x": x}
    for operator, arguments, keywords in (
        ("aten.softmax.int", (Name("x"), -1), {}), ("aten.scaled_dot_product_attention.default", (Name("x"),) * 3, {}),
        ("aten.layer_norm.default", (Name("x"), [4]), {}), ("aten.masked_fill.Scalar", (Name("x"), True, -1.0), {}),
        ("aten.dropout.default", (Name("x"), 0.5, False), {}), ("aten.mul.int", (3, 4), {}),
        ("aten.sym_size.int", (Name("x"), 0), {}), ("aten.split.Tensor", (Name("x"), 2, 1), {}),
    ):  # fmt: skip
        if operator.startswith("aten.masked"):
            arguments = (Name("x"), Name("mask"), -1.0)
            values["mask"] = x > 0
        call_operator(Call(("x",), "y", operator, arguments, keywords), values)


def test_calls_of_training_are_refused(tmp_path: Path) -> None:
    b = Builder(random.Random(0))
    plain = b.dequantize(b.add_input(3, 4, 4))
    normalised = (Name(plain), None, None, None, None, True, 0.1, 1e-5, False)
    dropped = (Name(plain), 0.5, True)
    for operator, arguments in (("aten.dropout.default", dropped), ("aten.batch_norm.default", normalised)):
        steps = (*b.steps, Call((plain,), "y", operator, arguments))
        program = Program(tuple(b.inputs), ("y",), {**b.values, "y": Value((3, 4, 4))}, steps)
        with pytest.raises(ValueError, match="is one of training"):
            save_program(program, tmp_path / "model.qsp")
