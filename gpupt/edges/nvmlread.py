"""The questions to NVML, one for each field of a reading; ``nvml`` is the module pynvml, given
by its gate.  Runs in a child of the gate: any of these calls may hang, or crash the process."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from typing import Any

from gpupt.model.health import Library, Silence

# nvml.h: numbers of a stable interface, which an older pynvml may have no names for.
INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND, FUNCTION_NOT_FOUND = 2, 3, 6, 13
CORRUPTED_INFOROM, GPU_NOT_FOUND = 14, 28
INIT_FLAG_NO_GPUS = 1
SENSOR_GPU, THRESHOLD_SLOWDOWN, CLOCK_SM = 0, 1, 1
ERROR_UNCORRECTED, COUNTER_VOLATILE = 1, 0
RETIRED_SINGLE_BIT, RETIRED_DOUBLE_BIT = 0, 1
FIELD_RECOVERY_ACTION = 230
MAX_NVLINKS = 36
NVLINK_ERRORS = ("replay", "recovery", "crc_flit", "crc_data", "ecc_data")
# From NVLink 5 on the counters above are gone; these are fields, scoped by the link.
NVLINK_FIELDS = {
    "replay": 161,
    "recovery": 162,
    "crc": 163,
    "malformed_packets": 206,
    "buffer_overruns": 207,
    "received": 208,
    "received_remote": 209,
    "received_general": 210,
    "local_integrity": 211,
    "recovery_failed": 214,
    "effective": 219,
    "symbol": 221,
}
# In the order of NVML_VALUE_TYPE_*.
VALUES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

_SILENCES = {
    NOT_SUPPORTED: Silence.UNSUPPORTED,
    4: Silence.DENIED,
    10: Silence.TIMEOUT,
    FUNCTION_NOT_FOUND: Silence.UNSUPPORTED,
    15: Silence.LOST,
    16: Silence.NEEDS_RESET,
    17: Silence.DENIED,  # the operating system (a cgroup) blocked it
    22: Silence.UNSUPPORTED,  # no ECC for a vGPU
    25: Silence.UNSUPPORTED,  # the driver does not know this version of the structure
    26: Silence.UNSUPPORTED,  # deprecated
}
_LIBRARIES = {
    4: Library.DENIED,
    9: Library.NO_DRIVER,
    10: Library.TIMEOUT,
    12: Library.ABSENT,
    17: Library.DENIED,
    18: Library.MISMATCH,
}
# What pynvml is known to raise on an answer that it did not expect.
STRANGE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError)
Question = Callable[[Any, Any], Any]


def library_of(number: int) -> Library:
    """What an error of nvmlInit says about the library as a whole."""
    return _LIBRARIES.get(number, Library.ERROR)


def attempt(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or the Silence that stands for the error.  NVMLError has no hash and compares
    badly: only its number is looked at."""
    try:
        return question(*arguments)
    except nvml.NVMLError as error:
        return _SILENCES.get(error.value, Silence.ERROR)
    except (*STRANGE, ctypes.ArgumentError):
        return Silence.ERROR


def find(nvml: Any, *names: str) -> Any:
    """The first of these functions or structures that this version of pynvml has."""
    for name in names:
        if hasattr(nvml, name):
            return getattr(nvml, name)
    raise nvml.NVMLError(FUNCTION_NOT_FOUND)


def first(*questions: Question) -> Question:
    """The answer to the first question that is supported: old and new names of one thing."""

    def ask(nvml: Any, card: Any) -> Any:
        for question in questions[:-1]:
            try:
                return question(nvml, card)
            except nvml.NVMLError as error:
                if _SILENCES.get(error.value) is not Silence.UNSUPPORTED:
                    raise
        return questions[-1](nvml, card)

    return ask


def call(name: str, *arguments: Any) -> Question:
    """The question that is one function of pynvml."""
    return lambda nvml, card: find(nvml, name)(card, *arguments)


def text(name: str) -> Question:
    """A function whose answer is a text; not every version of pynvml decodes each."""

    def ask(nvml: Any, card: Any) -> str:
        answer = find(nvml, name)(card)
        return answer.decode() if isinstance(answer, bytes) else answer

    return ask


def field_value(number: int, scope: int = 0) -> Question:
    """A field value.  A driver older than the field calls its number an invalid argument."""

    def ask(nvml: Any, card: Any) -> Any:
        value = find(nvml, "nvmlDeviceGetFieldValues")(card, [(number, scope)])[0]
        if value.nvmlReturn:
            old = value.nvmlReturn == INVALID_ARGUMENT
            raise nvml.NVMLError(NOT_SUPPORTED if old else value.nvmlReturn)
        return getattr(value.value, VALUES[value.valueType])

    return ask


