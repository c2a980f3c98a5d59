"""Training sparse neural networks fast on CPUs.

What a script needs is here: `swap_modules_with_sparse` and its way back, pruning, quantisation and its settings. Layers
are in `qsparseprop.nn`, training loops in `qsparseprop.training`.
"""

import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING
from typing import Any as _Any

from qsparseprop._version import __version__

if TYPE_CHECKING:
    from qsparseprop.config import show_config
    from qsparseprop.quantization import QuantConfig, QuantizedTensor, dequantize, quantize
    from qsparseprop.training import Finetuner
    from qsparseprop.utils.adapters import attach_adapters
    from qsparseprop.utils.fusion import chains, fuse_modules, unfuse_modules
    from qsparseprop.utils.network_utils import (
        sparsity,
        swap_modules_for_state,
        swap_modules_with_dense,
        swap_modules_with_sparse,
        unfold_attention,
    )
    from qsparseprop.utils.optimizer_utils import parameter_groups
    from qsparseprop.utils.pruning_utils import (
        GradualPruner,
        global_magnitude_prune,
        layerwise_magnitude_prune,
        make_pruning_permanent,
    )
    from qsparseprop.utils.saved_tensors import compress_saved_tensors

#: What is imported when it is asked for: most of it takes as long to import as all operators together.
_HOMES = {
    "Finetuner": "training",
    "GradualPruner": "utils.pruning_utils",
    "QuantConfig": "quantization",
    "QuantizedTensor": "quantization",
    "attach_adapters": "utils.adapters",
    "chains": "utils.fusion",
    "compress_saved_tensors": "utils.saved_tensors",
    "dequantize": "quantization",
    "fuse_modules": "utils.fusion",
    "global_magnitude_prune": "utils.pruning_utils",
    "layerwise_magnitude_prune": "utils.pruning_utils",
    "make_pruning_permanent": "utils.pruning_utils",
    "parameter_groups": "utils.optimizer_utils",
    "quantize": "quantization",
    "show_config": "config",
    "sparsity": "utils.network_utils",
    "swap_modules_for_state": "utils.network_utils",
    "swap_modules_with_dense": "utils.network_utils",
    "swap_modules_with_sparse": "utils.network_utils",
    "unfold_attention": "utils.network_utils",
    "unfuse_modules": "utils.fusion",
}

__all__ = [
    "Finetuner",
    "GradualPruner",
    "QuantConfig",
    "QuantizedTensor",
    "__version__",
    "attach_adapters",
    "chains",
    "compress_saved_tensors",
    "dequantize",
    "fuse_modules",
    "global_magnitude_prune",
    "layerwise_magnitude_prune",
    "make_pruning_permanent",
    "parameter_groups",
    "quantize",
    "show_config",
    "sparsity",
    "swap_modules_for_state",
    "swap_modules_with_dense",
    "swap_modules_with_sparse",
    "unfold_attention",
    "unfuse_modules",
]


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _importlib.import_module(f"{__name__}.{_HOMES[name]}")
    globals()[name] = value = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_program() -> bool:
    """Whether this is ``python -m qsparseprop``, which imports the package before it runs it."""
    command = _sys.orig_argv
    return _sys.argv[:1] == ["-m"] and "-m" in command and command[command.index("-m") + 1 :][:1] == [__name__]


# Torch takes seconds to import: the command line says so meanwhile. Everybody else gets all operators registered here.
if not _is_program():
    import torch as _torch  # noqa: F401 - before the compiled modules: they then share torch's OpenMP runtime

    import qsparseprop.quantization as _quantization  # noqa: F401 - registers the operators
