"""What cluster actions act on: libvirt, the state folder, rolls, and connections to nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpupt.actions import BakeImage
from gpupt.decide.facts import NodeFacts
from gpupt.edges.clusterfolder import ClusterFolder
from gpupt.edges.hypervisor import Hypervisor
from gpupt.model.cluster import Placement
from gpupt.model.roll import Roll

if TYPE_CHECKING:
    from gpupt.edges.ssh import Ssh


@dataclass(slots=True)
class ClusterWorld:
    """What cluster actions act on, beside the host's World: libvirt, the state folder, the
    rolls, and the connections to nodes, each opened when it is first needed.

    ``bake`` makes an image of that digest; ``accelerated`` says whether KVM runs guests,
    ``slow`` that this host is itself an emulated one, ``unhealthy`` that GPUs are lent though
    they fail checks of their health."""

    state: Path
    uri: str
    rolls: Mapping[str, Roll]
    bake: Callable[[BakeImage], None]
    accelerated: Callable[[], bool]
    hypervisor_open: Hypervisor | None = None
    slow: bool = False
    unhealthy: bool = False
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
