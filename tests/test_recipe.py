"""Optimizers, weight decay, learning rate schedules and batch normalisation of the finetune command's trainings."""

import copy
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from qsparseprop.benchmarking.compare import CompareConfig
from qsparseprop.nn._values import SparseValues
from qsparseprop.training.finetuner import CheckpointError
from qsparseprop.training.models import resnet20, vit_tiny
from qsparseprop.training.recipe import (
    OPTIMIZERS,
    SCHEDULES,
    Recipe,
    make_finetuner,
    make_optimizer,
    make_scheduler,
    set_batch_norm_momentum,
    without_decay,
)
from qsparseprop.training.run import RunConfig
from qsparseprop.training.setup_run import TrainingMode, prune_model
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.optimizer_utils import parameter_groups

from ._finetuning import _loader, assert_same_training
from ._helpers import sampled

# torch 2.8's SequentialLR warns of what it does itself
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

PLAIN = TrainingMode(bf16=False, channels_last=True)


def pruned(swapped=True, seed=0):
    torch.manual_seed(seed)
    model = resnet20(num_classes=4, width=4)
    masks = prune_model(model, "uniform", 0.8)["masks"]
    if swapped:
        swap_modules_with_sparse(model, (16, 3, 8, 8), verbose=False, include_dense=False, min_sparsity=0.7)
    return model, masks


def tuner_of(recipe, swapped=True, epochs=3, accumulate=1):
    model, masks = pruned(swapped)
    return make_finetuner(model, PLAIN, recipe, epochs, 4, masks, accumulate=accumulate)


# ---- what it was before there was a choice ----


def test_the_default_is_adamw_with_one_decay_for_all_and_one_cycle():
    model = resnet20(width=4)
    tuner = make_finetuner(model, PLAIN, Recipe(), 3, 4)
    expected = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(expected, 2e-3, total_steps=12, pct_start=0.25, cycle_momentum=False)
    assert type(tuner.optimizer) is torch.optim.AdamW
    assert tuner.optimizer.state_dict() == expected.state_dict()
    assert tuner.scheduler.state_dict().keys() == schedule.state_dict().keys()
    for _ in range(11):
        assert tuner.optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
        for each in (expected, schedule, tuner.optimizer, tuner.scheduler):
            each.step()


# ---- weight decay ----


class Mixed(nn.Module):
    """A parameter of every role."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.whole_norm = nn.LayerNorm((8, 6, 6))
        self.squeeze = nn.Conv2d(8, 1, 1)
        self.words = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.last = nn.Linear(64, 1)
        self.wide = nn.Linear(64, 64)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.kernel = nn.Parameter(torch.zeros(8, 8))
        self.told = nn.Parameter(torch.zeros(4, 4))

    def no_weight_decay(self):
        return {"told", "one.of.another.version"}


WEIGHTS = {"stem.weight", "squeeze.weight", "attention.in_proj_weight", "attention.out_proj.weight", "last.weight",
           "wide.weight", "kernel"}  # fmt: skip


def decayed(model, recipe):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, recipe).param_groups
    assert [group["weight_decay"] for group in groups] == [recipe.weight_decay, 0.0]
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    return {names[id(parameter)] for parameter in groups[0]["params"]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_decay_and_nothing_else(optimizer):
    recipe = Recipe(optimizer=optimizer, weight_decay=0.05)
    assert decayed(Mixed(), recipe) == WEIGHTS


def test_the_same_decays_in_a_swapped_model():
    recipe = Recipe(weight_decay=0.05)
    for dense, shape in ((resnet20(width=8), (4, 3, 16, 16)), (vit_tiny(width=32, image_size=16), (4, 3, 16, 16))):
        prune_model(dense, "uniform", 0.9)
        swapped = swap_modules_with_sparse(copy.deepcopy(dense), shape, inplace=False, verbose=False,
                                           include_dense=False)  # fmt: skip
        assert any(isinstance(parameter, SparseValues) for parameter in swapped.parameters())
        assert decayed(swapped, recipe) == decayed(dense, recipe)
        assert decayed(dense, recipe) == {
            f"{name}.weight" for name, module in dense.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
        }
    assert "position" in without_decay(dense)


class Tied(nn.Module):
    """An embedding whose weight is the last layer's, whichever of them comes first; and a shared layer."""

    def __init__(self, first, second):
        super().__init__()
        self.layers = nn.ModuleDict({name: {"embedding": nn.Embedding, "head": nn.Linear}[name](4, 4)
                                     for name in (first, second)})  # fmt: skip
        self.layers["head"].weight = self.layers["embedding"].weight
        self.one = self.other = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.one.weight


