"""Finds the processes that hold a GPU's device nodes open."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpupt.edges.sysfs import Reader
from gpupt.model.host import Holder, Host, Loan
from gpupt.model.pci import PciAddress, PciDevice


def read_holders(
    reader: Reader, host: Host, addresses: Iterable[PciAddress]
) -> dict[PciAddress, tuple[Holder, ...]]:
    """For each function, who has a node of it open; functions that nobody holds are absent.

    Other people's processes can be looked into only by root; those are named in
    ``reader.denied``.
    """
    owners: dict[str, list[PciAddress]] = {}
    for address in addresses:
        for node in device_nodes(reader, host.devices[address]):
            owners.setdefault(node, []).append(address)
    found: dict[PciAddress, list[Holder]] = {}
    if not owners:
        return {}
    for pid in sorted(int(name) for name in reader.names("proc") if name.isdecimal()):
        if pid == os.getpid():
            continue
        for node in sorted(open_nodes(reader, pid) & owners.keys()):
            command = reader.text(f"proc/{pid}/comm") or "?"
            for address in owners[node]:
                found.setdefault(address, []).append(Holder(pid, command, node))
    return {address: tuple(holders) for address, holders in found.items()}


def device_nodes(reader: Reader, device: PciDevice) -> set[str]:
    """The nodes under /dev that lead to a function: DRI, NVIDIA, framebuffer, sound, VFIO."""
    folder = f"sys/bus/pci/devices/{device.address}"
    nodes = {
        f"/dev/dri/{name}"
        for name in reader.names(f"{folder}/drm")
        if name.startswith(("card", "renderD"))
    }
    nodes |= {f"/dev/{name}" for name in reader.names(f"{folder}/graphics")}
    for card in reader.names(f"{folder}/sound"):
        if card.startswith("card"):
            nodes |= {
                f"/dev/snd/{name}"
                for name in reader.names(f"{folder}/sound/{card}")
                if name.startswith(("pcm", "control", "hw", "midi"))
            }
    said = reader.text(f"proc/driver/nvidia/gpus/{device.address}/information") or ""
    for line in said.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Device Minor" and value.strip().isdecimal():
            nodes.add(f"/dev/nvidia{value.strip()}")
    if (device.binding.driver or "").startswith("vfio") and device.iommu_group is not None:
        nodes.add(f"/dev/vfio/{device.iommu_group}")
        nodes |= {f"/dev/vfio/devices/{name}" for name in reader.names(f"{folder}/vfio-dev")}
    return nodes


def open_nodes(reader: Reader, pid: int) -> set[str]:
    """The device nodes that a process has open."""
    folder = f"{reader.root}proc/{pid}/fd"
    found: set[str] = set()
    if not reader.is_inside(folder.removeprefix(reader.root)):
        return found
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    target = os.readlink(entry.path)
                except OSError:
                    continue
                if target.startswith("/dev/"):
                    found.add(target)
    except PermissionError:
        reader.denied.append(f"/proc/{pid}/fd")
    except OSError:
        # The process ended meanwhile.
        return set()
    return found


def vfio_to_be_had(reader: Reader) -> bool:
    """Whether vfio-pci is loaded, built in, or a module of the kernel that runs."""
    if os.path.isdir(f"{reader.root}sys/bus/pci/drivers/vfio-pci"):
        return True
    release = reader.text("proc/sys/kernel/osrelease")
    for name in ("modules.builtin", "modules.dep"):
        if "/vfio-pci.ko" in reader.whole(f"lib/modules/{release}/{name}"):
            return True
    return False


def holders_of(
    root: Path, host: Host, loans: Mapping[PciAddress, Loan]
) -> dict[PciAddress, tuple[Holder, ...]] | None:
    """Who holds the functions of these loans; None when not every process could be looked into."""
    reader = Reader(root)
    lent = [origin.address for loan in loans.values() for origin in loan.origins]
    found = read_holders(reader, host, [address for address in lent if address in host.devices])
    return None if reader.denied else found
