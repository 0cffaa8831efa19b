"""Checks of what the kernel's log of this boot says: Xids, PCIe errors, and other lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gpupt.decide.health_case import DIAGNOSE, REPLACE, Case, Machine, unread, unsupported
from gpupt.decide.health_link import FABRIC_MANAGER, RESEAT
from gpupt.decide.xid import weigh
from gpupt.model.gpus import NVIDIA
from gpupt.model.health import CheckResult, PciErrors, Verdict
from gpupt.model.host import Gpu
from gpupt.model.kernellog import (
    AerEvent,
    AerSeverity,
    CardEvent,
    CardTrouble,
    Event,
    KernelLog,
    SxidEvent,
    XidEvent,
)
from gpupt.model.pci import PciAddress

ORDER = (Verdict.FAIL, Verdict.WARN, Verdict.OK)
# The fabric manager's guide: a switch says so whenever a GPU is reset, and it is to be ignored.
HARMLESS_SXIDS = frozenset({22013})


def events_of_card(
    gpu: Gpu, events: Iterable[Event], *, port: PciAddress | None = None
) -> tuple[Event, ...]:
    """The events of a card: of its functions, of the port above it, and Xids of its slot.

    An Xid does not name a function; a virtual function shares its card's slot, and not these.
    """
    functions = {gpu.address, *gpu.companions}
    found = []
    for event in events:
        if isinstance(event, XidEvent):
            whole = gpu.device.physfn is None and event.address.slot == gpu.address.slot
            mine = whole or event.address == gpu.address
        elif isinstance(event, AerEvent):
            mine = event.address in functions or event.address == port
        else:
            mine = isinstance(event, CardEvent) and event.address in functions
        if mine:
            found.append(event)
    return tuple(found)


def since(log: KernelLog) -> str:
    """Which part of the boot a log without events speaks of."""
    return "in this boot" if log.whole else "in what the log still holds of this boot"


def xid(case: Case) -> CheckResult | None:
    """The worst of the card's Xids, by the driver's own advice and then by the catalogue."""
    check = "xid"
    if case.gpu.device.id.vendor != NVIDIA:
        return unsupported(check, "Xids are of NVIDIA's driver")
    missing = unread(case.log, check)
    if missing is not None:
        return missing
    found = [event for event in case.events if isinstance(event, XidEvent)]
    if not found:
        return CheckResult(
            check, Verdict.OK, f"no Xid {since(case.log)}", value="none", threshold="none",
            number=0,
        )  # fmt: skip
    advice = case.reading.recovery_action if case.reading is not None else None
    weighed = weigh(found, advice=advice)
    # The worst, and of these the latest: its message is what is shown.
    worst = min(reversed(weighed), key=lambda each: ORDER.index(each.verdict))
    event = worst.event
    whose = f", {event.process}" if event.process else ""
    return CheckResult(
        check,
        worst.verdict,
        f"Xid {event.xid}{whose}: {event.message or 'no message'}; {worst.action}",
        value=counted(str(each.xid) for each in found),
        threshold="none",
        remedy=worst.remedy,
        number=event.xid,
    )


def counted(names: Iterable[str]) -> str:
    """``79, 31 ×4``: what there was, in the order of its coming."""
    return ", ".join(
        name if count == 1 else f"{name} ×{count}" for name, count in Counter(names).items()
    )


def aer(case: Case) -> CheckResult | None:
    """PCIe errors of the card's functions and of the port above it.

    The kernel leaves lines out of its log when there are many, and counts all of them; a
    function that counts none may be in the log all the same.
    """
    check, counted = "aer", case.pci_errors
    found = [event for event in case.events if isinstance(event, AerEvent)]
    logged = Counter((event.address, event.severity) for event in found)
    count = {
        severity: sum(
            max(logged[address, severity], of_severity(counted.get(address), severity))
            for address in {*counted, *(event.address for event in found)}
        )
        for severity in AerSeverity
    }
    missing = unread(case.log, check)
    # Counters that are zero may be so because nobody counts (a firmware that handles errors).
    if missing is not None and not any(count.values()):
        return missing
    corrected = count[AerSeverity.CORRECTED]
    when = "since it was found" if counted else since(case.log)
    verdict, brief = Verdict.OK, f"{corrected} corrected PCIe errors {when}"
    if count[AerSeverity.FATAL]:
        verdict, brief = Verdict.FAIL, "fatal PCIe errors: the link was reset"
    elif count[AerSeverity.NONFATAL]:
        verdict, brief = Verdict.WARN, "uncorrected PCIe errors: requests of the card were lost"
    elif corrected >= case.limits.aer_corrected_warn:
        verdict, brief = Verdict.WARN, "many corrected PCIe errors"
    return CheckResult(
        check,
        verdict,
        brief,
        value=", ".join(f"{count[each]} {each}" for each in reversed(AerSeverity)),
        threshold=f"0 fatal; 0 nonfatal, {case.limits.aer_corrected_warn:g} corrected warn",
        remedy="" if verdict is Verdict.OK else f"journalctl -k -b -g 'PCIe Bus Error'; {RESEAT}",
        number=sum(count.values()),
        unit="errors",
    )


def of_severity(errors: PciErrors | None, severity: AerSeverity) -> int:
    """How many the kernel counted."""
    if errors is None:
        return 0
    return {
        AerSeverity.CORRECTED: errors.corrected,
        AerSeverity.NONFATAL: errors.nonfatal,
        AerSeverity.FATAL: errors.fatal,
    }[severity]


_TROUBLES: Mapping[CardTrouble, tuple[Verdict, str, str]] = {
    CardTrouble.UNCORRECTABLE: (Verdict.FAIL, "uncorrectable errors", REPLACE),
    CardTrouble.RESET_GIVEN_UP: (
        Verdict.FAIL,
        "it did not come back from a reset",
        "systemctl poweroff, and power it on again",
    ),
    CardTrouble.GPU_RESET_FAILED: (
        Verdict.FAIL,
        "its driver could not reset it",
        "systemctl poweroff, and power it on again",
    ),
    CardTrouble.INIT_FAILED: (
        Verdict.FAIL,
        "its driver could not start it",
        "systemctl reboot; journalctl -k -b -g NVRM",
    ),
    CardTrouble.GPU_RESET: (Verdict.WARN, "its driver had to reset it", "journalctl -k -b -g gpu"),
    CardTrouble.RING_TIMEOUT: (Verdict.WARN, "work on it hung", "journalctl -k -b -g ring"),
}


def kernel_log(case: Case) -> CheckResult | None:
    """Lines of the card's drivers that are neither Xids nor PCIe errors."""
    check = "kernel_log"
    missing = unread(case.log, check)
    if missing is not None:
        return missing
    found = [event for event in case.events if isinstance(event, CardEvent)]
    if not found:
        return CheckResult(
            check, Verdict.OK, f"no line of trouble {since(case.log)}", value="none",
            threshold="none", number=0,
        )  # fmt: skip
    verdict, brief, remedy = min(
        (weigh_trouble(event, case) for event in found), key=lambda each: ORDER.index(each[0])
    )
    return CheckResult(
        check,
        verdict,
        brief,
        value=counted(str(event.trouble) for event in found),
        threshold="none",
        remedy=remedy,
        number=len(found),
        unit="lines",
    )


