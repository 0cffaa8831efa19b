"""Performs what concerns clusters: folders, networks, nodes, and waiting for them.

Every action says what shall be: performed twice, the second changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

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
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.apply.host import fence_for
from gpupt.apply.waits import await_node, await_roll, require_well
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
from gpupt.decide.inverse import inverse
from gpupt.edges.clusterfolder import AUTHORIZED_KEYS, HOST_KEY, HOSTS
from gpupt.edges.images import find_image
from gpupt.edges.templates import render_view
from gpupt.errors import DeadlineExceeded, Failed
from gpupt.model.cluster import Allocation, Domain, Placement
from gpupt.model.roll import Image

if TYPE_CHECKING:
    pass

# What a guest gets to power off by itself: long enough for a driver to let its card go.
STOP_SECONDS = 20.0


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
            fence = partial(fence_for, world=world)
            require_well(action, ours, fence=fence, narrate=world.narrate)
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
