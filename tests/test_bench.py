"""What `bench` refuses, what it concludes from noisy data, and what its pictures show. No time is asserted."""

import itertools
import sys
from dataclasses import asdict

import pytest
from torch import nn

from qsparseprop.benchmarking import bench as bench_module
from qsparseprop.benchmarking.bench import BenchConfig, bench, break_even, parse_layer
from qsparseprop.benchmarking.bench_report import format_table, plot_roofline, plot_speedup
from qsparseprop.cli import main
from qsparseprop.config import usable_processors
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.measurement_utils import Spread

# ---- what follows from a curve ----


def curve(*points, noise=1.05):
    """(sparsity, speed-up), or with a factor of its own by which it may be off."""
    return [(s, Spread(y, y / n, y * n)) for s, y, n in ((*point, noise)[:3] for point in points)]


UNSURE = 1.5


@pytest.mark.parametrize(("points", "sparsity", "above", "up_to", "finding"), [
    # monotone
    ([(0.5, 0.5), (0.9, 2.0)], 0.7, 0.5, 0.9, "pays from 70 % zeros on"),
    ([(0.5, 0.2), (0.8, 0.5), (0.9, 2.0), (0.98, 9.0)], 0.85, 0.8, 0.9, "pays from 85 % zeros on"),
    ([(0.9, 2.0), (0.5, 0.5)], 0.7, 0.5, 0.9, "pays from 70 % zeros on"),  # in any order
    # everything on one side
    ([(0.5, 1.5), (0.9, 2.0)], None, None, 0.5, "pays at every sparsity measured"),
    ([(0.5, 0.5), (0.98, 0.9)], None, 0.98, None, "does not pay up to 98 % zeros"),
    # a drop behind the crossing
    ([(0.9, 0.8), (0.95, 1.4), (0.98, 0.59)], None, 0.98, None,
     "no clear crossing: 1.40x at 95 % zeros, but 0.59x at 98 %"),
    ([(0.9, 1.2), (0.95, 0.8), (0.98, 1.25)], 0.965, 0.95, 0.98, "pays from 96 % zeros on"),
    # noise
    ([(0.8, 0.5), (0.85, 0.9, UNSURE), (0.9, 1.5)], None, 0.8, 0.9,
     "pays from between 80 and 90 % zeros on, within the noise there"),
    ([(0.8, 0.9, UNSURE), (0.9, 1.5)], None, None, 0.9, "pays from 90 % zeros on, within the noise below"),
    ([(0.8, 0.5), (0.9, 0.9, UNSURE)], None, 0.8, None, "does not pay up to 80 % zeros, within the noise above"),
    ([(0.8, 0.5), (0.9, 1.5), (0.95, 1.4, UNSURE)], None, 0.8, None,
     "no clear crossing: within the noise at 95 % zeros"),
    ([(0.8, 1.1, UNSURE), (0.9, 0.9, UNSURE)], None, None, None,
     "no clear crossing: within the noise at 80, 90 % zeros"),
    # a single point
    ([(0.9, 2.0)], None, None, 0.9, "pays at 90 % zeros"),
    ([(0.9, 0.5)], None, 0.9, None, "does not pay up to 90 % zeros"),
    ([(0.9, 1.0)], None, None, None, "no clear crossing: within the noise at 90 % zeros"),
])  # fmt: skip
def test_break_even(points, sparsity, above, up_to, finding):
    found = break_even(curve(*points))
    assert found.sparsity == (pytest.approx(sparsity) if isinstance(sparsity, float) else sparsity)
    assert (found.above, found.up_to, found.finding) == (above, up_to, finding)


def test_every_curve_has_a_finding_that_does_not_say_too_much():
    for sides in itertools.chain.from_iterable(itertools.product((-1, 0, 1), repeat=n) for n in range(1, 6)):
        found = break_even(curve(*((0.1 * (i + 1), 2.0**side) for i, side in enumerate(sides))))
        assert ("pays from" in found.finding or "pays at" in found.finding) == (sides[-1] == 1), sides
        if found.sparsity is not None:
            assert found.above < found.sparsity < found.up_to
        assert ("does not pay" in found.finding) == (1 not in sides and -1 in sides), sides


@pytest.mark.parametrize("points", [[], [(0.5, 1.0), (0.5, 2.0)]])
def test_break_even_of_nothing(points):
    with pytest.raises(ValueError, match="needs points"):
        break_even(curve(*points))


