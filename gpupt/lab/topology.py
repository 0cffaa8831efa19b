"""What the emulated host has in its slots: cards of emulated devices under NVIDIA's ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from gpupt.model.pci import PciAddress, PciId

# QEMU's devices that may be disguised, with the ids they carry themselves.
STAND_INS = {
    "edu": PciId(0x1234, 0x11E8),
    "secondary-vga": PciId(0x1234, 0x1111),
    "intel-hda": PciId(0x8086, 0x2668),
    "igb": PciId(0x8086, 0x10C9),
}
# What a device needs to be told: edu reaches 28 bits of memory unless its mask is wider.
PROPERTIES = {"edu": "dma_mask=0xffffffffffffffff"}
# Driver → module, and whether it must be told the id (it claims no such device by itself).
DRIVERS = {
    "bochs-drm": ("bochs", True),
    "uio_pci_generic": ("uio_pci_generic", True),
    "snd_hda_intel": ("snd_hda_intel", False),
    # It does nothing but let virtual functions be made.
    "pci-pf-stub": ("pci_pf_stub", True),
}
# igb's virtual functions take vendor and ids from igb's own registers, but their class from
# QEMU's type: that is changed where it is (fakepci.c's @).
VIRTUAL_FUNCTION = "@igbvf-10de-10ca=igbvf:8086:10ca:10de:10ca:302:10de:16c1"
FIRST_PORT = 0x10  # slots on the root bus from here on hold the cards' root ports
MOST_PORTS = 0x1F - FIRST_PORT  # slot 1f belongs to the chipset
DISPLAY_VGA = 0x0300
# A NUMA node's own root bus begins a multiple of this: 40 for node 0, 80 for node 1, ...
BUSES_PER_NODE = 0x40
MOST_NODES = 3
DISK_SIZE = 64 << 20


class Iommu(StrEnum):
    """What the firmware leaves of the IOMMU: all, nothing, or no interrupt remapping."""

    ON = "on"
    OFF = "off"
    NO_INTREMAP = "no-intremap"


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a card: QEMU's device behind it, and what it says it is.

    ``device_class`` has 16 bits (0x0302: 3D controller); ``driver`` is the host's, standing
    in for nvidia's."""

    stand_in: str
    id: PciId
    subsystem: PciId
    device_class: int
    driver: str | None


@dataclass(frozen=True, slots=True)
class Card:
    """A card in a slot of its own, behind a root port of its own.

    Cards whose ``behind`` is the same hang behind one PCI bridge, and so in one IOMMU group;
    ``numa`` is the node that the card is near to, None: the host does not say."""

    functions: tuple[Function, ...]
    behind: str | None = None
    numa: int | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """A root port: its slot on the root bus, the bus that the firmware puts below it, and the
    cards there with their numbers in the topology; ``bridged``: behind a PCI bridge."""

    numa: int | None
    slot: int
    bus: int
    cards: tuple[tuple[int, Card], ...]
    bridged: bool

    def addresses(self) -> Iterator[tuple[PciAddress, Card]]:
        """Every card with the address of its first function."""
        for place, (_, card) in enumerate(self.cards, 1):
            # Behind a bridge the bus is one further, and slot 0 is the bridge's own.
            yield PciAddress(0, self.bus + self.bridged, place if self.bridged else 0, 0), card


