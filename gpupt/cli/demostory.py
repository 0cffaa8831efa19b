"""What the demo does inside the emulated host, with the gpupt that a real host runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from gpupt.errors import Failed, GpuptError
from gpupt.lab.story import Facts, Inside, Timeline
from gpupt.model.cluster import ClusterSpec
from gpupt.model.demo import ClassifierResult, Exercise, SparkResult
from gpupt.model.pci import PciAddress
from gpupt.report.demo_json import classifier_result, exercises, spark_result

SPEC_IN_HOST = "/root/cluster.yaml"
# Under pure emulation on two busy cores; each is several times what was measured.
DEADLINE = {"doctor": 180, "list": 60, "detach": 120, "up": 1500, "job": 1500, "down": 300}


@dataclass
class Told:
    """What is known so far; a demo that fails half-way reports what it got to."""

    before: Facts | None = None
    during: Facts | None = None
    after: Facts | None = None
    accelerator: str = ""
    versions: tuple[str, str] = ("", "")
    names: dict[PciAddress, str] = field(default_factory=dict)
    companions: list[PciAddress] = field(default_factory=list)
    cluster_up: Mapping[str, Any] = field(default_factory=dict)
    worked: dict[str, tuple[Exercise, ...]] = field(default_factory=dict)
    spark: SparkResult | None = None
    classifier: ClassifierResult | None = None
    differences: tuple[str, ...] = ()
    restored: bool = False


def play(host: Inside, timeline: Timeline, told: Told, spec: ClusterSpec, spec_text: str) -> None:
    """The story inside the emulated host, from its doctor to the GPUs given back.

    What is learnt goes into ``told`` as it is learnt.  A cluster that came up is taken down
    again even when a later phase fails; the first failure is the one raised.
    """
    cluster = spec.name
    with timeline.phase("doctor", command="gpupt doctor", detail="what would keep it from lending"):
        told.before = host.facts()
        told.versions = host.versions()
        seen = host.gpupt("doctor", deadline=DEADLINE["doctor"])
        host.say(f"           checked {len(seen['checked'])}, found {len(seen['findings'])}")
    with timeline.phase("list", command="gpupt list", detail="the host's GPUs and their groups"):
        listed = host.gpupt("list", deadline=DEADLINE["list"])["gpus"]
        for gpu in listed:
            told.names[PciAddress.parse(gpu["address"])] = gpu["name"] or ""
            told.companions += [PciAddress.parse(each) for each in gpu["companions"]]
            host.say(f"           {gpu['address']} {gpu['name']}  {gpu['driver']}  {gpu['state']}")
    wanted = sum(node.gpus.wanted for node in spec.nodes)
    lent = [gpu["address"] for gpu in listed if not gpu["boot_vga"]][:wanted]

    def down() -> None:
        with timeline.phase(
            "down", command=f"gpupt down {cluster}", detail="nodes gone, GPUs back on their drivers"
        ):
            _give_back(host, told, cluster)

    with afterwards(down):
        with timeline.phase(
            "detach", command=f"gpupt detach {' '.join(lent)}", detail="whole groups, to vfio-pci"
        ):
            host.gpupt("detach", "--yes", *lent, deadline=DEADLINE["detach"])
        with timeline.phase(
            "up", command="gpupt up cluster.yaml", detail="the network, the nodes, their GPUs"
        ):
            host.ssh.run(["tee", SPEC_IN_HOST], stdin=spec_text, deadline=60)
            told.cluster_up = host.gpupt("up", "--yes", SPEC_IN_HOST, deadline=DEADLINE["up"])
            told.during = host.facts()
        with timeline.phase(
            "gpus",
            command=f"gpupt ssh {cluster} compute-0 gpupt-node exercise",
            detail="each GPU seen in its node and worked through its registers",
        ):
            _exercise(host, told, spec)
        with timeline.phase(
            "spark",
            command=f"gpupt run {cluster} gpu-addresses",
            detail="tasks print the GPU addresses that Spark gave them",
        ):
            job = host.gpupt("run", cluster, "gpu-addresses", deadline=DEADLINE["job"])
            told.spark = spark_result(job)
            _judge_spark(told.spark, spec)
        with timeline.phase(
            "classifier",
            command=f"gpupt run {cluster} classify",
            detail="train on a GPU node, apply with Spark on all",
        ):
            job = host.gpupt("run", cluster, "classify", deadline=DEADLINE["job"])
            told.classifier = classifier_result(job)
            _judge_classifier(told.classifier)


@contextmanager
def afterwards(tidy: Callable[[], None]) -> Iterator[None]:
    """Tidy up whatever happened.  The first failure is the one raised; what fails after it is
    told below it."""
    try:
        yield
    except GpuptError as first:
        try:
            tidy()
        except GpuptError as second:
            details = (*first.details, f"and then: {second.brief}", *second.details)
            raise type(first)(first.brief, details=details, remedy=first.remedy) from first
        raise
    except BaseException:  # Ctrl-C: nothing that fails now may hide it
        with suppress(GpuptError):
            tidy()
        raise
    tidy()


def _exercise(host: Inside, told: Told, spec: ClusterSpec) -> None:
    """Every compute node's GPUs seen and, the edu-based, worked; raises Failed."""
    for node in spec.nodes:
        if not node.gpus.wanted:
            continue
        printed = host.gpupt(
            "ssh", spec.name, node.name, "gpupt-node", "exercise", deadline=DEADLINE["list"] * 3
        )
        told.worked[node.name] = exercises(printed)
        for done in told.worked[node.name]:
            host.say(f"           {node.name}: 10! = {done.factorial}, DMA round trip {done.dma}")
            if done.factorial != 3628800 or done.dma is not True:
                raise Failed(
                    f"the GPU at {done.address} in {node.name} did not work as it must",
                    details=f"10! came back as {done.factorial}, DMA round trip: {done.dma}",
                )
    if not any(told.worked.values()):
        raise Failed("no node had a GPU that can be worked through its registers")


