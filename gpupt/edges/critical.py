"""Finds the devices that the host cannot do without: its disks, and the way to it.

A GPU whose IOMMU group holds one of these is never lent: machines were left unbootable by
that, or cut off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from gpupt.edges.tree import Reader
from gpupt.errors import BadInput
from gpupt.model.host import Critical
from gpupt.model.pci import PciAddress, PciDevice

# Filesystems that no block device of this host holds.
DISKLESS = frozenset(
    {"overlay", "tmpfs", "ramfs", "rootfs", "9p", "virtiofs", "nfs", "nfs4", "squashfs"}
)


def find_critical(reader: Reader, devices: Mapping[PciAddress, PciDevice]) -> tuple[Critical, ...]:
    """Controllers of mounted disks and of swap, and cards that the default route leaves by."""
    found: dict[PciAddress, list[str]] = {}
    for address, why in [*disks(reader, devices), *uplinks(reader, devices)]:
        said = found.setdefault(address, [])
        if why not in said:
            said.append(why)
    return tuple(Critical(address, "; ".join(why)) for address, why in sorted(found.items()))


def disks(
    reader: Reader, devices: Mapping[PciAddress, PciDevice]
) -> Iterator[tuple[PciAddress, str]]:
    """Controllers of what is mounted or swapped to."""
    root_known = pool = False
    told: set[PciAddress] = set()
    for line in reader.whole("proc/self/mountinfo").splitlines():
        # proc_pid_mountinfo(5): ID parent major:minor root mount-point options … - type source
        before, _, after = line.partition(" - ")
        fields, kind_and_source = before.split(), after.split()
        if len(fields) < 5 or len(kind_and_source) < 2:
            continue
        kind, source = kind_and_source[:2]
        addresses = list(under_block(reader, f"sys/dev/block/{fields[2]}"))
        if not addresses and source.startswith("/dev/"):
            addresses = list(under_device(reader, source))
        if fields[4] == "/":
            root_known = root_known or bool(addresses) or kind in DISKLESS
        pool = pool or kind == "zfs"
        for address in addresses:
            told.add(address)
            yield address, f"{fields[4]} is on it"
    for address in sorted(set(under_btrfs(reader)) - told):
        yield address, "a mounted btrfs is on it"
    for line in reader.whole("proc/swaps").splitlines()[1:]:
        for address in under_device(reader, line.split()[0] if line.split() else ""):
            yield address, "swap is on it"
    # The mounts of ZFS name no device: then no storage controller is taken.
    if not root_known or pool:
        what = "a ZFS pool is mounted" if root_known else "the disk of / is not known"
        for address in of_class(devices, 0x01):
            yield address, f"{what}, and this may be {'part of ' if root_known else ''}it"


def under_btrfs(reader: Reader) -> Iterator[PciAddress]:
    """The functions under every disk of a mounted btrfs: a mount names one of them only."""
    for filesystem in reader.names("sys/fs/btrfs"):
        for disk in reader.names(f"sys/fs/btrfs/{filesystem}/devices"):
            yield from under_block(reader, f"sys/fs/btrfs/{filesystem}/devices/{disk}")


def uplinks(
    reader: Reader, devices: Mapping[PciAddress, PciDevice]
) -> Iterator[tuple[PciAddress, str]]:
    """Network cards that a default route leaves by, through bridges, bonds and VLANs."""
    interfaces = set()
    for line in reader.whole("proc/net/route").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000":
            interfaces.add(fields[0])
    for line in reader.whole("proc/net/ipv6_route").splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
            interfaces.add(fields[9])
    for interface in sorted(interfaces):
        folder = folder_of(reader, f"sys/class/net/{interface}")
        # Every interface is a link to its device, a virtual one too.
        if folder is None or folder.startswith("sys/class/"):
            for address in of_class(devices, 0x02):
                yield address, f"the default route leaves by {interface}, and this may be it"
            continue
        for address in under_interface(reader, interface):
            yield address, f"the default route leaves by it ({interface})"


def of_class(devices: Mapping[PciAddress, PciDevice], base: int) -> Iterator[PciAddress]:
    """Every function of a base class: 01 is storage, 02 network."""
    for address, device in devices.items():
        if device.class_code >> 16 == base:
            yield address


def under_interface(reader: Reader, interface: str) -> Iterator[PciAddress]:
    """The PCI functions under a network interface and under what it is made of."""
    seen: set[str] = set()
    waiting = [interface]
    while waiting:
        name = waiting.pop()
        folder = None if name in seen else folder_of(reader, f"sys/class/net/{name}")
        seen.add(name)
        if folder is None:
            continue
        yield from functions_above(folder)
        waiting += [below[6:] for below in reader.names(folder) if below.startswith("lower_")]
        waiting += reader.names(f"{folder}/brif")


def under_device(reader: Reader, device: str) -> Iterator[PciAddress]:
    """The PCI functions under a node such as /dev/sda2 or /dev/mapper/root."""
    if not device.startswith("/dev/"):
        return
    node = reader.real_path(device.lstrip("/")) or device
    for name in dict.fromkeys((os.path.basename(device), os.path.basename(node))):
        yield from under_block(reader, f"sys/class/block/{name}")


def under_block(reader: Reader, path: str) -> Iterator[PciAddress]:
    """The PCI functions under a block device, through partitions, LVM, LUKS and RAID."""
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        folder = folder_of(reader, waiting.pop())
        if folder is None or folder in seen:
            continue
        seen.add(folder)
        yield from functions_above(folder)
        yield from nvme_controllers(reader, folder)
        # A partition's slaves are its disk's: the disk is the folder above.
        for holder in (folder, os.path.dirname(folder)):
            waiting += [f"sys/class/block/{name}" for name in reader.names(f"{holder}/slaves")]


def nvme_controllers(reader: Reader, folder: str) -> Iterator[PciAddress]:
    """The functions of a disk of NVMe multipath, which is below no function itself: its
    subsystem has a link to each of its controllers."""
    parts = folder.split("/")
    if "nvme-subsystem" not in parts:
        return
    subsystem = "/".join(parts[: parts.index("nvme-subsystem") + 2])
    for name in reader.names(subsystem):
        controller = folder_of(reader, f"{subsystem}/{name}")
        if controller is not None and re.fullmatch(r"nvme\d+", name):
            yield from functions_above(controller)


def functions_above(folder: str) -> Iterator[PciAddress]:
    """The PCI function nearest to a device, from its path under sys/devices, and each one that
    the host bridge of a nearer one hangs on (Intel's VMD): its whole domain leaves with it."""
    parts = folder.split("/")
    nearest = True
    for number in range(len(parts) - 1, -1, -1):
        name = parts[number]
        below = parts[number + 1] if number + 1 < len(parts) else ""
        if not nearest and not re.fullmatch(r"pci[0-9a-f]+:[0-9a-f]{2}", below):
            continue
        if name.count(":") == 2 and name[-2:-1] == ".":
            try:
                yield PciAddress.parse(name)
            except BadInput:
                continue
            nearest = False


def folder_of(reader: Reader, path: str) -> str | None:
    """The folder of a device, links followed; None where there is none in the tree."""
    real = reader.real_path(path)
    return real if real is not None and os.path.isdir(reader.root + real) else None
