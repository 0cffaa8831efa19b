"""Specifications, hosts and surroundings that tests of clusters start from."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from tempfile import TemporaryDirectory

from machines import MACHINES

from gpupt.decide.allocation import allocate
from gpupt.decide.cluster import Surroundings
from gpupt.decide.domain import domain_name, network_name, spec_digest
from gpupt.edges.sysfs import read_host
from gpupt.model.cluster import (
    Allocation,
    ClusterSpec,
    Domain,
    GpuRequest,
    Membership,
    Network,
    NodeSpec,
    Placement,
    Role,
)
from gpupt.model.gpus import identity_of
from gpupt.model.host import FunctionOrigin, Host, Loan
from gpupt.model.pci import DriverBinding, PciAddress
from gpupt.model.roll import Check, Roll

BARE = PciAddress.parse("0000:01:00.0")
GPU = PciAddress.parse("0000:02:00.0")
SOUND = PciAddress.parse("0000:02:00.1")
BOOT = PciAddress.parse("0000:03:00.0")
IMAGE = "feedc0de"


def machine(name: str) -> Host:
    """One of the synthetic machines, as it is read."""
    with TemporaryDirectory() as folder:
        MACHINES[name](Path(folder))
        return read_host(Path(folder), whole=True)


def node(name: str, *gpus: str, count: int = 0, role: Role = Role.COMPUTE) -> NodeSpec:
    return NodeSpec(name, role, 2, 1 << 30, 0, GpuRequest(named=gpus, count=count))


def spec_of(*nodes: NodeSpec, name: str = "herbarium") -> ClusterSpec:
    """A cluster with a frontend and these nodes."""
    return ClusterSpec(
        name,
        ("spark",),
        IPv4Network("10.71.0.0/24"),
        (node("frontend", role=Role.FRONTEND), *nodes),
    )


def two_gpus() -> ClusterSpec:
    return spec_of(node("compute-0", count=1), node("compute-1", count=1))


def roll(name: str, *, checks: tuple[Check, ...] = ()) -> Roll:
    return Roll(name, "1", "", (), (), None, checks, (), "0")


def loan_of(host: Host, gpu: PciAddress, *functions: PciAddress, node: str | None = None) -> Loan:
    """A loan of a GPU with the functions of its group."""
    origins = tuple(
        FunctionOrigin(each, identity_of(host.devices[each]), host.devices[each].binding)
        for each in (gpu, *functions)
    )
    return Loan(gpu, origins, None if node is None else "herbarium", node)


def on_vfio(host: Host, *addresses: PciAddress) -> Host:
    """The host with these functions on vfio-pci."""
    devices = dict(host.devices)
    for address in addresses:
        devices[address] = replace(devices[address], binding=DriverBinding("vfio-pci", "vfio-pci"))
    gpus = tuple(replace(gpu, device=devices[gpu.address]) for gpu in host.gpus)
    return replace(host, devices=devices, gpus=gpus)


def domain_of(spec: ClusterSpec, placement: Placement, *, running: bool = True) -> Domain:
    """The domain that libvirt has of a node."""
    member = Membership(
        spec.name,
        placement.node.name,
        placement.node.role,
        IMAGE,
        spec_digest(spec),
        placement.gpus,
    )
    name = domain_name(spec.name, placement.node.name)
    return Domain(name, f"uuid of {name}", running, member, placement.gpus)


def network_of(spec: ClusterSpec, *, active: bool = True) -> Network:
    name = network_name(spec.name)
    return Network(name, active, "gp-x", (spec.subnet,), cluster=spec.name)


def whole_cluster(host: Host, spec: ClusterSpec) -> tuple[Allocation, Surroundings]:
    """Everything of a two-GPU cluster on the emulated host, up as `up` leaves it."""
    allocation = allocate(spec, host=host)
    lent = {
        BARE: loan_of(host, BARE, node="compute-0"),
        GPU: loan_of(host, GPU, SOUND, node="compute-1"),
    }
    around = Surroundings(
        host=on_vfio(host, BARE, GPU, SOUND),
        loans=lent,
        domains=tuple(domain_of(spec, each) for each in allocation.placements),
        networks=(network_of(spec),),
        has_folder=True,
        folder=allocation,
        image=IMAGE,
        has_image=True,
    )
    return allocation, around
