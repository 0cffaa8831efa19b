"""Carries a plan out: intent on the disk, perform, verify, done; undone before reported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from gpupt.actions import (
    Action,
    BindFunction,
    CheckGpu,
    EraseLoan,
    JournalEntry,
    Plan,
    ResetGpu,
    SetAttribute,
    told,
)
from gpupt.apply import host
from gpupt.apply.lanes import in_lanes, run_lanes
from gpupt.apply.world import World
from gpupt.decide.inverse import FORWARD
from gpupt.errors import Failed, GpuptError, Refused
from gpupt.model.pci import DriverBinding

# What may fail on the way home without keeping the rest from it.
TOLERATED = (BindFunction, EraseLoan, ResetGpu, CheckGpu, SetAttribute)


def execute(plan: Plan, *, world: World) -> None:
    """Carry out every action of the plan, in order.

    Error, Ctrl-C or SIGTERM: what was done is undone in reverse, then the error travels on.
    Verbs that lead home (attach, down) are not undone: they go on where that is safe, and
    ``recover`` or the verb itself carries the rest on.  Raises Refused while an earlier run
    is unfinished.
    """
    if not plan.actions:
        return
    require_finished(world)
    with terminated_like_interrupted():
        run = world.journal.begin(plan)
        if plan.verb in FORWARD:
            carry_on(plan, run=run, world=world)
        else:
            go_or_undo(plan, run=run, world=world)


def require_finished(world: World) -> None:
    """Raises Refused while the journal holds a run that was cut short."""
    for run in world.journal.ledger.unfinished:
        raise Refused(
            f"an earlier {run.plan.verb} of {run.plan.subject} was cut short (PID {run.pid})",
            remedy="gpupt recover",
        )


def go_or_undo(plan: Plan, *, run: int, world: World) -> None:
    """All of the plan or nothing of it."""
    reached: list[JournalEntry] = []

    def perform_step(step: int, action: Action) -> None:
        one_step(JournalEntry(step, action, None, False), run=run, world=world, reached=reached)

    try:
        for lanes in in_lanes(plan.actions):
            run_lanes(lanes, perform_step)
    except BaseException as error:
        said = undo_all(reached, run=run, world=world)
        if not isinstance(error, GpuptError):
            raise
        raise Failed(error.brief, details=(*error.details, *said), remedy=error.remedy) from error
    world.journal.end(run, outcome="done")


def one_step(planned: JournalEntry, *, run: int, world: World, reached: list[JournalEntry]) -> None:
    """One action from intent to done; it is among ``reached`` from its intent on."""
    action = planned.action
    world.boundary("planned", action)
    entry = JournalEntry(planned.step, action, prior_of(action, world), False)
    world.journal.intend(run, entry)
    reached.append(entry)
    world.boundary("intended", action)
    world.narrate(f"{told(action)}: {action.why}")
    perform(action, world)
    world.boundary("performed", action)
    world.journal.mark(run, entry.step, state="done")
    world.boundary("done", action)


def carry_on(plan: Plan, *, run: int, world: World) -> None:
    """As much of the plan as can be."""

    def perform_step(step: int, action: Action) -> None:
        one_step(JournalEntry(step, action, None, False), run=run, world=world, reached=[])

    go_home(plan.actions, perform_step, run=run, world=world)


def go_home(
    actions: Sequence[Action],
    perform_step: Callable[[int, Action], None],
    *,
    run: int,
    world: World,
) -> None:
    """As many of the actions as can be; one function that does not come back stops no other.

    Ends the run either way: what failed stays on loan, for the next attach or down.
    """
    errors: list[GpuptError] = []

    def try_step(step: int, action: Action) -> None:
        try:
            perform_step(step, action)
        except GpuptError as error:
            errors.append(error)
            # Nothing is taken from a node that could not be stopped.
            if not isinstance(action, TOLERATED):
                raise

    try:
        for lanes in in_lanes(actions):
            run_lanes(lanes, try_step)
    except GpuptError:
        pass  # It is the last of the errors.
    except KeyboardInterrupt:
        world.narrate("interrupted; gpupt recover carries on from here")
        raise
    if errors:
        world.journal.end(run, outcome="failed")
        first = errors[0]
        more = [line for error in errors[1:] for line in (error.brief, *error.details)]
        raise Failed(
            first.brief,
            details=(*first.details, *more, "what is not back is still on loan"),
            remedy=first.remedy,
        ) from first
    world.journal.end(run, outcome="done")


def undo_all(reached: list[JournalEntry], *, run: int, world: World) -> list[str]:
    """Undo in reverse; says what was undone and what could not be, a line each."""
    said = []
    failed = False
    for entry in reversed(reached):
        name = told(entry.action)
        try:
            undo(entry, world)
        except GpuptError as error:
            failed = True
            said.append(f"could not undo {name}: {error.brief}")
            world.narrate(said[-1])
            if not host.is_host_action(entry.action):
                # A node that could not be stopped keeps its GPUs.
                break
            continue
        world.journal.mark(run, entry.step, state="undone")
        said.append(f"undone: {name}")
        world.narrate(said[-1])
    if failed:
        # The run stays unfinished: recover tries again what could not be undone.
        said.append("gpupt recover tries again what could not be undone")
    else:
        world.journal.end(run, outcome="undone")
    return said


def prior_of(action: Action, world: World) -> DriverBinding | None:
    return host.prior_of(action, world) if host.is_host_action(action) else None


def perform(action: Action, world: World) -> None:
    """Hand the action to whom it concerns."""
    if host.is_host_action(action):
        host.perform(action, world)
    else:
        from gpupt.apply import cluster

        cluster.perform(action, world)


def undo(entry: JournalEntry, world: World) -> None:
    """Hand the undoing to whom it concerns."""
    if host.is_host_action(entry.action):
        host.undo(entry.action, entry.prior, world)
    else:
        from gpupt.apply import cluster

        cluster.undo(entry.action, world)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that it undoes too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
