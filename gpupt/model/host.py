"""The host as read: devices, groups, GPUs, loans, and what was found wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gpupt.model.pci import DriverBinding, Identity, IommuGroup, PciAddress, PciDevice


class GpuState(StrEnum):
    """Who has a GPU (CONTRACT: the ``state`` of ``list --json``)."""

    HOST = "host"
    DRIVERLESS = "driverless"
    DETACHED = "detached"
    LENT = "lent"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: its main function and its companions (audio, USB-C, UCSI: never extra GPUs)."""

    device: PciDevice
    companions: tuple[PciAddress, ...] = ()

    @property
    def address(self) -> PciAddress:
        return self.device.address


@dataclass(frozen=True, slots=True)
class Critical:
    """A device the host cannot do without, and why: ``/`` is on it, or the default route."""

    address: PciAddress
    why: str


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a GPU's device node open, or no more than ``mapped``.

    ``unit`` is systemd's, of the manager of the user with uid ``user`` or of the system's.
    ``container`` is a short id or a name in ``runtime``'s words; runtime ``guest``: the name of
    libvirt's domain.  PID 0 is the kernel: a driver keeps the card in use for no process."""

    pid: int
    command: str
    node: str
    mapped: bool = False
    unit: str | None = None
    user: int | None = None
    runtime: str | None = None
    container: str | None = None
    pod: str | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """One reading of a machine; ``devices`` holds every PCI function by address."""

    devices: Mapping[PciAddress, PciDevice]
    groups: Mapping[int, IommuGroup]
    gpus: tuple[Gpu, ...]
    critical: tuple[Critical, ...] = ()
    iommu_present: bool = False
    kernel_cmdline: str = ""
    unreadable: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Attribute:
    """A file of sysfs, from the root, and what it holds."""

    path: str
    value: str


@dataclass(frozen=True, slots=True)
class FunctionOrigin:
    """The state of one function before gpupt first touched it: what attach restores.

    ``attributes`` are set to 0 while it is away: may its power be cut, does a console draw
    on it."""

    address: PciAddress
    identity: Identity
    binding: DriverBinding
    attributes: tuple[Attribute, ...] = ()


@dataclass(frozen=True, slots=True)
class Display:
    """What draws on the boot display: ``bind`` files of the kernel's consoles, and the
    firmware's framebuffers as platform driver and device."""

    consoles: tuple[str, ...] = ()
    framebuffers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Loan:
    """A GPU taken from the host: where each function of its group came from, and which
    node of which cluster has it (None: detached, lent to nobody yet).

    A cluster and no node: that cluster had it, and did not bring it home so far."""

    gpu: PciAddress
    origins: tuple[FunctionOrigin, ...]
    cluster: str | None = None
    node: str | None = None

    def origin_of(self, address: PciAddress) -> FunctionOrigin:
        """Where one of its functions came from; raises KeyError."""
        for origin in self.origins:
            if origin.address == address:
                return origin
        raise KeyError(address)


@dataclass(frozen=True, slots=True)
class Fence:
    """A GPU that is to be lent to nobody, and why; of that card only, not of its slot.

    ``since`` is UTC, as ISO 8601 has it."""

    gpu: PciAddress
    identity: Identity
    reason: str
    since: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Records:
    """What gpupt keeps of a host's GPUs: loans, fences, and those that a udev rule of its own
    takes again at boot."""

    loans: Mapping[PciAddress, Loan] = field(default_factory=dict)
    fences: Mapping[PciAddress, Fence] = field(default_factory=dict)
    persistent: Collection[PciAddress] = ()


class Severity(StrEnum):
    FAIL = "fail"
    WARN = "warn"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """One diagnosis; ``id`` as in docs/doctor.md; ``subject`` an address, node or path."""

    id: str
    severity: Severity
    subject: str
    brief: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""
