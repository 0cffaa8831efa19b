"""The kernel's log of one boot: its lines, and the events in them that are worth a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpupt.model.health import Silence
from gpupt.model.pci import PciAddress


@dataclass(frozen=True, slots=True)
class LogLine:
    """One message of the kernel; ``seconds`` since the boot."""

    message: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class KernelLog:
    """The kernel's messages of this boot, oldest first, and where they were read.

    ``silent`` says why there are none to be had (a log without lines is not silent);
    ``details`` is what was seen.  Not ``whole``: the oldest lines are gone.
    """

    lines: tuple[LogLine, ...] = ()
    boot_id: str | None = None
    source: str | None = None
    whole: bool = True
    silent: Silence | None = None
    details: str = ""


@dataclass(frozen=True, slots=True)
class XidEvent:
    """An error that NVIDIA's driver reports of a card; ``process`` is whose work it ended."""

    address: PciAddress
    xid: int
    message: str
    seconds: float | None = None
    boot_id: str | None = None
    process: str | None = None


@dataclass(frozen=True, slots=True)
class SxidEvent:
    """An error of an NVSwitch; ``fatal`` None: the line does not say."""

    address: PciAddress
    sxid: int
    message: str
    fatal: bool | None = None
    seconds: float | None = None
    boot_id: str | None = None


class AerSeverity(StrEnum):
    """How bad a PCIe error is (PCI Express Base Specification, 6.2)."""

    CORRECTED = "corrected"
    NONFATAL = "nonfatal"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class AerEvent:
    """A PCIe error that a function or a port reported."""

    address: PciAddress
    severity: AerSeverity
    message: str
    seconds: float | None = None
    boot_id: str | None = None


class CardTrouble(StrEnum):
    """What else a driver reports of a card."""

    INIT_FAILED = "init-failed"
    RESET_GIVEN_UP = "reset-given-up"
    GPU_RESET = "gpu-reset"
    GPU_RESET_FAILED = "gpu-reset-failed"
    RING_TIMEOUT = "ring-timeout"
    UNCORRECTABLE = "uncorrectable"


@dataclass(frozen=True, slots=True)
class CardEvent:
    """A line of a card that is neither an Xid nor a PCIe error."""

    address: PciAddress
    trouble: CardTrouble
    message: str
    seconds: float | None = None
    boot_id: str | None = None


Event = XidEvent | SxidEvent | AerEvent | CardEvent
