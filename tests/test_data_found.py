"""What a fresh user has found on the way from images and options to trainings."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from qsparseprop import arguments
from qsparseprop.cli import main
from qsparseprop.training import Finetuner
from qsparseprop.training import run as training_run
from qsparseprop.training.data import image_loader, load_data
from qsparseprop.training.data.images import read_image
from qsparseprop.training.finetuner import read_checkpoint
from qsparseprop.training.run import RunConfig, run_training
from qsparseprop.training.run_config import stored_settings
from qsparseprop.training.setup_run import prepare_network
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import save_tensors

from ._image_folders import config, folder

RANDOM = np.random.default_rng(0)


def npz(path, train, test):
    labels = {"y_train": np.arange(len(train)) % 2, "y_test": np.arange(len(test)) % 2}
    np.savez(path, x_train=train, x_test=test, **labels)
    return path


# ---- images ----


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_no_seed_is_tested_on_what_another_has_trained_on(source, tmp_path):
    """A network is trained dense with one seed, and pruned ones begin there with others."""
    if source == "digits":
        pytest.importorskip("sklearn")
    data = "digits" if source == "digits" else folder(tmp_path / "photos")
    tests = [prepare_network(config(data, seed=seed))[1].test_images for seed in (0, 1)]
    assert torch.equal(*tests)


def test_runs_of_before_keep_the_test_images_of_their_seed(tmp_path):
    data = folder(tmp_path / "photos")
    (tmp_path / "run.json").write_text(json.dumps({"data": str(data), "model": "mlp", "width": 16, "seed": 3,
                                                      "batch_size": 8}))
    old = RunConfig(**stored_settings(tmp_path))
    theirs = load_data(str(data), seed=3)
    assert prepare_network(old)[1].fingerprint() == theirs.fingerprint() != load_data(str(data)).fingerprint()


@pytest.mark.parametrize("kinds", [("float", "bytes"), ("bytes", "float"), ("wide", "bytes"), ("bytes", "wide")])
def test_both_parts_have_one_scale_whatever_they_are_stored_in(kinds, tmp_path):
    pixels = RANDOM.integers(0, 256, (8, 4, 4), dtype=np.uint8)
    pixels[0] = 255
    made = {"bytes": pixels, "float": pixels / np.float32(255), "wide": pixels.astype(np.int32)}
    made["wide"][0, 0, 0] = 256
    data = load_data(str(npz(tmp_path / "x.npz", *(made[kind] for kind in kinds))))
    torch.testing.assert_close(data.train_images, data.test_images, atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_pixels_of_16_bits_lose_the_lower_8(kind, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image.fromarray(pixels).save(tmp_path / f"x.{kind}")
    assert (read_image(str(tmp_path / f"x.{kind}"), 64)[..., 0] == pixels >> 8).all()


def test_pixels_of_32_bits_may_mean_anything(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number, dtype in enumerate((np.int32, np.float32)):
        image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / f"{number}.tif")
        with pytest.raises(ConfigurationError, match="its pixels have 32 bits"):
            read_image(str(tmp_path / f"{number}.tif"), 8)


def test_parts_of_images_are_two_and_batches_not_empty(tmp_path):
    data = load_data(str(folder(tmp_path)), image_size=8)
    for part, batch_size, complaint in (("tarin", 4, "must be 'train' or 'test'"), ("test", 0, "at least 1, got 0")):
        with pytest.raises(ConfigurationError, match=complaint):
            image_loader(data, part, batch_size)


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path):
    data = folder(tmp_path, ("cat", "dog", ".ipynb_checkpoints"))
    (data / "cat" / "._0.png").write_bytes(b"\0\5\x16\7 what macOS knows of 0.png")
    found = load_data(str(data), image_size=8)
    assert found.num_classes == 2
    assert len(found.train.labels) + len(found.test.labels) == 20


def test_a_class_without_images_is_told_of(tmp_path):
    data = folder(tmp_path, ("ant", "cat"))
    (data / "bee" / "more").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="has folders without images: bee"):
        load_data(str(data), image_size=8)


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are no text")
def test_names_of_files_need_not_be_text(tmp_path):
    data = folder(tmp_path / "photos")
    os.rename(os.fsencode(data / "cat" / "0.png"), os.fsencode(data / "cat") + b"/caf\xe9.png")
    assert len(load_data(str(data), image_size=8).fingerprint()) == 16


# ---- options and folders ----


def test_an_option_that_has_its_default_is_one_that_was_given(tmp_path, capsys):
    pixels = RANDOM.integers(0, 256, (16, 8, 8), dtype=np.uint8)
    data = npz(tmp_path / "x.npz", pixels, pixels)
    run_training(config(data, optimizer="sgd", epochs=2, scheme="dense"), tmp_path / "run", progress=False)
    for option, value in (("--epochs", "1"), ("--optimizer", "adamw"), ("--scheme", "int8"), ("--batch-size", "64")):
        with pytest.raises(SystemExit):
            main(["finetune", "--resume", "--quiet", "--out", str(tmp_path / "run"), option, value])
        assert f"has {option[2:].replace('-', '_')} " in capsys.readouterr().err
    same = ("--epochs", "2", "--optimizer", "sgd")
    assert main(["finetune", "--resume", "--quiet", "--out", str(tmp_path / "run"), *same]) == 0


def test_options_that_would_do_nothing_are_refused(capsys):
    for options, complaint in (
        (("--weights", "x.pt", "--pretrain-epochs", "7"), "--pretrain-epochs is for the training before pruning"),
        (("--weights", "x.pt", "--pretrain-learning-rate", "1"), "--pretrain-learning-rate is for the training before"),
        (("--data", "digits", "--normalize", "imagenet", "--model", "mlp"), "are not normalised as ImageNet is"),
    ):
        with pytest.raises(SystemExit):
            main(["finetune", "--no-compare", "--quiet", *options])
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("old", [False, True])
def test_the_dense_training_is_resumed_with_its_own_images(old, tmp_path, monkeypatch):
    """Images of a run are known from its first checkpoint on, in those written before this was so from the second."""
    pixels = RANDOM.integers(0, 256, (32, 8, 8), dtype=np.uint8)
    data, run = npz(tmp_path / "x.npz", pixels, pixels), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training_run._State, "prune", lambda *_: pytest.fail("too late"))
        with pytest.raises(pytest.fail.Exception):
            run_training(config(data, scheme="dense"), run, progress=False)
    if old:
        state = read_checkpoint(run / "dense" / "last.pt")
        del state["stateful"]["dense"]
        save_tensors(state, run / "dense" / "last.pt")
    else:
        npz(data, pixels[::-1], pixels)
        with pytest.raises(ConfigurationError, match="are not those that the run"):
            run_training(RunConfig(), run, resume=True, progress=False)
        npz(data, pixels, pixels)
    assert run_training(RunConfig(), run, resume=True, progress=False)["steps"] == 8


def test_a_folder_of_images_may_have_been_moved(tmp_path, capsys):
    data, run = folder(tmp_path / "photos"), tmp_path / "run"
    run_training(config(data), run, progress=False)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(data, tmp_path / "elsewhere" / "images")
    other = folder(tmp_path / "others", images=9)
    before = (run / "run.json").read_text()
    with pytest.raises(SystemExit):
        main(["finetune", "--resume", "--quiet", "--out", str(run), "--data", str(other)])
    assert "are not those that the run" in capsys.readouterr().err
    assert (run / "run.json").read_text() == before
    again = ["finetune", "--resume", "--quiet", "--out", str(run)]
    assert main([*again, "--data", str(moved), "--workers", "1"]) == 0
    settings = json.loads((run / "run.json").read_text())
    assert (settings["data"], settings["workers"]) == (str(moved), 1)
    assert main(again) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sampler_within_a_batch_sampler_is_told_the_epoch(accumulate):
    class Counting(torch.utils.data.SequentialSampler):
        def __init__(self, data):
            super().__init__(data)
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    images = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    sampler = Counting(images)
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=torch.utils.data.BatchSampler(sampler, batch_size=4, drop_last=False))
    model = torch.nn.Linear(3, 2)
    Finetuner(model, torch.optim.SGD(model.parameters(), 0.1), accumulate=accumulate).fit(loader, epochs=3)
    assert sampler.epochs == [0, 1, 2]


def test_numbers_of_numpy_are_numbers(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), np.logspace(-1, 0, 2)[0])
    tuner = Finetuner(model, optimizer, accumulate=np.int64(2),
                      scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, np.float64(0.5)))  # fmt: skip
    batches = [(torch.randn(4, 3), torch.arange(4) % 2)] * 4
    tuner.fit(batches, epochs=np.int64(1), folder=tmp_path, checkpoint_every=np.int64(1), evaluate_every=np.int64(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    again = Finetuner(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), accumulate=2)
    again.load(tmp_path / "last.pt")
    assert len(again.history.losses) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_is_true_is_true_and_what_was_traced_is_a_model():
    arguments.flag(np.bool_(True), "verbose")
    with pytest.raises(TypeError, match=r"verbose must be True or False, got 1"):
        arguments.flag(1, "verbose")
    traced = torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3))
    tuner = Finetuner(traced, torch.optim.SGD(traced.parameters(), 0.1))
    assert tuner.train_step(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)) > 0
    with pytest.raises(TypeError, match="lacks what super"):
        arguments.model(torch.nn.Linear.__new__(torch.nn.Linear))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_that_does_not_say_how_much_it_is(accumulate):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(3), number % 2) for number in range(12)])

    model = torch.nn.Linear(3, 2)
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.1), accumulate=accumulate)
    tuner.fit(torch.utils.data.DataLoader(Stream(), batch_size=4), epochs=2)
    assert tuner.history.samples == ([4] * 6 if accumulate == 1 else [8, 4] * 2)


# ---- networks that cannot be pruned ----


def only_a_classifier(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, num_classes))


def normalised(num_classes):
    middle = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8), middle, torch.nn.Linear(8, num_classes))


@pytest.mark.parametrize(("network", "says"), [
    (only_a_classifier, "has nothing to prune: the first and the last Conv2d or Linear stay dense"),
    (normalised, "cannot be pruned: the weight of 2 cannot be pruned: it is no parameter"),
])  # fmt: skip
def test_what_cannot_be_pruned_is_not_trained_for_it(network, says, tmp_path, capsys):
    data = folder(tmp_path / "photos")
    command = ["finetune", "--no-compare", "--quiet", "--data", str(data), "--model", f"{__name__}:{network.__name__}",
               "--image-size", "8", "--batch-size", "8", "--threads", "1", "--out", str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main([*command, "--prune", "uniform"])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--sparsity", "0", "--scheme", "dense"]) == 0
