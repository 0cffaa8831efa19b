"""Plans of taking GPUs from the host and of giving them back; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpupt.actions import (
    Action,
    BindFunction,
    CheckGpu,
    EraseLoan,
    FenceGpu,
    Ledger,
    Plan,
    RecordLoan,
    ReleaseFramebuffer,
    ReleaseFunction,
    SetAttribute,
    UnfenceGpu,
    UnpersistLoan,
)
from gpupt.decide.holding import holder_line, way_to_stop
from gpupt.decide.persistence import persisting, unpersisting
from gpupt.decide.viability import Preflight, assess_lending, closure, moved_functions
from gpupt.errors import BadInput, Refused
from gpupt.model.gpus import VFIO, fence_of, identity_of
from gpupt.model.host import (
    Attribute,
    Display,
    Fence,
    FunctionOrigin,
    Gpu,
    Holder,
    Host,
    Loan,
)
from gpupt.model.pci import PciAddress, PciDevice
from gpupt.model.persistence import BootRules

Loans = Mapping[PciAddress, Loan]
Fences = Mapping[PciAddress, Fence]


def plan_detach(
    host: Host,
    *,
    gpus: Sequence[PciAddress],
    loans: Loans,
    preflight: Preflight,
    persist: BootRules | None = None,
) -> Plan:
    """Take GPUs from the host: each with its whole group and all functions of its slot; with
    ``persist`` for the boots to come too.

    Raises Refused with every reason when one of them cannot be lent; BadInput when it is
    no GPU of this host.
    """
    wanted = [gpu_at(host, address) for address in sorted(set(gpus))]
    reasons = [
        reason
        for gpu in wanted
        for reason in assess_lending(host, gpu, loans=loans, preflight=preflight)
    ]
    if reasons:
        names = " ".join(dict.fromkeys(reason.subject for reason in reasons))
        raise Refused(
            f"{names} cannot be detached: {reasons[0].brief}",
            details=tuple(
                f"{reason.subject}: {line}" for reason in reasons for line in reason.evidence
            ),
            remedy="; ".join(dict.fromkeys(reason.remedy for reason in reasons if reason.remedy)),
        )
    known = {o.address: o for loan in loans.values() for o in loan.origins}
    # Every loan is on record before the first card moves: then cards move at the same time.
    actions: list[Action] = []
    moves: list[BindFunction] = []
    lanes: dict[PciAddress, PciAddress] = {}
    moved: set[PciAddress] = set()
    lasting: dict[PciAddress, tuple[FunctionOrigin, ...]] = {}
    for gpu in wanted:
        functions = closure(host, gpu)
        for address in functions:
            lanes.setdefault(address, gpu.address)
        if gpu.address not in loans:
            for address in functions:
                known.setdefault(address, origin_of(host.devices[address], preflight.display))
            origins = tuple(known[address] for address in functions)
            why = "where each function came from, before the first write"
            actions.append(RecordLoan(gpu.address, origins, why=why))
            lasting[gpu.address] = origins
        else:
            lasting[gpu.address] = loans[gpu.address].origins
        # Companions first: the sound function leans on the GPU's power.
        for address in sorted(functions, key=lambda a: (a == gpu.address, a)):
            device = host.devices[address]
            if device.binding.driver != VFIO and address not in moved:
                moved.add(address)
                moves.append(
                    BindFunction(
                        address=address,
                        before=device.binding.driver,
                        after=VFIO,
                        override=VFIO,
                        why=f"{device.binding.driver or 'no driver'} → {VFIO}: "
                        + why_taken(gpu, address),
                        lane=lanes[address],
                    )
                )
    going = {action.address for action in moves}
    actions += quieting([o for o in known.values() if o.address in going], host=host)
    if any(host.devices[address].boot_vga for address in going):
        why = "the firmware draws into the boot GPU's memory"
        actions += [ReleaseFramebuffer(*each, why=why) for each in preflight.display.framebuffers]
    actions += moves
    if persist is not None:
        # Last, so that no boot takes a card that could not be taken now.
        actions += persisting(lasting, boot=persist)
    return Plan("detach", " ".join(str(gpu.address) for gpu in wanted), tuple(actions))


def origin_of(device: PciDevice, display: Display) -> FunctionOrigin:
    """What of a function, and of what leans on it, is to be restored one day."""
    attributes = []
    if device.d3cold_allowed:
        path = f"sys/bus/pci/devices/{device.address}/d3cold_allowed"
        attributes.append(Attribute(path, "1"))
    if device.boot_vga:
        attributes += [Attribute(path, "1") for path in display.consoles]
    return FunctionOrigin(device.address, identity_of(device), device.binding, tuple(attributes))


def quieting(origins: Sequence[FunctionOrigin], *, host: Host) -> list[Action]:
    """What is done to functions before they leave their drivers."""
    actions: list[Action] = []
    for origin in origins:
        for was in origin.attributes:
            cold = was.path.endswith("/d3cold_allowed")
            if cold and not host.devices[origin.address].d3cold_allowed:
                continue
            why = (
                "some cards do not come back when the kernel cuts their power"
                if cold
                else "the console draws on the boot GPU"
            )
            actions.append(SetAttribute(was.path, "0", was.value, why=why))
    return actions


def why_taken(gpu: Gpu, address: PciAddress) -> str:
    """Why this function is taken along with the GPU."""
    if address == gpu.address:
        return "the GPU itself"
    if address in gpu.companions:
        return "a function of the same card"
    return f"in one IOMMU group with {gpu.address}: only whole groups can be lent"


def plan_attach(
    host: Host,
    *,
    gpus: Sequence[PciAddress],
    loans: Loans,
    boot: BootRules | None = None,
    holders: Mapping[PciAddress, tuple[Holder, ...]] | None = None,
) -> Plan:
    """Give GPUs back to the host, each function to the driver recorded in its loan; those that
    ``boot`` takes at boot are not taken any more.

    A GPU without a loan is at home already.  Raises Refused for a GPU that is lent to a node,
    that a process of ``holders`` has open, or whose address now holds another card; BadInput
    when it is no GPU of this host.
    """
    returning = []
    for address in sorted(set(gpus)):
        if address not in loans:
            require_at_home(gpu_at(host, address))
        else:
            returning.append(require_returnable(host, loans[address]))
            require_unheld(loans[address], holders or {})
    staying = {
        origin.address
        for loan in loans.values()
        if loan not in returning
        for origin in loan.origins
    }
    # First, so that a boot from here on can only lead home.
    actions = unpersisting(set(gpus), boot=boot or BootRules())
    moved: set[PciAddress] = set()
    for loan in returning:
        for origin in sorted(loan.origins, key=lambda o: (o.address != loan.gpu, o.address)):
            device = host.devices.get(origin.address)
            if device is None or origin.address in staying or origin.address in moved:
                continue
            moved.add(origin.address)
            if device.binding != origin.binding:
                actions.append(return_home(origin, device, lane=loan.gpu))
    actions.extend(
        SetAttribute(was.path, was.value, "0", why="as it was")
        for loan in returning
        for origin in loan.origins
        if origin.address in moved
        for was in origin.attributes
    )
    actions.extend(
        CheckGpu(loan.gpu, why="is it well, now that it is back")
        for loan in returning
        if any(isinstance(each, BindFunction) and each.address == loan.gpu for each in actions)
    )
    actions.extend(
        EraseLoan(loan.gpu, why="once every function is verified to be back") for loan in returning
    )
    names = " ".join(str(address) for address in sorted(set(gpus)))
    return Plan("attach", names or "no GPU", tuple(actions))


def return_home(
    origin: FunctionOrigin, device: PciDevice, *, lane: PciAddress | None = None
) -> BindFunction:
    """The move of a function back to where its loan says it came from."""
    now, then = device.binding.driver or "no driver", origin.binding.driver or "no driver"
    return BindFunction(
        address=origin.address,
        before=device.binding.driver,
        after=origin.binding.driver,
        override=origin.binding.override,
        why=f"{now} → {then}: where it came from",
        lane=lane,
    )


def require_returnable(host: Host, loan: Loan) -> Loan:
    """The loan, when its GPU is free and still the card it was; raises Refused."""
    if loan.node is not None:
        raise Refused(
            f"{loan.gpu} is lent to {loan.cluster}/{loan.node}",
            remedy=f"gpupt down {loan.cluster} gives it back",
        )
    moved = moved_functions(host, loan)
    if moved:
        raise Refused(
            f"{loan.gpu} is not the card that was detached",
            details=moved,
            remedy="put the card back into its slot; or gpupt recover, which forgets its loan",
        )
    return loan


def require_at_home(gpu: Gpu) -> None:
    """Raise Refused for a GPU that is on vfio-pci and that no loan knows: where it came from is
    not on record."""
    if gpu.device.binding.driver != VFIO:
        return
    override = gpu.device.binding.override
    raise Refused(
        f"{gpu.address} is on {VFIO} by no loan of gpupt's",
        details=f"driver_override is {override or 'not set'}; no record says where it came from",
        remedy="gpupt recover clears an override that nothing explains"
        if override
        else "it was bound at boot (vfio-pci.ids=), or by hand: undo that",
    )


def require_unheld(loan: Loan, holders: Mapping[PciAddress, tuple[Holder, ...]]) -> None:
    """Raise Refused while a process has a function of the loan open: the kernel would take it
    from a running guest, which is not told."""
    held = [each for origin in loan.origins for each in holders.get(origin.address, ()) if each.pid]
    if held:
        raise Refused(
            f"{loan.gpu} is in use: a process has it open",
            details=tuple(dict.fromkeys(holder_line(each) for each in held)),
            remedy="; ".join(dict.fromkeys(way_to_stop(each) for each in held)),
        )


def choose_all(
    host: Host, *, loans: Loans, preflight: Preflight
) -> tuple[tuple[PciAddress, ...], tuple[tuple[PciAddress, str], ...]]:
    """The GPUs that ``--all`` takes, and those it leaves, each with the reason."""
    taken: list[PciAddress] = []
    left: list[tuple[PciAddress, str]] = []
    for gpu in host.gpus:
        reasons = assess_lending(host, gpu, loans=loans, preflight=preflight)
        if reasons:
            left.append((gpu.address, reasons[0].brief))
        else:
            taken.append(gpu.address)
    return tuple(taken), tuple(left)


def gpu_at(host: Host, address: PciAddress) -> Gpu:
    """The GPU at an address; raises BadInput that lists the known ones."""
    for gpu in host.gpus:
        if gpu.address == address:
            return gpu
    known = tuple(f"{gpu.address}  {gpu.device.id}" for gpu in host.gpus)
    main = [gpu.address for gpu in host.gpus if address in gpu.companions]
    raise BadInput(
        f"{address} is a companion of {main[0]}" if main else f"there is no GPU at {address}",
        details=("this host's GPUs:", *known) if known else "this host has no GPU",
        remedy=f"name {main[0]}: its companions come with it" if main else "",
    )


def plan_release(
    host: Host, *, ledger: Ledger, holders: Mapping[PciAddress, tuple[Holder, ...]]
) -> Plan:
    """Clear the overrides to vfio-pci that no loan knows and no process uses."""
    handled = {
        entry.action.address
        for run in ledger.unfinished
        for entry in run.entries
        if isinstance(entry.action, BindFunction)
    }
    return Plan(
        "recover",
        "orphan overrides",
        tuple(
            ReleaseFunction(address, why="driver_override left behind, and no loan knows of it")
            for address in orphans(host, loans=ledger.loans)
            if address not in handled and not holders.get(address)
        ),
    )


def plan_forget(host: Host, *, loans: Loans, boot: BootRules | None = None) -> Plan:
    """End the loans whose GPU is another card now: what is left of them returns home."""
    actions: list[Action] = []
    for loan in loans.values():
        moved = {line.split()[0] for line in moved_functions(host, loan)}
        if loan.node is not None or str(loan.gpu) not in moved:
            continue
        if boot is not None and loan.gpu in boot.rules:
            why = "the card that it is for is not there any more"
            actions.append(UnpersistLoan(loan.gpu, why=why))
        for origin in loan.origins:
            device = host.devices.get(origin.address)
            if device is None or str(origin.address) in moved or device.binding == origin.binding:
                continue
            actions.append(return_home(origin, device))
        actions.append(EraseLoan(loan.gpu, why="the card that was detached is not there any more"))
    return Plan("recover", "loans of cards that are gone", tuple(actions))


def plan_fence(
    host: Host, *, gpus: Sequence[PciAddress], fences: Fences, reason: str, since: str
) -> Plan:
    """Lend GPUs to nobody from now on; raises BadInput when one is no GPU of this host."""
    wanted = [gpu_at(host, address) for address in sorted(set(gpus))]
    actions = [
        FenceGpu(
            gpu.address,
            Fence(gpu.address, identity_of(gpu.device), reason, since, earlier(fences, gpu)),
            fences.get(gpu.address),
            why=reason if gpu.address not in fences else f"{reason} (adds to the fence there is)",
        )
        for gpu in wanted
        if gpu.address not in fences or fences[gpu.address].reason != reason
    ]
    return Plan("fence", " ".join(str(gpu.address) for gpu in wanted), tuple(actions))


def earlier(fences: Fences, gpu: Gpu) -> tuple[str, ...]:
    """What an earlier fence of the card says, for the one that takes its place."""
    fence = fence_of(gpu.device, fences)
    if fence is None:
        return ()
    return tuple(dict.fromkeys((*fence.evidence, f"since {fence.since}: {fence.reason}")))


def plan_unfence(host: Host, *, gpus: Sequence[PciAddress], fences: Fences) -> Plan:
    """Let GPUs be lent again; raises BadInput when one is neither fenced nor a GPU here."""
    named = sorted(set(gpus))
    for address in named:
        if address not in fences:
            gpu_at(host, address)
    actions = [
        UnfenceGpu(address, fences[address], why=f"it was fenced: {fences[address].reason}")
        for address in named
        if address in fences
    ]
    return Plan("unfence", " ".join(map(str, named)) or "no GPU", tuple(actions))


def orphans(host: Host, *, loans: Loans) -> tuple[PciAddress, ...]:
    """Functions whose driver_override names vfio-pci though no loan holds them."""
    on_loan = {origin.address for loan in loans.values() for origin in loan.origins}
    return tuple(
        device.address
        for device in host.devices.values()
        if device.binding.override == VFIO and device.address not in on_loan
    )
