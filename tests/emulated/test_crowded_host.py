"""A host with cards in one IOMMU group with each other or with a disk, on several NUMA nodes,
and with virtual functions: what goes where, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from emulatedhost import BENCH, Host
from shapes import CROWDED, a_host, doctor, gpus, refusal
from tinyguest import TinyGuest

from gpupt.lab.host import Lab
from gpupt.lab.story import Facts
from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.emulated
ALONE, PAIR, BESIDE_DISK, DISK = "01:00.0", ("03:01.0", "03:02.0"), "05:01.0", "05:02.0"
WHOLE, NEAR_0, NEAR_1 = "06:00.0", "41:00.0", "81:00.0"
PART_ID = "10de10ca"


@pytest.fixture(scope="module")
def crowded(booted: Lab) -> Iterator[Host]:
    with a_host(CROWDED, like=booted, name="crowded", memory="3G") as host:
        yield host


@pytest.fixture(scope="module")
def crowded_as_booted(crowded: Host) -> Facts:
    return crowded.facts()


@pytest.fixture
def host(crowded: Host, crowded_as_booted: Facts) -> Iterator[Host]:
    """The host with everything at home, before the test and after."""
    yield crowded
    left = crowded_as_booted.differences(crowded.facts())
    if left:
        crowded.run("gpupt", "recover", "--yes", check=False)
        crowded.run("gpupt", "attach", "--all", "--yes", check=False)
    assert not left, "the test left drivers as they were not"


def test_cards_are_where_the_topology_says(host: Host) -> None:
    shown = gpus(host)
    assert list(shown) == [ALONE, *PAIR, BESIDE_DISK, WHOLE, NEAR_0, NEAR_1]
    assert {gpu["driver"] for gpu in shown.values()} == {"uio_pci_generic", "pci-pf-stub"}
    nodes = [shown[address]["numa_node"] for address in (ALONE, NEAR_0, NEAR_1)]
    assert nodes == [None, 0, 1]
    alone = host.facts().functions
    sharing = [each.group for address, each in alone.items() if str(address)[5:] in PAIR]
    assert len(set(sharing)) == 1


def test_doctor_names_what_shares_a_group(host: Host) -> None:
    found = doctor(host)
    shared = {each["subject"][5:]: each for each in found["group-not-viable"]}
    assert set(shared) == {*PAIR, BESIDE_DISK}
    assert {each["severity"] for each in shared.values()} == {"warn"}
    assert any(PAIR[1] in line for line in shared[PAIR[0]]["evidence"])
    assert any(f"{DISK}  virtio-pci" in line for line in shared[BESIDE_DISK]["evidence"])
    assert "group-host-critical" not in found


def test_one_of_a_pair_takes_the_other_along(host: Host, crowded_as_booted: Facts) -> None:
    plan = host.gpupt("detach", PAIR[0], "--dry-run")["actions"]
    taken = [each for each in plan if each["kind"] == "BindFunction"]
    assert [each["subject"][-7:] for each in taken] == [PAIR[1], PAIR[0]]
    assert "in one IOMMU group with" in taken[0]["why"]
    host.gpupt("detach", PAIR[0], "--yes")
    shown = gpus(host)
    assert [shown[address]["state"] for address in PAIR] == ["detached"] * 2
    host.gpupt("attach", PAIR[0], "--yes")
    assert crowded_as_booted.differences(host.facts()) == ()
    assert host.gpupt("status")["loans"] == []


SPEC = """\
cluster: shapes
rolls: [node]
network: {subnet: 10.73.0.0/24}
nodes:
  - {name: frontend, role: frontend, cpus: 1, memory: 512 MiB}
