"""Checks of each GPU: its group, companions, holders, memory windows, resets and power."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpupt.actions import Ledger
from gpupt.decide.holding import holder_line, way_to_stop
from gpupt.decide.viability import HARMLESS, about_fence, about_virtual, closure, is_endpoint
from gpupt.model.facts import HostFacts
from gpupt.model.gpus import NVIDIA, fence_of, state_of
from gpupt.model.host import Critical, Finding, Gpu, GpuState, Host, Severity

AMD = 0x1002
# Families whose bus reset leaves the card dead until power is cut: Polaris, Vega, Navi 1x
# (what the vendor-reset module treats).
AMD_RESET_BUG = (
    range(0x67C0, 0x6800),
    range(0x6860, 0x6880),
    range(0x66A0, 0x66B0),
    range(0x7310, 0x7370),
)


def for_guests(gpu: Gpu, ledger: Ledger) -> bool:
    """Whether the GPU is away from the host's drivers, detached or lent."""
    return state_of(gpu, ledger.loans.get(gpu.address)) in {GpuState.DETACHED, GpuState.LENT}


def group_not_viable(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """Members of a GPU's group are on host drivers: as it stands vfio refuses the group."""
    for gpu in host.gpus:
        number = gpu.device.iommu_group
        if number is None:
            continue
        members = [host.devices[address] for address in host.groups[number].members]
        blocking = [
            member
            for member in members
            if member.address != gpu.address
            and member.address not in gpu.companions
            and member.binding.driver is not None
            and member.binding.driver not in HARMLESS
        ]
        if not blocking:
            continue
        bridges = [member for member in blocking if not is_endpoint(member)]
        named = tuple(f"{member.address}  {member.binding.driver}" for member in blocking)
        if bridges or for_guests(gpu, ledger):
            remedy = (
                f"unload {bridges[0].binding.driver}, or move the card to another slot"
                if bridges
                else f"gpupt detach {gpu.address} takes the rest of the group too"
            )
            yield Finding(
                "group-not-viable",
                Severity.FAIL,
                str(gpu.address),
                f"IOMMU group {number} is not viable: members are on host drivers",
                named,
                remedy,
            )
        elif not critical_with(host, gpu):
            # Else they cannot go along, and group-host-critical says so.
            yield Finding(
                "group-not-viable",
                Severity.WARN,
                str(gpu.address),
                f"other devices share IOMMU group {number}, and leave the host with the GPU",
                named,
                "move the card to a slot with a group of its own, or let them go along",
            )


def group_host_critical(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """What would leave with the GPU holds the host's disk or its way out."""
    for gpu in host.gpus:
        needed = critical_with(host, gpu)
        if needed:
            yield Finding(
                "group-host-critical",
                Severity.FAIL,
                str(gpu.address),
                "its IOMMU group holds a device that the host needs",
                tuple(f"{entry.address}: {entry.why}" for entry in needed),
                "move the card to another slot; an ACS override would weaken isolation",
            )


def critical_with(host: Host, gpu: Gpu) -> tuple[Critical, ...]:
    """What the host cannot do without, of all that would leave with the GPU."""
    functions = closure(host, gpu)
    return tuple(entry for entry in host.critical if entry.address in functions)


def companion_missed(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A GPU is away and functions of its card are still on host drivers."""
    for gpu in host.gpus:
        if not for_guests(gpu, ledger):
            continue
        for address in gpu.companions:
            device = host.devices[address]
            driver = device.binding.driver
            if driver is not None and driver not in HARMLESS:
                together = device.iommu_group == gpu.device.iommu_group
                yield Finding(
                    "companion-missed",
                    Severity.FAIL if together else Severity.WARN,
                    str(gpu.address),
                    f"its companion {address} is still on {driver}",
                    ("vfio refuses the group as it is",) if together else (),
                    f"gpupt detach {gpu.address} takes all functions of the card",
                )


def boot_framebuffer(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The firmware's framebuffer or the boot display is on the GPU."""
    for gpu in host.gpus:
        held = facts.boot_framebuffers.get(gpu.address)
        if held is None and not gpu.device.boot_vga:
            continue
        firmware = held or next((name for name in facts.framebuffers if is_firmware(name)), None)
        evidence = [f"boot_vga is {int(bool(gpu.device.boot_vga))}"]
        if firmware is not None:
            evidence.append(f"framebuffer: {firmware}")
        yield Finding(
            "boot-framebuffer",
            Severity.WARN if firmware is not None else Severity.INFO,
            str(gpu.address),
            "the firmware's framebuffer holds its memory"
            if firmware is not None
            else "it is the boot display: detach takes it with --boot-gpu only",
            tuple(evidence),
            "echo 0 > /sys/class/vtconsole/vtcon1/bind and unbind the framebuffer, or make "
            "another card primary in the firmware"
            if firmware is not None
            else "",
        )


def is_firmware(name: str) -> bool:
    """Whether a framebuffer is one that the firmware set up."""
    return any(word in name.lower() for word in ("efi", "simple", "vesa", "bootfb"))


def device_held(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """Processes have a GPU of the host open, or its driver keeps it in use for none."""
    for gpu in host.gpus:
        if for_guests(gpu, ledger):
            continue
        held = [
            holder
            for address in (gpu.address, *gpu.companions)
            for holder in facts.holders.get(address, ())
        ]
        if not held:
            continue
        ways = dict.fromkeys(way_to_stop(holder) for holder in held if holder.pid)
        persistence = (
            (f"nvidia-smi -i {gpu.address} -pm 0 (persistence has no fd)",)
            if gpu.device.binding.driver == "nvidia"
            else ()
        )
        yield Finding(
            "device-held",
            Severity.WARN if ways else Severity.INFO,
            str(gpu.address),
            "processes hold it: detach is refused until they end"
            if ways
            else "its driver keeps it in use: persistence mode, or nvidia-drm's modeset",
            tuple(holder_line(holder) for holder in held),
            "; then ".join(("; ".join(ways), *persistence) if ways else persistence),
        )


def iommufd_busy(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A process holds the VFIO node of a GPU that is lent to nobody."""
    for gpu in host.gpus:
        loan = ledger.loans.get(gpu.address)
        if state_of(gpu, loan) is not GpuState.DETACHED:
            continue
        held = [each for each in facts.holders.get(gpu.address, ()) if each.pid]
        if held:
            yield Finding(
                "iommufd-busy",
                Severity.WARN,
                str(gpu.address),
                "a process has it, and no node of gpupt's does",
                tuple(holder_line(each) for each in held),
                "another program's guest, or a QEMU that outlived its crash: "
                + "; ".join(dict.fromkeys(way_to_stop(each) for each in held)),
            )


def rmrr(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The platform keeps a memory region for a device of the group."""
    for gpu in host.gpus:
        for region in facts.reserved:
            if region.group == gpu.device.iommu_group and region.kind == "direct":
                yield Finding(
                    "rmrr",
                    Severity.FAIL,
                    str(gpu.address),
                    "the firmware ties its group to a reserved memory region (RMRR)",
                    (f"group {region.group}: {region.start:#x}-{region.end:#x} direct",),
                    "a firmware setting may free it; relaxing the kernel's check risks data",
                )


def host_bar_window(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A BAR found no room below the host bridge."""
    for gpu in host.gpus:
        for bar in gpu.device.bars:
            if not bar.assigned:
                yield Finding(
                    "host-bar-window",
                    Severity.FAIL,
                    str(gpu.address),
                    f"BAR {bar.index} ({bar.size / (1 << 20):g} MiB) has no address",
                    ("its line in the resource file starts at 0: the window above is too small",),
                    "enable Above-4G decoding in the firmware; pci=realloc; a smaller "
                    "resizable BAR",
                )


def no_reset(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The card cannot be reset between guests, or not well."""
    # From 5.15 on, the kernel makes a reset_method file for what it can reset, and no other.
    told = any(device.reset_methods is not None for device in host.devices.values())
    for gpu in host.gpus:
        methods, identifier = gpu.device.reset_methods, gpu.device.id
        if methods == () or (methods is None and told and not gpu.device.boot_vga):
            yield Finding(
                "no-reset",
                Severity.WARN,
                str(gpu.address),
                "it offers no way to be reset",
                (
                    "reset_method is empty"
                    if methods == ()
                    else "it has no reset_method file, and other functions have one",
                ),
                "a guest that reboots may find it unusable; power the host off between guests",
            )
        elif (
            methods is not None
            and identifier.vendor == AMD
            and "device_specific" not in methods
            and any(identifier.device in family for family in AMD_RESET_BUG)
        ):
            yield Finding(
                "no-reset",
                Severity.WARN,
                str(gpu.address),
                "cards of this family do not survive a bus reset (AMD reset bug)",
                (f"{identifier}, reset_method: {' '.join(methods)}",),
                "load vendor-reset before lending it; a guest's reboot is unsafe without",
            )


def d3cold(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A GPU away from its driver may be put to a sleep from which it does not wake."""
    for gpu in host.gpus:
        if gpu.device.d3cold_allowed and for_guests(gpu, ledger):
            folder = f"/sys/bus/pci/devices/{gpu.address}"
            yield Finding(
                "d3cold",
                Severity.INFO,
                str(gpu.address),
                "the kernel may cut its power while no guest uses it",
                ("d3cold_allowed is 1: some cards do not come back from D3cold",),
                f"echo 0 > {folder}/d3cold_allowed; echo on > {folder}/power/control",
            )


def wrong_vfio_flavour(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The kernel knows a better VFIO driver than vfio-pci for the card."""
    for gpu in host.gpus:
        flavour = facts.flavours.get(gpu.address)
        if flavour is not None:
            yield Finding(
                "wrong-vfio-flavour",
                Severity.WARN,
                str(gpu.address),
                f"it needs {flavour}, and gpupt binds vfio-pci",
                ("modules.alias has a more exact vfio_pci: alias for it",),
                f"modprobe {flavour}, and bind the card to it by hand for now",
            )


def nvswitch(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The GPUs hang on NVSwitches, and need a fabric partition to run CUDA in guests."""
    switches = [
        device
        for device in host.devices.values()
        if device.id.vendor == NVIDIA and device.class_code >> 8 == 0x0680
    ]
    if switches:
        yield Finding(
            "nvswitch",
            Severity.WARN,
            "host",
            f"{len(switches)} NVSwitches join the GPUs: CUDA in a guest needs a fabric partition",
            tuple(f"{device.address}  {device.id}" for device in switches),
            "run the fabric manager with FABRIC_MODE=1 and activate a partition for the set of "
            "GPUs; gpupt lends no switches, so this is so for a node with all of them too",
        )


def numa_hugepages(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """Hugepages are reserved, and none of them beside the GPU."""
    if sum(bool(size) for size in facts.hugepages.values()) == 0 or len(facts.hugepages) < 2:
        return
    for gpu in host.gpus:
        node = gpu.device.numa_node
        if node is not None and not facts.hugepages.get(node):
            yield Finding(
                "numa-hugepages",
                Severity.WARN,
                str(gpu.address),
                f"no hugepages are reserved on its NUMA node {node}",
                tuple(
                    f"node {number}: {size >> 20} MiB"
                    for number, size in sorted(facts.hugepages.items())
                ),
                f"reserve pages under /sys/devices/system/node/node{node}/hugepages",
            )


def lost_device(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A card has fallen off the bus."""
    for gpu in host.gpus:
        for address in (gpu.address, *gpu.companions):
            if host.devices[address].lost:
                yield Finding(
                    "lost-device",
                    Severity.FAIL,
                    str(address),
                    "it has fallen off the bus",
                    ("its config space reads all ones",),
                    "power the machine off and on again; a warm reboot is often not enough",
                )


def fenced(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A GPU is lent to nobody, for a reason that is on record."""
    for gpu in host.gpus:
        fence = fence_of(gpu.device, ledger.fences)
        if fence is not None:
            yield replace(about_fence(gpu, fence), severity=Severity.WARN)


def sriov_active(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The card has virtual functions, or is one."""
    for gpu in host.gpus:
        refused = next(about_virtual(host, gpu), None)
        if refused is not None:
            yield replace(refused, severity=Severity.WARN)
        elif gpu.device.sriov_numvfs:
            yield Finding(
                "sriov-active",
                Severity.WARN,
                str(gpu.address),
                f"{gpu.device.sriov_numvfs} virtual functions are enabled on it",
                (),
                f"echo 0 > /sys/bus/pci/devices/{gpu.address}/sriov_numvfs",
            )
