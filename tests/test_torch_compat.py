"""What the project uses of torch beyond its documented interface."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.multiprocessing import reductions
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import qsparseprop
from qsparseprop import _torch_compat as compat
from qsparseprop._torch_compat import keep_from_compiling, version_of, watcher
from qsparseprop.nn import QuantizedSparseLinear, SparseConv2d, SparseLinear

from ._helpers import set_weight

# ---- averages of weights (EMA, SWA) ----


def model_of(seed=0, inputs=512):
    """Columns beyond the reach of rounding: 0.9 * n + 0.1 * n is not always n."""
    layer = set_weight(nn.Linear(inputs, 64, bias=False), 0.05, seed)
    return nn.Sequential(SparseLinear.from_dense(layer), nn.BatchNorm1d(64), nn.Linear(64, 4))


KINDS = {
    "ema 0.9": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema 0.99": {"multi_avg_fn": get_ema_multi_avg_fn(0.99)},
    "ema 0.9999": {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)},
    "own function": {"avg_fn": lambda average, new, n: 0.9 * average + 0.1 * new},
    "swa": {},
}


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_average_of_an_unchanged_model_is_that_model(kind, use_buffers):
    model = model_of()
    average = AveragedModel(model, use_buffers=use_buffers, **kind)
    for _ in range(4):
        average.update_parameters(model)
    x = torch.randn(4, 512)
    torch.testing.assert_close(average.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averages_are_those_of_the_masked_dense_model(use_buffers):
    model = model_of()
    dense = copy.deepcopy(model)
    dense[0] = model[0].to_dense()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
                for m in (model, dense)]  # fmt: skip
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.mul_(1.5)
            dense[0].weight.mul_(1.5)
        for average, m in zip(averages, (model, dense), strict=True):
            average.update_parameters(m)
    torch.testing.assert_close(averages[0].module[0].dense_weight(), averages[1].module[0].weight)


def removes(layer):
    keep = layer.mask()
    keep[::2] = False
    layer.apply_further_mask(keep)


def moves(layer):
    """As many weights elsewhere, as dynamic sparse training does."""
    flipped = layer.dense_weight().detach().flip(1)
    layer.apply_further_mask(torch.zeros(layer.weight_shape))
    layer.regrow(flipped != 0, flipped)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("updates", [0, 1, 3])
@pytest.mark.parametrize("change", [removes, moves])
def test_a_pattern_that_changes_is_refused_at_the_update(change, updates, use_buffers):
    model = nn.ModuleDict({"body": model_of()})
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for _ in range(updates):
        average.update_parameters(model)
    before = copy.deepcopy(average.state_dict())
    change(model["body"][0])
    with pytest.raises(ValueError, match=r"body\.0 has another sparsity pattern"):
        average.update_parameters(model)
    after = average.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    AveragedModel(model).update_parameters(model)  # a new one


def test_other_ways_to_average_buffers_are_noticed_at_the_next_use():
    model = model_of()
    average = copy.deepcopy(model)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * theirs)
    average(torch.randn(4, 512))
    moves(model[0])
    for kind in (nn.Module.parameters, nn.Module.buffers):
        for mine, theirs in zip(kind(average), kind(model), strict=True):
            mine.data.copy_(0.9 * mine + 0.1 * theirs)
    with pytest.raises(ValueError, match="another sparsity pattern"):
        average(torch.randn(4, 512))


def test_what_averages_a_state_does_not_reach_the_pattern():
    """As averages of other packages do, which multiply every tensor of the state, integers as well."""
    model = model_of()
    average = copy.deepcopy(model)
    pattern = [t.clone() for t in (average[0].crow_indices, average[0].col_indices)]
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * theirs)
    assert torch.equal(average[0].crow_indices, pattern[0])
    assert torch.equal(average[0].col_indices, pattern[1])
    x = torch.randn(4, 512)
    torch.testing.assert_close(average.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


# ---- patterns are no buffers ----


def test_versions_outlive_what_they_are_of():
    tensor = torch.arange(6)
    version, memory = version_of(tensor), StorageWeakRef(tensor.untyped_storage())
    assert version.numel() == version.untyped_storage().nbytes() == 0
    assert version._version == tensor._version == 0
    tensor[2:].view(2, 2).add_(1)
    with torch.inference_mode():
        tensor.zero_()
    del tensor
    assert version._version == 2
    assert memory.expired()


@pytest.mark.parametrize("cast", [
    lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float16),
    lambda m: m.share_memory(), lambda m: m.to(memory_format=torch.channels_last), lambda m: m.to("cpu"),
])  # fmt: skip
def test_casts_leave_the_pattern_alone(cast):
    layer = SparseConv2d.from_dense(set_weight(nn.Conv2d(70, 30, 3), 0.2, 0))
    wanted = layer.mask()
    cast(layer)
    assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
    assert torch.equal(layer.mask(), wanted)
    assert layer(torch.randn(2, 70, 5, 5, dtype=layer.weight.dtype)).shape == (2, 30, 3, 3)


def test_on_meta_and_back():
    layer = SparseLinear.from_dense(set_weight(nn.Linear(20, 30), 0.2, 0))
    state = layer.state_dict()
    layer.to("meta")
    assert layer.crow_indices.is_meta
    layer.load_state_dict(state, assign=True)
    assert layer(torch.randn(2, 20)).shape == (2, 30)


def test_whole_modules_of_earlier_versions_are_read():
    layer = QuantizedSparseLinear.from_dense(set_weight(nn.Linear(20, 30), 0.2, 0))
    state = layer.__getstate__()
    for name in ("crow_indices", "col_indices"):  # which were buffers
        state["_buffers"] = {**state["_buffers"], name: state.pop(name)}
    del state["_buffers"]["indices_stamp"], state["_stamp"]
    old = QuantizedSparseLinear.__new__(QuantizedSparseLinear)
    old.__setstate__(state)
    x = torch.randn(3, 20)
    assert torch.equal(old(x), layer(x))
    assert not {"crow_indices", "col_indices"} & dict(old.named_buffers()).keys()


def test_functional_call_with_a_state():
    model = model_of().eval()
    other = model_of().eval()
    with torch.no_grad():
        other[0].weight.mul_(2)
    x = torch.randn(3, 512)
    torch.testing.assert_close(torch.func.functional_call(model, other.state_dict(), x), other(x))


# ---- what deferred tensors need ----


def test_hooks_on_saved_tensors_are_found():
    assert watcher() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert watcher() is not None
        with torch.autograd.graph.save_on_cpu():
            assert watcher() is not None
        assert watcher() is not None
    assert watcher() is None
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        assert watcher() is None
        with pytest.raises(RuntimeError, match="not now"):
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t).__enter__()
    assert watcher() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        torch.ones(3, requires_grad=True).exp().sum().backward()


def test_functions_are_kept_from_compiling():
    frames = []

    def inner(x):
        return x + 1

    def outer(x):
        return inner(x) * 2

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    keep_from_compiling(outer)
    torch._dynamo.reset()
    x = torch.ones(3)
    assert torch.equal(torch.compile(outer, backend=backend)(x), outer(x))
    assert not frames
    torch._dynamo.reset()


def test_the_saved_tensors_hook_that_would_be_called_is_found():
    assert compat.saved_tensors_hook() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        outer = compat.saved_tensors_hook()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t + 0, lambda t: t):
            assert compat.saved_tensors_hook() not in (None, outer)
        assert compat.saved_tensors_hook() is outer


def test_modes_over_operators_are_counted():
    assert compat.dispatch_modes() == 0
    with FlopCounterMode(display=False):
        assert compat.dispatch_modes() == 1
    assert compat.dispatch_modes() == 0


def test_modes_over_functions_are_found():
    assert compat.function_modes() == []
    with torch.device("cpu") as device:
        assert [type(mode).__name__ for mode in compat.function_modes()] == ["DeviceContext"], device
    assert compat.function_modes() == []


def test_transforms_of_torch_func_are_noticed():
    seen = []
    torch.vmap(lambda x: seen.append(compat.transforms_active()) or x)(torch.ones(2))
    assert seen == [True]
    assert not compat.transforms_active()


def test_forward_mode_differentiation_is_noticed():
    assert not compat.is_differentiating_forward()
    with forward_ad.dual_level():
        assert compat.is_differentiating_forward()
    assert not compat.is_differentiating_forward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_by_torch_jit_is_noticed():
    seen = []
    torch.jit.trace(lambda x: seen.append(compat.is_jit_tracing()) or x + 1, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert not compat.is_jit_tracing()


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_types_that_override_functions_are_told_from_parameters():
    assert compat.overrides_functions(Overriding)
    assert not compat.overrides_functions(nn.Parameter)


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, values):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        wrapper.values = values
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.values if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def test_tensors_without_memory_refuse_to_give_a_pointer():
    wrapper = Wrapper(torch.ones(3))
    compat.refuse_data_pointer(wrapper)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError):
        wrapper.data_ptr()


def test_operators_can_run_on_a_wrapper_itself():
    wrapper = Wrapper(torch.ones(1, 3))
    with compat.without_dispatch():
        torch.ops.aten.squeeze_.default(wrapper)
    assert wrapper.shape == (3,)
    assert wrapper.values.shape == (1, 3)


def test_fake_tensors_are_known():
    with torch._subclasses.FakeTensorMode():
        assert isinstance(torch.empty(3), compat.FakeTensor)


def test_a_backward_pass_is_known_and_says_when_it_ends():
    events = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            events.append(compat.current_backward())
            compat.at_the_end_of_backward(lambda: events.append("end"))
            return gradient

    x = torch.ones(2, requires_grad=True)
    assert compat.current_backward() is None
    for _ in range(2):
        x.register_hook(lambda g: events.append("gradient"))
        Node.apply(x).sum().backward()
    first, _, _, second, *_, last = events
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert first != second
    assert events[2] == last == "end"


def test_nodes_are_known_by_name():
    x = torch.ones(3, 2, requires_grad=True)
    assert compat.name_of_node(x) is None
    for function, name in ((torch.relu, "ReluBackward"), (lambda x: x.log_softmax(0), "LogSoftmaxBackward"),
                           (torch.log, "LogBackward"), (lambda x: x.logsumexp(0), "LogsumexpBackward"),
                           (nn.functional.leaky_relu, "LeakyReluBackward"), (nn.functional.elu, "EluBackward"),
                           (nn.functional.hardtanh, "HardtanhBackward")):  # fmt: skip
        assert compat.name_of_node(function(x)).startswith(name)


def test_parameters_are_known_through_views_and_casts():
    x = torch.ones(3, 2, requires_grad=True)
    for function in (lambda x: x.t(), lambda x: x.to(torch.bfloat16), lambda x: x.view(-1), lambda x: x.clone(),
                     lambda x: x.transpose(0, 1).reshape(6), lambda x: x.permute(1, 0), lambda x: x.expand(2, 3, 2),
                     lambda x: x.view(2, 3).t().double()):  # fmt: skip
        assert compat.is_parameter_node(function(x).grad_fn)
    assert not compat.is_parameter_node((x * 2).grad_fn)
    assert not compat.is_parameter_node(None)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_on_a_module_and_on_all_are_counted(kind):
    layer = nn.Linear(2, 2)
    count = getattr(compat, f"{kind}_hooks")
    assert count(layer) == 0
    getattr(layer, f"register_{kind}_hook")(lambda *_: None)
    assert count(layer) == 1
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None)
    assert count(layer) == 2
    handle.remove()
    assert count(layer) == 1


def test_encoders_can_be_kept_off_the_fast_path():
    """There the encoder computes with the weights of its modules, which are not called."""
    calls = []

    class Linear(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.linear1 = Linear(8, 16).eval()
    x = torch.randn(2, 4, 8)
    with torch.inference_mode():
        layer(x)
        assert not calls  # otherwise torch has no such path any more
        compat.keep_off_fast_path(layer, True)
        layer(x)
        assert len(calls) == 1
        compat.keep_off_fast_path(layer, False)
        layer(x)
    assert len(calls) == 1


def test_nothing_else_reaches_into_torch():
    """Except by the module that is tested here, and what is documented in spite of its underscore."""
    documented = {"torch._C.DisableTorchFunctionSubclass", "torch._foreach_mul_", "torch._utils._rebuild_parameter"}
    root = Path(qsparseprop.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        if path.name == "_torch_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                inner = name.startswith("torch._") and not name.startswith("torch.__")
                if inner and not any(d == name or d.startswith(name + ".") for d in documented):
                    found.add(f"{path.relative_to(root)}: {name}")
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch._"):
                found.add(f"{path.relative_to(root)}: {node.module}")
    assert not found


# ---- tensors of other processes ----


def test_shared_storages_are_forgotten():
    """Without it the last 128 would leave holes in the heap."""
    used, unused = (torch.zeros(3).share_memory_() for _ in range(2))
    for name, tensor in (("used", used), ("unused", unused)):
        reductions.shared_cache[name] = StorageWeakRef(tensor.untyped_storage())
    del unused, tensor
    compat.forget_shared_storages()
    assert {"used", "unused"} & set(reductions.shared_cache) == {"used"}
    del reductions.shared_cache["used"]


# ---- who watches operators ----


def test_profilers_are_seen():
    """Without it kernels would not appear in a profile by name."""
    assert not compat.profiler_is_on()
    with torch.profiler.profile():
        assert compat.profiler_is_on()
    assert not compat.profiler_is_on()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's own
def test_operators_that_write_refuse_gradients_by_torchs_autograd_keys():
    """Without it torch would keep the history of what was written over."""
    x = torch.randn(20, requires_grad=True) * 1
    with pytest.raises(NotImplementedError, match="have no derivatives"):
        torch.ops.qsparseprop.relu_mask_(x)
    with torch.no_grad():
        torch.ops.qsparseprop.relu_mask_(x)
    assert (x >= 0).all()
