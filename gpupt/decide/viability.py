"""Whether a GPU can be lent, and every reason why not; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from gpupt.decide.holding import holder_line, way_to_stop
from gpupt.model.gpus import VFIO, fence_of, identity_of
from gpupt.model.health import CheckResult, GpuHealth, Verdict
from gpupt.model.host import Display, Fence, Finding, Gpu, Holder, Host, Loan, Severity
from gpupt.model.pci import PciAddress, PciDevice

# Drivers under which a group member does not disturb passthrough (driver_managed_dma in the
# kernel's drivers/pci/pcie/portdrv.c and drivers/pci/pci-stub.c), beside vfio-pci itself.
HARMLESS = frozenset({"pcieport", "pci-stub", VFIO})

# Makers of the displays that servers' management controllers have: ASPEED, Matrox (G200),
# ServerEngines (Pilot).  No guest computes on one, and the remote console is on it.
MANAGEMENT = frozenset({0x1A03, 0x102B, 0x19A2})


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a plan needs to know beyond the host: is vfio-pci to be had, who holds which GPU,
    which GPUs are fenced, how well those are that are to leave their drivers, what draws on
    the boot display, and whether the person allows the boot GPU to be taken."""

    vfio: bool = True
    holders: Mapping[PciAddress, tuple[Holder, ...]] = field(default_factory=dict)
    boot_gpu: bool = False
    fences: Mapping[PciAddress, Fence] = field(default_factory=dict)
    display: Display = field(default_factory=Display)
    health: Mapping[PciAddress, GpuHealth] = field(default_factory=dict)


def closure(host: Host, gpu: Gpu) -> tuple[PciAddress, ...]:
    """Every endpoint that has to leave the host with a GPU, in the order of addresses.

    All functions of the slot, in whichever groups, and all endpoints of those groups; a
    second GPU in one of the groups brings its own slot along.  Bridges stay on pcieport.
    """
    by_main = {other.address: other for other in host.gpus}
    taken: set[PciAddress] = set()
    waiting = [gpu.address, *gpu.companions]
    while waiting:
        address = waiting.pop()
        if address in taken or address not in host.devices:
            continue
        taken.add(address)
        if address in by_main:
            waiting.extend(by_main[address].companions)
        group = host.devices[address].iommu_group
        if group is not None:
            members = (host.devices[member] for member in host.groups[group].members)
            waiting.extend(m.address for m in members if is_endpoint(m))
    return tuple(sorted(taken))


def is_endpoint(device: PciDevice) -> bool:
    """Whether vfio-pci can take it: no bridge of any kind (class 06)."""
    return not device.is_bridge and device.class_code >> 16 != 0x06


def assess_lending(
    host: Host, gpu: Gpu, *, loans: Mapping[PciAddress, Loan], preflight: Preflight
) -> tuple[Finding, ...]:
    """Every reason why the GPU cannot be taken from the host now; empty: it can."""
    functions = [host.devices[address] for address in closure(host, gpu)]
    fence = fence_of(gpu.device, preflight.fences)
    if fence is not None:
        standing = loans.get(gpu.address)
        before = () if standing is None else tuple(standing_loan(host, gpu, standing))
        return (*before, about_fence(gpu, fence))
    loan = loans.get(gpu.address)
    if loan is not None:
        lent = list(standing_loan(host, gpu, loan))
        if lent or all(device.binding.driver == VFIO for device in functions):
            return tuple(lent)
        recorded = {origin.address for each in loans.values() for origin in each.origins}
        unknown = [d for d in functions if d.address not in recorded and d.binding.driver != VFIO]
        if unknown:
            return (
                refusal(
                    "group-not-viable",
                    gpu,
                    "its group is not the one that was detached",
                    *(f"{d.address} ({d.binding.driver or 'no driver'}) is new" for d in unknown),
                    remedy=f"gpupt attach {gpu.address}, then detach it again",
                ),
            )
    return (
        *about_card(gpu, functions, boot_gpu=preflight.boot_gpu),
        *about_virtual(host, gpu),
        *about_group(host, gpu, functions, loans=loans),
        *about_vfio(gpu, functions, preflight=preflight),
        *about_health(gpu, preflight.health.get(gpu.address)),
    )


