"""What users have set at layers and parameters goes along in a swap, and on the way back."""

import pytest
from torch import nn
from torch.nn.utils import prune

from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear
from qsparseprop.utils.network_utils import swap_modules_with_dense

from ._swapping import decisions, swap

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("inplace", [True, False])
def test_attributes_of_layers_and_parameters_go_along(net, inplace):
    net.last.learning_rate_scale, net.last.group_name = 0.5, "tail"
    net.last.weight._no_weight_decay = True
    net.last.bias.tag = "bias"
    net.train()
    net.last.eval()
    model = swap(net, inplace=inplace)
    assert type(model.last) is QuantizedSparseConv2d
    assert (model.last.learning_rate_scale, model.last.group_name) == (0.5, "tail")
    if inplace:  # torch's copies of parameters are without their attributes
        assert model.last.weight._no_weight_decay
        assert model.last.bias.tag == "bias"
    assert not model.last.training
    back = swap_modules_with_dense(model)
    assert (back.last.learning_rate_scale, back.last.group_name) == (0.5, "tail")
    assert hasattr(back.last.weight, "_no_weight_decay") == inplace
    assert set(vars(back.last)) - set(vars(net.stem)) == {"learning_rate_scale", "group_name"}


def test_attributes_of_pruned_layers_go_along(net):
    prune.l1_unstructured(net.last, "weight", 0.9)
    net.last.weight_orig.tag = "weight"
    net.last.name = "last"
    swap(net)
    assert (net.last.name, net.last.weight.tag) == ("last", "weight")
    assert not {"weight_orig", "weight_mask"} & set(vars(net.last))


def test_hooks_of_sparse_layers_go_along_on_the_way_back(net, images):
    model, seen = swap(net), []
    handles = [model.last.register_forward_hook(lambda *_: seen.append("forward")),
               model.last.register_forward_pre_hook(lambda *_: seen.append("pre")),
               model.last.register_full_backward_hook(lambda *_: seen.append("backward"))]  # fmt: skip
    model = swap_modules_with_dense(model)
    model(images).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(images)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_layers_whose_parameters_have_gradient_hooks_stay_dense(net, kind):
    handle = getattr(net.last.weight, kind)(lambda *_: None)
    assert "gradient hooks" in decisions(swap(net))["last"].reason
    assert type(net.last) is nn.Conv2d
    handle.remove()
    swap(net)
    assert type(net.last) is QuantizedSparseConv2d


def test_the_way_back_replaces_every_place_or_none(net):
    model = swap(net)
    model.tail = [model.last]
    before = model.last
    with pytest.raises(ValueError, match="also holds last in a list"):
        swap_modules_with_dense(model)
    assert model.last is before
    assert type(model.head) is QuantizedSparseLinear
    del model.tail
    assert type(swap_modules_with_dense(model).last) is nn.Conv2d