def weigh_trouble(event: CardEvent, case: Case) -> tuple[Verdict, str, str]:
    """What a line makes of the card: a start that failed is past once NVML answers for it."""
    verdict, words, remedy = _TROUBLES[event.trouble]
    if remedy == REPLACE:
        remedy = case.replace
    past = case.reading is not None and "handle" not in case.reading.silent
    if event.trouble is CardTrouble.INIT_FAILED and past:
        verdict, words = Verdict.WARN, f"{words} at first"
    return verdict, f"{words}: {event.message}", remedy


def sxid(machine: Machine) -> CheckResult | None:
    """The worst errors of the machine's NVSwitches; no check where it has none."""
    check = "sxid"
    found = [event for event in machine.events if isinstance(event, SxidEvent)]
    switches = [
        device
        for device in machine.host.devices.values()
        if device.id.vendor == NVIDIA and device.class_code >> 8 == 0x0680
    ]
    if not found and not switches:
        return None
    missing = unread(machine.log, check)
    if missing is not None:
        return missing
    if not found:
        return CheckResult(
            check, Verdict.OK, f"no SXid {since(machine.log)}", value="none", threshold="none",
            number=0,
        )  # fmt: skip
    worst = min(reversed(found), key=lambda event: ORDER.index(verdict_of_sxid(event)))
    verdict = verdict_of_sxid(worst)
    remedy = {
        Verdict.FAIL: f"end what uses the GPUs; {FABRIC_MANAGER}; systemctl reboot if it stays",
        Verdict.WARN: f"journalctl -k -b -g SXid; {DIAGNOSE}",
    }.get(verdict, "")
    return CheckResult(
        check,
        verdict,
        f"NVSwitch {worst.address}: SXid {worst.sxid}: {worst.message}",
        value=by_switch(found),
        threshold="none",
        remedy=remedy,
        number=worst.sxid,
    )


def verdict_of_sxid(event: SxidEvent) -> Verdict:
    """Fatal ones fail; others warn, also one whose line does not say."""
    if event.fatal:
        return Verdict.FAIL
    return Verdict.OK if event.sxid in HARMLESS_SXIDS else Verdict.WARN


def by_switch(found: Sequence[SxidEvent]) -> str:
    """The numbers, switch for switch."""
    switches = dict.fromkeys(event.address for event in found)
    return "; ".join(
        f"{address}: {counted(str(event.sxid) for event in found if event.address == address)}"
        for address in switches
    )
