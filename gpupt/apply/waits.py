"""Waits for nodes and for what their rolls prove, each with a deadline and a name."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gpupt.actions import AwaitNode, AwaitRoll
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.decide.domain import domain_name
from gpupt.decide.facts import assess_facts, parse_facts
from gpupt.decide.nodehealth import accusing, in_the_node
from gpupt.errors import DeadlineExceeded, Failed, GpuptError
from gpupt.model.cluster import Placement
from gpupt.model.health import CheckResult
from gpupt.model.pci import PciAddress
from gpupt.model.roll import Check

if TYPE_CHECKING:
    from gpupt.edges.ssh import Ssh

SAY_EVERY = 10.0
FACTS_SECONDS = 180.0
# In an emulated host a guest's processor was seen to stop for ever at one instruction of its
# kernel's start; nodes there boot in a third of this.
STUCK_SECONDS = 300.0
CONNECT_SECONDS = 120.0
HEALTH_SECONDS = 120.0
JOURNAL_SECONDS = 60.0
# An emulated host's nodes share its few slow processors, and are several times slower still.
SLOW_FACTOR = 4


def await_node(action: AwaitNode, ours: ClusterWorld, *, narrate: Callable[[str], None]) -> None:
    """Wait for SSH, then hold what the node says of itself against what it was given."""
    placement = action.placement
    node = placement.node.name
    folder = ours.folder(action.cluster)
    deadline = action.deadline * (2 if ours.slow else 1)
    begun = ours.started.get(node, time.monotonic())
    said = begun

    was_reset = False

    def alive() -> None:
        nonlocal said, was_reset
        require_running(ours, action.cluster, node)
        now = time.monotonic()
        if ours.slow and not was_reset and now - begun > STUCK_SECONDS:
            was_reset = True
            narrate(f"{node} has not answered for {STUCK_SECONDS:g} s: reset, this once")
            ours.hypervisor.reset(domain_name(action.cluster, node))
        if now - said >= SAY_EVERY:
            said = now
            narrate(f"waiting for {node} to answer SSH ({now - begun:.0f} s of {deadline} s)")

    try:
        ssh = ours.ssh(action.cluster, placement, deadline=deadline, alive=alive)
        facts = parse_facts(ssh.run(["gpupt-node", "facts"], deadline=FACTS_SECONDS).stdout)
    except NodeGone:
        raise
    except GpuptError as error:
        raise type(error)(
            error.brief,
            details=(*error.details, *folder.last_words(node)),
            remedy=error.remedy or f"its whole console is kept in {folder.console(node)}",
        ) from error
    wrong = assess_facts(facts, cluster=action.cluster, placement=placement)
    if wrong:
        raise Failed(
            f"{node} is up and not what was declared: {wrong[0]}",
            details=(*wrong, *keep_journal(ours, action.cluster, placement)),
            remedy=f"its whole console is kept in {folder.console(node)}",
        )
    ours.facts[node] = facts
    ours.ready[node] = time.monotonic() - begun
    seen = Counter(f"{gpu.id}" for gpu in facts.gpus)
    shown = ", ".join(f"{count} × {name}" for name, count in seen.items()) or "no GPU, as declared"
    narrate(f"{node} is up after {ours.ready[node]:.0f} s and sees {shown}")


def require_well(
    action: AwaitNode,
    ours: ClusterWorld,
    *,
    fence: Callable[[PciAddress, CheckResult], None],
    narrate: Callable[[str], None],
) -> None:
    """Raise Failed when a GPU of the node is not well there, with the card fenced where it is
    the card's fault.

    Asked of nodes that have NVIDIA's library: no other can say more than the host did.
    """
    facts = ours.facts.get(action.placement.node.name)
    if ours.unhealthy or facts is None or not facts.nvml or not action.placement.cards:
        return
    from gpupt.edges.nodehealth import ask_node

    node = action.placement.node.name
    ssh = ours.ssh(action.cluster, action.placement, deadline=CONNECT_SECONDS)
    deadline = HEALTH_SECONDS * (SLOW_FACTOR if ours.slow else 1)
    report = ask_node(ssh, state=ours.state, lending=True, deadline=deadline)
    wrong = in_the_node(report, action.placement)
    at_fault = accusing(check for _, check in wrong)
    accused = [(gpu, check) for gpu, check in wrong if gpu is not None and check in at_fault]
    for gpu, check in accused:
        fence(gpu, check)
    if wrong:
        raise Failed(
            f"a GPU of {node} is not well: {wrong[0][1].brief}",
            details=tuple(f"{gpu or node}: {check.id}: {check.brief}" for gpu, check in wrong),
            remedy="it is fenced: up again gives the node another one, if any is free"
            if accused
            else wrong[0][1].remedy,
        )
    narrate(f"{node}: its {len(action.placement.cards)} GPUs are well")


def await_roll(action: AwaitRoll, ours: ClusterWorld, *, narrate: Callable[[str], None]) -> None:
    """Run the roll's checks on the nodes of their roles until each passes."""
    roll = ours.rolls.get(action.roll)
    record = ours.folder(action.cluster).read()
    if roll is None or record is None:
        missing = "its record" if record is None else f"the roll {action.roll}"
        raise Failed(f"{action.cluster}: {missing} is gone")
    for check in roll.checks:
        patient = replace(check, deadline=check.deadline * (SLOW_FACTOR if ours.slow else 1))
        for placement in record.allocation.placements:
            if placement.node.role.value not in check.roles:
                continue
            try:
                pass_check(
                    patient,
                    node=partial(standing, ours, action.cluster, placement),
                    drop=partial(ours.hang_up, action.cluster, placement.node.name),
                    roll=roll.name,
                    narrate=narrate,
                )
            except DeadlineExceeded as error:
                kept = keep_journal(ours, action.cluster, placement)
                raise DeadlineExceeded(
                    error.brief, details=(*error.details, *kept), remedy=error.remedy
                ) from error


