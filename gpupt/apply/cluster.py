"""Performs what concerns clusters: folders, networks, nodes, and waiting for them.

Every action says what shall be: performed twice, the second changes nothing.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gpupt.actions import (
    Action,
    AwaitNode,
    AwaitRoll,
    BakeImage,
    JournalEntry,
    MakeCluster,
    RemoveCluster,
    StartNetwork,
    StartNode,
    StopNetwork,
    StopNode,
)
from gpupt.apply.world import World
from gpupt.decide.domain import (
    Credential,
    DomainView,
    domain_name,
    network_name,
    view_domain,
    view_hosts,
    view_network,
)
from gpupt.decide.facts import NodeFacts, assess_facts, parse_facts
from gpupt.decide.inverse import inverse
from gpupt.edges.clusterfolder import AUTHORIZED_KEYS, HOST_KEY, HOSTS, ClusterFolder
from gpupt.edges.hypervisor import Hypervisor
from gpupt.edges.images import find_image
from gpupt.edges.templates import render_view
from gpupt.errors import DeadlineExceeded, Failed, GpuptError
from gpupt.model.cluster import Allocation, Domain, Placement
from gpupt.model.roll import Check, Image, Roll

if TYPE_CHECKING:
    from gpupt.edges.ssh import Ssh

# What a guest gets to power off by itself: long enough for a driver to let its card go.
STOP_SECONDS = 20.0
SAY_EVERY = 10.0
FACTS_SECONDS = 180.0


@dataclass(slots=True)
class ClusterWorld:
    """What cluster actions act on, beside the host's World: libvirt, the state folder, the
    rolls, and the connections to nodes, each opened when it is first needed.

    ``bake`` makes an image of that digest; ``accelerated`` says whether KVM runs guests,
    ``slow`` that this host is itself an emulated one."""

    state: Path
    uri: str
    rolls: Mapping[str, Roll]
    bake: Callable[[BakeImage], None]
    accelerated: Callable[[], bool]
    hypervisor_open: Hypervisor | None = None
    slow: bool = False
    numa_nodes: int = 1
    connections: dict[tuple[str, str], Ssh] = field(default_factory=dict)
    facts: dict[str, NodeFacts] = field(default_factory=dict)
    # When each node was started (monotonic), and after how many seconds it was ready.
    started: dict[str, float] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)

    @property
    def hypervisor(self) -> Hypervisor:
        if self.hypervisor_open is None:
            self.hypervisor_open = Hypervisor.connect(self.uri)
        return self.hypervisor_open

    def folder(self, cluster: str) -> ClusterFolder:
        return ClusterFolder(self.state, cluster)

    def ssh(
        self,
        cluster: str,
        placement: Placement,
        *,
        deadline: float,
        alive: Callable[[], None] = lambda: None,
    ) -> Ssh:
        """The connection to a node, kept; raises Failed, DeadlineExceeded."""
        from gpupt.edges.ssh import Ssh

        name = placement.node.name
        kept = self.connections.get((cluster, name))
        if kept is None:
            folder = self.folder(cluster)
            kept = Ssh.connect(
                str(placement.ip),
                key=folder.key,
                host_key=folder.host_key(name),
                deadline=deadline,
                waiting_for=name,
                alive=alive,
            )
            self.connections[(cluster, name)] = kept
        return kept

    def hang_up(self, cluster: str, node: str) -> None:
        """Close the connection to a node that is about to go."""
        kept = self.connections.pop((cluster, node), None)
        if kept is not None:
            kept.close()

    def hang_up_all(self) -> None:
        """Close the connections to nodes."""
        for cluster, node in list(self.connections):
            self.hang_up(cluster, node)

    def close(self) -> None:
        """Close every connection."""
        self.hang_up_all()
        if self.hypervisor_open is not None:
            self.hypervisor_open.close()
            self.hypervisor_open = None


def perform(action: Action, world: World) -> None:
    """Bring about what the action says, and verify it; raises Failed, DeadlineExceeded."""
    ours = cluster_world(world)
    match action:
        case BakeImage():
            ours.bake(action)
        case MakeCluster():
            make_cluster(action, ours)
        case RemoveCluster(cluster=cluster):
            ours.folder(cluster).remove()
        case StartNetwork(allocation=allocation):
            start_network(allocation, ours)
        case StopNetwork(cluster=cluster):
            stop_network(cluster, ours)
        case StartNode():
            start_node(action, ours)
        case StopNode():
            stop_node(action, ours, patience=STOP_SECONDS, narrate=world.narrate)
        case AwaitNode():
            await_node(action, ours, narrate=world.narrate)
        case AwaitRoll():
            await_roll(action, ours, narrate=world.narrate)
        case _:
            raise TypeError(f"{type(action).__name__} is not a cluster's")


def undo(action: Action, world: World) -> None:
    """Take back an action that was begun, wherever it was cut short; consoles are kept."""
    back = inverse(JournalEntry(0, action, None, False))
    if isinstance(back, StopNode):
        # Its disk goes with it: there is nothing that a slow shutdown would save.
        stop_node(back, cluster_world(world), patience=0, narrate=world.narrate)
    elif back is not None:
        perform(back, world)


def cluster_world(world: World) -> ClusterWorld:
    if not isinstance(world.cluster, ClusterWorld):
        raise TypeError("this world has no clusters")
    return world.cluster


def make_cluster(action: MakeCluster, ours: ClusterWorld) -> None:
    allocation = action.allocation
    folder = ours.folder(allocation.spec.name)
    folder.make(
        allocation,
        image=action.digest,
        hosts=render_view("hosts.j2", view_hosts(allocation)),
    )


def start_network(allocation: Allocation, ours: ClusterWorld) -> None:
    name = network_name(allocation.spec.name)
    for network in ours.hypervisor.networks():
        if network.name == name and network.active:
            return
    ours.hypervisor.start_network(render_view("network.xml.j2", view_network(allocation)))


def stop_network(cluster: str, ours: ClusterWorld) -> None:
    for network in ours.hypervisor.networks():
        if network.cluster == cluster:
            ours.hypervisor.remove_network(network.name)


def start_node(action: StartNode, ours: ClusterWorld) -> None:
    """Make the overlay, define the domain and start it; a defined one is defined anew."""
    folder = ours.folder(action.cluster)
    record = folder.read()
    if record is None:
        raise Failed(f"{action.cluster} has no record", details=str(folder.path))
    image = require_image(action.digest, ours)
    node = action.placement.node
    name = domain_name(action.cluster, node.name)
    found = ours.hypervisor.domain(name)
    if found is not None and found.running:
        return
    ours.started[node.name] = time.monotonic()
    ours.numa_nodes = ours.hypervisor.capacity().numa_nodes
    folder.make_disk(node.name, image=image, size=node.disk)
    folder.make_log_folder()
    view = node_view(record.allocation, action.placement, image=image, ours=ours)
    try:
        ours.hypervisor.start_domain(render_view("domain.xml.j2", view))
    except DeadlineExceeded:
        raise
    except Failed as error:
        raise Failed(
            f"{node.name} does not start: {error.brief}",
            details=(*error.details, *folder.last_words(node.name)),
            remedy=error.remedy,
        ) from error


def require_image(digest: str, ours: ClusterWorld) -> Image:
    """The baked image; raises Failed."""
    image = find_image(ours.state, digest)
    if image is None:
        raise Failed(f"image {digest} is not there", remedy="gpupt image list shows what is")
    return image


def node_view(
    allocation: Allocation, placement: Placement, *, image: Image, ours: ClusterWorld
) -> DomainView:
    """What the node's domain is made from."""
    folder = ours.folder(allocation.spec.name)
    name = placement.node.name
    return view_domain(
        allocation,
        placement,
        image=image,
        disk=PurePosixPath(folder.disk(name)),
        console=PurePosixPath(folder.console(name)),
        credentials=[
            Credential(each, PurePosixPath(folder.credential(name, each)))
            for each in (AUTHORIZED_KEYS, HOST_KEY, HOSTS)
        ],
        accelerated=ours.accelerated(),
        slow=ours.slow,
        numa_nodes=ours.numa_nodes,
    )


