"""The gate to libvirt against a real libvirtd: domains of emulated guests, and networks."""

from __future__ import annotations

import subprocess
import threading
import time
from ipaddress import IPv4Network
from pathlib import Path, PurePosixPath

import pytest
from conftest import CLUSTER, SUBNET, tiny_image
from tinykernel import WORD

from gpupt.decide.allocation import allocate, assess_subnet, bridge_of
from gpupt.decide.domain import Credential, view_domain, view_network
from gpupt.edges.hypervisor import Absent, Hypervisor
from gpupt.edges.routes import read_routes
from gpupt.edges.templates import render_view
from gpupt.errors import BadInput, DeadlineExceeded, Failed, Refused
from gpupt.model.cluster import Allocation, ClusterSpec, NodeSpec, Role
from gpupt.model.host import Host

SCHEMAS = Path("/usr/share/libvirt/schemas")
GOLDEN = Path(__file__).parents[1] / "golden"
NOTHING = Host({}, {}, ())


def allocation_of(subnet: str = SUBNET) -> Allocation:
    nodes = (NodeSpec("frontend", Role.FRONTEND, 1, 64 << 20, 0),)
    return allocate(ClusterSpec(CLUSTER, (), IPv4Network(subnet), nodes), host=NOTHING)


def domain_xml(state: Path, allocation: Allocation) -> str:
    image = tiny_image(state, stays=True)
    overlay = state / "disk.qcow2"
    subprocess.run(
        [
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
            *("-b", str(image.disk), str(overlay)),
        ],
        check=True,
        timeout=30,
    )
    secret = state / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o600)
    return render_view(
        "domain.xml.j2",
        view_domain(
            allocation,
            allocation.of("frontend"),
            image=image,
            disk=PurePosixPath(overlay),
            console=PurePosixPath(state / "console.log"),
            credentials=[Credential("gpupt.test", PurePosixPath(secret))],
            accelerated=False,
        ),
    )


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.xml")), ids=lambda file: file.name)
def test_golden_files_are_valid(file: Path) -> None:
    schema = SCHEMAS / ("network.rng" if file.name.startswith("network") else "domain.rng")
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", schema, file],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_domain_is_made_read_and_ended(hypervisor: Hypervisor, state: Path) -> None:
    allocation = allocation_of()
    xml = domain_xml(state, allocation)
    hypervisor.start_network(render_view("network.xml.j2", view_network(allocation)))
    hypervisor.start_domain(xml)
    domain = hypervisor.domain(f"{CLUSTER}-frontend")
    assert domain is not None
    assert domain.running
    assert domain.type == "qemu"
    assert domain.membership is not None
    assert (domain.membership.cluster, domain.membership.node) == (CLUSTER, "frontend")
    assert domain in hypervisor.domains()
    until = time.monotonic() + 60
    while WORD.strip() not in (state / "console.log").read_text():
        assert time.monotonic() < until, "the guest never spoke"
        time.sleep(0.2)
    pid = Path(f"/run/libvirt/qemu/{domain.name}.pid").read_text().strip()
    assert "s3cret" not in Path(f"/proc/{pid}/cmdline").read_text()
    assert hypervisor.remove_domain(domain.name, patience=60) is True
    assert hypervisor.domain(domain.name) is None
    # Nothing is there any more; and with no patience a guest is ended by force.
    assert hypervisor.remove_domain(domain.name, patience=60) is True
    hypervisor.start_domain(xml)
    assert hypervisor.remove_domain(domain.name, patience=0) is False
    assert hypervisor.domain(domain.name) is None


