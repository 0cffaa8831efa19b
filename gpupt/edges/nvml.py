"""The gate to NVIDIA's management library: asked in children that are killed at a deadline.

A call into the library may hang with the driver, or crash the process that made it, so gpupt
itself never loads it.  It starts this module as a program of its own, with one thread and with
the library not yet loaded, which forks a child for the library and one for each card; the
children send each answer as it comes.  A fork of gpupt itself would be cheaper, but not safe
beside its threads: the children load a library and allocate memory, and could wait for ever
for a lock that a thread held, which looks like a hanging card.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpupt.edges.nvmlread import (
    FIELDS,
    GPU_NOT_FOUND,
    INIT_FLAG_NO_GPUS,
    NOT_FOUND,
    ask_card,
    attempt,
    library_of,
)
from gpupt.edges.process import decode, end, spawn
from gpupt.model.health import (
    DriverReading,
    Fabric,
    GpuProcess,
    GpuReading,
    Library,
    Modes,
    NvLink,
    RemappedRows,
    RetiredPages,
    Silence,
)
from gpupt.model.pci import PciAddress

# Seconds that a Python may take to start on a machine that is busy; no call to NVML yet.
START = 30.0
# Who a message is of, besides the cards' addresses.
LIBRARY = "library"
# More than any message: a socket of packets cuts off what does not fit.
LONGEST = 1 << 20


@dataclass(slots=True)
class Heard:
    """What the children sent: by who they are, then by field."""

    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    silences: dict[str, dict[str, Silence]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    failure: tuple[Library, str] | None = None
    started: bool = False
    late: bool = False
    noise: str = ""

    def take(self, message: dict[str, Any]) -> None:
        """Take one message in."""
        who, kind = message["who"], message["kind"]
        if kind == "started":
            self.started = True
        elif kind == "answer":
            self.answers.setdefault(who, {})[message["field"]] = message["value"]
        elif kind == "silence":
            self.silences.setdefault(who, {})[message["field"]] = Silence(message["value"])
        elif kind == "unknown":
            self.unknown.add(who)
        elif kind == "failure":
            self.failure = (Library(message["library"]), message["details"])
        else:
            self.ended[who] = message["status"]

    def why(self, who: str) -> Silence:
        """Why that child said no more."""
        status = self.ended.get(who)
        if status == -signal.SIGALRM or (status is None and self.late):
            return Silence.TIMEOUT
        return Silence.CRASHED if status is not None and status < 0 else Silence.ERROR


def read_driver(
    addresses: Sequence[PciAddress], *, deadline: float = 10.0, samples_apart: float = 0.5
) -> DriverReading:
    """What NVML answers for these cards within ``deadline`` seconds of its first call.

    A card that the library does not know (it is on vfio-pci) is left out; one that hangs, is
    lost or crashes the library is there with what it answered before, and why no more.
    """
    cards = tuple(dict.fromkeys(addresses))
    heard = listen(cards, deadline=deadline, samples_apart=samples_apart)
    library, details = library_answer(heard, deadline)
    if library is not Library.ANSWERED:
        return DriverReading(library, details)
    said = heard.answers[LIBRARY]
    return DriverReading(
        library,
        details,
        driver=said.get("driver"),
        nvml=said.get("nvml"),
        gpus=tuple(card_answer(card, heard) for card in cards if str(card) not in heard.unknown),
    )


def listen(cards: Sequence[PciAddress], *, deadline: float, samples_apart: float) -> Heard:
    """Start the children, and hear them until all have ended or the deadline has come."""
    heard = Heard()
    words = [sys.executable, "-P", "-m", "gpupt.edges.nvml", str(deadline), str(samples_apart)]
    package = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as noise:
        with theirs:
            child = spawn(
                [*words, *map(str, cards)],
                stdout=theirs.fileno(),
                stderr=noise,
                environment={"PYTHONPATH": search},
            )
        try:
            hear(ours, heard, deadline=deadline)
        finally:
            # All of its session, and before it is waited for, so that the number is still its
            # own.  A child in the kernel's uninterruptible sleep is left behind.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            end(child, patience=1)
        noise.seek(0)
        heard.noise = decode(noise.read())[-2000:].strip()
    return heard


def hear(ours: socket.socket, heard: Heard, *, deadline: float) -> None:
    """Take messages in until every child has ended, or it is late."""
    until = time.monotonic() + START
    while packet := receive(ours, until=until):
        begun = heard.started
        heard.take(json.loads(packet))
        if heard.started and not begun:
            until = time.monotonic() + deadline
    heard.late = packet is None


def receive(ours: socket.socket, *, until: float) -> bytes | None:
    """The next message; empty after the last child's end, None when none came in time."""
    ready, _, _ = select.select([ours], [], [], max(0.0, until - time.monotonic()))
    return ours.recv(LONGEST) if ready else None


