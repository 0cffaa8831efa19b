"""Performs what concerns the host: moving functions between drivers, and keeping loans.

Every action here says what shall be, not what to do: performed twice, the second writes
nothing.  So a recovery may be cut short and started again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeAlias

from gpupt.actions import (
    Action,
    BindFunction,
    CheckGpu,
    EraseLoan,
    FenceGpu,
    JournalEntry,
    LendGpu,
    PersistLoan,
    RecordLoan,
    ReleaseFramebuffer,
    ReleaseFunction,
    ResetGpu,
    ReturnGpu,
    SetAttribute,
    UnfenceGpu,
    UnpersistLoan,
)
from gpupt.apply.world import World
from gpupt.decide.holding import holder_line, way_to_stop
from gpupt.decide.inverse import identities_in, inverse
from gpupt.decide.nodehealth import accusing
from gpupt.edges.bootrules import remove_rule, write_rule
from gpupt.edges.kernel import Kernel, Unsupported
from gpupt.errors import DeadlineExceeded, Failed, GpuptError
from gpupt.model.gpus import VFIO, is_another_card
from gpupt.model.health import CheckResult, Verdict
from gpupt.model.host import Attribute, Fence, Loan
from gpupt.model.pci import DriverBinding, PciAddress

HostAction: TypeAlias = (
    BindFunction
    | ReleaseFunction
    | RecordLoan
    | LendGpu
    | ReturnGpu
    | EraseLoan
    | PersistLoan
    | UnpersistLoan
    | ResetGpu
    | CheckGpu
    | FenceGpu
    | UnfenceGpu
    | SetAttribute
    | ReleaseFramebuffer
)


def is_host_action(action: Action) -> bool:
    """Whether this module performs it."""
    return isinstance(action, HostAction)


def perform(action: Action, world: World) -> None:
    """Bring about what the action says, and verify it; raises Failed, DeadlineExceeded."""
    match action:
        case BindFunction(address=address):
            require_recorded_card(address, world)
            require_answering(address, world.kernel)
            require_released(address, world.kernel)
            bind_function(action, world.kernel)
        case ReleaseFunction():
            release_function(action, world.kernel)
        case RecordLoan(gpu=gpu, origins=origins):
            known = world.journal.ledger.loans.get(gpu)
            if known is None or known.origins != origins:
                world.journal.record(Loan(gpu, origins))
        case LendGpu(gpu=gpu, cluster=cluster, node=node):
            world.journal.record(replace(loan_of(gpu, world), cluster=cluster, node=node))
        case ReturnGpu(gpu=gpu, cluster=cluster):
            # A loan that is gone is returned already: the step before a crash did it.
            known = world.journal.ledger.loans.get(gpu)
            if known is not None and (known.cluster, known.node) != (cluster, None):
                world.journal.record(replace(known, cluster=cluster, node=None))
        case EraseLoan(gpu=gpu):
            erase_loan(gpu, world)
        case PersistLoan(gpu=gpu, rule=rule):
            write_rule(world.kernel.root, gpu, rule)
        case UnpersistLoan(gpu=gpu):
            remove_rule(world.kernel.root, gpu)
        case SetAttribute(path=path, value=value):
            set_attribute(Attribute(path, value), world)
        case ReleaseFramebuffer(driver=driver, device=framebuffer):
            world.kernel.release_framebuffer(driver, framebuffer)
        case ResetGpu(gpu=gpu):
            reset_gpu(gpu, world)
        case CheckGpu(gpu=gpu):
            check_gpu(gpu, world)
        case FenceGpu(fence=fence):
            world.journal.fence(fence)
        case UnfenceGpu(gpu=gpu):
            world.journal.unfence(gpu)
        case _:
            raise TypeError(f"{type(action).__name__} is not the host's")


def undo(action: Action, prior: DriverBinding | None, world: World) -> None:
    """Take back an action that was begun, wherever it was cut short."""
    back = inverse(JournalEntry(0, action, prior, False))
    if isinstance(back, BindFunction) and not world.kernel.present(back.address):
        # A card that is gone took its override with it.
        world.narrate(f"{back.address} is not on the bus any more: nothing to put back")
    elif isinstance(back, BindFunction) and holds_another_card(back.address, world):
        world.narrate(f"{back.address} holds another card by now: left alone")
    elif isinstance(back, BindFunction) and world.kernel.lost(back.address):
        world.narrate(f"{back.address} has fallen off the bus: left alone, and kept on loan")
    elif isinstance(back, EraseLoan) and lost_functions(back.gpu, world):
        world.narrate(f"{back.gpu} stays on loan until it answers again; then gpupt attach")
    elif isinstance(back, SetAttribute):
        # A console that does not come back keeps no run unfinished.
        try:
            perform(back, world)
        except Failed as error:
            world.narrate(f"not as it was: {error.brief}")
    elif back is not None:
        perform(back, world)


def prior_of(action: Action, world: World) -> DriverBinding | None:
    """What the action is going to change, for the journal."""
    return world.kernel.binding(action.address) if isinstance(action, BindFunction) else None


def loan_of(gpu: PciAddress, world: World) -> Loan:
    """The GPU's loan; raises Failed."""
    try:
        return world.journal.ledger.loans[gpu]
    except KeyError:
        raise Failed(f"{gpu} was not detached by gpupt", remedy=f"gpupt detach {gpu}") from None


