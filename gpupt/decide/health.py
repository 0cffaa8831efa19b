"""Judges the health of a machine's GPUs: sysfs, NVML's answers and the kernel's log; pure.

A check is a function of one card or of the machine.  It fails closed: a question that should
have been answered and was not is a failure, and only what is not supported is no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpupt.decide import health_link as link
from gpupt.decide import health_log as logged
from gpupt.decide import health_machine as machine
from gpupt.decide import health_memory as memory
from gpupt.decide import health_modes as modes
from gpupt.decide import health_power as power
from gpupt.decide.health_case import CardCheck, Case, Machine, MachineCheck
from gpupt.decide.kernellog import events
from gpupt.model.gpus import NVIDIA, state_of
from gpupt.model.health import (
    DriverReading,
    GpuHealth,
    GpuReading,
    HealthReport,
    Library,
    PciErrors,
)
from gpupt.model.healthrules import Expectations, Thresholds
from gpupt.model.host import Gpu, GpuState, Host
from gpupt.model.kernellog import KernelLog
from gpupt.model.pci import PciAddress


@dataclass(frozen=True, slots=True)
class Rule:
    """A check in words: where it looks, and what it holds that against."""

    source: str
    rule: str


CHECKS: Mapping[str, Rule] = {
    "gpu_count": Rule(
        "sysfs, the kernel's log", "other than expected, or one of the log is gone: fail"
    ),
    "nvml": Rule(
        "nvmlInit, and its hold of each card", "no answer though a card is on NVIDIA's driver: fail"
    ),
    "driver": Rule("sysfs, NVML", "on NVIDIA's and not known to NVML: fail; on none: warn"),
    "gpu_lost": Rule("config space, NVML 15 and 16", "all ones, lost or in need of a reset: fail"),
    "recovery_action": Rule("NVML field 230", "0 ok; 3 warn; any other, known or not: fail"),
    "remap_failure": Rule("remapped rows, unrepairable memory", "true: fail"),
    "remap_pending": Rule("remapped rows", "true: fail before lending, else warn"),
    "remap_uncorrectable": Rule("remapped rows", "> 0 warn; ≥ 512 fail"),
    "retired_pages": Rule(
        "retired pages (before Ampere); AMD's bad pages",
        "≥ 10 warn; ≥ 63, or > 15 for double-bit errors, fail; AMD: ≥ 0.9 pages per 100 MiB of "
        "memory warn, ≥ 1 fail; pending: as remap_pending",
    ),
    "ecc_uncorrected": Rule(
        "ECC errors since the driver was loaded; AMD's RAS counters", "> 0 fail"
    ),
    "sram_threshold": Rule("SRAM ECC status", "exceeded: fail"),
    "ecc_mode": Rule("ECC mode", "off, or another after the next reset: warn"),
    "pcie_width": Rule("sysfs", "fewer lanes than card and port could have: fail"),
    "pcie_gen": Rule("NVML, else sysfs", "lower than it could be: ok when idle, warn at ≥ 50 %"),
    "pcie_replay": Rule(
        "NVML's counter or amdgpu's, twice",
        "a bit error rate above 1e-12 (15.4/min at gen 4 x16, 30.7/min at gen 5 x16): warn",
    ),
    "clock_events": Rule(
        "clocks event reasons, two samples", "0x8, 0x40, 0x80 in both: fail; 0x20: warn; 0x4: ok"
    ),
    "temperature": Rule(
        "margin, else slowdown threshold less temperature; AMD's hottest sensor and its crit",
        "≤ 10 °C warn; ≤ 0 °C fail",
    ),
    "power_limit": Rule("power limit, and its default (NVML, amdgpu's hwmon)", "below: warn"),
    "nvlink": Rule("NVLink states and counters", "an expected link down: fail; errors: warn"),
    "fabric": Rule("fabric state, status, health", "in progress: warn; failed or unhealthy: fail"),
    "xid": Rule(
        "the kernel's log of this boot",
        "the driver's advice first (field 230, Xid 154), then the table below",
    ),
    "aer": Rule(
        "the kernel's counters (`aer_dev_*`), and its log of this boot",
        "fatal: fail; nonfatal, or ≥ 100 corrected: warn",
    ),
    "kernel_log": Rule(
        "the kernel's log of this boot",
        "start or reset failed, uncorrectable errors: fail; a reset, a hung ring: warn",
    ),
    "inforom": Rule("inforom's checksum", "corrupt: warn"),
    "processes": Rule("NVML's processes, before lending only", "any: fail"),
    "mig_mode": Rule("MIG mode, where one is expected", "another: fail; after a reset: warn"),
    "cc_state": Rule("confidential computing, where expected", "another: fail"),
    "versions": Rule(
        "VBIOS, inforom and GSP of cards of one model", "mixed, or GSP not the driver's: warn"
    ),
    "sxid": Rule(
        "the kernel's log of this boot, with NVSwitches", "fatal: fail; others but 22013: warn"
    ),
}
# What no reading decides, and who finds it out.
ELSEWHERE: Mapping[str, str] = {
    "burn_in": "`--level long`: the card, or its driver, does not bear the load: fail",
    "bandwidth": "`--level long`: copies between host and GPU below the model's figure: fail",
    "memory_pattern": "`--level long`: patterns come back otherwise than written: fail",
    "matrix": "`--level long`: a product of matrices is wrong: fail",
    "burn_heat": "`--level long`: temperature and clocks under load, as `temperature` and "
    "`clock_events`",
}
OF_CARD: Mapping[str, CardCheck] = {
    "driver": modes.driver,
    "nvml": modes.nvml,
    "gpu_lost": modes.gpu_lost,
    "recovery_action": modes.recovery_action,
    "remap_failure": memory.remap_failure,
    "remap_pending": memory.remap_pending,
    "remap_uncorrectable": memory.remap_uncorrectable,
    "retired_pages": memory.retired_pages,
    "ecc_uncorrected": memory.ecc_uncorrected,
    "sram_threshold": memory.sram_threshold,
    "ecc_mode": memory.ecc_mode,
    "pcie_width": link.pcie_width,
    "pcie_gen": link.pcie_gen,
    "pcie_replay": link.pcie_replay,
    "clock_events": power.clock_events,
    "temperature": power.temperature,
    "power_limit": power.power_limit,
    "nvlink": link.nvlink,
    "fabric": link.fabric,
    "xid": logged.xid,
    "aer": logged.aer,
    "kernel_log": logged.kernel_log,
    "inforom": modes.inforom,
    "processes": modes.processes,
    "mig_mode": modes.mig_mode,
    "cc_state": modes.cc_state,
}
# What sysfs and the kernel's log tell of a card, whoever made it and whether NVML answers.
WITHOUT_NVML = frozenset(
    {"driver", "nvml", "gpu_lost", "pcie_width", "pcie_gen", "xid", "aer", "kernel_log"}
)
# What AMD's driver tells in sysfs.
OF_AMDGPU = frozenset(
    {"temperature", "power_limit", "ecc_uncorrected", "retired_pages", "pcie_replay"}
)
OF_MACHINE: Mapping[str, MachineCheck] = {
    "gpu_count": machine.gpu_count,
    "nvml": machine.nvml,
    "versions": machine.versions,
    "sxid": logged.sxid,
}


def judge(
    host: Host,
    driver: DriverReading,
    *,
    log: KernelLog,
    wanted: Expectations,
    thresholds: Thresholds,
    lending: bool,
    ports: Mapping[PciAddress, PciAddress] | None = None,
    others: Iterable[GpuReading] = (),
    pci_errors: Mapping[PciAddress, PciErrors] | None = None,
) -> HealthReport:
    """Every check of every GPU and of the machine that the readings allow.

    ``lending``: the cards are about to be given to guests, which forbids more.  ``ports`` maps
    a GPU to the port above it, where that is known; ``others`` are readings of cards that are
    not NVIDIA's; ``pci_errors`` are the kernel's counts, by function.
    """
    found = events(log)
    readings = {reading.address: reading for reading in (*driver.gpus, *others)}
    whole = Machine(host, driver, log, found, wanted)
    judged = []
    for gpu in host.gpus:
        reading = readings.get(gpu.address)
        port = (ports or {}).get(gpu.address)
        case = Case(
            gpu=gpu,
            reading=reading,
            unasked="" if reading is not None else why_unasked(gpu, driver),
            log=log,
            events=logged.events_of_card(gpu, found, port=port),
            limits=thresholds.for_model(reading.name if reading is not None else None),
            wanted=wanted,
            lending=lending,
            port=None if port is None else host.devices.get(port),
            lost=tuple(
                address for address in (gpu.address, *gpu.companions) if host.devices[address].lost
            ),
            locked=any(host.devices[each].locked for each in (gpu.address, *gpu.companions)),
            asked=driver.library is not Library.UNASKED,
            pci_errors={
                address: counted
                for address, counted in (pci_errors or {}).items()
                if address in {gpu.address, *gpu.companions, port}
            },
        )
        judged.append(judge_card(case))
    of_machine = (check(whole) for check in OF_MACHINE.values())
    return HealthReport(tuple(judged), tuple(each for each in of_machine if each is not None))


def judge_card(case: Case) -> GpuHealth:
    """Every check of one card that its driver may answer for."""
    reading = case.reading
    held = reading is None or "handle" not in reading.silent
    asked = frozenset(OF_CARD) if held and case.gpu.device.id.vendor == NVIDIA else WITHOUT_NVML
    if case.amd and reading is not None:
        asked |= OF_AMDGPU
    results = (check(case) for name, check in OF_CARD.items() if name in asked)
    return GpuHealth(
        address=case.address,
        uuid=None if reading is None else reading.uuid,
        name=(reading and reading.name) or case.gpu.device.name,
        driver=case.gpu.device.binding.driver,
        checks=tuple(result for result in results if result is not None),
    )


def why_unasked(gpu: Gpu, driver: DriverReading) -> str:
    """Why NVML was not asked for a card, or knows nothing of it."""
    device, name = gpu.device, gpu.device.binding.driver
    if device.id.vendor != NVIDIA:
        if device.lost:
            return f"on {name or 'no driver'}: the card does not answer"
        if name == modes.AMD_DRIVER:
            return f"on {name}: it sleeps or is being reset, and is not asked"
        return "NVML is NVIDIA's: of this card sysfs and the kernel's log are read"
    if device.physfn is not None:
        return f"a virtual function: NVML answers for its card, {device.physfn}"
    if state_of(gpu, None) is GpuState.DETACHED:
        return f"on {name}: NVML cannot see it; ask in the guest that has it"
    if name is None:
        return "no driver has it: sysfs and the kernel's log are all there is"
    if name != modes.NVIDIA_DRIVER:
        return f"on {name}: NVML knows the cards of NVIDIA's own driver only"
    if driver.library is Library.UNASKED:
        return f"NVML was not asked: {driver.details}"
    if driver.library is not Library.ANSWERED:
        return f"NVML did not answer ({driver.library}): see nvml"
    return "it is on NVIDIA's driver, and NVML does not know it"