def watts(question: Question) -> Question:
    return lambda nvml, card: question(nvml, card) / 1000


def flag(question: Question) -> Question:
    return lambda nvml, card: bool(question(nvml, card))


def part(question: Question, name: str) -> Question:
    """One member of the structure that is the answer."""
    return lambda nvml, card: getattr(question(nvml, card), name)


def modes(name: str) -> Question:
    def ask(nvml: Any, card: Any) -> dict[str, bool]:
        current, pending = find(nvml, name)(card)
        return {"current": bool(current), "pending": bool(pending)}

    return ask


def remapped(nvml: Any, card: Any) -> dict[str, Any]:
    correctable, uncorrectable, pending, failure = find(nvml, "nvmlDeviceGetRemappedRows")(card)
    return {
        "correctable": correctable,
        "uncorrectable": uncorrectable,
        "pending": bool(pending),
        "failure": bool(failure),
    }


def retired(nvml: Any, card: Any) -> dict[str, Any]:
    pages = find(nvml, "nvmlDeviceGetRetiredPages")
    pending = find(nvml, "nvmlDeviceGetRetiredPagesPendingStatus")
    return {
        "single_bit": len(pages(card, RETIRED_SINGLE_BIT)),
        "double_bit": len(pages(card, RETIRED_DOUBLE_BIT)),
        "pending": bool(pending(card)),
    }


def sram_exceeded(nvml: Any, card: Any) -> bool:
    status = find(nvml, "c_nvmlEccSramErrorStatus_v1_t")()
    find(nvml, "nvmlDeviceGetSramEccErrorStatus")(card, ctypes.byref(status))
    return bool(status.bThresholdExceeded)


def memory(nvml: Any, card: Any) -> Any:
    """Version 2 tells what the driver itself reserves from what is used."""
    return find(nvml, "nvmlDeviceGetMemoryInfo")(card, find(nvml, "nvmlMemory_v2"))


def nvlinks(nvml: Any, card: Any) -> list[dict[str, Any]]:
    """Every link that the card has; one without any is not supported."""
    state = find(nvml, "nvmlDeviceGetNvLinkState")
    links = []
    for number in range(MAX_NVLINKS):
        try:
            active = bool(state(card, number))
        except nvml.NVMLError as error:
            # The number of links is told nowhere else: beyond the last the card says so.
            if error.value not in {INVALID_ARGUMENT, NOT_SUPPORTED}:
                raise
            continue
        links.append(
            {"number": number, "active": active, "errors": nvlink_errors(nvml, card, number)}
        )
    if not links:
        raise nvml.NVMLError(NOT_SUPPORTED)
    return links


def nvlink_errors(nvml: Any, card: Any, link: int) -> dict[str, int]:
    """The error counters of a link that this card keeps; those it has not are left out."""
    old: dict[str, Question] = {
        name: call("nvmlDeviceGetNvLinkErrorCounter", link, counter)
        for counter, name in enumerate(NVLINK_ERRORS)
    }
    new: dict[str, Question] = {
        name: field_value(number, link) for name, number in NVLINK_FIELDS.items()
    }
    for questions in (old, new):
        said = {name: attempt(nvml, ask, nvml, card) for name, ask in questions.items()}
        if found := {name: n for name, n in said.items() if not isinstance(n, Silence)}:
            return found
    return {}


def fabric(nvml: Any, card: Any) -> dict[str, int]:
    """From drivers of R535 on: pynvml had the older structure wrong for long, and a state read
    at a wrong place is a zero."""
    info = find(nvml, "c_nvmlGpuFabricInfo_v2_t", "c_nvmlGpuFabricInfoV_t")()
    find(nvml, "nvmlDeviceGetGpuFabricInfoV")(card, ctypes.byref(info))
    return {"state": info.state, "status": info.status, "health_mask": info.healthMask}


def processes(nvml: Any, card: Any) -> list[dict[str, Any]]:
    """Those of every kind that the card can tell; unsupported only when it can tell none."""
    found: list[dict[str, Any]] = []
    told = False
    for kind in ("Compute", "Graphics"):
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        try:
            listed = first(call(f"{name}_v3"), call(f"{name}_v2"))(nvml, card)
        except nvml.NVMLError as error:
            if _SILENCES.get(error.value) is not Silence.UNSUPPORTED:
                raise
            continue
        told = True
        found += [{"pid": each.pid, "kind": kind.lower()} for each in listed]
    if not told:
        raise nvml.NVMLError(NOT_SUPPORTED)
    return found