def holds_another_card(address: PciAddress, world: World) -> bool:
    """Whether a function on loan is another card now than the one that was recorded."""
    was = identities_in(world.journal.ledger.loans.values()).get(address)
    now = world.kernel.identity(address)
    return was is not None and now is not None and is_another_card(now, was)


def require_recorded_card(address: PciAddress, world: World) -> None:
    """Raises Failed when a loan says that another card was at this address."""
    if holds_another_card(address, world):
        raise Failed(
            f"{address} is not the card that was detached",
            details="its address holds another card now, and that one is not touched",
            remedy="gpupt recover forgets the loan of a card that is not there any more",
        )


def require_answering(address: PciAddress, kernel: Kernel) -> None:
    """Raises Failed when the function has fallen off the bus: a driver that is to take it
    would fail, and may hang."""
    if kernel.lost(address):
        raise Failed(
            f"{address} has fallen off the bus",
            details="its config space reads all ones",
            remedy="power the machine off and on again; the loan is kept until then",
        )


def require_released(address: PciAddress, kernel: Kernel) -> None:
    """Raises Failed while a process has a function open that is with vfio-pci: unbound, it
    would be taken from a guest that runs on and is not told."""
    held = [each for each in kernel.holders(address) if "/vfio/" in each.node]
    if held:
        raise Failed(
            f"{address} is in use by a guest",
            details=tuple(holder_line(each) for each in held),
            remedy="; ".join(dict.fromkeys(way_to_stop(each) for each in held)),
        )


def lost_functions(gpu: PciAddress, world: World) -> list[PciAddress]:
    """The functions of a GPU's loan that are on the bus and do not answer."""
    loan = world.journal.ledger.loans.get(gpu)
    return [o.address for o in loan.origins if world.kernel.lost(o.address)] if loan else []


def reset_gpu(gpu: PciAddress, world: World) -> None:
    """Reset a GPU that a guest had, and fence it when that fails or it does not answer."""
    kernel = world.kernel
    if not kernel.present(gpu) or holds_another_card(gpu, world):
        world.narrate(f"{gpu} is gone, or another card by now: not reset")
        return
    if kernel.binding(gpu).driver != VFIO or kernel.holders(gpu):
        # After a reboot the host's driver has it, and may be at work; or another guest has.
        world.narrate(f"{gpu} is in other hands by now: not reset")
        return
    try:
        require_answering(gpu, kernel)
        if not kernel.resettable(gpu):
            raise Unsupported(f"{gpu} has no reset")
        kernel.reset(gpu)
        require_answering(gpu, kernel)
    except Unsupported:
        # vfio-pci itself resets what a guest had as it closes it, in any way that it knows.
        world.narrate(f"{gpu}: the kernel knows no way to reset it alone")
    except (Failed, DeadlineExceeded) as error:
        reason = f"after its guest: {error.brief}"
        world.journal.fence(
            Fence(gpu, loan_of(gpu, world).origin_of(gpu).identity, reason, utc(), error.details)
        )
        raise Failed(
            f"{gpu} is fenced: {error.brief}",
            details=error.details,
            remedy=f"{error.remedy}; then gpupt unfence {gpu}" if error.remedy else "",
        ) from error


def check_gpu(gpu: PciAddress, world: World) -> None:
    """Fence a GPU that came back and fails a check of its health; raises Failed when it could
    not be checked."""
    try:
        found = None if world.health is None else world.health(gpu)
    except GpuptError as error:
        raise Failed(
            f"{gpu} is back, and its health could not be checked: {error.brief}",
            details=error.details,
            remedy=error.remedy,
        ) from error
    if found is None:
        world.narrate(f"{gpu}: its health is not checked")
        return
    accused = accusing(found.checks)
    for check in found.checks:
        if check in accused:
            fence_for(gpu, check, world=world)
        elif check.status is Verdict.FAIL:
            world.narrate(f"{gpu} is not to be lent now: {check.id}: {check.brief}")


def fence_for(gpu: PciAddress, check: CheckResult, *, world: World) -> None:
    """Fence a GPU that fails a check of its health; one that is fenced gets more evidence."""
    card = world.kernel.identity(gpu)
    if card is None:
        return
    line = f"{check.id}: {check.brief}"
    known = world.journal.ledger.fences.get(gpu)
    if known is None or is_another_card(card, known.identity):
        world.journal.fence(Fence(gpu, card, f"its health: {line}", utc(), (line,)))
        world.narrate(f"{gpu} is fenced: {line}")
    elif line not in known.evidence:
        # What kept it from coming back whole says more than what is seen of it now.
        world.journal.fence(replace(known, evidence=(*known.evidence, line)))


