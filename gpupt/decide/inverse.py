"""The action that takes another one back: what undo performs, and what recover shows."""

from __future__ import annotations

from dataclasses import dataclass

from gpupt.actions import (
    Action,
    BindFunction,
    EraseLoan,
    JournalEntry,
    LendGpu,
    MakeCluster,
    Plan,
    RecordLoan,
    RemoveCluster,
    ReturnGpu,
    Run,
    StartNetwork,
    StartNode,
    StopNetwork,
    StopNode,
)
from gpupt.model.gpus import identity_of
from gpupt.model.host import Host
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
    """How an unfinished run comes to its end, and whether that is by carrying it on."""

    plan: Plan
    carries_on: bool


def plan_recovery(run: Run, *, host: Host) -> Recovery:
    """What brings an unfinished run to its end: carried on if it leads home, else undone.

    An address that holds another card now is left alone: renumbering means a boot, and a
    boot clears every override.
    """
    name = f"{run.plan.verb} {run.plan.subject}"
    if run.plan.verb in FORWARD:
        done = {entry.step for entry in run.entries if entry.done}
        rest = (action for step, action in enumerate(run.plan.actions) if step not in done)
        known = identities(run)
        kept = tuple(action for action in rest if same_card(action, known, host=host))
        return Recovery(Plan("recover", f"{name} (carried on)", kept), carries_on=True)
    backward = (inverse(entry) for entry in to_undo(run, host=host))
    kept = tuple(action for action in backward if action is not None)
    return Recovery(Plan("recover", f"{name} (undone)", kept), carries_on=False)


def to_undo(run: Run, *, host: Host) -> tuple[JournalEntry, ...]:
    """The entries to undo, last first."""
    known = identities(run)
    return tuple(
        entry for entry in reversed(run.entries) if same_card(entry.action, known, host=host)
    )


def identities(run: Run) -> dict[PciAddress, Identity]:
    """What each function was when the run began, as far as its loans say."""
    return {
        origin.address: origin.identity
        for action in run.plan.actions
        if isinstance(action, RecordLoan)
        for origin in action.origins
    }


def same_card(action: Action, known: dict[PciAddress, Identity], *, host: Host) -> bool:
    """Whether the action's function is still the one that was meant, as far as is known."""
    if not isinstance(action, BindFunction):
        return True
    device, identity = host.devices.get(action.address), known.get(action.address)
    if device is None or identity is None or device.lost:
        return True
    now = identity_of(device)
    return (now.id, now.class_code) == (identity.id, identity.class_code)