def stop_node(
    action: StopNode, ours: ClusterWorld, *, patience: float, narrate: Callable[[str], None]
) -> None:
    """End the domain and remove its overlay; raises Failed when it stays."""
    ours.hang_up(action.cluster, action.node)
    for other in action.together:
        ours.hang_up(action.cluster, other)
        if is_member(ours.hypervisor.domain(domain_name(action.cluster, other)), action.cluster):
            ours.hypervisor.press_power(domain_name(action.cluster, other))
    name = domain_name(action.cluster, action.node)
    found = ours.hypervisor.domain(name)
    if found is not None:
        if not is_member(found, action.cluster):
            # Never a machine of somebody else, whatever its name.
            raise Failed(f"libvirt's domain {name} is not a node of {action.cluster}")
        if not ours.hypervisor.remove_domain(name, patience=patience) and patience:
            narrate(f"{action.node} did not power off within {patience:g} s: ended by force")
        if ours.hypervisor.domain(name) is not None:
            raise Failed(f"{name} is still there", remedy=f"virsh destroy {name}")
    ours.folder(action.cluster).remove_disk(action.node)


def is_member(domain: Domain | None, cluster: str) -> bool:
    """Whether the domain is there, and a node of that cluster."""
    member = None if domain is None else domain.membership
    return member is not None and member.cluster == cluster


