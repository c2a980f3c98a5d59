"""Training sparse neural networks fast on CPUs."""

import torch as _torch  # noqa: F401 - before the compiled modules: they then share torch's OpenMP runtime

from qsparseprop._version import __version__
from qsparseprop.config import show_config
from qsparseprop.quantization import QuantConfig

__all__ = ["QuantConfig", "__version__", "show_config"]