"""


def spec(host: Host, *nodes: str) -> str:
    """A cluster file in the host, with a compute node for each list of GPUs."""
    lines = [
        f"  - {{name: compute-{number}, role: compute, cpus: 1, memory: 512 MiB, gpus: {gpus}}}\n"
        for number, gpus in enumerate(nodes)
    ]
    host.run("mkdir", "-p", BENCH)
    host.ssh.run(["tee", f"{BENCH}/shapes.yaml"], stdin=SPEC + "".join(lines), deadline=20)
    return f"{BENCH}/shapes.yaml"


def test_a_pair_goes_to_one_node_whole_and_never_to_two(host: Host) -> None:
    said = refusal(host, "plan", spec(host, f'["{PAIR[0]}"]', f'["{PAIR[1]}"]'))
    assert "share IOMMU group" in said
    one = host.gpupt("plan", spec(host, f'["{PAIR[0]}"]'))["actions"]
    bound = {each["subject"][-7:] for each in one if each["kind"] == "BindFunction"}
    assert bound == set(PAIR)


def test_a_member_that_went_back_makes_the_group_unfit(
    host: Host, crowded_as_booted: Facts
) -> None:
    host.gpupt("detach", PAIR[0], "--yes")
    place = f"/sys/bus/pci/devices/0000:{PAIR[1]}"
    host.sh(f"echo > {place}/driver_override; echo 0000:{PAIR[1]} > {place}/driver/unbind")
    host.sh(f"echo 0000:{PAIR[1]} > /sys/bus/pci/drivers_probe")
    assert host.driver(PAIR[1]) == "uio_pci_generic"
    guest = TinyGuest(host, "unviable", (PciAddress.parse(PAIR[0]),))
    try:
        assert "not viable" in guest.create()
    finally:
        guest.destroy()
    found = doctor(host)["group-not-viable"]
    (fails,) = [each for each in found if each["severity"] == "fail"]
    assert fails["subject"][5:] == PAIR[0]
    assert any(f"{PAIR[1]}  uio_pci_generic" in line for line in fails["evidence"])
    again = host.gpupt("detach", PAIR[0], "--yes")["actions"]
    assert [(each["kind"], each["subject"][-7:]) for each in again] == [("BindFunction", PAIR[1])]
    host.gpupt("attach", PAIR[0], "--yes")
    assert crowded_as_booted.differences(host.facts()) == ()


def test_a_group_with_a_disk_in_use_is_refused(host: Host, crowded_as_booted: Facts) -> None:
    disk = host.sh(f"ls /sys/bus/pci/devices/0000:{DISK}/virtio*/block").stdout.strip()
    host.sh(f"mkswap /dev/{disk} && swapon /dev/{disk}")
    try:
        (found,) = doctor(host)["group-host-critical"]
        assert found["subject"][5:] == BESIDE_DISK
        assert any(f"{DISK}: swap is on it" in line for line in found["evidence"])
        said = refusal(host, "detach", BESIDE_DISK, "--yes")
        assert "its IOMMU group holds a device that the host needs" in said
        assert DISK in said
        assert DISK not in host.run("gpupt", "detach", "--all", "--dry-run").stdout
    finally:
        host.sh(f"swapoff /dev/{disk}")
    # The host needs it no more: it goes along, and comes back with what was on it.
    host.gpupt("detach", BESIDE_DISK, "--yes")
    assert host.driver(DISK) == "vfio-pci"
    host.gpupt("attach", BESIDE_DISK, "--yes")
    assert crowded_as_booted.differences(host.facts()) == ()
    again = host.sh(f"ls /sys/bus/pci/devices/0000:{DISK}/virtio*/block").stdout.strip()
    assert "SWAPSPACE2" in host.sh(f"head -c 4096 /dev/{again} | tail -c 10").stdout


def test_a_node_lives_near_its_gpu(host: Host) -> None:
    """As far as its domain's start: what its memory is then, the GPU has it be."""
    file = spec(host, f'["{NEAR_1}"]')
    host.sh(f"setsid gpupt up {file} --yes > {BENCH}/up.log 2>&1 & echo $! > {BENCH}/up.pid")
    try:
        host.sh("until virsh -q domstate shapes-compute-0 | grep -q running; do sleep 1; done")
        written = host.run("virsh", "dumpxml", "shapes-compute-0").stdout
        pid = host.run("cat", "/run/libvirt/qemu/shapes-compute-0.pid").stdout.strip()
        maps = host.run("cat", f"/proc/{pid}/numa_maps").stdout
    finally:
        host.sh(f"kill -KILL $(cat {BENCH}/up.pid)")
        host.gpupt("recover", "--yes", deadline=300)
    assert re.search(r"<memory mode=.preferred. nodeset=.1./>", written)
    pages = {node: sum(map(int, re.findall(rf" N{node}=(\d+)", maps))) for node in (0, 1)}
    # A GPU pins all of a guest's memory: 512 MiB are there from the start.
    assert pages[1] > 10 * pages[0]
    assert host.run("virsh", "-q", "list", "--all").stdout.strip() == ""


