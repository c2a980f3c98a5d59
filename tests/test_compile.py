"""torch.compile, torch.export, and the operators that they see."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.nn._traced import config_text, sparse_layer, sparse_layer_backward
from qsparseprop.quantization import QuantConfig
from qsparseprop.training.models import CifarResNet
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune

from ._helpers import generator, needs_inductor, random_mask, relative_error, set_weight

# torch's own use of what torch deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class SmallTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation="gelu", batch_first=True, norm_first=True), 2,
            enable_nested_tensor=False)  # fmt: skip
        self.head = nn.Linear(16, 30)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def small_resnet(quantize: bool, **arguments) -> nn.Module:
    model = CifarResNet((1, 1), (8, 16))
    layerwise_magnitude_prune(model, 0.85)
    return swap_modules_with_sparse(model, (2, 3, 8, 8), quantize=quantize, include_dense=False, verbose=False,
                                    **arguments)  # fmt: skip


def small_transformer(quantize: bool) -> nn.Module:
    model = SmallTransformer()
    layerwise_magnitude_prune(model, 0.85, skip=["head", *(f"blocks.layers.{i}.self_attn.out_proj" for i in (0, 1))])
    return swap_modules_with_sparse(model, torch.randint(30, (2, 5)), quantize=quantize, include_dense=False,
                                    verbose=False)  # fmt: skip


def step(call, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = call(x)
    loss = y.square().mean()
    loss.backward()
    return [y.detach(), *[p.grad.clone() for p in model.parameters()]]


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("network", ["resnet", "transformer"])
def test_one_graph_and_the_same_results(network, quantize):
    if network == "resnet":
        model = small_resnet(quantize).to(memory_format=torch.channels_last)
        inputs = [torch.randn(n, 3, 8, 8).to(memory_format=torch.channels_last) for n in (4, 4, 6)]
    else:
        model, inputs = small_transformer(quantize), [torch.randint(30, (n, 5)) for n in (4, 4, 6)]
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in inputs:
        for a, b in zip(step(compiled, model, x), step(eager, eager, x), strict=True):
            assert relative_error(a, b) < 1e-5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # another batch size is one more


def test_a_compiled_model_trains_like_eager():
    model = small_resnet(True)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(3)]
    losses = []
    for call, owner in ((compiled, model), (eager, eager)):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(owner.parameters(), 0.05, momentum=0.9)
        losses.append([])
        for x, y in batches:
            loss = F.cross_entropy(call(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_pattern_may_change_after_compilation(quantize):
    """The graph takes the pattern as an input: another one of the same size must not be overlooked."""
    dense = set_weight(nn.Linear(20, 12), 0.3, 0)
    cls = qnn.QuantizedSparseLinear if quantize else qnn.SparseLinear
    layer = cls.from_dense(dense)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 20)
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        dense.weight.copy_(dense.weight.flip(0, 1))
    layer.load_state_dict(cls.from_dense(dense).state_dict())
    assert torch.equal(compiled(x), cls.from_dense(dense)(x))
    layer.col_indices = layer.col_indices
    assert torch.equal(compiled(x), layer(x))
    layer.col_indices[:1] = layer.col_indices[:1].clamp(min=0)  # in place, valid
    assert torch.equal(compiled(x), layer(x))
    mask = random_mask((12, 20), 0.5, 1)
    layer.apply_further_mask(mask)
    layer.regrow(~mask, torch.ones(12, 20))
    assert torch.equal(compiled(x), layer(x))
    layer.col_indices.fill_(99)  # a copy
    compiled(x)
    layer.col_indices = torch.full_like(layer.col_indices, 99)
    with pytest.raises(ValueError, match=r"col_indices must lie in \[0, 20\)"):
        compiled(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modes_under_compilation(dtype):
    layer = qnn.QuantizedSparseConv1d.from_dense(set_weight(nn.Conv1d(4, 6, 3, padding=1), 0.4, 0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 9, dtype=dtype)
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with context:
            y, wanted = compiled(x), layer(x)
        assert y.dtype == wanted.dtype
        assert torch.equal(y, wanted)
    layer.weight.requires_grad_(False)
    y = compiled(x.requires_grad_())
    y.sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert x.grad.shape == x.shape


def test_check_finite_under_compilation():
    dense = set_weight(nn.Linear(6, 4), 0.5, 0)
    layer = qnn.QuantizedSparseLinear.from_dense(dense, qconfig=QuantConfig(check_finite=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    compiled(x)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="the input has NaN or Inf"):
        compiled(x)


@needs_inductor
def test_inductor():
    dense = set_weight(nn.Linear(20, 12), 0.3, 0)
    model = nn.Sequential(qnn.SparseLinear.from_dense(dense), nn.ReLU(), nn.Linear(12, 3))
    eager, x = copy.deepcopy(model), torch.randn(5, 20)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    for a, b in zip(step(compiled, model, x), step(eager, eager, x), strict=True):
        assert relative_error(a, b) < 1e-5


@needs_inductor
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inductor_leaves_the_layers_as_they_are(memory_format):
    """With nothing between them that inductor could round otherwise: the same bits, random rounding included.

    In `channels_last` no bias: its gradient is a float sum in the order of dy, which eager mode takes from the loss and
    a graph in the layout of the output.
    """
    bias = memory_format is torch.contiguous_format
    convs = [nn.Conv2d(4, 8, 3, padding=1, bias=bias), nn.Conv2d(8, 8, 3, 2, bias=bias)]
    model = nn.Sequential(*(qnn.QuantizedSparseConv2d.from_dense(set_weight(conv, 0.4, 0)) for conv in convs))
    eager, x = copy.deepcopy(model), torch.randn(4, 4, 9, 9).to(memory_format=memory_format)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    for a, b in zip(step(compiled, model, x), step(eager, eager, x), strict=True):
        assert torch.equal(a, b)


def differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """Of the output, and the largest of the gradients."""
    output, *grads = (relative_error(x, y) for x, y in zip(a, b, strict=True))
    return output, max(grads)


@needs_inductor
@pytest.mark.parametrize("quantize", [True, False])
def test_inductor_with_batchnorm(quantize):
    dense = CifarResNet((1,), (8,))
    layerwise_magnitude_prune(dense, 0.8)
    arguments = {"qconfig": QuantConfig(grad="absmax")} if quantize else {}
    model = swap_modules_with_sparse(dense, (2, 3, 8, 8), quantize=quantize, include_dense=False, verbose=False,
                                     **arguments)  # fmt: skip
    eager, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    # quantised, a rounding may end at the next integer: in so few layers, of little consequence
    assert max(differences(step(compiled, model, x), step(eager, eager, x))) < (0.1 if quantize else 1e-4)


def with_other_rounding(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose BatchNorms round otherwise: every result is up to one or two units in its last place off."""
    model, noise = copy.deepcopy(model), generator(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, inputs, y: y * (1 + 2.4e-7 * (torch.rand(y.shape, generator=noise) - 0.5))
            )
    return model


