"""Single trainings, bench and info of the command line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from qsparseprop.benchmarking.bench import parse_layer
from qsparseprop.benchmarking.compare import ConfigurationError
from qsparseprop.cli import main
from qsparseprop.inference import freeze, save
from qsparseprop.nn.deferred import conditions
from qsparseprop.training.data import load_data
from qsparseprop.training.finetuner import read_checkpoint
from qsparseprop.training.models import build_model, load_checkpoint, resnet20
from qsparseprop.training.run import RunConfig, run_training
from qsparseprop.utils import files
from qsparseprop.utils.network_utils import sparsity


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Grey images whose class is the place of a bright square."""
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 256), ("test", 64)):
        labels = np.arange(count) % 4
        images = random.integers(0, 80, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(autouse=True)
def _as_in_other_processes(_defer_small_results, monkeypatch):
    """Trainings that go on in another process must defer what they have deferred here."""
    monkeypatch.setattr(conditions, "LEAST_ELEMENTS", 1 << 16)


def command(npz, *arguments):
    return ["finetune", "--data", str(npz), "--model", "resnet20", "--width", "8", "--threads", "1", "--quiet",
            "--batch-size", "32", "--no-compare", *map(str, arguments)]  # fmt: skip


def small_model(num_classes, in_channels, image_size):
    """For --model test_module:function."""
    return nn.Sequential(nn.Conv2d(in_channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                         nn.ReLU(), nn.Flatten(), nn.Linear(16 * image_size**2, num_classes))  # fmt: skip


def test_a_single_training_learns_and_its_checkpoint_can_be_shown(npz, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(npz, "--out", out, "--epochs", "2", "--layer-times", "--compress-saved")) == 0
    printed = capsys.readouterr().out
    for part in ("top-1", "ms a step", "saved for backward", "peak memory", "forward ms", "Conv"):
        assert part in printed
    assert {"dense", "last.pt", "best.pt", "log.jsonl", "result.json", "run.json"} == {p.name for p in out.iterdir()}
    result = json.loads((out / "result.json").read_text())
    assert result["top1"] > 50
    assert result["steps"] == len(result["losses"]) == 16
    assert result["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert main(["info", str(out / "last.pt")]) == 0
    table = capsys.readouterr().out
    assert "layer3.2.conv2.weight" in table
    assert "32x32x3x3" in table


@pytest.mark.parametrize("options", [
    ("--prune", "gradual", "--sparsity", "0.96"),
    pytest.param(("--scheme", "dense", "--precision", "fp32"), marks=pytest.mark.nightly),
    pytest.param(("--prune", "uniform", "--scheme", "input=standard,grad=absmax"), marks=pytest.mark.nightly),
], ids=str)  # fmt: skip
def test_a_terminated_training_is_resumed(options, npz, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # each in a process of its own: what this one has set, as that torch is to do without a library, changes roundings
    program, long = [sys.executable, "-m", "qsparseprop"], command(npz, "--epochs", "3", *options)
    subprocess.run([*program, *long, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*program, *long, "--out", str(stopped)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (stopped / "last.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM; go on with:  python -m qsparseprop finetune --resume --out" in errors
    resume = ("finetune", "--resume", "--quiet", "--out", str(stopped))
    subprocess.run([*program, *resume], check=True, capture_output=True)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (stopped, whole))
    assert len(ours["losses"]) == 24
    # which layers are faster dense is measured anew in each process
    if "replaced_layers" not in ours or ours["replaced_layers"] == theirs["replaced_layers"]:
        assert ours["losses"] == theirs["losses"]
        assert ours["top1"] == theirs["top1"]
    if "gradual" in options:
        assert ours["model_sparsity"] > 0.9
        assert ours["sparsity"] == pytest.approx(0.8, abs=0.01)  # where it began


def test_what_does_not_go_together_is_explained(npz, tmp_path, capsys):
    weights = tmp_path / "weights.pt"
    torch.save(resnet20(width=4).state_dict(), weights)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"model": "resnet20", "sparsity": 0.8}))
    (tmp_path / "text.npz").write_text("hello")
    cases = [
        (command(npz, "--weights", weights), "do not go with this model and data"),
        (command(npz, "--weights", tmp_path / "none.pt"), "cannot read the weights"),
        (command(npz, "--weights", npz), "holds no weights"),
        (command(npz, "--batch-size", "500"), "at most the number of training images, 256"),
        (command(npz, "--out", run), "holds a run already"),
        (command(npz, "--resume"), "--resume needs --out"),
        (command(npz, "--resume", "--out", tmp_path), "no run to resume"),
        (command(npz, "--resume", "--out", run, "--sparsity", "0.7"), "has sparsity 0.8, not 0.7"),
        (command(npz, "--scheme", "int4"), "a scheme is int8, float32, or settings"),
        (command(npz, "--scheme", "input=best"), "no such scheme"),
        (command(npz, "--prune", "none"), "zeros already"),
        (command(npz, "--new-head"), "goes with weights (--weights) only"),
        (command(npz, "--prune", "gradual", "--scheme", "dense"), "sparse layers only"),
        (command(npz, "--prune", "gradual", "--compare"), "does not go with --compare"),
        (command(npz, "--model", "torch:zeros"), "does not say which parameters"),
        (command(npz, "--model", "vgg11"), "cannot take images of 1 x 8 x 8"),
        (command(npz, "--model", "resnet18", "--width", "1000000"), "this machine has"),
        (command(npz, "--image-size", "100000"), "this machine has"),
        (command(npz, "--resume", "--out", npz), "holds no run to resume"),
        (command(npz, "--model", "no_such_module:function"), "cannot import the model"),
        (command(npz, "--model", "json:dumps"), "cannot be called"),
        (command(npz, "--normalize", "imagenet"), "3 channels"),
        (command(tmp_path / "no.npz"), "there is no file"),
        (command(tmp_path / "text.npz"), "not an npz file"),
        (command("no/such/folder"), "no folder"),
        (command("CIFAR10"), "torchvision"),
        (["info", str(tmp_path / "text.npz")], "holds no weights"),
        (["info", str(tmp_path / "none.pt")], "cannot read"),
        (["bench", "--layer", "Linear(3, 4)"], "--input must be given 1 time"),
        (["bench", "--layer", "Pool(3)", "--input", "3,3"], "is no layer"),
        (["bench", "--layer", "__import__('os')", "--input", "3,3"], "is no layer"),
        (["bench", "--layer", "Linear(3)", "--input", "3,3"], "missing"),
        (["bench", "--layer", "Linear(3, 4)", "--input", "3,4"], "expects 3 features"),
        (["bench", "--layer", "Linear(3, 4)", "--input", "3,-4"], "must be positive"),
        (["bench", "--model", "resnet18"], "--input must be given 1 time"),
        (["bench", "--by-layer"], "needs --model"),
    ]
    for arguments, complaint in cases:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2, arguments
        error = capsys.readouterr().err
        assert complaint in error, arguments
        assert error.count("\n") == 1, error


def test_weights_are_checked_before_the_images_are_read(npz, tmp_path, monkeypatch, capsys):
    def read(*_):
        raise AssertionError("images were read")

    monkeypatch.setattr("qsparseprop.training.data._npz.NpzFile.images", read)
    monkeypatch.chdir(tmp_path)
    torch.save(resnet20(num_classes=7, width=8, in_channels=1).state_dict(), tmp_path / "weights.pt")
    for arguments in (command(npz), command(npz)[:-1]):  # a single training, and the comparison
        with pytest.raises(SystemExit):
            main([*arguments, "--weights", str(tmp_path / "weights.pt")])
        error = capsys.readouterr().err
        assert "linear.weight is (7, 32) there and (4, 32) here" in error
        assert "--new-head" in error


def test_what_has_no_weights_to_train_says_where_they_are(npz, tmp_path, capsys):
    model = resnet20(num_classes=4, width=8, in_channels=1)
    save(freeze(model, [torch.rand(4, 1, 8, 8)]), tmp_path / "model.qsp")
    (tmp_path / "run").mkdir()
    torch.save(model.state_dict(), tmp_path / "run" / "best.pt")
    for name, sentence in (("model.qsp", "holds a frozen model, whose weights are not trained any more: use the"),
                           ("run", f"is the folder of a run: its weights are in {tmp_path / 'run' / 'best.pt'}\n")):
        with pytest.raises(SystemExit):
            main([*command(npz), "--weights", str(tmp_path / name)])
        assert f"{tmp_path / name} {sentence}" in capsys.readouterr().err
        with pytest.raises(ConfigurationError, match=sentence[:20]):
            load_checkpoint(model, tmp_path / name)


def test_weights_for_other_classes_with_a_new_classifier(npz, tmp_path, capsys):
    weights, out = tmp_path / "weights.pt", tmp_path / "run"
    torch.save(resnet20(num_classes=7, width=8, in_channels=1).state_dict(), weights)
    assert main(command(npz, "--weights", weights, "--new-head", "--epochs", "1", "--out", out)) == 0
    assert json.loads((out / "run.json").read_text())["new_head"] is True
    state = read_checkpoint(out / "last.pt")["model"]
    assert state["linear.weight"].shape == (4, 32)


def test_each_epoch_is_told_of(npz, tmp_path, capsys):
    assert main([*(a for a in command(npz, "--epochs", "2") if a != "--quiet")]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("  epoch ")]
    assert [line.split(":")[0].strip() for line in lines] == ["epoch 1/1", "epoch 1/2", "epoch 2/2"]
    for line in lines[1:]:
        assert re.fullmatch(r"  epoch \d/2: loss \d\.\d+, accuracy \d+\.\d %, \d+\.\d s, \d+ % of the time waiting "
                            r"for data; then top-1 \d+\.\d %, loss \d+\.\d+ on the test data", line)  # fmt: skip
    assert printed.err == ""
    assert main(command(npz, "--epochs", "1")) == 0
    assert "epoch" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(npz, "--epochs", "1", "--out", out)) == 0
    return out


@pytest.mark.parametrize(("name", "value", "complaint"), [
    ("scheme", "float32", "was made with scheme int8, but its run.json says float32"),
    ("epochs", 2, "was made with epochs 1"), ("prune", "gradual", "prune global"), ("seed", 1, "seed 0"),
    ("width", 16, "width 8"), ("model", "mlp", "model resnet20"), ("sparsity", "much", "sparsity cannot be 'much'"),
    ("batch_size", 0, "batch_size must be at least 1"), ("compress_saved", 1, "compress_saved cannot be 1"),
    ("model", 3, "model cannot be 3"), ("colour", "red", "is not the settings of a run"),
])  # fmt: skip
def test_settings_that_were_edited_are_noticed(name, value, complaint, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**settings, name: value}))
    before = (out / "last.pt").read_bytes()
    with pytest.raises(SystemExit):
        main(["finetune", "--resume", "--quiet", "--out", str(out)])
    assert complaint in capsys.readouterr().err
    assert (out / "last.pt").read_bytes() == before
    assert not (out / ".lock").exists()


