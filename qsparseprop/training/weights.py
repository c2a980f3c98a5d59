"""How trained weights get into a model: all of them or none."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsparseprop.contents import unreadable
from qsparseprop.inference.files import holds_program
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_type, held
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.utils._candidates import sparse_types
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.state_files import read_state_and_content

__all__ = ["load_checkpoint", "load_state", "read_weights"]

#: What the state of a sparse layer has beside its bias, and how it is found.
_SPARSE = ("weight", "crow_indices", "col_indices", "_extra_state")
_PATTERN = ".crow_indices"


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], new_head: bool | None = False, source: str = "the weights",
    num_classes: int | None = None,
) -> None:  # fmt: skip
    """Load what ``model.load_state_dict`` would accept, or nothing.

    Parameters
    ----------
    model : nn.Module
        Dense; changed in place.
    state : mapping of str to Tensor
        As in old files, ``num_batches_tracked`` may be missing. Sparse layers of theirs that are dense ones of the
        model are made dense, with zeros where they have nothing.
    new_head : bool or None
        Leave the classifier of the model, its last Linear or convolution, as it is, whatever the state has there: it is
        for other classes, which may be as many. None: this is not for the user to choose, and no message offers it.
    source : str
        What they are called in messages.
    num_classes : int, optional
        Only a layer of so many outputs is a classifier.

    Raises
    ------
    ConfigurationError
        (a ValueError) If keys or shapes do not match, naming them; the model is unchanged then.
    """
    head = _head(model, num_classes)
    if new_head:
        if head is None:
            outputs = "" if num_classes is None else f" of {num_classes} outputs"
            raise ConfigurationError(f"new_head (--new-head): the model has no Linear or convolution{outputs}, "
                                     "which would be its classifier")  # fmt: skip
        state = {key: value for key, value in state.items() if not key.startswith(head)}
    state = _dense_state(model, state, source)
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    # The values of a sparse layer may be as many as they like; it checks them itself.
    free = tuple(f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, SparseWeight))
    wrong = [key for key, value in wanted.items()
             if key in state and value.shape != state[key].shape and not key.startswith(free)]  # fmt: skip
    taken = {key: value for key, value in state.items() if key not in wrong}
    try:
        # a trial on a copy: torch itself knows best what it takes, but loads the half of what it does not
        missing, unexpected = copy.deepcopy(model).load_state_dict(taken, strict=False)
        problems = []
    except RuntimeError as error:
        missing, unexpected, problems = [], [], [" ".join(str(error).split())]
    missing = [key for key in missing if key not in wrong and not (new_head and key.startswith(head or ""))]
    # what a new one would be the way out of
    only_head = (new_head is False and head is not None and not unexpected and not problems
                 and all(key.startswith(head) for key in (*wrong, *missing)))  # fmt: skip
    problems += [f"{key} is {tuple(state[key].shape)} there and {tuple(wanted[key].shape)} here" for key in wrong]
    problems += [f"{key} is missing there" for key in missing]
    problems += [f"{key} is unknown here" for key in unexpected]
    if any(key.endswith(".crow_indices") for key in unexpected):
        problems.insert(0, "they are those of a model with sparse layers")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        way_out = "; with new_head (--new-head) the model keeps its own, new classifier" if only_head else ""
        raise ConfigurationError(f"{source} do not go with this model and data: {'; '.join(problems[:3])}{more}"
                                 f"{way_out}")  # fmt: skip
    model.load_state_dict(taken, strict=False)


def _dense_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The state without the sparse layers that are dense ones in the model: these have their dense weights."""
    result, named = dict(state), dict(model.named_modules(remove_duplicate=False))
    for name in [key.removesuffix(_PATTERN) for key in state if key.endswith(_PATTERN)]:
        layer = named.get(name)
        if layer is None or isinstance(layer, SparseModule) or dense_type(layer) not in sparse_types():
            continue  # unknown there, as will be said
        own = {key: state[f"{name}.{key}"] for key in _SPARSE if f"{name}.{key}" in state}
        sparse = sparse_types()[dense_type(layer)][0].like(layer, None)
        sparse.bias = None  # stays what it is
        saved = _saved_shape(own.get("_extra_state"), len(sparse.weight_shape))
        try:
            if saved in (None, sparse.weight_shape):
                sparse.load_state_dict(own)
                weight = held(sparse.to_dense(), "weight").detach()
            else:
                # without values, for its shape to be compared with the model's
                weight = torch.empty(1, device="meta").expand(saved)
        except RuntimeError as error:
            raise ConfigurationError(f"{source} are damaged at the sparse layer {name}: "
                                     f"{' '.join(str(error).split())}") from error  # fmt: skip
        for key in own:
            del result[f"{name}.{key}"]
        result[f"{name}.weight"] = weight
    return result


def _saved_shape(extra: torch.Tensor | None, dimensions: int) -> tuple[int, ...] | None:
    """The shape of the weight in the state of a sparse layer, where it says one of so many dimensions."""
    if extra is None or unreadable(extra) or extra.dtype != torch.int64 or tuple(extra.shape) != (1 + dimensions,):
        return None
    return tuple(extra[1:].tolist()) if int(extra.min()) >= 0 else None


def _head(model: nn.Module, num_classes: int | None) -> str | None:
    """What the keys of the classifier begin with: the last layer with a weight, and with so many outputs."""
    found = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            if num_classes in (None, outputs):
                found = f"{name}." if name else ""
    return found


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Any]:
    """What `read_state_and_content` reads, of a file of weights to train.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    state : dict of str to Tensor
    content : any

    Raises
    ------
    ConfigurationError
        (a ValueError) As there, for frozen models, and for folders, naming the file in them.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (path / "best.pt").is_file():
        raise ConfigurationError(f"{path} is the folder of a run: its weights are in {path / 'best.pt'}")
    if path.is_file() and holds_program(path):
        raise ConfigurationError(f"{path} holds a frozen model, whose weights are not trained any more: use the "
                                 "checkpoint that it was made from (run/best.pt)")  # fmt: skip
    return read_state_and_content(path)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint file into `model`, in place.

    Parameters
    ----------
    model : nn.Module
        Network of the matching architecture.
    path : path-like
        See `qsparseprop.utils.state_files.read_state_dict`.

    Returns
    -------
    nn.Module
        The same `model`.

    Raises
    ------
    ConfigurationError
        (a ValueError) If the file holds no weights, or keys or shapes do not match; the model is unchanged then.
    """
    load_state(model, read_weights(path)[0], source=f"the weights in {os.fspath(path)}")
    return model
