"""``gpupt lab demo``: from nothing to a virtual GPU cluster that classifies, and back.

Put together here from the parts that a real host uses; the cluster is brought up and taken
down by gpupt *inside* the emulated host.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gpupt import __version__
from gpupt.cli.context import Settings, common
from gpupt.errors import Failed, GpuptError, Refused
from gpupt.lab.story import Facts, Inside, Timeline, picture
from gpupt.model.cluster import ClusterSpec
from gpupt.model.demo import (
    EMULATED_DOES_NOT_PROVE,
    EMULATED_PROVES,
    ClassifierResult,
    DemoNode,
    DemoSummary,
    Exercise,
    HostPicture,
    SparkResult,
)
from gpupt.model.pci import PciAddress
from gpupt.report.demo_json import (
    classifier_result,
    exercises,
    seen_gpus,
    spark_result,
    summary_json,
)

if TYPE_CHECKING:
    from gpupt.edges.specfile import SpecFile

SPEC_IN_HOST = "/root/cluster.yaml"
GIB = 1 << 30
HOST_MEMORY = 2 * GIB  # what the emulated host keeps for itself: kernel, libvirt, page cache
EMULATOR_MEMORY = GIB  # QEMU's own, translated code above all
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
    try:
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
    finally:
        with timeline.phase(
            "down", command=f"gpupt down {cluster}", detail="nodes gone, GPUs back on their drivers"
        ):
            _give_back(host, told, cluster)


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
    host.gpupt("down", "--yes", cluster, deadline=DEADLINE["down"])
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


def _nodes(told: Told, spec: ClusterSpec) -> tuple[DemoNode, ...]:
    given = {node["name"]: node for node in told.cluster_up.get("nodes", ())}
    return tuple(
        DemoNode(
            name=node.name,
            role=node.role,
            ip=str(given[node.name]["ip"]),
            cpus=node.cpus,
            memory=node.memory,
            gpus_seen=seen_gpus({"gpus": given[node.name]["gpus_seen"]}),
            lent=tuple(PciAddress.parse(gpu) for gpu in given[node.name]["gpus"]),
            exercises=told.worked.get(node.name, ()),
            domain_type=str(given[node.name].get("domain_type", "")),
            ready=given[node.name].get("ready"),
        )
        for node in spec.nodes
        if node.name in given
    )


def _summary(
    told: Told, timeline: Timeline, spec: ClusterSpec, spec_text: str, began: str, failure: str
) -> DemoSummary:
    nodes = _nodes(told, spec)
    before = told.before
    if before is None:
        host = HostPicture(True, "", 0, 0, ())
    else:
        holders = {gpu: node.name for node in nodes for gpu in node.lent}
        for address in list(holders):
            for each in before.functions:
                if each.slot == address.slot:
                    holders[each] = holders[address]
        host = picture(
            before,
            told.during or before,
            told.after or told.during or before,
            holders=holders,
            names=told.names,
            companions=told.companions,
            versions=told.versions,
            accelerator=told.accelerator,
        )
    return DemoSummary(
        ok=not failure and told.restored,
        seconds=timeline.now,
        timeline=tuple(timeline.entries),
        host=host,
        nodes=nodes,
        spark=told.spark,
        classifier=told.classifier,
        restored=told.restored,
        cluster=spec.name,
        spec=spec_text,
        began=began,
        version=__version__,
        failure=failure,
        proves=EMULATED_PROVES,
        does_not_prove=EMULATED_DOES_NOT_PROVE,
    )


@click.command()
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-report"),
    show_default=True,
    help="Where summary.json and index.html go.",
)
@click.option(
    "--spec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Another cluster than the demo's own.",
)
@click.option("--keep", is_flag=True, help="Leave the emulated host running at the end.")
@click.option("--name", default="demo", show_default=True, help="The emulated host's name.")
@click.option(
    "--mirror", default=None, metavar="URL", help="The Debian archive (default: this machine's)."
)
@common
def demo(
    settings: Settings,
    *,
    report: Path,
    spec: Path | None,
    keep: bool,
    name: str,
    mirror: str | None,
) -> None:
    """Show all of it, end to end, on an emulated host: a quarter of an hour and more.

    Builds the images, boots an emulated GPU host, and in it runs doctor, list, detach, up,
    Spark, the classifier and down, as on a real host.  Writes REPORT/summary.json and
    REPORT/index.html; exits 0 only when all of it worked and every GPU came back.
    """
    from gpupt.edges.rolls import read_rolls
    from gpupt.edges.specfile import read_specfile
    from gpupt.report.progress import narration

    path = spec or demo_spec()
    file = read_specfile(path, known_rolls=sorted(read_rolls()))
    text = path.read_text(encoding="utf-8")
    with narration(sys.stderr) as told_live, interrupts():
        timeline = Timeline(told_live.say)
        told = Told()
        began = datetime.now(UTC).isoformat(timespec="seconds")
        failure = ""
        try:
            run_demo(settings, file, text, timeline, told, name=name, keep=keep, mirror=mirror)
        except GpuptError as error:
            failure = error.brief
            told_live.say(f"gpupt: {error}")
        except KeyboardInterrupt:
            failure = "interrupted"
        summary = _summary(told, timeline, file.spec, text, began, failure)
        page = write_report(summary, report)
        for phase, seconds in summary_json(summary)["phases"].items():
            told_live.say(f"  {phase:<12} {seconds:7.1f} s  {seconds / summary.seconds:5.1%}")
        verdict = "it all worked, and every GPU is back" if summary.ok else f"FAILED: {failure}"
        told_live.say(f"{verdict} (emulated host, {summary.seconds:.0f} s)\nreport: {page}")
    if settings.as_json:
        settings.emit({k: v for k, v in summary_json(summary).items() if k != "schema"})
    sys.exit(0 if summary.ok else 130 if failure == "interrupted" else 1)


def demo_spec() -> Path:
    """The cluster file that the demo brings up."""
    from gpupt.edges.resources import resource_folder

    return resource_folder("examples") / "emulated.yaml"


@contextmanager
def interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: taken down, and reported."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    kept = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run_demo(
    settings: Settings,
    file: SpecFile,
    text: str,
    timeline: Timeline,
    told: Told,
    *,
    name: str,
    keep: bool,
    mirror: str | None,
) -> None:
    """Images, the emulated host, the story in it; the host is powered off whatever happens."""
    from gpupt.cli.lab import boot_lab
    from gpupt.lab.host import find_lab, stop_lab

    require_memory(file.spec)
    with timeline.phase(
        "images", command="gpupt image build …", detail="rolls baked into bootable images"
    ):
        host_image, image = bake(settings, file, timeline, mirror=mirror)
    left_over = find_lab(settings.state, name)
    if left_over is not None:
        stop_lab(left_over, narrate=timeline.say)
    try:
        with timeline.phase(
            "boot", command="gpupt lab up", detail="a GPU host that does not exist"
        ):
            lab = boot_lab(
                settings,
                name=name,
                images=(image,),
                host_image=host_image,
                memory=memory_for(file.spec),
                narrate=lambda line: timeline.say(f"           {line}"),
            )
            told.accelerator = lab.accelerator
        with lab.connect(deadline=60) as ssh:
            play(Inside(ssh, timeline.say), timeline, told, file.spec, text)
    finally:
        if not keep and (started := find_lab(settings.state, name)) is not None:
            with timeline.phase("power off", command="gpupt lab down"):
                stop_lab(started, narrate=timeline.say)


def memory_for(spec: ClusterSpec) -> int:
    """Bytes that the emulated host needs: its nodes' and its own."""
    return sum(node.memory for node in spec.nodes) + HOST_MEMORY


