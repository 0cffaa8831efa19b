"""Plans of clusters: what is missing is planned, what is there is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Network

import pytest
from clusters import (
    BARE,
    GPU,
    IMAGE,
    SOUND,
    loan_of,
    machine,
    node,
    on_vfio,
    roll,
    spec_of,
    two_gpus,
    whole_cluster,
)

from gpupt.actions import (
    AwaitNode,
    BindFunction,
    EraseLoan,
    LendGpu,
    Plan,
    ReturnGpu,
    StartNode,
    StopNode,
)
from gpupt.decide.allocation import allocate
from gpupt.decide.cluster import Surroundings, differences, plan_down, plan_up, require_unchanged
from gpupt.decide.facts import assess_facts, parse_facts
from gpupt.errors import Failed, Refused
from gpupt.model.cluster import ClusterSpec, Domain, Network
from gpupt.model.pci import PciId
from gpupt.model.roll import Check

HOST = machine("emulated_host")
PROOF = Check("workers", ("spark-ready",), ("frontend",), 120)
ROLLS = [roll("base"), roll("spark", checks=(PROOF,))]
FRESH = Surroundings(host=HOST, loans={}, image=IMAGE, has_image=True)


def kinds(plan: Plan) -> list[str]:
    return [type(action).__name__ for action in plan.actions]


def up(spec: ClusterSpec, around: Surroundings) -> Plan:
    require_unchanged(spec, around=around)
    allocation = allocate(spec, host=around.host, loans=around.loans, domains=around.domains)
    return plan_up(allocation, around=around, rolls=ROLLS)[0]


def test_up_from_nothing() -> None:
    plan = up(two_gpus(), replace(FRESH, has_image=False))
    assert kinds(plan) == [
        "BakeImage",
        "MakeCluster",
        *("RecordLoan", "RecordLoan", "SetAttribute"),
        *("BindFunction", "BindFunction", "BindFunction"),
        *("LendGpu", "LendGpu"),
        "StartNetwork",
        *("StartNode", "StartNode", "StartNode"),
        *("AwaitNode", "AwaitNode", "AwaitNode"),
        "AwaitRoll",
    ]
    bound = [(str(a.address), a.before) for a in plan.actions if isinstance(a, BindFunction)]
    assert bound == [
        ("0000:01:00.0", None),
        ("0000:02:00.1", "snd_hda_intel"),
        ("0000:02:00.0", "bochs-drm"),
    ]
    lent = {(a.gpu, a.node) for a in plan.actions if isinstance(a, LendGpu)}
    assert lent == {(BARE, "compute-0"), (GPU, "compute-1")}
    started = [a.placement.node.name for a in plan.actions if isinstance(a, StartNode)]
    assert started == ["frontend", "compute-0", "compute-1"]


def test_frontend_starts_first_wherever_it_stands() -> None:
    spec = spec_of(node("a"))
    spec = replace(spec, nodes=spec.nodes[::-1])
    started = [a.placement.node.name for a in up(spec, FRESH).actions if isinstance(a, StartNode)]
    assert started == ["frontend", "a"]


def test_gpus_that_are_detached_already_are_only_lent() -> None:
    around = replace(
        FRESH,
        host=on_vfio(HOST, BARE, GPU, SOUND),
        loans={BARE: loan_of(HOST, BARE), GPU: loan_of(HOST, GPU, SOUND)},
    )
    plan = up(two_gpus(), around)
    assert kinds(plan)[:4] == ["MakeCluster", "LendGpu", "LendGpu", "StartNetwork"]


def test_second_up_plans_nothing() -> None:
    allocation, around = whole_cluster(HOST, two_gpus())
    again = allocate(allocation.spec, host=around.host, loans=around.loans, domains=around.domains)
    assert again == allocation
    plan, findings = plan_up(again, around=around, rolls=ROLLS)
    assert plan == Plan("up", "herbarium", ())
    assert findings == ()


def test_up_after_a_reboot_of_the_host_binds_and_starts_again_with_the_same_keys() -> None:
    allocation, around = whole_cluster(HOST, two_gpus())
    stopped = tuple(replace(domain, running=False) for domain in around.domains)
    rebooted = replace(
        around,
        host=HOST,
        domains=stopped,
        networks=tuple(replace(network, active=False) for network in around.networks),
    )
    plan = up(allocation.spec, rebooted)
    assert kinds(plan) == [
        *("BindFunction", "BindFunction", "BindFunction", "StartNetwork"),
        *("StartNode", "StartNode", "StartNode"),
        *("AwaitNode", "AwaitNode", "AwaitNode", "AwaitRoll"),
    ]


def test_up_with_one_node_gone_starts_that_one() -> None:
    allocation, around = whole_cluster(HOST, two_gpus())
    plan = up(allocation.spec, replace(around, domains=around.domains[:2]))
    assert kinds(plan) == ["StartNode", "AwaitNode", "AwaitRoll"]
    awaited = plan.actions[1]
    assert isinstance(awaited, AwaitNode)
    assert awaited.placement.gpus == (GPU,)


def test_part_of_a_cluster_whose_keys_are_gone_is_refused() -> None:
    allocation, around = whole_cluster(HOST, two_gpus())
    around = replace(around, domains=around.domains[:2], folder=None, has_folder=False)
    with pytest.raises(Refused, match="keys are gone"):
        up(allocation.spec, around)


def test_changed_specification_is_refused_with_the_difference() -> None:
    allocation, around = whole_cluster(HOST, two_gpus())
    first, second, third = allocation.spec.nodes
    changed = replace(
        allocation.spec, nodes=(first, replace(second, cpus=8), replace(third, name="c9"))
    )
    with pytest.raises(Refused) as caught:
        up(changed, around)
    assert caught.value.details == ("c9: new", "compute-0: cpus 2 → 8", "compute-1: gone")
    assert "gpupt down herbarium first" in caught.value.remedy
    lost = replace(around, folder=None)
    with pytest.raises(Refused, match="its record is gone"):
        up(changed, lost)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rolls": ("spark", "x")}, "rolls: spark → spark, x"),
        ({"subnet": IPv4Network("10.1.0.0/24")}, "subnet: 10.71.0.0/24 → 10.1.0.0/24"),
    ],
)
def test_differences_of_the_whole(change: dict[str, object], line: str) -> None:
    before = two_gpus()
    assert differences(before, replace(before, **change)) == (line,)  # type: ignore[arg-type]
    assert differences(before, before) == ()
    turned = replace(before, nodes=before.nodes[::-1])
    assert differences(before, turned) == ("nodes: in another order",)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("memory", 2 << 30, "memory 1 GiB → 2 GiB"),
        ("disk", 20 << 30, "disk the image's → 20 GiB"),
        ("gpus", node("x", str(BARE)).gpus, "gpus 1 → 0000:01:00.0"),
    ],
)
def test_differences_of_a_node(name: str, value: object, line: str) -> None:
    before = two_gpus()
    nodes = (*before.nodes[:2], replace(before.nodes[2], **{name: value}))  # type: ignore[arg-type]
    assert differences(before, replace(before, nodes=nodes)) == (f"compute-1: {line}",)


def test_names_that_others_have_are_refused() -> None:
    spec = two_gpus()
    foreign = replace(FRESH, domains=(Domain("herbarium-frontend", "u", False),))
    with pytest.raises(Refused, match="a domain 'herbarium-frontend' that is not gpupt's"):
        up(spec, foreign)
    with pytest.raises(Refused, match="a network 'herbarium' that is not gpupt's"):
        up(spec, replace(FRESH, networks=(Network("herbarium", False),)))
    # a-b's node c and a's node b-c want one name.
    _, around = whole_cluster(HOST, replace(two_gpus(), name="herbarium-compute"))
    clash = replace(FRESH, domains=around.domains[:1])
    spec = spec_of(node("compute-frontend"))
    with pytest.raises(Refused, match="a node of herbarium-compute"):
        up(spec, clash)


def test_rolls_that_changed_since_are_a_warning_and_no_action() -> None:
    allocation, around = whole_cluster(HOST, two_gpus())
    plan, findings = plan_up(allocation, around=replace(around, image="new"), rolls=ROLLS)
    assert plan.actions == ()
    assert [finding.id for finding in findings] == ["image-changed"]


def test_down_ends_computes_first_and_gives_every_function_back() -> None:
    _, around = whole_cluster(HOST, two_gpus())
    plan, findings = plan_down("herbarium", around=around)
    assert findings == ()
    assert kinds(plan) == [
        *("StopNode", "StopNode", "StopNode", "StopNetwork", "ReturnGpu", "ReturnGpu"),
        *("ResetGpu", "ResetGpu"),
        *("BindFunction", "BindFunction", "BindFunction", "CheckGpu", "CheckGpu"),
        *("EraseLoan", "EraseLoan"),
        "RemoveCluster",
    ]
    stopped = [a.node for a in plan.actions if isinstance(a, StopNode)]
    assert stopped == ["compute-0", "compute-1", "frontend"]
    # Both computes power off at the same time; the frontend, whose /home they have, after.
    together = [a.together for a in plan.actions if isinstance(a, StopNode)]
    assert together == [("compute-1",), (), ()]
    back = {(a.address, a.after, a.override) for a in plan.actions if isinstance(a, BindFunction)}
    assert back == {
        (BARE, None, None),
        (GPU, "bochs-drm", None),
        (SOUND, "snd_hda_intel", None),
    }


def test_down_can_leave_the_gpus_detached() -> None:
    _, around = whole_cluster(HOST, two_gpus())
    plan, _ = plan_down("herbarium", around=around, keep_detached=True)
    assert not [a for a in plan.actions if isinstance(a, BindFunction | EraseLoan)]
    assert [a.gpu for a in plan.actions if isinstance(a, ReturnGpu)] == [BARE, GPU]


def test_down_leaves_a_persistent_gpu_detached_and_nobodys() -> None:
    _, around = whole_cluster(HOST, two_gpus())
    plan, _ = plan_down("herbarium", around=replace(around, persistent=frozenset({BARE})))
    back = [a.address for a in plan.actions if isinstance(a, BindFunction)]
    assert back == [GPU, SOUND]
    assert [a.gpu for a in plan.actions if isinstance(a, EraseLoan)] == [GPU]
    returned = [(a.gpu, a.cluster) for a in plan.actions if isinstance(a, ReturnGpu)]
    assert returned == [(BARE, None), (GPU, "herbarium")]


def test_second_down_plans_nothing_and_leaves_others_alone() -> None:
    assert plan_down("herbarium", around=FRESH)[0].actions == ()
    _, around = whole_cluster(HOST, two_gpus())
    assert plan_down("orchard", around=replace(around, has_folder=False))[0].actions == ()


def test_down_without_the_folder_goes_by_libvirt_and_the_loans() -> None:
    _, around = whole_cluster(HOST, two_gpus())
    plan, _ = plan_down("herbarium", around=replace(around, folder=None, has_folder=False))
    assert kinds(plan)[-1] == "EraseLoan"
    assert "RemoveCluster" not in kinds(plan)
    assert kinds(plan).count("StopNode") == 3


def test_down_when_the_loans_are_lost_says_so() -> None:
    _, around = whole_cluster(HOST, two_gpus())
    plan, findings = plan_down("herbarium", around=replace(around, loans={}))
    assert kinds(plan) == ["StopNode", "StopNode", "StopNode", "StopNetwork", "RemoveCluster"]
    assert [(f.id, f.subject) for f in findings] == [
        ("loan-missing", str(BARE)),
        ("loan-missing", str(GPU)),
    ]


def test_down_leaves_an_address_that_holds_another_card_on_loan() -> None:
    _, around = whole_cluster(HOST, two_gpus())
    devices = dict(around.host.devices)
    devices[BARE] = replace(devices[BARE], id=PciId(0x10DE, 0x20B5))
    moved = replace(around, host=replace(around.host, devices=devices))
    plan, findings = plan_down("herbarium", around=moved)
    assert [finding.id for finding in findings] == ["address-moved"]
    touched = {a.address for a in plan.actions if isinstance(a, BindFunction)}
    assert touched == {GPU, SOUND}


FACTS = {
    "hostname": "compute-1",
    "role": "compute",
    "cluster": "herbarium",
    "gpus": [
        {"address": "0000:04:00.0", "vendor_id": "10de", "device_id": "1eb8", "class": "038000"}
    ],
    "identity": {"authorized_keys_from_credential": True, "host_key_from_credential": True},
    "home": "nfs",
    "failed_units": [],
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"hostname": "localhost"}, "its name is 'localhost', declared 'compute-1'"),
        ({"role": "frontend"}, "its role is 'frontend', declared 'compute'"),
        ({"cluster": "x"}, "its cluster is 'x', declared 'herbarium'"),
        ({"gpus": []}, "1 GPU 10de:1eb8 is not seen (lent: 0000:02:00.0)"),
        ({"gpus": FACTS["gpus"] * 2}, "1 GPU 10de:1eb8 is seen that was not lent"),
        (
            {
                "identity": {
                    "authorized_keys_from_credential": False,
                    "host_key_from_credential": True,
                }
            },
            "its authorized key did not come from its credentials",
        ),
        (
            {
                "identity": {
                    "authorized_keys_from_credential": True,
                    "host_key_from_credential": False,
                }
            },
            "its host key did not come from its credentials",
        ),
    ],
)
def test_nodes_are_held_to_what_they_were_given(
    change: dict[str, object], line: str | None
) -> None:
    placement = allocate(two_gpus(), host=HOST).of("compute-1")
    facts = parse_facts("a banner\n" + json.dumps({**FACTS, **change}))
    wrong = assess_facts(facts, cluster="herbarium", placement=placement)
    assert wrong == (() if line is None else (line,))


@pytest.mark.parametrize("text", ["", "no json", "{}", '{"gpus": 3}', "[1]"])
def test_facts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(Failed, match="cannot be read"):
        parse_facts(text)
