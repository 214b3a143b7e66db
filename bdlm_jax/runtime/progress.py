"""What a person watching a run sees and does: progress, and a polite stop.

On a terminal a bar (tqdm); in a file or a CI log, where a bar becomes thousands of lines, one line every half minute.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO


def progress(
    iterable: Iterable | None = None,
    *,
    description: str,
    total: int | None = None,
    start: int = 0,
    every_s: float = 30.0,
    stream: TextIO | None = None,
) -> Any:
    """Shows how far a loop is.

    Args:
        iterable: what to walk; None: call `.update(n)` by hand.
        description: the words before the numbers.
        total: how many there will be; None: `len(iterable)` where it has one.
        start: how many a resumed run has done already.
        every_s: seconds between two lines where `stream` is no terminal.
        stream: where to write; None: stderr.

    Returns:
        An iterable context manager with `.update(n)`, `.set_postfix(**numbers)` and `.close()`.
    """
    stream = stream or sys.stderr
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if not stream.isatty():
        return _Lines(iterable, description, total, start, every_s, stream)
    from tqdm import tqdm

    return tqdm(iterable, desc=description, total=total, initial=start, file=stream, dynamic_ncols=True)


class _Lines:
    """tqdm's interface for a stream that keeps every line."""

    def __init__(self, iterable, description, total, start, every_s, stream) -> None:
        self._iterable, self._description, self._total, self._every_s = iterable, description, total, every_s
        self._stream, self._start, self._n, self._postfix = stream, start, start, ""
        self._began = self._last_line = time.monotonic()
        self._printed: int | None = None

    def __iter__(self) -> Iterator:
        with self:
            for each in self._iterable:
                yield each
                self.update()

    def update(self, n: int = 1) -> None:
        self._n += n
        if time.monotonic() - self._last_line >= self._every_s:
            self._print()

    def set_postfix(self, **numbers: Any) -> None:
        self._postfix = "".join(f", {k} {v:.4g}" if isinstance(v, float) else f", {k} {v}" for k, v in numbers.items())

    def close(self) -> None:
        # A loop shorter than `every_s` stays silent.
        if self._printed is not None and self._n != self._printed:
            self._print()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self) -> None:
        now = time.monotonic()
        seconds = now - self._began
        done = f"{self._n}/{self._total} ({self._n / self._total:.0%})" if self._total else str(self._n)
        rate = (self._n - self._start) / max(seconds, 1e-9)
        print(
            f"{self._description}: {done}, {rate:.3g}/s, {seconds:.0f} s{self._postfix}", file=self._stream, flush=True
        )
        self._last_line, self._printed = now, self._n


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that a loop can save and leave; a second signal acts as usual.

    Used as a context manager; `.requested` turns True. Outside the main thread it watches nothing, because Python
    hands signals to the main thread only.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _request(self, number: int, _: Any) -> None:
        self.requested = True
        self._give_back()
        print(
            f"\n{signal.Signals(number).name}: saving, then leaving (again: leave at once).",
            file=sys.stderr,
            flush=True,
        )

    def _give_back(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
