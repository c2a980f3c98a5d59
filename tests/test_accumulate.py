"""Steps of several batches: the gradients of the joint one, in the memory of one."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop.training.data import evaluation_loader
from qsparseprop.training.finetuner import CheckpointError, Finetuner, NonFiniteLossError, read_checkpoint

from ._finetuning import _loader, assert_same_training, plain_finetuner, problem, sparse_finetuner


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def samples(sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=generator, dtype=torch.double), torch.arange(size) % 3) for size in sizes]


def joint(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def close(ours, theirs):
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(ours, theirs, strict=True))


def tuner_of(model, accumulate, **kwargs):
    return Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=accumulate, **kwargs)


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 1, 3), (2, 7)])
def test_gradients_are_those_of_the_joint_batch(sizes, as_mapping):
    batches = samples(sizes)
    model, expected = network(), network()
    images, targets = joint(batches)
    loss = F.cross_entropy(expected(images), targets)
    loss.backward()
    given = [{"input": x, "labels": y} for x, y in batches] if as_mapping else batches
    tuner = tuner_of(model, len(sizes))
    tuner.train(given)
    assert close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])
    assert tuner.history.losses == [pytest.approx(loss.item(), rel=1e-12)]
    assert tuner.history.samples == [sum(sizes)]
    assert tuner.history.correct == [int((expected(images).argmax(1) == targets).sum())]


def test_a_norm_is_that_of_the_joint_gradient():
    batches = samples((4, 2))
    model, expected = network(), network()
    images, targets = joint(batches)
    F.cross_entropy(expected(images), targets).backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    tuner_of(model, 2, max_grad_norm=0.01).train(batches)
    assert close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_optimizers_that_evaluate_the_loss_themselves_see_the_joint_one():
    batches = samples((4, 2))
    models = [network(), network()]
    tuners = [Finetuner(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), accumulate=accumulate)
              for model, accumulate in zip(models, (2, 1), strict=True)]  # fmt: skip
    for _ in range(2):
        tuners[0].train(batches)
        tuners[1].train([joint(batches)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12)
               for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))  # fmt: skip
    assert len(tuners[0].history.losses) == 2


class _Endless:
    """A loader that does not say how many batches it has."""

    def __iter__(self):
        return iter(samples((4, 4, 4, 2, 2)))


@pytest.mark.parametrize("loader", [samples((4, 4, 4, 2, 2)), _Endless()], ids=["sized", "of unknown size"])
def test_what_is_left_at_the_end_of_an_epoch_is_a_smaller_step(loader, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    tuner = Finetuner(model, optimizer, scheduler=scheduler, accumulate=2)
    tuner.fit(loader, 2, folder=tmp_path)
    assert tuner.history.samples == [8, 6, 2] * 2
    assert scheduler.last_epoch == 6
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line["event"] == "step"]
    assert [(line["epoch"], line["batch"], line["samples"]) for line in steps[:4]] == [(0, 1, 8), (0, 2, 6), (0, 3, 2),
                                                                                     (1, 1, 8)]  # fmt: skip
    # of the step itself, not of the one to come
    assert [line["learning_rate"] for line in steps] == [0.1 * 0.5**step for step in range(6)]
    expected = network()
    for step, batches in enumerate((*[samples((4, 4, 4, 2, 2))[a:b] for a, b in ((0, 2), (2, 4), (4, 5))],) * 2):
        expected.zero_grad()
        images, targets = joint(batches)
        F.cross_entropy(expected(images), targets).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.1 * 0.5**step * parameter.grad
    assert close(model.parameters(), expected.parameters())


class _Raises(Exception):
    pass


@pytest.mark.parametrize("kind", ["own generator", "default generator"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_training_resumed_within_an_epoch_is_the_uninterrupted_one(accumulate, kind, tmp_path):
    evaluation = evaluation_loader(*problem(), 32)
    whole = sparse_finetuner(accumulate=accumulate)
    whole.fit(_loader(kind), 3, evaluation_batches=evaluation)
    assert len(whole.history.losses) == 6

    def crash():
        if len(first.history.losses) == 3:
            raise _Raises

    first = sparse_finetuner(accumulate=accumulate, after_step=crash)
    with pytest.raises(_Raises):
        first.fit(_loader(kind), 3, evaluation_batches=evaluation, folder=tmp_path, checkpoint_every=1)
    assert read_checkpoint(tmp_path / "last.pt")["batch"] == 1
    second = sparse_finetuner(accumulate=accumulate)
    torch.rand(5)
    second.fit(_loader(kind), 3, evaluation_batches=evaluation, folder=tmp_path, resume=True)
    assert_same_training(second, whole)


def test_a_loss_that_is_not_finite_changes_nothing():
    batches = samples((4, 4))
    batches[1][0][2, 3] = math.nan
    model = network()
    tuner = tuner_of(model, 2, scheduler=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="in training step 1: the input of the model has NaN"):
        tuner.train(batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not tuner.history.losses
    assert not tuner.optimizer.state_dict()["state"]
    tuner.train(samples((4, 4)))  # nothing of the first batch is left
    expected = network()
    images, targets = joint(samples((4, 4)))
    F.cross_entropy(expected(images), targets).backward()
    assert close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_another_number_of_batches_is_refused(tmp_path):
    plain_finetuner(accumulate=2).fit(_loader("own generator"), 1, folder=tmp_path)
    for accumulate in (1, 4):
        with pytest.raises(CheckpointError, match=f"made of 2 batches, this training's of {accumulate}"):
            plain_finetuner(accumulate=accumulate).fit(_loader("own generator"), 2, folder=tmp_path, resume=True)
    for accumulate in (0, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="accumulate must be"):
            plain_finetuner(accumulate=accumulate)


def test_checkpoints_of_before_have_one_batch_a_step(tmp_path):
    tuner = plain_finetuner()
    tuner.fit(_loader("own generator"), 1)
    state = tuner.state_dict()
    del state["accumulate"], state["schedule"]
    plain_finetuner().load_state_dict(state)
    with pytest.raises(CheckpointError, match="made of 1 batches"):
        plain_finetuner(accumulate=2).load_state_dict(state)


def test_batches_that_can_be_had_only_once():
    tuner = plain_finetuner(accumulate=2)
    with pytest.raises(TypeError, match="only once"):
        tuner.fit(iter(_loader("own generator")), 1)
    tuner.train(iter(_loader("own generator")))
    assert tuner.history.samples == [32, 32]


@pytest.mark.parametrize(("every", "steps"), [(1, [4, 8, 12, 16, 20]), (2, [8, 16, 20]), (9, [20])])
def test_evaluations_every_few_epochs_and_at_the_end(every, steps):
    tuner = plain_finetuner()
    tuner.fit(_loader("own generator"), 5, evaluation_batches=evaluation_loader(*problem(), 32), evaluate_every=every)
    assert [evaluation.step for evaluation in tuner.history.evaluations] == steps
    with pytest.raises(ValueError, match="evaluate_every must be at least 1"):
        tuner.fit(_loader("own generator"), 6, evaluate_every=0)
