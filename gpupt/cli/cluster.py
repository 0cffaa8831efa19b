"""Verbs that bring clusters up and take them down: plan, up, down, render."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from gpupt.actions import Action, Ledger, Plan
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.cli.binding import Gate, ReturnCheck, read_preflight, telling_fences
from gpupt.cli.clusterworld import (
    Outlook,
    cluster_world,
    look_ahead,
    look_around,
    read_cluster_file,
    require_bakery,
)
from gpupt.cli.context import Settings, changing, common, consent, plan_json, require_live
from gpupt.cli.nodes import require_heard_of
from gpupt.decide.cluster import Surroundings, plan_down, plan_up
from gpupt.edges.clusterfolder import ClusterFolder
from gpupt.edges.hypervisor import Hypervisor
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.kernel import Kernel
from gpupt.edges.rolls import read_rolls
from gpupt.edges.specfile import SpecFile
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed, Refused
from gpupt.model.cluster import Allocation, NodeSpec
from gpupt.model.host import Finding, Loan
from gpupt.model.pci import PciAddress
from gpupt.report.cluster import (
    NodeStatus,
    Return,
    finding_json,
    finding_text,
    node_json,
    nodes_text,
    return_json,
    return_text,
    seconds_of,
)

PHASES = {
    "BakeImage": "image",
    "RecordLoan": "gpus",
    "BindFunction": "gpus",
    "LendGpu": "gpus",
    "MakeCluster": "network",
    "StartNetwork": "network",
    "StartNode": "start",
    "AwaitNode": "nodes",
    "AwaitRoll": "rolls",
    "StopNode": "stop",
}


@dataclass(slots=True)
class Stopwatch:
    """Seconds for each phase of a plan, taken at the boundaries of its actions."""

    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    begun: float = 0.0

    def __call__(self, point: str, action: Action) -> None:
        if point == "planned":
            self.begun = time.monotonic()
        elif point == "done":
            phase = PHASES.get(type(action).__name__, "host")
            self.phases[phase] += time.monotonic() - self.begun


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@common
def plan(settings: Settings, *, file: Path) -> None:
    """Show what `up` would do, and touch nothing.

    Exit 2 when the file is wrong (with line and column), 3 when this machine cannot have
    that cluster now.

    \b
    Examples:
      gpupt plan examples/herbarium.yaml
      gpupt --json plan cluster.yaml | jq -r '.actions[].kind'
    """
    read = read_cluster_file(file)
    with Hypervisor.connect(settings.connect) as hypervisor:
        decided, _, findings = decide_up(
            settings, read, hypervisor=hypervisor, health_of=Gate(settings)
        )
    say_findings(settings, findings)
    if settings.as_json:
        settings.emit(plan_json(decided, [finding_json(each) for each in findings]))
    else:
        consent(settings, decided, dry_run=True, yes=False)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--unhealthy", is_flag=True, help="Lend GPUs though they fail health checks.")
@changing
@common
def up(settings: Settings, *, file: Path, unhealthy: bool, dry_run: bool, yes: bool) -> None:
    """Bring a cluster up from its file.

    Takes the GPUs from the host, starts the network, a frontend and the compute nodes, and
    waits until each node answers, sees its GPUs, and its rolls' checks pass.  What is up
    already is left alone.  A step that fails, or Ctrl-C, undoes what was done; the nodes'
    consoles are kept under STATE/logs.

    \b
    Examples:
      gpupt up examples/herbarium.yaml            show the plan, ask, do it
      gpupt up cluster.yaml --dry-run             show the plan
      gpupt --json up cluster.yaml --yes          a summary for a program
    """
    require_live(settings, dry_run=dry_run)
    read = read_cluster_file(file)
    watch = Stopwatch()
    with Hypervisor.connect(settings.connect) as hypervisor:
        health_of = Gate(settings, wanted=not unhealthy)
        decided, outlook, findings = decide_up(
            settings, read, hypervisor=hypervisor, health_of=health_of
        )
        say_findings(settings, findings)
        ours = cluster_world(settings, hypervisor=hypervisor)
        ours.unhealthy = unhealthy
        if decided.actions and not dry_run:
            require_bakery(outlook)
        if consent(settings, decided, dry_run=dry_run, yes=yes):
            ClusterFolder(settings.state, read.spec.name).require_passable()
            with changing_world(settings, ours, watch=watch) as world:
                again, _, _ = decide_up(
                    settings,
                    read,
                    hypervisor=hypervisor,
                    health_of=health_of,
                    ledger=world.journal.ledger,
                )
                require_same(decided, again)
                execute(decided, world=world)
            settings.say(f"{read.spec.name} is up")
        elif decided.actions or dry_run:
            return
        statuses = statuses_of(outlook.allocation, hypervisor=hypervisor, ours=ours)
    if settings.as_json:
        settings.emit(
            {
                "cluster": read.spec.name,
                "changed": bool(decided.actions),
                "image": outlook.stack.digest,
                "nodes": [node_json(status) for status in statuses],
                "seconds": seconds_of(watch.phases),
                "findings": [finding_json(each) for each in findings],
            }
        )
    elif decided.actions:
        settings.say(nodes_text(statuses))


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--keep-detached", is_flag=True, help="Leave the GPUs on vfio-pci, for the next cluster."
)
@changing
@common
def down(settings: Settings, *, name: str, keep_detached: bool, dry_run: bool, yes: bool) -> None:
    """Take a cluster down and give its GPUs back.

    Ends its nodes and network, and returns every function of its GPUs to the driver it came
    from; that is read back, not assumed.  Works from libvirt and the loans alone, also when
    the cluster's folder is lost.  The nodes' disks are removed.

    \b
    Examples:
      gpupt down herbarium
      gpupt down herbarium --keep-detached --yes
    """
    require_live(settings, dry_run=dry_run)
    with Hypervisor.connect(settings.connect) as hypervisor:
        decided, around, findings = decide_down(
            settings, name, hypervisor=hypervisor, keep_detached=keep_detached
        )
        say_findings(settings, findings)
        if not decided.actions:
            require_heard_of(settings, name, around=around)
        lent = {gpu: loan for gpu, loan in around.loans.items() if loan.cluster == name}
        watch = Stopwatch()
        done = consent(settings, decided, dry_run=dry_run, yes=yes)
        if not done and (decided.actions or dry_run):
            return
        if done:
            ours = cluster_world(settings, hypervisor=hypervisor)
            with changing_world(settings, ours, watch=watch) as world:
                again, _, _ = decide_down(
                    settings,
                    name,
                    hypervisor=hypervisor,
                    keep_detached=keep_detached,
                    ledger=world.journal.ledger,
                )
                require_same(decided, again)
                execute(decided, world=world)
            ClusterFolder(settings.state, name).remove_logs()
    returns, restored = read_back(
        settings,
        lent,
        around=around,
        keep_detached=keep_detached,
        unrecorded=any(finding.id == "loan-missing" for finding in findings),
    )
    if settings.as_json:
        settings.emit(
            {
                "cluster": name,
                "changed": done,
                "restored": restored,
                "functions": [return_json(each) for each in returns],
                "seconds": seconds_of(watch.phases),
                "findings": [finding_json(each) for each in findings],
            }
        )
    for each in returns:
        settings.say(return_text(each))
    if restored is False:
        raise Failed(
            f"{name} is down, and not everything of the host is as it was",
            details=tuple(return_text(each) for each in returns if not each.restored),
            remedy="gpupt recover, then gpupt attach --all",
        )
    if done:
        settings.say(f"{name} is down")


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@common
def render(settings: Settings, *, file: Path) -> None:
    """Print every file that `up` would write, domain XML first; keys are left out.

    Reads this host and changes nothing; libvirt is not asked.

    \b
    Examples:
      gpupt render examples/herbarium.yaml | less
      gpupt --json render cluster.yaml | jq -r '.files[0].content'
    """
    from gpupt.cli.rendering import render_files

    read = read_cluster_file(file)
    files = render_files(settings, read)
    if settings.as_json:
        settings.emit(
            {"files": [{"path": str(path), "content": content} for path, content in files]}
        )
        return
    for path, content in files:
        click.echo(f"# {path}\n{content}")


def decide_up(
    settings: Settings,
    read: SpecFile,
    *,
    hypervisor: Hypervisor,
    health_of: Gate,
    ledger: Ledger | None = None,
) -> tuple[Plan, Outlook, tuple[Finding, ...]]:
    """The plan of `up` from what is there now; raises BadInput, Refused."""
    ledger = ledger or read_ledger(settings.state)
    require_finished(ledger)
    host = read_host(settings.root, whole=True)
    around = look_around(
        settings,
        read.spec.name,
        hypervisor=hypervisor,
        ledger=ledger,
        host=host,
        preflight=read_preflight(
            settings,
            host,
            boot_gpu=False,
            fences=ledger.fences,
            health=health_of(host) if any(asks_for_gpus(node) for node in read.spec.nodes) else {},
        ),
    )
    outlook = look_ahead(settings, read, around=around, hypervisor=hypervisor)
    known = read_rolls()
    decided, findings = plan_up(
        outlook.allocation,
        around=outlook.around,
        rolls=[known[name] for name in outlook.stack.rolls],
    )
    return decided, outlook, (*outlook.findings, *findings)


def asks_for_gpus(node: NodeSpec) -> bool:
    """Whether the node is to have a GPU."""
    return bool(node.gpus.named or node.gpus.count)


def decide_down(
    settings: Settings,
    name: str,
    *,
    hypervisor: Hypervisor,
    keep_detached: bool,
    ledger: Ledger | None = None,
) -> tuple[Plan, Surroundings, tuple[Finding, ...]]:
    """The plan of `down` from what is there now; raises Refused."""
    ledger = ledger or read_ledger(settings.state)
    require_finished(ledger)
    host = read_host(settings.root, whole=True)
    around = look_around(
        settings,
        name,
        hypervisor=hypervisor,
        ledger=ledger,
        host=host,
    )
    decided, findings = plan_down(name, around=around, keep_detached=keep_detached)
    return decided, around, findings


def require_finished(ledger: Ledger) -> None:
    """Raise Refused while another run is at work, or one was cut short and not recovered."""
    for run in ledger.unfinished:
        if Path(f"/proc/{run.pid}").exists():
            raise Refused(
                f"{run.plan.verb} {run.plan.subject} is at work (PID {run.pid})",
                remedy="wait until it ends; if that PID is no gpupt, gpupt recover",
            )
        raise Refused(
            f"an earlier {run.plan.verb} of {run.plan.subject} was cut short (PID {run.pid})",
            remedy="gpupt recover",
        )


@contextmanager
def changing_world(settings: Settings, ours: ClusterWorld, *, watch: Stopwatch) -> Iterator[World]:
    """The world of this host and its clusters, held for changing."""
    with Journal(settings.state) as journal:
        kernel = settings.kernel(settings.root) if settings.kernel else Kernel(settings.root)
        try:
            with telling_fences(settings, journal):
                yield World(
                    kernel,
                    journal,
                    settings.say,
                    cluster=ours,
                    boundary=watch,
                    health=ReturnCheck(settings),
                )
        finally:
            ours.hang_up_all()


def require_same(shown: Plan, now: Plan) -> None:
    """Raise Failed when the world changed between showing a plan and carrying it out."""
    if now != shown:
        raise Failed(
            "the host changed while the plan was being shown; nothing was touched",
            remedy="run the same command again",
        )


def statuses_of(
    allocation: Allocation, *, hypervisor: Hypervisor, ours: ClusterWorld
) -> list[NodeStatus]:
    """Each node as it is now, with what it told while it was waited for."""
    domains = {
        domain.membership.node: domain
        for domain in hypervisor.domains()
        if domain.membership is not None and domain.membership.cluster == allocation.spec.name
    }
    return [
        NodeStatus(
            placement,
            domains.get(placement.node.name),
            facts=ours.facts.get(placement.node.name),
            ready=ours.ready.get(placement.node.name),
        )
        for placement in allocation.placements
    ]


def read_back(
    settings: Settings,
    lent: dict[PciAddress, Loan],
    *,
    around: Surroundings,
    keep_detached: bool,
    unrecorded: bool,
) -> tuple[list[Return], bool | None]:
    """Where every function of the cluster's GPUs is now, and whether all are where they came
    from and no loan is left (None: they were to stay detached, or no loan says where they
    came from).  Nothing is said of persistent ones, which stay detached."""
    stays = around.persistent & set(lent)
    lent = {gpu: loan for gpu, loan in lent.items() if gpu not in stays}
    if not lent:
        return [], None if keep_detached or unrecorded or stays else True
    # Overrides of companions are read with the whole host only.
    now = read_host(settings.root, whole=True).devices
    returns = [
        Return(
            origin,
            lent=around.host.devices[origin.address].binding
            if origin.address in around.host.devices
            else None,
            now=now[origin.address].binding if origin.address in now else None,
        )
        for origin in {o.address: o for loan in lent.values() for o in loan.origins}.values()
    ]
    if keep_detached:
        return returns, None
    left = read_ledger(settings.state).loans
    restored = all(each.restored for each in returns) and not set(lent) & set(left)
    return returns, None if restored and unrecorded else restored


def say_findings(settings: Settings, findings: Iterable[Finding]) -> None:
    """Tell a person what was noticed."""
    for finding in findings:
        settings.say(finding_text(finding))
