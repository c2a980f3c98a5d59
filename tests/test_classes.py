"""What the classes of images are called goes with the network that tells them apart."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from qsparseprop.cli import main
from qsparseprop.inference import freeze, load, save
from qsparseprop.inference.report import measure_accuracy
from qsparseprop.training.data import image_kind, image_loader, load_data
from qsparseprop.training.finetuner import read_checkpoint
from qsparseprop.training.models import resnet20
from qsparseprop.training.run import RunConfig, run_training
from qsparseprop.training.setup_run import load_weights
from qsparseprop.utils._classes import check_classes, classes_in
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import save_tensors

from ._image_folders import config as tiny_config
from ._image_folders import folder

CLASSES = ("cat", "dog")


def npz(path, classes=2):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x_train=pixels, x_test=pixels, y_train=np.arange(20) % classes, y_test=np.arange(20) % classes)
    return path


def config(data, **settings):
    return tiny_config(data, **{"scheme": "dense", **settings})


@pytest.fixture
def run(tmp_path):
    run_training(config(folder(tmp_path / "photos")), tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_names_are_kept_with_settings_result_and_weights(run, tmp_path):
    for name in ("run.json", "result.json"):
        assert json.loads((run / name).read_text())["classes"] == list(CLASSES)
    for name in ("last.pt", "best.pt", "dense/last.pt"):
        assert classes_in(read_checkpoint(run / name)) == CLASSES
    assert image_kind(str(tmp_path / "photos")).classes == load_data(str(tmp_path / "photos")).classes == CLASSES
    assert load_data(str(npz(tmp_path / "x.npz"))).classes is None
    # the names are no setting
    run_training(RunConfig(), run, resume=True, progress=False)


def test_digits_have_names():
    pytest.importorskip("sklearn")
    assert load_data("digits").kind == image_kind("digits")
    assert image_kind("digits").classes == tuple("0123456789")


@pytest.mark.parametrize("file", ["best.pt", "dense/last.pt"])
def test_weights_of_other_classes_are_refused_though_they_are_as_many(run, tmp_path, file):
    other = folder(tmp_path / "other", ("ant", "dog"))
    with pytest.raises(ConfigurationError, match=r"class 0 is 'cat' there and 'ant' here; .*--new-head\)$"):
        run_training(config(other, weights=str(run / file)), progress=False)
    for data, new_head in ((folder(tmp_path / "more"), False), (npz(tmp_path / "x.npz"), False), (other, True)):
        run_training(config(data, weights=str(run / file), new_head=new_head), progress=False)


def test_a_run_is_resumed_with_its_classes(run, tmp_path, capsys):
    renamed = tmp_path / "renamed"
    shutil.copytree(tmp_path / "photos", renamed)
    (renamed / "cat").rename(renamed / "zebra")
    with pytest.raises(SystemExit):
        main(["finetune", "--resume", "--out", str(run), "--data", str(renamed), "--quiet"])
    assert "class 0 is 'cat' there and 'dog' here, class 1 is 'dog' there and 'zebra' here" in capsys.readouterr().err


def test_a_frozen_network_knows_its_classes(run, tmp_path, capsys):
    pytest.importorskip("safetensors")
    other, out = folder(tmp_path / "other", ("ant", "dog")), tmp_path / "model.qsp"
    freezing = ["freeze", str(run / "best.pt"), "--out", str(out), "--threads", "1"]
    with pytest.raises(SystemExit):
        main([*freezing, "--data", str(other)])
    assert "class 0 is 'cat' there and 'ant' here" in capsys.readouterr().err
    assert not out.exists()
    for data in ([], ["--data", str(npz(tmp_path / "x.npz"))]):
        assert main([*freezing, *data]) == 0
        frozen = load(out)
        assert frozen.classes == CLASSES
    measure_accuracy(frozen, image_loader(load_data(str(tmp_path / "photos"), 8), "test", 4))
    with pytest.raises(ConfigurationError, match="class 0 is 'cat' there and 'ant' here; measure it on images"):
        measure_accuracy(frozen, image_loader(load_data(str(other), 8), "test", 4))


def test_freezing_offers_no_new_head(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["freeze", str(run / "best.pt"), "--out", str(tmp_path / "x.qsp"), "--data",
              str(npz(tmp_path / "x.npz", 3))])  # fmt: skip
    error = capsys.readouterr().err
    assert "(2, 16) there and (3, 16) here" in error
    assert "head" not in error


def test_runs_of_before_have_no_names(run, tmp_path):
    other = folder(tmp_path / "other", ("ant", "dog"))
    state = read_checkpoint(run / "best.pt")
    del state["about"]
    save_tensors(state, tmp_path / "old.pt")
    run_training(config(other, weights=str(tmp_path / "old.pt")), progress=False)


@pytest.mark.parametrize("content", [
    None, {}, {"about": 1}, {"about": {"classes": None}}, {"about": {"classes": 5}},
    {"about": {"classes": ["cat", 1]}}, {"about": {"names": ["cat"]}},
])  # fmt: skip
def test_what_is_no_list_of_names_says_nothing(content):
    assert classes_in(content) is None


def test_a_frozen_file_has_names_or_none(tmp_path):
    pytest.importorskip("safetensors")
    frozen = freeze(nn.Linear(4, 2), [torch.randn(8, 4)])
    save(frozen, tmp_path / "x.qsp")
    assert load(tmp_path / "x.qsp").classes is None
    frozen.classes = (1, 2)
    with pytest.raises(ConfigurationError, match="the classes"):
        save(frozen, tmp_path / "x.qsp")


def test_the_sentence_says_what_differs():
    check_classes(None, CLASSES, ("A", "B"), "")
    check_classes(("a",), CLASSES, ("A", "B"), "")
    with pytest.raises(ConfigurationError, match=r"^the classes of A and those of B are the same, in another order: c"):
        check_classes(("a", "b"), ("b", "a"), ("A", "B"), "")
    with pytest.raises(ConfigurationError, match=r" are others: class 0 is 'v' there .* and 2 more; go$"):
        check_classes("abcde", "vwxyz", ("A", "B"), "go")


# ---- a new classifier ----


def test_a_new_head_is_new_though_there_are_as_many_classes(tmp_path):
    source, target = resnet20(num_classes=7, width=4), resnet20(num_classes=7, width=4)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    own = target.linear.weight.clone()
    load_weights(target, tmp_path / "weights.pt", new_head=True)
    assert torch.equal(target.linear.weight, own)
    assert torch.equal(target.conv1.weight, source.conv1.weight)


class HeadFirst(nn.Module):
    """Whose last layer is not the classifier."""

    def __init__(self, num_classes, image_size):
        super().__init__()
        self.head, self.body = nn.Linear(6, num_classes), nn.Linear(3 * image_size**2, 6)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)))


def test_a_classifier_has_an_output_for_each_class(tmp_path):
    source, target = HeadFirst(5, 8), HeadFirst(5, 8)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    own = target.head.weight.clone()
    kind = image_kind(str(npz(tmp_path / "x.npz", 5)))
    load_weights(target, tmp_path / "weights.pt", new_head=True, images=kind)
    assert torch.equal(target.head.weight, own)
    assert torch.equal(target.body.weight, source.body.weight)
    with pytest.raises(ConfigurationError, match="no Linear or convolution of 5 outputs"):
        load_weights(nn.Sequential(nn.Linear(4, 3)), tmp_path / "weights.pt", new_head=True, images=kind)


@pytest.mark.parametrize(("labels", "says"), [
    (torch.tensor([1]), r"top1 needs the number of a class for each of 4 outputs, got labels of shape \(1,\)"),
    (torch.eye(3)[[0, 1, 2, 0]], r"for each of 4 outputs, got labels of shape \(4, 3\)"),
    (torch.tensor([0, 1, 2, 3]), "outputs for 3 classes, from 0 on, and there is a label 3"),
])  # fmt: skip
def test_labels_that_are_not_one_class_for_each_output_are_refused(labels, says):
    model = torch.nn.Linear(5, 3)
    with pytest.raises(ValueError, match=says):
        measure_accuracy(model, [(torch.ones(4, 5), labels)])
    assert model.training
