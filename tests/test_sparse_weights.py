"""Weights of networks with sparse layers, as a run of the ``finetune`` command leaves them, begin other trainings."""

import pytest
import torch
from torch import nn

from qsparseprop import layerwise_magnitude_prune, make_pruning_permanent, swap_modules_with_sparse
from qsparseprop.training import setup_run
from qsparseprop.training.data import ImageKind
from qsparseprop.training.models import load_checkpoint, resnet20
from qsparseprop.training.run import RunConfig, run_training
from qsparseprop.training.setup_run import load_weights
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.network_utils import sparsity, swap_modules_with_dense
from qsparseprop.utils.state_files import read_state_dict

from .test_classes import npz


def network(classes=7):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
                         nn.ConvTranspose2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 36, classes))  # fmt: skip


def pruned(classes=7, **options):
    """Swapped, and the same dense."""
    torch.manual_seed(0)
    model = network(classes)
    layerwise_magnitude_prune(model, 0.8)
    make_pruning_permanent(model)
    model = swap_modules_with_sparse(model, None, include_dense=False, verbose=False, min_sparsity=0.5, **options)
    return model, swap_modules_with_dense(model, inplace=False)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("new_head", [False, True])
def test_sparse_layers_become_dense_ones(quantize, new_head, tmp_path):
    sparse, dense = pruned(quantize=quantize)
    torch.save(sparse.state_dict(), tmp_path / "weights.pt")
    assert any(key.endswith(".crow_indices") for key in read_state_dict(tmp_path / "weights.pt"))
    model = network()
    own = model[6].weight.clone()
    load_weights(model, tmp_path / "weights.pt", new_head, ImageKind(3, 8, 8, 7))
    assert torch.equal(model[6].weight, own if new_head else dense[6].weight)
    for key, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) or (new_head and key.startswith("6.")), key


def test_a_sparse_classifier_of_other_classes_is_one(tmp_path):
    sparse, dense = pruned(7)
    torch.save({"model": sparse.state_dict()}, tmp_path / "weights.pt")
    model = network(5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"6\.weight is \(7, 216\) there and \(5, 216\) here.*--new-head\)"):
        load_checkpoint(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    load_weights(model, tmp_path / "weights.pt", True, ImageKind(3, 8, 8, 5))
    assert torch.equal(model[0].weight, dense[0].weight)
    assert torch.equal(model[6].weight, before["6.weight"])


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda state: state["3.col_indices"].fill_(10**6), "are damaged at the sparse layer 3: .*col_indices"),
    (lambda state: state["3._extra_state"].fill_(2**62), "are damaged at the sparse layer 3: "),
    (lambda state: state.pop("3.bias"), r"3\.bias is missing there"),
    (lambda state: state.pop("3.weight"), "are damaged at the sparse layer 3: .*weight"),
    (lambda state: state.update({"1.crow_indices": torch.zeros(3)}), "those of a model with sparse layers"),
    (lambda state: state.update({"9.crow_indices": torch.zeros(3)}), "those of a model with sparse layers"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, complaint, tmp_path):
    state = {key: value.clone() for key, value in pruned()[0].state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=complaint) as refused:
        load_weights(model, tmp_path / "weights.pt")
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["int8", "float32"])
def test_a_run_begins_with_the_weights_of_a_sparse_run(scheme, tmp_path, monkeypatch):
    def swap(model, input_shape, **options):
        return swap_modules_with_sparse(model, None, **{**options, "include_dense": False})

    # whatever gains here
    monkeypatch.setattr(setup_run, "swap_modules_with_sparse", swap)
    config = {"data": str(npz(tmp_path / "x.npz")), "model": "mlp", "width": 32, "batch_size": 8, "threads": 1,
              "prune": "uniform", "scheme": scheme}  # fmt: skip
    first = run_training(RunConfig(**config, sparsity=0.95), tmp_path / "run", progress=False)
    path = tmp_path / "run" / "last.pt"
    assert any(key.endswith(".crow_indices") for key in read_state_dict(path))
    config |= {"weights": str(path), "prune": "none"}
    again = run_training(RunConfig(**config), progress=False)
    assert again["sparsity"] == pytest.approx(first["sparsity"], abs=1e-3)
    assert again["dense_top1"] == again["pruned_top1"]


def test_the_same_zeros(tmp_path):
    torch.manual_seed(0)
    model = resnet20(width=4)
    layerwise_magnitude_prune(model, 0.9)
    make_pruning_permanent(model)
    swapped = swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    torch.save(swapped.state_dict(), tmp_path / "weights.pt")
    target = resnet20(width=4)
    load_weights(target, tmp_path / "weights.pt")
    assert sparsity(target) == pytest.approx(sparsity(swapped), abs=1e-6)
