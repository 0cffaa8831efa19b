"""The health of a card: each check fires, is silent on a card that is well, and fails closed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from gpupt.decide.health import CHECKS, judge
from gpupt.errors import BadInput
from gpupt.model.gpus import find_gpus
from gpupt.model.health import (
    CheckResult,
    DriverReading,
    Fabric,
    GpuProcess,
    GpuReading,
    HealthReport,
    Library,
    Modes,
    NvLink,
    PciErrors,
    RemappedRows,
    RetiredPages,
    Silence,
    Verdict,
)
from gpupt.model.healthrules import Baseline, Expectations, Thresholds
from gpupt.model.host import Host
from gpupt.model.kernellog import KernelLog, LogLine
from gpupt.model.pci import DriverBinding, Link, PciAddress, PciDevice, PciId

CARD = PciAddress.parse("0000:41:00.0")
OTHER = PciAddress.parse("0000:42:00.0")
PORT = PciAddress.parse("0000:40:01.0")
GEN5 = Link(width=16, max_width=16, speed=32.0, max_speed=32.0)
OK, WARN, FAIL, UNSUPPORTED = Verdict.OK, Verdict.WARN, Verdict.FAIL, Verdict.UNSUPPORTED


def device(address: PciAddress = CARD, driver: str | None = "nvidia", **more: Any) -> PciDevice:
    """An H100 of that address, unless ``more`` says otherwise."""
    ids = PciId(more.pop("vendor", 0x10DE), more.pop("device", 0x2330))
    more = {"class_code": 0x030200, "link": GEN5, **more}
    return PciDevice(address, ids, binding=DriverBinding(driver, None), **more)


WELL = GpuReading(
    CARD,
    uuid="GPU-3a1b",
    name="NVIDIA H100 80GB HBM3",
    serial="1320",
    vbios="96.00.74",
    inforom="G520.0200",
    gsp="550.90",
    recovery_action=0,
    remapped=RemappedRows(correctable=2, uncorrectable=0, pending=False, failure=False),
    retired=RetiredPages(single_bit=0, double_bit=0, pending=False),
    unrepairable_memory=False,
    ecc=Modes(current=True, pending=True),
    ecc_uncorrected=0,
    sram_exceeded=False,
    pcie_gen=5,
    pcie_gen_max=5,
    pcie_width=16,
    pcie_width_max=16,
    pcie_replays=7,
    clock_events=(0x1, 0x1),
    temperature=41,
    temperature_margin=46,
    temperature_slowdown=87,
    power=98.5,
    power_limit=700.0,
    power_default=700.0,
    memory_total=80 << 30,
    memory_used=1 << 30,
    utilization=0,
    sm_clock=1980,
    nvlinks=tuple(NvLink(number, True, {"replay": 0}) for number in range(18)),
    fabric=Fabric(state=3, status=0, health_mask=0),
    processes=(),
    inforom_valid=True,
    mig=Modes(current=False, pending=False),
    confidential=False,
)


UNREAD = KernelLog(silent=Silence.DENIED, details="no")


@dataclass(frozen=True)
class Scene:
    """What is read, of which a case changes one thing."""

    devices: tuple[PciDevice, ...] = (device(),)
    readings: tuple[GpuReading, ...] = (WELL,)
    library: Library = Library.ANSWERED
    lines: tuple[str, ...] = ()
    log: KernelLog = field(default_factory=KernelLog)
    wanted: Expectations = field(default_factory=Expectations)
    thresholds: Thresholds = field(default_factory=Thresholds)
    lending: bool = False
    ports: Mapping[PciAddress, PciAddress] | None = None
    pci_errors: Mapping[PciAddress, PciErrors] | None = None


def report(scene: Scene) -> HealthReport:
    devices = {each.address: each for each in scene.devices}
    lines = tuple(LogLine(text, float(number)) for number, text in enumerate(scene.lines))
    return judge(
        Host(devices=devices, groups={}, gpus=find_gpus(devices)),
        DriverReading(scene.library, driver="550.90", nvml="12.550", gpus=scene.readings),
        log=replace(scene.log, lines=lines),
        wanted=scene.wanted,
        thresholds=scene.thresholds,
        lending=scene.lending,
        ports=scene.ports,
        pci_errors=scene.pci_errors,
    )


def result(scene: Scene, check: str) -> CheckResult | None:
    """What a check says of the first card, or of the machine; None: it was not made."""
    found = report(scene)
    made = [each for each in (*found.gpus[0].checks, *found.machine) if each.id == check]
    # NVML is judged of the machine, and of a card that it has no hold of.
    return min(made, key=lambda each: SEVEREST.index(each.status), default=None)


SEVEREST = (FAIL, WARN, UNSUPPORTED, OK)


def well(*, scene: Scene | None = None, **changes: Any) -> Scene:
    """A card that is well but for what is changed in its reading."""
    return replace(scene or Scene(), readings=(replace(WELL, **changes),))


def log(*lines: str, **more: Any) -> Scene:
    return Scene(lines=lines, **more)


def link(*, port: Link | None = None, **changes: Any) -> Scene:
    """The card's link, and that of the port above it if it is known."""
    card = device(link=replace(GEN5, **changes))
    if port is None:
        return Scene(devices=(card,))
    above = device(PORT, "pcieport", class_code=0x060400, is_bridge=True, link=port)
    return Scene(devices=(card, above), ports={CARD: PORT})


def counted_at_port(card: int, port: int) -> Scene:
    """Corrected errors that the kernel counted at the card, and at the port above it."""
    counts = {CARD: PciErrors(card, 0, 0), PORT: PciErrors(port, 0, 0)}
    return replace(link(port=GEN5), pci_errors=counts)


