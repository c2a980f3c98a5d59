"""Files of tensors with a description: safetensors, in whose metadata the description is one entry of JSON.

The format (https://github.com/huggingface/safetensors) is eight bytes, the length of a header, the header in JSON, and
the tensors one behind the other. Nothing in it is code.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import replacing
from qsparseprop.utils.state_files import regular_size, safetensors_refusals

__all__ = ["StoredTensors", "open_container", "raw_bytes", "write_container"]

#: Where descriptions are in the metadata.
_ENTRY = "qsparseprop"
_DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
           torch.bfloat16: "BF16", torch.int16: "I16", torch.uint8: "U8", torch.int8: "I8",
           torch.bool: "BOOL"}  # fmt: skip
#: Headers are filled up so that tensors begin at multiples.
_LINE = 64
#: What safetensors reads at most.
_LONGEST_HEADER = 100_000_000


def write_container(path: str | os.PathLike[str], description: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all.

    Parameters
    ----------
    path : path-like
        What it held before stays until the new content has reached the disk.
    description : any
        For `json.dumps`.
    tensors : mapping of str to Tensor

    Raises
    ------
    OSError
        If it cannot be written; it names `path`.
    ValueError
        If a tensor's dtype has no name in such files, or the description is too long.
    """
    text = json.dumps(description, allow_nan=False, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {_ENTRY: text}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} is of {tensor.dtype}, which files of safetensors do not have")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-(len(data) + 8) % _LINE)
    if len(data) > _LONGEST_HEADER:
        raise ValueError(f"the description takes {len(data)} bytes, of {_LONGEST_HEADER} that such files may have")
    with replacing(path, durable=True) as temporary, open(temporary, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for _, tensor in ordered:
            file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements, one behind the other.

    Parameters
    ----------
    tensor : Tensor

    Returns
    -------
    memoryview
    """
    held = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    return held.view(torch.uint8).numpy().data if held.numel() else memoryview(b"")


class StoredTensors:
    """Tensors by name, which have a dtype and a shape before they are read.

    Parameters
    ----------
    tensors : mapping of str to Tensor
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names = frozenset(tensors)

    def describe(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Dtype, None for those that are not written here, and shape of a tensor."""
        tensor = self._tensors[name]
        return (tensor.dtype if tensor.dtype in _DTYPES else None), tuple(tensor.shape)

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self._tensors[name]


class _MappedTensors(StoredTensors):
    """The tensors of an open file, which are mapped into memory, not read, until somebody looks at them."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.names = frozenset(file.keys())

    def describe(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Dtype, None for those that are not written here, and shape of a tensor."""
        dtypes = {text: dtype for dtype, text in _DTYPES.items()}
        with safetensors_refusals():
            found = self._file.get_slice(name)
            return dtypes.get(str(found.get_dtype())), tuple(found.get_shape())

    def get(self, name: str) -> Tensor:
        """A tensor, in the memory of the file."""
        with safetensors_refusals():
            tensor = self._file.get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor


@contextlib.contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[tuple[Any, StoredTensors]]:
    """Open a file: what it says of itself, and its tensors.

    Parameters
    ----------
    path : path-like

    Yields
    ------
    any
        The description, JSON without numbers that are not finite.
    StoredTensors

    Raises
    ------
    ConfigurationError
        (a ValueError) If it is no file of safetensors with a description.
    OSError
        If it cannot be read.
    ImportError
        If safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("reading frozen models needs safetensors: pip install 'qsparseprop[inference]'") from error
    name = os.fspath(path)
    regular_size(name)
    with contextlib.ExitStack() as stack:
        with safetensors_refusals():
            file = stack.enter_context(safe_open(name, "pt"))
            text = (file.metadata() or {}).get(_ENTRY)
            stored = _MappedTensors(file)
        if text is None:
            raise ConfigurationError("its tensors come without the description that qsparseprop writes with them")
        yield _parsed(text), stored


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigurationError(f"its description is no valid JSON ({reason})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
