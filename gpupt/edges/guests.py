"""Reads from a domain's XML how a guest has the host's PCI functions."""

from __future__ import annotations

from xml.etree import ElementTree

from gpupt.model.facts import Guest, GuestFunction
from gpupt.model.pci import PciAddress

QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
# QEMU's processors have these where they are told no others (TARGET_PHYS_ADDR_BITS of old).
DEFAULT_BITS = 40
MIB = 1 << 20


def guest_in(root: ElementTree.Element) -> Guest | None:
    """The guest that a domain's XML describes; None for one that has nothing of the host's PCI.

    What the XML holds and no schema of libvirt's allows is taken for not told.
    """
    functions = tuple(
        GuestFunction(source, bus_of(hostdev))
        for hostdev in root.iterfind("devices/hostdev[@type='pci']")
        for source in (source_of(hostdev),)
        if source is not None
    )
    if not functions:
        return None
    kind = root.find("os/type")
    host_bits, address_bits = bits_of(root)
    return Guest(
        name=root.findtext("name", ""),
        machine="" if kind is None else kind.get("machine", ""),
        functions=functions,
        controllers=controllers_in(root),
        memory=(number(root.findtext("memory")) or 0) << 10,
        uefi=root.find("os[@firmware='efi']") is not None
        or root.find("os/loader[@type='pflash']") is not None,
        window=window_in(root),
        host_bits=host_bits,
        address_bits=address_bits,
    )


def source_of(hostdev: ElementTree.Element) -> PciAddress | None:
    """The host's function."""
    address = hostdev.find("source/address")
    if address is None:
        return None
    parts = [number(address.get(part, "0")) for part in ("domain", "bus", "slot", "function")]
    known = [part for part in parts if part is not None]
    return PciAddress(*known) if len(known) == len(parts) else None


def bus_of(hostdev: ElementTree.Element) -> int | None:
    """The guest's bus."""
    address = hostdev.find("address[@type='pci']")
    return None if address is None else number(address.get("bus"))


def controllers_in(root: ElementTree.Element) -> dict[int, str]:
    """The models of the PCI buses by their number."""
    return {
        index: controller.get("model", "")
        for controller in root.iterfind("devices/controller[@type='pci']")
        for index in (number(controller.get("index")),)
        if index is not None
    }


def bits_of(root: ElementTree.Element) -> tuple[bool, int | None]:
    """Whether the processor has as many address bits as the host's, and else how many it has.

    libvirt's formatdomain.html, ``maxphysaddr``; ``host-passthrough`` and ``maximum`` are QEMU's
    ``host`` and ``max``, which take the host's bits under KVM.  What ``host-model`` has depends
    on libvirt's version.
    """
    processor = root.find("cpu")
    mode = "" if processor is None else processor.get("mode", "custom")
    told = None if processor is None else processor.find("maxphysaddr")
    if root.get("type") != "kvm":
        return False, DEFAULT_BITS
    if told is not None:
        bits = number(told.get("bits"))
        return told.get("mode") == "passthrough", bits
    if mode in {"host-passthrough", "maximum"}:
        return True, None
    return False, None if mode == "host-model" else DEFAULT_BITS


def window_in(root: ElementTree.Element) -> int | None:
    """The bytes that OVMF was told to keep for BARs (``opt/ovmf/X-PciMmio64Mb``)."""
    said = [
        entry.text or "" for entry in root.iterfind("sysinfo/entry[@name='opt/ovmf/X-PciMmio64Mb']")
    ]
    for argument in root.iterfind(f"{QEMU}commandline/{QEMU}arg"):
        name, _, value = argument.get("value", "").partition(",string=")
        if name == "name=opt/ovmf/X-PciMmio64Mb":
            said.append(value)
    sizes = [size for size in map(number, said) if size is not None]
    return sizes[-1] * MIB if sizes else None


def number(text: str | None) -> int | None:
    """A number of libvirt's, decimal or hexadecimal; None for anything else."""
    try:
        found = int((text or "").strip(), 0)
    except ValueError:
        return None
    return found if found >= 0 else None
