"""What doctor knows beyond the PCI bus; None: could not be read, and ``unread`` says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpupt.errors import GpuptError
from gpupt.model.host import Holder
from gpupt.model.pci import PciAddress, PciId


@dataclass(frozen=True, slots=True)
class VfioClaim:
    """A place that gives vfio-pci every card of some ids: a module option or command line."""

    where: str
    ids: tuple[PciId, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """A region of an IOMMU group that the platform keeps (``direct``: an RMRR)."""

    group: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class StuckUnbind:
    """A process that hangs inside the kernel's unbind; ``guest``: until a guest lets go."""

    pid: int
    command: str
    guest: bool = False


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """How much memory guests may lock, in bytes (None: no limit), and DMA mappings each."""

    locked: int | None
    as_root: bool
    dma_entries: int | None
    total: int | None


@dataclass(frozen=True, slots=True)
class GuestFunction:
    """A function of the host that a guest has, and the guest's bus it sits on (None: not told)."""

    host: PciAddress
    bus: int | None


@dataclass(frozen=True, slots=True)
class Guest:
    """A domain of libvirt's that has functions of the host, as its XML describes it.

    ``machine`` as libvirt names it (pc-q35-10.0); ``controllers`` are the models of its PCI
    buses by their number; ``memory`` in bytes; ``uefi``: its firmware is OVMF, and ``window``
    the bytes that it was told to keep for BARs.  ``address_bits`` are those of its processor,
    where they are not those of the host (``host_bits``); None and not the host's: not told.
    """

    name: str
    machine: str
    functions: tuple[GuestFunction, ...]
    controllers: Mapping[int, str] = field(default_factory=dict)
    memory: int = 0
    uefi: bool = False
    window: int | None = None
    host_bits: bool = False
    address_bits: int | None = None


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts that checks are decided from; ``unread`` maps a check to why it cannot run."""

    architecture: str | None = None
    interrupt_chips: frozenset[str] | None = None
    unsafe_interrupts: bool = False
    vfio: bool = True
    holders: Mapping[PciAddress, tuple[Holder, ...]] = field(default_factory=dict)
    framebuffers: tuple[str, ...] = ()
    boot_framebuffers: Mapping[PciAddress, str] = field(default_factory=dict)
    claims: tuple[VfioClaim, ...] = ()
    reserved: tuple[Reserved, ...] = ()
    # The variant driver that the kernel's own table puts before vfio-pci for a function.
    flavours: Mapping[PciAddress, str] = field(default_factory=dict)
    # Reserved hugepages in bytes by NUMA node.
    hugepages: Mapping[int, int] = field(default_factory=dict)
    limits: MemoryLimits | None = None
    stuck: tuple[StuckUnbind, ...] = ()
    kvm: str | None = None
    kvm_present: bool = False
    libvirt: GpuptError | None = None
    guests: tuple[Guest, ...] = ()
    # Of a physical address, as /proc/cpuinfo says.
    address_bits: int | None = None
    # Major and minor number of the running kernel.
    kernel: tuple[int, int] | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
