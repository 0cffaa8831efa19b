"""A cluster as its one YAML file declares it, and the placement that was decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network

from gpupt.model.pci import PciAddress


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
    """One virtual machine; memory and disk in bytes."""

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
class Placement:
    """What a node was given: its address, its MAC and its GPUs (main functions)."""

    node: NodeSpec
    ip: IPv4Address
    mac: str
    gpus: tuple[PciAddress, ...] = ()


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