def _judge_spark(spark: SparkResult, spec: ClusterSpec) -> None:
    """Each GPU node's worker must have given a task an address; raises Failed."""
    expected = {node.name for node in spec.nodes if node.gpus.wanted}
    served = {task.host for task in spark.gpu_addresses if task.addresses}
    if missing := sorted(expected - served):
        raise Failed(
            f"no task was given a GPU on {', '.join(missing)}",
            details=tuple(f"task {t.task} on {t.host}: {t.addresses}" for t in spark.gpu_addresses),
        )


def _judge_classifier(found: ClassifierResult) -> None:
    """It must have learnt: clearly above the majority class on held-out specimens."""
    if found.accuracy < found.majority_baseline + 0.1 or found.kappa < 0.3:
        raise Failed(
            "the classifier did not learn",
            details=(
                f"accuracy {found.accuracy:.3f} against the majority's "
                f"{found.majority_baseline:.3f}, kappa {found.kappa:.3f}",
            ),
        )


def _give_back(host: Inside, told: Told, cluster: str) -> None:
    """Take the cluster down and compare the host with what it was; raises Failed."""
    # 2: `up` never began, and gpupt there has never heard of the cluster.
    host.gpupt("down", "--yes", cluster, deadline=DEADLINE["down"], accept=(0, 2))
    # A detach whose `up` never came leaves GPUs with gpupt: those too go back.
    host.gpupt("attach", "--yes", "--all", deadline=DEADLINE["detach"], accept=(0,))
    told.after = host.facts()
    assert told.before is not None
    told.differences = told.before.differences(told.after)
    left = [gpu for gpu in host.gpupt("list", deadline=DEADLINE["list"])["gpus"] if gpu["lease"]]
    told.restored = not told.differences and not left
    if not told.restored:
        raise Failed(
            "the host is not as it was before",
            details=told.differences + tuple(f"{gpu['address']} is still on loan" for gpu in left),
            remedy="gpupt recover, in the emulated host (gpupt lab shell)",
        )
    host.say("           every function is on the driver it came from, no override, no loan")