@dataclass(frozen=True, slots=True)
class Topology:
    """The cards by slot: the first is at 01:00, the second at 02:00, and so on; a bridge takes
    a bus more, and a NUMA node's cards are on buses of its own.

    The firmware makes the first card of class 0300 the one that it boots on."""

    name: str
    cards: tuple[Card, ...]
    iommu: Iommu = Iommu.ON

    @property
    def numa_nodes(self) -> int:
        """How many NUMA nodes the host has; 0: it does not speak of them."""
        return max((card.numa + 1 for card in self.cards if card.numa is not None), default=0)

    def ports(self) -> Iterator[Port]:
        """The root ports, in the order in which the firmware numbers the buses."""
        for node in (None, *range(self.numa_nodes)):
            bus = 0 if node is None else BUSES_PER_NODE * (node + 1)
            slot = FIRST_PORT if node is None else 0
            numbered = [each for each in enumerate(self.cards) if each[1].numa == node]
            shared: dict[str, list[tuple[int, Card]]] = {}
            for number, card in numbered:
                shared.setdefault(card.behind or f"/{number}", []).append((number, card))
            for name, cards in shared.items():
                bridged = not name.startswith("/")
                yield Port(node, slot, bus + 1, tuple(cards), bridged)
                slot, bus = slot + 1, bus + 1 + bridged

    def functions(self) -> Iterator[tuple[PciAddress, Function]]:
        """Every function with the address that the emulated host will see it at."""
        for port in self.ports():
            for address, card in port.addresses():
                for number, function in enumerate(card.functions):
                    yield PciAddress(0, address.bus, address.device, number), function


H100 = Card(
    (
        Function(
            "edu", PciId(0x10DE, 0x2330), PciId(0x10DE, 0x16C1), 0x0302, driver="uio_pci_generic"
        ),
    )
)
T4 = Card(
    (
        Function(
            "secondary-vga", PciId(0x10DE, 0x1EB8), PciId(0x10DE, 0x12A2), 0x0302, "bochs-drm"
        ),
        Function(
            "intel-hda", PciId(0x10DE, 0x10F8), PciId(0x10DE, 0x12A2), 0x0403, "snd_hda_intel"
        ),
    )
)
P620 = Card(
    (
        Function(
            "secondary-vga", PciId(0x10DE, 0x1CB6), PciId(0x10DE, 0x11BF), DISPLAY_VGA, "bochs-drm"
        ),
    )
)
# A GPU that can be divided into virtual functions.
L40 = Card(
    (Function("igb", PciId(0x10DE, 0x26B5), PciId(0x10DE, 0x169D), 0x0302, driver="pci-pf-stub"),)
)
DISK = Function("virtio-blk-pci", PciId(0x1AF4, 0x1001), PciId(0x1AF4, 0x0002), 0x0100, driver=None)
TOPOLOGIES = {
    # A data-centre GPU; a GPU with its audio function; a display card that stays with the
    # host, for the host boots on it.
    "default": Topology("default", (H100, T4, P620)),
    "one": Topology("one", (H100,)),
    "eight": Topology("eight", (H100,) * 8),
    # Two GPUs in one IOMMU group, and one that shares its group with a disk.
    "shared": Topology(
        "shared",
        (
            replace(H100, behind="pair"),
            replace(H100, behind="pair"),
            replace(H100, behind="disk"),
            Card((DISK,), behind="disk"),
        ),
    ),
    # Two NUMA nodes with a GPU each.
    "numa": Topology("numa", (replace(H100, numa=0), replace(H100, numa=1))),
    "sriov": Topology("sriov", (L40,)),
    "no-iommu": Topology("no-iommu", (H100, T4), Iommu.OFF),
    "no-intremap": Topology("no-intremap", (H100, T4), Iommu.NO_INTREMAP),
}


def disguises(topology: Topology) -> str:
    """The environment's FAKE_PCI, as fakepci.c reads it."""
    entries = []
    for function in dict.fromkeys(function for _, function in topology.functions()):
        if function.stand_in not in STAND_INS:
            continue
        own, wanted, sub = STAND_INS[function.stand_in], function.id, function.subsystem
        entries.append(
            f"{type_name(function)}={function.stand_in}:{own}:{wanted}"
            f":{function.device_class:x}:{sub}"
        )
        if function.stand_in == "igb":
            entries.append(VIRTUAL_FUNCTION)
    return ";".join(dict.fromkeys(entries))


def type_name(function: Function) -> str:
    """What the device's type is called in QEMU, disguised or as it is."""
    if function.stand_in not in STAND_INS:
        return function.stand_in
    return f"{function.stand_in}-{function.id.vendor:04x}-{function.id.device:04x}"


