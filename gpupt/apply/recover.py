"""Brings every unfinished run to the original or the declared state."""

from __future__ import annotations

from gpupt.actions import Plan, Run
from gpupt.apply.execute import perform, terminated_like_interrupted, undo
from gpupt.apply.host import is_host_action
from gpupt.apply.world import World
from gpupt.decide.inverse import plan_recovery, to_undo
from gpupt.errors import Failed, GpuptError
from gpupt.model.host import Host


def recover(run: Run, *, host: Host, world: World) -> None:
    """Undo a run, or carry it on when its verb leads home.

    May itself be cut short anywhere and called again.  Raises Failed when something cannot
    be put right; the run then stays unfinished.
    """
    with terminated_like_interrupted():
        if plan_recovery(run, host=host).carries_on:
            carry_on_run(run, host=host, world=world)
        else:
            undo_run(run, host=host, world=world)


def carry_on_run(run: Run, *, host: Host, world: World) -> None:
    """Perform what is left of a run; each action writes only what is not so yet."""
    for action in plan_recovery(run, host=host).plan.actions:
        world.narrate(f"{type(action).__name__}: {action.why}")
        perform(action, world)
    world.journal.end(run.number, outcome="done")


def undo_run(run: Run, *, host: Host, world: World) -> None:
    """Undo what a run reached, in reverse; one function that stays keeps no other."""
    errors: list[GpuptError] = []
    for entry in to_undo(run, host=host):
        try:
            undo(entry, world)
        except GpuptError as error:
            errors.append(error)
            if not is_host_action(entry.action):
                # A node that could not be stopped keeps its GPUs.
                break
        else:
            world.journal.mark(run.number, entry.step, state="undone")
    if errors:
        first = errors[0]
        more = [line for error in errors[1:] for line in (error.brief, *error.details)]
        raise Failed(first.brief, details=(*first.details, *more), remedy=first.remedy) from first
    world.journal.end(run.number, outcome="undone")


def clean_up(plan: Plan, *, world: World) -> None:
    """Perform what clears remains; a crash here leaves what the next recover sees again."""
    with terminated_like_interrupted():
        for action in plan.actions:
            world.narrate(f"{type(action).__name__}: {action.why}")
            perform(action, world)