def test_break_even_of_nonsense():
    for spread in (Spread(1.0, 1.1, 2.0), Spread(0.0, 0.0, 0.0), Spread(float("nan"), 1.0, 1.0)):
        with pytest.raises(ValueError, match="positive, within their spread"):
            break_even([(0.5, spread)])


# ---- what is refused before anything is measured ----


def own_model(in_channels, image_size):
    raise KeyError("no such thing")


def failing_model(in_channels, image_size):
    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError("squares only\nreally")

    return Fails()


def reflecting_model(in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1, padding_mode="reflect"))


IMAGES = "takes images, batch,channels,height,width, like 64,3,32,32"
CONV = "Conv2d(4, 8, 3"
REFUSED = [
    (["--input", "64,3"], "--input is the shape for a --layer or a --model: name one, like"),
    (["--model", "resnet18", "--input", "64,3"], IMAGES),
    (["--model", "mlp", "--input", "64,3,8"], IMAGES),
    (["--model", "mlp", "--input", "4,3,8,9"], "takes square images"),
    (["--model", "vgg11", "--input", "4,3,8,8"], "cannot take an input of shape 4x3x8x8"),
    (["--model", "vit-tiny", "--input", "4,3,9,9"], "multiple of 4"),
    (["--model", "test_bench:failing_model", "--input", "4,3,9,9"], "cannot take an input of shape 4x3x9x9: squares"),
    (["--model", "test_bench:reflecting_model", "--by-layer", "--input", "4,3,9,9"], "no layer that can be sparse"),
    (["--layer", f"{CONV})", "--input", "64,4"], "expects (batch, 4, 2 sizes)"),
    (["--layer", f"{CONV})", "--input", "64,3,8,8"], "expects (batch, 4, 2 sizes)"),
    (["--layer", f"{CONV})", "--input", "64,4,2,2"], "smaller than the kernel"),
    (["--layer", f"{CONV}, groups=3)", "--input", "64,4,8,8"], "divisible by groups"),
    (["--layer", f"{CONV}, stride=0)", "--input", "64,4,8,8"], "must be 2 positive sizes"),
    (["--layer", f"{CONV}, dilation=0)", "--input", "64,4,8,8"], "must be 2 positive sizes"),
    (["--layer", f"{CONV}, padding=-1)", "--input", "64,4,8,8"], "negative padding"),
    (["--layer", f"{CONV}, padding=1, padding_mode='reflect')", "--input", "64,4,8,8"], "padding_mode='reflect'"),
    (["--layer", f"{CONV}, device='meta')", "--input", "64,4,8,8"], "leave out device and dtype"),
    (["--layer", "Conv2d(4, 8, (3, 3, 3))", "--input", "64,4,8,8"], "with an input of shape 64x4x8x8"),
    (["--layer", "Conv1d(4, 8, 3)", "--input", "64,4,8,8"], "expects (batch, 4, 1 sizes)"),
    (["--layer", "Conv1d(4, 8, 3)", "--input", "64"], "expects (batch, 4, 1 sizes)"),
    (["--layer", "Conv2d(4, 8, 0)", "--input", "64,4,8,8"], "has no weights"),
    (["--layer", "Linear(0, 8)", "--input", "64,8"], "has no weights"),
    (["--layer", "Linear({[]: 1}, 8)", "--input", "64,8"], "is no layer"),
    (["--layer", "Linear(" + "-" * 5000 + "1, 8)", "--input", "64,8"], "is no layer"),
    (["--layer", f"Linear({10**30}, 8)", "--input", "64,8"], "Overflow"),
    (["--layer", "Linear(10000000, 10000000)", "--input", "64,10000000"], "more than half of the memory"),
    (["--layer", "Conv2d(1, 1, 1000000)", "--input", "1,1,1000000,1000000"], "more than half of the memory"),
    (["--layer", "Linear(8, 8)", "--input", "100000000000,8"], "more than half of the memory"),
    (["--model", "mlp", "--input", "1,3,200000,200000"], "more than half of the memory"),
    (["--model", "mlp", "--input", "1,3,20000,20000"], "more than half of the memory"),
    (["--model", "resnet18", "--input", "3000000,3,32,32"], "more than half of the memory"),
    (["--layer", "Linear(8, 8)", "--input", "64,8", "--sparsity", "0.999"], "at 99.9 % zeros nothing is left"),
    (["--model", "mlp", "--input", "4,3,8,8", "--sparsity", "0.99999999"], "nothing is left"),
    (["--layer", "Linear(8, 8)", "--input", "64,8", "--sparsity", "1"], "--sparsity: must lie between"),
    (["--layer", "Linear(8, 8)", "--input", "64,8", "--threads", "100000"], "threads would wait for each other"),
    (["--layer", "Linear(8, 8)", "--input", "64,0"], "must be positive"),
]