def replays(before: int, now: int, seconds: float, **changes: Any) -> Scene:
    earlier = Baseline(seconds, {CARD: before})
    return replace(well(pcie_replays=now, **changes), thresholds=Thresholds(previous=earlier))


def links(*, down: int = 0, **errors: int) -> tuple[NvLink, ...]:
    """Eighteen NVLinks, the first of which are down; errors of the last."""
    return tuple(
        NvLink(number, number >= down, errors if number == 17 else {}) for number in range(18)
    )


def pair(**changes: Any) -> Scene:
    """Two cards of one model, the second with other firmware."""
    return Scene(
        devices=(device(), device(OTHER)), readings=(WELL, replace(WELL, address=OTHER, **changes))
    )


def silent(name: str, why: Silence = Silence.UNSUPPORTED, *, scene: Scene | None = None) -> Scene:
    """A card that does not answer for one field."""
    return well(scene=scene, **{name: None}, silent={name: why})


WANT = Expectations
LENDING = Scene(lending=True)
XID = "NVRM: Xid (PCI:0000:41:00): "
XID_OTHER = "NVRM: Xid (PCI:0000:42:00): "
AER = "pcieport 0000:40:01.0: AER: PCIe Bus Error: severity="
CORRECTED = f"nvidia {CARD}: PCIe Bus Error: severity=Correctable, type=Physical Layer"
SWITCH = device(PciAddress.parse("0000:05:00.0"), "nvidia-nvswitch", class_code=0x068000)
SXID = "nvidia-nvswitch0: SXid (PCI:0000:05:00.0): "
MIG = Modes(current=True, pending=True)

