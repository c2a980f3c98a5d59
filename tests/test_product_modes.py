"""Lists or dense rows: what is chosen, by costs that are measured once for a machine, and that it changes no bit."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import sys

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout import costs as costs_module
from qsparseprop.layout import modes as modes_module
from qsparseprop.layout.costs import Costs, cost_key, costs_file, machine_costs, measure_costs
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.modes import LONGEST_ROW, Modes, choose_modes, doubtful_modes, shape_of, use_modes
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import generator, run_python, set_weight

ALL = [Modes(*modes) for modes in itertools.product(("list", "dense"), repeat=3)]
COSTS = Costs(spmm_list=2.0, spmm_dense=1.0, sddmm_list=3.0, sddmm_dense=1.0, interleave=5.0)


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    monkeypatch.delenv("QSPARSEPROP_PRODUCTS", raising=False)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file for costs that is not there yet; what was read before is forgotten."""
    path = tmp_path / "a" / "costs.json"
    monkeypatch.setenv("QSPARSEPROP_COSTS", str(path))
    machine_costs.cache_clear()
    yield path
    machine_costs.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """How often costs were measured, which are `COSTS` then."""
    calls = []
    monkeypatch.setattr(costs_module, "measure_costs", lambda: calls.append(1) or COSTS)
    return calls


def isa():
    return _dispatch.active_isa()


def pattern(rows, columns, nonzeros):
    """The first ones of each row in turn."""
    mask = torch.zeros(columns, rows, dtype=torch.bool)
    mask.view(-1)[:nonzeros] = True
    return ValuePattern(*dense_pattern(mask.T)[:2], columns)


# ---- costs ----


def test_costs_are_measured_once_and_kept(file, measured):
    assert machine_costs(isa()) == COSTS
    assert json.loads(file.read_text()) == {cost_key(isa()): COSTS._asdict()}
    assert os.listdir(file.parent) == [file.name]
    machine_costs.cache_clear()
    assert machine_costs(isa()) == COSTS
    assert len(measured) == 1


def test_what_others_measured_stays(file, measured):
    file.parent.mkdir()
    others = {"another machine, avx2": COSTS._replace(spmm_list=9.0)._asdict(), "of another version": {"amx": 1.0}}
    file.write_text(json.dumps(others))
    assert machine_costs(isa()) == COSTS
    assert json.loads(file.read_text()) == {**others, cost_key(isa()): COSTS._asdict()}


@pytest.mark.parametrize("kept", [{}, {"spmm_list": 1.0}, {**COSTS._asdict(), "amx": 1.0},
                                  *(COSTS._replace(spmm_dense=cost) for cost in
                                    (-1.0, 0.0, float("nan"), float("inf"), "fast", None))])  # fmt: skip
def test_costs_that_make_no_sense_are_measured_anew(file, measured, kept):
    file.parent.mkdir()
    file.write_text(json.dumps({cost_key(isa()): kept._asdict() if isinstance(kept, Costs) else kept}))
    assert machine_costs(isa()) == COSTS
    assert len(measured) == 1
    assert json.loads(file.read_text()) == {cost_key(isa()): COSTS._asdict()}


@pytest.mark.parametrize("foreign", [b"", b"{", b"my notes\n", b"[1, 2]", b'{"a": 3}', b"null", b"\xff\xfe\x00", b"7"])
def test_files_of_others_stay_as_they_are(file, measured, foreign):
    file.parent.mkdir()
    file.write_bytes(foreign)
    assert machine_costs(isa()) == COSTS
    assert file.read_bytes() == foreign
    assert os.listdir(file.parent) == [file.name]


def test_places_where_nothing_can_be_written(file, measured, monkeypatch):
    file.parent.write_text("a file in place of a folder")
    assert machine_costs(isa()) == COSTS
    machine_costs.cache_clear()
    monkeypatch.setenv("QSPARSEPROP_COSTS", str(file.parent.parent))  # a folder
    assert machine_costs(isa()) == COSTS
    assert os.listdir(file.parent.parent) == [file.parent.name]


