"""Checks of a card under load: what a burn-in measured, and what DCGM's diagnostic said."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gpupt.decide.health_case import DIAGNOSE, REPLACE, unsupported
from gpupt.decide.health_power import FATAL, REASONS, SW_THERMAL
from gpupt.decide.xid import reset_command
from gpupt.model.burnin import BurnReading, DcgmReading, DcgmTest, Stage
from gpupt.model.health import CheckResult, Silence, Verdict
from gpupt.model.healthrules import Thresholds
from gpupt.model.pci import PciAddress

# GB/s between the host and a card, pinned: what Azure's node health checks expect of theirs
# (azurehpc-health-checks, the configurations of the sizes with these cards).
BANDWIDTH: Mapping[str, float] = {"A100": 21, "H100": 48, "H200": 48, "V100": 9}
# Less than this much above the least warns.
CLOSE = 1.05
# dcgm_errors.h, dcgmErrorSeverity_t: what a setting helps, or what is only to be watched.
MONITOR, CONFIG = 1, 5
SLOW = "numactl -H; the link's width and generation; the IOMMU's mode"


def assess_burn(
    reading: BurnReading, *, name: str | None = None, limits: Thresholds | None = None
) -> tuple[CheckResult, ...]:
    """Every check of a burn-in; ``name`` is the card's model as NVML says it."""
    model = name or reading.name
    return (
        burn_in(reading),
        bandwidth(reading, model),
        memory_pattern(reading),
        matrix(reading),
        burn_heat(reading, (limits or Thresholds()).for_model(model)),
    )


def burn_in(reading: BurnReading) -> CheckResult:
    """The card, or its driver, did not bear the load."""
    check = "burn_in"
    stage = next((stage for stage in Stage if stage in reading.silent), None)
    if stage is None:
        return CheckResult(
            check,
            Verdict.OK,
            f"loaded for {reading.seconds:.0f} s by {reading.framework}",
            value=f"{reading.seconds:.0f} s",
            number=round(reading.seconds),
            unit="s",
        )
    silence = reading.silent[stage]
    if silence is Silence.UNSUPPORTED:
        why = reading.details or "there is none"
        return unsupported(check, f"no framework here can load the card: {why}")
    said = {
        Silence.TIMEOUT: f"it hung under load ({stage})",
        Silence.CRASHED: f"it crashed under load ({stage})",
    }.get(silence, f"the load failed ({stage})")
    if stage is Stage.START:
        said = {
            Silence.TIMEOUT: "the framework did not start in time",
            Silence.CRASHED: "the framework crashed at its start",
        }.get(silence, "the framework did not start")
    return CheckResult(
        check,
        Verdict.FAIL,
        f"{said}: {reading.details}" if reading.details else said,
        value=str(silence),
        remedy=f"journalctl -k -b -g 'Xid|NVRM'; {DIAGNOSE}; {reset_command(reading.address)}",
    )


def unfinished(reading: BurnReading, stage: Stage, check: str) -> CheckResult | None:
    """The result where a stage did not end; None where it did.

    What kept it from ending is told by ``burn_in``, which fails for it.
    """
    if stage not in reading.silent:
        return None
    return unsupported(check, "the burn-in did not get through it")


def least_bandwidth(model: str | None) -> float | None:
    """The GB/s that a card of that model reaches at least; None: not known.

    Only whole words count: a GH200 is joined to its host otherwise than an H200.
    """
    words = re.split(r"[^A-Z0-9]+", (model or "").upper())
    return next((BANDWIDTH[word] for word in words if word in BANDWIDTH), None)


def bandwidth(reading: BurnReading, model: str | None) -> CheckResult:
    """Copies between host and card are slower than they are on others of the model, or wrong."""
    check = "bandwidth"
    to_card, to_host = reading.host_to_device, reading.device_to_host
    if reading.copy_errors:
        return CheckResult(
            check, Verdict.FAIL, f"{reading.copy_errors} words came back otherwise than sent",
            value=f"{reading.copy_errors} words", threshold="0 words",
            remedy=f"{DIAGNOSE}; reseat the card and its riser",
        )  # fmt: skip
    told = unfinished(reading, Stage.BANDWIDTH, check)
    if told is not None or to_card is None or to_host is None:
        return told or unsupported(check, "it was not measured")
    brief = f"{to_card:g} GB/s to the card, {to_host:g} GB/s back"
    least, slower = least_bandwidth(model), min(to_card, to_host)
    verdict = Verdict.OK
    if least is None:
        verdict, brief = Verdict.UNSUPPORTED, f"{brief}: what {model or 'it'} reaches is not known"
    elif slower < least and not reading.pinned:
        # Through pageable memory the host's own copies are measured as well.
        verdict, brief = Verdict.UNSUPPORTED, f"{brief}: measured without pinned memory"
    elif slower < least:
        verdict = Verdict.FAIL
    elif slower < least * CLOSE:
        verdict = Verdict.WARN
    return CheckResult(
        check, verdict, brief,
        value=f"{slower:g} GB/s",
        threshold=None if least is None else f"{least:g} GB/s",
        remedy=SLOW if verdict in {Verdict.FAIL, Verdict.WARN} else "",
        number=slower,
        unit="GB/s",
    )  # fmt: skip


