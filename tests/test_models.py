import os

import numpy as np
import pytest
import torch

from qsparseprop.utils.models import (
    CifarResNet,
    SubsampleAndPad,
    build_model,
    load_checkpoint,
    resnet18,
    resnet20,
    strip_prefix,
)


def _parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet18_has_the_known_size():
    model = resnet18()
    assert _parameter_count(model) == 11_173_962
    assert [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1] == 512


def test_resnet20_has_the_known_size_and_no_weights_in_shortcuts():
    model = resnet20()
    assert _parameter_count(model) == 269_722
    assert not [key for key in model.state_dict() if "shortcut" in key]


@pytest.mark.parametrize("build", [resnet18, resnet20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_and_backward_give_finite_values_everywhere(build, memory_format):
    torch.manual_seed(0)
    model = build(num_classes=7, in_channels=1, width=4).to(memory_format=memory_format)
    images = torch.randn(3, 1, 15, 17).to(memory_format=memory_format)
    logits = model(images)
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_subsample_and_pad_keeps_every_second_pixel_between_new_zero_channels():
    images = torch.arange(2 * 2 * 3 * 5, dtype=torch.float32).reshape(2, 2, 3, 5)
    out = SubsampleAndPad(2, 5, stride=2)(images)
    assert out.shape == (2, 5, 2, 3)
    assert torch.equal(out[:, 1:3], images[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()


def test_stages_must_match_widths():
    with pytest.raises(ValueError, match="same length"):
        CifarResNet((1, 1), (8,))


def test_build_model():
    assert _parameter_count(build_model("resnet20", width=8)) == _parameter_count(resnet20(width=8))
    with pytest.raises(ValueError, match=r"unknown model 'vgg'.*resnet18"):
        build_model("vgg")


def test_strip_prefix_touches_only_keys_that_have_it():
    tensor = torch.zeros(1)
    assert list(strip_prefix({"module.a.weight": tensor, "b.module.c": tensor})) == ["a.weight", "b.module.c"]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "note": "x"}])
def test_load_checkpoint_takes_plain_and_wrapped_state_dicts(tmp_path, wrap):
    source, target = resnet20(width=4), resnet20(width=4)
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap({f"module.{key}": value for key, value in source.state_dict().items()}), path)
    assert load_checkpoint(target, path) is target
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_load_checkpoint_of_another_network_fails(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(resnet20(width=4).state_dict(), path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(resnet20(width=8), path)


def test_resnet20_reaches_the_published_accuracy(shared_dir):
    model = load_checkpoint(resnet20(), os.path.join(shared_dir, "weights", "resnet20-12fca82f.th")).eval()
    with np.load(os.path.join(shared_dir, "data", "cifar10.npz")) as data:
        pixels, labels = data["x_test"][:500], torch.from_numpy(data["y_test"][:500])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        correct = (model(images).argmax(1) == labels).sum().item()
    # 91.73 % over all 10,000 images; four standard errors of 500 are 5 points.
    assert correct / 500 > 0.867
