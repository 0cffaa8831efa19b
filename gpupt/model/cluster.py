"""A cluster as its one YAML file declares it, and the placement that was decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network

from gpupt.model.pci import PciAddress, PciId


class Role(StrEnum):
    FRONTEND = "frontend"
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """Either named GPUs (addresses or aliases, as written) or a count of any free ones."""

    named: tuple[str, ...] = ()
    count: int = 0

    @property
    def wanted(self) -> int:
        return len(self.named) or self.count


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One virtual machine; memory and disk in bytes; ``disk`` 0: as large as its image."""

    name: str
    role: Role
    cpus: int
    memory: int
    disk: int
    gpus: GpuRequest = GpuRequest()


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The whole cluster; exactly one node has the frontend's role."""

    name: str
    rolls: tuple[str, ...]
    subnet: IPv4Network
    nodes: tuple[NodeSpec, ...]

    @property
    def frontend(self) -> NodeSpec:
        return next(node for node in self.nodes if node.role is Role.FRONTEND)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as a node gets it: every function of its card, the GPU's own first, and the
    id by which the node must see it; ``numa_node`` None: the kernel did not say."""

    gpu: PciAddress
    id: PciId
    functions: tuple[PciAddress, ...]
    numa_node: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """What a node was given: its address, its MAC and its cards."""

    node: NodeSpec
    ip: IPv4Address
    mac: str
    cards: tuple[Card, ...] = ()

    @property
    def gpus(self) -> tuple[PciAddress, ...]:
        """The main functions of its cards."""
        return tuple(card.gpu for card in self.cards)


@dataclass(frozen=True, slots=True)
class Allocation:
    """A placement for every node of the spec, in its order."""

    spec: ClusterSpec
    gateway: IPv4Address
    placements: tuple[Placement, ...]

    def of(self, node: str) -> Placement:
        """The placement of that node; raises KeyError."""
        for placement in self.placements:
            if placement.node.name == node:
                return placement
        raise KeyError(node)


@dataclass(frozen=True, slots=True)
class Membership:
    """What a domain's metadata says of it: which node of which cluster it is, booted from
    which image, and the digest of the specification it was made from."""

    cluster: str
    node: str
    role: Role
    image: str
    spec: str
    gpus: tuple[PciAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Domain:
    """A libvirt domain as read; ``membership`` None: not one of ours.

    ``type`` is libvirt's: kvm, or qemu for emulation.  ``hostdevs`` holds every PCI function
    of the host that its definition names."""

    name: str
    uuid: str
    running: bool
    membership: Membership | None = None
    hostdevs: tuple[PciAddress, ...] = ()
    type: str = ""


@dataclass(frozen=True, slots=True)
class Network:
    """A libvirt network as read; ``cluster`` None: not one of ours."""

    name: str
    active: bool
    bridge: str | None = None
    subnets: tuple[IPv4Network, ...] = ()
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the host's main table: the default route has prefix length 0."""

    interface: str
    destination: IPv4Network


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the hypervisor's machine has: CPUs, and memory in bytes (``available`` counts
    caches that the kernel would give up)."""

    cpus: int
    memory: int
    available: int
    numa_nodes: int = 1
