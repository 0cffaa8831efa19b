"""What of a host makes its loans outlive a reboot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpupt.model.pci import PciAddress


@dataclass(frozen=True, slots=True)
class BootRules:
    """The udev rules of ours, and what is needed to write one.

    ``rules`` holds the text of each rule by the GPU it is for; ``places`` where functions sit
    in the tree of buses (udev's DEVPATH: ``/devices/pci0000:40/0000:40:01.1/0000:41:00.0``).
    ``obstacle``: why no rule can be written or removed, and what to do about it; ``udev``:
    whether there is one to obey them."""

    rules: Mapping[PciAddress, str] = field(default_factory=dict)
    places: Mapping[PciAddress, str] = field(default_factory=dict)
    obstacle: tuple[str, str] | None = None
    udev: bool = True
