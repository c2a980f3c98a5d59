"""Networks of torchvision and timm by name, and what is said where they cannot be had."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from qsparseprop.training import library_models
from qsparseprop.training.data import Augmentation, ImageKind, load_data
from qsparseprop.training.models import build_model, cifar_resnet, read_state_dict, resnet20, resnet56
from qsparseprop.training.setup_run import load_weights, make_network
from qsparseprop.utils.errors import ConfigurationError

SIZES = {"num_classes": 5, "in_channels": 3, "image_size": 64}


@pytest.fixture(scope="module")
def torchvision(_stand_in_operators):
    return pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))


@pytest.fixture(scope="module")
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def _stand_in_operators():
    """torchvision's wheel beside a torch of another kind: its Python half works where its operators are declared."""
    if importlib.util.find_spec("torchvision") is None:
        yield
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield


def images(channels=3, size=64, classes=5):
    return ImageKind(channels, size, size, classes)


# ---- ResNets of CIFAR ----


@pytest.mark.parametrize(("depth", "parameters"), [(32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)])
def test_deeper_networks_have_the_known_sizes(depth, parameters):
    model = build_model(f"resnet{depth}")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == depth


def test_only_depths_that_make_three_stages():
    assert [len(getattr(cifar_resnet(20), f"layer{stage}")) for stage in (1, 2, 3)] == [3, 3, 3]
    for depth in (2, 18, 21):
        with pytest.raises(ValueError, match="6 n"):
            cifar_resnet(depth)


def test_resnet56_takes_the_published_weights(shared_dir):
    path = shared_dir / "weights" / "resnet56-4bfd9763.th"
    model = resnet56()
    load_weights(model, path)
    state = read_state_dict(path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("size", [32, 24, 48])
@pytest.mark.parametrize(("name", "file"), [("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")])
def test_published_weights_start_a_network_of_other_classes_and_sizes(name, file, size, shared_dir):
    path = shared_dir / "weights" / file
    model = make_network(name, None, images(size=size, classes=100))
    own = model.linear.weight.clone()
    with pytest.raises(ConfigurationError, match="--new-head"):
        load_weights(model, path)
    load_weights(model, path, new_head=True)
    state = read_state_dict(path)
    assert torch.equal(model.linear.weight, own)
    assert all(torch.equal(model.state_dict()[key], v) for key, v in state.items() if not key.startswith("linear"))


# ---- what is said ----


def test_unknown_names_are_told_what_is_written_alike(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as refused:
        build_model("resnet65")
    for part in ("unknown model 'resnet65'", "torchvision (not installed)", "timm (not installed)", "resnet56"):
        assert part in str(refused.value)
    assert "did you mean" not in library_models.suggest("zzz", ["resnet20"])


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_package_is_named(library, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    missing = ModuleNotFoundError(f"No module named {library!r}", name=library)

    def absent(name):
        raise missing

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigurationError, match=f"needs {library}, which is not installed: pip install {library}"):
        build_model(f"{library}:resnet50")


def test_a_package_that_does_not_go_with_this_torch_is_named(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    reason = "cannot be imported: operator torchvision::nms does not exist"
    for name in ("torchvision:resnet50", "resnet50"):
        with pytest.raises(ConfigurationError, match=reason):
            build_model(name)
    # whoever has written a name wrongly gets there, too
    with pytest.raises(ConfigurationError, match=f"'photo' is neither digits, .* a folder; .*torchvision, .*{reason}"):
        load_data("photo")
    with pytest.raises(ConfigurationError, match=f"'flop' is none of flip, .*torchvision, .*{reason}"):
        Augmentation(["flop"])


def _library(build):
    return types.SimpleNamespace(list_models=lambda module=None: ["net50", "net101"], get_model=build,
                                 create_model=build)  # fmt: skip


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_settings_reach_the_network_or_are_refused(library, monkeypatch):
    calls = []

    def build(name, num_classes=1000, in_chans=3, **options):
        calls.append((name, num_classes, in_chans, options))
        return nn.Linear(1, num_classes)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == library else None)
    monkeypatch.setattr(importlib, "import_module", lambda name: _library(build))
    build_model(f"{library}:net50", **SIZES)
    build_model("net101", num_classes=3)
    assert [call[:3] for call in calls] == [("net50", 5, 3), ("net101", 3, 3)]
    assert 64 in calls[0][3].values()
    with pytest.raises(ConfigurationError, match=f"{library} has no network 'net60'; did you mean net50"):
        build_model(f"{library}:net60")
    with pytest.raises(ConfigurationError, match="--width"):
        build_model(f"{library}:net50", width=8)
    if library == "torchvision":
        with pytest.raises(ConfigurationError, match=r"3 channels, not 1"):
            build_model("torchvision:net50", in_channels=1)
    else:
        build_model("timm:net50", in_channels=1)
        assert calls[-1][2] == 1


# ---- where the packages are ----

QUIET = pytest.mark.filterwarnings("ignore")  # what other packages use is their own affair


@QUIET
@pytest.mark.parametrize("name", ["torchvision:resnet18", "mobilenet_v3_small", "vit_b_32"])
def test_networks_of_torchvision(name, torchvision):
    model = make_network(name, None, images())
    assert type(model).__module__.startswith("torchvision.")
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@QUIET
@pytest.mark.parametrize(("name", "channels"), [
    ("timm:resnet18", 1), ("vit_tiny_patch16_224", 3), ("convnext_atto", 2),
])  # fmt: skip
def test_networks_of_timm(name, channels, timm):
    model = make_network(name, None, images(channels))
    assert type(model).__module__.startswith("timm.")
    assert model.eval()(torch.zeros(2, channels, 64, 64)).shape == (2, 5)


@QUIET
def test_our_networks_come_before_those_of_the_same_name(torchvision):
    assert type(build_model("resnet18")).__module__.startswith("qsparseprop.")


@QUIET
@pytest.mark.parametrize(("name", "head"), [("torchvision:resnet18", "fc"), ("torchvision:densenet121", "classifier"),
                                            ("timm:mobilenetv2_100", "classifier"),
                                            ("timm:convnext_atto", "head.fc")])  # fmt: skip
def test_their_weights_start_a_network_of_other_classes(name, head, timm, tmp_path):
    torch.manual_seed(0)
    source, model = build_model(name, num_classes=7), build_model(name, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    own = model.get_submodule(head).weight.clone()
    load_weights(model, tmp_path / "weights.pth", new_head=True)
    assert torch.equal(model.get_submodule(head).weight, own)
    theirs = source.state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith(f"{head}.") or torch.equal(value, theirs[key]), key


@QUIET
def test_images_of_a_size_that_does_not_go_are_refused(timm):
    with pytest.raises(ConfigurationError, match=r"image size|cannot be made"):
        make_network("torchvision:vit_b_32", None, images(size=40))


def test_a_network_keeps_its_name_where_it_is_ours():
    assert type(build_model("resnet20")) is type(resnet20())
