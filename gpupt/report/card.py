"""One GPU explained to a person: ``gpupt info``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpupt.model.gpus import fence_of, state_of
from gpupt.model.host import Finding, Gpu, GpuState, Host, Records
from gpupt.model.pci import PciAddress, PciId
from gpupt.report.tables import Cell, GpuName, driver_of, link_of, paint, size_of, table

CLASSES = {
    0x0100: "SCSI",
    0x0104: "RAID",
    0x0106: "SATA",
    0x0107: "SAS",
    0x0108: "NVMe",
    0x0180: "storage",
    0x0200: "Ethernet",
    0x0207: "InfiniBand",
    0x0280: "network",
    0x0300: "VGA",
    0x0302: "3D",
    0x0380: "display",
    0x0403: "sound",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0680: "bridge",
    0x0C03: "USB",
    0x0C05: "SMBus",
    0x0C80: "serial bus",
    0x1080: "encryption",
    0x1200: "accelerator",
}


def info_lines(
    gpu: Gpu,
    *,
    host: Host,
    records: Records,
    leaving: Sequence[PciAddress],
    reasons: Sequence[Finding],
    names: Mapping[PciId, str],
    colour: bool,
    width: int | None = None,
) -> list[str]:
    """What it is, what leaves the host with it, and whether it can be detached now."""
    device = gpu.device
    loan = records.loans.get(gpu.address)
    persistent = gpu.address in records.persistent
    fence = fence_of(device, records.fences)
    state = state_of(gpu, loan)
    title = device.name or f"{class_name(device.class_code)} of {device.id}"
    said = state.value
    if loan is not None and loan.node is not None:
        said = f"lent to {loan.cluster}/{loan.node}"
    facts = [
        ("state", paint(said, state.value, colour=colour)),
        ("fenced", f"since {fence.since}: {fence.reason}" if fence else ""),
        ("at boot", "taken again by a udev rule of gpupt's" if persistent else ""),
        ("driver", driver_of(device)),
        ("id", f"{device.id}" + (f"  subsystem {device.subsystem}" if device.subsystem else "")),
        ("class", f"{device.class_code:06x} {class_name(device.class_code)}"),
        ("NUMA node", "–" if device.numa_node is None else str(device.numa_node)),
        ("link", link_of(device.link)),
        ("BARs", "  ".join(f"{bar.index}: {size_of(bar.size)}" for bar in device.bars) or "–"),
        ("resets", "not told" if device.reset_methods is None else " ".join(device.reset_methods)),
        ("boot display", {None: "not told", True: "yes", False: "no"}[device.boot_vga]),
    ]
    lines = [f"{paint(str(gpu.address), 'head', colour=colour)}  {title}"]
    lines += [f"  {name:<13} {value}".rstrip() for name, value in facts if value not in {"–", ""}]
    lines += ["", "leave the host together:" if len(leaving) > 1 else "leaves the host by itself:"]
    lines += [
        f"  {line}"
        for line in leaving_table(
            host=host,
            leaving=leaving,
            names=names,
            colour=colour,
            width=None if width is None else width - 2,
        )
    ]
    staying = [
        member
        for number in sorted({host.devices[a].iommu_group for a in leaving} - {None}, key=str)
        for member in host.groups[int(str(number))].members
        if member not in leaving
    ]
    if staying:
        lines.append(f"  stays: {', '.join(str(address) for address in staying)} (bridges)")
    lines.append("")
    if reasons:
        lines.append(paint("cannot be detached:", "fail", colour=colour))
        for reason in reasons:
            lines += [f"  {reason.id}: {line}" for line in reason.evidence]
            if reason.remedy:
                lines.append(f"    → {reason.remedy}")
    elif state is GpuState.DETACHED and loan is not None:
        lines.append(f"detached; gpupt attach {gpu.address} gives it back")
    elif state is not GpuState.LENT:
        lines.append(f"can be detached, if it is well by then: gpupt detach {gpu.address}")
    return lines


def leaving_table(
    *,
    host: Host,
    leaving: Sequence[PciAddress],
    names: Mapping[PciId, str],
    colour: bool,
    width: int | None,
) -> list[str]:
    """A line for each function that goes along."""
    titles = {address: names.get(host.devices[address].id, "") for address in leaving}
    makers = {title.partition(" ")[0] for title in titles.values()}
    if width is not None and len(makers) == 1:
        # The first line of all says whose card it is: there is room for what each is.
        shorter = GpuName.without_suffixes
        titles = {a: shorter(title).partition(" ")[2] for a, title in titles.items()}
    rows = []
    for address in leaving:
        device = host.devices[address]
        group = "–" if device.iommu_group is None else str(device.iommu_group)
        rows.append(
            [
                Cell(str(address)),
                Cell(group),
                Cell(driver_of(device)),
                Cell(class_name(device.class_code)),
                Cell(str(device.id), "dim"),
                Cell(titles[address]),
            ]
        )
    return table(
        ["FUNCTION", "GROUP", "DRIVER", "CLASS", "ID", "NAME"], rows, colour=colour, width=width
    )


def class_name(class_code: int) -> str:
    """A short word for a class code."""
    return CLASSES.get(class_code >> 8, f"class {class_code >> 8:04x}")
