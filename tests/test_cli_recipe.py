"""Optimizers, schedules, accumulation and transfer by the command line."""

import json

import numpy as np
import pytest
import torch

from qsparseprop.cli import main
from qsparseprop.nn.deferred import conditions
from qsparseprop.training.finetuner import read_checkpoint
from qsparseprop.training.models import cifar_resnet
from qsparseprop.utils.files import save_tensors

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Coloured noise whose class is the brightness of a channel."""
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 208), ("test", 32)):
        labels = np.arange(count) % 3
        images = random.integers(0, 80, (count, 8, 8, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 120
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(autouse=True)
def _small_results_too(_defer_small_results, monkeypatch):
    monkeypatch.setattr(conditions, "LEAST_ELEMENTS", 1 << 16)


def command(npz, *arguments):
    return ["finetune", "--data", str(npz), "--model", "resnet20", "--width", "8", "--threads", "1", "--quiet",
            "--batch-size", "16", "--no-compare", *map(str, arguments)]  # fmt: skip


RECIPE = ("--optimizer", "sgd", "--momentum", 0.8, "--learning-rate", 0.1, "--pretrain-learning-rate", 0.2,
          "--weight-decay", 0, "--schedule", "cosine", "--warmup", 0.5, "--accumulate", 2)  # fmt: skip


@pytest.mark.parametrize("scheme", ["int8", "dense"])
def test_a_training_by_a_recipe_of_its_own(scheme, npz, tmp_path, capsys):
    out = tmp_path / "run"
    options = (*RECIPE, "--evaluate-every", 2, "--scheme", scheme, "--precision", "fp32")
    assert main(command(npz, "--epochs", "3", "--out", out, *options)) == 0
    assert "7 steps" not in capsys.readouterr().out  # quiet
    result = json.loads((out / "result.json").read_text())
    assert result["top1"] > 60
    assert result["steps"] == len(result["losses"]) == 21  # of two batches, and one of the thirteenth alone
    assert [evaluation["step"] for evaluation in result["evaluations"]] == [14, 21]
    settings = json.loads((out / "run.json").read_text())
    assert settings["momentum"] == 0.8
    for folder, peak in ((out, 0.1), (out / "dense", 0.2)):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        steps = [line for line in log if line["event"] == "step"]
        assert [line["samples"] for line in steps[:7]] == [32] * 6 + [16]
        rates = [line["learning_rate"] for line in steps]
        assert rates[0] == pytest.approx(peak / 4)
        assert max(rates) == pytest.approx(peak)
        assert rates[-1] < 0.3 * peak  # the dense one has but seven steps
    optimizer = read_checkpoint(out / "last.pt")["optimizer"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.0, 0.0]
    assert all(group["nesterov"] for group in optimizer["param_groups"])


def test_gradual_pruning_goes_by_steps(npz, tmp_path):
    out = tmp_path / "run"
    options = (*RECIPE, "--prune", "gradual", "--sparsity", 0.95, "--width", 16)
    assert main(command(npz, "--epochs", "2", "--out", out, *options)) == 0
    assert json.loads((out / "result.json").read_text())["model_sparsity"] > 0.9


def test_runs_of_before_there_were_recipes_are_resumed(npz, tmp_path, capsys):
    whole, old = tmp_path / "whole", tmp_path / "old"
    later = ("optimizer", "momentum", "weight_decay", "schedule", "warmup", "pretrain_learning_rate", "accumulate",
             "evaluate_every")  # fmt: skip
    for out in (whole, old):
        assert main(command(npz, "--scheme", "dense", "--out", out)) == 0
    settings = json.loads((old / "run.json").read_text())
    assert {name for name in later if name in settings} == set(later)
    (old / "run.json").write_text(json.dumps({name: v for name, v in settings.items() if name not in later}))
    (old / "result.json").unlink()
    state = read_checkpoint(old / "last.pt")
    for name in later:
        del state["stateful"]["run"]["config"][name]
    del state["accumulate"], state["schedule"]
    save_tensors(state, old / "last.pt")
    for refused in (("--optimizer", "sgd"), ("--accumulate", "2"), ("--schedule", "cosine")):
        with pytest.raises(SystemExit):
            main(["finetune", "--resume", "--quiet", "--out", str(old), *refused])
        name = refused[0].removeprefix("--")
        assert f"has {name} " in capsys.readouterr().err
    assert main(["finetune", "--resume", "--quiet", "--out", str(old)]) == 0
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (old, whole))
    assert ours["losses"] == theirs["losses"]
    assert ours["config"] == theirs["config"]


def test_settings_that_do_not_go_together_are_explained(npz, capsys):
    cases = [
        (("--momentum", "0.9"), "momentum goes with the optimizer sgd only"),
        (("--warmup", "1"), "onecycle has a rise of its own"),
        (("--warmup", "1", "--schedule", "cosine"), "warmup must be shorter than epochs"),
        (("--momentum", "1", "--optimizer", "sgd"), "must lie between 0 and 1, of which only the first is possible"),
        (("--weight-decay", "-1"), "must lie between 0 and 10, of which only the first is possible"),
        (("--accumulate", "2", "--compare"), "--accumulate is for a single training"),
        (("--evaluate-every", "2", "--compare"), "--evaluate-every is for a single training"),
        (("--model", "timm:no-such-network"), "timm"), (("--model", "resnet57"), "unknown model 'resnet57'"),
    ]  # fmt: skip
    for arguments, complaint in cases:
        with pytest.raises(SystemExit) as stop:
            main(command(npz, *arguments))
        assert stop.value.code == 2, arguments
        error = capsys.readouterr().err
        assert complaint in error, arguments
        assert error.count("\n") == 1, error


def test_weights_of_other_classes_start_a_network_for_larger_images(npz, tmp_path):
    torch.manual_seed(1)
    state = {f"module.{key}": value for key, value in cifar_resnet(32, width=4).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.th")
    out = tmp_path / "run"
    assert main(command(npz, "--model", "resnet32", "--width", 4, "--weights", tmp_path / "weights.th", "--new-head",
                        "--image-size", 12, "--normalize", "imagenet", "--out", out)) == 0  # fmt: skip
    assert read_checkpoint(out / "last.pt")["model"]["linear.weight"].shape == (3, 16)
