"""Checks that are of no card: how many there are, NVIDIA's library, and mixed versions."""

from __future__ import annotations

from collections.abc import Iterator

from gpupt.decide.health_case import Machine, silent, unsupported, why_silent
from gpupt.decide.health_log import counted
from gpupt.model.gpus import GPU_VENDORS, NVIDIA
from gpupt.model.health import CheckResult, GpuReading, Library, Silence, Verdict
from gpupt.model.kernellog import XidEvent

FIRMWARE = ("vbios", "inforom", "gsp")


def gpu_count(machine: Machine) -> CheckResult | None:
    """The GPUs that answer, against those expected and those that the log speaks of.

    Cards of GPU vendors count; a management controller's display and virtual functions do not.
    No check where nothing is expected and none of the log's is gone.
    """
    check = "gpu_count"
    there = [
        gpu
        for gpu in machine.host.gpus
        if gpu.device.id.vendor in GPU_VENDORS and gpu.device.physfn is None and not gpu.device.lost
    ]
    slots = {address.slot for address in machine.host.devices}
    gone = dict.fromkeys(
        str(event.address)
        for event in machine.events
        if isinstance(event, XidEvent) and event.address.slot not in slots
    )
    expected = machine.wanted.count
    if expected is None and not gone:
        return None
    wrong = expected is not None and len(there) != expected
    brief = f"{len(there)} GPUs answer" + (
        f"; the kernel's log speaks of {', '.join(gone)}, which is gone" if gone else ""
    )
    return CheckResult(
        check,
        Verdict.FAIL if wrong or gone else Verdict.OK,
        brief,
        value=f"{len(there)} GPUs",
        threshold=None if expected is None else f"{expected} GPUs",
        remedy="systemctl poweroff, reseat the cards, and power it on again"
        if wrong or gone
        else "",
        number=len(there),
        unit="gpus",
    )


_REMEDIES = {
    # The card came to the driver since: a second look asks.
    Library.UNASKED: "gpupt health, on the machine itself",
    Library.ABSENT: "install NVIDIA's libraries of the driver's version "
    "(Debian: apt install nvidia-smi libnvidia-ml1)",
    Library.MISMATCH: "end what uses the GPUs; "
    "modprobe -r nvidia_uvm nvidia_drm nvidia_modeset nvidia; modprobe nvidia; or "
    "systemctl reboot",
    Library.NO_DRIVER: "modprobe nvidia; journalctl -k -b -g NVRM",
    Library.DENIED: "run as root",
    Library.TIMEOUT: "journalctl -k -b -g Xid; systemctl reboot if it stays",
    Library.CRASHED: "install the library of the driver's own version "
    "(cat /proc/driver/nvidia/version)",
    Library.ERROR: "nvidia-smi; journalctl -k -b -g NVRM",
}


def nvml(machine: Machine) -> CheckResult | None:
    """NVIDIA's management library as a whole, where a card is on NVIDIA's driver."""
    check, driver = "nvml", machine.driver
    if driver.library is Library.ANSWERED:
        brief = f"NVML answers: {driver.details or 'driver ' + (driver.driver or 'not told')}"
        return CheckResult(check, Verdict.OK, brief, value=driver.driver)
    in_need = [
        gpu
        for gpu in machine.host.gpus
        if gpu.device.id.vendor == NVIDIA and gpu.device.binding.driver == "nvidia"
    ]
    if driver.library is Library.UNASKED and not in_need:
        return unsupported(check, f"NVML was not asked: {driver.details}")
    if driver.library is Library.UNASKED:
        # Of a recorded machine: what sysfs says of a card is little of its health.
        return CheckResult(
            check,
            Verdict.WARN,
            f"NVML was not asked ({driver.details}): {len(in_need)} cards are hardly judged",
            value=str(driver.library),
            threshold=str(Library.ANSWERED),
            remedy=_REMEDIES[driver.library],
        )
    words = f"NVML is {driver.library}" + (f": {driver.details}" if driver.details else "")
    if not in_need:
        return unsupported(check, f"no card is on NVIDIA's driver; {words}")
    return CheckResult(
        check,
        Verdict.FAIL,
        f"{words}, and {len(in_need)} cards are on NVIDIA's driver",
        value=str(driver.library),
        threshold=str(Library.ANSWERED),
        remedy=_REMEDIES[driver.library],
    )


def versions(machine: Machine) -> CheckResult | None:
    """Cards of one model with different firmware, or with another GSP than the driver's."""
    check = "versions"
    if not machine.driver.gpus:
        return unsupported(check, "NVML told no version of any card")
    for reading in machine.driver.gpus:
        # A card that answers nothing fails by itself.
        asked = [] if "handle" in reading.silent else FIRMWARE
        for field in asked:
            why = why_silent(reading, field)
            if getattr(reading, field) is None and why is not Silence.UNSUPPORTED:
                return silent(check, why, reading.address)
    found = tuple(mixed(machine))
    return CheckResult(
        check,
        Verdict.WARN if found else Verdict.OK,
        "; ".join(found) if found else "cards of one model have the same firmware",
        value=machine.driver.driver,
        remedy="update the firmware of those that are behind; nvidia-smi -q | grep -i version"
        if found
        else "",
        number=len(found),
    )


def mixed(machine: Machine) -> Iterator[str]:
    """What differs, in words.  A model is a name on boards of the same ids."""
    models: dict[tuple[str, str], list[GpuReading]] = {}
    for reading in machine.driver.gpus:
        device = machine.host.devices.get(reading.address)
        if reading.name is not None and device is not None:
            board = f"{device.id} {device.subsystem}"
            models.setdefault((reading.name, board), []).append(reading)
    for (name, _), readings in models.items():
        for field in FIRMWARE:
            told = [value for each in readings if (value := getattr(each, field)) is not None]
            if len(set(told)) > 1:
                yield f"{field} of {name}: {counted(told)}"
    driver = machine.driver.driver
    others = [each.gsp for each in machine.driver.gpus if each.gsp and each.gsp != driver]
    if driver is not None and others:
        yield f"GSP firmware {counted(others)} with driver {driver}"