def inforom_valid(nvml: Any, card: Any) -> bool:
    try:
        find(nvml, "nvmlDeviceValidateInforom")(card)
    except nvml.NVMLError as error:
        if error.value != CORRUPTED_INFOROM:
            raise
        return False
    return True


def confidential(nvml: Any, card: Any) -> bool:
    """Whether confidential computing is on; the driver tells it of all its cards at once."""
    return bool(find(nvml, "nvmlSystemGetConfComputeState")().ccFeature)


IDENTITY: Mapping[str, Question] = {
    "uuid": text("nvmlDeviceGetUUID"),
    "name": text("nvmlDeviceGetName"),
    "serial": text("nvmlDeviceGetSerial"),
    "vbios": text("nvmlDeviceGetVbiosVersion"),
    "inforom": text("nvmlDeviceGetInforomImageVersion"),
    "gsp": text("nvmlDeviceGetGspFirmwareVersion"),
    "recovery_action": field_value(FIELD_RECOVERY_ACTION),
}
clock_events = first(
    call("nvmlDeviceGetCurrentClocksEventReasons"),
    call("nvmlDeviceGetCurrentClocksThrottleReasons"),
)
CONDITION: Mapping[str, Question] = {
    "remapped": remapped,
    "retired": retired,
    "unrepairable_memory": flag(call("nvmlDeviceGetUnrepairableMemoryFlag_v1")),
    "ecc": modes("nvmlDeviceGetEccMode"),
    "ecc_uncorrected": call("nvmlDeviceGetTotalEccErrors", ERROR_UNCORRECTED, COUNTER_VOLATILE),
    "sram_exceeded": sram_exceeded,
    "pcie_gen": call("nvmlDeviceGetCurrPcieLinkGeneration"),
    "pcie_gen_max": call("nvmlDeviceGetMaxPcieLinkGeneration"),
    "pcie_width": call("nvmlDeviceGetCurrPcieLinkWidth"),
    "pcie_width_max": call("nvmlDeviceGetMaxPcieLinkWidth"),
    "pcie_replays": call("nvmlDeviceGetPcieReplayCounter"),
    "temperature": first(
        call("nvmlDeviceGetTemperature", SENSOR_GPU), call("nvmlDeviceGetTemperatureV", SENSOR_GPU)
    ),
    "temperature_margin": call("nvmlDeviceGetMarginTemperature"),
    # In degrees, so no field of the TLIMIT kind stands in: those are offsets to the margin.
    "temperature_slowdown": call("nvmlDeviceGetTemperatureThreshold", THRESHOLD_SLOWDOWN),
    "power": watts(call("nvmlDeviceGetPowerUsage")),
    "power_limit": watts(
        first(call("nvmlDeviceGetEnforcedPowerLimit"), call("nvmlDeviceGetPowerManagementLimit"))
    ),
    "power_default": watts(call("nvmlDeviceGetPowerManagementDefaultLimit")),
    "memory_total": part(first(memory, call("nvmlDeviceGetMemoryInfo")), "total"),
    "memory_used": part(first(memory, call("nvmlDeviceGetMemoryInfo")), "used"),
    "utilization": part(call("nvmlDeviceGetUtilizationRates"), "gpu"),
    "sm_clock": call("nvmlDeviceGetClockInfo", CLOCK_SM),
    "nvlinks": nvlinks,
    "fabric": fabric,
    "processes": processes,
    "mig": modes("nvmlDeviceGetMigMode"),
    "confidential": confidential,
}
# The slowest is last: it reads the whole flash.
LAST: Mapping[str, Question] = {"inforom_valid": inforom_valid}
FIELDS = (*IDENTITY, *CONDITION, "clock_events", *LAST)


def ask_card(
    nvml: Any, card: Any, say: Callable[[str, Any], None], *, samples_apart: float
) -> None:
    """Ask every question and ``say`` each answer, or why there is none, as it comes."""

    def ask(questions: Mapping[str, Question]) -> None:
        for name, question in questions.items():
            say(name, attempt(nvml, question, nvml, card))

    ask(IDENTITY)
    again = time.monotonic() + samples_apart
    before = attempt(nvml, clock_events, nvml, card)
    ask(CONDITION)
    if isinstance(before, Silence):
        say("clock_events", before)
    else:
        time.sleep(max(0.0, again - time.monotonic()))
        after = attempt(nvml, clock_events, nvml, card)
        say("clock_events", after if isinstance(after, Silence) else [before, after])
    ask(LAST)