def iommu_arguments(topology: Topology) -> list[str]:
    """QEMU's arguments for the IOMMU; none where the firmware has it off."""
    if topology.iommu is Iommu.OFF:
        return []
    remaps = "on" if topology.iommu is Iommu.ON else "off"
    return ["-device", f"intel-iommu,intremap={remaps},caching-mode=on"]


def numa_arguments(topology: Topology, *, cpus: int, memory: int) -> list[str]:
    """QEMU's arguments that share processors and memory (bytes) among the NUMA nodes."""
    nodes, words = topology.numa_nodes, list[str]()
    for node in range(nodes):
        size = (memory >> 20) // nodes + ((memory >> 20) % nodes if node == 0 else 0)
        words += ["-object", f"memory-backend-ram,id=node{node},size={size}M"]
        first, end = (-(-cpus * each // nodes) for each in (node, node + 1))
        owned = f",cpus={first}-{end - 1}" if end > first else ""
        words += ["-numa", f"node,nodeid={node},memdev=node{node}{owned}"]
    return words


def device_arguments(topology: Topology) -> list[str]:
    """QEMU's arguments that put the cards in: each behind a root port of its own, or behind a
    bridge that it shares.

    Functions are called gpuN, gpuN.1, … on QMP, and ports portN, N counted from 0."""
    words: list[str] = []
    for node in range(topology.numa_nodes):
        root = f"bus_nr={BUSES_PER_NODE * (node + 1):#x},numa_node={node}"
        words += ["-device", f"pxb-pcie,id=root{node},bus=pcie.0,{root}"]
    for place, port in enumerate(topology.ports(), 1):
        number = port.cards[0][0]
        root = "pcie.0" if port.numa is None else f"root{port.numa}"
        root_port = f"pcie-root-port,id=port{number},bus={root},addr={port.slot:#x}"
        words += ["-device", f"{root_port},chassis={place},slot={place}"]
        if port.bridged:
            words += ["-device", f"pcie-pci-bridge,id=bridge{number},bus=port{number},addr=0.0"]
        bus = f"bridge{number}" if port.bridged else f"port{number}"
        for (card_number, card), (address, _) in zip(port.cards, port.addresses(), strict=True):
            words += _card_arguments(card, number=card_number, bus=bus, slot=address.device)
    return words


def _card_arguments(card: Card, *, number: int, bus: str, slot: int) -> list[str]:
    words: list[str] = []
    for index, function in enumerate(card.functions):
        name = f"gpu{number}" + (f".{index}" if index else "")
        device = f"{type_name(function)},bus={bus},addr={slot:x}.{index},id={name}"
        if index == 0 and len(card.functions) > 1:
            device += ",multifunction=on"
        if function.stand_in in PROPERTIES:
            device += f",{PROPERTIES[function.stand_in]}"
        if function.stand_in == DISK.stand_in:
            # Empty, and what is written to it goes with QEMU.
            empty = f"file.driver=null-co,file.size={DISK_SIZE},file.read-zeroes=on"
            drive = f"if=none,id={name}-drive,driver=raw,snapshot=on,cache=unsafe,{empty}"
            words += ["-drive", drive]
            device += f",drive={name}-drive,disable-legacy=off"
        words += ["-device", device]
    return words


def driver_commands(topology: Topology) -> list[str]:
    """Shell lines that give every function its host driver, the boot card first.

    A driver that is told an id keeps it: the function returns to it on drivers_probe."""
    wanted = sorted(
        (function for _, function in topology.functions() if function.driver),
        key=lambda function: function.device_class != DISPLAY_VGA,
    )
    lines = []
    for function in dict.fromkeys(wanted):
        assert function.driver is not None
        module, told = DRIVERS[function.driver]
        lines.append(f"modprobe {module}")
        if told:
            vendor, device = f"{function.id.vendor:04x}", f"{function.id.device:04x}"
            lines.append(f"echo {vendor} {device} > /sys/bus/pci/drivers/{function.driver}/new_id")
    return list(dict.fromkeys(lines))
