"""A made-up demo for tests of the report: plausible values, measured nowhere."""

from __future__ import annotations

import base64
import struct
import zlib

from gpupt.model.cluster import Role
from gpupt.model.demo import (
    EMULATED_DOES_NOT_PROVE,
    EMULATED_PROVES,
    ClassifierResult,
    DemoNode,
    DemoSummary,
    Exercise,
    FunctionKind,
    Holding,
    HostFunction,
    HostGroup,
    HostPicture,
    Sample,
    SeenGpu,
    SparkResult,
    TaskGpus,
    TimelineEntry,
)
from gpupt.model.pci import PciAddress, PciId

GIB = 2**30
H100 = PciId(0x10DE, 0x2330)
T4 = PciId(0x10DE, 0x1EB8)

SPEC = """\
name: demo
rolls: [spark, tensorflow, classifier]
network: 10.17.0.0/24
nodes:
  - {name: frontend, role: frontend, cpus: 1, memory: 2G}
  - {name: gpu-1, role: compute, cpus: 1, memory: 3G, gpus: 1}
  - {name: gpu-2, role: compute, cpus: 1, memory: 3G, gpus: 1}
"""


def address(text: str) -> PciAddress:
    return PciAddress.parse(text)


def function(
    where: str,
    id: PciId,
    class_code: int,
    name: str,
    *,
    kind: FunctionKind = FunctionKind.GPU,
    driver: str | None = None,
    lent_to: str | None = None,
    after: str | None = "",
    port: str | None = None,
) -> HostFunction:
    """A function whose driver is the same after as before, unless ``after`` names another."""
    before = Holding(driver)
    during = Holding("vfio-pci", lent_to) if lent_to else before
    return HostFunction(
        address(where),
        id,
        class_code,
        name,
        kind,
        before,
        during,
        before if after == "" else Holding(after),
        address(port) if port else None,
    )


HOST_PICTURE = HostPicture(
    emulated=True,
    name="lab",
    cpus=2,
    memory=10 * GIB,
    groups=(
        HostGroup(
            11,
            (
                function(
                    "01:00.0",
                    H100,
                    0x030200,
                    "NVIDIA H100 80GB HBM3 (emulated)",
                    driver="uio_pci_generic",
                    lent_to="gpu-1",
                    port="00:04.0",
                ),
            ),
        ),
        HostGroup(
            12,
            (
                function(
                    "02:00.0",
                    T4,
                    0x030000,
                    "NVIDIA Tesla T4 (emulated)",
                    driver="bochs-drm",
                    lent_to="gpu-2",
                    port="00:05.0",
                ),
                function(
                    "02:00.1",
                    PciId(0x10DE, 0x10F8),
                    0x040300,
                    "NVIDIA TU104 HD Audio (emulated)",
                    kind=FunctionKind.COMPANION,
                    driver="snd_hda_intel",
                    lent_to="gpu-2",
                    port="00:05.0",
                ),
            ),
        ),
        HostGroup(
            13,
            (
                function(
                    "03:00.0",
                    T4,
                    0x030000,
                    "NVIDIA Tesla T4, the host's own (emulated)",
                    driver="bochs-drm",
                    port="00:06.0",
                ),
            ),
        ),
    ),
    kernel="6.12.57+deb13-amd64",
    distribution="Debian 13",
    libvirt="11.3.0",
    qemu="10.0.13",
    iommu="Intel VT-d, emulated",
    accelerator="tcg",
)

NODES = (
    DemoNode("frontend", Role.FRONTEND, "10.17.0.10", 1, 2 * GIB, domain_type="kvm", ready=31.0),
    DemoNode(
        "gpu-1",
        Role.COMPUTE,
        "10.17.0.11",
        1,
        3 * GIB,
        gpus_seen=(SeenGpu(address("07:00.0"), H100, 0x030200),),
        lent=(address("01:00.0"),),
        exercises=(Exercise(address("07:00.0"), 3628800, True),),
        domain_type="kvm",
        ready=38.2,
    ),
    DemoNode(
        "gpu-2",
        Role.COMPUTE,
        "10.17.0.12",
        1,
        3 * GIB,
        gpus_seen=(SeenGpu(address("07:00.0"), T4, 0x030000),),
        lent=(address("02:00.0"),),
        domain_type="kvm",
        ready=39.0,
    ),
)

