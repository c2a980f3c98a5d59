"""Resumed runs of the finetune command end bit for bit like whole ones, whatever was trained and pruned how."""

import shutil

import numpy as np
import pytest
import torch

from qsparseprop.training import run as training_run
from qsparseprop.training import setup_run
from qsparseprop.training.finetuner import read_checkpoint
from qsparseprop.training.finetuner.fit import FitLoop
from qsparseprop.training.models import build_model
from qsparseprop.training.run import RunConfig, run_training
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent
from tests._helpers import sampled

#: Width and image size of each model, as small as it goes.
SIZES = {"resnet18": (4, 8), "resnet20": (4, 8), "vgg11": (4, 32), "mlp": (16, 8), "vit-tiny": (8, 8)}
SCHEMES = ("int8", "float32", "dense", "input=standard,grad=absmax")
PRUNE = ("global", "uniform", "gradual", "none")
CASES = [(model, scheme, prune) for model in SIZES for scheme in SCHEMES for prune in PRUNE
         if (scheme, prune) != ("dense", "gradual")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of each size, and weights with zeros for each model."""
    path = tmp_path_factory.mktemp("resume")
    random = np.random.default_rng(0)
    for size in (8, 32):
        images = random.integers(0, 255, (48, size, size), dtype=np.uint8)
        labels = np.arange(48) % 4
        np.savez(path / f"{size}.npz", x_train=images[:32], y_train=labels[:32], x_test=images[32:], y_test=labels[32:])
    for name, (width, size) in SIZES.items():
        torch.manual_seed(1)
        model = build_model(name, num_classes=4, in_channels=1, width=width, image_size=size)
        layerwise_magnitude_prune(model, 0.8)
        make_pruning_permanent(model)
        torch.save(model.state_dict(), path / f"{name}.pt")
    return path


def assert_same(ours, theirs, where=""):
    """Equality of all that a checkpoint holds, except for times."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            if "seconds" not in str(key) and key != "setup_s":
                assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(("model", "scheme", "prune"), sampled(CASES))
def test_a_resumed_run_ends_like_a_whole_one(model, scheme, prune, folder, tmp_path, monkeypatch):
    width, size = SIZES[model]
    config = RunConfig(model=model, width=width, data=str(folder / f"{size}.npz"), prune=prune, scheme=scheme,
                       sparsity=0.9 if prune == "gradual" else 0.8, batch_size=8, epochs=2, threads=1,
                       weights=str(folder / f"{model}.pt") if prune == "none" else None)  # fmt: skip
    swap = setup_run.swap_modules_with_sparse

    def without_stopwatch(network, *arguments, **keywords):
        # some layers are pruned and stay dense, as where the stopwatch says so
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        names = [name for name, module in network.named_modules() if isinstance(module, kinds)]
        return swap(network, *arguments, **{**keywords, "include_dense": False, "skip_modules": names[1::3]})

    # which takes a fourth of the time and changes no number
    monkeypatch.setattr(training_run, "release_free_memory", lambda: None)
    monkeypatch.setattr(setup_run, "swap_modules_with_sparse", without_stopwatch)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    report_step = FitLoop._report_step

    def copy_in_the_middle(loop, targets):
        report_step(loop, targets)
        if loop.folder == whole and len(loop.tuner.history.losses) == 3:
            shutil.copytree(whole, resumed)
            (resumed / ".lock").unlink()
            loop.tuner.save(resumed / "last.pt")

    monkeypatch.setattr(FitLoop, "_report_step", copy_in_the_middle)
    expected = run_training(config, whole, progress=False)
    result = run_training(RunConfig(), resumed, resume=True, progress=False)
    assert result["losses"] == expected["losses"]
    assert len(result["losses"]) == 8
    for key in ("top1", "best_top1", "model_sparsity", "layer_sparsity", "replaced_layers"):
        assert result.get(key) == expected.get(key)
    assert_same(read_checkpoint(resumed / "last.pt"), read_checkpoint(whole / "last.pt"))
    assert_same(read_checkpoint(resumed / "best.pt"), read_checkpoint(whole / "best.pt"))
