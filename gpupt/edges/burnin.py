"""The gate to the burn-in: a program of its own for each card, heard and killed at a deadline.

A framework may hang with the driver or crash with it, and it may live in another Python than
gpupt's; so gpupt/edges/burnprogram.py runs as a plain file in whatever Python has one.  The cards
are loaded at the same time, but copy one after the other: they share the host's memory and often
a port, and would measure each other.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

from gpupt.edges.nvml import read_driver
from gpupt.edges.process import decode, end, spawn
from gpupt.errors import GpuptError
from gpupt.model.burnin import BurnReading, Stage
from gpupt.model.health import DriverReading, Silence
from gpupt.model.pci import PciAddress

PROGRAM = Path(__file__).with_name("burnprogram.py")
# Seconds for a Python and a framework to start: from a slow disk that takes a minute.
START = 120.0
# Seconds that the other cards wait for one that copies.
TURN = 30.0
# Seconds between two looks at the cards under load.
PAUSE = 2.0
WORK = (Stage.BANDWIDTH, Stage.MEMORY, Stage.MATRIX)
FIELDS = frozenset(
    (
        "host_to_device", "host_to_device_median", "device_to_host", "device_to_host_median",
        "device", "copy_errors", "memory_tested", "memory_patterns", "memory_errors", "products",
        "wrong_products", "tflops", "tflops_half",
    )
)  # fmt: skip

Look = Callable[[Sequence[PciAddress]], DriverReading]


@dataclass(slots=True)
class Heat:
    """What NVML said of a card under load."""

    peak: int | None = None
    margin: int | None = None
    events: int | None = None


@dataclass(slots=True)
class Heard:
    """What the program of one card said, and how it ended."""

    address: PciAddress
    framework: str | None = None
    name: str | None = None
    pinned: bool | None = None
    stage: Stage = Stage.START
    answers: dict[str, Any] = field(default_factory=dict)
    done: set[Stage] = field(default_factory=set)
    failed: dict[Stage, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    without: bool = False
    ended: bool = False
    late: bool = False
    status: int | None = None
    noise: str = ""

    def take(self, message: Mapping[str, Any]) -> None:
        """Take one message in; of one that is not known, nothing."""
        kind = message.get("kind")
        if kind == "skipped":
            self.skipped[str(message["framework"])] = str(message["why"])
        elif kind == "begun":
            self.framework, self.pinned = str(message["framework"]), bool(message["pinned"])
            self.name = message["name"] and str(message["name"])
        elif kind == "stage":
            self.stage = Stage(message["stage"])
        elif kind == "answer" and message["field"] in FIELDS:
            self.answers[message["field"]] = message["value"]
        elif kind == "done":
            self.done.add(Stage(message["stage"]))
        elif kind == "failed":
            self.failed[Stage(message["stage"])] = str(message["why"])
        elif kind == "none":
            self.without = True
        elif kind == "ended":
            self.ended = True

    def why(self) -> Silence:
        """Why the program said no more."""
        if self.late or self.status == -signal.SIGALRM:
            return Silence.TIMEOUT
        crashed = self.status is not None and self.status < 0
        return Silence.CRASHED if crashed else Silence.ERROR

    def silent(self) -> dict[Stage, Silence]:
        """The stages that did not end, and why."""
        if self.without:
            return dict.fromkeys(Stage, Silence.UNSUPPORTED)
        missing = [stage for stage in WORK if stage not in self.done]
        said = {stage: Silence.ERROR if stage in self.failed else self.why() for stage in missing}
        return said if self.framework is not None else {Stage.START: self.why(), **said}

    def details(self) -> str:
        """What was seen, in words."""
        if self.without:
            return "; ".join(f"{name} {why}" for name, why in self.skipped.items())
        said = [f"{stage}: {why}" for stage, why in self.failed.items()]
        if self.ended:
            return "; ".join(said)
        if self.why() is Silence.CRASHED and self.status is not None:
            said.append(f"{self.stage}: ended by signal {-self.status}")
        elif self.why() is Silence.TIMEOUT:
            said.append(f"{self.stage}: it did not end in time")
        last = self.noise.splitlines()[-1:]
        return "; ".join([*said, *last])

    def reading(self, seconds: float, heat: Heat) -> BurnReading:
        """The reading of that card."""
        return BurnReading(
            self.address,
            framework=self.framework,
            name=self.name,
            seconds=round(seconds, 3),
            pinned=self.pinned,
            temperature_peak=heat.peak,
            margin_least=heat.margin,
            clock_events_seen=heat.events,
            silent=self.silent(),
            details=self.details(),
            **self.answers,
        )


@dataclass(slots=True)
class Burn:
    """The program of one card as it runs; its times are of the monotonic clock."""

    heard: Heard
    # What spawn() returns.
    child: Any
    ours: socket.socket
    noise: IO[bytes]
    started: float
    turn: float | None = None
    over: float | None = None
    rest: bytes = b""

    def until(self, deadline: float) -> float | None:
        """When it is late; while it waits for its turn, never."""
        if self.turn is not None:
            return self.turn + deadline
        return None if self.heard.framework is not None else self.started + START

    def read(self) -> bool:
        """Take in what it wrote; False at its end."""
        chunk = b""
        # It ended with our word for it unread.
        with suppress(ConnectionResetError):
            chunk = self.ours.recv(1 << 16)
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        for line in lines:
            # A Python may say something of its own before the program does.
            with suppress(ValueError, KeyError):
                message = json.loads(line)
                if isinstance(message, dict):
                    self.heard.take(message)
        return bool(chunk)

    def begin(self) -> None:
        """Let it begin; if it is gone by now, its end says why."""
        self.turn = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.ours.sendall(b"go\n")

    def copies(self) -> bool:
        """Is it its turn to copy?"""
        past = self.heard.done | set(self.heard.failed)
        return (
            self.turn is not None
            and self.over is None
            and Stage.BANDWIDTH not in past
            and time.monotonic() < self.turn + TURN
        )

    def finish(self) -> None:
        """End it with all its session, and keep how it ended and what it said beside."""
        if self.heard.late:
            # It gets no time to end by itself; in the kernel's uninterruptible sleep it is left.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)
        end(self.child, patience=2)
        self.over = time.monotonic()
        self.heard.status = self.child.returncode
        self.heard.late |= self.heard.status is None
        self.noise.seek(0)
        self.heard.noise = decode(self.noise.read())[-2000:].strip()


def burn_in(
    targets: Sequence[tuple[PciAddress, str]],
    *,
    seconds: float = 60.0,
    deadline: float | None = None,
    python: str | Path = sys.executable,
    options: Sequence[str] = (),
    look: Look = read_driver,
    pause: float = PAUSE,
) -> tuple[BurnReading, ...]:
    """Load these cards, each named by its UUID as well, for about ``seconds``.

    ``deadline`` seconds from the begin of its load end the program of a card that hangs (twice
    the load and half a minute, unless said otherwise); ``python`` is the one whose frameworks
    are used, ``options`` more words for the program.  ``look`` is how NVML is asked about the
    cards under load, each ``pause`` seconds.  Raises Failed when that Python is missing.
    """
    patience = 2 * seconds + 30 if deadline is None else deadline
    words = [
        str(python), str(PROGRAM), "--turn",
        "--seconds", f"{seconds:g}", "--deadline", f"{patience + 1:g}", *options,
    ]  # fmt: skip
    burns: list[Burn] = []
    with ExitStack() as stack:
        for address, uuid in targets:
            burns.append(start(words, address, uuid, stack))
        watch = Watch(burns, look, pause)
        watch.thread.start()
        stack.callback(watch.stop)
        follow(burns, deadline=patience)
        watch.stop()
        return tuple(
            burn.heard.reading(loaded(burn), watch.heats[burn.heard.address]) for burn in burns
        )


def start(words: Sequence[str], address: PciAddress, uuid: str, stack: ExitStack) -> Burn:
    """Start the program of one card; the stack ends it."""
    noise = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    with theirs:
        child = spawn(
            words,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=noise,
            environment={"CUDA_VISIBLE_DEVICES": uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        )
    burn = Burn(Heard(address), child, ours, noise, time.monotonic())
    # Whatever ends this run, no load outlives it.
    stack.callback(lambda: None if burn.over is not None else burn.finish())
    return burn


def follow(burns: Sequence[Burn], *, deadline: float) -> None:
    """Hear the programs, give each its turn, and end those that are late."""
    while living := [burn for burn in burns if burn.over is None]:
        waiting = [
            burn for burn in living if burn.turn is None and burn.heard.framework is not None
        ]
        if waiting and not any(burn.copies() for burn in living):
            waiting[0].begin()
        ready, _, _ = select.select([burn.ours for burn in living], [], [], 0.2)
        for burn in living:
            until = burn.until(deadline)
            if burn.ours in ready:
                if not burn.read():
                    burn.finish()
            elif until is not None and time.monotonic() > until:
                burn.heard.late = True
                burn.finish()


def loaded(burn: Burn) -> float:
    """For how many seconds that card was loaded."""
    return 0.0 if burn.turn is None or burn.over is None else burn.over - burn.turn


class Watch:
    """Looks at the cards under load, beside what hears their programs."""

    def __init__(self, burns: Sequence[Burn], look: Look, pause: float) -> None:
        self.burns, self.look, self.pause = burns, look, pause
        self.heats = {burn.heard.address: Heat() for burn in burns}
        self.over = Event()
        self.thread = Thread(target=self.run, name="burn-in-watch", daemon=True)

    def stop(self) -> None:
        """Look no more; a look that hangs is not waited for."""
        self.over.set()
        self.thread.join(timeout=PAUSE)

    def run(self) -> None:
        """Look now and then, until it is over."""
        # Without NVML there is a burn-in all the same, and no heat is known.
        with suppress(GpuptError):
            while not self.over.wait(self.pause):
                hot = [burn.heard.address for burn in self.burns if self.loads(burn)]
                reading = self.look(hot) if hot else None
                if reading is not None and not self.over.is_set():
                    note(reading, self.heats)

    @staticmethod
    def loads(burn: Burn) -> bool:
        """Is that card under load now?"""
        return burn.over is None and burn.heard.stage in {Stage.MEMORY, Stage.MATRIX}


def note(reading: DriverReading, heats: Mapping[PciAddress, Heat]) -> None:
    """Keep the worst of what NVML says."""
    for gpu in reading.gpus:
        heat = heats.get(gpu.address)
        if heat is None:
            continue
        if gpu.temperature is not None:
            heat.peak = max(gpu.temperature, gpu.temperature if heat.peak is None else heat.peak)
        margin = gpu.temperature_margin
        if margin is None and None not in (gpu.temperature_slowdown, gpu.temperature):
            margin = (gpu.temperature_slowdown or 0) - (gpu.temperature or 0)
        if margin is not None:
            heat.margin = margin if heat.margin is None else min(heat.margin, margin)
        if gpu.clock_events:
            heat.events = (heat.events or 0) | reduce(and_, gpu.clock_events)