PHASES = (
    ("build images", 214.0, "base, gpupt, spark, tensorflow, classifier", "gpupt image build"),
    ("boot the emulated host", 21.0, "QEMU 10.0.13, software emulation", "gpupt lab up"),
    ("diagnose", 4.1, "12 checks, nothing in the way", "gpupt doctor"),
    ("list the GPUs", 2.2, "3 GPUs in 3 groups", "gpupt list"),
    ("detach two GPUs", 6.4, "3 functions to vfio-pci", "gpupt detach 01:00.0 02:00.0"),
    ("bring the cluster up", 88.0, "frontend, gpu-1, gpu-2 ready", "gpupt up demo.yaml"),
    ("look inside the nodes", 7.5, "10de:2330 in gpu-1, 10de:1eb8 in gpu-2", "gpupt show demo"),
    ("Spark's GPU addresses", 71.0, "2 workers offer a GPU each", "gpupt run demo gpu-addresses"),
    ("classify", 263.0, "trained on gpu-1, applied on both", "gpupt run demo classify"),
    ("take the cluster down", 14.0, "nodes gone, GPUs given back", "gpupt down demo"),
    ("verify", 3.0, "every driver as it was, no override, no loan", "gpupt status"),
)


def timeline() -> tuple[TimelineEntry, ...]:
    entries, at = [], 0.0
    for name, seconds, detail, command in PHASES:
        entries.append(TimelineEntry(name, at, at + seconds, detail=detail, command=command))
        at += seconds
    return tuple(entries)


def picture(stained: bool, *, seed: int, side: int = 48) -> str:
    """A small made-up sheet as base64 PNG: paper, a dark stroke, and a brown patch or none."""
    rows = []
    for y in range(side):
        row = bytearray([0])
        for x in range(side):
            red, green, blue = 236, 228, 206
            if stained and (x - 30) ** 2 + (y - 28 + seed) ** 2 < 130:
                red, green, blue = 176, 132, 78
            if abs(x - 24 - (y - 24) * (seed - 3) // 12) < 2 and 6 < y < 42:
                red, green, blue = 72, 92, 54
            row += bytes((red, green, blue))
        rows.append(bytes(row))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


CLASSIFIER = ClassifierResult(
    trained_on=480,
    applied_to=2400,
    accuracy=0.934,
    kappa=0.86,
    majority_baseline=0.60,
    colour_baseline=0.71,
    parquet="/home/spark/predictions.parquet",
    confusion=((1376, 64), (94, 866)),
    samples=tuple(
        Sample(
            picture(number % 3 != 1, seed=number),
            stained=number % 3 != 1,
            predicted=number % 3 != 1 if number != 5 else False,
            probability=0.12 if number % 3 == 1 or number == 5 else 0.97,
            specimen=f"S{number:05d}",
            media_type="image/png",
        )
        for number in range(8)
    ),
    seeds=((1, 0.931), (2, 0.938), (3, 0.929)),
    trained_where="gpu-1",
    applied_where=("gpu-1", "gpu-2"),
    train_seconds=96.0,
    apply_seconds=58.0,
)

SUMMARY = DemoSummary(
    ok=True,
    seconds=sum(seconds for _, seconds, _, _ in PHASES),
    timeline=timeline(),
    host=HOST_PICTURE,
    nodes=NODES,
    spark=SparkResult(2, (TaskGpus("gpu-1", 0, ("0",)), TaskGpus("gpu-2", 1, ("0",))), 34.5),
    classifier=CLASSIFIER,
    restored=True,
    cluster="demo",
    spec=SPEC,
    began="2000-01-01T12:00:00+00:00",
    version="0.1.0",
    proves=EMULATED_PROVES,
    does_not_prove=EMULATED_DOES_NOT_PROVE,
)
