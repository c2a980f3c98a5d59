"""The optimizer's state in checkpoints goes by name and size, never by position alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop.training.finetuner import CheckpointError, Finetuner
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import GradualPruner, layerwise_magnitude_prune, make_pruning_permanent

BATCH = (torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)


def network(order="weight, bias"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    if order == "bias, weight":
        # what pruning that was made permanent by torch leaves
        prune.l1_unstructured(model[2], "weight", amount=0.01)
        prune.remove(model[2], "weight")
        assert list(model[2]._parameters) == ["bias", "weight"]
    return model


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, **options)


def trained(model, optimizer=adamw, steps=3):
    tuner = Finetuner(model, optimizer(model))
    tuner.train([BATCH] * steps)
    return tuner


def moments(tuner):
    """What AdamW keeps, by the name of the parameter."""
    names = {id(parameter): name for name, parameter in tuner.model.named_parameters()}
    return {(names[id(p)], key): value for p, state in tuner.optimizer.state.items() for key, value in state.items()}


def assert_same_moments(ours, theirs):
    ours, theirs = moments(ours), moments(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("described", [True, False], ids=["names", "old checkpoint"])
@pytest.mark.parametrize("orders", [("bias, weight", "weight, bias"), ("weight, bias", "bias, weight")], ids=str)
def test_another_order_of_parameters_changes_nothing(orders, described, tmp_path):
    theirs = trained(network(orders[0]))
    state = copy.deepcopy(theirs.state_dict())
    if not described:
        del state["parameters"]
    ours = Finetuner(model := network(orders[1]), adamw(model))
    ours.load_state_dict(state)
    assert_same_moments(ours, theirs)
    for tuner in (ours, theirs):
        tuner.train([BATCH] * 3)
    assert_same_moments(ours, theirs)
    assert ours.history.losses == theirs.history.losses


def _damaged(change):
    state = copy.deepcopy(trained(network()).state_dict())
    change(state, state["optimizer"]["state"])
    return state


CHANGES = {
    "exp_avg of another size": (lambda s, o: o[2].update(exp_avg=torch.zeros(12)), r"'exp_avg' for '2\.weight'"),
    "exp_avg of one number": (lambda s, o: o[2].update(exp_avg=torch.zeros(())), r"'exp_avg' for '2\.weight'"),
    "exp_avg of a list": (lambda s, o: o[2].update(exp_avg=[0.0]), r"'exp_avg' for '2\.weight'"),
    "sparse exp_avg": (lambda s, o: o[2].update(exp_avg=torch.zeros(12, 12).to_sparse()), r"'exp_avg' for '2\.weight'"),
    "no exp_avg": (lambda s, o: o[2].pop("exp_avg"), r"no 'exp_avg' for '2\.weight'"),
    "step of many numbers": (lambda s, o: o[0].update(step=torch.zeros(1).expand(10**12)), r"'step' for '0\.weight'"),
    "moments swapped": (lambda s, o: o.update({2: o[3], 3: o[2]}), r"for '2\.weight'"),
    "names swapped": (lambda s, o: s["parameters"].reverse(), r"for '0\.weight'"),
    "a name missing": (lambda s, o: s["parameters"][2].__setitem__(0, "9.weight"), r"lacks the parameter '2\.weight'"),
    "a size changed": (lambda s, o: s["parameters"][2].__setitem__(1, [3, 48]), r"'2\.weight' with the shape \(3, "),
    "too few names": (lambda s, o: s["parameters"].pop(), "6 parameters and 5 names"),
    "names are none": (lambda s, o: s.update(parameters=torch.zeros(1).expand(10**12)), "list of parameters"),
    "no groups": (lambda s, o: s["optimizer"].update(param_groups=[]), "lacks the parameter|6 names"),
    "two groups": (lambda s, o: s["optimizer"].update(param_groups=_split(s)), r"lacks the parameter '2\.weight'"),
    "learning rate of text": (lambda s, o: s["optimizer"]["param_groups"][0].update(lr="x"), "'lr'"),
    "batch of the future": (lambda s, o: s.update(batch=99), "no epoch 0 and batch 99"),
}


def _split(state):
    (group,) = state["optimizer"]["param_groups"]
    return [{**group, "params": group["params"][:2]}, {**group, "params": group["params"][2:]}]


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(change):
    damage, complaint = CHANGES[change]
    state = _damaged(damage)
    tuner = trained(network(), steps=1)
    before = copy.deepcopy(tuner.state_dict())
    with pytest.raises(CheckpointError, match=complaint) as refused:
        tuner.load_state_dict(state)
    assert "\n" not in str(refused.value)
    reference = trained(network(), steps=1)
    assert_same_moments(tuner, reference)
    assert all(torch.equal(value, before["model"][key]) for key, value in tuner.model.state_dict().items())
    assert tuner.history.losses == before["history"]["losses"]


def test_an_old_checkpoint_is_checked_by_its_sizes():
    state = _damaged(lambda s, o: o.update({2: o[3], 3: o[2]}))
    del state["parameters"]
    with pytest.raises(CheckpointError, match=r"for '2\.weight'"):
        trained(network(), steps=1).load_state_dict(state)


@pytest.mark.parametrize("stored", ["expanded", "transposed"])
def test_moments_are_laid_out_like_their_parameter(stored):
    """Fused AdamW goes through memory without looking at strides."""
    theirs = trained(network())
    state = copy.deepcopy(theirs.state_dict())
    entry = state["optimizer"]["state"][2]
    other = {"expanded": torch.full((1, 1), 0.5).expand(12, 12), "transposed": entry["exp_avg"].t().clone().t()}
    entry["exp_avg"] = other[stored]
    ours = Finetuner(model := network(), adamw(model))
    ours.load_state_dict(state)
    assert ours.optimizer.state[model[2].weight]["exp_avg"].stride() == model[2].weight.stride()
    ours.train([BATCH] * 2)
    if stored == "transposed":
        theirs.train([BATCH] * 2)
        assert_same_moments(ours, theirs)


def test_another_memory_format_changes_nothing():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % 2

    def tuner(memory_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        model.to(memory_format=memory_format)
        return Finetuner(model, adamw(model), memory_format=memory_format)

    theirs = tuner(torch.contiguous_format)
    theirs.train([(images, labels)] * 2)
    ours = tuner(torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    for each in (ours, theirs):
        each.train([(images, labels)] * 2)
    ours, theirs = moments(ours), moments(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3),
    "groups": lambda m: torch.optim.AdamW([
        {"params": [p for p in m.parameters() if p.ndim > 1]},
        {"params": [p for p in m.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]),
    "names": lambda m: torch.optim.AdamW(m.named_parameters()),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on(name):
    whole = trained(network(), OPTIMIZERS[name], 5)
    first = trained(network(), OPTIMIZERS[name], 2)
    second = Finetuner(model := network(), OPTIMIZERS[name](model))
    second.load_state_dict(first.state_dict())
    second.train([BATCH] * 3)
    assert second.history.losses == whole.history.losses
    if name not in ("LBFGS", "groups"):
        other = Finetuner(model := network("bias, weight"), OPTIMIZERS[name](model))
        other.load_state_dict(first.state_dict())
        other.train([BATCH] * 3)
        assert other.history.losses == pytest.approx(whole.history.losses, rel=1e-6)
        if name == "names":
            assert other.optimizer.param_groups[0]["param_names"] == [key for key, _ in model.named_parameters()]


def test_lbfgs_in_another_order_is_refused():
    first = trained(network(), OPTIMIZERS["LBFGS"], 2)
    with pytest.raises(CheckpointError, match="LBFGS keeps its state for all parameters together"):
        Finetuner(model := network("bias, weight"), OPTIMIZERS["LBFGS"](model)).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("saved", "ours"), [("momentum", "amsgrad"), ("amsgrad", "momentum")])
def test_the_state_of_another_optimizer_is_refused(saved, ours):
    with pytest.raises(CheckpointError, match="that of another optimizer"):
        trained(network(), OPTIMIZERS[ours], 1).load_state_dict(trained(network(), OPTIMIZERS[saved], 1).state_dict())


def test_a_schedule_of_another_length_is_refused():
    def tuner(steps):
        optimizer = adamw(model := network())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return Finetuner(model, optimizer, scheduler=schedule)

    with pytest.raises(CheckpointError, match="schedule is one of 10 steps, this training's of 20"):
        tuner(20).load_state_dict(tuner(10).state_dict())


def test_sizes_that_pruning_has_changed_are_those_of_the_checkpoint():
    def sparse(amount):
        model = network()
        layerwise_magnitude_prune(model, amount)
        make_pruning_permanent(model)
        return swap_modules_with_sparse(model, (8, 6), verbose=False, include_dense=False, min_sparsity=0.4)

    theirs = trained(sparse(0.5))
    pruner = GradualPruner(theirs.model, theirs.optimizer, 0.9, end_step=1)
    for _ in range(3):
        pruner.step()
    theirs.train([BATCH])
    assert theirs.model[2].weight.numel() < 0.2 * 144
    ours = trained(sparse(0.5))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert_same_moments(ours, theirs)
    # and the other way round: what was smaller grows again
    before = trained(sparse(0.5))
    ours.load_state_dict(copy.deepcopy(before.state_dict()))
    assert_same_moments(ours, before)
    ours.train([BATCH])


def test_pruning_keeps_the_order_of_parameters():
    model = network()
    parameters, state = [name for name, _ in model.named_parameters()], list(model.state_dict())
    layerwise_magnitude_prune(model, 0.5)
    assert [name.removesuffix("_orig") for name, _ in model.named_parameters()] == parameters
    make_pruning_permanent(model)
    assert [name for name, _ in model.named_parameters()] == parameters
    assert list(model.state_dict()) == state
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # torch's own has them in another order
    make_pruning_permanent(model)
    assert [name for name, _ in model.named_parameters()] == parameters
