"""What was asked, got no answer, and fails no check of its own; pure.

A driver that hangs or crashes over a question is not well, whatever the question was.
"""

from __future__ import annotations

from dataclasses import replace

from gpupt.decide.health_case import silent, unread
from gpupt.model.health import (
    CheckResult,
    DriverReading,
    GpuHealth,
    GpuReading,
    HealthReport,
    Library,
    Silence,
    Verdict,
)
from gpupt.model.kernellog import KernelLog

STUCK = (Silence.TIMEOUT, Silence.CRASHED)
BROKEN = (Library.TIMEOUT, Library.CRASHED)
LOOK = "journalctl -k -b -g NVRM; systemctl reboot if it stays"
# A log that somebody could read; one that is not there at all says so in each check.
UNREAD = (Silence.DENIED, Silence.TIMEOUT, Silence.ERROR)


def with_unsaid(report: HealthReport, driver: DriverReading, *, log: KernelLog) -> HealthReport:
    """The report with what no check of it says."""
    readings = {reading.address: reading for reading in driver.gpus}
    return replace(
        report,
        gpus=tuple(with_stuck(gpu, readings.get(gpu.address)) for gpu in report.gpus),
        machine=(*(of_library(check, driver) for check in report.machine), *of_log(report, log)),
    )


def with_stuck(gpu: GpuHealth, reading: GpuReading | None) -> GpuHealth:
    """The card with a check that fails, where its driver got stuck and no other check says so."""
    said = set() if reading is None else set(reading.silent.values())
    why = next((each for each in STUCK if each in said), None)
    if why is None or gpu.status is Verdict.FAIL:
        return gpu
    return replace(gpu, checks=(*gpu.checks, silent("nvml", why, gpu.address)))


def of_library(check: CheckResult, driver: DriverReading) -> CheckResult:
    """The check of NVIDIA's library: it fails where a question got stuck, and warns where the
    whole of it did, though no card needs it now."""
    if check.id != "nvml":
        return check
    if driver.library in BROKEN and check.status is Verdict.UNSUPPORTED:
        return replace(check, status=Verdict.WARN, value=str(driver.library), remedy=LOOK)
    if driver.library is Library.ANSWERED and any(f": {why}" in driver.details for why in STUCK):
        brief = f"NVML answers in part: {driver.details}"
        return replace(check, status=Verdict.FAIL, brief=brief, remedy=LOOK)
    return check


def of_log(report: HealthReport, log: KernelLog) -> tuple[CheckResult, ...]:
    """A warning where the kernel's log could not be read: its checks of every card are none."""
    found = unread(log, "kernel_log")
    if found is None or log.silent not in UNREAD or not report.gpus:
        return ()
    return (replace(found, status=Verdict.WARN),)
