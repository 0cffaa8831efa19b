"""What the emulated host has in its slots: cards of emulated devices under NVIDIA's ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpupt.edges.yamlfile import Value, read_yaml
from gpupt.errors import BadInput
from gpupt.model.pci import PciAddress, PciId

# QEMU's devices that may be disguised, with the ids they carry themselves.
STAND_INS = {
    "edu": PciId(0x1234, 0x11E8),
    "secondary-vga": PciId(0x1234, 0x1111),
    "intel-hda": PciId(0x8086, 0x2668),
}
# What a device needs to be told: edu reaches 28 bits of memory unless its mask is wider.
PROPERTIES = {"edu": "dma_mask=0xffffffffffffffff"}
# Driver → module, and whether it must be told the id (it claims no such device by itself).
DRIVERS = {
    "bochs-drm": ("bochs", True),
    "uio_pci_generic": ("uio_pci_generic", True),
    "snd_hda_intel": ("snd_hda_intel", False),
}
FIRST_PORT = 0x10  # slots on the root bus from here on hold the cards' root ports
MOST_CARDS = 0x1F - FIRST_PORT  # slot 1f belongs to the chipset
DISPLAY_VGA = 0x0300


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
    """A card in a slot of its own, behind a root port of its own."""

    functions: tuple[Function, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The cards by slot: the first is at 01:00, the second at 02:00, and so on.

    The firmware makes the first card of class 0300 the one that it boots on."""

    name: str
    cards: tuple[Card, ...]

    def functions(self) -> Iterator[tuple[PciAddress, Function]]:
        """Every function with the address that the emulated host will see it at."""
        for bus, card in enumerate(self.cards, 1):
            for number, function in enumerate(card.functions):
                yield PciAddress(0, bus, 0, number), function


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
TOPOLOGIES = {
    # A data-centre GPU; a GPU with its audio function; a display card that stays with the
    # host, for the host boots on it.
    "default": Topology("default", (H100, T4, P620)),
    "one": Topology("one", (H100,)),
    "eight": Topology("eight", (H100,) * 8),
}


def find_topology(text: str) -> Topology:
    """The topology of that name, or the one in that file; raises BadInput."""
    if text in TOPOLOGIES:
        return TOPOLOGIES[text]
    if "/" in text or text.endswith((".yaml", ".yml")):
        return read_topology(Path(text))
    raise BadInput(
        f"no topology is called {text!r}",
        details="there are " + ", ".join(TOPOLOGIES),
        remedy="name one of these, or a YAML file",
    )


def read_topology(file: Path) -> Topology:
    """The topology in a YAML file; raises BadInput with file, line and column."""
    top = read_yaml(file).fields("cards", required=("cards",))
    cards = tuple(_read_card(value) for value in top["cards"].items())
    if not 1 <= len(cards) <= MOST_CARDS:
        top["cards"].wrong(f"{len(cards)} cards", expected=f"1 to {MOST_CARDS}")
    return Topology(file.stem, cards)


def disguises(topology: Topology) -> str:
    """The environment's FAKE_PCI, as fakepci.c reads it."""
    entries = []
    for function in dict.fromkeys(function for _, function in topology.functions()):
        own, wanted, sub = STAND_INS[function.stand_in], function.id, function.subsystem
        entries.append(
            f"{type_name(function)}={function.stand_in}:{own}:{wanted}"
            f":{function.device_class:x}:{sub}"
        )
    return ";".join(entries)


def type_name(function: Function) -> str:
    """What the disguised device's type is called in QEMU."""
    return f"{function.stand_in}-{function.id.vendor:04x}-{function.id.device:04x}"


def device_arguments(topology: Topology) -> list[str]:
    """QEMU's arguments that put the cards in: each behind a root port of its own.

    Functions are called gpuN, gpuN.1, … on QMP, N counted from 0."""
    words: list[str] = []
    for number, card in enumerate(topology.cards):
        port = f"pcie-root-port,id=port{number},bus=pcie.0,addr={FIRST_PORT + number:#x}"
        words += ["-device", f"{port},chassis={number + 1},slot={number + 1}"]
        for index, function in enumerate(card.functions):
            device = f"{type_name(function)},bus=port{number},addr=0.{index}"
            device += f",id=gpu{number}" + (f".{index}" if index else "")
            if index == 0 and len(card.functions) > 1:
                device += ",multifunction=on"
            if function.stand_in in PROPERTIES:
                device += f",{PROPERTIES[function.stand_in]}"
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


def _read_card(value: Value) -> Card:
    functions = tuple(_read_function(each) for each in value.items())
    if not 1 <= len(functions) <= 8:
        value.wrong(f"a card with {len(functions)} functions", expected="1 to 8")
    return Card(functions)


def _read_function(value: Value) -> Function:
    needed = ("device", "id", "class")
    found = value.fields(*needed, "subsystem", "driver", required=needed)
    stand_in = _one_of(found["device"], STAND_INS)
    identity = _read_id(found["id"])
    return Function(
        stand_in,
        identity,
        _read_id(found["subsystem"]) if "subsystem" in found else identity,
        _read_class(found["class"]),
        _one_of(found["driver"], DRIVERS) if "driver" in found else None,
    )


def _one_of(value: Value, known: dict[str, PciId] | dict[str, tuple[str, bool]]) -> str:
    text = value.text()
    if text not in known:
        value.wrong(f"{value.called} is {text!r}", expected="one of " + ", ".join(known))
    return text


def _read_id(value: Value) -> PciId:
    text = value.text()
    if not re.fullmatch(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{4}", text):
        value.wrong(
            f"{value.called} is {text!r}", expected="vendor:device in hex, such as 10de:2330"
        )
    vendor, _, device = text.partition(":")
    return PciId(int(vendor, 16), int(device, 16))


def _read_class(value: Value) -> int:
    text = value.text()
    if not re.fullmatch(r"[0-9a-fA-F]{4}", text):
        value.wrong(f"{value.called} is {text!r}", expected='four hex digits, such as "0302"')
    return int(text, 16)
