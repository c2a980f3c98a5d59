"""Models and the Trainer of the transformers package."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import qsparseprop
from qsparseprop.nn import QuantizedSparseLinear, SparseLinear
from qsparseprop.utils.network_utils import swap_modules_with_dense, swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent, prunable_modules

from ._helpers import relative_error

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "trainer_vit.py"

needs_transformers = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "accelerate")), reason="needs transformers and accelerate"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # what the package uses is its own affair


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A small model of the real class, and an input."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=3, **size)
        return transformers.ViTForImageClassification(config).eval(), torch.randn(3, 1, 16, 16)
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **size)
    return transformers.BertForSequenceClassification(config).eval(), torch.randint(50, (3, 7))


def prune_blocks(model: torch.nn.Module, sparsity: float) -> None:
    layerwise_magnitude_prune(model, sparsity, skip=[n for n in prunable_modules(model, ()) if "layer" not in n])


@needs_transformers
@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("quantize", [False, True])
def test_linear_layers_inside_real_models(name, quantize, tmp_path):
    model, x = build(name)
    prune_blocks(model, 0.85)
    make_pruning_permanent(model)
    dense = model(x).logits.detach()
    swap_modules_with_sparse(model, x, quantize=quantize, include_dense=False, verbose=False)
    kind = QuantizedSparseLinear if quantize else SparseLinear
    swapped = [n for n, m in model.named_modules() if isinstance(m, kind)]
    assert len([n for n in swapped if "layer" in n]) == 2 * 6  # q, k, v, output and both of the MLP
    assert relative_error(model(x).logits, dense) < (0.15 if quantize else 1e-4)
    model.train()
    model(x, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(model.get_submodule(n).weight.grad.abs().max() > 0 for n in swapped)
    model.eval()
    # the package's own way to store a model, and the way back to dense
    model.save_pretrained(tmp_path, save_original_format=False)
    other, _ = build(name)
    prune_blocks(other, 0.9)
    swap_modules_with_sparse(other, x, quantize=quantize, include_dense=False, verbose=False)
    import safetensors.torch

    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.eval()(x).logits, model(x).logits)
    assert relative_error(swap_modules_with_dense(model)(x).logits, dense) < 1e-5


RUN = """
import runpy
import sys

def run(*arguments):
    sys.argv = ["trainer_vit.py", *arguments]
    runpy.run_path({example!r}, run_name="__main__")

run("--out", "whole", "--max-steps", "8", "--save-steps", "4")
run("--out", "halves", "--max-steps", "4", "--save-steps", "4")
run("--out", "halves", "--max-steps", "8", "--save-steps", "4", "--resume")
"""


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    package = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip


@needs_transformers
@pytest.mark.skipif(not EXAMPLE.is_file(), reason="the examples are not beside the tests")
def test_the_trainer_resumes_from_its_checkpoints(tmp_path):
    done = run_python(RUN.format(example=str(EXAMPLE)), tmp_path)
    assert done.returncode == 0, done.stderr
    whole, half, resumed = [line for line in done.stdout.splitlines() if " steps, " in line]
    assert whole.startswith("8 steps, 88.")
    assert half.startswith("4 steps, ")
    assert resumed == whole  # the loss to six places
    assert (tmp_path / "halves" / "checkpoint-8" / "model.safetensors").is_file()


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="the examples are not beside the tests")
@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_a_missing_package_is_named(missing, tmp_path):
    # what else it needs may be missing, too
    code = f"""
import runpy, sys, unittest.mock
sys.modules |= {{name: unittest.mock.MagicMock() for name in ("transformers", "accelerate")}} | {{{missing!r}: None}}
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
    done = run_python(code, tmp_path)
    assert done.returncode != 0
    assert done.stderr.strip() == f"this example needs {missing}: pip install transformers accelerate"
