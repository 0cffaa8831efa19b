"""The ports above GPUs: what the far end of a card's link can do."""

from __future__ import annotations

from collections.abc import Iterable

from gpupt.edges.tree import Reader
from gpupt.errors import BadInput
from gpupt.model.pci import PciAddress


def read_ports(reader: Reader, addresses: Iterable[PciAddress]) -> dict[PciAddress, PciAddress]:
    """For each function the port above it, from where its folder stands under /sys/devices; a
    function of a root bus has none, and is absent."""
    found = {}
    for address in addresses:
        real = reader.real_path(f"sys/bus/pci/devices/{address}")
        parent = "" if real is None else real.rpartition("/")[0].rpartition("/")[2]
        try:
            found[address] = PciAddress.parse(parent)
        except BadInput:
            continue
    return found
