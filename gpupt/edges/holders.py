"""Finds the processes that have a GPU's device nodes open or mapped, and what runs them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from gpupt.edges.cgroups import Place, place_of
from gpupt.edges.tree import Reader
from gpupt.model.host import Holder, Host, Loan
from gpupt.model.pci import PciAddress, PciDevice

# Who has one of these open may map another of them and close it.
STACK = ("/dev/nvidia", "/dev/dri/", "/dev/kfd")


def read_holders(
    reader: Reader, host: Host, addresses: Iterable[PciAddress], *, whole: bool = False
) -> dict[PciAddress, tuple[Holder, ...]]:
    """For each function, who has a node of it open or mapped; functions nobody holds are absent.

    The mappings of a process are read where it has some node of a GPU open; with ``whole``,
    those of every process, which takes as long again as the rest.  Then the kernel itself
    (PID 0) is named too, where nvidia keeps a card in use for no process.  Other people's
    processes can be looked into only by root: where they are not, ``reader.denied`` names them.
    """
    devices = [host.devices[address] for address in addresses]
    owners: dict[str, list[PciAddress]] = {}
    for device in devices:
        for node in device_nodes(reader, device):
            owners.setdefault(node, []).append(device.address)
    found: dict[PciAddress, list[Holder]] = {}
    denied = len(reader.denied)
    # Who has VFIO's nodes keeps them open.
    mappable = {node for node in owners if not node.startswith("/dev/vfio/")}
    for pid in processes(reader) if owners else ():
        opened = open_nodes(reader, pid)
        if opened is None:
            continue
        mapped: set[str] = set()
        if mappable and (whole or any(node.startswith(STACK) for node in opened)):
            mapped = (mapped_nodes(reader, pid) & mappable) - opened
        held = sorted((opened & owners.keys()) | mapped)
        if not held:
            continue
        command = fit_to_print(reader.text(f"proc/{pid}/comm") or "?")
        place = read_place(reader, pid)
        for node in held:
            for address in owners[node]:
                holder = Holder(pid, command, node, node in mapped, *place)
                found.setdefault(address, []).append(holder)
    for device in devices if whole and len(reader.denied) == denied else ():
        if device.address not in found and kept_in_use(reader, device):
            found[device.address] = [Holder(0, "nvidia", "")]
    return {address: tuple(holders) for address, holders in found.items()}


def processes(reader: Reader) -> list[int]:
    """The processes of the machine other than this one."""
    found = {int(name) for name in reader.names("proc") if name.isdecimal()}
    return sorted(found - {os.getpid()})


def kept_in_use(reader: Reader, device: PciDevice) -> bool:
    """Whether nvidia has interrupts of a function: it gives them back when nobody uses it.

    In persistence mode it does not (nv_stop_device in kernel-open/nvidia/nv.c of NVIDIA's open
    kernel modules), and no file descriptor tells of that.  A card without MSI does not show.
    """
    folder = f"sys/bus/pci/devices/{device.address}/msi_irqs"
    return device.binding.driver == "nvidia" and bool(reader.names(folder))


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
    # The kernel takes the link to a driver away first, and then waits for who has the device.
    driver = device.binding.driver or device.binding.override or ""
    if driver.startswith("vfio") and device.iommu_group is not None:
        nodes.add(f"/dev/vfio/{device.iommu_group}")
        nodes |= {f"/dev/vfio/devices/{name}" for name in reader.names(f"{folder}/vfio-dev")}
    return nodes


def open_nodes(reader: Reader, pid: int) -> set[str] | None:
    """The device nodes that a process has open; None: it ended, or may not be looked into."""
    folder = f"proc/{pid}/fd"
    found: set[str] = set()
    if not reader.is_inside(folder):
        return None
    try:
        with os.scandir(reader.root + folder) as entries:
            for entry in entries:
                try:
                    target = os.readlink(entry.path)
                except OSError:
                    continue
                if target.startswith("/dev/"):
                    found.add(target.removesuffix(" (deleted)"))
    except PermissionError:
        reader.denied.append(f"/{folder}")
        return None
    except OSError:
        # The process ended meanwhile.
        return None
    return found


def mapped_nodes(reader: Reader, pid: int) -> set[str]:
    """The device nodes in a process's memory; a mapping outlives the descriptor it came from."""
    said = reader.whole(f"proc/{pid}/maps")
    if " /dev/" not in said:
        return set()
    # Five fields, and what is mapped.
    rows = (line.split(maxsplit=5) for line in said.splitlines())
    return {row[5].removesuffix(" (deleted)") for row in rows if len(row) == 6}


def fit_to_print(text: str) -> str:
    """The text with whatever could move a terminal's cursor replaced, but for new lines."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)


def read_place(reader: Reader, pid: int) -> Place:
    """The systemd unit and the container of a process, and the domain of a libvirt guest."""
    place = place_of(fit_to_print(reader.whole(f"proc/{pid}/cgroup")))
    if place.runtime != "guest":
        return place
    # libvirt leaves out of the scope's name what no host name may have.
    words = reader.whole(f"proc/{pid}/cmdline").split("\0")
    for word, value in pairwise(words):
        if word == "-name" and value.startswith("guest="):
            name = value.removeprefix("guest=").replace(",,", "\0").partition(",")[0]
            return place._replace(container=fit_to_print(name.replace("\0", ",")))
    return place


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
