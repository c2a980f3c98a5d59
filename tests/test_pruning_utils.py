import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import (
    GradualPruner,
    collect_masks,
    global_magnitude_prune,
    layer_sparsity,
    layerwise_magnitude_prune,
    make_mask_enforcer,
    make_pruning_permanent,
    prunable_modules,
)

PRUNERS = [global_magnitude_prune, layerwise_magnitude_prune]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet20(width=8)


def _zero_share(tensors):
    tensors = list(tensors)
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def test_first_and_last_layer_stay_dense_by_default(model):
    names = list(prunable_modules(model))
    assert "conv1" not in names
    assert "linear" not in names
    assert len(names) == 18


def test_skip_replaces_the_default(model):
    names = prunable_modules(model, skip=["layer1.0.conv1"])
    assert "conv1" in names
    assert "linear" in names
    assert "layer1.0.conv1" not in names


def test_misspelt_skip_is_an_error(model):
    with pytest.raises(ValueError, match=r"layer9\.conv"):
        prunable_modules(model, skip=["conv1", "layer9.conv"])


def test_one_string_is_not_several_names(model):
    sentence = r"must be several names, got the string 'conv1, fc': write skip(_modules)?=\['conv1', 'fc'\]"
    names = "conv1, fc"
    with pytest.raises(TypeError, match=sentence):
        layerwise_magnitude_prune(model, 0.5, skip=names)
    with pytest.raises(TypeError, match=sentence):
        swap_modules_with_sparse(model, None, include_dense=False, skip_modules=names)
    layerwise_magnitude_prune(model, 0.5)
    with pytest.raises(TypeError, match=sentence):
        GradualPruner(model, torch.optim.SGD(model.parameters(), 0.1), 0.9, end_step=2, skip=names)


def test_global_pruning_has_one_threshold(model):
    before = {name: m.weight.detach().clone() for name, m in prunable_modules(model).items()}
    modules = global_magnitude_prune(model, 0.9)
    assert set(modules) == set(before)
    assert _zero_share(m.weight for m in modules.values()) == pytest.approx(0.9, abs=1e-4)
    smallest_kept = min(m.weight[m.weight != 0].abs().min() for m in modules.values())
    largest_pruned = max(before[name][m.weight == 0].abs().max() for name, m in modules.items())
    assert largest_pruned <= smallest_kept
    assert not (model.conv1.weight == 0).any()


def test_layerwise_pruning_reaches_the_sparsity_in_each_layer(model):
    for name, module in layerwise_magnitude_prune(model, 0.8).items():
        assert _zero_share([module.weight]) == pytest.approx(0.8, abs=1 / module.weight.numel()), name


@pytest.mark.parametrize("pruner", PRUNERS)
def test_channels_last_models_are_pruned_alike_and_stay_so(pruner, model):
    expected = {name: m.weight.detach().clone() for name, m in pruner(model, 0.7).items()}
    torch.manual_seed(0)
    permuted = resnet20(width=8).to(memory_format=torch.channels_last)
    for name, module in pruner(permuted, 0.7).items():
        assert torch.equal(module.weight, expected[name]), name
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
    make_pruning_permanent(permuted)
    permuted(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_impossible_sparsity_is_an_error(pruner, sparsity, model):
    with pytest.raises(ValueError, match="sparsity must be in"):
        pruner(model, sparsity)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_nothing_to_prune_is_an_error(pruner):
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        pruner(nn.Sequential(nn.ReLU()), 0.5)


def test_pruning_can_be_made_permanent(model):
    global_magnitude_prune(model, 0.9)
    pruned = {name: m.weight.detach().clone() for name, m in prunable_modules(model).items()}
    masks = collect_masks(model)
    make_pruning_permanent(model)
    assert not prune.is_pruned(model)
    assert collect_masks(model) == {}
    assert set(masks) == set(pruned)
    for name, weight in pruned.items():
        assert masks[name].dtype == torch.bool
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert torch.equal(masks[name], weight != 0)
    assert layer_sparsity(model, masks) == {name: pytest.approx(_zero_share([w])) for name, w in pruned.items()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3), lambda p: torch.optim.AdamW(p, 1e-3)],
)
def test_enforced_masks_train_like_prune_itself(optimizer, memory_format):
    """The claim of make_mask_enforcer: the same weights as with torch's reparametrisation, to rounding."""

    def start():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3))

    masked, reference = start(), start()
    for model in (masked, reference):
        global_magnitude_prune(model, 0.6, skip=["0"])
    masks = collect_masks(masked)
    make_pruning_permanent(masked)
    masked.to(memory_format=memory_format)
    enforce = make_mask_enforcer(masked, masks)
    steps = [(masked, optimizer(masked.parameters()), enforce), (reference, optimizer(reference.parameters()), None)]
    images, labels = torch.randn(16, 2, 6, 6), torch.randint(3, (16,))
    for _ in range(5):
        for model, optim, after in steps:
            optim.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optim.step()
            if after is not None:
                after()
    for name, mask in masks.items():
        weight = masked.get_submodule(name).weight
        assert not weight[~mask].any()
        # A forward pass is what makes prune apply the mask to the newest weights.
        reference(images)
        torch.testing.assert_close(weight, reference.get_submodule(name).weight, rtol=1e-4, atol=1e-6)
