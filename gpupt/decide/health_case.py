"""What the checks of one card are given, and what they say of a question without an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from gpupt.decide.xid import reset_command
from gpupt.model.gpus import AMD
from gpupt.model.health import (
    CheckResult,
    DriverReading,
    GpuReading,
    PciErrors,
    Silence,
    Verdict,
)
from gpupt.model.healthrules import Expectations, Thresholds
from gpupt.model.host import Gpu, Host
from gpupt.model.kernellog import Event, KernelLog
from gpupt.model.pci import PciAddress, PciDevice

DIAGNOSE = "dcgmi diag -r 3"
REPLACE = "nvidia-bug-report.sh, and have the maker replace the card"
REBOOT = "systemctl reboot"
AMD_LOG = "journalctl -k -b -g amdgpu"


@dataclass(frozen=True, slots=True)
class Case:
    """One card: what sysfs, the driver and the kernel's log say of it, and the measure.

    No ``reading``: its driver was not asked for it, and ``unasked`` says why.  ``port`` is the
    port above it where that is known; ``lost`` are functions of the card that read all ones,
    ``locked`` that the kernel holds one in an unbind or a reset; ``pci_errors`` are what the
    kernel counted at each of the card's functions and at the port above.
    """

    gpu: Gpu
    reading: GpuReading | None
    unasked: str
    log: KernelLog
    events: tuple[Event, ...]
    limits: Thresholds
    wanted: Expectations
    lending: bool
    port: PciDevice | None = None
    lost: tuple[PciAddress, ...] = ()
    locked: bool = False
    # Whether NVML was asked at all: of a recorded machine it cannot be.
    asked: bool = True
    pci_errors: Mapping[PciAddress, PciErrors] = field(default_factory=dict)

    @property
    def address(self) -> PciAddress:
        return self.gpu.address

    @property
    def amd(self) -> bool:
        return self.gpu.device.id.vendor == AMD

    @property
    def reset(self) -> str:
        """What resets the card, once nothing uses it."""
        return REBOOT if self.amd else f"end what uses it; {reset_command(self.address)}"

    @property
    def diagnose(self) -> str:
        return "amd-smi bad-pages; rvs" if self.amd else DIAGNOSE

    @property
    def replace(self) -> str:
        return "have the maker replace the card" if self.amd else REPLACE

    def remedy_for(self, silence: Silence) -> str:
        """What helps a card, or its driver, that does not answer."""
        if not self.amd:
            return remedy_for(silence, self.address)
        if silence is Silence.UNSUPPORTED:
            return ""
        return "run as root" if silence is Silence.DENIED else f"{AMD_LOG}; {REBOOT} if it stays"


@dataclass(frozen=True, slots=True)
class Machine:
    """All of a machine, for the checks that are of no card."""

    host: Host
    driver: DriverReading
    log: KernelLog
    events: tuple[Event, ...]
    wanted: Expectations


CardCheck = Callable[[Case], CheckResult | None]
MachineCheck = Callable[[Machine], CheckResult | None]

_BRIEFS: Mapping[Silence, str] = {
    Silence.DENIED: "the driver may not be asked by this user",
    Silence.LOST: "the card is lost to its driver",
    Silence.NEEDS_RESET: "the card answers after a reset only",
    Silence.TIMEOUT: "the driver did not answer in time",
    Silence.CRASHED: "NVIDIA's library crashed over this question",
    Silence.ERROR: "the driver answered with an error",
}


def why_silent(reading: GpuReading, name: str) -> Silence:
    """Why a field was not answered; no word at all about it is an error, not a pass."""
    return reading.silent.get(name) or reading.silent.get("handle") or Silence.ERROR


def remedy_for(silence: Silence, address: PciAddress) -> str:
    """What helps a card, or its driver, that does not answer."""
    return {
        Silence.UNSUPPORTED: "",
        Silence.DENIED: "run as root",
        Silence.LOST: "power the machine off and on again; a warm reboot is often not enough",
        Silence.NEEDS_RESET: f"end what uses it; {reset_command(address)}",
        Silence.TIMEOUT: "journalctl -k -b -g Xid; systemctl reboot if it stays",
        Silence.CRASHED: "install the library of the driver's own version "
        "(cat /proc/driver/nvidia/version)",
        Silence.ERROR: f"nvidia-smi -q -i {address}; journalctl -k -b -g NVRM",
    }[silence]


def silent(check: str, silence: Silence, address: PciAddress) -> CheckResult:
    """The result where there was no answer: it fails, unless the question is not supported."""
    if silence is Silence.UNSUPPORTED:
        return unsupported(check, "this card or its driver does not tell")
    return CheckResult(
        check, Verdict.FAIL, _BRIEFS[silence], value=str(silence),
        remedy=remedy_for(silence, address),
    )  # fmt: skip


def unsupported(check: str, why: str) -> CheckResult:
    """The result of a check that cannot be made."""
    return CheckResult(check, Verdict.UNSUPPORTED, why)


def unanswered(case: Case, check: str, *names: str, every: bool = True) -> CheckResult | None:
    """The result where fields of the reading are not there; None where they are enough.

    A field that should have been answered and was not fails the check.  Of fields that are not
    supported, with ``every`` none may be among them, and without it one may not be.
    """
    reading = case.reading
    if reading is None:
        return unsupported(check, case.unasked)
    missing = [name for name in names if getattr(reading, name) is None]
    for name in missing:
        why = why_silent(reading, name)
        if why is not Silence.UNSUPPORTED:
            found = silent(check, why, case.address)
            return replace(found, remedy=case.remedy_for(why))
    if missing and (every or len(missing) == len(names)):
        return silent(check, Silence.UNSUPPORTED, case.address)
    return None


def unread(log: KernelLog, check: str) -> CheckResult | None:
    """The result where the kernel's log could not be read; None where it was."""
    if log.silent is None:
        return None
    denied = log.silent is Silence.DENIED
    return CheckResult(
        check,
        Verdict.UNSUPPORTED,
        f"the kernel's log of this boot was not read: {log.details}",
        value=str(log.silent),
        remedy="run as root, or as a member of the group systemd-journal"
        if denied
        else "journalctl -k -b",
    )
