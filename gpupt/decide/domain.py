"""What a node's domain, its cluster's network and its hosts file say: views for templates.

Pure: a view holds every value its template needs, so that golden files judge both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Address
from pathlib import PurePosixPath
from uuid import NAMESPACE_URL, uuid5

from gpupt.decide.allocation import bridge_of
from gpupt.model.cluster import Allocation, ClusterSpec, Placement
from gpupt.model.pci import PciAddress
from gpupt.model.roll import Image

XML_NAMESPACE = "https://gpupt.dev/ns/1"
# systemd takes credentials from fw_cfg files of this name (systemd.system-credentials(7)).
CREDENTIALS = "opt/io.systemd.credentials"
# Where every instruction costs a hundred: work that protects nobody there is left out, and
# units get the time they take.
SLOW_WORDS = (
    "gpupt.emulated mitigations=off nokaslr no_timer_check cryptomgr.notests loglevel=3 "
    "systemd.default_timeout_start_sec=900 systemd.ssh_auto=no"
)
# Drivers that udev would load for the processor, the chipset and a card's sound, each with its
# self-test or its stack of others, and that a node has no use for.  modprobe.blacklist= stops
# the load by alias before its dependencies come; module_blacklist= would let them come.
SLOW_MODULES = (
    *("nouveau", "snd_hda_intel", "ahci", "i2c_i801", "lpc_ich", "iTCO_wdt", "intel_agp"),
    *("kvm_amd", "kvm_intel", "ccp", "edac_mce_amd", "intel_rapl_msr", "pcspkr", "psmouse"),
    *("aesni_intel", "ghash_clmulni_intel", "polyval_clmulni", "crct10dif_pclmul"),
    *("crc32_pclmul", "sha1_ssse3", "sha256_ssse3", "sha512_ssse3", "cfg80211", "drm"),
)
# Root ports 1 to 3 carry disk, network and rng; each card has a root port of its own after.
FIRST_CARD_PORT = 4


@dataclass(frozen=True, slots=True)
class Credential:
    """A file that reaches the guest's systemd by its name."""

    name: str
    file: PurePosixPath

    @property
    def entry(self) -> str:
        """The name of its fw_cfg entry."""
        return f"{CREDENTIALS}/{self.name}"


@dataclass(frozen=True, slots=True)
class GuestFunction:
    """A host function and where the guest sees it: bus and function; slot 0 of its port."""

    host: PciAddress
    bus: int
    function: int
    first: bool


@dataclass(frozen=True, slots=True)
class DomainView:
    """Everything domain.xml says; memory in KiB."""

    namespace: str
    name: str
    uuid: str
    type: str
    cluster: str
    node: str
    role: str
    image: str
    spec: str
    gpus: str
    memory: int
    cpus: int
    numa_node: int | None
    kernel: PurePosixPath
    initrd: PurePosixPath
    cmdline: str
    credentials: tuple[Credential, ...]
    disk: PurePosixPath
    network: str
    mac: str
    console: PurePosixPath
    card_ports: tuple[int, ...]
    functions: tuple[GuestFunction, ...]


@dataclass(frozen=True, slots=True)
class NetworkView:
    """Everything network.xml says."""

    namespace: str
    cluster: str
    uuid: str
    bridge: str
    gateway: IPv4Address
    netmask: IPv4Address
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class HostsView:
    """Everything a node's /etc/hosts says."""

    cluster: str
    placements: tuple[Placement, ...]


def view_domain(
    allocation: Allocation,
    placement: Placement,
    *,
    image: Image,
    disk: PurePosixPath,
    console: PurePosixPath,
    credentials: Iterable[Credential],
    accelerated: bool,
    slow: bool = False,
    numa_nodes: int = 1,
) -> DomainView:
    """The node's domain; ``accelerated`` says that KVM was seen to run guests, ``slow`` that
    the host itself is emulated."""
    spec, node = allocation.spec, placement.node
    ports = tuple(range(FIRST_CARD_PORT, FIRST_CARD_PORT + len(placement.cards)))
    return DomainView(
        namespace=XML_NAMESPACE,
        name=domain_name(spec.name, node.name),
        uuid=str(uuid5(NAMESPACE_URL, f"{XML_NAMESPACE}/{spec.name}/{node.name}")),
        type="kvm" if accelerated else "qemu",
        cluster=spec.name,
        node=node.name,
        role=node.role.value,
        image=image.digest,
        spec=spec_digest(spec),
        gpus=" ".join(str(gpu) for gpu in placement.gpus),
        memory=node.memory >> 10,
        cpus=node.cpus,
        numa_node=home_numa_node(placement, numa_nodes=numa_nodes),
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=kernel_cmdline(spec, placement, slow=slow or not accelerated),
        credentials=tuple(credentials),
        disk=disk,
        network=network_name(spec.name),
        mac=placement.mac,
        console=console,
        card_ports=ports,
        functions=tuple(
            GuestFunction(host=address, bus=port, function=number, first=number == 0)
            for port, card in zip(ports, placement.cards, strict=True)
            for number, address in enumerate(card.functions)
        ),
    )


def view_network(allocation: Allocation) -> NetworkView:
    """The cluster's network: NAT to the outside, and a reservation for each node."""
    spec = allocation.spec
    return NetworkView(
        namespace=XML_NAMESPACE,
        cluster=spec.name,
        uuid=str(uuid5(NAMESPACE_URL, f"{XML_NAMESPACE}/{spec.name}")),
        bridge=bridge_of(spec.name),
        gateway=allocation.gateway,
        netmask=spec.subnet.netmask,
        placements=allocation.placements,
    )


def view_hosts(allocation: Allocation) -> HostsView:
    """The hosts file that every node of the cluster has: one canonical name for each."""
    return HostsView(cluster=allocation.spec.name, placements=allocation.placements)


def domain_name(cluster: str, node: str) -> str:
    """What libvirt calls the node."""
    return f"{cluster}-{node}"


def network_name(cluster: str) -> str:
    """What libvirt calls the cluster's network."""
    return cluster


def kernel_cmdline(spec: ClusterSpec, placement: Placement, *, slow: bool) -> str:
    """The guest kernel's command line: nothing secret, since anyone there can read it."""
    node = placement.node
    words = [
        "root=/dev/vda rw console=ttyS0 quiet",
        f"systemd.hostname={node.name}",
        # It would probe a card that CUDA's driver, or the roll's, is to have.
        "module_blacklist=nouveau",
        f"gpupt.cluster={spec.name}",
        f"gpupt.role={node.role.value}",
        f"gpupt.frontend={spec.frontend.name}",
        *([SLOW_WORDS, f"modprobe.blacklist={','.join(SLOW_MODULES)}"] if slow else []),
    ]
    return " ".join(words)


def home_numa_node(placement: Placement, *, numa_nodes: int) -> int | None:
    """The host's NUMA node that all of a guest's cards sit on; None when there is only one,
    or no single answer."""
    homes = {card.numa_node for card in placement.cards}
    if numa_nodes < 2 or len(homes) != 1:
        return None
    home = homes.pop()
    return home if home is not None and home >= 0 else None


def spec_digest(spec: ClusterSpec) -> str:
    """Twelve hex digits that differ when two specifications do."""
    nodes = [
        f"{node.name}|{node.role}|{node.cpus}|{node.memory}|{node.disk}"
        f"|{','.join(node.gpus.named)}|{node.gpus.count}"
        for node in spec.nodes
    ]
    whole = "\n".join([spec.name, ",".join(spec.rolls), str(spec.subnet), *nodes])
    return sha256(whole.encode()).hexdigest()[:12]
