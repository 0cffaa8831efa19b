"""Gives every node of a specification its address, its MAC and its GPUs; pure and repeatable.

The same specification on the same host always gives the same allocation: addresses follow
the order of the nodes, MACs follow the names, and a node keeps the GPUs it already has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network

from gpupt.decide.viability import Preflight, assess_lending, refusal
from gpupt.errors import BadInput, Refused
from gpupt.model.cluster import (
    Allocation,
    Card,
    ClusterSpec,
    Domain,
    Network,
    NodeSpec,
    Placement,
    Route,
)
from gpupt.model.gpus import NVIDIA, VFIO, fence_of
from gpupt.model.host import Finding, Gpu, Host, Loan
from gpupt.model.pci import PciAddress

# Nodes follow the gateway at a distance that leaves room for what people put by hand.
FIRST_NODE = 10


def allocate(
    spec: ClusterSpec,
    *,
    host: Host,
    loans: Mapping[PciAddress, Loan] | None = None,
    domains: Sequence[Domain] = (),
    preflight: Preflight | None = None,
    aliases: Mapping[str, PciAddress] | None = None,
    alias_file: str = "",
    places: Mapping[str, str] | None = None,
) -> Allocation:
    """A placement for every node.

    ``places`` maps paths of the specification to ``file:line:column``, and ``alias_file``
    is where aliases are looked for: both for errors.  Raises BadInput for a GPU that the
    host does not have, Refused for one that is not to be had.
    """
    places = places or {}
    preflight = preflight or Preflight()
    names = _Names(host, aliases or {}, alias_file)
    named = _resolve_named(spec, names=names, places=places)
    taken = {address: holder for holder, address in _holders((loans or {}).values(), domains)}
    _refuse_fenced(spec, host=host, taken=taken, domains=domains, preflight=preflight)
    unfit = {
        gpu.address: [
            *assess_lending(host, gpu, loans=loans or {}, preflight=preflight),
            *_about_nodes(gpu),
        ]
        for gpu in host.gpus
        if gpu.address not in taken
    }
    chosen: dict[str, list[PciAddress]] = {}
    given: dict[PciAddress, str] = {}
    for node in spec.nodes:
        chosen[node.name] = []
        for address, place in named[node.name]:
            holder = taken.get(address)
            if holder is not None and holder != (spec.name, node.name):
                cluster, name = holder
                remedy = f"gpupt down {cluster}" if cluster else f"virsh shutdown {name}"
                raise Refused(
                    f"GPU {address} is {_had_by(holder)}",
                    details=_at(place),
                    remedy=f"{remedy}, or name another GPU",
                )
            if address in given:
                raise BadInput(
                    f"GPU {address} is asked for by {given[address]} and {node.name}",
                    details=_at(place),
                )
            _refuse_unfit(address, reasons=unfit.get(address, ()), place=place)
            given[address] = node.name
            chosen[node.name].append(address)
    for node in spec.nodes:
        pool = _Pool(host=host, taken=taken, given=given, unfit=unfit)
        place = places.get(f"nodes[{spec.nodes.index(node)}].gpus", "")
        for address in pool.pick(node, cluster=spec.name, place=place):
            given[address] = node.name
            chosen[node.name].append(address)
    _refuse_split_group(given, host=host)
    addresses = node_addresses(spec.subnet, count=len(spec.nodes))
    macs = node_macs(spec)
    return Allocation(
        spec=spec,
        gateway=gateway_of(spec.subnet),
        placements=tuple(
            Placement(
                node=node,
                ip=ip,
                mac=mac,
                cards=tuple(card_of(address, host=host) for address in chosen[node.name]),
            )
            for node, ip, mac in zip(spec.nodes, addresses, macs, strict=True)
        ),
    )


def card_of(address: PciAddress, *, host: Host) -> Card:
    """The GPU with the endpoint functions of its card, its own first; raises KeyError."""
    device = host.devices[address]
    companions = next((gpu.companions for gpu in host.gpus if gpu.address == address), ())
    functions = (
        address,
        *sorted(
            other
            for other in companions
            if other != address and other in host.devices and not host.devices[other].is_bridge
        ),
    )
    return Card(gpu=address, id=device.id, functions=functions, numa_node=device.numa_node)


def gateway_of(subnet: IPv4Network) -> IPv4Address:
    """The subnet's first address: the host's own on the cluster's network."""
    return subnet.network_address + 1


def node_addresses(subnet: IPv4Network, *, count: int) -> tuple[IPv4Address, ...]:
    """An address for each of ``count`` nodes, in their order."""
    room = subnet.num_addresses - 1
    first = FIRST_NODE if FIRST_NODE + count <= room else 2
    return tuple(subnet.network_address + first + number for number in range(count))


def node_macs(spec: ClusterSpec) -> tuple[str, ...]:
    """A MAC of QEMU's range for each node, from the names alone, all different."""
    macs: list[str] = []
    for node in spec.nodes:
        salt = 0
        while True:
            seed = f"{spec.name}/{node.name}/{salt}".encode()
            mac = "52:54:00:" + sha256(seed).digest()[:3].hex(":")
            if mac not in macs:
                macs.append(mac)
                break
            salt += 1
    return tuple(macs)