class NodeGone(Failed):
    """The node's domain does not run any more: waiting is over."""


def require_running(ours: ClusterWorld, cluster: str, node: str) -> None:
    """Raise NodeGone, with the end of its console, when the node's domain does not run."""
    found = ours.hypervisor.domain(domain_name(cluster, node))
    if found is None or not found.running:
        folder = ours.folder(cluster)
        raise NodeGone(
            f"{node} went down while it was waited for",
            details=folder.last_words(node),
            remedy=f"its whole console is kept in {folder.console(node)}",
        )


def standing(ours: ClusterWorld, cluster: str, placement: Placement) -> Ssh:
    """The connection to a node that still runs; raises NodeGone, Failed."""
    require_running(ours, cluster, placement.node.name)
    return ours.ssh(cluster, placement, deadline=CONNECT_SECONDS)


def keep_journal(ours: ClusterWorld, cluster: str, placement: Placement) -> tuple[str, ...]:
    """Keep the journal of a node that is about to be ended; says where, and which of its
    units failed.  A node that does not answer any more has its console only."""
    node = placement.node.name
    folder = ours.folder(cluster)
    try:
        ssh = ours.ssh(cluster, placement, deadline=JOURNAL_SECONDS)
        failed = ssh.run(
            ["systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager"],
            deadline=JOURNAL_SECONDS,
        ).stdout.splitlines()
        journal = ssh.run(
            ["journalctl", "--boot", "--no-pager", "--output=short-monotonic"],
            deadline=JOURNAL_SECONDS,
        ).stdout
        folder.keep_log(node, "journal", journal)
    except GpuptError as error:
        return (f"its journal could not be kept: {error.brief}", *folder.last_words(node))
    return (
        *(f"failed on {node}: {line.split()[0]}" for line in failed if line.strip()),
        f"its journal is kept in {folder.log(node, 'journal')}",
    )


def pass_check(
    check: Check,
    *,
    node: Callable[[], Ssh],
    drop: Callable[[], None],
    roll: str,
    narrate: Callable[[str], None],
) -> None:
    """Try a check on a node until it passes; raises DeadlineExceeded with what it said last.

    ``node`` gives the connection to it; one that was lost is dropped by ``drop`` and made
    anew: a node that is busy is slow to answer.
    """
    begun = time.monotonic()
    said = begun
    name = ""
    output: tuple[str, ...] = ()
    while (left := check.deadline - (time.monotonic() - begun)) > 0:
        try:
            ssh = node()
            name = f" on {ssh.name}"
            done = ssh.run(check.command, deadline=max(left, 1), check=False)
        except NodeGone:
            raise
        except Failed as error:
            # What the last whole try said tells more than that this one was cut off.
            output = output or (error.brief, *error.details)
            drop()
        else:
            if done.status == 0:
                return
            output = tuple((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        now = time.monotonic()
        if now - said >= SAY_EVERY:
            said = now
            narrate(
                f"waiting for {roll}: {check.name}{name} "
                f"({now - begun:.0f} s of {check.deadline} s)"
            )
        time.sleep(min(1.0, max(check.deadline - (now - begun), 0)))
    raise DeadlineExceeded(
        f"{roll}: {check.name} did not pass{name} within {check.deadline} s",
        details=(" ".join(check.command), *output),
    )


def last_json(text: str) -> dict[str, Any] | None:
    """The object on the last line that is one; None when there is none."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None