@pytest.mark.parametrize(("arguments", "complaint"), REFUSED, ids=lambda value: None if isinstance(value, str) else
                         " ".join(value)[:60])  # fmt: skip
def test_what_cannot_be_measured_is_refused_first(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "test_bench", sys.modules[__name__])
    monkeypatch.setattr(bench_module, "_measure", lambda *a: pytest.fail("was measured"))
    # a machine of a size that is the same everywhere
    monkeypatch.setattr(bench_module, "machine_memory_bytes", lambda: 16 * 10**9)
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert "really" not in printed
    assert len(printed.split("error: ")[1].splitlines()) == 1


def test_a_function_that_fails_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_bench", sys.modules[__name__])
    with pytest.raises(KeyError):  # its own error, with its traceback
        bench(BenchConfig(model="test_bench:own_model", inputs=((1, 3, 8, 8),)))


def test_configurations_that_do_not_fit():
    for config in (BenchConfig(layers=("Linear(3, 4)",)), BenchConfig(model="mlp"),
                   BenchConfig(threads=usable_processors() + 1)):  # fmt: skip
        with pytest.raises(ConfigurationError):
            bench(config)


def test_layers_are_not_allocated_to_be_refused(monkeypatch):
    monkeypatch.setattr(bench_module, "machine_memory_bytes", lambda: 1000)
    with pytest.raises(ConfigurationError, match="more than half"):
        parse_layer("Linear(100, 100)")
    monkeypatch.setattr(bench_module, "machine_memory_bytes", lambda: None)  # not known: nothing is refused
    assert parse_layer("Linear(100, 100)").weight.device.type == "cpu"


@pytest.mark.parametrize(("layer", "shape"), [("Conv1d(4, 8, 3)", (4, 16)), ("Conv1d(4, 8, 3)", (2, 4, 16)),
                                              ("Conv2d(4, 8, 3)", (4, 8, 8)), ("Linear(8, 4)", (8,)),
                                              ("Linear(8, 4)", (2, 3, 4, 8)),
                                              ("Conv2d(4, 8, 3, padding='same')", (2, 4, 8, 8))])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_inputs_of_all_ranks(layer, shape, monkeypatch):
    monkeypatch.setattr(bench_module, "machine_limits", dict)
    monkeypatch.setattr(bench_module, "_SECONDS", 0)
    result = bench(BenchConfig((layer,), inputs=(shape,), sparsities=(0.5,), repeats=2))
    (r,) = result["results"]
    low, high = r["spread"]
    assert 0 < low <= r["speedup"] <= high
    assert list(r["samples"]) == [r["best_dense"], r["best_sparse"]]
    assert all(len(values) == 2 and min(values) <= r["ms"][key] <= max(values) for key, values in r["samples"].items())
    assert set(result["break_even"][r["name"]]) == {"sparsity", "above", "up_to", "finding"}


def test_few_zeros_in_a_model(monkeypatch):
    monkeypatch.setattr(bench_module, "_SECONDS", 0)
    result = bench(BenchConfig(model="mlp", inputs=((2, 1, 4, 4),), sparsities=(0.01,), repeats=1, threads=1))
    assert result["results"][0]["speedup"] > 0


# ---- table and pictures ----


def made_up_result(speedups, limits=(130e9, 310e9, 18e9)):
    """Layers by name: {sparsity: (speed-up, factor it may be off)}."""
    results = []
    for name, points in speedups.items():
        for s, (speedup, noise) in points.items():
            samples = {"dense fp32": [10.0 * f for f in (0.9, 1, 1, 1.1)], "int8 fp32": [10 / speedup] * 4}
            results.append({
                "name": name, "sparsity": s, "speedup": speedup, "spread": [speedup / noise, speedup * noise],
                "samples": samples, "ms": {"dense fp32": 10.0, "int8 fp32": 10 / speedup}, "best_dense": "dense fp32",
                "best_sparse": "int8 fp32", "dense": {"operations": 10**9, "bytes": 10**7, "seconds": 0.01},
                "sparse": {"operations": int(10**9 * (1 - s)), "bytes": int(10**7 * (1.5 - s)),
                           "seconds": 0.01 / speedup},
            })  # fmt: skip
    curves = {name: [(s, Spread(y, y / n, y * n)) for s, (y, n) in points.items()] for name, points in speedups.items()}
    return {"results": results, "break_even": {name: asdict(break_even(found)) for name, found in curves.items()},
            "limits": dict(zip(("fp32", "bf16", "memory"), limits, strict=True)),
            "environment": {"threads": 2}}  # fmt: skip