def bridge_of(cluster: str) -> str:
    """The name of the cluster's bridge: at most 15 bytes, which is all the kernel takes."""
    return "gp-" + sha256(cluster.encode()).hexdigest()[:10]


def assess_subnet(
    spec: ClusterSpec, *, networks: Sequence[Network], routes: Sequence[Route], place: str = ""
) -> None:
    """Raise Refused when the subnet overlaps a route of the host or another network of
    libvirt; the cluster's own network, when it is already there, is not a clash."""
    ours = bridge_of(spec.name)
    for network in networks:
        if network.cluster == spec.name:
            continue
        for subnet in network.subnets:
            if subnet.overlaps(spec.subnet):
                raise Refused(
                    f"subnet {spec.subnet} clashes with libvirt's network {network.name!r}",
                    details=(*_at(place), f"{network.name} has {subnet}"),
                    remedy=_other_subnet(networks, routes),
                )
    for route in routes:
        if route.interface == ours or route.destination.prefixlen == 0:
            continue
        if route.destination.overlaps(spec.subnet):
            raise Refused(
                f"subnet {spec.subnet} clashes with a route of this machine",
                details=(*_at(place), f"{route.destination} goes to {route.interface}"),
                remedy=_other_subnet(networks, routes),
            )


def free_subnet(networks: Sequence[Network], routes: Sequence[Route]) -> IPv4Network | None:
    """The first /24 of 10.71.0.0/16 that nothing uses."""
    used = [subnet for network in networks for subnet in network.subnets]
    used += [route.destination for route in routes if route.destination.prefixlen]
    for subnet in IPv4Network("10.71.0.0/16").subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in used):
            return subnet
    return None


def _other_subnet(networks: Sequence[Network], routes: Sequence[Route]) -> str:
    free = free_subnet(networks, routes)
    return f"network: {{subnet: {free}}} is free" if free else "choose another subnet"


def _at(place: str) -> tuple[str, ...]:
    return (f"at {place}",) if place else ()


@dataclass(frozen=True, slots=True)
class _Names:
    """What people may call a GPU of the host in a cluster file."""

    host: Host
    aliases: Mapping[str, PciAddress]
    file: str

    def find(self, text: str, *, place: str) -> PciAddress:
        """The GPU that a word stands for; raises BadInput."""
        address = self.aliases.get(text)
        if address is None and ":" in text:
            address = PciAddress.parse(text)
        for gpu in self.host.gpus:
            if address == gpu.address:
                return gpu.address
            if address in gpu.companions:
                raise BadInput(
                    f"{text} is a companion of the GPU {gpu.address}",
                    details=_at(place),
                    remedy=f"name {gpu.address}: its companions come with it",
                )
        raise self.unknown(text, address, place=place)

    def unknown(self, text: str, address: PciAddress | None, *, place: str) -> BadInput:
        """The error for a word that stands for no GPU of this host."""
        known = [str(gpu.address) for gpu in self.host.gpus]
        details = [*_at(place), f"its GPUs: {', '.join(known) or 'none'}"]
        if address is None and self.file:
            details.append(f"aliases in {self.file}: {', '.join(sorted(self.aliases)) or 'none'}")
        elif address is not None and text in self.aliases:
            details.append(f"{self.file} says that {text} is {address}")
        near = get_close_matches(text, [*known, *self.aliases], 1, 0.8)
        return BadInput(
            f"this host has no GPU {text}",
            details=tuple(details),
            remedy=f"did you mean {near[0]!r}?"
            if near and near[0] != text
            else "gpupt list shows them",
        )


def _resolve_named(
    spec: ClusterSpec, *, names: _Names, places: Mapping[str, str]
) -> dict[str, list[tuple[PciAddress, str]]]:
    """For each node the GPUs it names, with the place of each; raises BadInput."""
    found: dict[str, list[tuple[PciAddress, str]]] = {}
    for number, node in enumerate(spec.nodes):
        found[node.name] = []
        for position, text in enumerate(node.gpus.named):
            place = places.get(f"nodes[{number}].gpus[{position}]", "")
            found[node.name].append((names.find(text, place=place), place))
    return found


def _holders(
    loans: Iterable[Loan], domains: Iterable[Domain]
) -> Iterable[tuple[tuple[str, str], PciAddress]]:
    """Who has which function: cluster and node; no cluster, and the name, for a foreign
    domain."""
    for domain in domains:
        member = domain.membership
        # A domain that only names a device, and does not run, holds nothing.
        if member is None and domain.running:
            for address in domain.hostdevs:
                yield ("", domain.name), address
        elif member is not None:
            for address in member.gpus:
                yield (member.cluster, member.node), address
    for loan in loans:
        if loan.cluster is not None and loan.node is not None:
            yield (loan.cluster, loan.node), loan.gpu


