"""Looks at the health of this machine's GPUs: for the verb, and as the gate around loans."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from gpupt.cli.context import Settings
from gpupt.decide.health import judge
from gpupt.decide.unsaid import with_unsaid
from gpupt.edges.amdgpu import read_amdgpu
from gpupt.edges.healthfile import read_rules
from gpupt.edges.kernellog import read_kernel_log
from gpupt.edges.pcierrors import read_pci_errors
from gpupt.edges.pciids import with_names
from gpupt.edges.ports import read_ports
from gpupt.edges.replayfile import keep_replays, read_replays
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.model.gpus import GPU_VENDORS, NVIDIA
from gpupt.model.health import DriverReading, GpuHealth, HealthReport, Library, Verdict
from gpupt.model.host import Host
from gpupt.model.pci import PciAddress

# A driver that is well answers in a fraction of it; without persistence mode it first wakes
# each card, which takes seconds a card.
NVML_SECONDS = 30.0
# Without persistence mode a driver wakes each card first, and may do so one by one.
CARD_SECONDS = 4.0
LOG_SECONDS = 10.0
# All of AMD's cards, which answer one after another.
AMD_SECONDS = 10.0
# Where distributions and NVIDIA's own packages put it.
LIBRARY = "libnvidia-ml.so.1"
FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
# What is in two samples this far apart is sustained.
SAMPLES_APART = 0.4


@dataclass(frozen=True, slots=True)
class Look:
    """What was read, and what was made of it."""

    host: Host
    driver: DriverReading
    report: HealthReport


def look(
    settings: Settings, *, lending: bool = False, only: Collection[PciAddress] | None = None
) -> Look:
    """Judge the GPUs of this machine (``only`` these); raises BadInput for rules that are none.

    Of a recorded machine sysfs alone is judged: nothing else of it can be asked.
    """
    thresholds, wanted = read_rules(settings.state)
    host = with_names(read_host(settings.root, whole=True), settings.root)
    # A management controller's display is no GPU that anybody computes on.
    judged = [
        gpu
        for gpu in host.gpus
        if gpu.device.id.vendor in GPU_VENDORS and (only is None or gpu.address in only)
    ]
    host = replace(host, gpus=tuple(judged))
    driver = ask_driver(settings, host)
    reader = Reader(settings.root)
    others = read_amdgpu(reader, host.gpus, deadline=AMD_SECONDS)
    ports = read_ports(reader, (gpu.address for gpu in host.gpus))
    functions = [each for gpu in host.gpus for each in (gpu.address, *gpu.companions)]
    log = read_kernel_log(settings.root, deadline=LOG_SECONDS)
    boot = log.boot_id or ""
    # Of a recorded machine there is one count, and it is no earlier look of this one.
    if settings.live and (driver.gpus or others):
        thresholds = replace(thresholds, previous=read_replays(settings.state, boot=boot))
        counts = {
            reading.address: reading.pcie_replays
            for reading in (*driver.gpus, *others)
            if reading.pcie_replays is not None
        }
        # Counts of some cards alone would take the place of those of all.
        if only is None:
            keep_replays(settings.state, counts, boot=boot)
    report = judge(
        host,
        driver,
        log=log,
        wanted=wanted if only is None else replace(wanted, count=None),
        thresholds=thresholds,
        lending=lending,
        ports=ports,
        others=others,
        pci_errors=read_pci_errors(reader, {*functions, *ports.values()}),
    )
    return Look(host, driver, with_unsaid(report, driver, log=log))


def gate(
    settings: Settings, gpus: Collection[PciAddress], *, lending: bool
) -> dict[PciAddress, GpuHealth]:
    """How well GPUs are that are to be lent (``lending``), or came back.

    NVIDIA's library, where it fails as a whole, fails each card that is on its driver.
    """
    report = look(settings, lending=lending, only=gpus).report
    failed = tuple(c for c in report.machine if c.id == "nvml" and c.status is Verdict.FAIL)
    if any(check.value == Library.ABSENT for check in failed):
        # A host may have the driver alone: its cards are judged by sysfs and the log then.
        settings.say(
            "NVIDIA's library is not installed: what only it knows of cards is not checked"
        )
        return {
            gpu.address: replace(gpu, checks=tuple(c for c in gpu.checks if c.id != "driver"))
            for gpu in report.gpus
        }
    return {
        gpu.address: replace(gpu, checks=(*gpu.checks, *failed)) if gpu.driver == "nvidia" else gpu
        for gpu in report.gpus
    }


def ask_driver(settings: Settings, host: Host) -> DriverReading:
    """What NVML answers for NVIDIA's cards of this machine."""
    if not settings.live:
        return DriverReading(Library.UNASKED, "only the running machine's driver can be asked")
    cards = [gpu for gpu in host.gpus if gpu.device.id.vendor == NVIDIA]
    if not any(gpu.device.binding.driver == "nvidia" for gpu in cards) and not library_there():
        return DriverReading(Library.UNASKED, "no card is on NVIDIA's driver")
    from gpupt.edges.nvml import read_driver

    addresses = [gpu.address for gpu in cards]
    deadline = NVML_SECONDS + CARD_SECONDS * len(cards)
    return read_driver(addresses, deadline=deadline, samples_apart=SAMPLES_APART)


def library_there() -> bool:
    """Whether NVIDIA's library is in a folder where the linker looks."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return any((Path(folder) / LIBRARY).exists() for folder in (*folders, *FOLDERS) if folder)
