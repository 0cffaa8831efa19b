"""Finds the devices that the host cannot do without: its disks, and the way to it.

A GPU whose IOMMU group holds one of these is never lent: machines were left unbootable by
that, or cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from gpupt.edges.sysfs import Reader
from gpupt.errors import BadInput
from gpupt.model.host import Critical
from gpupt.model.pci import PciAddress

# Filesystems that no block device of this host holds.
DISKLESS = frozenset(
    {"overlay", "tmpfs", "ramfs", "rootfs", "9p", "virtiofs", "nfs", "nfs4", "squashfs"}
)


def find_critical(reader: Reader) -> tuple[Critical, ...]:
    """Controllers of mounted disks and of swap, and cards that the default route leaves by."""
    found: dict[PciAddress, list[str]] = {}
    for address, why in [*disks(reader), *uplinks(reader)]:
        said = found.setdefault(address, [])
        if why not in said:
            said.append(why)
    return tuple(Critical(address, "; ".join(why)) for address, why in sorted(found.items()))


def disks(reader: Reader) -> Iterator[tuple[PciAddress, str]]:
    """Controllers of what is mounted or swapped to."""
    root_known = False
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
        for address in addresses:
            yield address, f"{fields[4]} is on it"
    for line in reader.whole("proc/swaps").splitlines()[1:]:
        for address in under_device(reader, line.split()[0] if line.split() else ""):
            yield address, "swap is on it"
    if not root_known:
        # Such as ZFS, whose mounts name no device: then no storage controller is taken.
        for name in reader.names("sys/bus/pci/devices"):
            code = reader.number(f"sys/bus/pci/devices/{name}/class")
            if code is not None and code >> 16 == 0x01:
                yield PciAddress.parse(name), "the disk of / is not known, and this may be it"


def uplinks(reader: Reader) -> Iterator[tuple[PciAddress, str]]:
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
        for address in under_interface(reader, interface, seen=set()):
            yield address, f"the default route leaves by it ({interface})"


def under_interface(reader: Reader, interface: str, *, seen: set[str]) -> Iterator[PciAddress]:
    """The PCI functions under a network interface and under what it is made of."""
    if interface in seen:
        return
    seen.add(interface)
    folder = f"sys/class/net/{interface}"
    yield from last_function(real_path(reader, folder))
    below = [name[6:] for name in reader.names(folder) if name.startswith("lower_")]
    for name in [*below, *reader.names(f"{folder}/brif")]:
        yield from under_interface(reader, name, seen=seen)


def under_device(reader: Reader, device: str) -> Iterator[PciAddress]:
    """The PCI functions under a node such as /dev/sda2 or /dev/mapper/root."""
    if not device.startswith("/dev/"):
        return
    for name in dict.fromkeys(
        (os.path.basename(device), os.path.basename(real_path(reader, device.lstrip("/"))))
    ):
        yield from under_block(reader, f"sys/class/block/{name}")


def under_block(reader: Reader, folder: str) -> Iterator[PciAddress]:
    """The PCI functions under a block device, through partitions, LVM, LUKS and RAID."""
    path = real_path(reader, folder)
    if not os.path.isdir(path):
        return
    yield from last_function(path)
    inside = os.path.relpath(path, reader.root)
    # A partition's slaves are its disk's: the disk is the folder above.
    for holder in (inside, os.path.dirname(inside)):
        for name in reader.names(f"{holder}/slaves"):
            yield from under_block(reader, f"sys/class/block/{name}")


def last_function(path: str) -> Iterator[PciAddress]:
    """The PCI function nearest to a device, from its path under sys/devices."""
    for part in reversed(path.split("/")):
        if part.count(":") == 2 and part[-2:-1] == ".":
            try:
                yield PciAddress.parse(part)
            except BadInput:
                continue
            return


def real_path(reader: Reader, path: str) -> str:
    return os.path.realpath(reader.root + path)