@pytest.mark.parametrize("quantize", [True, False])
def test_requantisation_makes_much_of_a_rounding(quantize):
    """Why a deep quantised network under inductor is not close to eager: eager is not close to itself."""
    dense = CifarResNet((3, 3, 3), (8, 16, 32))
    layerwise_magnitude_prune(dense, 0.85)
    arguments = {"qconfig": QuantConfig(grad="absmax")} if quantize else {}
    model = swap_modules_with_sparse(dense, (2, 3, 16, 16), quantize=quantize, include_dense=False, verbose=False,
                                     **arguments)  # fmt: skip
    x, found = torch.randn(8, 3, 16, 16), []
    expected = step(model, model, x)
    for seed in range(6):  # whether one of them moves a code to the next step is a matter of chance
        other = with_other_rounding(model, seed)
        found.append(differences(step(other, other, x), expected))
    output, grads = map(max, zip(*found, strict=True))
    if quantize:
        assert 1e-4 < output < 0.2
        assert grads > 0.02
    else:
        assert output < 1e-5
        assert grads < 1e-2


def test_export(tmp_path):
    """The exported program holds the pattern and runs at every batch size; convolutions at those of its magnitude."""
    model = nn.Sequential(qnn.QuantizedSparseLinear.from_dense(set_weight(nn.Linear(20, 12), 0.3, 0)), nn.ReLU(),
                          qnn.SparseLinear.from_dense(set_weight(nn.Linear(12, 5), 0.5, 1)))  # fmt: skip
    x = torch.randn(7, 20)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (7, 2, 100):
        x = torch.randn(n, 20)
        assert torch.equal(loaded(x), model(x))