@pytest.mark.parametrize("order", [("embedding", "head"), ("head", "embedding")])
def test_a_tied_embedding_is_an_embedding(order):
    assert decayed(Tied(*order), Recipe(weight_decay=0.05)) == {"one.weight"}
    model = Tied(*order)
    model.no_weight_decay = lambda: {"third.weight"}  # one of its names
    assert decayed(model, Recipe(weight_decay=0.05)) == set()
    for name in ("layers.embedding.weight", "layers.head", "layers.embedding"):
        decay, _ = parameter_groups(Tied(*order), 0.1, [name])
        assert len(decay["params"]) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_shrinks_the_values_of_sparse_layers(optimizer):
    momentum = {"adamw": None, "sgd": 0.0}[optimizer]  # Nesterov's takes a gradient nearly twice at first
    recipe = Recipe(optimizer=optimizer, momentum=momentum, weight_decay=0.5, learning_rate=0.1)
    linear = nn.Linear(16, 16)
    prune_model(nn.Sequential(nn.Linear(2, 2), linear, nn.Linear(2, 2)), "uniform", 0.5)
    model = nn.Sequential(linear)
    swap_modules_with_sparse(model, (4, 16), verbose=False, include_dense=False, min_sparsity=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, recipe).step()
    names = [name for name, _ in model.named_parameters()]
    for name, old, new in zip(names, before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if name.endswith("weight") else 1.0))


def test_sgd_is_that_of_torch():
    model = resnet20(width=4)
    group = make_optimizer(model, Recipe(optimizer="sgd")).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.05, 0.9, True, 0)
    group = make_optimizer(model, Recipe(optimizer="sgd", momentum=0.0)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.0, False)


# ---- schedules ----


def rates(recipe, steps=12, per_epoch=4):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=recipe.learning_rate)
    scheduler = make_scheduler(optimizer, recipe, steps, per_epoch)
    result = []
    for _ in range(steps):
        result.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return result


def test_learning_rates_of_each_schedule():
    def of(schedule, warmup=0.0):
        return pytest.approx(rates(Recipe(learning_rate=0.8, schedule=schedule, warmup=warmup)), rel=1e-12)

    assert of("constant") == [0.8] * 12
    assert [0.2, 0.35, 0.5, 0.65, *[0.8] * 8] == of("constant", 1.0)
    assert [0.4 * (1 + math.cos(math.pi * step / 12)) for step in range(12)] == of("cosine")
    assert [0.2, 0.35, 0.5, 0.65, *(0.4 * (1 + math.cos(math.pi * step / 8)) for step in range(8))] == of("cosine", 1.0)
    assert of("step") == [0.8] * 6 + [0.08] * 3 + [0.008] * 3
    assert [0.4, 0.6, *[0.8] * 5, *[0.08] * 2, *[0.008] * 3] == of("step", 0.5)


def test_the_shortest_trainings_have_every_schedule():
    for schedule in SCHEDULES:
        for steps in (1, 2, 3):
            assert len(rates(Recipe(schedule=schedule), steps, 1)) == steps
    assert rates(Recipe(learning_rate=1.0, schedule="cosine", warmup=0.9), 1, 1) == [1.0]


class _Raises(Exception):
    pass


RECIPES = [
    Recipe(optimizer="sgd", schedule="cosine", warmup=0.5, weight_decay=1e-3), Recipe(schedule="step", warmup=1.0),
    Recipe(optimizer="sgd", schedule="onecycle"), Recipe(schedule="constant", weight_decay=0.1),
    Recipe(schedule="constant", warmup=2.0), Recipe(schedule="cosine"),
]  # fmt: skip
STOPS = [(2, True), (5, True), (7, False)]


@pytest.mark.parametrize(
    ("recipe", "stop_at", "swapped"), sampled(((recipe, *stop) for recipe in RECIPES for stop in STOPS), every=2),
    ids=lambda value: f"{value.optimizer} {value.schedule} {value.warmup}" if isinstance(value, Recipe) else None,
)  # fmt: skip
def test_a_resumed_training_is_the_uninterrupted_one(recipe, stop_at, swapped, tmp_path):
    whole = tuner_of(recipe, swapped)
    whole.fit(_loader("own generator"), 3)
    first = tuner_of(recipe, swapped)
    held = first.after_step or (lambda: None)

    def crash():
        held()
        if len(first.history.losses) == stop_at:
            raise _Raises

    first.after_step = crash
    with pytest.raises(_Raises):
        first.fit(_loader("own generator"), 3, folder=tmp_path, checkpoint_every=1)
    second = tuner_of(recipe, swapped)
    second.fit(_loader("own generator"), 3, folder=tmp_path, resume=True)
    assert_same_training(second, whole)


