"""Checks of what a card runs at: clocks held back, temperature and power."""

from __future__ import annotations

from functools import reduce
from operator import and_

from gpupt.decide.health_case import Case, silent, unanswered
from gpupt.model.health import CheckResult, Silence, Verdict

# nvml.h, nvmlClocksEventReasons.
POWER_CAP = 0x4
HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
REASONS = {
    HW_THERMAL: "the card is too hot (hardware slowdown)",
    POWER_BRAKE: "the machine brakes its power",
    HW_SLOWDOWN: "the hardware slows it down",
    SW_THERMAL: "the driver slows it down: it is hot",
    POWER_CAP: "it is at its power limit",
}
FATAL = HW_SLOWDOWN | HW_THERMAL | POWER_BRAKE


def clock_events(case: Case) -> CheckResult | None:
    """Clocks are held back, by what is in every sample."""
    check = "clock_events"
    samples = case.reading.clock_events if case.reading is not None else None
    if not samples:
        # No sample at all is no answer.
        missing = unanswered(case, check, "clock_events")
        return missing or silent(check, Silence.ERROR, case.address)
    sustained = reduce(and_, samples)
    verdict = Verdict.OK
    remedy = ""
    if sustained & FATAL:
        verdict = Verdict.FAIL
    elif sustained & SW_THERMAL:
        verdict = Verdict.WARN
    held = [words for bit, words in REASONS.items() if sustained & bit]
    if verdict is not Verdict.OK:
        remedy = f"nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER -i {case.address}; then " + (
            "its power cables and the machine's supplies"
            if sustained & POWER_BRAKE
            else "fans and air flow"
        )
    return CheckResult(
        check,
        verdict,
        "; ".join(held) or "nothing holds its clocks back",
        value=" ".join(f"{sample:#x}" for sample in samples),
        threshold="0x8, 0x40, 0x80 in each fail; 0x20 warns",
        remedy=remedy,
        number=sustained,
    )


def temperature(case: Case) -> CheckResult | None:
    """How far the card is from slowing down."""
    check, reading = "temperature", case.reading
    margin = reading.temperature_margin if reading is not None else None
    if margin is None:
        told = unanswered(case, check, "temperature_margin")
        if told is not None and told.status is Verdict.FAIL:
            return told
        told = unanswered(case, check, "temperature", "temperature_slowdown")
        if reading is None or reading.temperature is None or reading.temperature_slowdown is None:
            return told
        margin = reading.temperature_slowdown - reading.temperature
    limits, verdict = case.limits, Verdict.OK
    if margin <= limits.margin_fail:
        verdict = Verdict.FAIL
    elif margin <= limits.margin_warn:
        verdict = Verdict.WARN
    now = reading.temperature if reading is not None else None
    return CheckResult(
        check,
        verdict,
        f"{margin} °C below its slowdown" + ("" if now is None else f", at {now} °C"),
        value=f"{margin} °C margin",
        threshold=f"{limits.margin_warn:g} °C warns; {limits.margin_fail:g} °C fails",
        remedy="" if verdict is Verdict.OK else f"fans and air flow; {show_heat(case)}",
        number=margin,
        unit="celsius",
    )


def show_heat(case: Case) -> str:
    """What prints the card's temperatures."""
    if case.amd:
        return f"grep . /sys/bus/pci/devices/{case.address}/hwmon/hwmon*/temp*_input"
    return f"nvidia-smi -q -d TEMPERATURE -i {case.address}"


def raise_limit(case: Case, watts: float) -> str:
    """What lets the card use that much again."""
    if case.amd:
        file = f"/sys/bus/pci/devices/{case.address}/hwmon/hwmon*/power1_cap"
        return f"echo {watts * 1e6:.0f} | tee {file}"
    return f"nvidia-smi -i {case.address} -pl {watts:g}"


def power_limit(case: Case) -> CheckResult | None:
    """The card may use less power than it is made for."""
    check, reading = "power_limit", case.reading
    if reading is None or reading.power_limit is None or reading.power_default is None:
        return unanswered(case, check, "power_limit", "power_default")
    limit, default = reading.power_limit, reading.power_default
    low = limit < default - case.limits.power_slack
    return CheckResult(
        check,
        Verdict.WARN if low else Verdict.OK,
        f"it may use {limit:g} W of {default:g} W",
        value=f"{limit:g} W",
        threshold=f"{default:g} W",
        remedy=raise_limit(case, default) if low else "",
        number=limit,
        unit="watts",
    )