def test_network_is_made_read_and_removed(hypervisor: Hypervisor) -> None:
    allocation = allocation_of()
    xml = render_view("network.xml.j2", view_network(allocation))
    hypervisor.start_network(xml)
    hypervisor.start_network(xml)
    network = next(each for each in hypervisor.networks() if each.name == CLUSTER)
    assert network.active
    assert network.cluster == CLUSTER
    assert network.bridge == bridge_of(CLUSTER)
    assert network.subnets == (IPv4Network(SUBNET),)
    routes = read_routes(Path("/"))
    assert routes is not None
    assert any(route.interface == network.bridge for route in routes)
    # Its own network is no clash; for another cluster it is one, by libvirt and by routes.
    assess_subnet(allocation.spec, networks=hypervisor.networks(), routes=routes)
    other = ClusterSpec("other", (), IPv4Network("10.213.7.8/29"), allocation.spec.nodes)
    with pytest.raises(Refused, match="libvirt's network 'gputest'"):
        assess_subnet(other, networks=hypervisor.networks(), routes=())
    with pytest.raises(Refused, match="a route of this machine"):
        assess_subnet(other, networks=(), routes=routes)
    hypervisor.remove_network(CLUSTER)
    hypervisor.remove_network(CLUSTER)
    assert all(each.name != CLUSTER for each in hypervisor.networks())


def test_network_that_cannot_start_is_not_left_defined(hypervisor: Hypervisor) -> None:
    # The machine's own address: dnsmasq or the bridge cannot have it too.
    allocation = allocation_of()
    xml = render_view("network.xml.j2", view_network(allocation))
    broken = xml.replace(bridge_of(CLUSTER), "lo")
    with pytest.raises(Failed):
        hypervisor.start_network(broken)
    assert all(each.name != CLUSTER for each in hypervisor.networks())


@pytest.mark.parametrize(
    ("old", "new"),
    [("<acpi/>", "<acpy/>"), ("<memory unit", "<memry unit"), ('cache="writeback"', 'cache="x"')],
)
def test_bogus_xml_is_rejected_and_nothing_is_defined(
    hypervisor: Hypervisor, state: Path, old: str, new: str
) -> None:
    xml = domain_xml(state, allocation_of())
    assert old in xml
    with pytest.raises(Failed, match="could not define the domain"):
        hypervisor.start_domain(xml.replace(old, new))
    assert hypervisor.domain(f"{CLUSTER}-frontend") is None


def test_domain_that_does_not_start_is_not_left_defined(
    hypervisor: Hypervisor, state: Path
) -> None:
    # Its network is not there.
    with pytest.raises(Failed, match="could not start"):
        hypervisor.start_domain(domain_xml(state, allocation_of()))
    assert hypervisor.domain(f"{CLUSTER}-frontend") is None


def test_capacity_is_the_machines(hypervisor: Hypervisor) -> None:
    capacity = hypervisor.capacity()
    assert capacity.cpus >= 1
    assert 0 < capacity.available <= capacity.memory


def test_unreachable_libvirt_says_what_to_do() -> None:
    with pytest.raises(Failed) as caught:
        Hypervisor.connect("qemu+unix:///system?socket=/nonexistent/sock")
    assert "cannot reach libvirt" in caught.value.brief
    assert "--connect" in caught.value.remedy
    with pytest.raises(BadInput, match="no URI"):
        Hypervisor.connect("nonsense://x")


def test_test_driver_is_read_too() -> None:
    with Hypervisor.connect("test:///default") as hypervisor:
        assert [domain.name for domain in hypervisor.domains()] == ["test"]
        assert hypervisor.domains()[0].membership is None
        assert [network.name for network in hypervisor.networks()] == ["default"]
        assert hypervisor.capacity().cpus > 0
        assert hypervisor.domain("nobody") is None
        assert hypervisor.remove_domain("nobody", patience=1) is True


def test_late_call_is_given_up_and_the_next_one_waits_for_it() -> None:
    with Hypervisor.connect("test:///default") as hypervisor:
        release = threading.Event()
        order: list[str] = []

        def stuck() -> None:
            release.wait(10)
            order.append("late")

        with pytest.raises(DeadlineExceeded, match="no answer within"):
            hypervisor._call("be stuck", stuck, deadline=0.05)
        with pytest.raises(DeadlineExceeded, match="stuck in an earlier call"):
            hypervisor._call("overtake", lambda: order.append("early"), deadline=0.05)
        threading.Timer(0.1, release.set).start()
        hypervisor._call("go on", lambda: order.append("next"))
        assert order == ["late", "next"]


def test_absent_is_its_own_answer() -> None:
    with Hypervisor.connect("test:///default") as hypervisor, pytest.raises(Absent):
        hypervisor._call("find it", lambda: hypervisor._connection.lookupByName("nobody"))
