import copy

import pytest
import torch
from torch import nn

from qsparseprop.training.data import evaluation_loader, training_loader
from qsparseprop.training.finetuner import Finetuner, History
from qsparseprop.training.models import resnet20


def _problem(count=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    # Each class is bright in a quadrant of its own.
    images = 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        images[index, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return images, labels


def _finetuner(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = resnet20(num_classes=4, width=4)
    return Finetuner(model, torch.optim.AdamW(model.parameters(), lr=5e-3), **kwargs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_it_learns_and_records(memory_format, autocast_dtype):
    images, labels = _problem()
    tuner = _finetuner(memory_format=memory_format, autocast_dtype=autocast_dtype)
    loader = training_loader(images, labels, batch_size=16, seed=0)
    for _ in range(6):
        tuner.train(loader)
    top1 = tuner.evaluate(evaluation_loader(images, labels, batch_size=20))
    assert top1 > 80
    history = tuner.history
    assert len(history.losses) == len(history.step_seconds) == 24
    assert sum(history.losses[-4:]) < sum(history.losses[:4]) / 2
    assert history.train_seconds == pytest.approx(sum(history.step_seconds))
    (evaluation,) = history.evaluations
    assert (evaluation.step, evaluation.top1) == (24, top1)
    assert evaluation.train_seconds == history.train_seconds


def test_it_does_what_a_plain_loop_does():
    images, labels = _problem(32)
    tuner = _finetuner()
    model = copy.deepcopy(tuner.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for start in (0, 16):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[start : start + 16]), labels[start : start + 16])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tuner.train([(images[:16], labels[:16]), (images[16:], labels[16:])])
    assert tuner.history.losses == losses
    for ours, plain in zip(tuner.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_callbacks_and_scheduler_run_once_a_step():
    images, labels = _problem(32)
    events = []
    tuner = _finetuner(after_step=lambda: events.append("mask"))
    tuner.scheduler = torch.optim.lr_scheduler.StepLR(tuner.optimizer, step_size=1, gamma=0.1)
    tuner.train(training_loader(images, labels, 16, seed=0), on_step=lambda loss: events.append(loss))
    first, second = tuner.history.losses
    assert events == ["mask", first, "mask", second]
    assert tuner.optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)


def test_a_loss_that_is_not_finite_stops_the_training():
    images, labels = _problem(16)
    tuner = _finetuner()
    with pytest.raises(FloatingPointError, match="nan in training step 1"):
        tuner.train([(images * float("nan"), labels)])
    assert tuner.history.losses == []


def test_evaluation_counts_a_smaller_last_batch_by_its_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0, 0, 0].long(), 4).float()

    images = torch.zeros(10, 1, 2, 2)
    labels = torch.tensor([0] * 8 + [1] * 2)
    model = Fixed()
    tuner = Finetuner(model, torch.optim.SGD([torch.zeros(1)], 0.1))
    assert tuner.evaluate(evaluation_loader(images, labels, batch_size=8)) == 80


def test_evaluation_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        _finetuner().evaluate([])


def test_evaluation_does_not_disturb_training():
    images, labels = _problem(32)
    losses = []
    for evaluate in (False, True):
        tuner = _finetuner()
        for start in (0, 16):
            tuner.train_step(images[start : start + 16], labels[start : start + 16])
            if evaluate:
                tuner.evaluate([(images, labels)])
        losses.append(tuner.history.losses)
    assert losses[0] == losses[1]


def test_median_leaves_out_warmup_steps():
    history = History(losses=[0.0] * 4, step_seconds=[9.0, 1.0, 2.0, 3.0], warmup_steps={0})
    assert history.timed_seconds() == [1.0, 2.0, 3.0]
    assert history.median_step_seconds() == 2.0
    assert History([0.0], [5.0], {0}).median_step_seconds() == 5.0


def test_each_call_of_train_marks_its_own_warmup():
    images, labels = _problem(16)
    tuner = _finetuner()
    for _ in range(2):
        tuner.train([(images, labels)] * 3, warmup=1)
    assert tuner.history.warmup_steps == {0, 3}


def test_training_batches_are_seeded_shuffled_and_of_equal_size():
    images, labels = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10)

    def epochs(seed):
        loader = training_loader(images, labels, 4, seed)
        assert len(loader) == 2
        return [[batch.tolist() for _, batch in loader] for _ in range(2)]

    first = epochs(3)
    assert all(len(batch) == 4 for epoch in first for batch in epoch)
    assert all(len({*epoch[0], *epoch[1]}) == 8 for epoch in first)
    assert first[0] != first[1]
    assert epochs(3) == first
    assert epochs(4) != first
    for inputs, targets in training_loader(images, labels, 4, 0):
        assert torch.equal(inputs.flatten().long(), targets)


def test_evaluation_batches_are_complete_and_in_order():
    loader = evaluation_loader(torch.zeros(10, 1, 1, 1), torch.arange(10), 4)
    assert [batch.tolist() for _, batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_batch_larger_than_the_set_is_an_error():
    with pytest.raises(ValueError, match="batch size 11 is larger than the 10"):
        training_loader(torch.zeros(10, 1, 1, 1), torch.arange(10), 11, 0)


def test_digits_are_normalised_split_and_reproducible():
    pytest.importorskip("sklearn")
    from qsparseprop.training.data import load_digits_data

    data = load_digits_data(size=16, channels=3, seed=1)
    assert data.train_images.shape == (1437, 3, 16, 16)
    assert data.test_images.shape == (360, 3, 16, 16)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert data.num_classes == 10
    assert data.train_images.mean().abs() < 0.05
    assert torch.bincount(data.test_labels).min() >= 34
    again = load_digits_data(size=16, channels=3, seed=1)
    assert torch.equal(data.test_images, again.test_images)
    other = load_digits_data(size=16, channels=3, seed=2)
    assert not torch.equal(data.test_images, other.test_images)