def test_export_of_a_convolution():
    conv = qnn.QuantizedSparseConv2d.from_dense(set_weight(nn.Conv2d(3, 4, 3), 0.5, 0))
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(torch.export.export(conv, (x,)).module()(x), conv(x))


# ---- opcheck ----

X = torch.randn(3, 4, 5, 5, generator=generator(0))
CONV = set_weight(nn.Conv2d(4, 6, 3, padding=1), 0.4, 0)


def recorded_calls(qconfig: QuantConfig | None) -> dict[str, tuple]:
    """Arguments of every operator in a forward and backward pass, as a dispatch mode sees them."""
    calls: dict[str, tuple] = {}

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "qsparseprop":
                calls.setdefault(function._schema.name.partition("::")[2], (function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    cls = qnn.SparseConv2d if qconfig is None else qnn.QuantizedSparseConv2d
    layer = cls.from_dense(CONV, qconfig=qconfig)
    with Record():
        layer(X.clone().requires_grad_()).square().sum().backward()
    return calls


def _arguments(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [_arguments(v) for v in value] if isinstance(value, (list, tuple)) else value


SCHEMES = [None, QuantConfig(), QuantConfig(input="standard", granularity="channel")]


@pytest.mark.parametrize("qconfig", SCHEMES, ids=str)
def test_opcheck_of_the_operators_in_a_layer(qconfig):
    calls = recorded_calls(qconfig)
    assert set(calls) == {"sparse_layer", "sparse_layer_backward"}
    for function, args, kwargs in calls.values():
        torch.library.opcheck(function, tuple(_arguments(a) for a in args), _arguments(kwargs) or None,
                              test_utils=["test_schema", "test_faketensor", "test_autograd_registration"])  # fmt: skip


@pytest.mark.parametrize(
    "qconfig", [None, *(QuantConfig(grad="absmax", granularity=g) for g in ("tensor", "channel"))], ids=str
)
@pytest.mark.parametrize("trained", [True, False])
def test_opcheck_of_the_operator_for_graphs(qconfig, trained):
    """All checks, gradients under compilation included."""
    layer = qnn.SparseConv2d.from_dense(CONV)
    x, values, bias = (t.detach().clone().requires_grad_(trained) for t in (X, layer.weight, layer.bias))
    geometry = [4, 6, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 0]
    torch.library.opcheck(
        torch.ops.qsparseprop.sparse_layer.default,
        (x, values, bias, layer.crow_indices, layer.col_indices, geometry, 1, config_text(qconfig), torch.float32),
    )


def _transposed_calls() -> list[tuple]:
    """Transposed layers as graphs see them."""
    transposed = []
    layer = qnn.QuantizedSparseConvTranspose2d.from_dense(set_weight(nn.ConvTranspose2d(4, 6, 2, 2), 0.4, 0))
    g = conv_geometry(6, 4, (4, 6), (2, 2), (2, 2), (0, 0, 0, 0), (1, 1), 3, False, True)
    values, bias = layer.weight.detach(), layer.bias.detach()
    x, dy = torch.randn(3, 4, 2, 3), torch.randn(3, 6, 4, 6)
    quantised = QuantConfig(grad="absmax")
    floats = QuantConfig(input="standard", grad="absmax", grad_weight="float32")
    for config, save in ((None, True), (quantised, True), (floats, True), (quantised, False)):
        rest = (layer.crow_indices, layer.col_indices, g.numbers, 1, config_text(config))
        packed = sparse_layer(x, values, bias, *rest, torch.float32)[1:] if save else (None, None, None)
        transposed += [
            (sparse_layer, (x, values, bias, *rest, torch.float32)),
            (sparse_layer_backward, (dy, values, *packed, *rest, x.shape, [True, save, True], torch.float32)),
        ]  # fmt: skip
    return transposed


def _epilogue_calls() -> list[tuple]:
    """What follows a product, with all parts and with few."""
    x, one, factor = torch.randn(6, 20), torch.rand(20), torch.randn(3, 20)
    ends, calls = torch.stack([-torch.ones(20), torch.ones(20)], 1), []
    for activation in (("identity", []), ("clamp", [0.0, 6.0]), ("silu", [])):
        forward, bare = (x, x, one, one, *activation), (x, None, None, None, *activation)
        codes, saved = ops.codes_like(x), ops.saved_like(x, activation[0])
        filled = one, one, codes, saved
        ops.epilogue(*forward, *filled)
        calls += [
            (ops.epilogue, (*forward, *filled)), (ops.epilogue, (*bare, None, None, None, None)),
            (ops.epilogue_range, forward), (ops.epilogue_range, bare),
            (ops.activation_range, (ends, *activation)),
            (ops.epilogue_sums, (x, codes, saved, *activation)),
            (ops.epilogue_sums, (x, None, saved, *activation)),
            (ops.epilogue_grad, (x, codes, saved, *activation, factor, True)),
            (ops.epilogue_grad, (x, None, saved, *activation, None, False)),
        ]  # fmt: skip
    return calls


def _other_calls() -> list[tuple]:
    """Operators that are no part of a plain layer, and arguments of them."""
    x, one = torch.randn(6, 20), torch.rand(20)
    packed = ops.quantize(x, "standard", 8, None, 7, False, None, [])
    return [
        *_epilogue_calls(),
        *_transposed_calls(),
        *((ops.norm_statistics, (x, one, None, one.clone(), one + 1, 0.1, 1e-5, training, True))
          for training in (True, False)),
        (ops.norm_factors, (torch.rand(20, 3).double(), torch.rand(7, 20).double(), one, 6, True)),
        (ops.quantize, (x, "standard", 8, None, 7, False, None, [])),
        (ops.quantize, (x, "absmax", 8, 1, None, True, None, [])),
        (ops.dequantize, (*packed, None, 7, torch.bfloat16)),
        (ops.relu_mask, (x,)),
        (ops.transpose, (x, 2, 3, 20)),
        (ops.relu_mask_, (x.clone(),)),
        (ops.keep_masked, (x, torch.zeros(8, dtype=torch.int16))),
    ]


def test_opcheck_of_other_operators():
    for function, arguments in _other_calls():
        torch.library.opcheck(function.overload, arguments)


@pytest.mark.parametrize(
    "qconfig", [QuantConfig.ancestor(), QuantConfig(grad="luq"), QuantConfig(grad="dithered", grad_weight="float32")],
    ids=["ancestor", "luq", "dithered"],
)  # fmt: skip
def test_every_scheme_compiles(qconfig):
    layer = qnn.QuantizedSparseLinear.from_dense(set_weight(nn.Linear(20, 12), 0.3, 0), qconfig=qconfig)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(5, 20)
    for a, b in zip(step(compiled, layer, x), step(layer, layer, x), strict=True):
        assert torch.equal(a, b)


def test_every_operator_is_checked():
    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("qsparseprop::")}  # fmt: skip
    seen = set(recorded_calls(None)) | set(recorded_calls(QuantConfig()))
    seen |= {function.overload._schema.name.partition("::")[2] for function, _ in _other_calls()}
    assert names - seen <= {"sparse_layer", "sparse_layer_backward"}
