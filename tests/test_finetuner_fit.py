"""Whole trainings: position, checkpoints, log, signals, and how they go on afterwards."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qsparseprop
from qsparseprop.training.data import evaluation_loader, training_loader
from qsparseprop.training.finetuner import (
    CheckpointError,
    Finetuner,
    LayerTimer,
    NonFiniteLossError,
    layer_table,
    read_checkpoint,
    write_checkpoint,
)
from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent


def problem(count=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    images[:, 0, 0, 0] += labels
    return images, labels


def sparse_finetuner(**kwargs):
    """Quantised sparse layers (stochastic rounding), dropout, momentum and a schedule: all that has a state."""
    torch.manual_seed(0)
    model = nn.Sequential(resnet20(num_classes=16, width=4), nn.Dropout(0.2), nn.Linear(16, 4))
    layerwise_magnitude_prune(model, 0.8)
    make_pruning_permanent(model)
    model = swap_modules_with_sparse(model, (16, 3, 8, 8), verbose=False, include_dense=False, min_sparsity=0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100)
    return Finetuner(model, optimizer, scheduler=scheduler, **kwargs)


def plain_finetuner(**kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    return Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)


def assert_same_training(ours, theirs):
    assert ours.history.losses == theirs.history.losses
    assert [e.top1 for e in ours.history.evaluations] == [e.top1 for e in theirs.history.evaluations]
    for (name, a), (_, b) in zip(ours.model.state_dict().items(), theirs.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(torch.as_tensor(ours.optimizer.param_groups[0]["lr"]),
                       torch.as_tensor(theirs.optimizer.param_groups[0]["lr"]))  # fmt: skip


class _Raises(Exception):
    pass


def _loader(kind):
    images, labels = problem()
    if kind == "own generator":
        return training_loader(images, labels, 16, seed=3)
    dataset = TensorDataset(images, labels)
    return DataLoader(dataset, batch_size=16, shuffle=True, num_workers=1 if kind == "workers" else 0)


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


# ---- time by layer ----


def test_layer_times_cover_forward_and_backward_without_counting_twice():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.inner(x)
            out += x
            out = self.relu(out)
            time.sleep(0.01)  # its own time, not that of the modules inside
            return out

    model = nn.Sequential(nn.Linear(64, 64), Block())
    with LayerTimer(model) as timer:
        for _ in range(3):
            model(torch.randn(256, 64)).sum().backward()
    times = {t.name: t for t in timer.times()}
    assert set(times) == {"", "0", "1", "1.inner", "1.relu"}
    assert all(t.calls == 3 for t in times.values())
    assert times["1"].forward_ms >= 10
    assert times[""].forward_ms < 10
    for name in ("0", "1.inner", "1.relu"):
        assert 0 < times[name].forward_ms < 10
        assert times[name].backward_ms > 0
    assert times[""].backward_ms == 0
    assert "1.inner" in layer_table(timer.times())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fit_times_layers_on_request(tmp_path):
    tuner = sparse_finetuner()
    result = tuner.fit(_loader("own generator"), 2, folder=tmp_path, time_layers=2)
    assert tuner.history.warmup_steps == {0, 1}
    kinds = {t.kind for t in result.layer_times}
    assert {"QuantizedSparseConv2d", "BatchNorm2d", "Linear"} <= kinds
    assert all(t.calls in (2, 4) for t in result.layer_times if t.kind == "QuantizedSparseConv2d")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if line["event"] == "layer_times"]
    assert len(logged["layers"]) == len(result.layer_times)


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


# ---- processes that end early ----

SCRIPT = """
import sys, torch
from torch import nn
from qsparseprop.training.data import training_loader
from qsparseprop.training.finetuner import Finetuner

torch.set_num_threads(1)
torch.manual_seed(0)
# large enough that writing takes a while
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3000, 4))
tuner = Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
images = torch.randn(48, 3, 8, 8)
loader = training_loader(images, torch.arange(48) % 4, 8, seed=1)
print("ready", flush=True)
result = tuner.fit(loader, int(sys.argv[2]), folder=sys.argv[1], resume=True, checkpoint_every=1)
print(result.stopped_by and result.stopped_by.name, len(tuner.history.losses), flush=True)
torch.save(tuner.model.state_dict(), sys.argv[1] + ".result")
"""


#: Sparse layers in 8 bits with stochastic rounding, batch normalisation, dropout, AdamW and a schedule; the process
#: kills itself at a point inside the writing of its n-th checkpoint.
SPARSE_SCRIPT = """
import io, os, random, signal, sys
import numpy, torch
from torch import nn
from qsparseprop.training.data import evaluation_loader, training_loader
from qsparseprop.training.finetuner import Finetuner, checkpoint
from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent

