"""Run in the emulated host: detach and attach, killed at their boundaries, and recovered.

    python killed.py STEP

STEP: at each, or at each second, third … of them; with an odd one each kind of boundary has
its turn.  Prints a JSON object: how many there were, at how many gpupt was killed, and those
after which a function was not where it had been.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from itertools import count
from pathlib import Path

from gpupt.actions import Action, Plan
from gpupt.apply.execute import execute
from gpupt.apply.recover import recover
from gpupt.apply.world import World
from gpupt.decide.binding import choose_all, plan_attach, plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.kernel import Kernel
from gpupt.edges.sysfs import read_host

ROOT = Path("/")
STATE = Path(tempfile.mkdtemp(prefix="killed-"))


def quiet(line: str) -> None:
    """Narrate to nobody."""


def bindings() -> dict[str, tuple[str | None, str | None]]:
    """Every function's driver and override."""
    return {
        str(address): (device.binding.driver, device.binding.override)
        for address, device in read_host(ROOT, whole=True).devices.items()
    }


def decide(verb: str) -> Plan:
    host, loans = read_host(ROOT, whole=True), read_ledger(STATE).loans
    if verb == "attach":
        return plan_attach(host, gpus=tuple(loans), loans=loans)
    taken, _ = choose_all(host, loans=loans, preflight=Preflight())
    return plan_detach(host, gpus=taken, loans=loans, preflight=Preflight())


def killed(plan: Plan, *, at: int | None = None) -> bool:
    """Carry a plan out in a process that SIGKILL ends at its ``at``-th boundary."""
    child = os.fork()
    if child == 0:
        passed = count()

        def boundary(point: str, action: Action) -> None:
            # Cards move at the same time: each boundary has a number of its own.
            if next(passed) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with Journal(STATE) as journal:
                execute(plan, world=World(Kernel(ROOT), journal, quiet, None, boundary))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def recover_all() -> None:
    with Journal(STATE) as journal:
        host = read_host(ROOT, whole=True)
        for run in reversed(journal.ledger.unfinished):
            recover(run, host=host, world=World(Kernel(ROOT), journal, quiet))


def sweep(
    verb: str, step: int, at_home: dict[str, tuple[str | None, str | None]]
) -> tuple[int, int, list[str]]:
    """Kill the verb at its boundaries; the number of them, of kills, and what went wrong."""
    astray = []
    boundaries = range(len(decide(verb).actions) * 4)
    for at in boundaries[::step]:
        if not killed(decide(verb), at=at):
            astray.append(f"{verb} {at}: was not killed")
        recover_all()
        ledger = read_ledger(STATE)
        if bindings() != at_home or ledger.loans or ledger.unfinished:
            astray.append(f"{verb} {at}: {bindings()}")
        if verb == "attach":
            killed(decide("detach"))
    return len(boundaries), len(boundaries[::step]), astray


if __name__ == "__main__":
    each = int(sys.argv[1])
    home = bindings()
    there, first, wrong = sweep("detach", each, home)
    killed(decide("detach"))
    back, second, more = sweep("attach", each, home)
    killed(decide("attach"))
    told = {"boundaries": there + back, "killed": first + second, "astray": wrong + more}
    json.dump(told | {"home": bindings() == home}, sys.stdout)
    print()