RECIPES = {
    "onecycle": Recipe(), "cosine": Recipe(schedule="cosine"), "step": Recipe(schedule="step"),
    "constant": Recipe(schedule="constant"), "rising": Recipe(schedule="constant", warmup=1.0),
    "cosine after a rise": Recipe(schedule="cosine", warmup=1.0),
    "step after a rise": Recipe(schedule="step", warmup=1.0), "longer rise": Recipe(schedule="step", warmup=2.0),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["", "of before schedules had names"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_checkpoint_of_another_schedule_is_refused(name, old):
    state = tuner_of(RECIPES[name], swapped=False).state_dict()
    if old:
        del state["schedule"]
    for other, recipe in RECIPES.items():
        tuner = tuner_of(recipe, swapped=False)
        if other == name:
            tuner.load_state_dict(state)
            continue
        before = copy.deepcopy(tuner.state_dict())
        with pytest.raises(CheckpointError, match=r"learning rate schedule"):
            tuner.load_state_dict(state)
        assert tuner.state_dict()["scheduler"] == before["scheduler"]
    for epochs in (2, 4):  # the same schedule for longer or shorter
        if name not in ("constant", "rising"):
            with pytest.raises(CheckpointError, match=r"learning rate schedule (has|is one of)"):
                tuner_of(RECIPES[name], swapped=False, epochs=epochs).load_state_dict(state)


def test_other_optimizers_and_groups_are_refused():
    recipes = [Recipe(schedule="constant"), Recipe(schedule="constant", optimizer="sgd"),
               Recipe(schedule="constant", weight_decay=0.1)]  # fmt: skip
    for mine in recipes:
        for theirs in recipes:
            tuner = tuner_of(mine, swapped=False)
            state = tuner_of(theirs, swapped=False).state_dict()
            if mine is theirs:
                tuner.load_state_dict(state)
            else:
                with pytest.raises(CheckpointError):
                    tuner.load_state_dict(state)


# ---- batch normalisation ----


def test_running_statistics_follow_faster_in_short_trainings_only():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3, momentum=0.01), nn.BatchNorm2d(3, momentum=None),
                          nn.BatchNorm2d(3, momentum=0.5))  # fmt: skip
    for steps, expected in ((22, [0.3, 0.3, None, 0.5]), (100, [0.1, 0.01, None, 0.5]), (99, [0.3, 0.3, None, 0.5])):
        set_batch_norm_momentum(model, steps)
        assert [module.momentum for module in model] == expected
        model = copy.deepcopy(model)
    for epochs, expected in ((24, 0.3), (25, 0.1)):  # of 4 batches each
        assert tuner_of(Recipe(), epochs=epochs).model.bn1.momentum == expected
    assert tuner_of(Recipe(), epochs=49, accumulate=2).model.bn1.momentum == 0.3


# ---- recipes ----


@pytest.mark.parametrize(("settings", "complaint"), [
    ({"optimizer": "adam"}, "unknown optimizer 'adam', choose from adamw, sgd"),
    ({"schedule": "linear"}, "unknown schedule 'linear', choose from onecycle, cosine, step, constant"),
    ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ({"pretrain_learning_rate": math.nan}, "pretrain_learning_rate must be positive"),
    ({"momentum": 0.9}, "momentum goes with the optimizer sgd only"),
    ({"optimizer": "sgd", "momentum": 1.0}, "momentum must be at least 0 and less than 1"),
    ({"weight_decay": -0.1}, "weight_decay must not be negative"), ({"warmup": -1.0}, "warmup must not be negative"),
    ({"warmup": 1.0}, "onecycle has a rise of its own"),
    ({"schedule": "cosine", "warmup": 2.0, "epochs": 2}, "warmup must be shorter than epochs, got 2 of 2"),
    ({"schedule": "cosine", "warmup": 1.0, "epochs": 2}, "warmup must be shorter than pretrain_epochs, got 1 of 1"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [RunConfig, CompareConfig])
def test_recipes_that_make_no_sense_are_refused(kind, settings, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        kind(**settings)


def test_a_warmup_is_for_trainings_that_there_are():
    longer = {"schedule": "cosine", "warmup": 1.5, "epochs": 2}
    for settings in ({"weights": "some.pt"}, {"sparsity": 0.0, "scheme": "dense"}, {"pretrain_epochs": 2}):
        assert RunConfig(**longer, **settings).warmup == 1.5
    with pytest.raises(ConfigurationError, match="shorter than pretrain_epochs"):
        RunConfig(**longer)


def test_a_comparison_and_a_single_training_share_recipes():
    settings = {"optimizer": "sgd", "schedule": "cosine", "weight_decay": 5e-4, "pretrain_learning_rate": 0.1}
    recipe = Recipe(**settings)
    for config in (RunConfig(**settings), CompareConfig(**settings)):
        assert Recipe.of(asdict(config)) == recipe
        assert config.pretraining.learning_rate == 0.1
        assert config.learning_rate == 0.05
    assert (RunConfig().learning_rate, RunConfig().pretraining.learning_rate) == (2e-3, 2e-3)
    assert RunConfig(learning_rate=1, weight_decay=0).learning_rate == 1
    with pytest.raises(ConfigurationError, match="weight_decay cannot be 'much'"):
        RunConfig(weight_decay="much")
    with pytest.raises(ConfigurationError, match="accumulate must be at least 1"):
        RunConfig(accumulate=0)
