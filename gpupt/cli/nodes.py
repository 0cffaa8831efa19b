"""Verbs about the nodes of a cluster that is up: show, ssh, run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from difflib import get_close_matches

import click

from gpupt.apply.clusterworld import ClusterWorld
from gpupt.apply.waits import last_json
from gpupt.cli.clusterworld import cluster_world
from gpupt.cli.context import Settings, common
from gpupt.decide.cluster import Surroundings
from gpupt.decide.domain import domain_name
from gpupt.decide.facts import NodeFacts, assess_facts, parse_facts
from gpupt.decide.layers import closure
from gpupt.decide.lent import assess_lent
from gpupt.edges.clusterfolder import ClusterFolder, ClusterRecord, read_clusters
from gpupt.edges.holders import holders_of
from gpupt.edges.hypervisor import Hypervisor
from gpupt.edges.job import LATE, run_job
from gpupt.edges.journal import read_ledger, read_past_clusters
from gpupt.edges.rolls import read_rolls
from gpupt.edges.sysfs import read_host
from gpupt.errors import BadInput, Failed, GpuptError
from gpupt.model.cluster import Domain, Placement
from gpupt.model.host import Finding, Severity
from gpupt.model.roll import Job
from gpupt.report.cluster import NodeStatus, finding_json, finding_text, node_json, nodes_text

# A node that is well answers within this; `show` does not wait for one that is not.
SHOW_SECONDS = 30.0
ANSWER_SECONDS = 60.0


@click.command()
@click.argument("name", metavar="NAME")
@common
def show(settings: Settings, *, name: str) -> None:
    """Show a cluster's nodes, the GPUs each was given, and those it sees.

    A node that lost its GPU runs on and says nothing: that is looked for on the host's side,
    and told beneath the table (JSON: findings).  Exit 0 whatever is found.

    \b
    Examples:
      gpupt show herbarium
      gpupt --json show herbarium | jq -r '.nodes[] | "\\(.name) \\(.ip)"'
    """
    record = require_cluster(settings, name)
    with Hypervisor.connect(settings.connect) as hypervisor:
        domains = {domain.name: domain for domain in hypervisor.domains()}
    ours = cluster_world(settings)
    statuses = []
    for placement in record.allocation.placements:
        domain = domains.get(domain_name(name, placement.node.name))
        facts = ask(ours, name, placement, say=settings.say) if _runs(domain) else None
        statuses.append(NodeStatus(placement, domain, facts=facts))
    ours.close()
    findings = (
        *lost_by(settings, name, domains=tuple(domains.values())),
        *(finding for status in statuses for finding in assess_status(status, cluster=name)),
    )
    if settings.as_json:
        settings.emit(
            {
                "cluster": name,
                "image": record.image,
                "subnet": str(record.allocation.spec.subnet),
                "rolls": list(record.allocation.spec.rolls),
                "nodes": [node_json(status) for status in statuses],
                "findings": [finding_json(finding) for finding in findings],
            }
        )
        return
    click.echo(nodes_text(statuses))
    for finding in findings:
        click.echo(finding_text(finding))


def lost_by(
    settings: Settings, cluster: str, *, domains: tuple[Domain, ...]
) -> tuple[Finding, ...]:
    """What became of the GPUs that the cluster's nodes were lent."""
    loans = {
        gpu: loan
        for gpu, loan in read_ledger(settings.state).loans.items()
        if loan.cluster == cluster and loan.node is not None
    }
    if not loans:
        return ()
    host = read_host(settings.root, whole=True)
    return assess_lent(host, loans, domains=domains, holders=holders_of(settings.root, host, loans))


def assess_status(status: NodeStatus, *, cluster: str) -> tuple[Finding, ...]:
    """What a node says of itself that is not as it was declared."""
    if status.facts is None:
        return ()
    placement = status.placement
    wrong = assess_facts(status.facts, cluster=cluster, placement=placement)
    if not wrong:
        return ()
    name = placement.node.name
    brief = f"{name} is not what was declared: {wrong[0]}"
    remedy = f"gpupt down {cluster}, then up, makes it anew"
    return (Finding("node-changed", Severity.FAIL, name, brief, wrong[1:], remedy),)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", metavar="NAME")