# id → scenes in which it warns or fails, with a word of what it says.
FIRES: Mapping[str, tuple[tuple[Scene, Verdict, str], ...]] = {
    "gpu_count": (
        (Scene(wanted=WANT(count=2)), FAIL, "1 GPUs"),
        (Scene(wanted=WANT(count=0)), FAIL, "1 GPUs"),
        (log(f"{XID_OTHER}79, GPU has fallen off the bus."), FAIL, "0000:42:00.0"),
        (Scene(devices=(device(lost=True),), wanted=WANT(count=1)), FAIL, "0 GPUs"),
    ),
    "nvml": tuple(
        (Scene(library=library, readings=()), FAIL, library.value)
        for library in Library
        if library not in {Library.ANSWERED, Library.UNASKED}
    )
    + tuple(
        (Scene(readings=(GpuReading(CARD, silent={"handle": why}),)), FAIL, why.value)
        for why in (Silence.TIMEOUT, Silence.CRASHED, Silence.DENIED, Silence.ERROR)
    ),
    "driver": (
        (Scene(readings=()), FAIL, "does not know it"),
        (Scene(readings=(), library=Library.TIMEOUT), FAIL, "did not answer"),
        (Scene(devices=(device(driver=None),), readings=()), WARN, "no driver"),
    ),
    "gpu_lost": (
        (Scene(devices=(device(lost=True),)), FAIL, "all ones"),
        (silent("temperature", Silence.LOST), FAIL, "lost"),
        (silent("inforom_valid", Silence.NEEDS_RESET), FAIL, "after a reset"),
        (Scene(readings=(GpuReading(CARD, silent={"handle": Silence.LOST}),)), FAIL, "lost"),
        (
            Scene(
                devices=(
                    device(),
                    device(PciAddress.parse("0000:41:00.1"), class_code=0x040300, lost=True),
                )
            ),
            FAIL,
            "0000:41:00.1",
        ),
    ),
    "recovery_action": (
        (well(recovery_action=1), FAIL, "gpu reset"),
        (well(recovery_action=2), FAIL, "node reboot"),
        (well(recovery_action=3), WARN, "drain p2p"),
        (well(recovery_action=4), FAIL, "drain and reset"),
        (well(recovery_action=23), FAIL, "not known"),
    ),
    "remap_failure": (
        (well(remapped=RemappedRows(0, 0, pending=False, failure=True)), FAIL, "not be remapped"),
        (well(unrepairable_memory=True), FAIL, "cannot be repaired"),
        (
            well(unrepairable_memory=True, remapped=None, silent={"remapped": Silence.UNSUPPORTED}),
            FAIL,
            "cannot be repaired",
        ),
    ),
    "remap_pending": (
        (well(remapped=RemappedRows(0, 1, pending=True, failure=False)), WARN, "waits"),
        (
            well(scene=LENDING, remapped=RemappedRows(0, 1, pending=True, failure=False)),
            FAIL,
            "waits",
        ),
    ),
    "remap_uncorrectable": (
        (well(remapped=RemappedRows(0, 1, pending=False, failure=False)), WARN, "1 rows"),
        (well(remapped=RemappedRows(0, 511, pending=False, failure=False)), WARN, "511 rows"),
        (well(remapped=RemappedRows(0, 512, pending=False, failure=False)), FAIL, "512 rows"),
    ),
    "retired_pages": (
        (well(retired=RetiredPages(10, 0, pending=False)), WARN, "10 pages"),
        (well(retired=RetiredPages(0, 15, pending=False)), WARN, "15 pages"),
        (well(retired=RetiredPages(60, 3, pending=False)), FAIL, "63 pages"),
        (well(retired=RetiredPages(0, 16, pending=False)), FAIL, "16 pages"),
        (well(retired=RetiredPages(1, 0, pending=True)), WARN, "wait"),
        (well(scene=LENDING, retired=RetiredPages(1, 0, pending=True)), FAIL, "wait"),
    ),
    "ecc_uncorrected": ((well(ecc_uncorrected=1), FAIL, "1 uncorrected"),),
    "sram_threshold": ((well(sram_exceeded=True), FAIL, "exceed"),),
    "ecc_mode": (
        (well(ecc=Modes(current=False, pending=False)), WARN, "off"),
        (well(ecc=Modes(current=False, pending=True)), WARN, "off, and on after"),
        (well(ecc=Modes(current=True, pending=False)), WARN, "on, and off after"),
    ),
    "pcie_width": (
        (link(width=8), FAIL, "8 of 16"),
        (link(width=8, port=Link(max_width=16)), FAIL, "8 of 16"),
        (link(width=4, port=Link(max_width=8)), FAIL, "4 of 8"),
        (replace(link(width=8), library=Library.ABSENT, readings=()), FAIL, "8 of 16"),
    ),
    "pcie_gen": (
        (well(pcie_gen=3, utilization=50), WARN, "3 of 5 at 50 %"),
        (
            replace(
                link(speed=8.0),
                readings=(
                    replace(
                        WELL,
                        pcie_gen=None,
                        pcie_gen_max=None,
                        utilization=90,
                        silent={
                            "pcie_gen": Silence.UNSUPPORTED,
                            "pcie_gen_max": Silence.UNSUPPORTED,
                        },
                    ),
                ),
            ),
            WARN,
            "3 of 5",
        ),
    ),
    "pcie_replay": (
        # 30.7 a minute are what a generation 5 link of 16 lanes may have.
        (replays(0, 62, 120), WARN, "31.0"),
        (replays(0, 31, 10), WARN, "31.0"),
        (replays(0, 16, 60, pcie_gen=4, pcie_gen_max=4), WARN, "16.0"),
        # Half the lanes, half the rate; where sysfs does not tell them, NVML does.
        (
            replace(replays(0, 16, 60), devices=(device(link=replace(GEN5, max_width=8)),)),
            WARN,
            "1",
        ),
        (
            replace(
                replays(0, 16, 60, pcie_width_max=8), devices=(device(link=Link(max_speed=32.0)),)
            ),
            WARN,
            "16.0",
        ),
    ),
    "clock_events": (
        (well(clock_events=(0x8, 0x8)), FAIL, "hardware slows"),
        (well(clock_events=(0x40, 0x41)), FAIL, "too hot"),
        (well(clock_events=(0x84, 0x80)), FAIL, "brakes"),
        (well(clock_events=(0x20, 0x24)), WARN, "hot"),
    ),
    "temperature": (
        (well(temperature_margin=10), WARN, "10 °C below"),
        (well(temperature_margin=0), FAIL, "0 °C below"),
        (well(temperature_margin=-3), FAIL, "-3 °C"),
        (
            well(
                temperature=80,
                temperature_margin=None,
                silent={"temperature_margin": Silence.UNSUPPORTED},
            ),
            WARN,
            "7 °C below",
        ),
        (
            replace(
                well(temperature_margin=14),
                thresholds=Thresholds(models={"*h100*": {"margin_warn": 15}}),
            ),
            WARN,
            "14 °C below",
        ),
    ),
    "power_limit": ((well(power_limit=400.0), WARN, "400 W of 700 W"),),
    "nvlink": (
        (well(nvlinks=links(down=2)), FAIL, "0, 1"),
        (
            well(name="NVIDIA A100-SXM4-80GB", fabric=Fabric(0, 0, 0), nvlinks=links(down=1)),
            FAIL,
            "down: 0",
        ),
        (well(scene=Scene(wanted=WANT(nvlinks=18)), nvlinks=links(down=1)), FAIL, "1 NVLinks"),
        (well(nvlinks=links(replay=3)), WARN, "link 17 replay 3"),
        (well(name="NVIDIA A40", fabric=Fabric(0, 0, 0), nvlinks=links(down=2)), WARN, "bridge"),
    ),
    "fabric": (
        (well(fabric=Fabric(1, 0, 0)), WARN, "not set it up"),
        (well(fabric=Fabric(2, 0, 0)), WARN, "not set it up"),
        (well(fabric=Fabric(3, 999, 0)), FAIL, "999"),
        (well(fabric=Fabric(3, 0, 0x1)), FAIL, "degraded"),
        (well(fabric=Fabric(3, 0, 0x1 << 4)), FAIL, "unhealthy"),
        (well(fabric=Fabric(3, 0, 0x2 << 8)), FAIL, "configured"),
        (well(fabric=Fabric(3, 0, 0x1 << 2)), WARN, "recovers"),
        (well(fabric=Fabric(7, 0, 0)), FAIL, "7 is not known"),
    ),
    "xid": (
        (log(f"{XID}79, pid=1, name=x, GPU has fallen off the bus."), FAIL, "Xid 79"),
        (silent("recovery_action", scene=log(f"{XID}13, pid=7, name=cuda, Fault")), WARN, "cuda"),
        (silent("recovery_action", scene=log(f"{XID}119, Timeout of GSP")), FAIL, "Xid 119"),
        # The worst of several, whatever came last.
        (log(f"{XID}79, off the bus", f"{XID}43, pid=1, name=x, stopped"), FAIL, "Xid 79"),
        # NVML cannot see it, and the log can.
        (
            log(
                f"{XID}79, off the bus",
                devices=(device(driver="vfio-pci"),),
                readings=(),
            ),
            FAIL,
            "Xid 79",
        ),
    ),
    "aer": (
        (log(f"nvidia {CARD}: PCIe Bus Error: severity=Uncorrectable (Fatal)"), FAIL, "fatal"),
        (log(f"nvidia {CARD}: PCIe Bus Error: severity=Uncorrectable (Non-Fatal)"), WARN, "lost"),
        (log(*[CORRECTED] * 100), WARN, "many"),
        (log(f"{AER}Uncorrected (Fatal), type=x", ports={CARD: PORT}), FAIL, "fatal"),
        (Scene(pci_errors={CARD: PciErrors(0, 0, 1)}), FAIL, "fatal"),
        (Scene(pci_errors={CARD: PciErrors(0, 1, 0)}), WARN, "lost"),
        # What the port above counts is the card's link; a busy log leaves lines out.
        (counted_at_port(60, 60), WARN, "many"),
        (replace(counted_at_port(60, 60), log=UNREAD), WARN, "many"),
    ),
    "kernel_log": (
        (
            log(f"vfio-pci {CARD}: not ready 65535ms after FLR; giving up"),
            FAIL,
            "did not come back",
        ),
        (
            log(f"NVRM: GPU {CARD}: RmInitAdapter failed! (0x22:0x56:894)", readings=()),
            FAIL,
            "could not start",
        ),
        (log(f"NVRM: GPU {CARD}: RmInitAdapter failed! (0x22)"), WARN, "at first"),
        (
            log(
                f"amdgpu {CARD}: amdgpu: GPU reset begin!",
                f"amdgpu {CARD}: amdgpu: GPU reset(3) failed",
                f"amdgpu {CARD}: amdgpu: GPU reset begin!",
            ),
            FAIL,
            "could not reset",
        ),
        (log(f"amdgpu {CARD}: amdgpu: GPU reset begin!"), WARN, "had to reset"),
        (
            log(f"amdgpu {CARD}: amdgpu: 2 uncorrectable hardware errors detected in umc block"),
            FAIL,
            "uncorrectable",
        ),
        (log(f"amdgpu {CARD}: amdgpu: ring gfx_0.0.0 timeout, signaled"), WARN, "hung"),
    ),
    "inforom": ((well(inforom_valid=False), WARN, "corrupt"),),
    "processes": (
        (
            well(scene=LENDING, processes=(GpuProcess(71, "compute"), GpuProcess(7, "graphics"))),
            FAIL,
            "7 71",
        ),
    ),
    "mig_mode": (
        (well(scene=Scene(wanted=WANT(mig=True))), FAIL, "off"),
        (silent("mig", scene=Scene(wanted=WANT(mig=True))), FAIL, "off"),
        (well(scene=Scene(wanted=WANT(mig=False)), mig=MIG), FAIL, "on"),
        (
            well(scene=Scene(wanted=WANT(mig=False)), mig=Modes(current=False, pending=True)),
            WARN,
            "on after",
        ),
    ),
    "cc_state": (
        (Scene(wanted=WANT(confidential=True)), FAIL, "off"),
        (silent("confidential", scene=Scene(wanted=WANT(confidential=True))), FAIL, "off"),
        (well(scene=Scene(wanted=WANT(confidential=False)), confidential=True), FAIL, "on"),
    ),
    "versions": (
        (pair(vbios="96.00.89"), WARN, "vbios of NVIDIA H100"),
        (pair(gsp="535.10"), WARN, "gsp of"),
        (pair(inforom="G520.0300"), WARN, "inforom of"),
        (well(gsp="535.10"), WARN, "535.10 with driver 550.90"),
    ),
    "sxid": (
        (
            log(f"{SXID}20034, Fatal, Link 30 LTSSM Fault Up", devices=(device(), SWITCH)),
            FAIL,
            "Lin",
        ),
        (log(f"{SXID}11012, Non-fatal, Link 32 x", devices=(device(), SWITCH)), WARN, "11012"),
    ),
}

