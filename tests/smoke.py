"""What a wheel must do wherever it is installed, without a compiler and without pytest: ``python smoke.py``.

Cibuildwheel runs it on every wheel, .ci/wheels on those for the combinations of Python and torch that pyproject.toml
declares, and .ci/arm64 on the one that it makes. Exits with a traceback where something is wrong, and with a line about
the machine otherwise.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import qsparseprop
from qsparseprop import config
from qsparseprop._kernels import _dispatch
from qsparseprop.inference import freeze, load, save
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseLinear


def pruned(layer: nn.Module, amount: float = 0.9) -> nn.Module:
    prune.remove(prune.l1_unstructured(layer, "weight", amount=amount), "weight")
    return layer


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """A layer's output, and the gradients of its input and of its parameters; gradients are rounded at random."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def check_installation() -> None:
    """The package is the installed one, and knows its version."""
    home = Path(qsparseprop.__file__).resolve()
    folders = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    assert any(folder in home.parents for folder in folders), f"{home} is not in {folders}"
    assert importlib.metadata.version("qsparseprop") == qsparseprop.__version__


def check_layers() -> None:
    """Float results are near float64's, and integer ones the same bits everywhere."""
    torch.manual_seed(0)
    dense, x = pruned(nn.Linear(300, 200)), torch.randn(130, 300)
    exact = x.double() @ dense.weight.double().T + dense.bias.double()
    torch.testing.assert_close(SparseLinear.from_dense(dense)(x).double(), exact, rtol=1e-5, atol=1e-5)

    layer = QuantizedSparseLinear.from_dense(dense)
    # Half a step of 8 bits for each input, and of each weight.
    steps = 0.5 * (x.max() - x.min()) / 255 * dense.weight.abs().sum(1) + 0.5 / 127 * dense.weight.abs().amax(1) * (
        (dense.weight != 0).double() @ x.abs().max(0).values.double()
    )
    assert ((layer(x) - exact).abs() <= 1.1 * steps).all()

    isa, threads, found = _dispatch.active_isa(), torch.get_num_threads(), []
    for name in _dispatch.supported_isas():
        for count in (1, 2):
            _dispatch.set_isa(name)
            torch.set_num_threads(count)
            found.append([value.clone() for value in results(layer, x)[:2]])
    _dispatch.set_isa(isa)
    torch.set_num_threads(threads)
    for others in found[1:]:
        for value, first in zip(others, found[0], strict=True):
            assert torch.equal(value, first)


def check_model() -> None:
    """A network is swapped, learns, is frozen, and comes back from its file as it was."""
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    for layer in (model[0], model[3]):
        pruned(layer, 0.8)
    x, y = torch.randn(32, 3, 12, 12), torch.arange(32) % 4
    qsparseprop.swap_modules_with_sparse(model, None, verbose=False, include_dense=False, min_sparsity=0.7, fuse=True)
    assert any(isinstance(layer, QuantizedSparseConv2d) for layer in model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    model.eval()
    frozen = freeze(model, [x])
    with tempfile.TemporaryDirectory() as folder:
        save(frozen, Path(folder) / "model.qsp")
        assert torch.equal(load(Path(folder) / "model.qsp")(x), frozen(x))


def check_runtime() -> str:
    """There is one OpenMP runtime, as far as the system tells."""
    runtimes = config.openmp_runtimes()
    assert len(runtimes) <= 1, runtimes
    return Path(runtimes[0]).name if runtimes else "not told"


def check_command() -> None:
    """The command line is there."""
    for arguments in (["info"], ["finetune", "--help"]):
        subprocess.run([sys.executable, "-m", "qsparseprop", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    check_installation()
    check_layers()
    check_model()
    runtime = check_runtime()
    check_command()
    words = [
        f"qsparseprop {qsparseprop.__version__} works: Python {platform.python_version()}, torch {torch.__version__}",
        f"{platform.system()} {platform.machine()}, {_dispatch.active_isa()}, built by {_dispatch.compiler}",
        f"OpenMP runtime {runtime}",
    ]
    print(", ".join(words))


if __name__ == "__main__":
    main()
