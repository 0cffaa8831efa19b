"""Checks of a card's driver, of its presence, and of how it is set up and used."""

from __future__ import annotations

from gpupt.decide.health_case import Case, silent, unanswered, unsupported, why_silent
from gpupt.decide.xid import Recovery, reset_command, verdict_of, way_of
from gpupt.model.gpus import NVIDIA
from gpupt.model.health import CheckResult, Modes, Silence, Verdict

NVIDIA_DRIVER = "nvidia"
AMD_DRIVER = "amdgpu"
TOLD_BY_AMDGPU = ("temperature", "power_limit", "memory_total", "ecc_uncorrected")
# What the driver says of a card that no longer works; any other silence is the driver's own.
GONE = (Silence.LOST, Silence.NEEDS_RESET)


def on_nvidia(case: Case) -> bool:
    """Whether NVIDIA's own driver has the card, so that NVML is to know it."""
    device = case.gpu.device
    # A virtual function serves a guest's vGPU: NVML lists the card that it is of.
    whole = device.physfn is None
    return whole and device.id.vendor == NVIDIA and device.binding.driver == NVIDIA_DRIVER


def driver(case: Case) -> CheckResult | None:
    """Who drives the card, and whether NVML answers for it if it is to."""
    check, name = "driver", case.gpu.device.binding.driver
    if on_nvidia(case) and case.asked and case.reading is None:
        return CheckResult(
            check, Verdict.FAIL, case.unasked, value=name,
            remedy=f"nvidia-smi -i {case.address}; journalctl -k -b -g NVRM",
        )  # fmt: skip
    if on_nvidia(case) and case.asked:
        return CheckResult(check, Verdict.OK, "on NVIDIA's driver, and NVML knows it", value=name)
    if case.amd and case.reading is not None:
        if any(getattr(case.reading, field) is not None for field in TOLD_BY_AMDGPU):
            return CheckResult(check, Verdict.OK, "on AMD's driver, which tells of it", value=name)
        return unsupported(check, "on AMD's driver, which tells nothing of it")
    if name is None and case.gpu.device.physfn is not None:
        # Ready for a guest: on the host it needs none.
        return CheckResult(check, Verdict.UNSUPPORTED, case.unasked, value="none")
    if name is None:
        return CheckResult(
            check, Verdict.WARN, case.unasked, value="none",
            remedy=f"gpupt attach {case.address}, or gpupt detach {case.address} for guests",
        )  # fmt: skip
    return CheckResult(check, Verdict.UNSUPPORTED, case.unasked, value=name)


def gpu_lost(case: Case) -> CheckResult | None:
    """The card does not answer: by sysfs, and by its driver."""
    check = "gpu_lost"
    remedy = "systemctl poweroff, and power it on again: a warm reboot is often not enough"
    if case.lost:
        named = ", ".join(str(address) for address in case.lost)
        return CheckResult(
            check, Verdict.FAIL, f"config space reads all ones: {named}", value="lost",
            remedy=remedy, number=1,
        )  # fmt: skip
    if case.locked:
        return CheckResult(
            check, Verdict.FAIL, "the kernel keeps it locked: an unbind or a reset did not end",
            value="locked", remedy="gpupt doctor names what holds it; a reboot may be needed",
            number=1,
        )  # fmt: skip
    reading = case.reading
    if reading is not None:
        said = set(reading.silent.values())
        for why in GONE:
            if why in said:
                return silent(check, why, case.address)
    return CheckResult(check, Verdict.OK, "the card answers", value="present", number=0)


def nvml(case: Case) -> CheckResult | None:
    """NVML has no hold of the card at all: said once, and no question of NVML's is judged.

    No check of a card that answers, or of one that is lost: gpu_lost speaks of that.
    """
    reading = case.reading
    if reading is None or "handle" not in reading.silent:
        return None
    why = why_silent(reading, "handle")
    return None if why in GONE else silent("nvml", why, case.address)


