"""A libvirt whose domains and networks are files, so that a killed process loses none of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpupt.edges.hypervisor import Hypervisor
from gpupt.model.cluster import Capacity, Domain, Network


class Handle:
    """What libvirt's Python binding gives for a domain or a network, as far as it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def XMLDesc(self, _flags: int) -> str:
        return self.file.read_text()

    def name(self) -> str:
        return self.file.stem

    def UUIDString(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, self.file.stem))

    def isActive(self) -> int:
        return 1


class FakeHypervisor(Hypervisor):
    """Answers as the gate does, from XML files in a folder; what is defined runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, uri="fake:///")
        self.folder = folder
        for kind in ("domains", "networks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Nothing is open."""

    def capacity(self) -> Capacity:
        return Capacity(cpus=8, memory=1 << 36, available=1 << 36)

    def domains(self) -> tuple[Domain, ...]:
        return self.read("domains", self._domain_of)

    def domain(self, name: str) -> Domain | None:
        return next((each for each in self.domains() if each.name == name), None)

    def networks(self) -> tuple[Network, ...]:
        return self.read("networks", self._network_of)

    def start_domain(self, xml: str) -> None:
        self.write("domains", xml)

    def start_network(self, xml: str) -> None:
        self.write("networks", xml)

    def remove_domain(self, name: str, *, patience: float) -> bool:
        (self.folder / f"domains/{name}.xml").unlink(missing_ok=True)
        return True

    def remove_network(self, name: str) -> None:
        (self.folder / f"networks/{name}.xml").unlink(missing_ok=True)

    def press_power(self, name: str) -> None:
        """It stays until it is removed."""

    def read(self, kind: str, parse: Callable[[Handle], Any]) -> tuple[Any, ...]:
        return tuple(parse(Handle(file)) for file in sorted((self.folder / kind).glob("*.xml")))

    def write(self, kind: str, xml: str) -> None:
        name = ElementTree.fromstring(xml).findtext("name")
        half = self.folder / f"{name}.half"
        half.write_text(xml)
        half.replace(self.folder / f"{kind}/{name}.xml")