def _about_nodes(gpu: Gpu) -> Iterator[Finding]:
    """Why no node of gpupt's can have it: what it does not count, it waits for in vain."""
    device = gpu.device
    if device.id.vendor != NVIDIA or device.class_code >> 16 != 0x03:
        yield refusal(
            "node-blind",
            gpu,
            "a node counts NVIDIA's display cards alone, and would wait for this one in vain",
            f"{device.id}, class {device.class_code:06x}",
            remedy=f"gpupt detach {gpu.address} readies it for a guest of your own",
        )


def _refuse_fenced(
    spec: ClusterSpec,
    *,
    host: Host,
    taken: Mapping[PciAddress, tuple[str, str]],
    domains: Sequence[Domain],
    preflight: Preflight,
) -> None:
    """Raise Refused when a node that is to start again has a GPU that was fenced since."""
    running = {
        (domain.membership.cluster, domain.membership.node)
        for domain in domains
        if domain.running and domain.membership is not None
    }
    for gpu in host.gpus:
        holder = taken.get(gpu.address)
        if holder is None or holder[0] != spec.name or holder in running:
            continue
        fence = fence_of(gpu.device, preflight.fences)
        if fence is not None:
            raise Refused(
                f"GPU {gpu.address} of {holder[1]} is fenced: {fence.reason}",
                details=fence.evidence,
                remedy=f"gpupt down {spec.name}, then up: another GPU takes its place, if any is "
                "free",
            )


def _refuse_unfit(address: PciAddress, *, reasons: Sequence[Finding], place: str) -> None:
    """Raise Refused when there are reasons why no guest can be given the GPU."""
    for reason in reasons:
        raise Refused(
            f"GPU {address} cannot be lent: {reason.brief}",
            details=(*_at(place), *reason.evidence),
            remedy=reason.remedy,
        )


@dataclass(frozen=True, slots=True)
class _Pool:
    """The host's GPUs: who has them, to whom they go now, and what keeps others from going."""

    host: Host
    taken: Mapping[PciAddress, tuple[str, str]]
    given: Mapping[PciAddress, str]
    unfit: Mapping[PciAddress, Sequence[Finding]]

    def pick(self, node: NodeSpec, *, cluster: str, place: str) -> list[PciAddress]:
        """The GPUs for a node that asks for a count: those it has, then detached ones, then
        the rest, each in the order of their addresses; raises Refused."""
        mine = (cluster, node.name)

        def preference(gpu: Gpu) -> tuple[bool, bool, PciAddress]:
            has_it = self.taken.get(gpu.address) == mine
            return (not has_it, gpu.device.binding.driver != VFIO, gpu.address)

        free = [
            gpu.address
            for gpu in sorted(self.host.gpus, key=preference)
            if gpu.address not in self.given
            and self.taken.get(gpu.address, mine) == mine
            and not self.unfit.get(gpu.address)
        ]
        if len(free) < node.gpus.count:
            raise Refused(
                f"{node.name} asks for {_gpus(node.gpus.count)}, and {len(free)} are left",
                details=(
                    *_at(place),
                    f"this host has {_gpus(len(self.host.gpus))}",
                    *(f"{gpu.address}: {self.why_not(gpu)}" for gpu in self.host.gpus),
                ),
                remedy=self.remedy(free),
            )
        return free[: node.gpus.count]

    def remedy(self, free: Sequence[PciAddress]) -> str:
        """What helps where there are not enough: nothing is freed that nobody has."""
        ways = ["ask for fewer"] if free else []
        if any(gpu.address in self.taken for gpu in self.host.gpus):
            ways.append("free one: gpupt status shows who has what")
        if any(self.unfit.values()):
            ways.append("gpupt info GPU says what would help a card that is not to be had")
        return "; or ".join(ways) or "gpupt list shows the GPUs of this host"

    def why_not(self, gpu: Gpu) -> str:
        """Why a GPU is not to be had, or that it is."""
        if gpu.address in self.taken:
            return _had_by(self.taken[gpu.address])
        if gpu.address in self.given:
            return f"goes to {self.given[gpu.address]}"
        return "; ".join(reason.brief for reason in self.unfit.get(gpu.address, ())) or "free"


def _had_by(holder: tuple[str, str]) -> str:
    cluster, name = holder
    return f"lent to {cluster}/{name}" if cluster else f"in libvirt's domain {name!r}"


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _refuse_split_group(given: Mapping[PciAddress, str], *, host: Host) -> None:
    """Raise Refused when GPUs of one IOMMU group go to different nodes: VFIO opens a group
    for one process only."""
    owner: dict[int, tuple[PciAddress, str]] = {}
    for address, node in given.items():
        group = host.devices[address].iommu_group
        if group is None:
            continue
        other, first = owner.setdefault(group, (address, node))
        if first != node:
            raise Refused(
                f"GPUs {other} and {address} share IOMMU group {group} and go to two nodes, "
                f"{first} and {node}",
                details="a group is the unit of ownership: it goes to one guest as a whole",
                remedy=f"give both to {first}",
            )
