"""Reading the weights in a file that may be anything: what is no file of weights is refused by one sentence.

Nothing but tensors and plain containers is unpickled, and sizes are compared with the file's before anything is read
from them, so that memory stays within a small multiple of the file.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import ConfigurationError, of_contents

__all__ = ["read_state_and_content", "read_state_dict", "regular_size", "safetensors_refusals", "stored_bytes",
           "strip_prefix"]  # fmt: skip

#: Under which keys checkpoints keep a model's state.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_ZIP, _GLOBAL = b"PK\x03\x04", re.compile(r"(?:GLOBAL|class|function|global) '?([\w.]+\.[\w.]+)")
_LONGEST_MESSAGE = 200


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Return `state_dict` with `prefix` removed from the keys that start with it (``DataParallel`` leaves one).

    Parameters
    ----------
    state_dict : mapping of str to Tensor
    prefix : str

    Returns
    -------
    dict of str to Tensor
    """
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def stored_bytes(tensor: Tensor) -> int | None:
    """Return how many bytes of values a strided tensor on a device has, or None for other ones.

    Less than ``nbytes`` where elements share their memory, as those of an expanded tensor do: whoever reads such a
    tensor element by element may read for days from a file of a few bytes.

    Parameters
    ----------
    tensor : Tensor

    Returns
    -------
    int or None
    """
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    try:
        return min(tensor.nbytes, tensor.untyped_storage().nbytes())
    except (NotImplementedError, RuntimeError):  # a wrapper around other tensors
        return None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a model from a file.

    Parameters
    ----------
    path : path-like
        Written by ``torch.save`` - a state dict, one under ``"state_dict"``, ``"model"`` or ``"model_state_dict"``, or
        a checkpoint of a ``Finetuner`` - or by safetensors. Keys may start with ``module.``. Only tensors and plain
        containers are unpickled; values that are no tensors are left out.

    Returns
    -------
    dict of str to Tensor
        On the CPU (or "meta"). Tensors may be expanded or of any layout: see `stored_bytes` before reading them.

    Raises
    ------
    ConfigurationError
        (a ValueError) If it is no such file, saying what it is instead; or one whose sizes go beyond the file's.
    OSError
        If it cannot be read.
    """
    return read_state_and_content(path)[0]


def read_state_and_content(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """Read the tensors of a model from a file, and give what else it holds, too.

    Parameters
    ----------
    path : path-like
        As for `read_state_dict`, with the same errors.

    Returns
    -------
    state : dict of str to Tensor
    content : any
        All that is in the file, in tensors and plain containers, unchecked.
    """
    name = os.fspath(path)
    try:
        content = _load(name)
        return _tensors_of_model(content), content
    except ConfigurationError as error:
        raise ConfigurationError(f"{name} holds no weights: {error}") from error


def regular_size(path: str) -> int:
    """How many bytes a file has that can be read from beginning to end.

    Parameters
    ----------
    path : str

    Returns
    -------
    int

    Raises
    ------
    ConfigurationError
        If it is a folder, a pipe, on whose writer opening would wait, or a device, which need not end; or empty.
    OSError
        If there is none.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if not status.st_size:
        raise ConfigurationError("it is empty")
    return status.st_size


def _load(path: str) -> Any:
    size = regular_size(path)
    with open(path, "rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    if path.endswith(".safetensors") or (start[8:] == b"{" and 2 <= header <= size - 8):
        content = _load_safetensors(path)
    else:
        if start.startswith(_ZIP):
            _check_zip(path, size)
        content = _load_pickle(path)
    if (claimed := _bytes_of_storages(content)) > size:
        raise ConfigurationError(f"its tensors take {claimed} bytes, the file has {size}")
    return content


@contextlib.contextmanager
def safetensors_refusals() -> Iterator[None]:
    """Let what safetensors raises for files that are none of its be a `ConfigurationError`.

    Yields
    ------
    None

    Raises
    ------
    ConfigurationError
        In the place of its errors, except those of the system.
    """
    from safetensors import SafetensorError

    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        kinds = SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, OSError
        if not isinstance(error, kinds) or not of_contents(error):
            raise
        raise ConfigurationError(f"it is no valid file of safetensors ({_first_line(error)})") from error


def _load_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigurationError("a .safetensors file needs safetensors: pip install safetensors") from error
    with safetensors_refusals():
        return load_file(path)


def _check_zip(path: str, size: int) -> None:
    """Refuse zip files that are not from torch.save, or whose records are larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile raises errors of many types on damaged ones
        if not of_contents(error):
            raise
        raise ConfigurationError("it is a damaged or incomplete zip file (was it copied whole?)") from error
    names = {record.filename.split("/", 1)[-1] for record in records}
    if "constants.pkl" in names:
        raise ConfigurationError("it is a TorchScript archive; write what torch.jit.load(...).state_dict() gives to a "
                                 "file of its own")  # fmt: skip
    if "data.pkl" not in names:
        kind = "arrays of NumPy" if any(name.endswith(".npy") for name in names) else "not from torch.save"
        raise ConfigurationError(f"it is a zip file, but {kind}")
    # torch.save neither compresses nor shares records; who does either may claim any size
    if sum(record.file_size for record in records) > size:
        raise ConfigurationError("its records are larger than the file: it was compressed or forged")


def _load_pickle(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles lead to errors of any type
        if not of_contents(error):
            raise
        text = str(error)
        if (found := _GLOBAL.search(text)) is not None and "eights" in text:
            raise ConfigurationError(f"it holds Python objects ({found[1]}), which are not unpickled because that can "
                                     "run any code; save the model's state_dict() instead") from error  # fmt: skip
        reason = _first_line(text.partition("WeightsUnpickler error: ")[2] or error)
        raise ConfigurationError(f"torch.load with weights_only=True cannot read it ({reason})") from error


def _first_line(text: object) -> str:
    """The line of torch's long messages that says what is wrong."""
    lines = str(text).strip().splitlines()
    return (lines[0] if lines else type(text).__name__)[:_LONGEST_MESSAGE].rstrip(". ")


def _bytes_of_storages(content: Any) -> int:
    """Memory of the tensors in containers, each storage once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    stack = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            if stored_bytes(item):
                storage = item.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))  # containers may hold each other
            stack.extend(item.values() if isinstance(item, Mapping) else item)
    return sum(sizes.values())


def _tensors_of_model(content: Any) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"it is a {type(content).__name__}, not a state dict")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigurationError(f"it is not a state dict, which holds tensors; its keys are {_listed(content)}")
    odd = [key for key in tensors if not isinstance(key, str)]
    if odd:
        raise ConfigurationError(f"it is not a state dict, whose keys are names; its keys are {_listed(odd)}")
    stripped = strip_prefix(tensors)
    # a model with a child called "module" may have both names
    return stripped if len(stripped) == len(tensors) else tensors


def _listed(keys: Iterable[Any]) -> str:
    names = [str(key)[:40] if isinstance(key, (str, int, float)) else type(key).__name__ for key in keys]
    return (", ".join(names[:5]) or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
