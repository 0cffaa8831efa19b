"""A node that lost its GPU runs on and says nothing: the host's side tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from clusters import BARE, GPU, SOUND, domain_of, machine, two_gpus, whole_cluster
from fakekernel import FakeKernel
from machines import emulated_host
from test_fences import lend

from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.cli.nodes import assess_status
from gpupt.decide.facts import NodeFacts, SeenGpu
from gpupt.decide.lent import assess_lent
from gpupt.model.host import Finding, Holder, Host
from gpupt.model.pci import DriverBinding, PciId
from gpupt.report.cluster import NodeStatus

SPEC = two_gpus()
HOST = machine("emulated_host")
ALLOCATION, AROUND = whole_cluster(HOST, SPEC)
HOLDERS = {each: (Holder(4242, "qemu-system-x86", "/dev/vfio/13"),) for each in (BARE, GPU)}


def ids(found: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(each.subject, each.id) for each in found]


def changed(**change: object) -> Host:
    """The host with its second GPU other than it was lent."""
    devices = dict(AROUND.host.devices)
    devices[GPU] = replace(devices[GPU], **change)  # type: ignore[arg-type]
    return replace(AROUND.host, devices=devices)


def without(address: object) -> Host:
    devices = {at: device for at, device in AROUND.host.devices.items() if at != address}
    return replace(AROUND.host, devices=devices)


def assess(host: Host, *, holders: object = HOLDERS) -> tuple[Finding, ...]:
    return assess_lent(host, AROUND.loans, domains=AROUND.domains, holders=holders)  # type: ignore[arg-type]


def test_a_whole_cluster_has_its_gpus() -> None:
    assert assess(AROUND.host) == ()


@pytest.mark.parametrize(
    ("host", "id"),
    [
        (without(GPU), "gpu-gone"),
        (changed(lost=True), "lost-device"),
        (changed(lost=True, id=PciId(0xFFFF, 0xFFFF)), "lost-device"),
        (changed(id=PciId(0x10DE, 0x20B5)), "address-moved"),
        (changed(binding=DriverBinding("bochs-drm", None)), "gpu-unbound"),
        (changed(binding=DriverBinding(None, "vfio-pci")), "gpu-unbound"),
    ],
)
def test_each_way_of_losing_it_is_told(host: Host, id: str) -> None:
    found = assess(host)
    assert ids(found) == [(str(GPU), id)]
    assert found[0].evidence
    assert "gpupt down herbarium" in found[0].remedy


def test_a_companion_that_was_unbound_counts() -> None:
    devices = dict(AROUND.host.devices)
    devices[SOUND] = replace(devices[SOUND], binding=DriverBinding("snd_hda_intel", None))
    found = assess(replace(AROUND.host, devices=devices))
    assert ids(found) == [(str(GPU), "gpu-unbound")]
    assert f"{SOUND} is on snd_hda_intel" in found[0].evidence[0]


def test_a_guest_that_does_not_hold_it_is_told_only_when_all_processes_were_seen() -> None:
    assert ids(assess(AROUND.host, holders={BARE: HOLDERS[BARE]})) == [(str(GPU), "gpu-unheld")]
    assert assess(AROUND.host, holders=None) == ()


@pytest.mark.parametrize("there", [True, False])
def test_a_node_that_does_not_run(there: bool) -> None:
    domains = [domain_of(SPEC, each, running=False) for each in ALLOCATION.placements]
    found = assess_lent(AROUND.host, AROUND.loans, domains=domains if there else [], holders={})
    assert ids(found) == [(str(BARE), "node-down"), (str(GPU), "node-down")]


def test_libvirt_that_does_not_answer_leaves_what_sysfs_says() -> None:
    found = assess_lent(without(GPU), AROUND.loans, domains=None, holders={})
    assert ids(found) == [(str(GPU), "gpu-gone")]


def facts(*seen: str) -> NodeFacts:
    gpus = tuple(SeenGpu("0000:05:00.0", PciId(0x10DE, int(each, 16))) for each in seen)
    return NodeFacts("compute-1", "compute", "herbarium", gpus, True, True, "nfs", ())


def test_show_tells_a_node_that_does_not_see_its_gpu() -> None:
    placement = ALLOCATION.of("compute-1")
    whole = NodeStatus(placement, None, facts=facts("1eb8"))
    assert assess_status(whole, cluster="herbarium") == ()
    found = assess_status(NodeStatus(placement, None, facts=facts()), cluster="herbarium")
    assert [each.id for each in found] == ["node-changed"]
    assert "1 GPU 10de:1eb8 is not seen" in found[0].brief
    assert assess_status(NodeStatus(placement, None), cluster="herbarium") == ()


def break_card(kernel: FakeKernel) -> None:
    kernel.lose(str(GPU))


def unbind(kernel: FakeKernel) -> None:
    (kernel.root / f"sys/bus/pci/devices/{GPU}/driver").unlink()


@pytest.mark.parametrize(
    ("hurt", "id"), [(break_card, "lost-device"), (unbind, "gpu-unbound"), (None, None)]
)
def test_status_tells(
    tmp_path: Path, hurt: Callable[[FakeKernel], None] | None, id: str | None
) -> None:
    kernel = emulated_host(tmp_path / "machine")
    live = Settings(root=kernel.root, state=tmp_path / "state", kernel=lambda root: kernel)
    lend(live, kernel)
    if hurt is not None:
        hurt(kernel)
    result = CliRunner().invoke(cli, ["status", "--json"], obj=live)
    assert result.exit_code == 0
    found = json.loads(result.stdout)["findings"]
    assert [each["id"] for each in found] == ([id] if id else [])
    text = CliRunner().invoke(cli, ["status"], obj=live).stdout
    assert ("herbarium/compute-1" in text) and (id is None or id in text)