# id → scenes much like those, in which all is well, or (None) there is nothing to be judged.
SILENT: Mapping[str, tuple[tuple[Scene, Verdict | None], ...]] = {
    "gpu_count": (
        (Scene(wanted=WANT(count=1)), OK),
        (log(f"{XID}79, GPU has fallen off the bus."), None),
        (
            Scene(devices=(device(), device(OTHER, "ast", vendor=0x1A03)), wanted=WANT(count=1)),
            OK,
        ),
    ),
    "nvml": (
        (Scene(), OK),
        (
            Scene(devices=(device(driver="vfio-pci"),), library=Library.ABSENT, readings=()),
            UNSUPPORTED,
        ),
        (
            Scene(devices=(device(driver="nouveau"),), library=Library.UNASKED, readings=()),
            UNSUPPORTED,
        ),
        (Scene(readings=(GpuReading(CARD, silent={"handle": Silence.LOST}),)), OK),
    ),
    "driver": (
        (Scene(), OK),
        (Scene(devices=(device(driver="vfio-pci"),), readings=()), UNSUPPORTED),
        (Scene(devices=(device(driver="nouveau"),), readings=()), UNSUPPORTED),
        (Scene(devices=(device(driver="amdgpu", vendor=0x1002),), readings=()), UNSUPPORTED),
        (Scene(library=Library.UNASKED, readings=()), UNSUPPORTED),
    ),
    "gpu_lost": ((Scene(), OK), (silent("temperature", Silence.TIMEOUT), OK)),
    "recovery_action": ((Scene(), OK), (silent("recovery_action"), UNSUPPORTED)),
    "remap_failure": (
        (well(remapped=RemappedRows(3, 1, pending=True, failure=False)), OK),
        (silent("unrepairable_memory"), OK),
    ),
    "remap_pending": (
        (well(scene=LENDING, remapped=RemappedRows(3, 1, pending=False, failure=False)), OK),
        (silent("remapped"), UNSUPPORTED),
    ),
    "remap_uncorrectable": (
        (well(remapped=RemappedRows(600, 0, pending=False, failure=False)), OK),
    ),
    "retired_pages": (
        (well(retired=RetiredPages(0, 9, pending=False)), OK),
        (silent("retired"), UNSUPPORTED),
    ),
    "ecc_uncorrected": ((Scene(), OK), (silent("ecc_uncorrected"), UNSUPPORTED)),
    "sram_threshold": ((Scene(), OK), (silent("sram_exceeded"), UNSUPPORTED)),
    "ecc_mode": ((Scene(), OK), (silent("ecc"), UNSUPPORTED)),
    "pcie_width": (
        (link(width=8, max_width=8), OK),
        # The slot has no more.
        (link(width=8, port=Link(max_width=8)), OK),
        (link(width=None), UNSUPPORTED),
    ),
    "pcie_gen": (
        (well(pcie_gen=1, utilization=49), OK),
        (well(pcie_gen=5, utilization=100), OK),
        (link(speed=2.5, port=Link(max_speed=2.5)), OK),
        (
            replace(
                link(speed=2.5),
                readings=(),
                devices=(device(driver="vfio-pci", link=replace(GEN5, speed=2.5)),),
            ),
            UNSUPPORTED,
        ),
    ),
    "pcie_replay": (
        (replays(0, 61, 120), OK),
        # A few within seconds are no rate.
        (replays(0, 30, 1), OK),
        (replays(9, 3, 60), UNSUPPORTED),
        (replays(7, 7, 60), OK),
        (
            replace(
                replays(0, 900, 60, pcie_width_max=None), devices=(device(link=Link(max_speed=32)),)
            ),
            UNSUPPORTED,
        ),
        (
            replace(
                replays(0, 900, 60, pcie_gen=None, pcie_gen_max=None),
                devices=(device(link=Link(max_width=16)),),
            ),
            UNSUPPORTED,
        ),
        (replays(0, 900, 0), UNSUPPORTED),
        (
            replace(Scene(), thresholds=Thresholds(previous=Baseline(60, {OTHER: 0}))),
            UNSUPPORTED,
        ),
        (Scene(), UNSUPPORTED),
    ),
    "clock_events": (
        (well(clock_events=(0x8, 0x0)), OK),
        (well(clock_events=(0x40, 0x20)), OK),
        (well(clock_events=(0x4, 0x4)), OK),
        (silent("clock_events"), UNSUPPORTED),
    ),
    "temperature": (
        (well(temperature_margin=11), OK),
        (
            well(
                temperature=76,
                temperature_margin=None,
                silent={"temperature_margin": Silence.UNSUPPORTED},
            ),
            OK,
        ),
        (
            well(
                temperature_margin=None,
                temperature_slowdown=None,
                silent=dict.fromkeys(
                    ("temperature_margin", "temperature_slowdown"), Silence.UNSUPPORTED
                ),
            ),
            UNSUPPORTED,
        ),
        (
            replace(
                well(temperature_margin=14),
                thresholds=Thresholds(models={"*a100*": {"margin_warn": 15}}),
            ),
            OK,
        ),
    ),
    "power_limit": ((well(power_limit=699.5), OK), (silent("power_limit"), UNSUPPORTED)),
    "nvlink": (
        (Scene(), OK),
        (well(nvlinks=links(crc=40)), OK),
        (well(name="NVIDIA A40", fabric=Fabric(0, 0, 0), nvlinks=links(down=18)), OK),
        (well(scene=Scene(wanted=WANT(nvlinks=16)), nvlinks=links(down=2)), OK),
        (silent("nvlinks"), UNSUPPORTED),
    ),
    "fabric": (
        (well(fabric=Fabric(3, 0, 0x1AA)), OK),
        (well(fabric=Fabric(0, 0, 0)), UNSUPPORTED),
        (silent("fabric"), UNSUPPORTED),
    ),
    "xid": (
        (log(f"{XID_OTHER}79, GPU has fallen off the bus."), OK),
        (log(f"{XID}43, pid=1, name=x, stopped"), OK),
        # The driver's own advice comes first, and it asks for nothing: a crash of a program.
        (log(f"{XID}13, pid=7, name=cuda, Graphics Exception"), OK),
        (Scene(log=KernelLog(silent=Silence.DENIED, details="no")), UNSUPPORTED),
    ),
    "aer": (
        (log(*[CORRECTED] * 99), OK),
        # The port above another card.
        (log(f"{AER}Uncorrected (Fatal), type=x"), OK),
        (Scene(log=KernelLog(silent=Silence.UNSUPPORTED, details="none")), UNSUPPORTED),
        (replace(counted_at_port(50, 49), log=UNREAD), OK),
        (Scene(pci_errors={OTHER: PciErrors(0, 0, 9)}), OK),
        (replace(Scene(pci_errors={OTHER: PciErrors(0, 0, 9)}), log=UNREAD), UNSUPPORTED),
    ),
    "kernel_log": (
        (log(f"vfio-pci {OTHER}: not ready 65535ms after FLR; giving up"), OK),
        (log(f"nvidia {CARD}: enabling device (0140 -> 0142)"), OK),
        (Scene(log=KernelLog(silent=Silence.TIMEOUT, details="late")), UNSUPPORTED),
    ),
    "inforom": ((Scene(), OK), (silent("inforom_valid"), UNSUPPORTED)),
    "processes": (
        (LENDING, OK),
        (well(processes=(GpuProcess(7, "compute"),)), None),
        (silent("processes", scene=LENDING), UNSUPPORTED),
    ),
    "mig_mode": (
        (well(mig=MIG), None),
        (well(scene=Scene(wanted=WANT(mig=True)), mig=MIG), OK),
        (silent("mig", scene=Scene(wanted=WANT(mig=False))), OK),
    ),
    "cc_state": (
        (well(confidential=True), None),
        (Scene(wanted=WANT(confidential=False)), OK),
        (silent("confidential", scene=Scene(wanted=WANT(confidential=False))), OK),
    ),
    "versions": (
        (pair(), OK),
        (pair(name="NVIDIA A40", vbios="94.02"), OK),
        (Scene(readings=()), UNSUPPORTED),
    ),
    "sxid": (
        (Scene(), None),
        (Scene(devices=(device(), SWITCH)), OK),
        (log(f"{SXID}22013, Non-fatal, Link 3 x", devices=(device(), SWITCH)), OK),
    ),
}