def utc() -> str:
    """The time, as a fence keeps it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def erase_loan(gpu: PciAddress, world: World) -> None:
    """Forget a loan once every function that no other loan holds is where it came from."""
    loans = dict(world.journal.ledger.loans)
    loan = loans.pop(gpu, None)
    if loan is None:
        return
    elsewhere = {origin.address for other in loans.values() for origin in other.origins}
    astray = []
    for origin in loan.origins:
        # A card that is gone, or another one by now, has nothing to be put back.  One that is
        # lost is neither: it is still bound.
        if origin.address in elsewhere or not world.kernel.present(origin.address):
            continue
        card = world.kernel.identity(origin.address)
        if card is not None and is_another_card(card, origin.identity):
            continue
        now = world.kernel.binding(origin.address)
        if now != origin.binding:
            astray.append(
                f"{origin.address}: {in_words(now)}, came from {in_words(origin.binding)}"
            )
        astray += [
            f"/{was.path} is {held}, was {was.value}"
            for was in origin.attributes
            if not was.path.startswith("sys/class/vtconsole/")
            and (held := world.kernel.attribute(was.path)) not in {None, was.value}
        ]
    if astray:
        raise Failed(
            f"{gpu} is not back where it came from",
            details=tuple(astray),
            remedy=f"gpupt attach {gpu}; its loan is kept until then",
        )
    world.journal.erase(gpu)


def bind_function(action: BindFunction, kernel: Kernel) -> None:
    """Move a function to ``action.after`` with ``action.override`` left on it.

    The order (override, unbind, probe) leaves no moment in which another driver takes it.
    """
    address, wanted = action.address, DriverBinding(action.after, action.override)
    now = kernel.binding(address)
    if now == wanted:
        return
    if action.after is not None and not kernel.has_driver(action.after):
        kernel.load_module(action.after)
    # An override that names another driver would keep the wanted one from taking the function.
    first = action.override if action.override in {None, action.after} else None
    if now.driver != wanted.driver:
        if now.override != first:
            kernel.set_override(address, first)
        if now.driver is not None:
            leave(address, now.driver, kernel=kernel)
        if action.after is not None:
            take(address, action.after, kernel=kernel)
    if kernel.binding(address).override != action.override:
        kernel.set_override(address, action.override)
    verify(address, wanted, kernel=kernel)


def release_function(action: ReleaseFunction, kernel: Kernel) -> None:
    """Clear a function's override; off vfio-pci, with the driver that the kernel chooses."""
    now = kernel.binding(action.address)
    if now.override is not None:
        kernel.set_override(action.address, None)
        if now.driver == now.override:
            kernel.unbind(action.address, now.driver)
    if now.driver in {None, now.override}:
        kernel.probe(action.address)
    if kernel.binding(action.address).override is not None:
        verify(action.address, DriverBinding(now.driver, None), kernel=kernel)


def set_attribute(wanted: Attribute, world: World) -> None:
    """Make a file of sysfs hold a value; one that is gone went with its device."""
    now = world.kernel.attribute(wanted.path)
    if now is None:
        world.narrate(f"/{wanted.path} is not there any more: left alone")
        return
    if now == wanted.value:
        return
    world.kernel.set_attribute(wanted.path, wanted.value)
    now = world.kernel.attribute(wanted.path)
    if now != wanted.value:
        raise Failed(
            f"/{wanted.path} does not become {wanted.value}",
            details=f"the kernel reported success, and it is {now or 'gone'}",
            remedy="dmesg holds the kernel's reason, if it gives one",
        )


def take(address: PciAddress, driver: str, *, kernel: Kernel) -> None:
    """Let the bus probe the function, and bind by name if another driver, or none, took it."""
    # A probe that the kernel refuses is no more final than one that found another driver.
    with suppress(Failed):
        kernel.probe(address)
    now = kernel.binding(address).driver
    if now == driver:
        return
    if now is not None:
        leave(address, now, kernel=kernel)
    kernel.bind(address, driver)


def leave(address: PciAddress, driver: str, *, kernel: Kernel) -> None:
    """Take the function from its driver; raises Failed when it stays there all the same."""
    kernel.unbind(address, driver)
    if kernel.binding(address).driver is not None:
        raise Failed(
            f"{address} did not leave {driver}",
            details="the kernel reported success, and the driver still has it",
            remedy=f"dmesg | grep {address} shows what the driver said",
        )


def verify(address: PciAddress, wanted: DriverBinding, *, kernel: Kernel) -> None:
    """Raises Failed unless the function is as wanted: the kernel's success is not proof."""
    now = kernel.binding(address)
    if now == wanted:
        return
    raise Failed(
        f"{address} did not move to {wanted.driver or 'no driver'}",
        details=(f"wanted {in_words(wanted)}", f"found {in_words(now)}, though no write failed"),
        remedy=f"dmesg | grep {address} shows what the driver said",
    )


def in_words(binding: DriverBinding) -> str:
    """``nvidia``, ``no driver``, ``vfio-pci (override vfio-pci)``."""
    name = binding.driver or "no driver"
    return f"{name} (override {binding.override})" if binding.override else name
