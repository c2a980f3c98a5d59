"""What a command shows of its work while it goes on."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Progress"]

#: Without a terminal, a line is printed after so many seconds without one.
_SILENCE_SECONDS = 5.0
#: In a terminal, seconds between two looks at the clock.
_REFRESH_SECONDS = 0.5


class Progress:
    """Tells what goes on: in a terminal a bar of all the work and one for each thing that counts its steps.

    Elsewhere it prints a line whenever nothing else has been printed for some seconds. A thread sees to both, so that a
    step which takes long is no silence.

    Parameters
    ----------
    job : str
        Name of the whole work.
    """

    def __init__(self, job: str) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._job = job
        self._stage = ""
        self._share = self._until = 0.0
        self._counters: dict[str, _Counter] = {}
        self._began = self._printed = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = self._add_bar(job, 100, "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}] {postfix[0]}", postfix=[""])
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_talking, daemon=True)
        self._thread.start()

    def _add_bar(self, name: str, total: int, bar_format: str, **options: Any) -> Any:
        if not self._terminal:
            return None
        # Some terminals do not tell their size; tqdm would show nothing then.
        columns, rows = shutil.get_terminal_size()
        return self._tqdm(total=total, desc=name, bar_format=bar_format, leave=False, position=len(self._counters),
                          ncols=columns, nrows=rows, **options)  # fmt: skip

    # ---- what the work calls ----

    def message(self, text: str) -> None:
        """Print lines that stay."""
        with self._lock:
            # above the bars, where there are any to be seen
            print(text, flush=True) if self._bar is None else self._tqdm.write(text)
            sys.stdout.flush()
            self._printed = time.monotonic()

    def stage(self, text: str, until: float) -> None:
        """Begin a part of the work, at whose end the share `until` of all work is done; the one before has ended."""
        with self._lock:
            self._close_counters()
            self._share, self._until, self._stage = self._until, max(until, self._until), text
            self._show()

    def progress(self, name: str, total: int) -> Callable[[str], None]:
        """Count `total` steps of the present part; the returned function is called at each, with a note on it."""
        with self._lock:
            counter = _Counter(total)
            # one line below that of all the work for each
            self._counters[name] = counter
            counter.bar = self._add_bar(name.ljust(16), total, "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                                        "{postfix[0]}", postfix=[""])  # fmt: skip

        def advance(note: str) -> None:
            with self._lock:
                counter.done, counter.note = min(counter.done + 1, total), note
                self._show()

        return advance

    def close(self) -> None:
        """Remove all bars; messages go on."""
        self._closed.set()
        self._thread.join()
        self._close_counters()
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    # ---- how it is shown ----

    def _close_counters(self) -> None:
        for counter in self._counters.values():
            if counter.bar is not None:
                counter.bar.close()
        self._counters.clear()

    def _percent(self) -> float:
        counters = self._counters.values()
        here = sum(c.done for c in counters) / max(sum(c.total for c in counters), 1)
        return 100 * (self._share + (self._until - self._share) * here)

    def _show(self) -> None:
        if self._bar is None:
            return
        for counter in self._counters.values():
            counter.bar.n, counter.bar.postfix[0] = counter.done, counter.note
            counter.bar.refresh()
        self._bar.n, self._bar.postfix[0] = self._percent(), self._stage
        self._bar.refresh()

    def _keep_talking(self) -> None:
        while not self._closed.wait(_REFRESH_SECONDS):
            with self._lock:
                if self._bar is not None:
                    self._show()
                elif time.monotonic() - self._printed >= _SILENCE_SECONDS:
                    self.message(self._line())

    def _line(self) -> str:
        """Where the work is, for a log."""
        counted = [f"{name} {c.done}/{c.total} {c.note}".rstrip() for name, c in self._counters.items()]
        seconds = time.monotonic() - self._began
        return f"  [{seconds:.0f} s, {self._percent():.0f} %] " + "; ".join([self._stage, *counted])


class _Counter:
    """Steps done of a part of the work, and the bar that shows them, if any."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.note = total, 0, ""
        self.bar: Any = None