def cases(table: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(check, *(case if isinstance(case, tuple) else (case,)), id=f"{check}-{number}")
        for check, found in table.items()
        for number, case in enumerate(found)
    ]


@pytest.mark.parametrize(("check", "scene", "verdict", "word"), cases(FIRES))
def test_fires(check: str, scene: Scene, verdict: Verdict, word: str) -> None:
    found = result(scene, check)
    assert found is not None
    assert (found.status, word in f"{found.brief} {found.value}") == (verdict, True), found
    assert found.remedy


@pytest.mark.parametrize(("check", "scene", "verdict"), cases(SILENT))
def test_is_silent(check: str, scene: Scene, verdict: Verdict | None) -> None:
    found = result(scene, check)
    assert verdict not in {WARN, FAIL}
    assert (found and found.status) == verdict, found


def test_every_check_has_a_case_of_each_kind() -> None:
    assert list(FIRES) == list(CHECKS) == list(SILENT)


def test_a_card_that_is_well_is_well_in_every_check() -> None:
    found = report(
        Scene(lending=True, wanted=WANT(count=1, mig=False, confidential=False, nvlinks=18))
    )
    bad = [each for each in (*found.gpus[0].checks, *found.machine) if each.status is not OK]
    assert [(each.id, each.status) for each in bad] == [("pcie_replay", UNSUPPORTED)]
    assert found.status is OK


