"""Checkpoints: files that are complete or absent, and the state of random number generators and data loaders."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from qsparseprop.utils.errors import of_contents, reason_of
from qsparseprop.utils.files import replacing, save_tensors

__all__ = ["CheckpointError", "read_checkpoint", "write_checkpoint"]

#: Written into every checkpoint; a file without it is something else.
FORMAT = "qsparseprop-checkpoint"
VERSION = 1


class CheckpointError(RuntimeError):
    """A file is no checkpoint, or one of another training; the message says why."""


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint so that a crash at any moment leaves the previous one or the new one.

    Parameters
    ----------
    content : mapping
        Tensors and plain containers (what ``torch.load`` with ``weights_only=True`` takes).
    path : path-like
        File to write; it is replaced at the very end, after the new content has reached the disk.

    Raises
    ------
    CheckpointError
        If something in it could be written, but not read again.
    OSError
        If it cannot be written; it names `path`, and what was there before stays.
    """
    content = _plain(dict(content))
    _check_readable(content)
    with replacing(path, durable=True) as temporary:
        save_tensors({"format": FORMAT, "version": VERSION, **content}, temporary)


def _plain(value: Any) -> Any:
    """NumPy's numbers, such as a learning rate out of an array, as Python's, which safe readers take."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _check_readable(content: Mapping[str, Any]) -> None:
    """Try everything but tensors: a scheduler or a callback may keep objects that a safe reader refuses."""
    for key, value in content.items():
        buffer = io.BytesIO()
        try:
            torch.save(_without_tensors(value), buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{key!r} holds more than tensors and plain containers: "
                                  f"{reason_of(error)}") from error  # fmt: skip


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, Mapping):
        return {key: _without_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        # a training's record may be long, and consists of numbers
        return [_without_tensors(item) for item in value if type(item) not in (int, float)]
    return value


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file written by `write_checkpoint`.

    Only tensors and plain containers are unpickled (``weights_only=True``).

    Raises
    ------
    CheckpointError
        If it is no such file, or of a newer version.
    OSError
        If it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged file leads to inside of torch is not of one kind.
    except Exception as error:
        if not of_contents(error):
            raise
        raise CheckpointError(f"{os.fspath(path)} cannot be read as a checkpoint: {reason_of(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{os.fspath(path)} is not a checkpoint of a Finetuner")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise CheckpointError(f"{os.fspath(path)} was written by a newer version of qsparseprop")
    return content


def _numpy_state() -> tuple[Any, ...]:
    # what data sets that augment their images still draw from
    state = np.random.get_state()  # noqa: NPY002
    assert isinstance(state, tuple)  # it is a dict only where one asks for one
    return state


def random_state() -> dict[str, Any]:
    """State of the random number generators of torch, numpy and Python, in plain containers."""
    kind, keys, *rest = _numpy_state()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    if keys.numel() != _numpy_state()[1].size:
        raise ValueError("the state of numpy's random numbers has another size")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    if not isinstance(numbers, (list, tuple)):
        raise TypeError("the state of Python's random numbers is no list")
    random.setstate((version, tuple(numbers), gauss))


def _parts_of_loader(loader: Any) -> Iterator[Any]:
    """A data loader, its samplers and their generators, each once, always in the same order."""
    seen: set[int] = set()
    queue = [loader]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if not isinstance(current, torch.Generator):
            queue += [getattr(current, name, None) for name in ("generator", "sampler", "batch_sampler")]


def _generators(loader: Any) -> list[torch.Generator]:
    return [part for part in _parts_of_loader(loader) if isinstance(part, torch.Generator)]


def tell_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch`` of a data loader and of its samplers, as far as they have it."""
    for part in _parts_of_loader(loader):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


def loader_state(loader: Any) -> list[torch.Tensor]:
    """States of the generators that decide the order of a loader's batches."""
    return [generator.get_state() for generator in _generators(loader)]


def check_loader_state(loader: Any, state: list[torch.Tensor] | None) -> None:
    """Raise a `CheckpointError` if a loader has another number of generators than the one that a state was taken of."""
    generators = len(loader_state(loader))
    if state is not None and generators != len(state):
        raise CheckpointError(f"the data loader has {generators} random number generators, the one that was saved had "
                              f"{len(state)}")  # fmt: skip


def set_loader_state(loader: Any, state: list[torch.Tensor]) -> None:
    """Set what `loader_state` returned (for errors see `check_loader_state`)."""
    check_loader_state(loader, state)
    for generator, value in zip(_generators(loader), state, strict=True):
        generator.set_state(value)
