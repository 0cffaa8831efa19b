"""A card's lasting facts, and what changed of them since they were recorded; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpupt.model.baseline import Baseline, CardBaseline
from gpupt.model.health import (
    CheckResult,
    DriverReading,
    GpuHealth,
    GpuReading,
    HealthReport,
    Verdict,
)
from gpupt.model.host import Gpu, Host
from gpupt.model.pci import PciAddress

# What changes with an update or a setting that somebody made is told; what only a fault, or
# another card, changes fails.  Group and NUMA node are numbers that firmware and kernel give.
UPDATED = frozenset(
    {"driver", "vbios", "inforom", "gsp", "power-limit", "iommu-group", "numa-node"}
)
# A bandwidth differs a little from run to run, and is measured under load only.
MEASURED = {"host-to-device": 0.9, "device-to-host": 0.9, "device": 0.9}
# Drivers keep a little memory for themselves, each version as much as it likes.
SLACK = {**MEASURED, "memory": 0.98}
AGAIN = "gpupt health --record, if it is as it should be"


def take_baseline(
    host: Host,
    driver: DriverReading,
    *,
    recorded: str,
    measured: Mapping[PciAddress, Mapping[str, float]] | None = None,
) -> Baseline:
    """The facts of every card that answers; ``measured`` are bandwidths in GB/s."""
    readings = {reading.address: reading for reading in driver.gpus}
    silent = {address for address, reading in readings.items() if "handle" in reading.silent}
    return Baseline(
        recorded,
        {
            gpu.address: CardBaseline(
                gpu.address,
                facts_of(
                    gpu,
                    readings.get(gpu.address),
                    driver=driver.driver,
                    measured=(measured or {}).get(gpu.address, {}),
                ),
            )
            for gpu in host.gpus
            if not gpu.device.lost and gpu.address not in silent
        },
    )


def facts_of(
    gpu: Gpu,
    reading: GpuReading | None,
    *,
    driver: str | None,
    measured: Mapping[str, float],
) -> dict[str, str]:
    """What is to stay as it is, by name."""
    device = gpu.device
    told: dict[str, object | None] = {
        "id": device.id,
        "subsystem": device.subsystem,
        "link-width": device.link.width,
        "link-most-speed": device.link.max_speed,
        "numa-node": device.numa_node,
        "iommu-group": device.iommu_group,
    }
    if reading is not None:
        told |= {
            "uuid": reading.uuid,
            "serial": reading.serial,
            "vbios": reading.vbios,
            "inforom": reading.inforom,
            "gsp": reading.gsp,
            "driver": driver,
            "memory": reading.memory_total,
            "power-limit": reading.power_limit,
            "nvlinks": None
            if reading.nvlinks is None
            else sum(link.active for link in reading.nvlinks),
        }
    told |= measured
    return {name: str(value) for name, value in told.items() if value is not None}


def against_baseline(report: HealthReport, *, now: Baseline, then: Baseline) -> HealthReport:
    """The report with a check of each card against what was recorded of it; a card that is not
    there any more, and one that is new, are told of the machine."""
    cards = tuple(
        replace(gpu, checks=(*gpu.checks, changes(gpu, now.cards.get(gpu.address), then)))
        for gpu in report.gpus
    )
    here = {gpu.address for gpu in report.gpus}
    lacking = [str(address) for address in then.cards if address not in here]
    return replace(report, gpus=cards, machine=(*report.machine, *gone(lacking, then)))


def gone(lacking: Sequence[str], then: Baseline) -> tuple[CheckResult, ...]:
    """The check that fails for all GPUs that are not there any more; none where none is gone."""
    if not lacking:
        return ()
    named = ", ".join(lacking)
    check = CheckResult(
        "baseline",
        Verdict.FAIL,
        f"not there any more: {named}",
        value=f"{len(lacking)} gone",
        threshold=f"as on {then.recorded}",
        remedy=f"journalctl -k -b -g '{'|'.join(lacking)}'; reseat what is gone; {AGAIN}",
        number=len(lacking),
    )
    return (check,)


def changes(gpu: GpuHealth, now: CardBaseline | None, then: Baseline) -> CheckResult:
    """What is other of a card than it was; what it does not tell now is not judged."""
    was = then.cards.get(gpu.address)
    if was is None:
        return CheckResult(
            "baseline", Verdict.WARN, "it was not recorded", value="new", remedy=AGAIN
        )
    if now is None:
        return CheckResult("baseline", Verdict.FAIL, "it cannot be compared: it does not answer")
    other = {
        name: (before, now.facts[name])
        for name, before in was.facts.items()
        if name in now.facts and differs(name, before, now.facts[name])
    }
    if not other:
        silent = [name for name in was.facts if name not in now.facts and name not in MEASURED]
        untold = f"; not told now: {', '.join(silent)}" if silent else ""
        return CheckResult(
            "baseline", Verdict.OK, f"as on {then.recorded}{untold}", value="unchanged"
        )
    said = "; ".join(f"{name} {before} → {after}" for name, (before, after) in other.items())
    return CheckResult(
        "baseline",
        Verdict.WARN if set(other) <= UPDATED else Verdict.FAIL,
        f"it changed since {then.recorded}: {said}",
        value=said,
        threshold="as it was recorded",
        remedy=AGAIN,
    )


def differs(name: str, before: str, after: str) -> bool:
    """Whether a fact changed; a measured one may fall a little, and rise."""
    if name not in SLACK:
        return before != after
    try:
        return float(after) < SLACK[name] * float(before)
    except ValueError:
        # A file that somebody wrote by hand.
        return before != after
