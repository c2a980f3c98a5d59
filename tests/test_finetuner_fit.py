"""Whole trainings: any batch, loss, optimizer and schedule; files, log, progress, and how they go on afterwards."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsparseprop import swap_modules_with_sparse
from qsparseprop.training.data import evaluation_loader
from qsparseprop.training.finetuner import (
    CheckpointError,
    Finetuner,
    NonFiniteLossError,
    read_checkpoint,
    write_checkpoint,
)

from ._finetuning import _loader, assert_same_training, plain_finetuner, problem, sparse_finetuner


class _Raises(Exception):
    pass


@pytest.mark.parametrize("kind", ["own generator", "default generator", "workers"])
@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(kind, stop_at, tmp_path):
    evaluation = evaluation_loader(*problem(), 32)
    whole = sparse_finetuner()
    whole.fit(_loader(kind), 3, evaluation_batches=evaluation)
    assert len(whole.history.losses) == 12

    class Crash:
        steps = 0

        def __call__(self):
            self.steps += 1
            if self.steps > stop_at:
                raise _Raises

    first = sparse_finetuner(after_step=Crash())
    with pytest.raises(_Raises):
        first.fit(_loader(kind), 3, evaluation_batches=evaluation, folder=tmp_path, checkpoint_every=2)
    saved = len(read_checkpoint(tmp_path / "last.pt")["history"]["losses"])
    assert saved == stop_at // 2 * 2
    second = sparse_finetuner()
    torch.rand(5)  # the state of the generators comes from the checkpoint alone
    result = second.fit(_loader(kind), 3, evaluation_batches=evaluation, folder=tmp_path, resume=True)
    assert_same_training(second, whole)
    assert result.stopped_by is None
    assert result.best == second.history.best


def test_training_on_after_the_last_epoch_is_the_same_as_training_longer():
    longer = sparse_finetuner()
    longer.fit(_loader("own generator"), 2)
    shorter = sparse_finetuner()
    loader = _loader("own generator")
    shorter.fit(loader, 1)
    shorter.fit(loader, 2)
    assert_same_training(shorter, longer)


def test_evaluations_do_not_change_a_training():
    plain = sparse_finetuner()
    plain.fit(_loader("default generator"), 2)
    evaluated = sparse_finetuner()
    shuffled = DataLoader(TensorDataset(*problem()), batch_size=16, shuffle=True)
    evaluated.fit(_loader("default generator"), 2, evaluation_batches=shuffled)
    assert plain.history.losses == evaluated.history.losses


def test_files_and_log(tmp_path):
    tuner = plain_finetuner()
    loader = _loader("own generator")
    tuner.fit(loader, 2, evaluation_batches=evaluation_loader(*problem(), 32), folder=tmp_path / "new" / "run")
    folder = tmp_path / "new" / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    events = ["start", *["step"] * 4, "evaluation", "checkpoint", *["step"] * 4, "evaluation", "checkpoint", "end"]
    assert [line["event"] for line in lines] == events
    steps = [line for line in lines if line["event"] == "step"]
    assert [s["loss"] for s in steps] == tuner.history.losses
    assert [s["step"] for s in steps] == list(range(1, 9))
    assert all(s["samples"] == 16 and 0 <= s["accuracy"] <= 1 and s["seconds"] > 0 for s in steps)
    best = read_checkpoint(folder / "best.pt")
    assert best["evaluation"] == vars(tuner.history.best)
    assert best["model"].keys() == tuner.model.state_dict().keys()


def test_the_best_model_is_kept_not_the_last(tmp_path):
    tuner = plain_finetuner()
    images, labels = problem()
    tuner.fit([(images, labels)], 3, evaluation_batches=[(images, labels)], folder=tmp_path)
    good = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    best = tuner.history.best
    tuner.optimizer.param_groups[0]["lr"] = -1.0  # climbs from now on
    (tmp_path / "last.pt").unlink()
    tuner.fit([(images, labels)], 5, evaluation_batches=[(images, labels)], folder=tmp_path)
    assert tuner.history.best == best
    content = read_checkpoint(tmp_path / "best.pt")
    assert all(torch.equal(content["model"][k], v) for k, v in good.items())


def test_a_log_that_was_cut_off_in_a_line_goes_on_with_whole_lines(tmp_path):
    tuner = plain_finetuner()
    tuner.fit([problem()], 1, folder=tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "st')
    again = plain_finetuner()
    again.fit([problem()], 2, folder=tmp_path, resume=True)
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "step", "checkpoint", "end", "resume", "step", "checkpoint", "end"]


def test_a_checkpoint_is_not_overwritten_by_accident(tmp_path):
    plain_finetuner().fit([problem()], 1, folder=tmp_path)
    tuner = plain_finetuner()
    with pytest.raises(FileExistsError, match="resume it"):
        tuner.fit([problem()], 1, folder=tmp_path)
    assert tuner.history.losses == []


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not really"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
        plain_finetuner().load(tmp_path / "last.pt")
    torch.save({"state_dict": {}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a Finetuner"):
        plain_finetuner().load(tmp_path / "last.pt")


def test_a_checkpoint_of_another_training_changes_nothing(tmp_path):
    path = tmp_path / "other.pt"
    other = plain_finetuner()
    other.model.append(nn.Linear(4, 4))
    with torch.no_grad():
        other.model[1].weight.fill_(7.0)
    other.save(path)
    tuner = plain_finetuner()
    tuner.fit([problem()], 1)
    before = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    losses = list(tuner.history.losses)
    with pytest.raises(CheckpointError, match="does not go with this training"):
        tuner.load(path)
    assert all(torch.equal(v, before[k]) for k, v in tuner.model.state_dict().items())
    assert tuner.history.losses == losses
    with pytest.raises(CheckpointError, match="schedule"):
        sparse_finetuner().load(path)
    with pytest.raises(CheckpointError, match="further states"):
        plain_finetuner(stateful={"pruner": torch.optim.SGD([torch.zeros(1)], 0.1)}).load(path)


def test_further_states_are_kept(tmp_path):
    class Counter:
        count = 0

        def __call__(self):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    counter = Counter()
    plain_finetuner(after_step=counter, stateful={"counter": counter}).fit([problem()] * 3, 1, folder=tmp_path)
    again = Counter()
    plain_finetuner(stateful={"counter": again}).load(tmp_path / "last.pt")
    assert again.count == 3


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="'schedule' holds more than tensors"):
        write_checkpoint({"schedule": {"function": Path("x")}}, tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"epochs": 1, "resume": True}, ValueError, "need a folder"),
        ({"epochs": 1, "checkpoint_every": 1}, ValueError, "need a folder"),
        ({"epochs": 1, "train_batches": iter([])}, TypeError, "only once"),
    ],
)
def test_nonsense_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        plain_finetuner().fit(**{"train_batches": [problem()], **arguments})


# ---- any batch, loss, optimizer and schedule ----


def test_mappings_regression_and_schedules_by_epoch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, values, scale):
            class Output:
                logits = self.linear(values) * scale

            return Output

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator)
    batches = [{"values": x, "scale": torch.tensor(2.0), "labels": x[:, :2] * 3}] * 20
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = Finetuner(model, optimizer, loss_function=nn.functional.mse_loss, scheduler_per_epoch=True,
                      scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))  # fmt: skip
    result = tuner.fit(batches, 2, evaluation_batches=batches[:1])
    assert result.best.top1 is None
    assert result.best.loss < 0.01 * tuner.history.losses[0]
    assert tuner.evaluate(batches[:1]) == result.best.loss
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_an_optimizer_that_evaluates_the_loss_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    tuner = Finetuner(model, torch.optim.LBFGS(model.parameters(), max_iter=5))
    tuner.fit([problem()] * 3, 1)
    assert tuner.history.losses[-1] < 0.5 * tuner.history.losses[0]


def test_a_plateau_schedule_follows_the_evaluations():
    tuner = plain_finetuner()
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau
    tuner.scheduler = schedule(tuner.optimizer, patience=0, threshold=9, threshold_mode="abs")
    tuner.fit([problem()], 3, evaluation_batches=[problem()])
    assert tuner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_gradients_are_clipped():
    tuner = plain_finetuner(max_grad_norm=1e-3)
    before = [p.detach().clone() for p in tuner.model.parameters()]
    tuner.train_step(*problem())
    moved = torch.cat([(p - b).flatten() for p, b in zip(tuner.model.parameters(), before, strict=True)])
    assert moved.detach().norm() == pytest.approx(0.1 * 1e-3, rel=1e-3)


# ---- what is not finite ----


def test_the_first_bad_layer_is_named():
    images, labels = problem()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Linear(4, 4))
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tuner.train_step(images, labels)
    with torch.no_grad():
        model[3].weight[0, 0] = float("inf")
    statistics = model[2].running_mean.clone()
    weight = model[1].weight.clone()
    with pytest.raises(NonFiniteLossError, match="step 2: 'weight' of layer '3'") as caught:
        tuner.train_step(images, labels)
    assert (caught.value.step, caught.value.layer) == (2, "3")
    assert torch.equal(model[1].weight, weight)
    assert not torch.equal(model[2].running_mean, statistics)  # the failed forward pass, but not the search
    with torch.no_grad():
        model[3].weight[0, 0] = 3e38
        model[4].weight.fill_(3e38)
    with pytest.raises(NonFiniteLossError, match=r"output of layer '[34]'"):
        tuner.train_step(images, labels)


def test_targets_and_inputs_can_be_to_blame(tmp_path):
    images, _ = problem()
    tuner = plain_finetuner(loss_function=lambda outputs, targets: (outputs / targets).mean())
    with pytest.raises(NonFiniteLossError, match="targets and the loss function") as caught:
        tuner.fit([(images, torch.zeros(64, 4))], 1, folder=tmp_path)
    assert caught.value.layer is None
    with pytest.raises(NonFiniteLossError, match="input of the model"):
        plain_finetuner().train_step(images * float("inf"), torch.zeros(64, dtype=torch.int64))
    last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "error"


# ---- progress ----


def test_progress_shows_loss_accuracy_and_speed(capsys):
    pytest.importorskip("tqdm")
    plain_finetuner().fit([problem()] * 3, 1, progress=True)
    shown = capsys.readouterr().err
    for part in ("epoch 1/1", "loss", "accuracy", "images/s", "3/3"):
        assert part in shown


def test_progress_without_tqdm_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    tuner = plain_finetuner()
    with pytest.raises(ImportError, match="pip install tqdm"):
        tuner.fit([problem()], 1, progress=True)
    tuner.fit([problem()], 1, progress=None)
    assert len(tuner.history.losses) == 1


def test_an_optimizer_of_the_model_before_its_swap_is_told_of():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap_modules_with_sparse(model, None, include_dense=False, min_sparsity=0, verbose=False)
    batches = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
    with pytest.warns(UserWarning, match=r"does not have \d of .* \(0\..*make the optimizer after the swap") as seen:
        Finetuner(model, optimizer).fit(batches, 1)
    assert [one.filename for one in seen] == [__file__]
    # a part of the model, and parameters of the loss, are meant; warnings are errors here
    Finetuner(model, torch.optim.SGD(model[0].parameters(), lr=0.1)).fit(batches, 1)
    loss = nn.CrossEntropyLoss()
    loss.scale = nn.Parameter(torch.ones(()))
    Finetuner(model, torch.optim.SGD([model[0].weight, loss.scale], lr=0.1), loss_function=loss).fit(batches, 1)


def test_epochs_that_are_done_count_and_one_is_told_so():
    tuner, loader = plain_finetuner(), _loader("own generator")
    tuner.fit(loader, 1)
    tuner.fit(loader, 2)
    with pytest.warns(UserWarning, match=r"2 epochs are done, and epochs=1 counts .*; epochs=3 trains 1 more") as told:
        tuner.fit(loader, 1)
    assert told[0].filename == __file__
    assert tuner.epoch == 2
