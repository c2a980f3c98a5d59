"""Files of frozen models: one each, in the format of safetensors, which are read without the model's Python class.

A file is data: tensors, and a description of what is computed with them. Whatever is read is checked before it is used,
so that a file from anywhere may be loaded: it is refused by a sentence, or its program runs. See docs/inference.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any, NamedTuple

from qsparseprop._version import __version__
from qsparseprop.inference.containers import StoredTensors, open_container, write_container
from qsparseprop.inference.data import from_json, to_json
from qsparseprop.inference.descriptions import DescriptionReader, DescriptionWriter
from qsparseprop.inference.limits import check_limits
from qsparseprop.inference.program import Program
from qsparseprop.inference.reading import Fields, read_text, read_whole
from qsparseprop.utils.errors import ConfigurationError

__all__ = ["FORMAT", "VERSION", "Loaded", "holds_program", "load_program", "read_description", "read_program",
           "save_program"]  # fmt: skip

FORMAT = "qsparseprop.frozen"
#: Files of later versions are refused. Readers of this version know no field that this version does not write.
VERSION = 1


class Loaded(NamedTuple):
    """What a file holds.

    Attributes
    ----------
    program : Program
    about : any
        What `save_program` was given beside it.
    made_by : str
        Version of the library that wrote it.
    """

    program: Program
    about: Any
    made_by: str


def save_program(program: Program, path: str | os.PathLike[str], about: Any = None) -> None:
    """Write a program to a file, which appears whole or not at all; without what nothing reads.

    Parameters
    ----------
    program : Program
    path : path-like
        What it held before stays until the new content has reached the disk.
    about : any
        What else is to be known of it: None, numbers, strings, dtypes, and lists, tuples and dicts of these.

    Raises
    ------
    OSError
        If the file cannot be written; it names `path`.
    ValueError
        If the program could not be loaded, or something in it cannot be written.
    """
    writer = DescriptionWriter()
    described = writer.program(_without_unread(program))
    description = {"format": FORMAT, "version": VERSION, "made_by": __version__, "program": described,
                   "about": to_json(about)}  # fmt: skip
    # whatever could not be loaded is not written
    read_description(json.loads(json.dumps(description)), StoredTensors(writer.tensors))
    write_container(path, description, writer.tensors)


def _without_unread(program: Program) -> Program:
    """The same without steps and constants that no output depends on."""
    read = set(program.outputs)
    steps = []
    for step in reversed(program.steps):
        if step.output in read:
            read.update(step.inputs)
            steps.append(step)
    kept = read | set(program.inputs)
    return replace(program, steps=tuple(reversed(steps)),
                   values={name: value for name, value in program.values.items() if name in kept},
                   constants={name: tensor for name, tensor in program.constants.items() if name in read})  # fmt: skip


def holds_program(path: str | os.PathLike[str]) -> bool:
    """Whether a file, which may be any, says that it is one of `save_program`; it may be damaged all the same.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    bool

    Raises
    ------
    OSError
        If it cannot be read.
    """
    try:
        with open_container(path) as (description, _):
            return isinstance(description, dict) and description.get("format") == FORMAT
    except (ConfigurationError, ImportError):
        return False


def load_program(path: str | os.PathLike[str]) -> Program:
    """Read a program from a file. Constants of calls stay in the memory of the file until they are used.

    Parameters
    ----------
    path : path-like
        Written by `save_program`. It may be replaced while the program is used, but not written to.

    Returns
    -------
    Program

    Raises
    ------
    ConfigurationError
        (a ValueError) If it is no such file, is damaged, or has been written by a later version.
    OSError
        If it cannot be read.
    ImportError
        If safetensors is not installed.
    """
    return read_program(path).program


def read_program(path: str | os.PathLike[str]) -> Loaded:
    """Read a program and what was written beside it.

    Parameters
    ----------
    path : path-like
        As for `load_program`, with the same errors.

    Returns
    -------
    Loaded
    """
    try:
        with open_container(path) as (description, stored):
            return read_description(description, stored)
    except ConfigurationError as error:
        raise ConfigurationError(f"{os.fspath(path)} holds no frozen model: {error}") from error


def read_description(description: Any, stored: StoredTensors) -> Loaded:
    """Read a program from its description.

    Parameters
    ----------
    description : any
        From JSON.
    stored : StoredTensors

    Returns
    -------
    Loaded

    Raises
    ------
    ConfigurationError
        If it is none.
    """
    fields = Fields(description, "the description")
    found = fields.take("format", read_text)
    if found != FORMAT:
        raise ConfigurationError(f"it is a {found!r:.60}, not a {FORMAT!r}")
    version = fields.take("version", read_whole(1, 1 << 31))
    made_by = fields.take("made_by", read_text)
    if version > VERSION:
        raise ConfigurationError(f"it is of version {version} of the format, written by qsparseprop {made_by:.30}; "
                                 f"this one, {__version__}, reads versions up to {VERSION}")  # fmt: skip
    try:
        about = fields.take("about", lambda value, where: from_json(value))
        program = DescriptionReader(stored).program(fields.take("program", lambda value, where: value))
        fields.close()
        check_limits(program)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return Loaded(program, about, made_by)
