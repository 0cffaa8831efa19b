"""The long level of `gpupt health`: cards under load, by a framework or by DCGM."""

from __future__ import annotations

import shutil
from dataclasses import replace

from gpupt.cli.healthlook import Look
from gpupt.decide.health_burn import assess_burn, assess_dcgm
from gpupt.edges.burnin import burn_in
from gpupt.edges.dcgm import read_dcgm
from gpupt.model.health import CheckResult, GpuReading, HealthReport, Verdict
from gpupt.model.healthrules import Thresholds
from gpupt.model.pci import PciAddress


def burn(
    found: Look, *, limits: Thresholds, seconds: float, python: str
) -> tuple[HealthReport, dict[PciAddress, dict[str, float]]]:
    """The report with the checks of a burn-in of each card that is free, and what it measured.

    Where no framework of ``python`` can load the cards, DCGM does, if it is installed.
    """
    readings = {reading.address: reading for reading in found.driver.gpus}
    free = [(each.address, each.uuid) for each in readings.values() if each.uuid and is_free(each)]
    results: dict[PciAddress, tuple[CheckResult, ...]] = {}
    measured: dict[PciAddress, dict[str, float]] = {}
    for burnt in burn_in(free, seconds=seconds, python=python) if free else ():
        name = readings[burnt.address].name
        told = {
            "host-to-device": burnt.host_to_device,
            "device-to-host": burnt.device_to_host,
            "device": burnt.device,
        }
        measured[burnt.address] = {key: rate for key, rate in told.items() if rate is not None}
        results[burnt.address] = assess_burn(burnt, name=name, limits=limits)
        if burnt.framework is None and shutil.which("dcgmi"):
            results[burnt.address] += assess_dcgm(read_dcgm(burnt.address))
    gpus = tuple(
        replace(
            gpu,
            checks=(
                *gpu.checks,
                *results.get(gpu.address, (not_burnt(readings.get(gpu.address)),)),
            ),
        )
        for gpu in found.report.gpus
    )
    return replace(found.report, gpus=gpus), measured


def is_free(reading: GpuReading) -> bool:
    """Whether nobody computes on the card, and that is known."""
    return reading.processes == ()


def not_burnt(reading: GpuReading | None) -> CheckResult:
    """Why a card was not put under load."""
    why = "no driver here can load it"
    if reading is not None and reading.processes:
        why = f"in use by PID {', '.join(str(each.pid) for each in reading.processes)}"
    elif reading is not None:
        why = "whether anybody computes on it is not known"
    return CheckResult("burn_in", Verdict.UNSUPPORTED, f"not put under load: {why}")