# Field of a reading → the checks that need it, in a scene in which they do.
NEEDED: Mapping[str, tuple[Scene, tuple[str, ...]]] = {
    "vbios": (Scene(), ("versions",)),
    "inforom": (Scene(), ("versions",)),
    "gsp": (Scene(), ("versions",)),
    "recovery_action": (Scene(), ("recovery_action",)),
    "remapped": (Scene(), ("remap_failure", "remap_pending", "remap_uncorrectable")),
    "unrepairable_memory": (Scene(), ("remap_failure",)),
    "retired": (Scene(), ("retired_pages",)),
    "ecc": (Scene(), ("ecc_mode",)),
    "ecc_uncorrected": (Scene(), ("ecc_uncorrected",)),
    "sram_exceeded": (Scene(), ("sram_threshold",)),
    "pcie_gen": (Scene(), ("pcie_gen",)),
    "pcie_gen_max": (Scene(), ("pcie_gen",)),
    "utilization": (well(pcie_gen=1), ("pcie_gen",)),
    "pcie_replays": (replays(0, 1, 60), ("pcie_replay",)),
    "clock_events": (Scene(), ("clock_events",)),
    "temperature_margin": (Scene(), ("temperature",)),
    "temperature": (silent("temperature_margin"), ("temperature",)),
    "temperature_slowdown": (silent("temperature_margin"), ("temperature",)),
    "power_limit": (Scene(), ("power_limit",)),
    "power_default": (Scene(), ("power_limit",)),
    "nvlinks": (Scene(), ("nvlink",)),
    "fabric": (Scene(), ("fabric",)),
    "processes": (LENDING, ("processes",)),
    "inforom_valid": (Scene(), ("inforom",)),
    "mig": (Scene(wanted=WANT(mig=False)), ("mig_mode",)),
    "confidential": (Scene(wanted=WANT(confidential=False)), ("cc_state",)),
}
# What tells cards apart, or is for show: no verdict hangs on it.
NOT_NEEDED = {
    *("uuid", "name", "serial"),
    *("pcie_width", "pcie_width_max", "power", "memory_total", "memory_used", "sm_clock"),
}
FAILING = [why for why in Silence if why is not Silence.UNSUPPORTED]


def mute(scene: Scene, name: str, why: Silence | None) -> Scene:
    """The scene, with one more field that is not answered."""
    reading = scene.readings[0]
    told = {**reading.silent} if why is None else {**reading.silent, name: why}
    return replace(scene, readings=(replace(reading, **{name: None}, silent=told),))


def test_every_field_is_needed_by_a_check_or_by_none() -> None:
    known = {each.name for each in fields(GpuReading)} - {"address", "silent"}
    assert known == set(NEEDED) | NOT_NEEDED
    assert not set(NEEDED) & NOT_NEEDED


@pytest.mark.parametrize("why", [*FAILING, None], ids=str)
@pytest.mark.parametrize("name", NEEDED)
def test_what_should_have_been_answered_and_was_not_fails(name: str, why: Silence | None) -> None:
    scene, checks = NEEDED[name]
    for check in checks:
        before, after = result(scene, check), result(mute(scene, name, why), check)
        assert before is not None
        assert before.status is OK
        assert after is not None
        assert (after.status, after.value) == (FAIL, (why or Silence.ERROR).value)
        assert after.remedy


@pytest.mark.parametrize("name", NEEDED)
def test_what_a_card_does_not_support_never_fails(name: str) -> None:
    scene, checks = NEEDED[name]
    for check in checks:
        found = result(mute(scene, name, Silence.UNSUPPORTED), check)
        assert found is not None
        assert found.status in {OK, UNSUPPORTED}
    statuses = {
        each.status for each in report(mute(scene, name, Silence.UNSUPPORTED)).gpus[0].checks
    }
    assert statuses <= {OK, UNSUPPORTED}


