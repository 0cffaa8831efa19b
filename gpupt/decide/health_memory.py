"""Checks of a card's memory: rows and pages taken out of use, ECC errors, and ECC's mode."""

from __future__ import annotations

import math

from gpupt.decide.health_case import DIAGNOSE, REPLACE, Case, unanswered
from gpupt.decide.xid import reset_command
from gpupt.model.health import CheckResult, Verdict
from gpupt.model.healthrules import Thresholds

# amdgpu_ras.c: one bad page in so many bytes is what is usual.
BAD_PAGE_COVER = 100 << 20


def remap_failure(case: Case) -> CheckResult | None:
    """A row could not be remapped, or memory cannot be repaired at all."""
    check, reading = "remap_failure", case.reading
    rows = reading.remapped if reading is not None else None
    if (rows is not None and rows.failure) or (reading and reading.unrepairable_memory):
        brief = (
            "a row of memory could not be remapped"
            if rows is not None and rows.failure
            else "memory of the card cannot be repaired"
        )
        return CheckResult(
            check, Verdict.FAIL, brief, value="yes", threshold="no", remedy=REPLACE, number=1
        )
    missing = unanswered(case, check, "remapped", "unrepairable_memory", every=False)
    return missing or CheckResult(
        check, Verdict.OK, "no row failed to be remapped", value="no", threshold="no", number=0
    )


def remap_pending(case: Case) -> CheckResult | None:
    """A row is remapped at the next reset, and bad until then."""
    check = "remap_pending"
    rows = case.reading.remapped if case.reading is not None else None
    if rows is None:
        return unanswered(case, check, "remapped")
    if not rows.pending:
        return CheckResult(
            check, Verdict.OK, "no row waits to be remapped", value="no", threshold="no", number=0
        )
    return CheckResult(
        check,
        Verdict.FAIL if case.lending else Verdict.WARN,
        "a row of memory waits for a reset to be remapped",
        value="yes",
        threshold="no",
        remedy=f"end what uses it; {reset_command(case.address)}",
        number=1,
    )


def remap_uncorrectable(case: Case) -> CheckResult | None:
    """Rows that were remapped for uncorrectable errors."""
    check = "remap_uncorrectable"
    rows = case.reading.remapped if case.reading is not None else None
    if rows is None:
        return unanswered(case, check, "remapped")
    count, most = rows.uncorrectable, case.limits.remap_uncorrectable_fail
    verdict = Verdict.OK
    if count:
        verdict = Verdict.FAIL if count >= most else Verdict.WARN
    return CheckResult(
        check,
        verdict,
        f"{count} rows were remapped for uncorrectable errors",
        value=f"{count} rows",
        threshold=f"0 rows; {most:g} fail",
        remedy={Verdict.OK: "", Verdict.WARN: DIAGNOSE, Verdict.FAIL: REPLACE}[verdict],
        number=count,
        unit="rows",
    )


def retired_pages(case: Case) -> CheckResult | None:
    """Pages of memory that are no longer used, before Ampere."""
    check, limits = "retired_pages", case.limits
    pages = case.reading.retired if case.reading is not None else None
    if pages is None:
        return unanswered(case, check, "retired")
    count = pages.single_bit + pages.double_bit
    warns, fails = most_pages(case)
    verdict, brief, remedy = Verdict.OK, f"{count} pages are retired", ""
    if count >= fails or pages.double_bit > limits.retired_double_most:
        verdict, remedy = Verdict.FAIL, case.replace
    elif pages.pending:
        verdict = Verdict.FAIL if case.lending else Verdict.WARN
        brief = "pages of memory wait for a reset to be retired"
        remedy = case.reset
    elif count >= warns:
        verdict, remedy = Verdict.WARN, case.diagnose
    # AMD's list does not tell of what kind the errors were.
    double = "" if case.amd else f", {pages.double_bit} for double-bit errors"
    or_double = (
        "" if case.amd else f", or more than {limits.retired_double_most:g} for double-bit errors,"
    )
    return CheckResult(
        check,
        verdict,
        brief,
        value=f"{count} pages{double}",
        threshold=f"{warns:g} pages warn"
        + (f"; {fails:g}{or_double} fail" if math.isfinite(fails) else ""),
        remedy=remedy,
        number=count,
        unit="pages",
    )


def most_pages(case: Case) -> tuple[float, float]:
    """From how many retired pages on a card warns, and fails.

    Of AMD's, unless the owner has a rule, the driver's own measure: a page for each 100 MiB of
    memory, and a word in its log from nine tenths on (RAS_BAD_PAGE_COVER in amdgpu_ras.c).
    """
    limits, usual = case.limits, Thresholds()
    own = (limits.retired_warn, limits.retired_fail)
    if not case.amd or own != (usual.retired_warn, usual.retired_fail):
        return own
    memory = case.reading.memory_total if case.reading is not None else None
    if memory is None:
        return limits.retired_warn, math.inf
    most = max(1, memory // BAD_PAGE_COVER)
    return math.ceil(most * 0.9), most


def ecc_uncorrected(case: Case) -> CheckResult | None:
    """Uncorrected memory errors since the driver was loaded."""
    check = "ecc_uncorrected"
    count = case.reading.ecc_uncorrected if case.reading is not None else None
    if count is None:
        return unanswered(case, check, "ecc_uncorrected")
    remedy = f"{case.reset}; {case.diagnose}"
    return CheckResult(
        check,
        Verdict.FAIL if count else Verdict.OK,
        f"{count} uncorrected memory errors since the driver was loaded",
        value=f"{count} errors",
        threshold="0 errors",
        remedy=remedy if count else "",
        number=count,
        unit="errors",
    )


def sram_threshold(case: Case) -> CheckResult | None:
    """The card's own threshold of uncorrected errors in its SRAM."""
    check = "sram_threshold"
    exceeded = case.reading.sram_exceeded if case.reading is not None else None
    if exceeded is None:
        return unanswered(case, check, "sram_exceeded")
    return CheckResult(
        check,
        Verdict.FAIL if exceeded else Verdict.OK,
        "errors in the card's SRAM exceed its threshold"
        if exceeded
        else "errors in the card's SRAM are below its threshold",
        value="exceeded" if exceeded else "below",
        threshold="below",
        remedy=REPLACE if exceeded else "",
        number=int(exceeded),
    )


def ecc_mode(case: Case) -> CheckResult | None:
    """ECC is off, or changes at the next reset."""
    check = "ecc_mode"
    mode = case.reading.ecc if case.reading is not None else None
    if mode is None:
        return unanswered(case, check, "ecc")
    words = {True: "on", False: "off"}
    reset = reset_command(case.address)
    if mode.current and mode.pending:
        return CheckResult(check, Verdict.OK, "ECC is on", value="on", threshold="on", number=1)
    if mode.current == mode.pending:
        brief, remedy = "ECC is off", f"nvidia-smi -i {case.address} -e 1; {reset}"
    else:
        brief = f"ECC is {words[mode.current]}, and {words[mode.pending]} after the next reset"
        keep = f"nvidia-smi -i {case.address} -e 1"
        remedy = reset if mode.pending else f"{keep}, if it is to stay on"
    return CheckResult(
        check, Verdict.WARN, brief, value=words[mode.current], threshold="on", remedy=remedy,
        number=int(mode.current),
    )  # fmt: skip
