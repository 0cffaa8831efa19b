"""Topologies by name, or out of a YAML file: docs/lab.md shows what one says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gpupt.edges.yamlfile import Value, read_yaml
from gpupt.errors import BadInput
from gpupt.lab.topology import (
    DISK,
    DRIVERS,
    MOST_NODES,
    MOST_PORTS,
    STAND_INS,
    TOPOLOGIES,
    Card,
    Function,
    Iommu,
    Topology,
)
from gpupt.model.pci import PciId

MOST_BEHIND = 8  # cards that share a bridge


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
    top = read_yaml(file).fields("cards", "iommu", required=("cards",))
    cards = tuple(_read_card(value) for value in top["cards"].items())
    iommu = _read_iommu(top["iommu"]) if "iommu" in top else Iommu.ON
    topology = Topology(file.stem, cards, iommu)
    ports = [port.numa for port in topology.ports()]
    most = max((ports.count(node) for node in ports), default=0)
    if not 1 <= most <= MOST_PORTS:
        top["cards"].wrong(f"{len(cards)} cards", expected=f"1 to {MOST_PORTS}")
    bridges = [port.cards for port in topology.ports() if port.bridged]
    names = [cards[0][1].behind for cards in bridges]
    for name, behind in zip(names, bridges, strict=True):
        if len(behind) > MOST_BEHIND:
            top["cards"].wrong(
                f"{len(behind)} cards are behind {name!r}", expected=f"at most {MOST_BEHIND}"
            )
        if names.count(name) > 1:
            top["cards"].wrong(
                f"cards behind {name!r} are near to several nodes",
                expected="the same numa for all cards behind one bridge",
            )
    return topology


def _read_iommu(value: Value) -> Iommu:
    # YAML takes a bare on or off for a boolean.
    text = str(value.node.value) if value.tag == "bool" else value.text()
    if text not in set(Iommu):
        value.wrong(f"{value.called} is {text!r}", expected="one of " + ", ".join(Iommu))
    return Iommu(text)


def _read_card(value: Value) -> Card:
    """A list of functions, or a mapping that also says where the card is."""
    if value.is_list:
        return Card(_read_functions(value))
    found = value.fields("functions", "behind", "numa", required=("functions",))
    functions = _read_functions(found["functions"])
    behind = _read_name(found["behind"]) if "behind" in found else None
    if behind is not None and any(function.stand_in == "igb" for function in functions):
        found["behind"].wrong("igb is behind a PCI bridge", expected="a root port of its own")
    numa = found["numa"].whole(least=0, most=MOST_NODES - 1) if "numa" in found else None
    return Card(functions, behind, numa)


def _read_functions(value: Value) -> tuple[Function, ...]:
    functions = tuple(_read_function(each) for each in value.items())
    if not 1 <= len(functions) <= 8:
        value.wrong(f"a card with {len(functions)} functions", expected="1 to 8")
    return functions


def _read_function(value: Value) -> Function:
    known = ("device", "id", "class", "subsystem", "driver")
    found = value.fields(*known, required=("device",))
    stand_in = _one_of(found["device"], (*STAND_INS, "disk"))
    if stand_in == "disk":
        value.fields("device")
        return DISK
    value.fields(*known, required=("id", "class"))
    identity = _read_id(found["id"])
    return Function(
        stand_in,
        identity,
        _read_id(found["subsystem"]) if "subsystem" in found else identity,
        _read_class(found["class"]),
        _one_of(found["driver"], DRIVERS) if "driver" in found else None,
    )


def _one_of(value: Value, known: Iterable[str]) -> str:
    text = value.text()
    if text not in known:
        value.wrong(f"{value.called} is {text!r}", expected="one of " + ", ".join(known))
    return text


def _read_name(value: Value) -> str:
    text = value.text()
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", text):
        value.wrong(f"{value.called} is {text!r}", expected="lower-case letters, digits and -")
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
