"""GPU health: what a card answered, what each check made of it, and the verdict of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gpupt.model.pci import PciAddress


class Verdict(StrEnum):
    """What a check says (CONTRACT: the ``status`` of ``health --json``)."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"


class Silence(StrEnum):
    """Why a question to the driver was not answered; none of these is ever a zero."""

    UNSUPPORTED = "unsupported"
    DENIED = "denied"
    LOST = "lost"
    NEEDS_RESET = "needs-reset"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    ERROR = "error"


class Library(StrEnum):
    """What became of NVIDIA's management library as a whole; UNASKED: it was not
    to be asked, or there was no reason to."""

    UNASKED = "unasked"
    ANSWERED = "answered"
    ABSENT = "absent"
    MISMATCH = "mismatch"
    NO_DRIVER = "no-driver"
    DENIED = "denied"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class RemappedRows:
    """Rows of memory that were remapped (Ampere and later)."""

    correctable: int
    uncorrectable: int
    pending: bool
    failure: bool


@dataclass(frozen=True, slots=True)
class RetiredPages:
    """Pages of memory that were retired (before Ampere), by cause."""

    single_bit: int
    double_bit: int
    pending: bool


@dataclass(frozen=True, slots=True)
class Modes:
    """A mode of the card now, and after its next reset."""

    current: bool
    pending: bool


@dataclass(frozen=True, slots=True)
class NvLink:
    """One NVLink: is it up, and its error counters by name."""

    number: int
    active: bool
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fabric:
    """The card's place in an NVSwitch fabric, in NVML's numbers (nvmlGpuFabricState_t)."""

    state: int
    status: int
    health_mask: int


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that the driver says uses the card."""

    pid: int
    kind: str


@dataclass(frozen=True, slots=True)
class PciErrors:
    """PCIe errors that a function told of since it was found, by what became of them."""

    corrected: int
    nonfatal: int
    fatal: int


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What a card's driver answered; None: not answered, and ``silent`` says why.

    NVIDIA's through NVML, AMD's in sysfs.  Temperatures in degrees Celsius, power in watts,
    memory in bytes, clocks in MHz, ``pcie_replays`` counted since the driver was loaded,
    ``clock_events`` NVML's bit mask.
    """

    address: PciAddress
    uuid: str | None = None
    name: str | None = None
    serial: str | None = None
    vbios: str | None = None
    inforom: str | None = None
    gsp: str | None = None
    recovery_action: int | None = None
    remapped: RemappedRows | None = None
    retired: RetiredPages | None = None
    unrepairable_memory: bool | None = None
    ecc: Modes | None = None
    ecc_uncorrected: int | None = None
    sram_exceeded: bool | None = None
    pcie_gen: int | None = None
    pcie_gen_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_replays: int | None = None
    # Two samples a moment apart: what is in both is sustained.
    clock_events: tuple[int, ...] | None = None
    temperature: int | None = None
    temperature_margin: int | None = None
    temperature_slowdown: int | None = None
    power: float | None = None
    power_limit: float | None = None
    power_default: float | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    utilization: int | None = None
    sm_clock: int | None = None
    nvlinks: tuple[NvLink, ...] | None = None
    fabric: Fabric | None = None
    processes: tuple[GpuProcess, ...] | None = None
    inforom_valid: bool | None = None
    mig: Modes | None = None
    confidential: bool | None = None
    # Field of this class → why it is None; an answer to none of the fields is under "handle".
    silent: Mapping[str, Silence] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DriverReading:
    """What the driver of a host or guest answered as a whole, and each card of its.

    ``library`` other than ANSWERED: no card was asked, and ``details`` says what was seen.
    """

    library: Library
    details: str = ""
    driver: str | None = None
    nvml: str | None = None
    gpus: tuple[GpuReading, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one card: ``value`` against ``threshold`` in words with units.

    ``number`` is the value for machines, in ``unit`` (performance data, Prometheus)."""

    id: str
    status: Verdict
    brief: str
    value: str | None = None
    threshold: str | None = None
    remedy: str = ""
    number: float | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """The checks of one card; ``driver`` is who drives it, as sysfs says."""

    address: PciAddress
    uuid: str | None
    name: str | None
    driver: str | None
    checks: tuple[CheckResult, ...]

    @property
    def status(self) -> Verdict:
        """The worst of its checks; UNSUPPORTED when none could be made."""
        return worst(check.status for check in self.checks)


@dataclass(frozen=True, slots=True)
class HealthReport:
    """Every card, and ``machine``: the checks that are of no card (count, driver, versions)."""

    gpus: tuple[GpuHealth, ...]
    machine: tuple[CheckResult, ...] = ()

    @property
    def status(self) -> Verdict:
        """The worst of all; UNSUPPORTED when nothing could be judged."""
        return worst(
            (*(gpu.status for gpu in self.gpus), *(check.status for check in self.machine))
        )


_ORDER = (Verdict.FAIL, Verdict.WARN, Verdict.OK)


def worst(statuses: Iterable[Verdict]) -> Verdict:
    """FAIL before WARN before OK; UNSUPPORTED only where there is nothing else."""
    found = set(statuses)
    return next((verdict for verdict in _ORDER if verdict in found), Verdict.UNSUPPORTED)