@click.argument("node", metavar="NODE")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND...]")
@click.pass_obj
def ssh(settings: Settings, /, name: str, node: str, command: tuple[str, ...]) -> None:
    """Run a command, or a shell, on a node.

    The node's host key is the one made for it by `up`, and no other is accepted.  Several
    words are a command and its arguments, each as it is given; a single word is a line for
    the node's shell.

    \b
    Examples:
      gpupt ssh herbarium compute-0
      gpupt ssh herbarium compute-0 gpupt-node facts
      gpupt ssh herbarium frontend 'ls /home | wc -l'
    """
    settings = settings or Settings()
    record = require_cluster(settings, name)
    placement = require_node(record, node)
    folder = ClusterFolder(settings.state, name)
    if not os.access(folder.key, os.R_OK):
        raise Failed(f"the key of {name} cannot be read", remedy="run gpupt as root")
    line = command[0] if len(command) == 1 else shlex.join(command)
    argv = [
        *("ssh", "-F", "none", "-i", str(folder.key), "-l", "root"),
        *("-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"),
        *("-o", f"UserKnownHostsFile={folder.known_hosts}", "-o", "GlobalKnownHostsFile=none"),
        *("-o", f"HostKeyAlias={node}", "-o", "LogLevel=ERROR"),
        *("-o", f"ConnectTimeout={ANSWER_SECONDS:.0f}"),
        *([] if command else ["-t"]),
        str(placement.ip),
        *([line] if command else []),
    ]
    try:
        os.execvp(argv[0], argv)
    except FileNotFoundError:
        raise Failed("ssh is not installed", remedy="apt install openssh-client") from None


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", metavar="NAME")
@click.argument("job", metavar="JOB")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS...]")
@click.pass_obj
def run(settings: Settings, /, name: str, job: str, arguments: tuple[str, ...]) -> None:
    """Run a roll's job on a cluster's frontend.

    What the job says goes to stderr as it comes; its result, one JSON object, to stdout.
    Ctrl-C ends it on the nodes too.

    \b
    Examples:
      gpupt run herbarium gpu-addresses
      gpupt run herbarium classify > result.json
    """
    settings = settings or Settings()
    record = require_cluster(settings, name)
    chosen = require_job(record, job)
    spec = record.allocation.spec
    frontend = record.allocation.of(spec.frontend.name)
    ours = cluster_world(settings)
    try:
        node = ours.ssh(name, frontend, deadline=ANSWER_SECONDS)
        argv = (*chosen.command, *arguments)
        done = run_job(node, argv, deadline=chosen.deadline, on_line=settings.say)
    finally:
        ours.close()
    if done.status == LATE:
        raise Failed(f"{job} did not end within {chosen.deadline} s")
    said = tuple((done.stderr.strip() or done.stdout.strip()).splitlines()[-12:])
    if done.status == 2 and arguments and "usage:" in done.stderr:
        # As argparse says of arguments that it does not take.
        raise BadInput(f"{job} does not take these arguments", details=said)
    if done.status != 0:
        raise Failed(f"{job} failed with status {done.status}", details=said)
    result = last_json(done.stdout)
    if result is None:
        raise Failed(
            f"{job} ended well and printed no result",
            details=tuple(done.stdout.strip().splitlines()[-3:]),
        )
    settings.emit(result)


def ask(
    ours: ClusterWorld, cluster: str, placement: Placement, *, say: Callable[[str], None]
) -> NodeFacts | None:
    """What a running node says of itself; None, with a word, when it does not answer."""
    try:
        node = ours.ssh(cluster, placement, deadline=SHOW_SECONDS)
        return parse_facts(node.run(["gpupt-node", "facts"], deadline=ANSWER_SECONDS).stdout)
    except GpuptError as error:
        say(f"{placement.node.name}: {error.brief}")
        return None


def require_cluster(settings: Settings, name: str) -> ClusterRecord:
    """The cluster's record; raises BadInput that names the clusters there are."""
    record = ClusterFolder(settings.state, name).read()
    if record is None:
        known = list(read_clusters(settings.state))
        lent = {loan.cluster for loan in read_ledger(settings.state).loans.values()}
        if name in lent:
            raise Failed(
                f"{name} has GPUs on loan, and its folder is gone",
                details=f"{ClusterFolder(settings.state, name).path}: keys and record are lost",
                remedy=f"gpupt down {name} takes it down without them",
            )
        raise _unknown("cluster", name, known, remedy="gpupt up FILE makes one")
    return record


def require_heard_of(settings: Settings, name: str, *, around: Surroundings) -> None:
    """Raise BadInput for a cluster that is not there and never was: a name misspelt.

    One that was taken down before is known to the journal, and there is nothing to do.
    """
    named = {domain.membership.cluster for domain in around.domains if domain.membership}
    there = named | set(read_clusters(settings.state))
    if name not in there | read_past_clusters(settings.state):
        raise _unknown("cluster", name, sorted(there), remedy="gpupt status shows what is on loan")


def require_node(record: ClusterRecord, name: str) -> Placement:
    """The node's placement; raises BadInput that names the nodes there are."""
    try:
        return record.allocation.of(name)
    except KeyError:
        known = [placement.node.name for placement in record.allocation.placements]
        raise _unknown("node", name, known) from None


def require_job(record: ClusterRecord, name: str) -> Job:
    """The job that one of the cluster's rolls offers; raises BadInput that lists them."""
    rolls = closure(record.allocation.spec.rolls, read_rolls())
    jobs = {job.name: job for roll in rolls for job in roll.jobs}
    if name not in jobs:
        raise _unknown("job", name, list(jobs), remedy="gpupt roll info ROLL shows a roll's jobs")
    return jobs[name]


def _unknown(kind: str, name: str, known: list[str], *, remedy: str = "") -> BadInput:
    near = get_close_matches(name, known, 1)
    return BadInput(
        f"there is no {kind} {name!r}",
        details=f"there are: {', '.join(known)}" if known else f"there is no {kind} at all",
        remedy=f"did you mean {near[0]!r}?" if near else remedy,
    )


def _runs(domain: Domain | None) -> bool:
    return domain is not None and domain.running
