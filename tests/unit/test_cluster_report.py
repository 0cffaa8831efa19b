"""What is told of clusters: tables for people, and JSON in which unknown is null."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from clusters import BARE, GPU, machine, two_gpus, whole_cluster

from gpupt.decide.facts import NodeFacts, SeenGpu
from gpupt.model.gpus import identity_of
from gpupt.model.host import Finding, FunctionOrigin, Severity
from gpupt.model.pci import DriverBinding, PciId
from gpupt.report.cluster import (
    NodeStatus,
    Return,
    finding_text,
    node_json,
    nodes_text,
    return_json,
    return_text,
)

HOST = machine("emulated_host")
ALLOCATION, AROUND = whole_cluster(HOST, two_gpus())
SEEN = NodeFacts(
    "compute-1",
    "compute",
    "herbarium",
    (SeenGpu("0000:04:00.0", PciId(0x10DE, 0x1EB8)),),
    True,
    True,
    "nfs",
    (),
)


def test_nodes_for_a_person(golden: Callable[[str, str], None]) -> None:
    frontend, first, second = ALLOCATION.placements
    statuses = [
        NodeStatus(frontend, AROUND.domains[0], facts=replace(SEEN, gpus=())),
        NodeStatus(first, None),
        NodeStatus(second, replace(AROUND.domains[2], running=False), facts=SEEN),
    ]
    golden("show.txt", nodes_text(statuses) + "\n")


def test_node_for_a_program() -> None:
    placement = ALLOCATION.of("compute-1")
    told = node_json(NodeStatus(placement, replace(AROUND.domains[2], type="kvm"), SEEN, 12.34))
    assert told["domain_type"] == "kvm"
    assert told["gpus"] == [str(GPU)]
    assert told["gpus_seen"] == [
        {"address": "0000:04:00.0", "vendor_id": "10de", "device_id": "1eb8"}
    ]
    assert (told["state"], told["home"], told["ready"]) == ("running", "nfs", 12.3)
    silent = node_json(NodeStatus(placement, None))
    assert (silent["state"], silent["gpus_seen"], silent["ready"]) == ("missing", None, None)


def test_way_back_of_a_function() -> None:
    origin = FunctionOrigin(GPU, identity_of(HOST.devices[GPU]), DriverBinding("bochs-drm", None))
    lent = DriverBinding("vfio-pci", "vfio-pci")
    back = Return(origin, lent=lent, now=origin.binding)
    assert return_text(back) == "0000:02:00.0 is back on bochs-drm"
    assert return_json(back)["restored"] is True
    stays = Return(origin, lent=lent, now=lent)
    assert return_text(stays) == (
        "0000:02:00.0 is on vfio-pci with driver_override vfio-pci, and came from bochs-drm"
    )
    assert return_json(stays) == {
        "address": "0000:02:00.0",
        "recorded": {"driver": "bochs-drm", "override": None},
        "before": {"driver": "vfio-pci", "override": "vfio-pci"},
        "after": {"driver": "vfio-pci", "override": "vfio-pci"},
        "restored": False,
    }
    # The right driver with an override left behind is not restored.
    override = Return(origin, lent=lent, now=DriverBinding("bochs-drm", "vfio-pci"))
    assert not override.restored
    gone = Return(origin, lent=lent, now=None)
    assert "nothing: it is gone" in return_text(gone)
    none = Return(replace(origin, binding=DriverBinding(None, None)), lent=lent, now=None)
    assert not none.restored


def test_finding_for_a_person() -> None:
    finding = Finding("x", Severity.WARN, str(BARE), "it is warm", ("90 °C",), "cool it")
    assert finding_text(finding) == "warning: it is warm\n  90 °C\n  → cool it"