def test_where_costs_are_kept(monkeypatch, tmp_path):
    assert costs_file() == costs_file().absolute()
    monkeypatch.delenv("QSPARSEPROP_COSTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs_file() == tmp_path / "qsparseprop" / "product_costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if sys.platform != "win32":
        assert costs_file() == tmp_path / "home" / ".cache" / "qsparseprop" / "product_costs.json"


def test_measuring(isa):
    """With the defaults of torch that somebody may have set; random numbers are not drawn."""
    state = torch.get_rng_state()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.inference_mode():
            found = measure_costs()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(default)
    assert all(0 < cost < 1e4 for cost in found[:4])
    assert 0 <= found.interleave < 1e4
    assert torch.equal(torch.get_rng_state(), state)


# ---- the choice ----


@pytest.fixture
def by_costs(file):
    file.parent.mkdir()
    file.write_text(json.dumps({cost_key(name): COSTS._asdict() for name in _dispatch.built_isas()}))


def test_the_choice_is_by_costs(by_costs):
    """40 x 100: dense rows cost 4,000 + 500 and 4,000 + 200, their gradient 4,000; a nonzero of a list 2, or 3."""
    g = linear_geometry(100, 40)
    assert shape_of(pattern(40, 100, 7), g, 1) == (7, 4000, 4000, 100, 40)
    for nonzeros, wanted in ((1, "lll"), (1333, "lll"), (1334, "lld"), (1960, "lld"), (2101, "ldd"), (2250, "ldd"),
                             (2251, "ddd"), (4000, "ddd"), (0, "lll")):  # fmt: skip
        modes = choose_modes(pattern(40, 100, nonzeros), g, 1)
        assert "".join(mode[0] for mode in modes) == wanted, nonzeros


def test_the_choice_takes_no_more_memory_than_a_dense_weight(file):
    """Where lists are faster at any sparsity: of 40 x 100, 32,000 bytes dense, 640 are the bitmap. Lists take 8 bytes a
    value, 6 for the input gradient and 2 for the output: at most 1,960 and 3,136 values have both and one."""
    file.parent.mkdir()
    costs = COSTS._replace(spmm_list=0.1, sddmm_list=0.1)._asdict()
    file.write_text(json.dumps({cost_key(name): costs for name in _dispatch.built_isas()}))
    g = linear_geometry(100, 40)
    for nonzeros, wanted in ((1960, "lll"), (1961, "ldl"), (3136, "ldl"), (3137, "ddl"), (3999, "ddl"), (4000, "ldl")):
        given = pattern(40, 100, nonzeros)
        modes = choose_modes(given, g, 1)
        assert "".join(mode[0] for mode in modes) == wanted, nonzeros
        assert doubtful_modes(given, g, 1) is None


def test_shapes_of_convolutions():
    """Tables are those of every group; the rows of a gradient are taken in fours."""
    g = conv_geometry(6, 10, (9, 9), (3, 2), (2, 1), (1, 1, 1, 1), (1, 1), 4, False)
    assert shape_of(pattern(10, 18, 50), g, 2) == (50, 180, 2 * 8 * 18, 36, 2 * 5 * 6)
    depthwise = conv_geometry(6, 6, (9, 9), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4, False)
    assert shape_of(pattern(6, 9, 54), depthwise, 6) == (54, 54, 6 * 4 * 9, 54, 54)


def test_rows_that_are_too_long_for_dense_rows(monkeypatch):
    monkeypatch.setenv("QSPARSEPROP_PRODUCTS", "dense")
    backward_only = Modes("dense", "list", "dense")
    for rows, columns, modes in ((1, LONGEST_ROW + 1, Modes()), (LONGEST_ROW + 1, 1, backward_only)):
        g = linear_geometry(columns, rows)
        crow = torch.zeros(rows + 1, dtype=torch.int32)
        crow[-1] = 1
        long = ValuePattern(crow, torch.zeros(1, dtype=torch.int32), columns)
        assert choose_modes(long, g, 1) == modes
        with use_modes(Modes("dense", "dense", "dense")):
            assert choose_modes(long, g, 1) == modes
    layer = qnn.QuantizedSparseLinear.from_dense(nn.Linear(LONGEST_ROW + 1, 2))
    layer(torch.randn(3, LONGEST_ROW + 1)).sum().backward()
    assert layer.product_modes == Modes()


def test_a_large_vocabulary_has_dense_rows_where_they_are_short(monkeypatch):
    """Those of the input gradient alone are too long: the others are dense, with the bits of lists."""
    torch.manual_seed(0)
    dense, x = nn.Linear(3, LONGEST_ROW + 1), torch.randn(5, 3)
    results = []
    for products in ("list", "dense"):
        monkeypatch.setenv("QSPARSEPROP_PRODUCTS", products)
        layer, own = qnn.QuantizedSparseLinear.from_dense(dense), x.clone().requires_grad_()
        torch.manual_seed(1)
        y = layer(own)
        y.square().sum().backward()
        results.append((y, own.grad, layer.weight.grad))
    assert layer.product_modes == Modes("dense", "list", "dense")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", ["list", "dense", "auto", " DENSE ", ""])
def test_the_environment_decides(by_costs, monkeypatch, wanted):
    monkeypatch.setenv("QSPARSEPROP_PRODUCTS", wanted)
    few, many = (choose_modes(pattern(40, 100, n), linear_geometry(100, 40), 1) for n in (10, 4000))
    kind = wanted.strip().lower()
    assert (few, many) == ((Modes(*[kind] * 3),) * 2 if kind in ("list", "dense") else (Modes(), ALL[-1]))


def test_nonsense_in_the_environment(monkeypatch):
    monkeypatch.setenv("QSPARSEPROP_PRODUCTS", "fast")
    layer = qnn.QuantizedSparseLinear.from_dense(nn.Linear(20, 12))
    with pytest.raises(ValueError, match="QSPARSEPROP_PRODUCTS must be auto, list or dense, got 'fast'"):
        layer(torch.randn(3, 20))


def test_modes_for_a_while(by_costs, monkeypatch):
    few = pattern(40, 100, 10)

    def chosen():
        return choose_modes(few, linear_geometry(100, 40), 1)

    monkeypatch.setenv("QSPARSEPROP_PRODUCTS", "dense")
    mixed = Modes("dense", "list", "dense")
    with use_modes(mixed):
        assert chosen() == mixed
        with use_modes(None):
            assert chosen() == ALL[-1]
        with pytest.raises(ZeroDivisionError), use_modes(Modes()):
            assert chosen() == 1 / 0
        assert chosen() == mixed
    assert chosen() == ALL[-1]
    for wrong in (Modes("list", "lists", "dense"), Modes(None), (True, False, True)):
        with pytest.raises(ValueError, match="modes must be three, each 'list' or 'dense'"), use_modes(wrong):
            pass
    assert modes_module._forced is None


def test_a_process_of_its_own(tmp_path):
    """What is measured is read the next time; nothing is written anywhere else."""
    code = ("import torch; from qsparseprop.layout import costs; from qsparseprop import nn\n"
            "measure = costs.measure_costs; costs.measure_costs = lambda: print('measured') or measure()\n"
            "for _ in range(2):\n"
            "    costs.machine_costs.cache_clear()\n"
            "    layer = nn.QuantizedSparseLinear.from_dense(torch.nn.Linear(20, 12)); layer(torch.randn(3, 20))\n"
            "    print(*layer.product_modes)")  # fmt: skip
    home, path = tmp_path / "home", tmp_path / "costs.json"
    home.mkdir()
    done = run_python(code, HOME=str(home), XDG_CACHE_HOME=str(home), QSPARSEPROP_COSTS=str(path))
    measured, first, second = done.stdout.splitlines()
    assert (measured, first) == ("measured", second), done.stderr
    assert len(json.loads(path.read_text())) == 1
    assert not os.listdir(home)


# ---- plans and layers ----


def test_plans_make_what_they_need():
    g = linear_geometry(20, 12)
    crow, col, _ = dense_pattern(torch.rand(12, 20, generator=generator(0)) < 0.5)
    for modes in ALL:
        plan = make_plan(crow, col, g, 1, modes)
        taken = plan.multiplied(True), plan.multiplied(True, swapped=True), plan.differentiated(True)
        assert [type(rows).__name__ for rows in taken] == [
            {"list": "PatternList", "dense": "DenseRows"}[mode] for mode in modes]  # fmt: skip
        made = {name for name in ("forward", "backward", "dense_forward", "dense_backward") if name in vars(plan)}
        assert made == {("dense_" if dense else "") + name for name, dense in zip(
            ("forward", "backward", "forward"), (mode == "dense" for mode in modes), strict=True)}  # fmt: skip
        floats = plan.multiplied(False), plan.multiplied(False, swapped=True), plan.differentiated(False)
        assert floats == (plan.forward, plan.backward, plan.forward)


def layers():
    """Dense layers with zeros, or none, and inputs."""
    last = {"memory_format": torch.channels_last}
    return {
        "linear": (nn.Linear(37, 20), torch.randn(70, 37)),
        "no zeros": (nn.Linear(37, 20), torch.randn(5, 7, 37)),
        "conv": (nn.Conv2d(6, 10, (3, 2), (2, 1), (1, 2), groups=2), torch.randn(5, 6, 9, 7)),
        "conv, no zeros": (nn.Conv2d(3, 16, 7, 2, 3), torch.randn(2, 3, 15, 15)),
        "depthwise": (nn.Conv2d(6, 12, 3, 2, 1, groups=6), torch.randn(2, 6, 9, 9).to(**last)),
        "1x1": (nn.Conv2d(20, 33, 1, 2), torch.randn(3, 20, 8, 8).to(**last)),
        "volume": (nn.Conv3d(4, 6, 3, 2, 1), torch.randn(2, 4, 5, 6, 7)),
        "transposed": (nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), torch.randn(3, 6, 5, 6)),
    }


