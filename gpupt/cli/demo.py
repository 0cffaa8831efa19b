"""``gpupt lab demo``: from nothing to a virtual GPU cluster that classifies, and back.

Put together here from the parts that a real host uses; the cluster is brought up and taken
down by gpupt *inside* the emulated host.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from gpupt import __version__
from gpupt.cli.context import Settings, common
from gpupt.cli.demostory import Told, afterwards, play
from gpupt.errors import GpuptError, Refused
from gpupt.lab.story import Inside, Timeline, picture
from gpupt.model.cluster import ClusterSpec
from gpupt.model.demo import (
    EMULATED_DOES_NOT_PROVE,
    EMULATED_PROVES,
    DemoNode,
    DemoSummary,
    HostPicture,
)
from gpupt.model.pci import PciAddress
from gpupt.report.demo_json import seen_gpus, summary_json

if TYPE_CHECKING:
    from gpupt.edges.specfile import SpecFile

SUMMARY, PAGE = "summary.json", "index.html"
GIB = 1 << 30
HOST_MEMORY = 2 * GIB  # what the emulated host keeps for itself: kernel, libvirt, page cache
EMULATOR_MEMORY = GIB  # QEMU's own, translated code above all


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
    from gpupt.cli.clusterworld import read_cluster_file
    from gpupt.lab.host import check_name
    from gpupt.report.progress import narration

    path = spec or demo_spec()
    file = read_cluster_file(path)
    require_memory(file.spec)
    check_name(name)
    text = path.read_text(encoding="utf-8")
    for old in (SUMMARY, PAGE):  # an earlier run's success is not this one's
        (report / old).unlink(missing_ok=True)
    with narration(sys.stderr) as told_live, interrupts():
        timeline = Timeline(told_live.say)
        told = Told()
        began = datetime.now(UTC).isoformat(timespec="seconds")
        failure = ""
        try:
            run_demo(
                settings,
                file,
                text,
                timeline,
                told,
                name=name,
                keep=keep,
                mirror=mirror,
                report=report,
            )
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
    report: Path,
) -> None:
    """Images, the emulated host, the story in it; the host is powered off whatever happens."""
    from gpupt.cli.lab import boot_lab
    from gpupt.lab.host import find_lab, stop_lab

    with timeline.phase(
        "images", command="gpupt image build …", detail="rolls baked into bootable images"
    ):
        host_image, image = bake(settings, file, timeline, mirror=mirror)
    left_over = find_lab(settings.state, name)
    if left_over is not None:
        stop_lab(left_over, narrate=timeline.say)

    def power_off() -> None:
        if not keep and (started := find_lab(settings.state, name)) is not None:
            with timeline.phase("power off", command="gpupt lab down"):
                stop_lab(started, narrate=timeline.say)

    with afterwards(power_off), words_kept(settings.state, name, report):
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


@contextmanager
def words_kept(state: Path, name: str, report: Path) -> Iterator[None]:
    """When it fails, keep the emulated host's console and QEMU's log with the report.

    A host that has ended itself (a panic) is told as such: all that a caller saw of it is a
    connection that was lost."""
    from gpupt.lab.host import find_lab, labs_folder, tail_of
    from gpupt.lab.machine import CONSOLE, LOG

    try:
        yield
    except GpuptError as error:
        for each in (CONSOLE, LOG):
            with suppress(OSError):
                report.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(labs_folder(state) / name / each, report / each)
        lab = find_lab(state, name)
        if lab is None or lab.is_running:
            raise
        details = (*error.details, "the emulated host has ended:", *tail_of(lab))
        raise type(error)(error.brief, details=details, remedy=error.remedy) from error


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
            told.during,
            told.after,
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


def write_report(summary: DemoSummary, folder: Path) -> Path:
    """Write summary.json and index.html, each whole or not at all; returns the page."""
    from gpupt.report.demo_page import render_demo_page

    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (
        (SUMMARY, json.dumps(summary_json(summary), indent=2) + "\n"),
        (PAGE, render_demo_page(summary)),
    ):
        half = folder / f".{file}.half"
        half.write_text(content, encoding="utf-8")
        half.replace(folder / file)
    return folder / PAGE