def test_checkpoints_of_other_runs_are_refused(finished, npz, tmp_path, capsys):
    good = (finished / "last.pt").read_bytes()
    other = tmp_path / "other"
    assert main(command(npz, "--epochs", "1", "--out", other, "--width", "4")) == 0
    contents = {
        "cut off": good[: len(good) // 2], "empty": b"", "no checkpoint": b"hello" * 100,
        "of another width": (other / "last.pt").read_bytes(), "the best model": (finished / "best.pt").read_bytes(),
        "of the dense training": (finished / "dense" / "last.pt").read_bytes(),
    }  # fmt: skip
    capsys.readouterr()
    for name, content in contents.items():
        out = tmp_path / name
        shutil.copytree(finished, out)
        (out / "last.pt").write_bytes(content)
        try:
            code = main(["finetune", "--resume", "--quiet", "--out", str(out)])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        assert code in (1, 2), name
        assert error.count("\n") == 1, error
        assert "last.pt" in error or "was made with width 4" in error
        assert (out / "last.pt").read_bytes() == content


def test_results_are_not_overwritten(finished, npz, tmp_path, capsys):
    single = command(npz, "--out", finished)
    for arguments in (single, [argument for argument in single if argument != "--no-compare"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "holds a" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("mine")
    with pytest.raises(SystemExit):
        main(command(npz, "--out", tmp_path))
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_text() == "mine"


def test_a_folder_is_used_by_one_run_at_a_time(npz, tmp_path, capsys):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "qsparseprop", *command(npz, "--epochs", "999", "--out", out)],
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "last.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    for arguments in (command(npz, "--out", out), ["finetune", "--resume", "--quiet", "--out", str(out)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert f"in use by another training (process {process.pid})" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, process.stderr.read()
    process.stderr.close()
    assert not (out / ".lock").exists()


def test_a_full_disk_is_named_and_loses_nothing(npz, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    save = files.torch.save
    writes = []

    def full(content, output):
        writes.append(len(writes))
        if len(writes) > 4:  # the dense training's checkpoint, and two of each epoch
            output.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, output)

    with monkeypatch.context() as patch:
        patch.setattr(files.torch, "save", lambda content, target, *a, **k: full(content, target)
                      if isinstance(target, files._Output) else save(content, target, *a, **k))  # fmt: skip
        assert main(command(npz, "--epochs", "3", "--out", out)) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"python -m qsparseprop finetune: failed: .*\.pt: No space left on device\n", error)
    assert len(read_checkpoint(out / "last.pt")["history"]["losses"]) in (8, 16)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert main(["finetune", "--resume", "--quiet", "--out", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["steps"] == 24


def test_weights_and_models_of_ones_own(npz, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])
    config = RunConfig(model="my_models:small_model", data=str(npz), sparsity=0.8, prune="uniform", batch_size=64,
                       threads=1, epochs=1, pretrain_epochs=2)  # fmt: skip
    trained = run_training(config, tmp_path / "run", progress=False)
    assert trained["layer_sparsity"] == {"2": pytest.approx(0.8, abs=0.01)}
    model = build_model("my_models:small_model", num_classes=4, in_channels=1, image_size=8)
    load_checkpoint(model, tmp_path / "run" / "dense" / "last.pt")
    again = run_training(RunConfig(**{**trained["config"], "weights": str(tmp_path / "run" / "dense" / "last.pt")}))
    assert again["dense_top1"] == trained["dense_top1"]


def test_zeros_in_the_weights_are_taken(npz, tmp_path):
    torch.manual_seed(0)
    model = resnet20(num_classes=4, in_channels=1, width=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4 and name != "conv1.weight":
                parameter *= torch.rand(parameter.shape) < 0.25
    expected = sparsity(model)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.th")
    config = RunConfig(model="resnet20", width=8, data=str(npz), weights=str(tmp_path / "weights.th"), prune="none",
                       epochs=1, threads=1)  # fmt: skip
    result = run_training(config)
    assert result["model_sparsity"] == pytest.approx(expected, abs=0.001)


def test_folders_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for index in range(10):
            image.new("RGB", (12, 10 + index), colour).save(tmp_path / name / f"{index}.png")
    data = load_data(str(tmp_path), image_size=8)
    assert data.train_images.shape == (16, 3, 8, 8)
    assert data.test_images.shape == (4, 3, 8, 8)
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert (data.train_images[data.train_labels == 1][:, 0] > 0).all()
    assert (data.train_images[data.train_labels == 0][:, 0] < 0).all()
    split = tmp_path / "split"
    for part in ("train", "val"):
        for name in ("blue", "red"):
            (split / part / name).mkdir(parents=True)
            image.new("L", (8, 8), 100).save(split / part / name / "0.jpg")
    assert load_data(str(split), image_size=8).train_images.shape == (2, 3, 8, 8)
    (split / "val" / "red" / "0.jpg").write_text("no image")
    with pytest.raises(ConfigurationError, match="cannot read the image"):
        load_data(str(split), image_size=8)
    (split / "val" / "red" / "0.jpg").unlink()
    with pytest.raises(ConfigurationError, match="folders without images: red"):
        load_data(str(split), image_size=8)


# ---- bench ----


def test_bench_of_layers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench"
    arguments = ["bench", "--layer", "Conv2d(8, 8, 3, padding=1)", "--input", "4,8,8,8", "--layer", "Linear(32, 16)",
                 "--input", "64x32", "--sparsity", "0.9", "0.5", "--repeats", "1", "--threads", "1"]  # fmt: skip
    assert main([*arguments, "--out", str(out)]) == 0
    assert "speed-up" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "roofline.png", "speedup.png"]
    result = json.loads((out / "bench.json").read_text())
    assert [(r["name"].split("(")[0], r["sparsity"]) for r in result["results"]] == [
        ("Conv2d", 0.5), ("Conv2d", 0.9), ("Linear", 0.5), ("Linear", 0.9),
    ]  # fmt: skip
    for r in result["results"]:
        assert r["speedup"] == pytest.approx(r["ms"][r["best_dense"]] / r["ms"][r["best_sparse"]])
        assert r["sparse"]["operations"] < r["dense"]["operations"]
    assert all(value > 0 for value in result["limits"].values())
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by_layer", [False, True])
def test_bench_of_a_model(by_layer, capsys):
    arguments = ["bench", "--model", "mlp", "--input", "32,1,8,8", "--sparsity", "0.9", "--threads", "1"]
    assert main([*arguments, *(["--by-layer"] if by_layer else [])]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "x" in line and "90 %" in line]
    assert len([line for line in lines if "..." not in line]) == (3 if by_layer else 1)


def test_layers_are_read_as_pytorch_prints_them():
    for layer in (nn.Linear(3, 4, bias=False), nn.Conv2d(4, 8, (3, 1), stride=(2, 2), padding=(1, 0), groups=2)):
        assert str(parse_layer(str(layer))) == str(layer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_help_of_every_command(capsys):
    for name, options in (("finetune", ("--weights", "--resume", "--compress-saved", "--prune")), ("info", ("FILE",)),
                          ("bench", ("--layer", "--input", "--by-layer")),
                          ("freeze", ("--out", "--keep-float"))):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in options)


def test_masks_hold_in_every_memory_format():
    from qsparseprop.training.recipe import Recipe, make_finetuner
    from qsparseprop.training.setup_run import TrainingMode, prune_model

    for channels_last in (False, True):
        torch.manual_seed(0)
        model = resnet20(width=8, num_classes=4)
        masks = prune_model(model, "uniform", 0.8)["masks"]
        tuner = make_finetuner(model, TrainingMode(False, channels_last), Recipe(learning_rate=1e-2), 1, 8, masks)
        tuner.train_step(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
        for name, mask in masks.items():
            assert not model.get_submodule(name).weight[~mask].any(), name
