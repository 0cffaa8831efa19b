"""What a demo found out: the values behind demo-report/summary.json and its page."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpupt.model.cluster import Role
from gpupt.model.pci import PciAddress, PciId


class PhaseStatus(StrEnum):
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One phase; ``start`` and ``end`` are seconds since the demo began.

    ``detail`` is one line for a person; ``command`` what a reader would type for it."""

    phase: str
    start: float
    end: float
    status: PhaseStatus = PhaseStatus.DONE
    detail: str = ""
    command: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


HOST = "host"


@dataclass(frozen=True, slots=True)
class Holding:
    """Who had a function at one moment: the driver bound to it (None: driverless) and its
    holder, ``HOST`` or the name of a node (or ``gpupt`` while detached and lent to nobody)."""

    driver: str | None
    holder: str = HOST


# A moment that a demo which failed half-way never came to, or could not read any more.
NOT_READ = "not read"
UNREAD = Holding(None, NOT_READ)


class FunctionKind(StrEnum):
    GPU = "gpu"
    COMPANION = "companion"
    BRIDGE = "bridge"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class HostFunction:
    """A PCI function in the picture of the host, and who had it before, during and after.

    ``port`` is the root port above it, where there is one; what was not read is ``UNREAD``."""

    address: PciAddress
    id: PciId
    class_code: int
    name: str
    kind: FunctionKind
    before: Holding
    during: Holding
    after: Holding
    port: PciAddress | None = None

    @property
    def was_lent(self) -> bool:
        """Whether it was seen with another holder, or on another driver, than before."""
        return self.during not in (self.before, UNREAD)


@dataclass(frozen=True, slots=True)
class HostGroup:
    """One IOMMU group with its members in order of address."""

    number: int
    functions: tuple[HostFunction, ...]


@dataclass(frozen=True, slots=True)
class HostPicture:
    """The physical host that lent its GPUs; ``emulated`` says that it does not exist.

    ``memory`` in bytes; ``accelerator`` is what its own machine gave it (``tcg``, ``kvm``;
    empty for a real host); ``groups`` need hold only those worth showing."""

    emulated: bool
    name: str
    cpus: int
    memory: int
    groups: tuple[HostGroup, ...]
    kernel: str = ""
    distribution: str = ""
    libvirt: str = ""
    qemu: str = ""
    iommu: str = ""
    accelerator: str = ""

    @property
    def gpus(self) -> tuple[HostFunction, ...]:
        """The main functions of the GPUs, in order of address."""
        found = [
            function
            for group in self.groups
            for function in group.functions
            if function.kind is FunctionKind.GPU
        ]
        return tuple(sorted(found, key=lambda function: function.address))


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """A GPU as a node itself saw it; ``address`` is the guest's own.  ``class_code`` None: not
    said."""

    address: PciAddress
    id: PciId
    class_code: int | None = None


@dataclass(frozen=True, slots=True)
class Exercise:
    """A GPU worked through its registers in a node: the factorial of 10 it computed, and
    whether a DMA round trip came back as it went."""

    address: PciAddress
    factorial: int | None
    dma: bool | None


@dataclass(frozen=True, slots=True)
class DemoNode:
    """A node of the demo's cluster; ``memory`` in bytes; ``lent`` are the host's addresses of
    the GPUs it was given; ``ready`` is seconds from its start to its readiness."""

    name: str
    role: Role
    ip: str
    cpus: int
    memory: int
    gpus_seen: tuple[SeenGpu, ...] = ()
    lent: tuple[PciAddress, ...] = ()
    exercises: tuple[Exercise, ...] = ()
    domain_type: str = ""
    ready: float | None = None


@dataclass(frozen=True, slots=True)
class TaskGpus:
    """The GPU addresses that Spark gave one task."""

    host: str
    task: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SparkResult:
    workers: int
    gpu_addresses: tuple[TaskGpus, ...]
    job_seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One sheet that the classifier saw; ``image`` is base64, ``media_type`` its type.

    ``stained`` is the truth, ``predicted`` the classifier's word, ``probability`` (0 to 1)
    that of a stain."""

    image: str
    stained: bool
    predicted: bool
    probability: float | None = None
    specimen: str = ""
    media_type: str = "image/jpeg"


@dataclass(frozen=True, slots=True)
class ClassifierResult:
    """How the classifier did; counts are sheets, ``confusion`` is ((tn, fp), (fn, tp)).

    ``colour_baseline`` is the accuracy of a regression on the sheets' mean colour alone.
    ``seeds`` holds (seed, accuracy on held-out specimens) where several were tried."""

    trained_on: int
    applied_to: int
    accuracy: float
    kappa: float
    majority_baseline: float
    parquet: str
    confusion: tuple[tuple[int, int], tuple[int, int]]
    samples: tuple[Sample, ...] = ()
    seeds: tuple[tuple[int, float], ...] = ()
    synthetic: bool = True
    trained_where: str = ""
    applied_where: tuple[str, ...] = ()
    colour_baseline: float | None = None
    train_seconds: float | None = None
    apply_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """A whole demo.  ``began`` is an ISO 8601 time; ``failure`` says in a line what stopped
    it; ``restored`` is true when every function was *read back* on the driver it came from,
    no override and no loan left; ``proves`` and ``does_not_prove`` are sentences."""

    ok: bool
    seconds: float
    timeline: tuple[TimelineEntry, ...]
    host: HostPicture
    nodes: tuple[DemoNode, ...]
    spark: SparkResult | None
    classifier: ClassifierResult | None
    restored: bool
    cluster: str = ""
    spec: str = ""
    began: str = ""
    version: str = ""
    failure: str = ""
    proves: tuple[str, ...] = ()
    does_not_prove: tuple[str, ...] = ()


# What may be said of any demo on an emulated host (DemoSummary.proves, .does_not_prove).
EMULATED_PROVES = (
    "Passthrough for real: Linux put the cards in IOMMU groups, a whole group left its driver "
    "for vfio-pci, QEMU gave it to a guest, and the guest drove it with DMA through the IOMMU.",
    "libvirt, the cluster's network, SSH with pinned host keys, the images and their rolls: "
    "the same code, kernel and daemons as on a real host.",
    "Giving back: each function was read again at the end and stood on the driver it came from.",
    "Spark's GPU scheduling: each worker found its node's GPU, and tasks were given its address.",
)
EMULATED_DOES_NOT_PROVE = (
    "NVIDIA's driver and CUDA: no GPU computed anything here; TensorFlow ran on emulated CPUs. "
    "On the host a generic kernel driver stands where NVIDIA's would be.",
    "Reset quirks, large BARs, NVLink and power states of real cards.",
    "Speed: an emulated host is many times slower than a real one.",
    "The classifier's worth on real herbarium sheets: the sheets are synthetic.",
)