# Virtual functions


@pytest.fixture
def divided(host: Host) -> Iterator[Host]:
    """The host with two virtual functions made of the card."""
    numbers = f"/sys/bus/pci/devices/0000:{WHOLE}/sriov_numvfs"
    host.sh(f"echo 2 > {numbers}")
    yield host
    host.sh(f"echo 0 > {numbers}")


def test_a_card_with_virtual_functions_is_refused(divided: Host) -> None:
    shown = {each: gpu for each, gpu in gpus(divided).items() if each.startswith("06:")}
    whole, *parts = shown.values()
    assert len(parts) == 2
    assert {(part["vendor_id"], part["class"], part["state"]) for part in parts} == {
        ("10de", whole["class"], "driverless")
    }
    assert len({gpu["iommu_group"] for gpu in shown.values()}) == 3
    found = {each["subject"][5:]: each for each in doctor(divided)["sriov-active"]}
    # Its parts may be lent; the whole may not.
    assert set(found) == {WHOLE}
    assert "2 virtual functions" in found[WHOLE]["brief"]
    assert "it has virtual functions" in refusal(divided, "detach", WHOLE, "--yes")


def test_a_virtual_function_is_lent_by_itself(divided: Host) -> None:
    part, other = (each for each in gpus(divided) if each.startswith("06:") and each != WHOLE)
    divided.gpupt("detach", part, "--yes")
    assert (divided.driver(part), divided.driver(other)) == ("vfio-pci", None)
    tiny = TinyGuest(divided, "tiny-part", (PciAddress.parse(part),))
    try:
        tiny.start()
        assert PART_ID in (tiny.seen() or ())
    finally:
        tiny.destroy()
    divided.gpupt("attach", part, "--yes")
    assert divided.driver(part) is None


def test_without_virtual_functions_the_whole_card_goes(
    host: Host, crowded_as_booted: Facts
) -> None:
    assert "sriov-active" not in doctor(host)
    host.gpupt("detach", WHOLE, "--yes")
    assert gpus(host)[WHOLE]["state"] == "detached"
    host.gpupt("attach", WHOLE, "--yes")
    assert crowded_as_booted.differences(host.facts()) == ()


# vfio-pci missing: last, since it leaves the module unloaded


def test_a_kernel_without_vfio_pci(host: Host, crowded_as_booted: Facts) -> None:
    module = host.run("modinfo", "-n", "vfio-pci").stdout.strip()
    host.sh("modprobe -r vfio-pci")
    # What depmod would write, of the one file that says so to people, in no time.
    listed = f"{module.partition('/kernel/')[0]}/modules.dep"
    host.sh(f"cp {listed} {BENCH}/ && mv {module} {BENCH}/ && sed -i '/vfio-pci.ko/d' {listed}")
    try:
        (found,) = doctor(host)["vfio-missing"]
        assert found["severity"] == "fail"
        assert "the kernel has no vfio-pci" in refusal(host, "detach", ALONE, "--yes")
    finally:
        host.sh(f"mv {BENCH}/$(basename {module}) {module} && mv {BENCH}/modules.dep {listed}")
    assert "vfio-missing" not in doctor(host)
    host.gpupt("detach", ALONE, "--yes")
    host.gpupt("attach", ALONE, "--yes")
    assert crowded_as_booted.differences(host.facts()) == ()
