import os

import numpy as np
import pytest
import torch

from qsparseprop.training.models import (
    CifarResNet,
    SubsampleAndPad,
    TransformerBlock,
    build_model,
    load_checkpoint,
    read_state_dict,
    resnet18,
    resnet20,
    strip_prefix,
)
from qsparseprop.training.setup_run import load_weights
from qsparseprop.utils.errors import ConfigurationError


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


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_of_a_causal_block_do_not_see_those_behind_them(causal):
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, causal)
    x = torch.randn(2, 5, 16, requires_grad=True)
    block(x)[:, 2].sum().backward()
    seen = x.grad.abs().sum((0, 2)) > 0
    assert seen.tolist() == [True, True, True, not causal, not causal]


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
    model = resnet20(width=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"conv1\.weight is \(4, 3, 3, 3\) there and \(8, 3, 3, 3\) here"):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_old_files_lack_the_count_of_batches(tmp_path):
    """Those of torch before 0.4.1, among them the widespread ones for CIFAR."""
    source, target = resnet20(width=4), resnet20(width=4)
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.th")
    load_weights(target, tmp_path / "old.th")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())


def _headless(state):
    return {key: value for key, value in state.items() if not key.startswith("linear.")}


@pytest.mark.parametrize("change", [lambda state: state, _headless], ids=["other classes", "no head"])
def test_a_classifier_for_other_classes_is_made_anew_where_that_is_wanted(change, tmp_path):
    source, target = resnet20(num_classes=7, width=4), resnet20(num_classes=5, width=4)
    path = tmp_path / "weights.pt"
    torch.save(change(source.state_dict()), path)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    complaint = r"linear\.weight is (\(7, 16\) there and \(5, 16\) here|missing there).*--new-head"
    with pytest.raises(ConfigurationError, match=complaint):
        load_weights(target, path)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    load_weights(target, path, new_head=True)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("linear.") else source.state_dict()[key]), key


def test_a_new_head_excuses_nothing_else(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(resnet20(num_classes=7, width=4).state_dict(), path)
    for model in (resnet20(num_classes=5, width=8), resnet20(num_classes=5, width=4, in_channels=1)):
        with pytest.raises(ConfigurationError, match=r"conv1\.weight is") as refused:
            load_weights(model, path, new_head=True)
        assert "--new-head" not in str(refused.value)
    state = resnet20(num_classes=7, width=4).state_dict()
    target = resnet20(num_classes=7, width=4)
    torch.save({f"net.{key}": value for key, value in state.items()}, path)
    with pytest.raises(ConfigurationError, match=r"conv1\.weight is missing there"):
        load_weights(target, path, new_head=True)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_any_file_is_read_or_refused(name, tmp_path):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    torch.save(resnet20(width=4).state_dict(), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    parts = (b"", b"x", b"PK\x03\x04", good[:1000], good[:-100], b"\x80\x02.", b"\x08" * 64, bytes(range(256)) * 9)
    for content in parts:
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="holds no weights") as refused:
            read_state_dict(path)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 300


def test_the_published_weights_are_taken_by_the_command(shared_dir):
    path = shared_dir / "weights" / "resnet20-12fca82f.th"
    model = resnet20()
    load_weights(model, path)
    assert torch.equal(model.state_dict()["linear.weight"], read_state_dict(path)["linear.weight"])


@pytest.mark.parametrize("width", [10**6, 10**12, 10**25])
def test_networks_that_no_memory_holds_are_refused(width):
    for name in ("resnet18", "resnet20", "vgg11", "mlp", "vit-tiny"):
        with pytest.raises(ConfigurationError, match=r"GB|cannot be as large"):
            build_model(name, num_classes=2, in_channels=1, image_size=32, width=width)


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