def require_memory(spec: ClusterSpec) -> None:
    """Raises Refused before anything is built when the emulated host would not fit."""
    from gpupt.cli.lab import available_memory

    needed, there = memory_for(spec) + EMULATOR_MEMORY, available_memory()
    if there is not None and there < needed:
        raise Refused(
            f"the emulated host needs {needed / GIB:.1f} GiB of memory, "
            f"and {there / GIB:.1f} GiB are available",
            remedy="free memory, or give a smaller cluster with --spec FILE",
        )


def bake(
    settings: Settings, file: SpecFile, timeline: Timeline, *, mirror: str | None
) -> tuple[str, str]:
    """Bake what is missing; returns the digests of the host's image and of the nodes'."""
    from gpupt.cli.clusterworld import ALWAYS
    from gpupt.cli.qemu import choose_qemu
    from gpupt.decide.layers import plan_stack
    from gpupt.edges.bake import bake_image, read_ground
    from gpupt.edges.rolls import read_rolls

    def narrate(line: str) -> None:
        timeline.say(f"           {line}")

    known = read_rolls()
    digests = []
    for rolls in (("gpupt",), (*file.spec.rolls, ALWAYS)):
        stack = plan_stack(rolls, known, ground=read_ground())
        bake_image(
            stack.layers,
            stack.digest,
            rolls=known,
            state=settings.state,
            narrate=narrate,
            mirror=mirror,
        )
        digests.append(stack.digest)
    choose_qemu(settings, narrate=narrate, mirror=mirror)
    return digests[0], digests[1]


def write_report(summary: DemoSummary, folder: Path) -> Path:
    """Write summary.json and index.html, each whole or not at all; returns the page."""
    from gpupt.report.demo_page import render_demo_page

    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (
        ("summary.json", json.dumps(summary_json(summary), indent=2) + "\n"),
        ("index.html", render_demo_page(summary)),
    ):
        half = folder / f".{file}.half"
        half.write_text(content, encoding="utf-8")
        half.replace(folder / file)
    return folder / "index.html"