def test_unsupported_is_not_ok() -> None:
    # But where sysfs, another field or the expectation decides it.
    decided = {
        *("vbios", "inforom", "gsp"),
        *("unrepairable_memory", "pcie_gen", "pcie_gen_max", "temperature_margin"),
    }
    for name, (scene, checks) in NEEDED.items():
        for check in checks:
            found = result(mute(scene, name, Silence.UNSUPPORTED), check)
            assert found is not None
            expected = OK if name in {*decided, "mig", "confidential"} else UNSUPPORTED
            if (name, check) == ("remapped", "remap_failure"):
                expected = OK
            assert (name, check, found.status) == (name, check, expected)


@pytest.mark.parametrize(("why", "check"), [
    (Silence.LOST, "gpu_lost"),
    (Silence.NEEDS_RESET, "gpu_lost"),
    (Silence.TIMEOUT, "nvml"),
    (Silence.CRASHED, "nvml"),
    (Silence.DENIED, "nvml"),
    (Silence.ERROR, "nvml"),
])  # fmt: skip
def test_a_card_without_any_answer_fails_once(why: Silence, check: str) -> None:
    found = report(Scene(readings=(GpuReading(CARD, silent={"handle": why}),), lending=True))
    card = found.gpus[0]
    assert [each.id for each in card.checks if each.status is FAIL] == [check]
    by_id = {each.id: each for each in card.checks}
    assert by_id[check].remedy
    # What needs no driver is judged all the same, and no check of NVML's is.
    assert by_id["pcie_width"].status is by_id["pcie_gen"].status is by_id["aer"].status is OK
    assert set(by_id) <= {
        "driver",
        "nvml",
        "gpu_lost",
        "pcie_width",
        "pcie_gen",
        "xid",
        "aer",
        "kernel_log",
    }
    assert card.status is found.status is FAIL


def test_a_slow_link_of_a_card_without_any_answer_is_no_second_failure() -> None:
    slow = device(link=replace(GEN5, speed=2.5))
    scene = Scene(devices=(slow,), readings=(GpuReading(CARD, silent={"handle": Silence.TIMEOUT}),))
    found = result(scene, "pcie_gen")
    assert found is not None
    assert found.status is UNSUPPORTED


@pytest.mark.parametrize(
    ("vendor", "driver", "why"), [(0x1002, "amdgpu", "sleeps"), (0x8086, "xe", "NVIDIA")]
)
def test_of_another_makers_card_sysfs_and_the_log_are_judged(
    vendor: int, driver: str, why: str
) -> None:
    card = device(driver=driver, vendor=vendor, link=replace(GEN5, width=8))
    found = report(Scene(devices=(card,), readings=(), library=Library.UNASKED, lending=True))
    by_id = {each.id: each for each in found.gpus[0].checks}
    assert set(by_id) == {
        "driver",
        "gpu_lost",
        "pcie_width",
        "pcie_gen",
        "xid",
        "aer",
        "kernel_log",
    }
    assert why in by_id["driver"].brief
    assert by_id["pcie_width"].status is FAIL
    assert by_id["driver"].status is by_id["xid"].status is UNSUPPORTED
    reset = report(
        Scene(devices=(card,), readings=(), lines=(f"amdgpu {CARD}: amdgpu: GPU reset(3) failed",))
    )
    assert [each.id for each in reset.gpus[0].checks if each.status is FAIL] == [
        "pcie_width",
        "kernel_log",
    ]


def test_a_virtual_function_is_not_missed_by_nvml() -> None:
    function = device(
        PciAddress.parse("0000:41:00.4"), physfn=CARD, link=Link(max_width=16, max_speed=32.0)
    )
    found = report(Scene(devices=(device(), function), wanted=WANT(count=1)))
    assert [each.address for each in found.gpus] == [CARD, function.address]
    statuses = {each.status for each in found.gpus[1].checks}
    assert statuses == {OK, UNSUPPORTED}
    assert found.status is OK


def test_a_recorded_machine_is_judged_by_sysfs() -> None:
    found = report(
        Scene(library=Library.UNASKED, readings=(), log=KernelLog(silent=Silence.UNSUPPORTED))
    )
    assert {each.status for each in found.gpus[0].checks} == {OK, UNSUPPORTED}
    # What sysfs alone says of a card is little, and does not pass for well.
    assert [each.id for each in found.machine if each.status is WARN] == ["nvml"]
    worn = report(replace(link(width=4), library=Library.UNASKED, readings=()))
    assert [each.id for each in worn.gpus[0].checks if each.status is FAIL] == ["pcie_width"]


def test_a_log_of_which_the_beginning_is_gone_says_so() -> None:
    found = result(Scene(log=KernelLog(whole=False)), "xid")
    assert found is not None
    assert "still holds" in found.brief


def test_quantities_are_numbers_with_units() -> None:
    units = {
        "pcie_width": (16, "lanes"),
        "temperature": (46, "celsius"),
        "power_limit": (700, "watts"),
        "remap_uncorrectable": (0, "rows"),
        "retired_pages": (0, "pages"),
        "ecc_uncorrected": (0, "errors"),
        "aer": (0, "errors"),
        "nvlink": (18, "links"),
    }
    by_id = {each.id: each for each in report(Scene()).gpus[0].checks}
    assert {check: (by_id[check].number, by_id[check].unit) for check in units} == units


def test_the_driver_cures_what_a_reset_cures_and_nothing_else() -> None:
    content, fallen = log(f"{XID}119, Timeout of GSP"), log(f"{XID}79, off the bus")
    verdicts = [found.status for each in (content, fallen) if (found := result(each, "xid"))]
    assert verdicts == [WARN, FAIL]


def test_thresholds_of_a_model_are_its_own() -> None:
    rules = Thresholds(models={"*": {"margin_warn": 5}, "*H100*": {"margin_warn": 20}})
    assert rules.for_model("NVIDIA H100 80GB HBM3").margin_warn == 20
    assert rules.for_model("Tesla T4").margin_warn == rules.for_model(None).margin_warn == 5
    assert Thresholds().for_model("Tesla T4").margin_warn == 10
    with pytest.raises(BadInput, match="margin_wran"):
        Thresholds(models={"*": {"margin_wran": 5}})