def run(layer, x):
    """Output and gradients, with the same random numbers each time."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(4)
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator(7)).to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()]]


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_layers_give_the_same_bits(isa, name, granularity):
    torch.manual_seed(1)
    dense, x = layers()[name]
    density = 1.0 if "no zeros" in name else 0.6
    if density < 1:
        set_weight(dense, density, 3)
    config = QuantConfig(granularity=granularity)
    layer = getattr(qnn, "QuantizedSparse" + type(dense).__name__).from_dense(dense, qconfig=config)
    results = []
    for modes in ALL:
        layer.product_modes = modes
        results.append(run(layer, x))
        assert layer.product_modes == modes
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert torch.equal(a, b)
    if density == 1:  # what int8 does to a layer
        x = x.detach().requires_grad_()
        y = dense(x)
        y.backward(torch.randn(y.shape, generator=generator(7)))
        for a, b in zip(results[0], (y.detach(), x.grad, dense.weight.grad.flatten(), dense.bias.grad), strict=True):
            assert (a.view(b.shape) - b).norm() < 0.03 * b.norm()


def test_blocks_give_the_same_bits(isa):
    def model():
        torch.manual_seed(2)
        convs = [set_weight(conv, 0.6, i) for i, conv in enumerate(
            (nn.Conv2d(8, 20, 3, padding=1, bias=False), nn.Conv2d(20, 16, 1, bias=False), nn.Conv2d(16, 8, 3, 2, 1)))]
        sparse = [qnn.QuantizedSparseConv2d.from_dense(conv) for conv in convs]
        return fuse_modules(nn.Sequential(sparse[0], nn.BatchNorm2d(20), nn.ReLU(), sparse[1], nn.BatchNorm2d(16),
                                          nn.SiLU(), sparse[2], nn.BatchNorm2d(8), nn.ReLU()))  # fmt: skip

    def mlp():
        torch.manual_seed(3)
        sparse = [qnn.QuantizedSparseLinear.from_dense(set_weight(nn.Linear(*sizes), 0.6, 5))
                  for sizes in ((30, 50), (50, 9))]  # fmt: skip
        return fuse_modules(nn.Sequential(sparse[0], nn.GELU(), sparse[1], nn.ReLU()))

    images = torch.randn(3, 8, 7, 9, generator=generator(1)).to(memory_format=torch.channels_last)
    for make, x in ((model, images), (mlp, torch.randn(70, 30, generator=generator(1)))):
        results = []
        for modes in ALL:
            with use_modes(modes):
                results.append(run(make(), x))
        for found in results[1:]:
            for a, b in zip(found, results[0], strict=True):
                assert torch.equal(a, b)


def test_layers_keep_the_modes_that_were_set():
    layer = qnn.QuantizedSparseLinear.from_dense(nn.Linear(20, 12))
    assert layer.product_modes is None
    layer.product_modes = ("dense", "list", "dense")
    wanted = run(layer, torch.ones(3, 20))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (layer, copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(run(other, torch.ones(3, 20)), wanted, strict=True))
        assert other.product_modes == Modes("dense", "list", "dense")
    for wrong in (("dense", "list", "fast"), (1, 2, 3)):
        with pytest.raises(ValueError, match="modes must be three, each 'list' or 'dense'"):
            layer.product_modes = wrong
    layer.product_modes = None
    with use_modes(ALL[-1]):
        layer(torch.ones(3, 20))
    assert layer.product_modes == ALL[-1]


def test_dense_rows_of_a_pattern_that_changes():
    """Also to one without any nonzeros."""
    layer = qnn.QuantizedSparseLinear.from_dense(nn.Linear(20, 12))
    layer.product_modes = ALL[-1]
    x = torch.randn(70, 20, generator=generator(1))
    for mask in (torch.ones(12, 20), torch.rand(12, 20, generator=generator(2)) < 0.5, torch.zeros(12, 20)):
        layer.apply_further_mask(mask)
        fresh = qnn.QuantizedSparseLinear.from_dense(layer.to_dense())
        fresh.product_modes = Modes()
        for a, b in zip(run(layer, x)[:2], run(fresh, x)[:2], strict=True):
            assert torch.equal(a, b)


def test_tried_modes_go_with_the_pattern():
    """What a swap has tried holds for these nonzeros, and for nobody who forces another way."""
    layer = qnn.QuantizedSparseLinear.from_dense(nn.Linear(20, 12))
    tried = Modes("dense", "list", "list")
    layer.suggest_modes(tried)
    layer(torch.randn(3, 20))
    assert layer.product_modes == tried
    assert "_tried" not in copy.deepcopy(layer).__dict__
    layer.suggest_modes(tried)
    with use_modes(Modes()):
        layer(torch.randn(3, 20))
    assert layer.product_modes == Modes()
    layer.suggest_modes(tried)
    weight = layer.dense_weight().detach().abs()
    layer.apply_further_mask(weight > weight.median())
    layer(torch.randn(3, 20))
    assert layer.product_modes != tried


def test_a_typo_stops_a_swap(monkeypatch):
    monkeypatch.setenv("QSPARSEPROP_PRODUCTS", "fast")
    with pytest.raises(ValueError, match="QSPARSEPROP_PRODUCTS must be auto, list or dense"):
        swap_modules_with_sparse(nn.Sequential(nn.Linear(20, 12)), (3, 20), min_sparsity=0)


def test_rows_that_are_too_long_fall_back_to_lists():
    layer = qnn.QuantizedSparseLinear.from_dense(nn.Linear(70000, 2))
    layer.product_modes = ("dense", "dense", "dense")
    layer(torch.randn(2, 70000, requires_grad=True)).sum().backward()
    assert layer.product_modes == Modes()


def test_without_a_home(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "QSPARSEPROP_COSTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert not costs_file().is_absolute()
    monkeypatch.setattr(costs_module, "_write", lambda *_: pytest.fail("nothing can be written there"))
    assert costs_module._as_costs(machine_costs.__wrapped__(_dispatch.active_isa())._asdict()) is not None
