"""Reads a host from sysfs alone: little of every function, everything of a GPU's.

Every path derives from one injected root, so a recorded machine is read by the same code,
and no link in it leads a reading out of it.  What is absent is None; what is denied is named
in ``Host.unreadable``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from gpupt.edges.apart import DEADLINE, read_apart
from gpupt.edges.tree import Reader
from gpupt.errors import BadInput
from gpupt.model.gpus import find_gpus, is_gpu_class
from gpupt.model.host import Critical, Host
from gpupt.model.pci import (
    Bar,
    DriverBinding,
    IommuGroup,
    Link,
    PciAddress,
    PciDevice,
    PciId,
)

# An address as the kernel writes it (pci_setup_device in drivers/pci/probe.c).
NAME = re.compile(r"(?:[0-9a-f]{4}|[1-9a-f][0-9a-f]{4,7}):[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
IN_ORDER = attrgetter("address.domain", "address.bus", "address.device", "address.function")
# modalias_show in drivers/pci/pci-sysfs.c: ids, and the class in three parts.
MODALIAS = re.compile(
    rb"pci:v0000([0-9A-F]{4})d0000([0-9A-F]{4})sv0000([0-9A-F]{4})sd0000([0-9A-F]{4})"
    rb"bc([0-9A-F]{2})sc([0-9A-F]{2})i([0-9A-F]{2})\s*$"
)
NO_LINK = Link()
# linux/ioport.h
IORESOURCE_MEM = 0x200
IORESOURCE_PREFETCH = 0x2000
IORESOURCE_MEM_64 = 0x100000
IORESOURCE_UNSET = 0x20000000
RESOURCE_ROWS_OF_BARS = 6
MOST_LANES = 32
# A machine that answered for one card answers for the next at once.
NEXT_DEADLINE = 1.0
# Shown under the device's lock, or not while it is reset.
LOCKED = ("driver_override", "sriov_numvfs", "config")


def read_host(root: Path, *, whole: bool = False) -> Host:
    """The PCI functions of the machine whose ``sys`` and ``proc`` are under ``root``.

    GPUs are read in full; with ``whole`` every function is, and the devices that the host
    cannot do without are found too.  Raises BadInput when the tree has no PCI bus.
    """
    reader = PciReader(root)
    devices = reader.devices()
    members: dict[int, list[PciAddress]] = {}
    for device in devices.values():
        if device.iommu_group is not None:
            members.setdefault(device.iommu_group, []).append(device.address)
    in_full = [
        device
        for device in devices.values()
        if whole or is_gpu_class(device.class_code, vendor=device.id.vendor)
    ]
    reader.foresee(device.address for device in in_full)
    for device in in_full:
        reader.stand_in(f"sys/bus/pci/devices/{device.address}")
        devices[device.address] = reader.in_full(device)
    reader.step_out()
    gpus = find_gpus(devices)
    with_gpu = {
        devices[each].iommu_group for gpu in gpus for each in (gpu.address, *gpu.companions)
    }
    groups = {
        number: reader.group(number, tuple(addresses))
        if number in with_gpu
        else IommuGroup(number, tuple(addresses))
        for number, addresses in sorted(members.items())
    }
    return Host(
        devices=devices,
        groups=groups,
        gpus=gpus,
        critical=read_critical(reader, devices) if whole else (),
        iommu_present=bool(groups),
        kernel_cmdline=reader.text("proc/cmdline") or "",
        unreadable=tuple(reader.denied),
    )


def read_critical(reader: Reader, devices: Mapping[PciAddress, PciDevice]) -> tuple[Critical, ...]:
    """The devices that the host cannot do without."""
    # Imported on use: `gpupt list` does without.
    from gpupt.edges.critical import find_critical

    return find_critical(reader, devices)


def kind_in(modalias: bytes) -> tuple[PciId, PciId, int] | None:
    """The ids, the subsystem's ids and the class in a modalias; None: it is none."""
    found = MODALIAS.match(modalias)
    if found is None:
        return None
    vendor, device, subvendor, subdevice, *parts = (int(part, 16) for part in found.groups())
    base, sub, interface = parts
    return (
        PciId(vendor, device),
        PciId(subvendor, subdevice),
        base << 16 | sub << 8 | interface,
    )


