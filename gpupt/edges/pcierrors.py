"""The kernel's own counts of PCIe errors: it leaves lines out of its log, and none of these.

Documentation/ABI/testing/sysfs-bus-pci-devices-aer: of a function that can tell of errors, from
its start on; what goes wrong on a link may be counted at its other end.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpupt.edges.tree import Reader
from gpupt.model.health import PciErrors
from gpupt.model.pci import PciAddress

TOTALS = {
    "corrected": ("aer_dev_correctable", "TOTAL_ERR_COR"),
    "nonfatal": ("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL"),
    "fatal": ("aer_dev_fatal", "TOTAL_ERR_FATAL"),
}


def read_pci_errors(reader: Reader, addresses: Iterable[PciAddress]) -> dict[PciAddress, PciErrors]:
    """The counts of each function that has some; a function without is absent."""
    found = {}
    for address in addresses:
        counts = {
            severity: total(reader.text(f"sys/bus/pci/devices/{address}/{file}"), line)
            for severity, (file, line) in TOTALS.items()
        }
        if None not in counts.values():
            found[address] = PciErrors(**counts)  # type: ignore[arg-type]
    return found


def total(text: str | None, name: str) -> int | None:
    """The number on the line of that name."""
    for line in (text or "").splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None