RISING = {0.5: (0.4, 1.05), 0.7: (0.5, 1.05), 0.8: (0.7, 1.05), 0.9: (1.2, 1.1), 0.95: (1.9, 1.02), 0.98: (3.1, 1.3)}
DROPPING = {**RISING, 0.98: (0.59, 1.1)}
NOISY = {s: (y, 4.0) for s, (y, _) in RISING.items()}
RESULTS = {
    "one layer": {"Linear(256, 256)": RISING},
    "several": {"Conv2d(512, 512, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False) on 64x512x4x4": RISING,
                "drops": DROPPING, "noise": NOISY, "between": {**RISING, 0.9: (1.1, 2.0)}, "last": RISING},
    "one point": {"Linear(256, 256)": {0.9: (1.0, 1.0)}},
    "many points": {"Linear(256, 256)": {0.9 + 0.005 * i: (1 + 0.1 * i, 1.1) for i in range(19)}},
    "wild": {"Linear(256, 256)": {0.5: (0.01, 100.0), 0.9: (18.0, 30.0)}},
    "flat": {"Linear(256, 256)": {0.5: (1.01, 1.001), 0.9: (1.02, 1.001)}},
}  # fmt: skip


def test_the_table_has_spread_and_finding():
    table = format_table(made_up_result({"a": DROPPING, "b": RISING}))
    assert "1.09-1.32" in table
    assert "a: no clear crossing: 1.90x at 95 % zeros, but 0.59x at 98 %" in table
    assert "b: pays from 87 % zeros on" in table


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("plot", [plot_speedup, plot_roofline])
def test_pictures(plot, kind, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    saved, seen = Figure.savefig, []
    measured, derived = "#0072b2", "#d55e00"

    def check(figure, *args, **kwargs):
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        assert width == 800
        assert not figure.legends
        assert figure.get_supxlabel()
        assert figure.get_supylabel()
        for axes in figure.axes:
            assert axes.get_legend() is None
            colors = {to_hex(text.get_color()) for text in axes.texts}
            assert colors <= {measured, derived}
            assert derived in colors
            colors = {to_hex(line.get_color()) for line in axes.lines if line.get_color() != "#777777"}
            assert colors <= {measured, derived}
            assert axes.collections  # bars of the spread
            ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
                     if axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]]  # fmt: skip
            assert len(ticks) > 2 or kind == "one point"
            texts = [t for t in (*axes.texts, axes.title, *ticks) if t.get_text() and not t.get_rotation()]
            boxes = [t.get_window_extent() for t in texts]
            for box in boxes:
                assert 0 <= box.x0 < box.x1 <= width
                assert 0 <= box.y0 < box.y1 <= height
            for one, other in itertools.combinations(boxes, 2):
                assert not one.shrunk(0.95, 0.95).overlaps(other.shrunk(0.95, 0.95))
            seen.append(axes)
        saved(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", check)
    result = made_up_result(RESULTS[kind])
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(seen) == len(RESULTS[kind])
    texts = [text.get_text() for text in seen[0].texts]
    assert all(len(found.texts) > 1 for found in seen)
    if kind == "one layer":
        labels = {f"{y:.2f}x" for y, _ in RISING.values()} if plot is plot_speedup else {"dense", "50 %", "98 %"}
        assert labels <= set(texts)


def test_pictures_mark_what_is_known(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.write_bytes(b"")))
    plot_speedup(made_up_result(RESULTS["several"]), tmp_path / "plot.png")
    rising, drops, noise, between, _ = figures[0].axes
    dashed = [[line for line in axes.lines if line.get_linestyle() == "--"] for axes in (rising, drops, noise, between)]
    assert [len(lines) for lines in dashed] == [1, 0, 0, 0]
    assert [len(axes.patches) for axes in (rising, drops, noise, between)] == [0, 0, 0, 1]
    assert "no clear crossing" in noise.texts[0].get_text()