class PciReader(Reader):
    """Reads the PCI functions of a machine; ``locked`` are those of which the kernel keeps
    something from being read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.locked: set[PciAddress] = set()
        self.kinds: dict[bytes, tuple[PciId, PciId, int] | None] = {}

    def foresee(self, addresses: Iterable[PciAddress]) -> None:
        """Read what the running kernel may keep locked, in a child with a deadline.

        What is locked is named in ``denied``, and None like what is absent; ``locked`` has the
        functions that it is of."""
        if self.top is not None:
            return
        paths = {
            f"sys/bus/pci/devices/{address}/{name}": address
            for address in addresses
            for name in LOCKED
            # A card that sleeps is not woken to be asked.
            if name != "config" or not self.asleep(f"sys/bus/pci/devices/{address}")
        }
        told: dict[str, bytes | OSError] = {}
        left = list(paths)
        deadline = DEADLINE
        while left:
            told |= read_apart([self.root + path for path in left], deadline=deadline)
            unread = [path for path in left if self.root + path not in told]
            # The first of them is locked, and kept the child from all that come after it.
            left = [path for path in unread if paths[path] != paths[unread[0]]]
            deadline = NEXT_DEADLINE
        for path, address in paths.items():
            data = told.get(self.root + path)
            self.foreseen[path] = data if isinstance(data, bytes) else None
            if data is None:
                self.denied.append(f"/{path} (the kernel keeps it locked)")
                self.locked.add(address)
            elif isinstance(data, PermissionError):
                self.denied.append(f"/{path}")

    def devices(self) -> dict[PciAddress, PciDevice]:
        """Every function in the order of addresses, as far as one file and two links tell."""
        folder = "sys/bus/pci/devices"
        try:
            names = os.listdir(self.root + folder)
        except OSError as error:
            raise BadInput(
                f"no PCI bus under {self.root}",
                details=f"{self.root}{folder}: {error.strerror}",
                remedy="--root names the folder that holds sys/ and proc/",
            ) from None
        try:
            read = [self.device(f"{folder}/{name}", self.address(folder, name)) for name in names]
        finally:
            self.step_out()
        found = sorted((device for device in read if device), key=IN_ORDER)
        return {device.address: device for device in found}

    def address(self, folder: str, name: str) -> PciAddress:
        """The address that a folder of the bus is named after, which is then stood in; raises
        BadInput, also for one that leads out of the tree."""
        if NAME.fullmatch(name) is None or not self.stand_in(f"{folder}/{name}"):
            address = PciAddress.parse(name)
            raise BadInput(
                f"{name!r} under {self.root}{folder} is no function of this tree",
                details=f"expected {address}, a link to a folder under {self.root}sys/devices",
                remedy="record the machine again with gpupt snapshot",
            )
        bus, device = int(name[-7:-5], 16), int(name[-4:-2], 16)
        return PciAddress(int(name[:-8], 16), bus, device, int(name[-1]))

    def group(self, number: int, members: tuple[PciAddress, ...]) -> IommuGroup:
        """An IOMMU group of these members, and what the group itself says."""
        folder = f"sys/kernel/iommu_groups/{number}"
        listed = self.names(f"{folder}/devices")
        strangers = tuple(name for name in listed if name not in {str(each) for each in members})
        return IommuGroup(number, members, self.text(f"{folder}/type"), strangers)

    def device(self, folder: str, address: PciAddress) -> PciDevice | None:
        """A function's ids, driver and group; None when it left the bus as it was read."""
        # modalias holds ids and class in one read, from the kernel's memory: no card is woken.
        # So does uevent, but some kernels (from 6.10 on) show that under the device's lock.
        said = self.bytes(f"{folder}/modalias", most=128) or b""
        # Cards and functions of a kind say the same: it is understood once.
        kind = self.kinds.get(said) or self.kinds.setdefault(said, kind_in(said))
        subsystem: PciId | None
        if kind is not None:
            identifier, subsystem, class_code = kind
        else:
            numbers = [self.number(f"{folder}/{name}") for name in ("vendor", "device", "class")]
            if None in numbers:
                return None
            identifier = PciId(numbers[0] or 0, numbers[1] or 0)
            class_code = numbers[2] or 0
            subsystem = self.subsystem(folder)
        group = self.link(f"{folder}/iommu_group")
        return PciDevice(
            address=address,
            id=identifier,
            class_code=class_code,
            binding=DriverBinding(self.link(f"{folder}/driver"), None),
            subsystem=subsystem,
            iommu_group=int(group) if group is not None and group.isdecimal() else None,
            # PCI-to-PCI and semi-transparent bridges; host and ISA bridges are endpoints.
            is_bridge=class_code >> 8 in {0x0604, 0x0609},
            link=NO_LINK,
        )

    def in_full(self, device: PciDevice) -> PciDevice:
        """The function with everything that sysfs says of it."""
        folder = f"sys/bus/pci/devices/{device.address}"
        numa = self.number(f"{folder}/numa_node", base=10)
        d3cold = self.number(f"{folder}/d3cold_allowed", base=10)
        resets = self.text(f"{folder}/reset_method")
        physfn = self.link(f"{folder}/physfn")
        asleep = self.asleep(folder)
        lost = not asleep and self.lost(folder, virtual=physfn is not None)
        return replace(
            device,
            locked=device.address in self.locked,
            binding=DriverBinding(device.binding.driver, self.override(device.address)),
            revision=self.number(f"{folder}/revision"),
            numa_node=None if numa is None or numa < 0 else numa,
            boot_vga=self.boot_display(folder, class_code=device.class_code),
            # The kernel asks the card itself: one that sleeps is woken for it (Linux 6.18), or
            # answers ones, as a lost one does.
            link=Link() if asleep or lost else self.pcie_link(folder),
            bars=self.bars(folder),
            reset_methods=None if resets is None else tuple(resets.split()),
            physfn=PciAddress.parse(physfn) if physfn else None,
            sriov_numvfs=self.number(f"{folder}/sriov_numvfs", base=10),
            d3cold_allowed=None if d3cold is None else bool(d3cold),
            lost=lost,
        )

    def boot_display(self, folder: str, *, class_code: int) -> bool | None:
        """Whether the machine booted with its console on it; None where the kernel does not say.

        The VGA arbiter knows VGA cards only, and may have taken another one for it; the DRM
        device knows better (Linux 6.18).
        """
        said = self.text(f"{folder}/boot_vga")
        if said in {None, "0"} and class_code >> 16 == 0x03:
            for name in self.names(f"{folder}/drm"):
                if self.text(f"{folder}/drm/{name}/boot_display") == "1":
                    return True
        # What is neither 0 nor absent is taken for the boot display.
        return None if said is None else said != "0"

    def pcie_link(self, folder: str) -> Link:
        """The link as it runs, and as it could."""
        return Link(
            width=self.width(f"{folder}/current_link_width"),
            max_width=self.width(f"{folder}/max_link_width"),
            speed=self.speed(f"{folder}/current_link_speed"),
            max_speed=self.speed(f"{folder}/max_link_speed"),
        )

    def subsystem(self, folder: str) -> PciId | None:
        """The subsystem's ids from their own files."""
        vendor = self.number(f"{folder}/subsystem_vendor")
        device = self.number(f"{folder}/subsystem_device")
        return None if vendor is None or device is None else PciId(vendor, device)

    def override(self, address: PciAddress) -> str | None:
        """The driver_override, None where none is set (the kernel's text ``(null)``)."""
        said = self.text(f"sys/bus/pci/devices/{address}/driver_override")
        return None if said in {None, "", "(null)"} else said

    def width(self, path: str) -> int | None:
        """Lanes; 0 (no link), 63 (all ones) and 255 (unknown) are None, as is no link at all."""
        lanes = self.number(path, base=10)
        return lanes if lanes is not None and 0 < lanes <= MOST_LANES else None

    def speed(self, path: str) -> float | None:
        """GT/s, from ``16.0 GT/s PCIe``; None for ``Unknown``."""
        said = self.text(path)
        try:
            speed = float(said.split()[0]) if said else math.nan
        except ValueError:
            return None
        return speed if math.isfinite(speed) else None

    def bars(self, folder: str) -> tuple[Bar, ...]:
        """The memory and I/O windows that are in use."""
        said = self.text(f"{folder}/resource")
        found = []
        for index, line in enumerate((said or "").splitlines()[:RESOURCE_ROWS_OF_BARS]):
            try:
                start, end, flags = (int(word, 16) for word in line.split())
            except ValueError:
                continue
            if flags == 0 or end < start or (start, end) == (0, 0):
                continue
            assigned = bool(start) and not flags & IORESOURCE_UNSET
            # Ports are few, and no GPU's driver wants any: with many cards some get none.
            if not assigned and not flags & IORESOURCE_MEM:
                continue
            found.append(
                Bar(
                    index=index,
                    size=end - start + 1,
                    prefetchable=bool(flags & IORESOURCE_PREFETCH),
                    bits=64 if flags & IORESOURCE_MEM_64 else 32,
                    assigned=assigned,
                )
            )
        return tuple(found)

    def asleep(self, folder: str) -> bool:
        """Whether the kernel has cut its power (D3cold): to ask such a card is to wake it.

        Before 5.11 the kernel does not tell how deep a card sleeps, so any sleep counts there.
        """
        if self.text(f"{folder}/power_state") not in {"D3cold", None}:
            return False
        return self.text(f"{folder}/power/runtime_status") == "suspended"

    def lost(self, folder: str, *, virtual: bool) -> bool:
        """Whether config space reads all ones: the card has fallen off the bus.

        A virtual function's ids are all ones there when it is well, as SR-IOV has it.
        """
        config = self.bytes(f"{folder}/config", most=64)
        if config is None or len(config) < 16:
            return False
        ones = config[:4] == b"\xff\xff\xff\xff"
        return config[14] & 0x7F == 0x7F or (ones and not virtual)