def recovery_action(case: Case) -> CheckResult | None:
    """What the driver itself advises to do with the card."""
    check = "recovery_action"
    advice = case.reading.recovery_action if case.reading is not None else None
    if advice is None:
        return unanswered(case, check, "recovery_action")
    known = advice in set(Recovery)
    words = Recovery(advice).name.lower().replace("_", " ") if known else "not known"
    return CheckResult(
        check,
        verdict_of(advice),
        "the driver asks for nothing" if advice == 0 else f"the driver advises: {words}",
        value=f"{advice} ({words})",
        threshold="0 (none)",
        remedy=way_of(advice, case.address),
        number=advice,
    )


def inforom(case: Case) -> CheckResult | None:
    """The card's own record of itself."""
    check = "inforom"
    valid = case.reading.inforom_valid if case.reading is not None else None
    if valid is None:
        return unanswered(case, check, "inforom_valid")
    return CheckResult(
        check,
        Verdict.OK if valid else Verdict.WARN,
        "its inforom is valid" if valid else "its inforom is corrupt",
        value="valid" if valid else "corrupt",
        threshold="valid",
        remedy="" if valid else "nvidia-bug-report.sh; update the card's firmware",
    )


def processes(case: Case) -> CheckResult | None:
    """Who works on a card that is to be lent."""
    check = "processes"
    if not case.lending:
        return None
    found = case.reading.processes if case.reading is not None else None
    if found is None:
        return unanswered(case, check, "processes")
    pids = " ".join(str(pid) for pid in sorted({each.pid for each in found}))
    return CheckResult(
        check,
        Verdict.FAIL if found else Verdict.OK,
        f"processes use it: {pids}" if found else "no process uses it",
        value=f"{len(found)} processes",
        threshold="0 processes",
        remedy=f"kill {pids}" if found else "",
        number=len(found),
        unit="processes",
    )


def has_none(case: Case, mode: str) -> bool:
    """Whether the card itself says that it has no such mode: it is off then."""
    reading = case.reading
    return reading is not None and why_silent(reading, mode) is Silence.UNSUPPORTED


def mig_mode(case: Case) -> CheckResult | None:
    """Whether MIG is as its owner wants it, now and after the next reset."""
    check, wanted = "mig_mode", case.wanted.mig
    if wanted is None:
        return None
    mode = case.reading.mig if case.reading is not None else None
    if mode is None:
        if not has_none(case, "mig"):
            return unanswered(case, check, "mig")
        mode = Modes(current=False, pending=False)
    words = {True: "on", False: "off"}
    command = f"nvidia-smi -i {case.address} -mig {int(wanted)}"
    verdict, brief, remedy = Verdict.OK, f"MIG is {words[mode.current]}", ""
    if mode.current != wanted:
        verdict = Verdict.FAIL
        pending = mode.pending == wanted
        remedy = reset_command(case.address) if pending else command
    elif mode.pending != wanted:
        verdict, remedy = Verdict.WARN, command
        brief = f"{brief}, and {words[mode.pending]} after the next reset"
    return CheckResult(
        check, verdict, brief, value=words[mode.current], threshold=words[wanted], remedy=remedy
    )


def cc_state(case: Case) -> CheckResult | None:
    """Whether confidential computing is as its owner wants it."""
    check, wanted = "cc_state", case.wanted.confidential
    if wanted is None:
        return None
    found = case.reading.confidential if case.reading is not None else None
    if found is None:
        if not has_none(case, "confidential"):
            return unanswered(case, check, "confidential")
        found = False
    words = {True: "on", False: "off"}
    return CheckResult(
        check,
        Verdict.OK if found == wanted else Verdict.FAIL,
        f"confidential computing is {words[found]}",
        value=words[found],
        threshold=words[wanted],
        remedy=""
        if found == wanted
        else f"nvidia_gpu_tools.py --gpu-bdf={case.address} --set-cc-mode={words[wanted]} "
        "--reset-after-cc-mode-switch",
    )