def library_answer(heard: Heard, deadline: float) -> tuple[Library, str]:
    """What became of the library, and the evidence in words."""
    if heard.failure is not None:
        return heard.failure
    why = heard.why(LIBRARY)
    answers, silent = heard.answers.get(LIBRARY, {}), heard.silences.get(LIBRARY, {})
    if "init" in answers:
        missing = [name for name in ("driver", "nvml") if name not in answers]
        said = [f"{name} version: {silent.get(name, why)}" for name in missing]
        return Library.ANSWERED, ", ".join(said)
    if why is Silence.CRASHED:
        number = -heard.ended[LIBRARY]
        return Library.CRASHED, f"the library crashed in nvmlInit (signal {number})"
    if why is Silence.TIMEOUT and heard.started:
        return Library.TIMEOUT, f"nvmlInit did not return within {deadline:g} s"
    return Library.ERROR, heard.noise or "the process that asks NVML said nothing"


def card_answer(card: PciAddress, heard: Heard) -> GpuReading:
    """The reading of one card, a reason for each field that was not answered."""
    who = str(card)
    answers = heard.answers.get(who, {})
    silent = heard.silences.get(who, {})
    why = heard.why(who)
    if not answers.get("handle"):
        return GpuReading(card, silent={"handle": silent.get("handle", why)})
    values = {name: revive(name, answers[name]) for name in FIELDS if name in answers}
    return GpuReading(
        card,
        **values,
        silent={name: silent.get(name, why) for name in FIELDS if name not in answers},
    )


def revive(name: str, value: Any) -> Any:
    """The value of the model that a child's answer stands for."""
    shapes = {
        "remapped": RemappedRows,
        "retired": RetiredPages,
        "ecc": Modes,
        "mig": Modes,
        "fabric": Fabric,
        "nvlinks": NvLink,
        "processes": GpuProcess,
    }
    if isinstance(value, list):
        shape = shapes.get(name)
        return tuple(shape(**each) if shape else each for each in value)
    return shapes[name](**value) if isinstance(value, dict) else value


# From here on: the process that asks, and its children.


@dataclass(frozen=True, slots=True)
class Voice:
    """Sends the messages of one child; a packet each, so that those of several never mix."""

    socket: int
    who: str

    def send(self, kind: str, **more: Any) -> None:
        """Send a message of that kind."""
        os.write(self.socket, json.dumps({"who": self.who, "kind": kind, **more}).encode())

    def say(self, name: str, value: Any) -> None:
        """Send the answer to one question, or why there is none."""
        self.send("silence" if isinstance(value, Silence) else "answer", field=name, value=value)


def ask_library(nvml: Any, voice: Voice) -> None:
    """What a child asks the library as a whole."""
    try:
        nvml.nvmlInitWithFlags(INIT_FLAG_NO_GPUS)
    except nvml.NVMLError as error:
        number = error.value
        said = attempt(nvml, str, error)
        voice.send("failure", library=library_of(number), details=f"NVML: {said} ({number})")
        return
    voice.say("init", True)
    voice.say("driver", attempt(nvml, nvml.nvmlSystemGetDriverVersion))
    voice.say("nvml", attempt(nvml, nvml.nvmlSystemGetNVMLVersion))


def ask_about(nvml: Any, voice: Voice, *, samples_apart: float) -> None:
    """What a child asks about its card; ``handle`` is whether the library has a hold of it."""

    def handle() -> Any:
        nvml.nvmlInitWithFlags(INIT_FLAG_NO_GPUS)
        try:
            return nvml.nvmlDeviceGetHandleByPciBusId(voice.who)
        except nvml.NVMLError as error:
            if error.value not in {NOT_FOUND, GPU_NOT_FOUND}:
                raise
            return None

    card = attempt(nvml, handle)
    if card is None:
        voice.send("unknown")
    elif isinstance(card, Silence):
        # A card whose very hold is not supported is not one that is well.
        voice.say("handle", Silence.ERROR if card is Silence.UNSUPPORTED else card)
    else:
        voice.say("handle", True)
        ask_card(nvml, card, voice.say, samples_apart=samples_apart)


def ask_in_child(nvml: Any, voice: Voice, *, deadline: float, samples_apart: float) -> int:
    """Fork the child that asks for one; what it raises ends it with a traceback."""
    child = os.fork()
    if child:
        return child
    # Should gpupt itself be killed: nobody else ends a child that hangs.
    signal.setitimer(signal.ITIMER_REAL, deadline + 1)
    if voice.who == LIBRARY:
        ask_library(nvml, voice)
    else:
        ask_about(nvml, voice, samples_apart=samples_apart)
    # Neither nvmlShutdown nor the library's destructors: both may hang, and the kernel
    # releases what the process held.
    os._exit(0)


def main(words: Sequence[str]) -> None:
    """``DEADLINE SAMPLES_APART ADDRESS…``: ask, each in a child, and tell how each ended."""
    # What the library may print goes with the errors, not between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    ours = Voice(answers, LIBRARY)
    try:
        import pynvml
    except ImportError as error:
        ours.send("failure", library=Library.ABSENT, details=f"nvidia-ml-py: {error}")
        return
    deadline, samples_apart = map(float, words[:2])
    # A health check each minute would fill the disk with cores of a library that crashes.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ours.send("started")
    children = {}
    for voice in (ours, *(Voice(answers, card) for card in words[2:])):
        child = ask_in_child(pynvml, voice, deadline=deadline, samples_apart=samples_apart)
        children[child] = voice
    for _ in range(len(children)):
        child, status = os.wait()
        children[child].send("ended", status=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1:])
