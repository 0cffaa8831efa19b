"""Brings every unfinished run to the original or the declared state."""

from __future__ import annotations

from gpupt.actions import Action, Plan, Run
from gpupt.apply.execute import go_home, perform, terminated_like_interrupted, undo
from gpupt.apply.host import is_host_action
from gpupt.apply.world import World
from gpupt.decide.inverse import Recovery, plan_recovery, to_undo
from gpupt.errors import Failed, GpuptError
from gpupt.model.host import Host


def recover(run: Run, *, host: Host, world: World) -> None:
    """Undo a run, or carry it on when its verb leads home.

    May itself be cut short anywhere and called again.  Raises Failed when something cannot
    be put right: a run to undo then stays unfinished, one that is carried on has ended, with
    the loans kept of what is not back.
    """
    with terminated_like_interrupted():
        recovery = plan_recovery(run, host=host, loans=world.journal.ledger.loans)
        for address in recovery.left_alone:
            world.narrate(f"{address} is left alone: it is gone, or not the card on loan")
        if recovery.carries_on:
            carry_on_run(run, recovery, world=world)
        else:
            undo_run(run, host=host, world=world)


def carry_on_run(run: Run, recovery: Recovery, *, world: World) -> None:
    """Perform what is left of a run; each action writes only what is not so yet."""

    def perform_step(_step: int, action: Action) -> None:
        world.narrate(f"{type(action).__name__}: {action.why}")
        perform(action, world)

    go_home(recovery.plan.actions, perform_step, run=run.number, world=world)


def undo_run(run: Run, *, host: Host, world: World) -> None:
    """Undo what a run reached, in reverse; one function that stays keeps no other."""
    errors: list[GpuptError] = []
    for entry in to_undo(run, host=host, loans=world.journal.ledger.loans):
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