def standing_loan(host: Host, gpu: Gpu, loan: Loan) -> Iterator[Finding]:
    """What an earlier loan of the GPU has against a new one."""
    if loan.node is not None:
        yield refusal(
            "lent",
            gpu,
            f"it is lent to {loan.cluster}/{loan.node}",
            remedy=f"gpupt down {loan.cluster} gives it back",
        )
    moved = moved_functions(host, loan)
    if moved:
        yield refusal(
            "address-moved",
            gpu,
            "its address now holds another card",
            *moved,
            remedy="put the card back into its slot; or gpupt recover, which forgets its loan",
        )


def about_fence(gpu: Gpu, fence: Fence) -> Finding:
    """What a fence has against lending the GPU."""
    return refusal(
        "fenced",
        gpu,
        f"it is fenced: {fence.reason}",
        *fence.evidence,
        f"fenced since {fence.since}: {fence.reason}",
        remedy=f"mend or replace it; gpupt unfence {gpu.address} then lets it be lent again",
    )


def moved_functions(host: Host, loan: Loan) -> tuple[str, ...]:
    """The addresses of a loan that hold another card now, a line each."""
    said = []
    for origin in loan.origins:
        device = host.devices.get(origin.address)
        # A lost card answers ones for ids that are read anew: that is no other card.
        if device is None or device.lost:
            continue
        now = identity_of(device)
        if replace(now, serial=origin.identity.serial) != origin.identity:
            said.append(f"{origin.address} was {origin.identity.id}, is {now.id}")
    return tuple(said)


def about_card(gpu: Gpu, functions: list[PciDevice], *, boot_gpu: bool) -> Iterator[Finding]:
    """What the cards themselves have against it."""
    for device in functions:
        if device.lost:
            yield refusal(
                "lost-device",
                gpu,
                "it has fallen off the bus",
                f"config space of {device.address} reads all ones",
                remedy="power the machine off and on again",
            )
        if device.locked:
            yield refusal(
                "unbind-stuck",
                gpu,
                "the kernel keeps it locked",
                f"{device.address}: an unbind or a reset of it has not ended",
                remedy="stop what holds it (gpupt doctor names it); a reboot may be needed",
            )
        if device.boot_vga and not boot_gpu:
            yield refusal(
                "boot-framebuffer",
                gpu,
                "it is the boot display",
                f"boot_vga of {device.address} is 1: the host's console is on it",
                remedy="make another card primary in the firmware, or take it all the same: "
                f"gpupt detach {gpu.address} --boot-gpu",
            )
        elif device.id.vendor in MANAGEMENT and not boot_gpu:
            yield refusal(
                "management-display",
                gpu,
                "it is the display of the server's management controller",
                f"{device.address} ({device.id}) shows the remote console",
                remedy=f"leave it to the host; or gpupt detach {gpu.address} --boot-gpu",
            )
        if device.sriov_numvfs:
            yield refusal(
                "sriov-active",
                gpu,
                "it has virtual functions",
                f"sriov_numvfs of {device.address} is {device.sriov_numvfs}",
                remedy=f"echo 0 > /sys/bus/pci/devices/{device.address}/sriov_numvfs",
            )


def about_virtual(host: Host, gpu: Gpu) -> Iterator[Finding]:
    """What a virtual function has against it: it can be lent by vfio-pci while its card is
    with a driver of the host, unless that driver lends it itself.

    NVIDIA's does (the vendor VFIO framework: ``current_vgpu_type``), and vfio-pci's probe of
    such a function fails.
    """
    whole = gpu.device.physfn
    if whole is None:
        return
    card = host.devices.get(whole)
    if gpu.device.binding.driver == "nvidia":
        yield refusal(
            "sriov-active",
            gpu,
            "it is a virtual function that its own driver lends (vGPU)",
            f"{gpu.address} is a virtual function of {whole}, on nvidia",
            remedy=f"lend the whole card {whole}, with no virtual functions on it",
        )
    elif card is None or card.lost or card.binding.driver in {None, VFIO}:
        driver = "gone" if card is None or card.lost else card.binding.driver or "on no driver"
        yield refusal(
            "sriov-active",
            gpu,
            "it is a virtual function of a card that the host does not drive",
            f"{gpu.address} is a virtual function of {whole}, which is {driver}",
            remedy="bind the whole card to the driver that made its virtual functions",
        )


