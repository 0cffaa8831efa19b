"""Every file that `up` would write, as text; secrets are marked, never made."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

from gpupt.apply.cluster import node_view
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.cli.clusterworld import aliases_of, cluster_world, remembered, stack_of
from gpupt.cli.context import Settings
from gpupt.cli.naming import alias_file
from gpupt.decide.allocation import allocate
from gpupt.decide.domain import view_hosts, view_network
from gpupt.edges import codec
from gpupt.edges.clusterfolder import AUTHORIZED_KEYS, HOST_KEY, HOSTS, RECORD, ClusterFolder
from gpupt.edges.images import find_image, images_folder
from gpupt.edges.journal import read_ledger
from gpupt.edges.kvm import DEVICE
from gpupt.edges.rolls import read_rolls
from gpupt.edges.specfile import SpecFile
from gpupt.edges.sysfs import read_host
from gpupt.edges.templates import render_view
from gpupt.edges.tree import Reader
from gpupt.model.cluster import Allocation
from gpupt.model.roll import Image

SECRET = "(a private key, made by up)\n"
PUBLIC = "(a public key, made by up)"


def render_files(settings: Settings, read: SpecFile) -> list[tuple[Path, str]]:
    """Paths and contents, the domains' XML first."""
    spec = read.spec
    allocation = allocate(
        spec,
        host=read_host(settings.root, whole=True),
        loans=read_ledger(settings.state).loans,
        aliases=aliases_of(settings),
        alias_file=str(alias_file(settings.state)),
        places=read.places,
    )
    stack = stack_of(spec, rolls=read_rolls())
    image = find_image(settings.state, stack.digest) or expected_image(
        settings.state, stack.digest, rolls=stack.rolls
    )
    ours = cluster_world(settings)
    ours.accelerated = lambda: expects_kvm(settings)
    ours.numa_nodes = max(count_numa_nodes(Reader(settings.root)), 1)
    return files_of(allocation, image=image, ours=ours)


def files_of(allocation: Allocation, *, image: Image, ours: ClusterWorld) -> list[tuple[Path, str]]:
    """Every file of a cluster with that allocation."""
    folder = ClusterFolder(ours.state, allocation.spec.name)
    files = [
        (
            Path(f"libvirt/{allocation.spec.name}-{placement.node.name}.xml"),
            render_view("domain.xml.j2", node_view(allocation, placement, image=image, ours=ours)),
        )
        for placement in allocation.placements
    ]
    network = render_view("network.xml.j2", view_network(allocation))
    files.append((Path(f"libvirt/network-{allocation.spec.name}.xml"), network))
    plain = {"schema": 1, "image": image.digest, "allocation": codec.to_plain(allocation)}
    files.append((folder.path / RECORD, json.dumps(plain, indent=2) + "\n"))
    files.append((folder.key, SECRET))
    files.append((folder.key.with_suffix(".pub"), PUBLIC + "\n"))
    known = [f"{each.node.name},{each.ip} {PUBLIC}\n" for each in allocation.placements]
    files.append((folder.known_hosts, "".join(known)))
    hosts = render_view("hosts.j2", view_hosts(allocation))
    for placement in allocation.placements:
        name = placement.node.name
        files.append((folder.credential(name, AUTHORIZED_KEYS), PUBLIC + "\n"))
        files.append((folder.credential(name, HOST_KEY), SECRET))
        files.append((folder.credential(name, HOSTS), hosts))
    return files


def count_numa_nodes(reader: Reader) -> int:
    """The NUMA nodes of the host; 0 where the kernel tells of none."""
    names = reader.names("sys/devices/system/node")
    return sum(re.fullmatch(r"node\d+", name) is not None for name in names)


def expected_image(state: Path, digest: str, *, rolls: tuple[str, ...]) -> Image:
    """Where the image will be once it is baked."""
    folder = PurePosixPath(images_folder(state).absolute() / digest)
    return Image(
        digest=digest,
        rolls=rolls,
        disk=folder / "disk.qcow2",
        format="qcow2",
        virtual_size=0,
        kernel=folder / "vmlinuz",
        initrd=folder / "initrd",
    )


def expects_kvm(settings: Settings) -> bool:
    """What the probe found in this boot; before it ever ran, whether there is a device."""
    found = remembered(settings.state)
    return found.usable if found is not None else DEVICE.exists()
