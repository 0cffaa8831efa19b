"""PCI in the kernel's words: addresses, ids, devices, IOMMU groups."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gpupt.errors import BadInput

_ADDRESS = re.compile(
    r"^(?:(?P<domain>[0-9a-fA-F]{1,8}):)?(?P<bus>[0-9a-fA-F]{1,2}):"
    r"(?P<device>[0-9a-fA-F]{1,2})\.(?P<function>[0-7])$"
)


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """Where a function sits: domain (up to 32 bits: VMD and Hyper-V use more than 16), bus,
    device (0-31) and function (0-7).  Orders as numbers, so bus 0a follows bus 09."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """The address written as ``0000:41:00.0`` or ``41:00.0``; raises BadInput."""
        found = _ADDRESS.match(text.strip())
        if found is None or int(found["device"], 16) > 31:
            raise BadInput(
                f"not a PCI address: {text!r}",
                details="expected domain:bus:device.function in hex, such as 0000:41:00.0",
                remedy="gpupt list shows the addresses of this host's GPUs",
            )
        return cls(
            int(found["domain"] or "0", 16),
            int(found["bus"], 16),
            int(found["device"], 16),
            int(found["function"], 8),
        )

    @property
    def slot(self) -> tuple[int, int, int]:
        """Domain, bus and device: what all functions of one card share."""
        return (self.domain, self.bus, self.device)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"


@dataclass(frozen=True, slots=True, order=True)
class PciId:
    """Vendor and device id, 16 bits each; ``10de:2330`` in text."""

    vendor: int
    device: int

    def __str__(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register with a size in bytes; ``bits`` is 32 or 64.

    Not ``assigned``: no window above the card had room for it."""

    index: int
    size: int
    prefetchable: bool
    bits: int
    assigned: bool = True


@dataclass(frozen=True, slots=True)
class Link:
    """A PCIe link; widths in lanes, speeds in GT/s; None where the kernel does not say."""

    width: int | None = None
    max_width: int | None = None
    speed: float | None = None
    max_speed: float | None = None


@dataclass(frozen=True, slots=True)
class DriverBinding:
    """Who drives a function now, and what may be bound to it next.

    ``driver`` None: driverless.  ``override`` None: no driver_override set (the kernel's
    text ``(null)``)."""

    driver: str | None
    override: str | None


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One PCI function as sysfs shows it; None is what the kernel did not say.

    ``class_code`` has 24 bits (0x030200: 3D controller).  ``lost`` is true when config
    space reads all ones: the card has fallen off the bus; ``locked`` when the kernel holds it
    in an unbind or a reset that did not end."""

    address: PciAddress
    id: PciId
    class_code: int
    binding: DriverBinding
    subsystem: PciId | None = None
    revision: int | None = None
    iommu_group: int | None = None
    numa_node: int | None = None
    boot_vga: bool | None = None
    link: Link = field(default_factory=Link)
    bars: tuple[Bar, ...] = ()
    reset_methods: tuple[str, ...] | None = None
    is_bridge: bool = False
    physfn: PciAddress | None = None
    sriov_numvfs: int | None = None
    d3cold_allowed: bool | None = None
    lost: bool = False
    locked: bool = False
    name: str | None = None


@dataclass(frozen=True, slots=True)
class IommuGroup:
    """The unit of ownership: functions the IOMMU cannot tell apart.

    ``strangers`` are names that the kernel lists in the group and that are no members by
    what is known of the functions: such a group is not understood, and not taken."""

    number: int
    members: tuple[PciAddress, ...]
    type: str | None = None
    strangers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a card that card, so that a renumbered address is refused, not guessed."""

    id: PciId
    subsystem: PciId | None
    class_code: int
    serial: str | None = None
