"""Moves of functions on several cards at the same time: one unbind may take seconds.

The functions of one card, and of all that leaves the host with it, are moved one after
another in a lane; lanes have no IOMMU group and no slot in common.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from threading import Event
from types import FrameType
from typing import TypeAlias

from gpupt.actions import Action, BindFunction

Lane: TypeAlias = Sequence[tuple[int, Action]]
MOST_LANES = 16


def in_lanes(actions: Sequence[Action]) -> Iterator[tuple[Lane, ...]]:
    """The actions in their order, each with its step: what stands together in a tuple may
    run at the same time."""
    steps = list(enumerate(actions))
    for moves, stretch in groupby(steps, key=lambda each: isinstance(each[1], BindFunction)):
        if not moves:
            yield from (([each],) for each in stretch)
            continue
        lanes: dict[object, list[tuple[int, Action]]] = {}
        for step, action in stretch:
            assert isinstance(action, BindFunction)
            lanes.setdefault(action.lane, []).append((step, action))
        # A move that belongs to no lane might have to do with any other.
        if None in lanes:
            yield (sorted(each for lane in lanes.values() for each in lane),)
        else:
            yield tuple(lanes.values())


def run_lanes(lanes: Sequence[Lane], perform_step: Callable[[int, Action], None]) -> None:
    """Perform every lane; when one raises, the others end with the step that they are in.

    Returns, or raises the error of the first lane that has one, once no step runs any more:
    what undoes never meets what does.  Ctrl-C and SIGTERM come to the main thread, and wait
    for the writes that are under way; those have deadlines.
    """
    if len(lanes) == 1:
        for step, action in lanes[0]:
            perform_step(step, action)
        return
    stop = Event()

    def work(lane: Lane) -> None:
        for step, action in lane:
            if stop.is_set():
                return
            try:
                perform_step(step, action)
            except BaseException:
                stop.set()
                raise

    with interrupts_later(stop), ThreadPoolExecutor(min(len(lanes), MOST_LANES)) as pool:
        for future in [pool.submit(work, lane) for lane in lanes]:
            future.result()


@contextmanager
def interrupts_later(stop: Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM, however often they come, set ``stop`` and are raised at the end: what
    undoes would else run beside a step that is still at work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        stop.set()

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