def test_of_several_troubles_in_the_log_all_are_counted() -> None:
    lines = [f"amdgpu {CARD}: amdgpu: ring gfx_0.0.0 timeout, signaled"] * 3
    found = result(log(*lines, f"amdgpu {CARD}: amdgpu: GPU reset begin!"), "kernel_log")
    assert found is not None
    assert found.number == 4
    assert found.value is not None
    assert "×3" in found.value


@pytest.mark.parametrize(("pending", "word"), [(True, "--gpu-reset"), (False, "-mig 1")])
def test_a_mode_that_is_set_already_takes_a_reset_alone(pending: bool, word: str) -> None:
    scene = well(scene=Scene(wanted=WANT(mig=True)), mig=Modes(current=False, pending=pending))
    found = result(scene, "mig_mode")
    assert found is not None
    assert found.status is FAIL
    assert word in found.remedy


def test_an_xid_of_a_card_is_not_one_of_its_virtual_function() -> None:
    function = device(PciAddress.parse("0000:41:00.4"), "vfio-pci", physfn=CARD)
    found = report(
        log(f"{XID}79, GPU has fallen off the bus.", devices=(device(), function), readings=(WELL,))
    )
    verdicts = {
        gpu.address: each.status for gpu in found.gpus for each in gpu.checks if each.id == "xid"
    }
    assert verdicts == {CARD: FAIL, function.address: OK}


def test_an_xid_names_no_function_so_it_is_of_any_card_in_its_slot() -> None:
    second = device(PciAddress.parse("0000:41:00.2"))
    found = report(log(f"{XID}79, GPU has fallen off the bus.", devices=(second,), readings=()))
    by_id = {each.id: each.status for each in found.gpus[0].checks}
    assert by_id["xid"] is FAIL


def test_cards_are_named_by_the_driver_and_else_by_sysfs() -> None:
    named = device(name="GH100 [H100 SXM5 80GB]")
    known = report(Scene(devices=(named,))).gpus[0]
    unknown = report(
        Scene(devices=(replace(named, binding=DriverBinding("vfio-pci", None)),), readings=())
    )
    assert (known.name, known.uuid, known.driver) == (WELL.name, WELL.uuid, "nvidia")
    assert [(each.name, each.uuid) for each in unknown.gpus] == [(named.name, None)]


def test_what_is_shown_of_a_card_that_is_well() -> None:
    by_id = {each.id: each for each in report(Scene()).gpus[0].checks}
    assert by_id["temperature"].brief == "46 °C below its slowdown, at 41 °C"
    assert by_id["nvlink"].brief == "18 NVLinks are up"
    unused = well(name="NVIDIA A40", fabric=Fabric(0, 0, 0), nvlinks=links(down=18))
    found = result(unused, "nvlink")
    assert found is not None
    assert found.brief == "no NVLink is in use"


@pytest.mark.parametrize(("reason", "word"), [(0x80, "power cables"), (0x40, "fans")])
def test_clocks_held_back_are_helped_by_their_cause(reason: int, word: str) -> None:
    found = result(well(clock_events=(reason, reason)), "clock_events")
    assert found is not None
    assert found.remedy.rpartition("then ")[2].startswith(("its power", "fans"))
    assert word in found.remedy.rpartition("then ")[2]


def test_the_worst_sxid_is_told_whatever_came_last() -> None:
    lines = (f"{SXID}20034, Fatal, Link 30 LTSSM Fault Up", f"{SXID}11012, Non-fatal, Link 32 x")
    found = result(log(*lines, devices=(device(), SWITCH)), "sxid")
    assert found is not None
    assert (found.status, found.number) == (FAIL, 20034)
    assert found.value == "0000:05:00.0: 20034, 11012"


def test_the_count_is_told_with_what_was_expected() -> None:
    found = result(Scene(wanted=WANT(count=2)), "gpu_count")
    assert found is not None
    assert (found.value, found.threshold, found.number) == ("1 GPUs", "2 GPUs", 1)


def test_a_card_that_the_kernel_keeps_locked_is_no_card_that_answers() -> None:
    found = result(
        Scene(devices=(device(driver="vfio-pci", locked=True),), readings=()), "gpu_lost"
    )
    assert found is not None
    assert (found.status, found.value) == (FAIL, "locked")


def test_a_module_that_a_guest_has_alone_needs_no_link() -> None:
    """One SXM card passed through: its neighbours and switches are not in the guest."""
    down = tuple(NvLink(number, active=False) for number in range(12))
    alone = well(name="NVIDIA A100-SXM4-80GB", nvlinks=down, fabric=None)
    found = result(alone, "nvlink")
    assert found is not None
    assert found.status is OK
    one_down = (NvLink(0, active=False), *(NvLink(n, active=True) for n in range(1, 12)))
    found = result(well(name="NVIDIA A100-SXM4-80GB", nvlinks=one_down, fabric=None), "nvlink")
    assert found is not None
    assert found.status is FAIL
    joining = well(nvlinks=down, fabric=Fabric(2, 0, 0))
    found = result(joining, "nvlink")
    assert found is not None
    assert found.status is not FAIL


def test_a_virtual_function_needs_no_driver_on_the_host() -> None:
    whole = device(OTHER)
    part = device(driver=None, physfn=OTHER)
    scene = Scene(devices=(part, whole), readings=(), library=Library.UNASKED)
    by_id = {each.id: each for each in report(scene).gpus[0].checks}
    assert (by_id["driver"].status, by_id["driver"].remedy) == (UNSUPPORTED, "")
