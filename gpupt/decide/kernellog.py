"""Finds in the kernel's lines what is worth a verdict on a card; pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpupt.model.kernellog import (
    AerEvent,
    AerSeverity,
    CardEvent,
    CardTrouble,
    Event,
    KernelLog,
    LogLine,
    SxidEvent,
    XidEvent,
)
from gpupt.model.pci import PciAddress

FALLEN_OFF = 79
# All forms are held against the beginning of a message: what a device calls itself, or a process,
# is further back.
_SLOT = r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]"
_FUNCTION = rf"{_SLOT}\.[0-7]"
# As kernel_rc.c of NVIDIA's open driver prints it: no function, and on a card with MIG the GPU
# and compute instance after the address.  Drivers before 300 print no `PCI:`.
_XID = re.compile(
    rf"NVRM: Xid \((?:PCI:)?(?P<slot>{_SLOT})(?:\.[0-7])?(?: GPU-[^)]*)?\): (?P<xid>\d{{1,6}})"
    r"(?!\d)(?:, (?P<message>.*))?",
    re.I | re.S,
)
_PROCESS = re.compile(r"pid='?(?P<pid>\d+|<unknown>)'?(?:, name=(?P<name>[^,]*))?(?:, |$)")
_SXID = re.compile(
    rf"nvidia-nvswitch\d+: SXid \((?:PCI:)?(?P<address>{_FUNCTION})\): (?P<sxid>\d{{1,6}})"
    r"(?!\d),? ?(?P<message>.*)",
    re.I | re.S,
)
# After the line that says what happened, a switch prints two with its registers.
_SXID_REGISTERS = ("Data {", "Severity ")
# Three forms: `GPU 0000:01:00.0: GPU has fallen off the bus.`, `GPU at 0000:01:00.0 has …`, and
# one of three lines that begins `The NVIDIA GPU 0000:01:00.0`.
_FALLEN = re.compile(
    rf"NVRM: .*?GPU (?:at )?(?:PCI:)?(?P<slot>{_SLOT})\b.*fallen off the bus", re.I | re.S
)
# Linux called them corrected and uncorrected, and from 6.11 on correctable and uncorrectable.
_AER = re.compile(
    rf"\S+ (?P<address>{_FUNCTION}): (?:AER: )?PCIe Bus Error: severity="
    r"(?P<severity>Correct|Uncorrect)(?:ed|able)(?P<fatal> \(Fatal\))?",
    re.I,
)
# Where the firmware sees errors first (APEI), it is several lines: severity, then device.
_APEI_SEVERITY = re.compile(r"(?:\{\d+\})?\[Hardware Error\]:\s+Error \d+, type: (?P<severity>\w+)")
_APEI_DEVICE = re.compile(
    rf"(?:\{{\d+\}})?\[Hardware Error\]:\s+device_id: (?P<address>{_FUNCTION})", re.I
)
_APEI = {
    "corrected": AerSeverity.CORRECTED,
    "recoverable": AerSeverity.NONFATAL,
    "fatal": AerSeverity.FATAL,
}
_TROUBLES = (
    (CardTrouble.INIT_FAILED, rf"NVRM: GPU (?P<address>{_FUNCTION}): RmInitAdapter failed"),
    # pci_dev_wait and pci_power_up in drivers/pci/pci.c; the driver may be vfio-pci or any other.
    (
        CardTrouble.RESET_GIVEN_UP,
        rf"\S+ (?P<address>{_FUNCTION}): (?:not ready \d+ms after [^;]+; giving up"
        r"|Unable to change power state from \S+ to D0, device inaccessible)",
    ),
    (
        CardTrouble.GPU_RESET_FAILED,
        rf"amdgpu (?P<address>{_FUNCTION}): (?:amdgpu: )?"
        r"GPU (?:reset(?:\(\d+\))? failed|reset end with ret = -|recovery failed)",
    ),
    (
        CardTrouble.GPU_RESET,
        rf"amdgpu (?P<address>{_FUNCTION}): (?:amdgpu: )?GPU reset begin",
    ),
    (
        CardTrouble.RING_TIMEOUT,
        rf"amdgpu (?P<address>{_FUNCTION}): (?:amdgpu: )?(?:\[drm[^\]]*\]+ )?(?:\*ERROR\* )?"
        r"ring \S+ timeout",
    ),
    # A count of 0, or the word, is the driver's report that there are none.
    (
        CardTrouble.UNCORRECTABLE,
        rf"amdgpu (?P<address>{_FUNCTION}): (?!.*\b(?:0|no) (?:new )?uncorrectable)"
        r".*\buncorrectable hardware error",
    ),
)
_CARD = tuple((trouble, re.compile(form, re.I)) for trouble, form in _TROUBLES)


def events(log: KernelLog) -> tuple[Event, ...]:
    """What the log says of cards and switches, oldest first.

    A card that falls off the bus is Xid 79, also where the driver says so in words alone.
    """
    found: list[Event] = []
    fallen: set[PciAddress] = set()
    severity: AerSeverity | None = None
    for line in log.lines:
        said = _APEI_SEVERITY.match(line.message)
        if said is not None:
            severity = _APEI.get(said["severity"].lower())
        for event in events_of(line, log.boot_id, apei=severity):
            if isinstance(event, XidEvent) and event.xid == FALLEN_OFF:
                if event.address in fallen:
                    continue
                fallen.add(event.address)
            found.append(event)
    return tuple(found)


def events_of(line: LogLine, boot: str | None, *, apei: AerSeverity | None) -> Iterator[Event]:
    """The event in one line, if there is any; ``apei`` is the severity of the record that the
    line may be part of."""
    text, seconds = line.message, line.seconds
    if (found := _XID.match(text)) is not None:
        yield xid_of(found, line, boot)
    elif (found := _SXID.match(text)) is not None:
        message = found["message"].strip()
        if not message.startswith(_SXID_REGISTERS):
            # Of `Fatal, …` and `Non-fatal, …`; older drivers leave it out.
            word = message.partition(",")[0].lower()
            fatal = {"fatal": True, "non-fatal": False}.get(word)
            address = PciAddress.parse(found["address"])
            yield SxidEvent(address, int(found["sxid"]), message, fatal, seconds, boot)
    elif (found := _FALLEN.match(text)) is not None:
        yield XidEvent(slot(found["slot"]), FALLEN_OFF, flat(text), seconds, boot)
    elif (found := _AER.match(text)) is not None:
        if found["severity"].lower() == "correct":
            severity = AerSeverity.CORRECTED
        else:
            severity = AerSeverity.FATAL if found["fatal"] else AerSeverity.NONFATAL
        yield AerEvent(PciAddress.parse(found["address"]), severity, text, seconds, boot)
    elif (found := _APEI_DEVICE.match(text)) is not None:
        if apei is not None:
            yield AerEvent(PciAddress.parse(found["address"]), apei, text, seconds, boot)
    else:
        for trouble, form in _CARD:
            if (found := form.match(text)) is not None:
                yield CardEvent(
                    PciAddress.parse(found["address"]), trouble, flat(text), seconds, boot
                )
                return


def xid_of(found: re.Match[str], line: LogLine, boot: str | None) -> XidEvent:
    """The event of an Xid line: whose process it was is taken out of the message."""
    message = flat(found["message"] or "")
    whose = _PROCESS.match(message)
    process = None
    if whose is not None:
        message = message[whose.end() :]
        if whose["pid"].isdecimal():
            name = (whose["name"] or "").strip()
            known = name not in {"", "<unknown>"}
            process = f"{name} (PID {whose['pid']})" if known else f"PID {whose['pid']}"
    number = int(found["xid"])
    return XidEvent(slot(found["slot"]), number, message, line.seconds, boot, process)


def slot(text: str) -> PciAddress:
    """The address of a card that the driver names without its function: always the first."""
    return PciAddress.parse(f"{text}.0")


def flat(text: str) -> str:
    """A message of several lines in one."""
    return " ".join(text.split())