def about_group(
    host: Host, gpu: Gpu, functions: list[PciDevice], *, loans: Mapping[PciAddress, Loan]
) -> Iterator[Finding]:
    """What the IOMMU group and who else is in it have against it."""
    if gpu.device.iommu_group is None:
        yield refusal(
            "iommu-off",
            gpu,
            "it is in no IOMMU group",
            "no IOMMU group: the IOMMU is off, or does not cover this device",
            remedy="enable VT-d or AMD-Vi in the firmware; gpupt doctor says more",
        )
    critical = {entry.address: entry.why for entry in host.critical}
    for device in functions:
        if device.address in critical:
            yield refusal(
                "group-host-critical",
                gpu,
                "its IOMMU group holds a device that the host needs",
                f"{device.address} (group {device.iommu_group}): {critical[device.address]}",
                remedy="move the card to another slot; an ACS override would weaken isolation",
            )
    for group in sorted({d.iommu_group for d in functions if d.iommu_group is not None}):
        if host.groups[group].strangers:
            yield refusal(
                "group-not-viable",
                gpu,
                "its IOMMU group holds what could not be read",
                *(f"{name!r} (group {group})" for name in host.groups[group].strangers),
                remedy="run gpupt as root; if that does not help, it is the kernel's fault",
            )
        for member in (host.devices[address] for address in host.groups[group].members):
            driver = member.binding.driver
            if not is_endpoint(member) and driver is not None and driver not in HARMLESS:
                yield refusal(
                    "group-not-viable",
                    gpu,
                    "its IOMMU group holds a bridge on a host driver",
                    f"{member.address} (group {group}) is a bridge driven by {driver}",
                    remedy=f"unload {driver}, or move the card to another slot",
                )
    taken = {device.address for device in functions}
    for other in loans.values():
        if other.gpu != gpu.address and other.gpu in taken and other.node is not None:
            yield refusal(
                "lent",
                gpu,
                f"it shares a group with {other.gpu}, lent to {other.cluster}/{other.node}",
                remedy=f"gpupt down {other.cluster} gives it back",
            )


def about_vfio(gpu: Gpu, functions: list[PciDevice], *, preflight: Preflight) -> Iterator[Finding]:
    """What vfio-pci and the processes of the host have against it."""
    if not preflight.vfio:
        yield refusal(
            "vfio-missing",
            gpu,
            "the kernel has no vfio-pci",
            "vfio-pci is neither loaded nor among the kernel's modules",
            remedy="install the kernel's modules, then: modprobe vfio-pci",
        )
    for device in functions:
        for holder in preflight.holders.get(device.address, ()):
            # A driver that keeps its card in use lets go of it when it is unbound.
            if holder.pid:
                yield refusal(
                    "device-held",
                    gpu,
                    "a process holds it",
                    holder_line(holder),
                    remedy=way_to_stop(holder),
                )


def about_health(gpu: Gpu, health: GpuHealth | None) -> Iterator[Finding]:
    """The checks of its health that it fails, a finding for each cause."""
    if health is None or gpu.device.lost:
        return
    causes: dict[str, CheckResult] = {}
    for check in health.checks:
        if check.status is Verdict.FAIL:
            causes.setdefault(check.brief, check)
    for check in causes.values():
        yield refusal(
            "unhealthy",
            gpu,
            f"it is not well ({check.id})",
            f"{check.id}: {check.brief}",
            remedy=f"{check.remedy or 'gpupt health says more'}; --unhealthy lends it all the same",
        )


def refusal(id: str, gpu: Gpu, brief: str, *evidence: str, remedy: str) -> Finding:
    """A finding that keeps the GPU from being lent."""
    return Finding(id, Severity.FAIL, str(gpu.address), brief, evidence or (brief,), remedy)