folder, epochs, point, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
save, replace, writes = checkpoint.save_tensors, os.replace, 0

def die():
    print(len(tuner.history.losses), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def saving(content, target):
    global writes
    if ".last.pt." in target.name:
        writes += 1
        if writes == wanted and point == "half":
            buffer = io.BytesIO()
            torch.save(content, buffer)
            target.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            die()
    return save(content, target)

def replacing(source, target):
    ours = str(target).endswith("last.pt") and writes == wanted
    if ours and point == "before":
        die()
    replace(source, target)
    if ours and point == "after":
        die()

checkpoint.save_tensors, os.replace = saving, replacing
torch.set_num_threads(1)
random.seed(0)
numpy.random.seed(0)
torch.manual_seed(0)
model = nn.Sequential(resnet20(num_classes=16, width=4), nn.Dropout(0.2), nn.Linear(16, 4))
layerwise_magnitude_prune(model, 0.8)
make_pruning_permanent(model)
model = swap_modules_with_sparse(model, (16, 3, 8, 8), verbose=False, include_dense=False, min_sparsity=0.7)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
tuner = Finetuner(model, optimizer, scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100))
images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
tuner.fit(training_loader(images, labels, 16, seed=3), epochs, folder=folder, resume=True, checkpoint_every=2,
          evaluation_batches=evaluation_loader(images, labels, 32))
print(len(tuner.history.losses), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(folder, *arguments, script=SCRIPT):
        file = tmp_path / f"train{len(script)}.py"
        file.write_text(textwrap.dedent(script))
        return subprocess.Popen([sys.executable, str(file), str(folder), *map(str, arguments)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})  # fmt: skip

    return run


def assert_same_content(ours, theirs, where=""):
    """Equality of all that a checkpoint holds, except for times."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            if "seconds" not in str(key):
                assert_same_content(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same_content(*pair, f"{where}/{i}")
    else:
        assert ours == theirs, where


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_at_any_point_of_writing_a_checkpoint_changes_nothing_but_the_time(start, tmp_path):
    """A resumed training ends with the uninterrupted one's last checkpoint, bit for bit and as a whole."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(whole, 3, "never", 0, script=SPARSE_SCRIPT)) == ["12"]
    before = 0
    for point, number in (("half", 1), ("half", 2), ("before", 2), ("after", 2), ("half", 2)):
        process = start(folder, 3, point, number, script=SPARSE_SCRIPT)
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (-signal.SIGKILL, "")
        killed_at = int(out)
        assert before <= killed_at <= 12
        assert any(folder.glob(".last.pt.*.tmp")) == (point != "after")
        done = 0
        if (folder / "last.pt").exists():
            done = len(read_checkpoint(folder / "last.pt")["history"]["losses"])
        # at the end of an epoch the same step is written twice, with the evaluation
        assert done == killed_at if point == "after" else killed_at - 2 <= done <= killed_at
        before = done
    assert before > 0
    assert finish(start(folder, 3, "never", 0, script=SPARSE_SCRIPT)) == ["12"]
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    for name in ("last.pt", "best.pt"):
        assert_same_content(read_checkpoint(folder / name), read_checkpoint(whole / name))


def finish(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    return out.split()


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_while_a_checkpoint_is_written_loses_nothing_but_the_last_step(start, tmp_path):
    folder = tmp_path / "killed"
    whole = start(tmp_path / "whole", 2)
    assert finish(whole) == ["ready", "None", "12"]
    killed_inside = 0
    for wanted in (3, 7):
        process = start(folder, 2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            log = folder / "log.jsonl"
            written = log.read_text().count('"event": "checkpoint"') if log.exists() else 0
            if written >= wanted and any(folder.glob(".last.pt.*.tmp")):
                process.kill()
                break
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        killed_inside += any(folder.glob(".last.pt.*.tmp"))
        done = len(read_checkpoint(folder / "last.pt")["history"]["losses"])
        logged = [line for line in (folder / "log.jsonl").read_text().splitlines() if '"checkpoint"' in line]
        assert json.loads(logged[-1])["step"] <= done <= 11
    assert killed_inside, "no kill hit the writing of a checkpoint"
    assert finish(start(folder, 2)) == ["ready", "None", "12"]
    assert not any(folder.glob(".*.tmp"))
    ours, theirs = torch.load(f"{folder}.result"), torch.load(tmp_path / "whole.result")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(number, start, tmp_path):
    folder = tmp_path / "stopped"
    process = start(folder, 10_000)
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not (folder / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    name, steps = finish(process)
    assert name == number.name
    assert len(read_checkpoint(folder / "last.pt")["history"]["losses"]) == int(steps)
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["stopped_by"] == number.name