def await_node(action: AwaitNode, ours: ClusterWorld, *, narrate: Callable[[str], None]) -> None:
    """Wait for SSH, then hold what the node says of itself against what it was given."""
    placement = action.placement
    node = placement.node.name
    name = domain_name(action.cluster, node)
    folder = ours.folder(action.cluster)
    begun = ours.started.get(node, time.monotonic())
    said = begun

    def alive() -> None:
        nonlocal said
        found = ours.hypervisor.domain(name)
        if found is None or not found.running:
            raise Failed(
                f"{node} went down while it was waited for",
                details=folder.last_words(node),
                remedy=f"its whole console is kept in {folder.console(node)}",
            )
        now = time.monotonic()
        if now - said >= SAY_EVERY:
            said = now
            narrate(
                f"waiting for {node} to answer SSH ({now - begun:.0f} s of {action.deadline} s)"
            )

    try:
        ssh = ours.ssh(action.cluster, placement, deadline=action.deadline, alive=alive)
        facts = parse_facts(ssh.run(["gpupt-node", "facts"], deadline=FACTS_SECONDS).stdout)
    except GpuptError as error:
        if any(folder.console(node).name in line for line in error.details):
            raise
        raise type(error)(
            error.brief,
            details=(*error.details, *folder.last_words(node)),
            remedy=error.remedy or f"its whole console is kept in {folder.console(node)}",
        ) from error
    wrong = assess_facts(facts, cluster=action.cluster, placement=placement)
    if wrong:
        raise Failed(
            f"{node} is up and not what was declared: {wrong[0]}",
            details=(*wrong, *folder.last_words(node, lines=5)),
            remedy=f"its whole console is kept in {folder.console(node)}",
        )
    ours.facts[node] = facts
    ours.ready[node] = time.monotonic() - begun
    seen = Counter(f"{gpu.id}" for gpu in facts.gpus)
    shown = ", ".join(f"{count} × {name}" for name, count in seen.items()) or "no GPU, as declared"
    narrate(f"{node} is up after {ours.ready[node]:.0f} s and sees {shown}")


def await_roll(action: AwaitRoll, ours: ClusterWorld, *, narrate: Callable[[str], None]) -> None:
    """Run the roll's checks on the nodes of their roles until each passes."""
    roll = ours.rolls.get(action.roll)
    record = ours.folder(action.cluster).read()
    if roll is None or record is None:
        missing = "its record" if record is None else f"the roll {action.roll}"
        raise Failed(f"{action.cluster}: {missing} is gone")
    for check in roll.checks:
        for placement in record.allocation.placements:
            if placement.node.role.value in check.roles:
                ssh = ours.ssh(action.cluster, placement, deadline=60)
                pass_check(check, ssh=ssh, roll=roll.name, narrate=narrate)


def pass_check(check: Check, *, ssh: Ssh, roll: str, narrate: Callable[[str], None]) -> None:
    """Try a check on a node until it passes; raises DeadlineExceeded with what it said last."""
    begun = time.monotonic()
    said = begun
    output: tuple[str, ...] = ()
    while (left := check.deadline - (time.monotonic() - begun)) > 0:
        try:
            done = ssh.run(check.command, deadline=max(left, 1), check=False)
        except DeadlineExceeded as error:
            output = error.details
            break
        if done.status == 0:
            return
        output = tuple((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        now = time.monotonic()
        if now - said >= SAY_EVERY:
            said = now
            narrate(
                f"waiting for {roll}: {check.name} on {ssh.name} "
                f"({now - begun:.0f} s of {check.deadline} s)"
            )
        time.sleep(min(1.0, max(left, 0)))
    raise DeadlineExceeded(
        f"{roll}: {check.name} did not pass on {ssh.name} within {check.deadline} s",
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
