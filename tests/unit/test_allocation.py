"""Nodes get addresses, MACs and GPUs: repeatably, and never what is not to be had."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise

import pytest
from clusters import BARE, BOOT, GPU, SOUND, loan_of, machine, node, on_vfio, spec_of, two_gpus
from hypothesis import given
from hypothesis import strategies as st

from gpupt.decide.allocation import (
    allocate,
    assess_subnet,
    bridge_of,
    free_subnet,
    node_addresses,
    node_macs,
)
from gpupt.decide.sizing import assess_size, show_size
from gpupt.errors import BadInput, Refused
from gpupt.model.cluster import Capacity, Domain, Network, Route
from gpupt.model.host import Loan
from gpupt.model.pci import PciId

HOST = machine("emulated_host")
SERVER = machine("server")


def test_counts_take_free_gpus_in_order_with_their_whole_cards() -> None:
    allocation = allocate(two_gpus(), host=HOST)
    frontend, first, second = allocation.placements
    assert frontend.cards == ()
    assert first.gpus == (BARE,)
    assert second.cards[0].functions == (GPU, SOUND)
    assert second.cards[0].id == PciId(0x10DE, 0x1EB8)
    assert [each.ip for each in allocation.placements] == [
        IPv4Address("10.71.0.10"),
        IPv4Address("10.71.0.11"),
        IPv4Address("10.71.0.12"),
    ]
    assert allocation.gateway == IPv4Address("10.71.0.1")
    assert allocation.of("compute-1") is second
    assert allocate(two_gpus(), host=HOST) == allocation


def test_named_gpus_go_first_and_counts_take_the_rest() -> None:
    spec = spec_of(node("a", count=1), node("b", str(BARE)))
    allocation = allocate(spec, host=HOST)
    assert allocation.of("a").gpus == (GPU,)
    assert allocation.of("b").gpus == (BARE,)


def test_alias_names_a_gpu() -> None:
    spec = spec_of(node("a", "big"))
    assert allocate(spec, host=HOST, aliases={"big": GPU}).of("a").gpus == (GPU,)


def test_detached_gpus_are_preferred_and_a_node_keeps_what_it_has() -> None:
    detached = on_vfio(HOST, GPU, SOUND)
    loans = {GPU: loan_of(HOST, GPU, SOUND)}
    spec = spec_of(node("a", count=1))
    assert allocate(spec, host=detached, loans=loans).of("a").gpus == (GPU,)
    kept = {GPU: loan_of(HOST, GPU, SOUND, node="compute-0")}
    allocation = allocate(two_gpus(), host=detached, loans=kept)
    assert allocation.of("compute-0").gpus == (GPU,)
    assert allocation.of("compute-1").gpus == (BARE,)


def test_more_gpus_than_the_host_has_is_refused_with_the_reason_for_each() -> None:
    spec = spec_of(node("a", count=3))
    with pytest.raises(Refused) as caught:
        allocate(spec, host=HOST, places={"nodes[1].gpus": "c.yaml:5:7"})
    said = str(caught.value)
    assert "a asks for 3 GPUs, and 2 are left" in said
    assert "at c.yaml:5:7" in said
    assert f"{BOOT}: it is the boot display" in said
    assert f"{BARE}: free" in said
    assert caught.value.exit_code == 3


def test_unknown_gpu_is_bad_input_at_its_place() -> None:
    spec = spec_of(node("a", "0000:01:00.1"))
    with pytest.raises(BadInput) as caught:
        allocate(spec, host=HOST, places={"nodes[1].gpus[0]": "c.yaml:5:9"})
    said = str(caught.value)
    assert "this host has no GPU 0000:01:00.1" in said
    assert "at c.yaml:5:9" in said
    assert "did you mean '0000:01:00.0'" in said
    with pytest.raises(BadInput, match="no GPU huge") as caught:
        allocate(
            spec_of(node("a", "huge")),
            host=HOST,
            aliases={"big": GPU},
            alias_file="/s/aliases.yaml",
        )
    assert "aliases in /s/aliases.yaml: big" in caught.value.details


def test_companion_named_as_a_gpu_says_whose_it_is() -> None:
    with pytest.raises(BadInput) as caught:
        allocate(spec_of(node("a", str(SOUND))), host=HOST)
    assert caught.value.brief == f"{SOUND} is a companion of the GPU {GPU}"
    assert caught.value.remedy.startswith(f"name {GPU}")


def test_a_card_that_nodes_do_not_count_is_refused_and_never_chosen() -> None:
    """A node would wait for it in vain, and the whole `up` be undone."""
    amd = replace(HOST.devices[BARE], id=PciId(0x1002, 0x74A1))
    gpus = tuple(replace(gpu, device=amd) if gpu.address == BARE else gpu for gpu in HOST.gpus)
    mixed = replace(HOST, devices={**HOST.devices, BARE: amd}, gpus=gpus)
    assert allocate(spec_of(node("a", count=1)), host=mixed).of("a").gpus == (GPU,)
    with pytest.raises(Refused, match="NVIDIA's display cards alone"):
        allocate(spec_of(node("a", str(BARE))), host=mixed)


def test_what_helps_is_what_can_be_done() -> None:
    none = replace(HOST, devices={}, gpus=())
    with pytest.raises(Refused) as caught:
        allocate(spec_of(node("a", count=1)), host=none)
    assert caught.value.remedy == "gpupt list shows the GPUs of this host"
    with pytest.raises(Refused) as caught:
        allocate(spec_of(node("a", count=3)), host=HOST)
    assert "ask for fewer" in caught.value.remedy
    assert "free one" not in caught.value.remedy
    other = Loan(GPU, (), "orchard", "n0")
    with pytest.raises(Refused, match="free one: gpupt status"):
        allocate(two_gpus(), host=HOST, loans={GPU: other})


def test_alias_and_address_of_one_gpu_for_two_nodes() -> None:
    spec = spec_of(node("a", "big"), node("b", str(GPU)))
    with pytest.raises(BadInput, match="asked for by a and b"):
        allocate(spec, host=HOST, aliases={"big": GPU})


def test_gpu_lent_elsewhere_is_refused() -> None:
    other = Loan(GPU, (), "orchard", "n0")
    with pytest.raises(Refused, match="lent to orchard/n0"):
        allocate(spec_of(node("a", str(GPU))), host=HOST, loans={GPU: other})
    with pytest.raises(Refused, match="and 0 are left"):
        allocate(two_gpus(), host=HOST, loans={GPU: other})


def test_gpu_of_a_foreign_running_domain_is_refused_and_of_a_stopped_one_is_not() -> None:
    foreign = Domain("windows", "u", True, None, (GPU, SOUND))
    spec = spec_of(node("a", str(GPU)))
    with pytest.raises(Refused, match="in libvirt's domain 'windows'"):
        allocate(spec, host=HOST, domains=[foreign])
    assert allocate(spec, host=HOST, domains=[replace(foreign, running=False)])


def test_boot_display_is_refused_when_it_is_named() -> None:
    with pytest.raises(Refused, match="boot display"):
        allocate(spec_of(node("a", str(BOOT))), host=HOST)


def test_gpus_of_one_group_go_to_one_node() -> None:
    devices = {
        address: replace(device, iommu_group=12) if device.iommu_group == 13 else device
        for address, device in HOST.devices.items()
    }
    groups = {**HOST.groups, 12: replace(HOST.groups[12], members=(BARE, GPU, SOUND))}
    gpus = tuple(replace(gpu, device=devices[gpu.address]) for gpu in HOST.gpus)
    host = replace(HOST, devices=devices, groups=groups, gpus=gpus)
    with pytest.raises(Refused, match="share IOMMU group 12 and go to two nodes"):
        allocate(two_gpus(), host=host)
    assert allocate(spec_of(node("a", count=2)), host=host).of("a").gpus == (BARE, GPU)


def test_server_with_eight_gpus() -> None:
    spec = spec_of(*(node(f"c{number}", count=2) for number in range(4)))
    allocation = allocate(spec, host=SERVER)
    given = [gpu for each in allocation.placements for gpu in each.gpus]
    assert len(set(given)) == 8
    assert {card.numa_node for card in allocation.of("c3").cards} == {1}


@given(st.integers(16, 29), st.integers(1, 200))
def test_addresses_are_distinct_and_inside(prefix: int, count: int) -> None:
    subnet = IPv4Network(f"10.0.0.0/{prefix}")
    count = min(count, subnet.num_addresses - 3)
    addresses = node_addresses(subnet, count=count)
    assert len(set(addresses)) == count
    for address in addresses:
        assert address in subnet
        assert address not in (subnet.network_address, subnet.network_address + 1)
        assert address != subnet.broadcast_address


def test_macs_are_distinct_local_and_follow_the_names() -> None:
    spec = spec_of(*(node(f"c{number}") for number in range(199)))
    macs = node_macs(spec)
    assert len(set(macs)) == 200
    assert all(mac.startswith("52:54:00:") and len(mac) == 17 for mac in macs)
    assert node_macs(replace(spec, nodes=spec.nodes[:3])) == macs[:3]


@given(st.text(min_size=1, max_size=63))
def test_bridge_names_fit_the_kernel(name: str) -> None:
    assert len(bridge_of(name).encode()) <= 15


@pytest.mark.parametrize(
    ("network", "route", "clash"),
    [
        (Network("default", True, "virbr0", (IPv4Network("10.71.0.0/16"),)), None, "'default'"),
        (Network("idle", False, None, (IPv4Network("10.71.0.128/25"),)), None, "'idle'"),
        (Network("herbarium", True, None, (IPv4Network("10.71.0.0/24"),), "herbarium"), None, ""),
        (None, Route("eth0", IPv4Network("10.71.0.0/20")), "goes to eth0"),
        (None, Route("eth0", IPv4Network("10.72.0.0/20")), ""),
        (None, Route("eth0", IPv4Network("0.0.0.0/0")), ""),
        (None, Route(bridge_of("herbarium"), IPv4Network("10.71.0.0/24")), ""),
    ],
)
def test_subnets_clash(network: Network | None, route: Route | None, clash: str) -> None:
    networks = [network] if network else []
    routes = [route] if route else []
    if not clash:
        assess_subnet(two_gpus(), networks=networks, routes=routes)
        return
    with pytest.raises(Refused) as caught:
        assess_subnet(two_gpus(), networks=networks, routes=routes, place="c.yaml:3:19")
    said = str(caught.value)
    assert clash in said
    assert "at c.yaml:3:19" in said
    free = free_subnet(networks, routes)
    assert str(free) in said if free else "choose another" in said


def test_memory_is_refused_and_cpus_only_warn() -> None:
    spec = two_gpus()
    plenty = Capacity(cpus=8, memory=64 << 30, available=32 << 30)
    assert assess_size(spec, starting=spec.nodes, capacity=plenty) == ()
    few = replace(plenty, cpus=1)
    found = assess_size(spec, starting=spec.nodes, capacity=few)
    assert {finding.id for finding in found} == {"cpus-overcommitted", "cpus-shared"}
    short = replace(plenty, available=2 << 30)
    with pytest.raises(Refused, match="needs 2368 MiB of memory for its GPU nodes, and this") as no:
        assess_size(spec, starting=spec.nodes, capacity=short)
    # What is listed is what was summed, in the same unit.
    assert "has 2048 MiB available of 65536 MiB" in no.value.brief
    assert no.value.details == tuple(
        f"compute-{number}: 1024 MiB, pinned for its GPUs, and 160 MiB for QEMU itself"
        for number in (0, 1)
    )
    assert not assess_size(spec, starting=spec.nodes[:1], capacity=short)
    tight = assess_size(spec, starting=spec.nodes, capacity=replace(plenty, available=3 << 30))
    assert [finding.id for finding in tight] == ["memory-tight"]
    small = replace(plenty, memory=5 << 29, available=5 << 29)
    with pytest.raises(Refused, match="needs 3072 MiB of memory, and this"):
        assess_size(spec, starting=spec.nodes, capacity=small)


@given(st.integers(0, 1 << 50))
def test_sizes_are_shown_in_few_characters(size: int) -> None:
    shown = show_size(size)
    assert 0 < len(shown) < 24


@given(st.lists(st.integers(0, 7), min_size=0, max_size=9), st.booleans())
def test_no_gpu_is_ever_given_twice(counts: list[int], named: bool) -> None:
    nodes = [node(f"c{number}", count=count) for number, count in enumerate(counts)]
    if named:
        nodes.append(node("named", "0000:3b:00.0"))
    spec = spec_of(*nodes)
    try:
        allocation = allocate(spec, host=SERVER)
    except Refused:
        assert sum(counts) + named > 8
        return
    given = [gpu for each in allocation.placements for gpu in each.gpus]
    assert len(given) == len(set(given)) == sum(counts) + named
    for each in allocation.placements:
        assert len(each.gpus) == each.node.gpus.wanted
        assert all(before < after for before, after in pairwise(each.gpus)) or named