def memory_pattern(reading: BurnReading) -> CheckResult:
    """Words of the card's memory held something else than was written."""
    check, errors = "memory_pattern", reading.memory_errors
    if not errors:
        told = unfinished(reading, Stage.MEMORY, check)
        if told is not None or errors is None or not reading.memory_tested:
            return told or unsupported(check, "no memory was tested")
    tested = (reading.memory_tested or 0) / (1 << 30)
    return CheckResult(
        check,
        Verdict.FAIL if errors else Verdict.OK,
        f"{errors} wrong words in {tested:.2f} GiB"
        if errors
        else f"{tested:.2f} GiB held {reading.memory_patterns} patterns",
        value=f"{errors} words",
        threshold="0 words",
        remedy=f"{DIAGNOSE}; {REPLACE}" if errors else "",
        number=errors,
        unit="words",
    )


def matrix(reading: BurnReading) -> CheckResult:
    """The card computed something wrong."""
    check, wrong = "matrix", reading.wrong_products
    if not wrong:
        told = unfinished(reading, Stage.MATRIX, check)
        if told is not None or wrong is None or not reading.products:
            return told or unsupported(check, "no product was made")
    rates = [
        f"{value:.3g} TFLOP/s {kind}"
        for value, kind in ((reading.tflops, "float32"), (reading.tflops_half, "half"))
        if value is not None
    ]
    return CheckResult(
        check,
        Verdict.FAIL if wrong else Verdict.OK,
        f"{wrong} of {reading.products} products were wrong"
        if wrong
        else ", ".join([f"{reading.products} products were right", *rates]),
        value=f"{wrong} wrong",
        threshold="0 wrong",
        remedy=f"{DIAGNOSE}; {REPLACE}" if wrong else "",
        number=wrong,
        unit="products",
    )


def burn_heat(reading: BurnReading, limits: Thresholds) -> CheckResult:
    """Under load it was too hot, or its clocks were held back."""
    check = "burn_heat"
    peak, margin, events = reading.temperature_peak, reading.margin_least, reading.clock_events_seen
    if margin is None and events is None:
        known = "" if peak is None else f"; it reached {peak} °C"
        return unsupported(check, f"NVML was not heard under load{known}")
    held, near = events or 0, margin is not None and margin <= limits.margin_warn
    verdict = Verdict.WARN if held & SW_THERMAL or near else Verdict.OK
    if held & FATAL or (margin is not None and margin <= limits.margin_fail):
        verdict = Verdict.FAIL
    said = [words for bit, words in REASONS.items() if held & bit]
    if margin is not None:
        said.append(f"{margin} °C below its slowdown at the worst")
    return CheckResult(
        check,
        verdict,
        "; ".join(said) or "nothing held its clocks back",
        value="not known" if peak is None else f"{peak} °C at the most",
        threshold=f"{limits.margin_warn:g} °C margin warns; {limits.margin_fail:g} °C fails",
        remedy=""
        if verdict is Verdict.OK
        else f"fans and air flow; nvidia-smi -q -d PERFORMANCE,TEMPERATURE -i {reading.address}",
        number=peak,
        unit="celsius",
    )


def assess_dcgm(reading: DcgmReading) -> tuple[CheckResult, ...]:
    """A check for each test that DCGM made of the card, or one for why it made none."""
    if reading.silent is Silence.UNSUPPORTED or (reading.silent is None and not reading.tests):
        return (unsupported("dcgm", reading.details or "DCGM made no test of the card"),)
    if reading.silent is not None:
        return (
            CheckResult(
                "dcgm", Verdict.FAIL, f"dcgmi diag gave no result: {reading.details}",
                value=str(reading.silent), remedy="journalctl -u nvidia-dcgm -b",
            ),
        )  # fmt: skip
    return tuple(dcgm_test(test, reading.address) for test in reading.tests)


def dcgm_test(test: DcgmTest, address: PciAddress) -> CheckResult:
    """One test of DCGM's; a status that is not known fails."""
    verdict = {
        "pass": Verdict.OK,
        "skip": Verdict.UNSUPPORTED,
        "not run": Verdict.UNSUPPORTED,
        "warn": Verdict.WARN,
    }.get(test.status.strip().lower(), Verdict.FAIL)
    # Persistence mode off "fails" every card of a machine.
    if verdict is Verdict.FAIL and test.severities and {*test.severities} <= {MONITOR, CONFIG}:
        verdict = Verdict.WARN
    bad = verdict in {Verdict.FAIL, Verdict.WARN}
    return CheckResult(
        "dcgm_" + re.sub(r"\W+", "_", test.name.strip().lower()).strip("_"),
        verdict,
        "; ".join([f"DCGM's {test.name}: {test.status or 'no status'}", *test.messages]),
        value=test.status,
        threshold="Pass",
        remedy=f"{DIAGNOSE} -v; nvidia-smi -q -i {address}" if bad else "",
    )
