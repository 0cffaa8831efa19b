"""The action that takes another one back: what undo performs, and what recover shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpupt.actions import (
    Action,
    BindFunction,
    EraseLoan,
    FenceGpu,
    JournalEntry,
    LendGpu,
    MakeCluster,
    PersistLoan,
    Plan,
    RecordLoan,
    RemoveCluster,
    ReturnGpu,
    Run,
    SetAttribute,
    StartNetwork,
    StartNode,
    StopNetwork,
    StopNode,
    UnfenceGpu,
    UnpersistLoan,
)
from gpupt.model.gpus import identity_of, is_another_card
from gpupt.model.host import Fence, FunctionOrigin, Host, Loan
from gpupt.model.pci import Identity, PciAddress

# Verbs that lead towards the host's own state: what they began is carried on, not undone.
FORWARD = frozenset({"attach", "down", "recover"})


def inverse(entry: JournalEntry) -> Action | None:
    """The action that restores what was before; None where there is nothing to take back.

    Actions of forward verbs are never asked for here: those are carried on.
    """
    match entry.action:
        case BindFunction(address=address, after=after):
            assert entry.prior is not None
            return BindFunction(
                address=address,
                before=after,
                after=entry.prior.driver,
                override=entry.prior.override,
                why=f"back to {entry.prior.driver or 'no driver'}, as it was",
            )
        case RecordLoan(gpu=gpu):
            return EraseLoan(gpu, why="the loan did not come about")
        case PersistLoan(gpu=gpu, before=None):
            return UnpersistLoan(gpu, why="the loan did not come about")
        case PersistLoan(gpu=gpu, rule=rule, before=str() as before):
            return PersistLoan(gpu, before, rule, why="back to the rule that was there")
        case SetAttribute(path=path, value=value, before=was):
            return SetAttribute(path, was, value, why=f"back to {was}, as it was")
        case FenceGpu(gpu=gpu, fence=fence, before=None):
            return UnfenceGpu(gpu, fence, why="the fence did not come about")
        case FenceGpu(gpu=gpu, fence=fence, before=Fence() as before):
            return FenceGpu(gpu, before, fence, why="back to the fence that was there")
        case UnfenceGpu(gpu=gpu, fence=fence):
            return FenceGpu(gpu, fence, None, why="fenced, as it was")
        case LendGpu(gpu=gpu, cluster=cluster):
            return ReturnGpu(gpu, why=f"{cluster} did not come about")
        case MakeCluster(allocation=allocation):
            return RemoveCluster(allocation.spec.name, why="it did not come about")
        case StartNetwork(allocation=allocation):
            return StopNetwork(allocation.spec.name, why="its cluster did not come about")
        case StartNode(cluster=cluster, placement=placement):
            return StopNode(cluster, placement.node.name, why="its cluster did not come about")
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Recovery:
    """How an unfinished run comes to its end, and whether that is by carrying it on.

    ``left_alone`` are functions it was to move that are gone, or not those on loan."""

    plan: Plan
    carries_on: bool
    left_alone: tuple[PciAddress, ...] = ()


def plan_recovery(run: Run, *, host: Host, loans: Mapping[PciAddress, Loan]) -> Recovery:
    """What brings an unfinished run to its end: carried on if it leads home, else undone.

    An address that holds another card now, or none, is left alone: renumbering means a boot,
    and a boot clears every override.
    """
    name = f"{run.plan.verb} {run.plan.subject}"
    known = identities(run, loans=loans)
    if run.plan.verb in FORWARD:
        done = {entry.step for entry in run.entries if entry.done}
        rest = [action for step, action in enumerate(run.plan.actions) if step not in done]
        ahead = tuple(action for action in rest if still_there(action, known, host=host))
        plan = Plan("recover", f"{name} (carried on)", ahead)
    else:
        rest = [entry.action for entry in run.entries]
        back = (inverse(entry) for entry in to_undo(run, host=host, loans=loans))
        plan = Plan("recover", f"{name} (undone)", tuple(action for action in back if action))
    left = tuple(
        action.address
        for action in rest
        if isinstance(action, BindFunction) and not still_there(action, known, host=host)
    )
    return Recovery(plan, carries_on=run.plan.verb in FORWARD, left_alone=left)


def to_undo(run: Run, *, host: Host, loans: Mapping[PciAddress, Loan]) -> tuple[JournalEntry, ...]:
    """The entries to undo, last first."""
    known = identities(run, loans=loans)
    return tuple(
        entry for entry in reversed(run.entries) if still_there(entry.action, known, host=host)
    )


def identities(run: Run, *, loans: Mapping[PciAddress, Loan]) -> dict[PciAddress, Identity]:
    """What each function was when the run began: attach and down move what was on loan then,
    detach and up also what they were to lend first."""
    recorded = (action for action in run.plan.actions if isinstance(action, RecordLoan))
    return identities_in([*loans.values(), *recorded])


def identities_in(records: Iterable[Loan | RecordLoan]) -> dict[PciAddress, Identity]:
    """What each function was when it was recorded."""
    origins: list[FunctionOrigin] = [each for record in records for each in record.origins]
    return {origin.address: origin.identity for origin in origins}


def still_there(action: Action, known: Mapping[PciAddress, Identity], *, host: Host) -> bool:
    """Whether the function that the action moves is on the bus, and the one that was meant.

    One that nothing on record knows is not touched: it may be a disk by now.
    """
    if not isinstance(action, BindFunction):
        return True
    device, identity = host.devices.get(action.address), known.get(action.address)
    if device is None or identity is None:
        return False
    return not is_another_card(identity_of(device), identity)
