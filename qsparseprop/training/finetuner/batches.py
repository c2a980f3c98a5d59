"""What a batch consists of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch

__all__ = ["Several", "are_classes", "arguments_of", "at_least_float32", "count_correct", "in_groups", "number_of",
           "parts_of", "split_batch", "ungrouped"]  # fmt: skip


class Several:
    """Batches that make one step together, or their inputs, or their targets.

    Parameters
    ----------
    parts : sequence
        One of each batch.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        """Samples of all batches, where the parts are targets."""
        return sum(len(part) for part in self.parts)


class _Groups:
    """The batches of a loader, several at a time; whatever else is asked of it, the loader answers."""

    def __init__(self, batches: Iterable[Any], size: int) -> None:
        self._batches, self._size = batches, size

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        while group := list(itertools.islice(iterator, self._size)):
            yield Several(group)

    def __getattr__(self, name: str) -> Any:
        if name in ("_batches", "_size"):  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self._batches, name)


class _SizedGroups(_Groups):
    """Of a loader that says how many batches it has."""

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return (len(self._batches) + self._size - 1) // self._size


def number_of(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where that is known.

    A ``DataLoader`` has a length, but cannot say it of an ``IterableDataset``.

    Parameters
    ----------
    batches : iterable
    """
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def in_groups(batches: Iterable[Any], size: int) -> Iterable[Any]:
    """The same batches, so many at a time; the last ones are fewer where the number does not divide them.

    Parameters
    ----------
    batches : iterable
    size : int
        1 leaves them as they are.
    """
    if size == 1:
        return batches
    if isinstance(batches, Iterator):
        return iter(_Groups(batches, size))  # can be iterated over only once, too
    return _SizedGroups(batches, size) if isinstance(batches, Sized) else _Groups(batches, size)


def ungrouped(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches that `in_groups` was given; others as they are.

    Parameters
    ----------
    batches : iterable
    """
    return batches._batches if isinstance(batches, _Groups) else batches


def parts_of(inputs: Any, targets: Any) -> list[tuple[Any, torch.Tensor]]:
    """Inputs and targets of each batch of a step.

    Parameters
    ----------
    inputs, targets
        As `split_batch` gives them.
    """
    if isinstance(targets, Several):
        return list(zip(inputs.parts, targets.parts, strict=True))
    return [(inputs, targets)]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch: ``(inputs, targets)``, or a mapping whose ``"labels"`` are the targets.

    Those of `Several` batches are `Several`.

    Raises
    ------
    ValueError
        For anything else.
    """
    if isinstance(batch, Several):
        pairs = [split_batch(part) for part in batch.parts]
        return Several([inputs for inputs, _ in pairs]), Several([targets for _, targets in pairs])
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"a batch that is a mapping needs the key 'labels', got {sorted(batch)}")
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"a batch must be (inputs, targets) or a mapping with 'labels', got {type(batch).__name__}")
    *inputs, targets = batch
    return (inputs[0] if len(inputs) == 1 else inputs), targets


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: arguments, and those by keyword.

    Parameters
    ----------
    inputs
        Of a batch: a tensor, a tuple or list of arguments, or a mapping.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def at_least_float32(outputs: torch.Tensor) -> torch.Tensor:
    """Outputs of a model in float32 where they have fewer bits."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def are_classes(targets: torch.Tensor | Several) -> bool:
    """Whether targets are class numbers, one a sample."""
    if isinstance(targets, Several):
        return all(are_classes(part) for part in targets.parts)
    return targets.ndim == 1 and not targets.is_floating_point()


def count_correct(outputs: torch.Tensor, targets: torch.Tensor) -> int | None:
    """How many predictions (batch, classes) are right; None where nothing is classified."""
    if not are_classes(targets) or outputs.ndim != 2:
        return None
    return int((outputs.argmax(dim=1) == targets).sum())
