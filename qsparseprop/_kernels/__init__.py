"""What is compiled: `.pyx` files check tensors and deal out tasks, C headers compute."""

from qsparseprop._kernels import _dispatch, _runtime

# Before all modules that have loops; this one has none.
if _dispatch.openmp_of == "torch":
    _runtime.share_torchs_runtime()
