"""The benchmarks run and write what they promise. They run on tiny shapes, and nothing here looks at a time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import qsparseprop
from qsparseprop._kernels import _dispatch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not beside the tests")


def run(tmp_path, script, *arguments):
    """Run a script as from a shell, with the package that is being tested; returns its JSON and what it printed."""
    result = tmp_path / "result.json"
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", str(result), *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(result.read_text())
    assert document["arguments"]["quick"] is True
    assert {"cpu", "torch", "qsparseprop", "date", "threads", "huge_pages"} <= set(document["environment"])
    return document, done.stdout


def test_a_race_times_what_is_far_behind_once(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _common

    from qsparseprop.utils import measurement_utils

    clock, calls = [0.0], {}
    monkeypatch.setattr(measurement_utils.time, "perf_counter", lambda: clock[0])

    def competitor(name, group, first, later):
        def step():
            clock[0] += later if name in calls else first
            calls[name] = calls.get(name, 0) + 1

        return _common.Competitor(name, group, step)

    args = SimpleNamespace(quick=False, repeats=7, seconds=0.0)
    result = _common.race([
        competitor("slow start", "dense", 9.0, 1.0), competitor("near", "dense", 1.0, 2.0),
        competitor("far", "dense", 80.0, 6.0), competitor("cold", "dense", 80.0, 0.5),
        competitor("alone", "sparse", 90.0, 90.0),
    ], args)  # fmt: skip
    assert result["once"] == ["far"]
    assert calls == {"slow start": 9, "near": 10, "far": 2, "cold": 9, "alone": 10}
    assert list(result["ms"]) == ["slow start", "near", "far", "cold", "alone"]
    assert result["best"] == {"dense": "cold", "sparse": "alone"}
    assert _common.ms_cells(result) == ["1000", "2000", "6000*", "500.0", "90000"]


def assert_race(result, groups):
    assert set(result["best"]) == groups
    assert set(result["ratio"]) == groups - {"dense"}
    assert set(result["best"].values()) <= set(result["ms"]) == set(result["quartiles_ms"])
    assert all(math.isfinite(ms) for ms in result["ms"].values())


def test_layers(tmp_path):
    arguments = ("--threads", "1", "--sparsity", "0.8", "0.9", "--peers", "--huge-pages")
    document, printed = run(tmp_path, "layers.py", *arguments)
    assert "peers" in document
    assert "asks for them: yes" in document["environment"]["huge_pages"]
    results = document["results"]
    assert [(r["kind"], r["sparsity"]) for r in results] == [
        ("linear", 0.8), ("linear", 0.9), ("conv", 0.8), ("conv", 0.9), ("conv", 0.8), ("conv", 0.9),
    ]  # fmt: skip
    for result in results:
        assert_race(result, {"dense", "int8", "sparse fp32"} | ({"SparseProp"} & set(result["ms"])))
        assert result["layer"] in printed
        formats = ("", " cl") if result["kind"] == "conv" else ("",)
        for name in ("fp32", "bf16", "int8", "sparse fp32"):
            assert {name + suffix for suffix in formats} <= set(result["ms"])
    int8 = [s for s in document["summary"] if s["group"] == "int8"]
    assert [(s["kind"], s["sparsity"], s["layers"]) for s in int8] == [
        ("conv", 0.8, 2), ("conv", 0.9, 2), ("conv 3x3", 0.8, 1), ("conv 3x3", 0.9, 1), ("linear", 0.8, 1),
        ("linear", 0.9, 1),
    ]  # fmt: skip
    assert all(s["minimum"] <= s["geometric_mean"] * (1 + 1e-9) for s in int8)


@pytest.mark.nightly
def test_layers_overhead_and_small_batches(tmp_path):
    document, _ = run(tmp_path, "layers.py", "--threads", "1", "--overhead", "--small-batches")
    (layer,) = document["overhead"]["small_layers"]["1"]
    assert layer["us"]["above"] == layer["us"]["sparse"] - layer["us"]["kernels"]
    assert "results" not in document
    assert set(document["overhead"]["calls"]["1"]) == {"Linear", "QuantizedSparseLinear", "SparseLinear"}
    assert list(document["overhead"]["import_ms"])[:2] == ["torch", "qsparseprop"]
    assert [r["batch"] for r in document["small_batches"]] == [1, 2, 3]


@pytest.mark.nightly
def test_kept(tmp_path):
    document, _ = run(tmp_path, "kept.py", "--threads", "1", "--sparsity", "0.9")
    assert {r["layers"] for r in document["results"]} == {1, 16}
    assert all(ms > 0 for r in document["results"] for ms in r["us"].values())


def test_layers_complains_about_an_unknown_shape(tmp_path):
    with pytest.raises(AssertionError, match="no layer has such a name"):
        run(tmp_path, "layers.py", "--shape", "9x9")


def test_network(tmp_path):
    document, printed = run(tmp_path, "network.py", "--threads", "1", "--sparsity", "0.9", "--sparse-fp32")
    assert [r["network"] for r in document["results"]] == ["cifar", "imagenet", "resnet20"]
    for result in document["results"]:
        assert_race(result, {"dense", "int8", "sparse fp32"})
        assert set(result["ms"]) == {"fp32", "fp32 cl", "bf16", "bf16 cl", "int8 cl", "int8 cl bf16", "fused cl",
                                     "fused cl bf16", "sparse fp32 cl"}  # fmt: skip
        assert result["network"] in printed


@pytest.mark.nightly
def test_network_profile(tmp_path):
    document, _ = run(tmp_path, "network.py", "--threads", "1", "--sparsity", "0.9", "--only", "imagenet", "--profile")
    (profile,) = document["profiles"]
    assert profile["setting"] == "int8 cl"
    rows = profile["rows_ms"]
    both_ways = {"quantize_pack", "quantize_weight", "spmm", "BatchNorm", "ReLU", "pooling", "dense convolution",
                 "dense Linear", "loss", "add"}  # fmt: skip
    assert {name for name, row in rows.items() if row["forward"] and row["backward"]} >= both_ways
    assert rows["sddmm"]["backward"]
    assert not rows["sddmm"]["forward"]
    assert rows["optimizer"]["update"]


def test_kernels(tmp_path):
    document, printed = run(tmp_path, "kernels.py", "--threads", "1")
    isas = set(_dispatch.supported_isas()) - {"amx_model"}
    measured = {}
    for result in document["results"]:
        measured.setdefault((result["case"].split()[0], result["kernel"]), set()).add(result["isa"])
        assert math.isfinite(result["rate"])
        assert (result["share"] is None) == (result["of"] not in document["peaks"].get("1", {}))
    packing = {"range", *(f"quantize_pack {name}" for name in ("absmax", "stochastic", "dithered", "channels"))}
    products = {f"{kind} {name}" for kind in ("int8", "fp32") for name in ("spmm", "spmm, input grad", "sddmm")}
    expected = {("packing", name) for name in packing}
    expected |= {(case, name) for case in ("linear", "conv") for name in packing | products | {"quantize_weight"}}
    assert measured == dict.fromkeys(expected, isas)
    assert "peaks of 1 thread" in printed or "shares are left out" in printed
    assert {row["isa"] for row in document["rounding"]} == isas - {"scalar"}
    assert all(row["relative"]["absmax"] == 1 for row in document["rounding"])


def test_kernels_need_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    document, printed = run(tmp_path, "kernels.py", "--threads", "1", "--isa", "scalar", "--shape", "packing")
    assert "shares are left out" in printed
    assert document["peaks"] == {}
    assert all(result["share"] is None for result in document["results"])


@pytest.mark.nightly
def test_accuracy(tmp_path):
    """On the digits, which need no data from elsewhere; a second start finds everything done."""
    result = tmp_path / "result.json"
    arguments = ("--cases", "digits mlp 90", "--settings", "fp32 masked dense", "default", "ancestor")
    document, printed = accuracy(result, arguments)
    assert [(run["case"], run["setting"]) for run in document["runs"]] == [
        ("digits mlp 90 %", "fp32 masked dense"), ("digits mlp 90 %", "default"), ("digits mlp 90 %", "ancestor"),
    ]  # fmt: skip
    assert document["summary"][0]["ratio"] == 1.0
    assert printed.count("seed 0") == 3
    again, printed = accuracy(result, arguments)
    assert again["runs"] == document["runs"]
    assert "seed 0" not in printed


def accuracy(result, arguments, script="accuracy.py"):
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", str(result), *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text()), done.stdout


@pytest.mark.nightly
def test_frozen_accuracy(tmp_path):
    """On the digits; a second start finds everything done."""
    result = tmp_path / "result.json"
    arguments = ("--cases", "digits mlp 90", "--settings", "default", "per tensor")
    document, printed = accuracy(result, arguments, "frozen_accuracy.py")
    assert [(run["case"], run["setting"]) for run in document["runs"]] == [
        ("digits mlp 90 %", "default"), ("digits mlp 90 %", "per tensor")]  # fmt: skip
    for run in document["runs"]:
        assert run["loss"] == run["before"] - run["after"]
        assert abs(run["loss"]) <= 1
        assert all(layer["quantised"] for layer in run["layers"])
        assert 0.2 < run["zeros"] < 0.9
    assert "points lost" in printed
    again, printed = accuracy(result, arguments, "frozen_accuracy.py")
    assert again["runs"] == document["runs"]
    assert "->" not in printed


@pytest.mark.nightly
def test_dense_int8(tmp_path):
    """On what needs no data from elsewhere; a second start finds everything done."""
    result = tmp_path / "result.json"
    arguments = ("--cases", "digits mlp", "text", "--threads", "1", "--settings", "fp32", "int8, first fp32", "int8")
    document, _ = accuracy(result, arguments, "dense_int8.py")
    cases, settings = ("digits mlp", "text transformer"), ("fp32", "int8, first fp32", "int8")
    assert [(r["case"], r["setting"]) for r in document["runs"]] == [(c, s) for c in cases for s in settings]
    assert len({r["loss"] for r in document["runs"]}) == 6
    for row in document["summary"]:
        assert row["seeds"] == 1
        assert abs(row["loss_percent"]) < 5
        assert (row["loss_difference"] == 0) == (row["setting"] == "fp32")
    again, printed = accuracy(result, arguments, "dense_int8.py")
    assert again["runs"] == document["runs"]
    assert "seed 0" not in printed
    assert "points from fp32" in printed


def results(tmp_path, *arguments):
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    folders = ("--work", str(tmp_path / "runs"), "--docs", str(tmp_path))
    command = [sys.executable, str(BENCHMARKS / "results.py"), *arguments, "--quick", "--seeds", "1", *folders]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
                          timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "results" / f"{arguments[0]}.json").read_text())
    page = (tmp_path / "results.md").read_text()
    assert f"## {arguments[0]}" in page
    assert str(tmp_path) not in page + json.dumps(document)
    ((sparsity, part),) = document["parts"].items()
    name = f"{arguments[0]}-{100 * float(sparsity):g}.png"
    assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert f"](results/{name})" in page
    assert set(part["curves"]) == {"dense", "int8"}
    assert set(part["step_ms"]) == set(part["added_mb"]) == {"fp32", "best", "int8"}
    return document, page, done.stdout


@pytest.mark.nightly
def test_results_of_whole_trainings_become_a_page(tmp_path):
    """On the digits, which need no data from elsewhere; a second start finds everything done."""
    document, page, printed = results(tmp_path, "digits")
    assert printed.count("of 2 after") == 2
    assert document["model"] in page
    for curve in document["parts"]["0.9"]["curves"].values():
        assert [step for step, _ in curve["1"]] == [0, 22, 44]
    _, again, printed = results(tmp_path, "digits", "--parts", "train", "page")
    assert "after" not in printed
    assert again == page


@pytest.mark.nightly
def test_results_of_a_language_model(tmp_path):
    document, page, _ = results(tmp_path, "text")
    assert document["by_loss"]
    assert "| loss |" in page


def test_what_the_page_of_results_says(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _results_page

    curves = {"dense": {"1": [[0, 10.0], [5, 80.0], [10, 90.0]], "2": [[0, 10.0], [5, 91.0], [10, 92.0]]},
              "int8": {"1": [[0, 10.0], [5, 90.8], [10, 91.0]], "2": [[0, 10.0], [5, 80.0], [10, 91.0]]}}  # fmt: skip
    part = {"curves": curves, "step_ms": {"fp32": 100.0, "best": 50.0, "int8": 20.0}, "added_mb": {}}
    summary = _results_page.summarise(part, by_loss=False)
    assert summary["int8"]["ratio"] == 1.0
    assert summary["int8"]["difference"] == 0.0
    assert summary["int8"]["error"] == pytest.approx(1.0)  # of the differences 1 and -1
    # the means of the masked ones are 85.5 and 91, ours 85.4 and 91: 99.7 % of 91 are there after 10 steps
    assert (summary["dense"]["seconds"], summary["dense"]["best_seconds"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert summary["int8"]["seconds"] == pytest.approx(0.2)
    curves["int8"]["2"][1][1] = 91.0
    assert _results_page.summarise(part, by_loss=False)["int8"]["steps"] == 5
    # a seed that only one of them has is no part of a comparison
    more = {**curves, "int8": {**curves["int8"], "3": [[0, 10.0], [5, 99.0], [10, 99.0]]}}
    assert _results_page.summarise({**part, "curves": more}, by_loss=False)["int8"]["ratio"] == 1.0
    losses = {kind: {"1": [[0, 3.0], [5, loss]]} for kind, loss in (("dense", 2.0), ("int8", 2.01))}
    summary = _results_page.summarise({**part, "curves": losses}, by_loss=True)
    assert summary["int8"]["ratio"] == pytest.approx(2 / 2.01)
    assert summary["int8"]["steps"] is None  # 2 / 0.997 is 2.006


@pytest.mark.nightly
def test_gradients(tmp_path):
    document, printed = run(tmp_path, "gradients.py")
    kinds = ["bf16", "int8", "int8 in blocks", "int8, bf16", "int8 in blocks, bf16"]
    parts = ("sparse", "others")
    [measured] = document["results"]
    assert list(measured["tested"]) == ["fp32", *kinds]
    assert all(0 < row["top1"] < 100 and row["loss"] > 0 for row in measured["tested"].values())
    assert [(r["part"], r["kind"]) for r in measured["gradients"]] == [(part, kind) for part in parts for kind in kinds]
    for result in measured["gradients"]:
        assert f"{result['part']}, {result['kind']}" in printed
        assert 0.001 < result["error"] < 1
        assert result["bias"] < 3 * result["noise"]
        assert abs(result["slope"]) < 0.3 < result["batches"]


@pytest.mark.nightly
def test_saved(tmp_path):
    document, printed = run(tmp_path, "saved.py", "--threads", "1")
    assert [r["kind"] for r in document["results"]] == ["dense", "dense cl", "swapped cl", "blocks cl"]
    for result in document["results"]:
        assert result["kind"] in printed
        dense = result["kind"].startswith("dense")
        compressed = result["kind"] != "blocks cl"  # in the small network's blocks nothing is left to compress
        assert (result["kept_mb"] < result["saved_mb"]) == (result["error"] > 0) == compressed
        assert result["error"] < (0.02 if dense else 0.1)
        assert result["mean_error"] is None if dense else (result["mean_error"] > 0) == compressed
        assert dense or result["mean_error"] < 0.02


@pytest.mark.nightly
def test_weights_memory(tmp_path):
    document, printed = run(tmp_path, "weights_memory.py", "--sparsity", "0.8")
    (result,) = document["results"]
    assert result["nonzeros"] == 256 * 256 - round(0.8 * 256 * 256)
    assert set(result["mb"]) == set(result["peak_mb"]) == {"dense", "chosen", "lists", "dense rows"}
    assert "80 %" in printed
    # what no product asks for is not made
    assert result["rows"]["dense"] == []
    assert result["rows"]["lists"] == ["backward", "forward"]
    assert result["rows"]["dense rows"] == ["dense_backward", "dense_forward"]


@pytest.mark.nightly
def test_language_model(tmp_path):
    document, printed = run(tmp_path, "language_model.py", "--threads", "1", "--sparsity", "0", "0.9")
    layers = {"qkv", "proj", "mlp.0", "mlp.2", "head"}
    for result, sparsity in zip(document["results"], (0.0, 0.9), strict=True):
        assert result["sparsity"] == sparsity
        assert_race(result, {"dense", "int8", "fused"})
        assert set(result["ms"]) - {"fp32 oneDNN"} == {"fp32", "bf16", "int8", "int8 bf16", "fused", "fused bf16"}
        assert result["saved_mb"]["fused"] < result["saved_mb"]["int8"]
        for products in result["products"].values():
            assert set(products) == layers
            assert {way for ways in products.values() for way in ways.split("/")} <= {"list", "dense"}
    assert "fused: qkv" in printed
    parameters = [(m["dense"]["parameters"], m["sparse"]["parameters"]) for m in document["memory"]]
    assert parameters[0][0] == parameters[0][1] == parameters[1][0] > 3 * parameters[1][1]


@pytest.mark.nightly
def test_language_model_profile(tmp_path):
    arguments = ("--threads", "1", "--sparsity", "0.5", "--profile", "int8")
    document, _ = run(tmp_path, "language_model.py", *arguments)
    (profile,) = document["profiles"]
    assert "memory" not in document
    for name in ("LayerNorm", "GELU", "attention", "quantize_pack", "spmm"):
        assert profile["rows_ms"][name]["forward"], name
        assert profile["rows_ms"][name]["backward"], name


def test_mlp(tmp_path):
    document, printed = run(tmp_path, "mlp.py", "--threads", "1", "--sparsity", "0.9")
    assert [r["network"] for r in document["results"]] == ["mlp gelu", "mlp relu", "gated", "vit"]
    for result in document["results"]:
        assert result["network"] in printed
        assert list(result["ms"]) == ["fp32", "bf16", "int8", "fused"]
        assert result["saved_mb"]["fused"] < result["saved_mb"]["int8"]


@pytest.mark.nightly
def test_mlp_profile(tmp_path):
    arguments = ("--threads", "1", "--sparsity", "0.9", "--only", "gated", "vit", "--profile", "int8")
    document, _ = run(tmp_path, "mlp.py", *arguments)
    gated, vit = (profile["rows_ms"] for profile in document["profiles"])
    for rows, names in ((gated, {"gates"}), (vit, {"LayerNorm", "GELU", "attention"})):
        for name in names | {"quantize_pack", "spmm"}:
            assert rows[name]["forward"], name
            assert rows[name]["backward"], name


@pytest.mark.nightly
def test_gradual(tmp_path):
    document, printed = run(tmp_path, "gradual.py")
    names = [r["name"] for r in document["runs"]]
    assert names == ["dense with masks, fp32", "dense with masks, bf16", "qsparseprop int8"]
    for result in document["runs"]:
        assert result["name"] in printed
        assert result["zeros"] == pytest.approx(0.95, abs=1e-3)
        assert len(result["top1"]) == 3


def test_inference(tmp_path):
    document, printed = run(tmp_path, "inference.py", "--cases", "2", "--threads", "1", "--sparsity", "0.9")
    for result in document["results"]:
        assert result["case"] == "Linear 1024 -> 4096"
        assert result["ratio"] == pytest.approx(result["ms"][result["best"]] / result["ms"]["frozen"])
        assert result["best"] != "frozen"
    assert "Linear 1024" in printed


def test_streaming(tmp_path):
    """A second start finds the images."""
    pytest.importorskip("PIL")
    folder = tmp_path / "images"
    arguments = ("--folder", str(folder), "--workers", "1", "--threads", "1")
    document, printed = run(tmp_path, "streaming.py", *arguments)
    assert len(list(folder.glob("train/class?/*.jpg"))) == 60
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*.jpg")}
    (result,) = document["results"]
    assert (result["threads"], result["workers"]) == (1, 1)
    assert result["pass"]["images"] == 60
    (trained,) = result["train"]
    assert trained["steps"] == len(trained["losses"]) == 10
    assert all(math.isfinite(loss) for loss in trained["losses"])
    assert 0 <= trained["wait_share"] <= 1
    for memory in (result["pass"]["memory"], trained["memory"]):
        assert len(memory) == 10
        if sys.platform == "linux":
            assert all(row["mb"] > 0 and row["workers_mb"] > 0 for row in memory)
    assert "% of the time waiting for data" in printed
    again, _ = run(tmp_path, "streaming.py", *arguments, "--only", "pass")
    assert "train" not in again["results"][0]
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*.jpg")} == written
