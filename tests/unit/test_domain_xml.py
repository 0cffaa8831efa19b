"""The XML of domains and networks, by golden files; the libvirt tier holds them to schemas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from xml.etree import ElementTree

import pytest
from clusters import BARE, GPU, SOUND, machine, node, spec_of, two_gpus

from gpupt.decide.allocation import allocate
from gpupt.decide.domain import (
    CREDENTIALS,
    Credential,
    DomainView,
    home_numa_node,
    spec_digest,
    view_domain,
    view_hosts,
    view_network,
)
from gpupt.edges.hypervisor import membership_in
from gpupt.edges.templates import render_template, render_view
from gpupt.errors import Failed
from gpupt.model.cluster import Allocation, Membership, Role
from gpupt.model.roll import Image

HOST = machine("emulated_host")
SERVER = machine("server")
Golden = Callable[[str, str], None]
IMAGE = Image(
    digest="feedc0de",
    rolls=("base", "node"),
    disk=PurePosixPath("/var/lib/gpupt/images/feedc0de/disk.qcow2"),
    format="qcow2",
    virtual_size=6 << 30,
    kernel=PurePosixPath("/var/lib/gpupt/images/feedc0de/vmlinuz"),
    initrd=PurePosixPath("/var/lib/gpupt/images/feedc0de/initrd"),
)
FOLDER = PurePosixPath("/var/lib/gpupt/clusters/herbarium/nodes")


def view_of(
    allocation: Allocation, name: str, *, accelerated: bool = True, numa_nodes: int = 1
) -> DomainView:
    folder = FOLDER / name
    return view_domain(
        allocation,
        allocation.of(name),
        image=IMAGE,
        disk=folder / "disk.qcow2",
        console=PurePosixPath(f"/var/lib/gpupt/logs/herbarium/{name}.console.log"),
        credentials=[
            Credential("ssh.authorized_keys.root", folder / "credentials/keys"),
            Credential("gpupt.hosts", folder / "credentials/hosts"),
        ],
        accelerated=accelerated,
        numa_nodes=numa_nodes,
    )


@pytest.mark.parametrize(
    ("file", "name", "accelerated"),
    [
        ("domain-frontend.xml", "frontend", True),
        ("domain-frontend-emulated.xml", "frontend", False),
        ("domain-one-function.xml", "compute-0", True),
        ("domain-card-with-sound.xml", "compute-1", True),
    ],
)
def test_domains(golden: Golden, file: str, name: str, accelerated: bool) -> None:
    view = view_of(allocate(two_gpus(), host=HOST), name, accelerated=accelerated)
    golden(file, render_view("domain.xml.j2", view))


def test_domain_of_a_big_board(golden: Golden) -> None:
    spec = spec_of(node("c0", count=4), node("c1", count=4))
    view = view_of(allocate(spec, host=SERVER), "c1", numa_nodes=2)
    assert view.numa_node == 1
    golden("domain-four-gpus-numa.xml", render_view("domain.xml.j2", view))


def test_network_and_hosts(golden: Golden) -> None:
    allocation = allocate(two_gpus(), host=HOST)
    golden("network.xml", render_view("network.xml.j2", view_network(allocation)))
    golden("hosts", render_view("hosts.j2", view_hosts(allocation)))


def test_membership_survives_the_way_through_xml() -> None:
    allocation = allocate(two_gpus(), host=HOST)
    text = render_view("domain.xml.j2", view_of(allocation, "compute-1"))
    assert membership_in(ElementTree.fromstring(text)) == Membership(
        cluster="herbarium",
        node="compute-1",
        role=Role.COMPUTE,
        image="feedc0de",
        spec=spec_digest(allocation.spec),
        gpus=(GPU,),
    )


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "<metadata/>",
        '<metadata><n xmlns="https://gpupt.dev/ns/1"/></metadata>',
        '<metadata><node xmlns="https://gpupt.dev/ns/1" cluster="x"/></metadata>',
        '<metadata><node xmlns="https://gpupt.dev/ns/1" cluster="x" name="n" role="boss" '
        'image="i" spec="s"/></metadata>',
        '<metadata><node xmlns="https://gpupt.dev/ns/1" cluster="x" name="n" role="compute" '
        'image="i" spec="s" gpus="nonsense"/></metadata>',
    ],
)
def test_what_is_not_ours_has_no_membership(metadata: str) -> None:
    assert membership_in(ElementTree.fromstring(f"<domain>{metadata}</domain>")) is None


def test_each_card_has_a_port_and_all_its_functions_in_one_slot() -> None:
    view = view_of(allocate(spec_of(node("a", count=2)), host=HOST), "a")
    assert view.card_ports == (4, 5)
    assert [(each.host, each.bus, each.function, each.first) for each in view.functions] == [
        (BARE, 4, 0, True),
        (GPU, 5, 0, True),
        (SOUND, 5, 1, False),
    ]


def test_every_guest_address_is_used_once() -> None:
    spec = spec_of(node("a", count=8))
    root = ElementTree.fromstring(
        render_view("domain.xml.j2", view_of(allocate(spec, host=SERVER), "a"))
    )
    places = [
        tuple(address.get(part) for part in ("bus", "slot", "function"))
        for address in root.iterfind("devices/*/address[@type='pci']")
    ]
    assert len(places) == len(set(places)) == 3 + 8


def test_a_home_is_named_only_where_there_is_one() -> None:
    both = allocate(spec_of(node("a", count=8)), host=SERVER).of("a")
    assert home_numa_node(both, numa_nodes=2) is None
    one = allocate(spec_of(node("a", count=2)), host=SERVER).of("a")
    assert home_numa_node(one, numa_nodes=2) == 0
    assert home_numa_node(one, numa_nodes=1) is None
    unknown = allocate(spec_of(node("a", count=1)), host=HOST).of("a")
    assert home_numa_node(unknown, numa_nodes=2) is None
    assert home_numa_node(replace(one, cards=()), numa_nodes=2) is None


def test_values_are_escaped() -> None:
    view = view_of(allocate(two_gpus(), host=HOST), "frontend")
    hostile = replace(view, disk=PurePosixPath('/a"><x/>&'))
    root = ElementTree.fromstring(render_view("domain.xml.j2", hostile))
    source = root.find("devices/disk/source")
    assert source is not None
    assert source.get("file") == '/a"><x/>&'
    assert root.find(".//x") is None


def test_what_a_template_lacks_is_an_error() -> None:
    with pytest.raises(Failed, match=r"domain\.xml\.j2 cannot be rendered"):
        render_template("domain.xml.j2", name="x")
    with pytest.raises(Failed, match="no template"):
        render_template("nowhere.j2")


def test_nothing_secret_reaches_a_command_line_or_the_xml() -> None:
    view = view_of(allocate(two_gpus(), host=HOST), "frontend")
    text = render_view("domain.xml.j2", view)
    entries = ElementTree.fromstring(text).findall("sysinfo/entry")
    assert [entry.get("file") for entry in entries] == [str(c.file) for c in view.credentials]
    assert all(entry.text is None for entry in entries)
    # QEMU's limit on names of fw_cfg files is 55 bytes.
    names = ["ssh.authorized_keys.root", "gpupt.ssh_host_ed25519_key", "gpupt.hosts"]
    assert all(len(f"{CREDENTIALS}/{name}") <= 55 for name in names)
