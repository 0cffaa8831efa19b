"""Narration of long work: the phase by name, and how long it has been going on.

On a terminal a line at the bottom turns and counts; elsewhere every phase is a plain line
when it begins and one when it ends, so that a log tells the same story.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Narration:
    """Says lines and phases on a stream; ``clock`` gives seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()

    def say(self, line: str) -> None:
        """One line, kept."""
        print(line, file=self._stream, flush=True)

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Name what goes on inside the ``with``, and say how long it took and how it ended."""
        start = time.monotonic()
        self._begin(name, detail)
        word = "failed"
        try:
            yield
            word = "done"
        finally:
            self._end(name, word, time.monotonic() - start)

    def _begin(self, name: str, detail: str) -> None:
        at = time.monotonic() - self._began
        self.say(f"[{at:6.0f} s] {name}{': ' if detail else ''}{detail}")

    def _end(self, name: str, word: str, seconds: float) -> None:
        at = time.monotonic() - self._began
        self.say(f"[{at:6.0f} s] {name}: {word} after {seconds:.1f} s")


class LiveNarration(Narration):
    """The same on a terminal: the phase that goes on is a live line below what was said."""

    def __init__(self, stream: TextIO, live: Progress) -> None:
        super().__init__(stream)
        self._live = live
        self._tasks: list[TaskID] = []

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _begin(self, name: str, detail: str) -> None:
        text = f"{name}: {detail}" if detail else name
        self._tasks.append(self._live.add_task(text, total=None))

    def _end(self, name: str, word: str, seconds: float) -> None:
        self._live.remove_task(self._tasks.pop())
        mark = "✓" if word == "done" else "✗"
        self.say(f"{mark} {name}: {word} after {seconds:.1f} s")


@contextmanager
def narration(stream: TextIO) -> Iterator[Narration]:
    """A narration for that stream, live when it is a terminal; the live line is gone after."""
    if not stream.isatty():
        yield Narration(stream)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as live:
        yield LiveNarration(stream, live)
