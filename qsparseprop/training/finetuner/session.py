"""What surrounds a training: progress bar, log file, and signals that ask it to stop."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from qsparseprop.utils.files import errors_name

__all__ = ["JsonLines", "ProgressBar", "StopRequest", "stop_on_signals"]


class JsonLines:
    """A log of one JSON object a line, which survives a crash: a line is written whole, at once, or not at all.

    Parameters
    ----------
    path : path-like or None
        File to append to; a last line that a crash has cut off is removed. None logs nothing.

    Raises
    ------
    OSError
        If it cannot be written; it names the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._file: io.FileIO | None = None
        if path is not None:
            self._path = path
            _cut_unfinished_line(path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, event: str, **values: Any) -> None:
        """Append ``{"event": event, ...}``; numbers that are not finite become null, as JSON has none."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = memoryview((json.dumps({"event": event, **clean}) + "\n").encode())
        end = self._file.seek(0, os.SEEK_END)
        with errors_name(self._path):
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _cut_unfinished_line(path: str | os.PathLike[str]) -> None:
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep:
            start = max(0, keep - 65536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep != end:
            file.truncate(keep)


class ProgressBar:
    """tqdm's bar with loss, accuracy and samples per second.

    Parameters
    ----------
    show : bool or None
        None: where tqdm is installed and standard error is a terminal.

    Raises
    ------
    ImportError
        If `show` is true and tqdm is not installed.
    """

    #: Weight of the newest step in the figures shown.
    SMOOTHING = 0.1

    def __init__(self, show: bool | None) -> None:
        self._bar: Any = None
        self._tqdm: Any = None
        if show is False or (show is None and not (sys.stderr and sys.stderr.isatty())):
            return
        try:
            from tqdm import tqdm
        except ImportError as error:
            if show is None:
                return
            raise ImportError("a progress bar needs tqdm: pip install tqdm, or set progress=False") from error
        self._tqdm = tqdm

    def start(self, title: str, total: int | None, done: int) -> None:
        """Show a bar for an epoch of `total` steps, of which `done` have been made before."""
        if self._tqdm is not None:
            self._bar = self._tqdm(desc=title, total=total, initial=done, leave=True, unit="step")
        self._means: dict[str, float] = {}
        self._last = time.perf_counter()

    def step(self, loss: float, correct: int | None, samples: int) -> None:
        """Advance by a step."""
        if self._bar is None:
            return
        now = time.perf_counter()
        values = {"loss": loss, "seconds": now - self._last, "samples": float(samples)}
        if correct is not None:
            values["accuracy"] = correct / max(samples, 1)
        self._last = now
        for key, value in values.items():
            mean = self._means.setdefault(key, value)
            self._means[key] = mean + self.SMOOTHING * (value - mean)
        means = self._means
        text = [f"loss {means['loss']:.4f}"]
        if "accuracy" in means:
            text.append(f"accuracy {100 * means['accuracy']:.1f} %")
        text.append(f"{means['samples'] / max(means['seconds'], 1e-9):.0f} images/s")
        self._bar.set_postfix_str(", ".join(text), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Finish the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class StopRequest:
    """Which signal has asked to stop, if any: None or a ``signal.Signals``."""

    signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGINT (Ctrl-C), SIGTERM and SIGHUP (a lost terminal) instead of dying of them.

    A second one acts as it did before.

    Handlers belong to the main thread; in others nothing is installed, and nothing noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):  # not on Windows
        numbers.append(signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: Any) -> None:
        request.signal = signal.Signals(number)
        restore()

    try:
        for number, handler in previous.items():
            # What is ignored stays so: a shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP.
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        yield request
    finally:
        restore()
