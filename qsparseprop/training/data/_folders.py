"""Folders of images: which file is one of which class, and which files are none of any."""

from __future__ import annotations

import os
from pathlib import Path

from qsparseprop.utils.errors import ConfigurationError

__all__ = ["ImageFolder", "listed"]

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_WHAT_IS_ONE = f"an image is a file *{', *'.join(_IMAGE_SUFFIXES)} right in the folder of its class"

#: Files that systems leave in folders, without a dot.
_OF_SYSTEMS = ("desktop.ini", "thumbs.db")

#: So many folders or files are named.
_NAMED = 3


class ImageFolder:
    """The images in a folder by class.

    Parameters
    ----------
    path : Path
        Has a sub-folder for each class, or ``train`` and ``test`` (or ``val``) that have.

    Attributes
    ----------
    parts : list of dict of str to list of Path
        Files by class: all, or those for training and those for the test.

    Raises
    ------
    ConfigurationError
        If there are no images, those of one class only, a class has none, or both parts do not have the same classes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._passed_over: list[str] = []
        train = path / "train"
        test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
        split = [train, test] if train.is_dir() and test is not None else [path]
        self.parts = [self._classes(folder) for folder in split]
        if len(split) == 2:
            self._pass_over(*(entry for entry in _visible(path) if Path(entry.path) not in split))
        if (wrong := self._wrong(split)) is not None:
            raise ConfigurationError(f"{path} must have one folder of images a class, or train/ and test/ with the same"
                                     f" classes{wrong}")  # fmt: skip

    def _wrong(self, folders: list[Path]) -> str | None:
        """The end of a sentence on what the classes are instead, or None where they are right."""
        here, there = self.parts[0], self.parts[-1]
        if here.keys() != there.keys():
            only = [(folder.name, sorted(part.keys() - other.keys()))
                    for folder, part, other in zip(folders, (here, there), (there, here), strict=True)]  # fmt: skip
            return "".join(f"; only {name}/ has {listed(classes)}" for name, classes in only if classes)
        if not here:
            return f": {self._told()}" if self._passed_over else ""
        if len(here) == 1:
            # mostly the folder above the right one: the network would be right in all cases, and have learned nothing
            return f"; there is one class only, {next(iter(here))}: a network learns to tell classes apart"
        return None

    @property
    def warning(self) -> str | None:
        """A line on files that are passed over, if there are any."""
        return f"{self.path}: {self._told()}" if self._passed_over else None

    def _told(self) -> str:
        count = len(self._passed_over)
        files = "1 file is" if count == 1 else f"{count} files are"
        return f"{files} passed over, {listed(self._passed_over)}; {_WHAT_IS_ONE}"

    def _classes(self, folder: Path) -> dict[str, list[Path]]:
        classes, without, lost = {}, [], list[str]()
        for entry in _visible(folder):
            if not entry.is_dir():
                self._pass_over(entry)
                continue
            files, before = [], len(self._passed_over)
            for one in _visible(entry.path):
                if one.is_dir() or Path(one.name).suffix.lower() not in _IMAGE_SUFFIXES:
                    self._pass_over(one)
                else:
                    files.append(Path(one.path))
            if files:
                classes[entry.name] = files
            else:
                without.append(entry.name)
                lost += self._passed_over[before:]
        if classes and without:
            # left out, the others would have other numbers, and the network one class less
            there = f" (there are {listed(lost)})" if lost else ""
            raise ConfigurationError(f"{folder} has folders without images: {listed(without)}{there}; {_WHAT_IS_ONE}. "
                                     "Put some there, or take these folders away")  # fmt: skip
        return classes

    def _pass_over(self, *entries: os.DirEntry[str]) -> None:
        """Take note of files, and of all files in folders."""
        for entry in entries:
            name = os.path.relpath(entry.path, self.path)
            if entry.is_dir(follow_symlinks=False):  # a link may lead back
                self._pass_over(*_visible(entry.path))
            else:
                self._passed_over.append(name)


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    # .ipynb_checkpoints is no class, and ._1.jpg, which macOS writes beside 1.jpg, is no image
    with os.scandir(folder) as entries:
        seen = [one for one in entries if not one.name.startswith(".") and one.name.lower() not in _OF_SYSTEMS]
    return sorted(seen, key=lambda one: Path(one.path))


def listed(names: list[str]) -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
